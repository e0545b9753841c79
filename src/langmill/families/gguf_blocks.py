"""Four-bit blocks of a GGUF file as four-bit layers hold them: nothing is made to floats and rounded again.

O outputs, I inputs, G groups of 32 along a row. Q4_0 and Q4_1 have one block a group; its weight i shares a byte with
weight i + 16. A Q4_K block is eight groups, whose steps and minima are whole multiples (6 bits) of two float16 numbers;
here each becomes a float16 of its own, the one thing that is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from langmill.families.gguf_file import File

KINDS = ("Q4_0", "Q4_1", "Q4_K")
_GROUP, _SUPER = 32, 256
Bytes = NDArray[np.uint8]


class Nibbles(NamedTuple):
    """A matrix in the form of `Int4Linear`: codes (O, I/2) uint8, steps and lows (O, G) float16."""

    codes: Tensor
    steps: Tensor
    lows: Tensor | None

    def moved(self, move: Callable[[Tensor], Tensor]) -> Nibbles:
        """With the rows of all parts moved alike."""
        return Nibbles(move(self.codes), move(self.steps), None if self.lows is None else move(self.lows))


def nibbles(file: File, name: str) -> Nibbles | None:
    """A tensor of the file in four bits; None where it is no matrix of KINDS, or its steps do not fit float16."""
    info, kind = file.tensors[name], file.type_name(name)
    if kind not in KINDS or len(info.shape) != 2:
        return None
    outputs, inputs = info.shape
    raw = file.data[info.start : info.start + info.size]
    lows: NDArray[np.float16] | None
    if kind == "Q4_K":
        pairs_OGH, steps, lows = _supers(raw.reshape(outputs, inputs // _SUPER, -1))
    else:
        heads = 2 if kind == "Q4_0" else 4
        blocks_OGB = raw.reshape(outputs, inputs // _GROUP, heads + _GROUP // 2)
        numbers_OGN = np.ascontiguousarray(blocks_OGB[..., :heads]).view(np.float16)
        pairs_OGH, steps = blocks_OGB[..., heads:], numbers_OGN[..., 0]
        lows = None if kind == "Q4_0" else numbers_OGN[..., 1]
    if not np.isfinite(steps).all() or (lows is not None and not np.isfinite(lows).all()):
        return None
    return Nibbles(
        torch.from_numpy(_neighbours(pairs_OGH).reshape(outputs, -1)),
        torch.from_numpy(np.ascontiguousarray(steps)),
        None if lows is None else torch.from_numpy(np.ascontiguousarray(lows)),
    )


def _neighbours(pairs_OGH: Bytes) -> Bytes:
    """Bytes that hold weights i and i + 16 of a group, as bytes that hold 2i and 2i + 1."""
    half = _GROUP // 4
    low, high = pairs_OGH & 15, pairs_OGH >> 4
    out = np.empty_like(low)
    out[..., :half] = low[..., ::2] | low[..., 1::2] << 4
    out[..., half:] = high[..., ::2] | high[..., 1::2] << 4
    return out


def _supers(blocks_OSB: Bytes) -> tuple[Bytes, NDArray[np.float16], NDArray[np.float16]]:
    """Q4_K: d and dmin (float16), 12 bytes of eight 6-bit steps and minima, and 128 of codes."""
    outputs, supers = blocks_OSB.shape[:2]
    ends_OS2 = np.ascontiguousarray(blocks_OSB[..., :4]).view(np.float16).astype(np.float32)
    a, b, c = (blocks_OSB[..., at : at + 4] for at in (4, 8, 12))
    multiples = (
        np.concatenate([a & 63, c & 15 | a >> 2 & 48], -1),
        np.concatenate([b & 63, c >> 4 | b >> 2 & 48], -1),
    )
    with np.errstate(over="ignore"):  # the caller looks
        steps, lows = (
            (ends_OS2[..., i : i + 1] * multiple_OS8 * sign).reshape(outputs, -1).astype(np.float16)
            for i, (multiple_OS8, sign) in enumerate(zip(multiples, (1, -1), strict=True))
        )
    # of 64 weights, the low halves of 32 bytes are the first 32 and the high ones the rest
    codes = blocks_OSB[..., 16:].reshape(outputs, supers, 4, 1, _GROUP)
    both = np.concatenate([codes & 15, codes >> 4], axis=-2).reshape(outputs, -1, 2, _GROUP // 2)
    return both[..., 0, :] | both[..., 1, :] << 4, steps, lows
