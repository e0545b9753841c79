"""Greedy decoding beside transformers: the same weights, the same prompts, the two interleaved in one run.

    python benchmarks/generate.py [--rounds 5] [--new 64] [--threads 2]

The model has SmolLM2-135M's shape and random weights. Prints one JSON object; only its ratios mean
anything on a shared machine. It exits 1 where the two disagree on a token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from langmill.families.folder import load_model
from langmill.infer.generate import generate_ids
from langmill.infer.sampling import Sampling

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
TINY = {"vocab_size": 512, "hidden_size": 72, "intermediate_size": 128, "num_hidden_layers": 2}


def ours(model, prompts, new):
    ids = [[] for _ in prompts]
    for step in generate_ids(model, prompts, Sampling(max_new_tokens=new)):
        for token in step:
            ids[token.row].append(token.id)
    return ids


@torch.inference_mode()
def theirs(model, prompts, new):
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(padded, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return out[:, longest:].tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to see that this file works")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**SMOLLM2, "initializer_range": 0.1, **(TINY if options.tiny else {})}
    )
    peer = transformers.LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model = load_model(Path(folder))
    random = torch.Generator().manual_seed(1)
    cases = {
        "one prompt of 64": [64],
        "16 prompts of 8 to 128": [8 + 8 * row for row in range(16)],
    }
    results, agree = {}, True
    for name, sizes in cases.items():
        prompts = [torch.randint(1, config.vocab_size, (size,), generator=random).tolist() for size in sizes]
        rates: dict[str, list[float]] = {"langmill": [], "transformers": []}
        for round_ in range(options.rounds + 1):  # the first warms up
            found = {}
            for who, call, it in (("langmill", ours, model), ("transformers", theirs, peer)):
                began = time.perf_counter()
                found[who] = call(it, prompts, options.new)
                if round_:
                    rates[who].append(len(prompts) * options.new / (time.perf_counter() - began))
            agree &= found["langmill"] == found["transformers"]
        results[name] = {
            **{who: [round(f(got), 1) for f in (min, statistics.median, max)] for who, got in rates.items()},
            "ratio": round(statistics.median(map(lambda a, b: a / b, *rates.values())), 3),
        }
    print(json.dumps({
        "benchmark": "generate", "unit": "new tokens/s, prefill included (min, median, max)", "new": options.new,
        "threads": options.threads, "torch": torch.__version__, "transformers": transformers.__version__,
        "same_tokens": agree, "results": results,
    }))  # fmt: skip
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
