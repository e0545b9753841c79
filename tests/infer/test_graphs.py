"""Recorded passes run as plain calls here, which is what a recording repeats; `scripts/bench gpu` proves the replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from langmill.infer.graphs import Graphs, recordable
from langmill.infer.runner import TorchRunner
from langmill.model.config import Head, Learned, ModelConfig, Rope, RopeScaling, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer

SHAPES = {
    "grouped": StackConfig(32, 2, 4, 2, 8, 48),
    "windows": StackConfig(32, 2, 4, 4, 8, 48, window=(5, None)),
    "learned": StackConfig(32, 2, 4, 4, 8, 48, position=Learned()),
}


class Plain(Graphs):
    """A replay runs the pass again and puts the states where they stood."""

    def _captured(self, pass_: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        h_PD = pass_().clone()

        def replay() -> None:
            h_PD.copy_(pass_())

        return replay, h_PD


def made(shape: StackConfig, length: int = 40) -> Transformer:
    model = Transformer(ModelConfig(shape, Tokens(50, length), head=Head(50)))
    init_(model, 0)
    return model.eval()


@pytest.mark.parametrize("name", SHAPES)
def test_recorded_passes_equal_plain_ones(name: str) -> None:
    model, random = made(SHAPES[name]), np.random.default_rng(0)
    plain, recorded = TorchRunner(model, 5, 40), TorchRunner(model, 5, 40)
    recorded._graphs = Plain(model, recorded._cache)
    sizes = {4: 30, 1: 3, 2: 17}  # slot 0 and 3 hold nothing
    for slot, size in sizes.items():
        ids = random.integers(0, 50, size)
        for runner in (plain, recorded):
            runner.run(ids, np.full(size, slot), np.arange(size), np.array([size - 1]))
    for _ in range(8):
        slots = np.array([slot for slot in (1, 2, 4) if random.random() < 0.8] or [1])
        places, ids = np.array([sizes[slot] for slot in slots]), random.integers(0, 50, len(slots))
        wanted = np.arange(len(slots))
        exact, found = (runner.run(ids, slots, places, wanted) for runner in (plain, recorded))
        assert torch.allclose(exact, found, atol=1e-5)
        for slot in slots:
            sizes[int(slot)] += 1
    assert recorded._graphs._made


def test_recordings_are_few_and_go_with_the_weights() -> None:
    model = made(SHAPES["grouped"], 3000)
    runner = TorchRunner(model, 6, 3000)
    graphs = Plain(model, runner._cache)
    for slot, place in ((0, 0), (0, 255), (1, 9), (2, 256), (5, 700), (4, 2999)):
        graphs.read(np.array([7]), np.array([slot]), np.array([place]))
    assert sorted(graphs._made) == [(1, 256), (2, 256), (4, 512), (6, 1024), (6, 3000)]
    before = graphs.read(np.array([7]), np.array([0]), np.array([0])).clone()
    with torch.no_grad():
        model.tokens.weight.data = model.tokens.weight * 2  # elsewhere in memory
    after = graphs.read(np.array([7]), np.array([0]), np.array([0]))
    assert list(graphs._made) == [(1, 256)] and not torch.allclose(before, after)


def test_what_is_recorded() -> None:
    assert not recordable(made(SHAPES["grouped"]))  # a CPU has nothing to record
    scaled = replace(SHAPES["grouped"], position=Rope(scaling=RopeScaling("dynamic", 2.0, 20)))
    with torch.device("meta"):
        meta = Transformer(ModelConfig(scaled, Tokens(50, 40), head=Head(50)))
    assert not recordable(meta)
