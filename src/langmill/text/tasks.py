"""How a task's text becomes model inputs and targets: shared by training and use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def window_bounds(predictions: int, length: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the windows that cut `predictions` next-token predictions into at most `length` each."""
    if length < 1:
        raise ValueError(f"a window needs at least one prediction, not {length}")
    return ((start, min(start + length, predictions)) for start in range(0, predictions, length))


def windows(
    ids: Sequence[int] | NDArray[Any], length: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Cut one sequence [start, tokens..., boundary] into (inputs, targets) of at most `length` predictions.

    Every token but the first is a target exactly once; the inputs of a window start with the last target
    of the window before it. A sequence of fewer than two ids predicts nothing and gives no window.
    """
    sequence = np.asarray(ids, dtype=np.int64)
    bounds = window_bounds(max(len(sequence) - 1, 0), length)
    return [(sequence[start:stop], sequence[start + 1 : stop + 1]) for start, stop in bounds]
