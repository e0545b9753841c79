"""Whether one model is better than another on the same rows: differences with paired intervals, and a verdict in words.

A figure is a function of the chosen rows, so that means, F1 and BLEU are resampled alike (Efron & Tibshirani 1993,
chapter 13; Koehn 2004 for BLEU). For a difference both models are asked about the same resample: the pairing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import DataError
from langmill.evaluate.loss import Interval

Ints = NDArray[np.int64]
Figures = Callable[[Ints], dict[str, float]]  # all figures of the rows with these numbers
LOWER = frozenset(
    "loss perplexity bits_per_byte log_loss calibration_error mean_absolute_error root_mean_squared_error".split()
)  # of which less is better


@dataclass(frozen=True)
class Difference:
    """One figure of two models. interval: 95 %, of `difference` = ours - theirs; None below two rows."""

    name: str
    ours: float
    theirs: float
    interval: Interval | None

    @property
    def difference(self) -> float:
        """Ours - theirs."""
        return self.ours - self.theirs

    @property
    def verdict(self) -> str:
        """ "better", "worse", or "no difference shown" where the interval holds 0."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "no difference shown"
        return "better" if (self.interval[0] > 0) != (self.name in LOWER) else "worse"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "ours": self.ours,
            "theirs": self.theirs,
            "difference": self.difference,
            "interval": self.interval and list(self.interval),
            "verdict": self.verdict,
        }


def intervals(of: Figures, count: int, resamples: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """95 % percentile bootstrap interval of every figure; none below two rows. Resamples that lack a figure, as they
    may the F1 of a rare label, do not count for it."""
    if count < 2:
        return {}
    random = np.random.default_rng(seed)
    found = [of(random.integers(count, size=count)) for _ in range(resamples)]
    between = {}
    for name in of(np.arange(count)):
        if values := [one[name] for one in found if name in one]:
            low, high = np.percentile(values, (2.5, 97.5))
            between[name] = (float(low), float(high))
    return between


def differences(
    ours: Figures, theirs: Figures, count: int, resamples: int = 1000, seed: int = 0
) -> list[Difference]:
    """Every figure that both have, with the paired interval of its difference. DataError without a row."""
    if not count:
        raise DataError("there is no row that both models were asked")
    every = np.arange(count)
    a, b = ours(every), theirs(every)

    def both(chosen: Ints) -> dict[str, float]:
        found, other = ours(chosen), theirs(chosen)
        return {name: found[name] - other[name] for name in a if name in found and name in other}

    between = intervals(both, count, resamples, seed)
    return [Difference(name, a[name], b[name], between.get(name)) for name in a if name in b]
