"""GGUF files of ours in llama.cpp: the same ids, chats and greedy tokens as here on the same weights, as JSON.

    scripts/bench gguf_out [--types F32 Q8_0] [--tokens 24] [--only NAME...] [--peers PYTHON] [--out RESULTS.json]

SmolLM2 (asset `smollm2`) and small models of random weights, one of each architecture, with a tokenizer trained here.
Each is exported, read back by us and loaded by llama.cpp (its xllamacpp wheel); ids of texts in many scripts, ids of
chats, and greedy tokens behind each prompt are compared. llama.cpp rounds the numbers that go into a product (to 8 bits
beside 8 and 4 bits of weight, to 16 beside F16), so that another token may win there: counted are the tokens that are
our first choice too behind the same ones, once as we compute and once with inputs rounded as there; a tie is how far
ours was above theirs, as a share of the logits' spread. PYTHON belongs to an environment with xllamacpp; the
first use makes one in .venv-peers-llama.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets
from _figures import said

from langmill.common.configure import configure
from langmill.common.settings import ExportSettings
from langmill.families import family
from langmill.families.folder import load, outline, save
from langmill.families.gguf_write_tokenizer import adds_bos
from langmill.jobs import export
from langmill.model.transformer import Transformer
from langmill.text.chat import chat_ids
from langmill.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / "benchmarks" / "peers" / "llama_wheel.py"
SHAPE = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
SMALL: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, "model_type": "llama", "tie_word_embeddings": True},
    "llama-untied-biased": {**SHAPE, "model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "llama-llama3": {**SHAPE, "model_type": "llama", "rope_parameters": LLAMA3, "head_dim": 32},
    "llama-yarn": {**SHAPE, "model_type": "llama", "rope_parameters": YARN},
    "llama-linear": {
        **SHAPE, "model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    },
    "qwen2": {**SHAPE, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**SHAPE, "model_type": "qwen3", "head_dim": 32},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
}  # fmt: skip
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好！"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "  Say <b>it</b> again:\n\n- ça va?"},
    ],
)
MORE = (
    "e\u0301 is not é, and \u0915\u093c is what it is", "I'LL we'll I'm it's DON'T", "1234567890 ٣٤٥ ½ ²",
    "\t\tx\n\n\n y  \r\n z", "日本語のテキストと한국어", "Ĳsselmeer straße ﬁne", "a\u00a0b\u2003c\u200bd",
    "…—“quotes” «»", "🙂\U0001f469\u200d\U0001f467", "x" * 50 + " " * 20 + "y",
)  # fmt: skip


def texts() -> list[str]:
    """Texts to encode: those of the export's own check, hard ones, and random mixtures of characters."""
    chance = random.Random(0)
    letters = "abcZ 1 2'\n\t.,-éßñ床前明月光مرحباनमस्ते안녕ด้วยא🙂\u0301\u200d_/"
    mixed = ["".join(chance.choices(letters, k=chance.randint(1, 40))) for _ in range(200)]
    return [*export.TEXTS, *MORE, *mixed]


def models(scratch: Path, only: list[str]) -> Iterator[tuple[str, Path]]:
    """Each model's name, and the folder or file that holds it."""
    if not only or "smollm2" in only:
        yield "smollm2", next(assets.fetch("smollm2").glob("*.gguf"))
    tokenizer = Tokenizer.train([*map(str, topics.values()), *export.TEXTS], 700).with_template(CHATML)
    for name, shape in SMALL.items():
        if only and name not in only:
            continue
        theirs = {**shape, "vocab_size": tokenizer.vocab_size}
        model = Transformer(family(shape["model_type"], name).config(theirs))
        torch.manual_seed(0)
        for key, weight in model.named_parameters():
            torch.nn.init.normal_(
                weight, 1.0 if "norm.weight" in key else 0.0, 0.3 if weight.dim() > 1 else 0.2
            )
        save(model, tokenizer, scratch / name)
        yield name, scratch / name


def compared(given: argparse.Namespace, name: str, source: Path, kind: str, scratch: Path) -> dict[str, Any]:
    """One export in both: how many texts, chats and tokens are the same."""
    file = scratch / f"{name}-{kind}.gguf"
    words = [f"type={kind}"] if kind != "as-is" else []
    export.run(configure(ExportSettings, None, words, model=str(source), out=file), quiet=True)
    model, _ = load(file)
    tokenizer = outline(source)[1]
    assert isinstance(model, Transformer) and tokenizer is not None
    bos = [tokenizer.bos_id] if adds_bos(tokenizer) else []
    asked, prompts = texts(), [ids[:64] for ids in map(tokenizer.prompt_ids, export.TEXTS)]
    job = scratch / "job.json"
    body = {"texts": asked, "prompts": prompts, "chats": CHATS, "tokens": given.tokens}
    job.write_text(json.dumps(body), encoding="utf-8")
    theirs = said([given.peers, PEER, file, job, "--threads", given.threads])
    other = [
        text for text, ids in zip(asked, theirs["ids"], strict=True) if ids != bos + tokenizer.encode(text)
    ]
    chats = sum(ids == chat_ids(tokenizer, chat) for ids, chat in zip(theirs["chats"], CHATS, strict=True))
    written = list(zip(prompts, theirs["written"], strict=True))
    exact = [agreed(model, prompt, ids) for prompt, ids in written]
    with mock.patch.object(torch.nn.functional, "linear", partial(as_there, kind)):
        rounded = [agreed(model, prompt, ids) for prompt, ids in written]
    for made in (file, file.with_suffix(".Modelfile")):
        made.unlink()
    return {
        "texts": len(asked), "texts_same": len(asked) - len(other), "other": other[:5], "chats_same": chats,
        "tokens": sum(len(ids) for _, ids in written), "same": told(exact), "same_with_inputs_rounded": told(rounded),
    }  # fmt: skip


def told(runs: list[tuple[int, float]]) -> dict[str, Any]:
    return {"tokens": sum(same for same, _ in runs), "widest_tie": max((gap for _, gap in runs), default=0.0)}


def as_there(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, x rounded as llama.cpp rounds it beside weights of a type: 8 bits in groups of 32 beside 8 and 4."""
    if kind in ("F16", "BF16"):
        x = x.to(torch.float16 if kind == "F16" else torch.bfloat16).float()
    elif kind != "F32" and x.shape[-1] % 32 == 0:
        groups = x.unflatten(-1, (-1, 32))
        steps = groups.abs().amax(-1, keepdim=True) / 127
        codes = (groups / torch.where(steps == 0, 1.0, steps)).round()
        x = (codes * steps.half().float()).flatten(-2)
    return torch.addmm(torch.zeros(1) if bias is None else bias, x.flatten(0, -2), weight.T).unflatten(
        0, x.shape[:-1]
    )


@torch.inference_mode()
def agreed(model: Transformer, prompt: list[int], written: list[int]) -> tuple[int, float]:
    """How many of their tokens are our choice too, behind the same ones, and by how much at most ours was preferred to
    theirs, as a share of the logits' spread."""
    rows = torch.tensor([prompt + written])
    logits = model(rows)[0, len(prompt) - 1 : -1]
    ours, theirs = logits.max(-1), logits.gather(1, torch.tensor(written)[:, None])[:, 0]
    gaps = (ours.values - theirs) / logits.std(-1)
    return int((ours.indices == torch.tensor(written)).sum()), round(float(gaps.max()), 5)


def peers(python: Path) -> None:
    """Make the peer's environment where it is not there."""
    if not python.exists():
        print("installing xllamacpp into an environment of its own", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "xllamacpp"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", default=["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers-llama" / "bin" / "python")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    peers(given.peers)
    torch.set_num_threads(given.threads)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        for name, source in models(Path(temporary), given.only):
            for kind in given.types:
                found[f"{name} {kind}"] = row = compared(given, name, source, kind, Path(temporary))
                print(f"{name} {kind}", row, file=sys.stderr)
    print(json.dumps(found, ensure_ascii=False))
    if given.out:
        given.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
