"""What only a GPU can show: packed attention and recorded passes equal the plain ones, and how fast both are.

    scripts/bench gpu [--rounds 5] [--new 64] [--device cuda]

A model of SmolLM2-135M's shape with random weights, beside transformers. Equality: attention inside packed documents by
the flash kernel against the same under a mask in float32, with gradients; greedy tokens of the engine with and without
recorded passes. Speed, taking turns with the peer: training steps in bfloat16 on 8 rows of 2,048 tokens, whole and
packed (tokens/s and peak memory), and decoding of 1, 8 and 32 prompts. Exit code 1 where something is not equal.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from langmill.families.folder import load_model
from langmill.infer.engine import Engine
from langmill.infer.request import Request
from langmill.infer.runner import TorchRunner
from langmill.infer.sampling import Sampling
from langmill.model.attend import visible
from langmill.model.packed import Packed, attend_packed, starts
from langmill.train.objectives import causal

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "eos_token_id": None, "pad_token_id": 0,
    "initializer_range": 0.05,
}  # fmt: skip
ROWS, LENGTH = 8, 2048


def packed_errors(device: torch.device) -> dict[str, float]:
    """Distance of the packed kernel's results and gradients from exact ones, as a share of their length."""
    found = {}
    for name, causal_, window in (("causal", True, None), ("both ways", False, None), ("window", True, 50)):
        torch.manual_seed(0)
        documents_BT = torch.randint(0, 2, (3, 300), device=device).cumsum(1).div(40, rounding_mode="floor")
        q, k, v = (torch.randn(3, h, 300, 64, device=device).requires_grad_() for h in (6, 2, 2))
        places = torch.arange(300, device=device)[None]
        mask = visible(places, places, causal_, window, documents_BT)
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        packed = Packed(starts(documents_BT).int(), 300, causal_, window)
        narrow = attend_packed(q.bfloat16(), k.bfloat16(), v.bfloat16(), packed, None)
        far = torch.randn_like(exact)
        sides = [
            [out.detach(), *torch.autograd.grad(out, (q, k, v), far.to(out.dtype))]
            for out in (exact, narrow.float())
        ]
        found[name] = max(float((a - b).norm() / a.norm()) for a, b in zip(*sides, strict=True))
    return found


def written(engine: Engine, prompts: list[list[int]], new: int) -> list[list[int]]:
    engine.slots.forget()  # else later rounds would not read the prompts again
    numbers = [
        engine.submit(Request(ids, Sampling(max_new_tokens=new), stop_ids=frozenset())) for ids in prompts
    ]
    ids: dict[int, list[int]] = {number: [] for number in numbers}
    while not engine.idle:
        for event in engine.step():
            ids[event.request] += event.ids
    return [ids[number] for number in numbers]


def prompts_of(count: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(count)
    return [torch.randint(1, SHAPE["vocab_size"], (64,), generator=random).tolist() for _ in range(count)]


def recorded(folder: Path, device: torch.device, dtype: torch.dtype) -> float:
    """The share of prompts whose greedy tokens are the same with and without recordings."""
    model = load_model(folder, dtype).to(device)
    prompts = [ids[: 5 + 7 * row] for row, ids in enumerate(prompts_of(8))]
    found = []
    for graphs in (True, False):
        runner = TorchRunner(model, 4, 512)
        if not graphs:
            runner._graphs = None
        found.append(written(Engine(runner), prompts, 64))
    return statistics.mean(a == b for a, b in zip(*found, strict=True))


def raced(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turn; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            torch.accelerator.synchronize()
            began = time.perf_counter()
            call()
            torch.accelerator.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def decoding(folder: Path, device: torch.device, rounds: int, new: int) -> dict[str, Any]:
    mine = load_model(folder, torch.bfloat16).to(device)
    peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    found = {}
    for count in (1, 8, 32):
        found[count] = side_by_side(mine, peer, count, rounds, new)
        print(count, found[count], file=sys.stderr, flush=True)
    return found


def side_by_side(mine: Any, peer: Any, count: int, rounds: int, new: int) -> dict[str, Any]:
    prompts = prompts_of(count)
    plain = TorchRunner(mine, count, 512)
    plain._graphs = None
    recorded, unrecorded = Engine(TorchRunner(mine, count, 512)), Engine(plain)
    ids = torch.tensor(prompts, device=peer.device)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
    calls = {
        "recorded": lambda: written(recorded, prompts, new),
        "plain": lambda: written(unrecorded, prompts, new),
        "transformers": lambda: peer.generate(ids, **asked),
    }
    with torch.inference_mode():
        seconds = raced(calls, rounds)
    return summary(seconds, count * new, "recorded")


def training(folder: Path, device: torch.device, rounds: int) -> dict[str, Any]:
    tokens = torch.randint(1, SHAPE["vocab_size"], (ROWS, LENGTH), device=device)
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]
    whole = {"tokens": tokens, "targets": targets}
    packed = whole | {"documents": (torch.arange(LENGTH, device=device) // 300 + 1).expand(ROWS, -1)}
    mine = load_model(folder, torch.float32).to(device).train()
    peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()

    def ours(batch: dict[str, Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss, count = causal(mine, batch)
        (loss / count).backward()
        mine.zero_grad(set_to_none=True)

    def theirs() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = peer(input_ids=tokens, labels=tokens).loss
        loss.backward()
        peer.zero_grad(set_to_none=True)

    calls = {"whole": lambda: ours(whole), "packed": lambda: ours(packed), "transformers": theirs}
    held = {}
    for name, call in calls.items():
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        call()
        held[name] = round((torch.accelerator.max_memory_allocated() - before) / 2**30, 2)
    return summary(raced(calls, rounds), ROWS * LENGTH, "packed") | {"activations_gib": held}


def summary(seconds: dict[str, list[float]], tokens: int, mine: str) -> dict[str, Any]:
    """Tokens/s (min, median, max), and by round how many times the peer's."""
    spread = (min, statistics.median, max)
    ratios = [theirs / ours for ours, theirs in zip(seconds[mine], seconds["transformers"], strict=True)]
    rates = {name: [round(f([tokens / s for s in got])) for f in spread] for name, got in seconds.items()}
    return {"tokens_per_second": rates, f"{mine}_over_transformers": [round(f(ratios), 3) for f in spread]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that torch can use is here: there is nothing to prove", file=sys.stderr)
        return 2
    device = torch.device(given.device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(folder)
        errors = packed_errors(device)
        same = {
            str(dtype).removeprefix("torch."): recorded(folder, device, dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }
        report = {
            "gpu": torch.cuda.get_device_name(device), "torch": torch.__version__,
            "transformers": transformers.__version__, "packed_errors": errors, "recorded_same": same,
        }  # fmt: skip
        print(report, file=sys.stderr, flush=True)
        report["training"] = training(folder, device, given.rounds)
        print(report["training"], file=sys.stderr, flush=True)
        report["decoding"] = decoding(folder, device, given.rounds, given.new)
    print(json.dumps(report))
    return 0 if max(errors.values()) < 1e-2 and same["float32"] == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
