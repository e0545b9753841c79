from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from langmill.common.errors import TrainingError
from langmill.data.batches import Batch
from langmill.train.objectives import causal
from langmill.train.optim import Optimizer
from langmill.train.step import Step, tensors, train_step

CPU = torch.device("cpu")


def step(tiny: ModuleType, model: torch.nn.Module, micro: list[Any], **kwargs: Any) -> Step:
    given = {"learning_rate": 0.01, "max_grad_norm": 1.0, **kwargs}
    return train_step(model, Optimizer(model, tiny.settings()), causal, micro, **given)


def test_eight_rows_are_eight_times_one_row(tiny: ModuleType) -> None:
    """Rows are scored to very different extents, so a mean of means would be far off."""
    whole = tensors(next(tiny.Rows(rows=8)), CPU)
    counts = (whole["targets"] != -100).sum(1)
    assert counts.max() >= 3 * counts.min()
    results = []
    for size in (8, 1, 3):
        model = tiny.model().double()
        micro = [{name: array[at : at + size] for name, array in whole.items()} for at in range(0, 8, size)]
        results.append((step(tiny, model, micro), [weight.detach() for weight in model.parameters()]))
    (first, weights), *others = results
    for done, other in others:
        assert done.tokens == first.tokens == int(counts.sum())
        assert (done.loss, done.grad_norm) == pytest.approx((first.loss, first.grad_norm), rel=1e-6)
        for a, b in zip(other, weights, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_two_ranks_are_two_micro_batches(tiny: ModuleType, tmp_path: Path) -> None:
    model, batches = tiny.model().double(), tiny.Rows()
    step(tiny, model, [tensors(next(batches), CPU) for _ in range(2)])
    words = [
        [sys.executable, str(tiny.__file__), str(tmp_path), json.dumps({"rank": rank})] for rank in (0, 1)
    ]
    running = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for line in words]
    for rank in running:
        sums = json.loads(rank.communicate(timeout=120)[0])
        assert sums == pytest.approx(
            [float(weight.detach().sum()) for weight in model.parameters()], abs=1e-8
        )


@pytest.mark.parametrize("limit", [0.0, 0.1, 1000.0])
def test_clipping_is_of_the_mean_gradient(tiny: ModuleType, limit: float) -> None:
    """The gradient that reaches the optimizer is that of the mean loss, at most `limit` long."""
    model, batch = tiny.model(), tensors(next(tiny.Rows()), CPU)
    taken: list[float] = []

    class Spy(Optimizer):
        def step(self, learning_rate: float) -> None:
            taken.append(float(torch.nn.utils.get_total_norm([w.grad for w in self.weights])))

    spy = Spy(model, tiny.settings())
    done = train_step(model, spy, causal, [batch], learning_rate=0.01, max_grad_norm=limit)
    logits = model(batch["tokens"], positions_BT=batch["positions"], documents_BT=batch["documents"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    norm = float(torch.nn.utils.get_total_norm(torch.autograd.grad(loss, list(model.parameters()))))
    assert (done.loss, done.grad_norm) == pytest.approx((float(loss.detach()), norm), rel=1e-5)
    assert taken == [pytest.approx(min(norm, limit or norm), rel=1e-5)]


def test_another_way_to_gradients_is_taken(tiny: ModuleType) -> None:
    """The seam that clipping by example needs: here every gradient is set to the number of tokens."""

    def ones(model: torch.nn.Module, objective: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, count = objective(model, batch)
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight) * count
        return loss.detach(), count

    model = tiny.model()
    done = step(tiny, model, [tensors(next(tiny.Rows()), CPU)], gradients=ones)
    assert done.grad_norm == pytest.approx(sum(w.numel() for w in model.parameters()) ** 0.5, rel=1e-5)


def test_nothing_to_score_is_an_error(tiny: ModuleType) -> None:
    batch = tensors(next(tiny.Rows()), CPU)
    batch["targets"].fill_(-100)
    with pytest.raises(TrainingError, match="every target is masked"):
        step(tiny, tiny.model(), [batch])


def test_not_a_number_changes_nothing(tiny: ModuleType) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.decoder.norm.weight[0] = float("nan")
    before = tiny.digest(model)
    done = step(tiny, model, [tensors(next(tiny.Rows()), CPU)])
    assert not done.applied and tiny.digest(model) == before


def test_arrays_become_tensors_by_name() -> None:
    ints = np.zeros((1, 2), dtype=np.int64)
    made = tensors(Batch(ints, ints, ints.astype(np.int32), ints, (7,)), CPU)
    assert {name: tensor.dtype for name, tensor in made.items()} == {
        "tokens": torch.int64, "targets": torch.int64, "documents": torch.int32, "positions": torch.int64,
    }  # fmt: skip
