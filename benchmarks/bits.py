"""What 8 and 4 bits cost a decoder that was pretrained here in float32, beside llama.cpp's Q8_0 and Q4_0, as JSON.

    scripts/bench bits [--size 12M] [--steps 600] [--model FOLDER] [--windows 100] [--peers PYTHON] [--work FOLDER]

A decoder is trained on package descriptions (asset `ddtp`; or --model: one trained before), compressed by `langmill
compress` (GPTQ, calibrated on the training text) and exported to GGUF. All of them score the same windows of held-out
descriptions, ours by the C++ pass that serves, theirs by llama.cpp: perplexities, and each over float32's. F32 in
llama.cpp shows that both score alike. PYTHON: see `scripts/bench engine`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets
from _engine import OURS, ROOT, peer
from _figures import write_rows

from langmill.common.configure import configure
from langmill.common.settings import CompressSettings, ExportSettings, PretrainSettings
from langmill.families.folder import load
from langmill.infer.native import NativeRunner
from langmill.jobs import compress, export, pretrain
from langmill.model.count import parameters
from langmill.model.transformer import Transformer

LENGTH, EVERY = 256, 50  # tokens of a window; one description in so many is held out
FILES = {"F32": "float32", "Q8_0": "int8", "Q4_0": "int4"}


def texts(work: Path) -> tuple[Path, list[str]]:
    """The file of training texts, and the held-out ones."""
    lines = (assets.fetch("ddtp") / "descriptions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["text"] for line in lines]
    train = work / "train.jsonl"
    write_rows(train, ({"text": text} for number, text in enumerate(rows) if number % EVERY))
    return train, rows[::EVERY]


def made(given: argparse.Namespace, work: Path, train: Path) -> dict[str, Path]:
    """The folders of ours; what is there already is kept."""
    source = given.model or work / "float32"
    if not source.exists():
        words = [f"size={given.size}", "vocab_size=8192", f"max_steps={given.steps}", "max_length=256"]
        words += [f"threads={given.threads}"]
        pretrain.run(
            configure(
                PretrainSettings,
                None,
                words,
                path=[str(train)],
                out=source,
                resume=source.with_name("float32.run").exists(),
            )
        )
    for bits in (8, 4):
        if not (work / f"int{bits}").exists():
            words = [f"bits={bits}", "portable=false"]
            settings = configure(
                CompressSettings, None, words, model=str(source), data=[str(train)], out=work / f"int{bits}"
            )
            compress.run(settings, quiet=True)
    for kind in FILES:
        if not (work / f"{kind}.gguf").exists():
            export.run(ExportSettings(model=str(source), out=work / f"{kind}.gguf", type=kind), quiet=True)
    return {name: source if name == "float32" else work / name for name in OURS}


def windows(ids: list[list[int]], most: int) -> list[list[int]]:
    """Texts one behind the other, in windows."""
    line = [token for one in ids for token in one]
    return [line[at : at + LENGTH] for at in range(0, len(line) - LENGTH, LENGTH)][:most]


def scored(folder: Path, rows: list[list[int]]) -> list[float]:
    """Nats of each window but its first token, by native.cpp."""
    model = load(folder)[0].eval()
    assert isinstance(model, Transformer)
    runner, found = NativeRunner(model, 1, LENGTH), []
    places = np.arange(LENGTH)
    for row in rows:
        logits = runner.run(np.array(row), np.zeros(LENGTH, np.int64), places, places)
        logs = logits[:-1].double().log_softmax(-1)
        found.append(-float(logs.gather(1, torch.tensor(row[1:])[:, None]).sum()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="12M")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers-native" / "bin" / "python")
    parser.add_argument("--work", type=Path, help="keep everything here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        train, held = texts(work)
        folders = made(given, work, train)
        model, tokenizer = load(folders["float32"])
        assert tokenizer is not None
        rows = windows([tokenizer.encode(text) for text in held], given.windows)
        nll = {name: scored(folder, rows) for name, folder in folders.items()}
        with peer(given) as ask:
            for kind in FILES:
                nll[kind] = ask(file=work / f"{kind}.gguf", do="score", rows=rows)["nll"]
    tokens = len(rows) * (LENGTH - 1)
    perplexity = {name: math.exp(sum(values) / tokens) for name, values in nll.items()}
    found: dict[str, Any] = {
        "parameters": parameters(model.config),
        "tokens": tokens,
        "perplexity": {name: round(value, 4) for name, value in perplexity.items()},
        "over_float32": {n: round(value / perplexity["float32"] - 1, 5) for n, value in perplexity.items()},
        "worst_difference_f32": max(abs(a - b) for a, b in zip(nll["float32"], nll["F32"], strict=True)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
