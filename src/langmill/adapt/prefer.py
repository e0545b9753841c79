"""Pairs under a model: their log-probabilities, and how far the model goes along with the preferences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from langmill.common.progress import track
from langmill.common.settings import PreferSettings
from langmill.data.batches import Ints
from langmill.data.pairs import Pairs, pairs_once
from langmill.train.guard import reproducible
from langmill.train.preferences import Scores, losses, rewards, scored
from langmill.train.step import tensors


@dataclass(frozen=True)
class Judged:
    """A model on pairs. loss: mean over pairs; margin: mean of the chosen answers' implicit rewards less that of the
    rejected ones'; accuracy: how often the chosen answer's is higher, a tie half. None where there is no pair.

    For KTO margin and accuracy compare every good answer with every bad one.
    """

    loss: float | None = None
    margin: float | None = None
    accuracy: float | None = None

    def figures(self, prefix: str = "") -> dict[str, float | None]:
        """By their names, with `prefix` before each."""
        return {
            f"{prefix}loss": self.loss,
            f"{prefix}margin": self.margin,
            f"{prefix}accuracy": self.accuracy,
        }


@torch.no_grad()
def scores(
    model: Any, pairs: Pairs, numbers: Ints, length: int, dtype: str, whole: bool = False, quiet: bool = True
) -> Scores:
    """`numbers` of the pairs under the model, in their order, on the CPU; `whole` as `scored` has it.

    `dtype` is the number type of training: log-probabilities of another one differ by more than a step changes.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    # a resumed run reads what another process computed: the sums of a GPU must have one order
    with reproducible(device), track("reading the pairs", len(numbers), "pairs", quiet) as progress:
        for batch in pairs_once(pairs, numbers, length):
            given = tensors(batch, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                found = scored(model, given, whole)
            here = given["numbers"] >= 0
            parts = [part[here].cpu() for part in (found.policy, found.tokens, found.chosen_nll)]
            for at, number in enumerate(given["numbers"][here].tolist()):
                kept[number] = (parts[0][at], parts[1][at], parts[2][at])
                progress.advance(1)
    model.train(training)
    policy, tokens, nll = (
        torch.stack([kept[number][part] for number in numbers.tolist()]) for part in range(3)
    )
    return Scores(
        policy,
        torch.from_numpy(pairs.reference[numbers]),
        tokens,
        nll,
        torch.from_numpy(pairs.labels[numbers]),
    )


def judged(found: Scores, prefer: PreferSettings) -> Judged:
    """The figures of pairs that were scored."""
    if not len(found.labels):
        return Judged()
    loss, reward = float(losses(found, prefer).mean()), rewards(found, prefer).double()
    if prefer.loss == "kto":
        good, bad = (reward[found.labels == label, 0] for label in (1, -1))
        difference = (good[:, None] - bad[None]).flatten()
    else:
        difference = reward[:, 0] - reward[:, 1]
    if not len(difference):
        return Judged(loss)
    higher = (difference > 0).double() + 0.5 * (difference == 0).double()
    return Judged(loss, float(difference.mean()), float(higher.mean()))


def finite(found: Judged) -> dict[str, float]:
    """The figures that there are, for the metrics of a run."""
    return {
        name: value for name, value in found.figures().items() if value is not None and math.isfinite(value)
    }
