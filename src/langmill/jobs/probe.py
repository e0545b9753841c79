"""A calibration run: the real model, batches and training loop for some seconds, to learn what a step costs.

`here` runs in this process; `apart` in a fresh one, whose peak memory is the run's own: `python -m
langmill.jobs.probe` reads a request as JSON and answers in JSON.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from langmill.common.errors import TrainingError
from langmill.common.settings import TrainSettings
from langmill.data.batches import Batch
from langmill.data.shards import Shards
from langmill.families import family
from langmill.families.folder import export_config
from langmill.infer.ready import find_device
from langmill.jobs import corpus as text
from langmill.jobs.pretrain import fresh
from langmill.model.config import Config
from langmill.text.tokenizer import Tokenizer
from langmill.train.loop import Batches, State, fit
from langmill.train.measure import choose, peak_bytes
from langmill.train.objectives import OBJECTIVES
from langmill.train.step import tensors

STEPS = 40  # of a calibration at most
LEAST = 3  # steps that are timed at least, the first one left out


@dataclass(frozen=True)
class Cost:
    """What one optimizer step costs here. step_tokens: predictions in it; base_bytes: peak before the model was made.

    spread: the slowest timed step over the fastest, which tells a busy machine from a quiet one.
    """

    step_seconds: float
    step_tokens: float
    peak_bytes: int
    base_bytes: int
    dtype: str
    compile: bool
    threads: int
    matmul_flops: float
    spread: float
    why: tuple[str, ...]


def here(
    config: Config, train: TrainSettings, batches: Batches, steps: int, seed: int, seconds: float
) -> Cost:
    """Train a fresh model of this shape for about `seconds` and throw it away.

    train: with nothing left to choose by size. steps: of the run that is planned; on them depends whether it would be
    compiled. Raises TrainingError where memory runs out.
    """
    device = find_device(train.device)
    base = peak_bytes(device)
    model = fresh(config, seed).to(device)
    train = train.model_copy(update={"max_steps": STEPS, "save_every": STEPS, "non_finite": "skip"})
    why: tuple[str, ...] = ()
    if train.compile == "auto":  # which depends on how long the planned run is, and not on this one
        place = batches.state()
        sample = tensors(next(batches), device)
        batches.restore(place)
        choices = choose(
            model, OBJECTIVES[train.objective], sample, train, steps * train.gradient_accumulation_steps
        )
        why, fixed = (
            choices.why,
            {"dtype": choices.dtype, "compile": choices.compile, "threads": choices.threads},
        )
        train = train.model_copy(update=fixed)
    marks: list[tuple[float, int]] = []

    def enough(step: int, state: State) -> bool:
        marks.append((state.seconds, state.tokens))
        return step > LEAST and state.seconds > seconds

    with tempfile.TemporaryDirectory(prefix="langmill-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        outcome = fit(
            model, batches, OBJECTIVES[train.objective], train, folder, seed=seed, hooks=[enough], quiet=True
        )
    taken = [b - a for (a, _), (b, _) in itertools.pairwise(marks)]
    return Cost(
        step_seconds=statistics.median(taken),
        step_tokens=marks[-1][1] / len(marks),
        peak_bytes=peak_bytes(device),
        base_bytes=base,
        dtype=outcome.choices.dtype,
        compile=outcome.choices.compile,
        threads=outcome.choices.threads,
        matmul_flops=outcome.choices.matmul_flops,
        spread=max(taken) / min(taken),
        why=why or outcome.choices.why,
    )


def apart(
    config: Config, train: TrainSettings, shards: Path | None, steps: int, seed: int, seconds: float
) -> Cost:
    """`here` in a process of its own, on batches from `shards` (with its tokenizer) or on random rows."""
    request = {
        "config": export_config(config)[0],
        "train": train.model_dump(mode="json"),
        "shards": None if shards is None else str(shards),
        "steps": steps,
        "seed": seed,
        "seconds": seconds,
    }
    done = subprocess.run(
        [sys.executable, "-m", "langmill.jobs.probe"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [
            f"it ended with code {done.returncode}, perhaps for want of memory"
        ]
        raise TrainingError(f"the calibration run failed: {last[0].partition('Error: ')[2] or last[0]}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return Cost(**answer | {"why": tuple(answer["why"])})


class Random:
    """Batches of random tokens, one document a row: what is left where there is no text yet."""

    def __init__(self, vocab: int, rows: int, length: int, seed: int) -> None:
        self._vocab, self._shape, self._random = vocab, (rows, length), np.random.default_rng(seed)
        self.rows_per_epoch = rows

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        tokens = self._random.integers(0, self._vocab, self._shape)
        places = np.broadcast_to(np.arange(self._shape[1]), self._shape).copy()
        return Batch(tokens, np.roll(tokens, -1, 1), np.ones(self._shape, np.int32), places, (0,))

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Any place is as good as another."""


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    config: Config = family(request["config"]["model_type"], Path("request")).config(request["config"])
    train = TrainSettings(**request["train"])
    rows, length = train.micro_batch_size or 1, train.max_length or config.length
    batches: Batches = Random(config.vocab, rows, length, request["seed"])
    if request["shards"]:
        folder = Path(request["shards"])
        shards = Shards.open(folder, verify=False)
        batches = text.corpus(Tokenizer.load(folder), shards, 0.0).batches(length, rows, request["seed"])
    return asdict(here(config, train, batches, request["steps"], request["seed"], request["seconds"]))


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
