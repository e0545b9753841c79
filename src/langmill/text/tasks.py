"""How a task's text becomes model inputs and targets: shared by training and use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def windows(
    ids: Sequence[int] | NDArray[Any], length: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Cut one sequence [start, tokens..., boundary] into (inputs, targets) of at most `length` predictions.

    Every token but the first is a target exactly once; the inputs of a window start with the last target
    of the window before it. A sequence of fewer than two ids predicts nothing and gives no window.
    """
    if length < 1:
        raise ValueError(f"a window needs at least one prediction, not {length}")
    sequence = np.asarray(ids, dtype=np.int64)
    inputs, targets = sequence[:-1], sequence[1:]
    return [(inputs[i : i + length], targets[i : i + length]) for i in range(0, len(targets), length)]
