"""kill -9 at random moments of `langmill pretrain`, --resume, and compare the final bytes.

    scripts/bench kill9 [--kills 30] [--compile] [--steps 300] [--seed 0]

Runs are killed at a random time after their start, every third one while a checkpoint is being written, and
resumed until they end; then the next one starts, until there were enough kills. Every model that comes out
must be the undisturbed run's to the byte. Prints one JSON object; exit code 1 where bytes differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pydoc_data.topics
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLED = 1 if sys.platform == "win32" else -9
SHAPE = ("model.layers=2", "model.dim=64", "model.heads=2", "model.kv_heads=1", "model.hidden=128")
PACE = ("train.max_length=64", "train.micro_batch_size=4", "train.save_every=7", "train.eval_every=40")


def command(text: Path, out: Path, steps: int, compiled: bool) -> list[str]:
    words = [
        sys.executable,
        "-m",
        "langmill",
        "pretrain",
        str(text),
        "--out",
        str(out),
        "--resume",
        "--quiet",
    ]
    choices = [f"train.max_steps={steps}", f"train.compile={str(compiled).lower()}", "train.dtype=float32"]
    return [*words, "tokenizer.vocab_size=512", "--size", "tiny", *SHAPE, *PACE, *choices]


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def interrupted(words: list[str], out: Path, seconds: float, while_saving: bool) -> bool:
    """Start, and kill -9 after `seconds`, or at the first checkpoint being written after that. False: it ended."""
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    ends = time.monotonic() + seconds
    checkpoints = out.with_name(out.name + ".run") / "checkpoints"
    while running.poll() is None:
        if time.monotonic() < ends:
            time.sleep(0.01)
        elif not while_saving or (
            checkpoints.is_dir() and any(path.suffix == ".tmp" for path in checkpoints.iterdir())
        ):
            running.kill()
            break
    errors = running.communicate()[1].decode("utf-8", errors="replace")
    if running.returncode not in (0, KILLED):
        sys.exit(f"a resumed run failed:\n{errors}")
    return running.returncode == KILLED


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args()
    dice = random.Random(asked.seed)
    kills = saving = models = same = 0
    with tempfile.TemporaryDirectory(prefix="langmill-kill9-", ignore_cleanup_errors=True) as scratch:
        text = Path(scratch, "manual.txt")
        text.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
        whole = Path(scratch, "whole")
        started = time.monotonic()
        subprocess.run(
            command(text, whole, asked.steps, asked.compile), check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.monotonic() - started
        while kills < asked.kills:
            out = Path(scratch, f"killed-{models}")
            words = command(text, out, asked.steps, asked.compile)
            while interrupted(
                words,
                out,
                dice.uniform(0, 0.7 * seconds) if kills < asked.kills else math.inf,
                while_saving=kills % 3 == 2,
            ):
                kills += 1
                saving += kills % 3 == 0
                print(f"kill {kills}", file=sys.stderr, flush=True)
            seconds *= 0.8 if kills < asked.kills else 1  # it ended before the kill: aim earlier
            models += 1
            same += digest(out) == digest(whole)
    found = {"kills": kills, "while_saving": saving, "models": models, "identical": same}
    print(json.dumps({"bench": "kill9", "compiled": asked.compile, **found}))
    sys.exit(same != models)


if __name__ == "__main__":
    main()
