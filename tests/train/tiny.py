"""A run that takes milliseconds a step, for the tests of this folder; as a program, one that kills itself.

python tiny.py FOLDER '{"settings": {...}, "resume": true, "kill_at": 3}'     trains, prints a digest
python tiny.py FOLDER '{"rank": 0}'                                           one of two ranks
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from langmill.common.errors import Interrupted
from langmill.common.settings import TrainSettings
from langmill.data.batches import Batch
from langmill.model.config import Head, LSTMConfig, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Transformer
from langmill.train import checkpoint, measure
from langmill.train.loop import Outcome, fit
from langmill.train.objectives import causal
from langmill.train.optim import Optimizer
from langmill.train.step import tensors, train_step

VOCAB, LENGTH = 50, 12


class Rows:
    """Batches that follow from their number alone: in each row two documents that count upwards by one,
    scored to a random extent."""

    def __init__(self, rows: int = 2, rows_per_epoch: int = 10) -> None:
        self.rows, self.rows_per_epoch, self.number = rows, rows_per_epoch, 0

    def __next__(self) -> Batch:
        random = np.random.default_rng(self.number)
        self.number += 1
        tokens = (random.integers(0, VOCAB, (self.rows, 1)) + np.arange(LENGTH + 1)) % VOCAB
        targets = tokens[:, 1:].copy()
        for row in targets:
            row[random.integers(1, LENGTH) :] = -100
        documents = np.where(np.arange(LENGTH) < 5, 1, 2).astype(np.int32)
        positions = np.where(np.arange(LENGTH) < 5, np.arange(LENGTH), np.arange(LENGTH) - 5)
        shape = (self.rows, 1)
        return Batch(
            tokens[:, :-1], targets, np.tile(documents, shape), np.tile(positions, shape), (self.number,)
        )

    def state(self) -> dict[str, Any]:
        return {"number": self.number}

    def restore(self, state: Mapping[str, Any], /) -> None:
        self.number = state["number"]


def model(kind: str = "llama", seed: int = 0) -> Transformer | LSTM:
    made: Transformer | LSTM
    if kind == "lstm":
        made = LSTM(LSTMConfig(VOCAB, LENGTH, 16, 16))
    else:
        stack = StackConfig(
            dim=16, layers=1 if kind == "shallow" else 2, heads=2, kv_heads=1, head_dim=8, hidden=32
        )
        made = Transformer(ModelConfig(stack, Tokens(VOCAB, LENGTH), head=Head(VOCAB, tied=kind != "untied")))
    init_(made, seed)
    return made


def settings(**changes: Any) -> TrainSettings:
    fixed = {"max_steps": 12, "learning_rate": 0.01, "dtype": "float32", "compile": False, "save_every": 4}
    return TrainSettings(**{**fixed, "log_every": 2, **changes})


def run(folder: Path, kind: str = "llama", **kwargs: Any) -> tuple[nn.Module, Outcome]:
    """A fresh tiny model through `fit`; settings as a dict, all else as fit takes it."""
    made = model(kind)
    chosen = settings(**kwargs.pop("settings", {}))
    given = {"seed": 0, "quiet": True, "objective": causal, "batches": Rows(), **kwargs}
    return made, fit(made, settings=chosen, folder=folder, **given)


def digest(made: nn.Module) -> str:
    sums = hashlib.sha256()
    for name, tensor in checkpoint.weights(made).items():
        sums.update(name.encode() + tensor.detach().numpy().tobytes())
    return sums.hexdigest()


def one_of_two_ranks(folder: Path, rank: int) -> nn.Module:
    """A step over batch `rank` here and the other one on the other rank."""
    made = model().double()
    torch.distributed.init_process_group(
        "gloo", init_method=(folder / "ranks").absolute().as_uri(), rank=rank, world_size=2
    )
    batches = Rows()
    batches.restore({"number": rank})
    train_step(
        made, Optimizer(made, settings()), causal, [tensors(next(batches), torch.device("cpu"))],
        learning_rate=0.01, max_grad_norm=1.0,
    )  # fmt: skip
    torch.distributed.destroy_process_group()
    return made


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, wish: dict[str, Any]) -> None:
    measure.matmul_flops = lambda dtype, device: 1e9
    if "rank" in wish:
        made = one_of_two_ranks(folder, wish["rank"])
        print(json.dumps([float(weight.detach().sum()) for weight in made.parameters()]))
        return
    kill_at, kill_in_save = wish.pop("kill_at", None), wish.pop("kill_in_save", None)

    def at_step(step: int, state: object) -> None:
        if step == kill_at:
            die()
        if step == kill_in_save:
            checkpoint.sha256 = die  # both files are written, the folder is not finished

    try:
        made, _ = run(folder, hooks=[at_step], **wish)
    except Interrupted as stop:
        sys.exit(stop.exit_code)
    print(digest(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
