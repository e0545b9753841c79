"""QLoRA against LoRA: bytes of the frozen weights, and the peak memory of the same short run of each.

    scripts/bench qlora [--steps 3] [--rounds 1] [KEY=VALUE ...]

SmolLM2-135M on 64 conversations of chitchat, each run a process of its own. Exit code 1 unless the layers that were
replaced take at most 0.17 of their float32 bytes, the whole frozen model 0.30, and a run less memory than LoRA's.
Prints a table, and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from langmill.adapt.lora import quantise
from langmill.families.folder import load, save
from langmill.model.layers import Int4Linear

LAYERS, WHOLE = 0.17, 0.30


def held(module: nn.Module) -> int:
    """Bytes of its weights and buffers."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return sum(tensor.nbytes for tensor in tensors)


def shares(folder: Path) -> dict[str, Any]:
    """Megabytes by kind, in float32 and as QLoRA freezes them, and the ratios."""
    model, _ = load(folder)
    plain = {name: held(layer) for name, layer in model.named_modules()}
    quantise(model)
    fours = {name: held(layer) for name, layer in model.named_modules() if isinstance(layer, Int4Linear)}
    layers, whole = (sum(plain[name] for name in fours), sum(fours.values())), (plain[""], held(model))
    embedding = plain["tokens"], held(model.tokens)
    rows = {"replaced layers": layers, "embedding": embedding,
            "the rest": (whole[0] - layers[0] - embedding[0], whole[1] - layers[1] - embedding[1]),
            "whole model": whole}  # fmt: skip
    return {name: {"float32": a, "frozen": b, "ratio": round(b / a, 4)} for name, (a, b) in rows.items()}


def peak(folder: Path, data: Path, method: str, out: Path, given: argparse.Namespace) -> dict[str, float]:
    """Peak memory, speed and last loss of one run in a process of its own."""
    words = [
        sys.executable,
        "-m",
        "langmill",
        "finetune",
        str(folder),
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    words += ["--method", method, "--json", "holdout=0", "samples=0", "too_long=truncate", "train.max_length=511",
              f"train.max_steps={given.steps}", "train.dtype=bfloat16", "train.compile=false"]  # fmt: skip
    done = subprocess.run([*words, *given.settings], check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    return {name: figures[name] for name in ("peak_bytes", "tokens_per_second", "training_loss")}


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from assets import fetch

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("settings", nargs="*", help="further settings of langmill finetune")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder, data = Path(scratch) / "model", Path(scratch) / "data.jsonl"
        save(*load(next(fetch("smollm2").glob("*.gguf"))), folder)
        with open(fetch("chitchat") / "conversations.jsonl", encoding="utf-8") as file:
            data.write_text("".join(line for line, _ in zip(file, range(64), strict=False)), encoding="utf-8")
        bytes_by_kind = shares(folder)
        runs: dict[str, list[dict[str, float]]] = {"lora": [], "qlora": []}
        for number in range(given.rounds):
            for method, found in runs.items():
                found.append(peak(folder, data, method, Path(scratch) / f"{method}-{number}", given))
    medians = {
        method: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for method, found in runs.items()
    }
    for name, row in bytes_by_kind.items():
        print(f"{name:16} {row['float32'] / 1e6:8.1f} MB {row['frozen'] / 1e6:8.1f} MB {row['ratio']:6.3f}")
    for method, row in medians.items():
        print(f"{method:16} {row['peak_bytes'] / 1e9:8.2f} GB peak {row['tokens_per_second']:8.0f} tokens/s")
    good = (
        bytes_by_kind["replaced layers"]["ratio"] <= LAYERS
        and bytes_by_kind["whole model"]["ratio"] <= WHOLE
        and medians["qlora"]["peak_bytes"] < medians["lora"]["peak_bytes"]
    )
    print(json.dumps({"bench": "qlora", "ok": good, "bytes": bytes_by_kind, "runs": medians}))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
