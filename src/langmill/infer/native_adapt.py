"""Adapters of low rank as native.cpp takes them: beside the weights, so that each row of a pass may have another one.

A of all matrices that read the same numbers stand one below the other, since one walk over those numbers serves all.
O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import Array, Structure, c_int32, c_void_p

import torch
from torch import Tensor

from langmill.families.peft import LowRank

# The layers of a block that read the same numbers, in native.cpp's order.
READERS = (
    ("attention.q", "attention.k", "attention.v"),
    ("attention.o",),
    ("mlp.gate", "mlp.up"),
    ("mlp.down",),
)


class _Low(Structure):
    _fields_ = [("a", c_void_p), ("inputs", c_int32), ("ranks", c_int32)]


class _High(Structure):
    _fields_ = [("b", c_void_p), ("lengths", c_void_p), ("rank", c_int32), ("begin", c_int32)]


class Layer(Structure):
    """An adapter's part in one block."""

    _fields_ = [("low", _Low * len(READERS)), ("high", _High * sum(map(len, READERS)))]


def adapter(
    changes: Mapping[str, LowRank], layers: int, packed: Callable[[Tensor | None], int | None]
) -> Array[Layer]:
    """What native.cpp's model_adapt takes: a `Layer` a block.

    changes: by the names of a model's linear layers. packed: where (O, I) or (O,) numbers stand for good, packed for
    products. ValueError names a layer that stands in no block.
    """
    left = {_place(name): change for name, change in changes.items()}
    made = (Layer * layers)()
    for number, layer in enumerate(made):
        first = 0
        for low, names in zip(layer.low, READERS, strict=True):
            found = [left.pop((number, name), None) for name in names]
            low.a, low.inputs, low.ranks = _stacked(found, layer.high[first : first + len(names)], packed)
            first += len(names)
    if left:
        raise ValueError(f"there is no layer {min(left)} to adapt")
    return made


def _place(name: str) -> tuple[int, str]:
    """A layer's block and its name there."""
    _, _, inside = name.partition(".blocks.")
    number, _, leaf = inside.partition(".")
    if not number.isdigit() or not any(leaf in names for names in READERS):
        raise ValueError(f"{name} is no layer of a block that can be adapted")
    return int(number), leaf


def _stacked(
    found: Sequence[LowRank | None], high: Sequence[_High], packed: Callable[[Tensor | None], int | None]
) -> tuple[int | None, int, int]:
    """Fill `high` of the layers that read the same numbers; the A of all of them, packed, its inputs and its rows."""
    parts: list[Tensor] = []
    begins: list[int] = []
    ranks = 0
    for change, one in zip(found, high, strict=True):
        if change is None:
            continue
        # a family that keeps several of our layers in one tensor has the same A for all of them
        same = next((n for n, part in enumerate(parts) if torch.equal(part, change.a_RI)), None)
        if same is None:
            same = len(parts)
            parts.append(change.a_RI)
            begins.append(ranks)
            ranks += len(change.a_RI)
        one.b, one.lengths = packed(change.b_OR), packed(change.lengths_O)
        one.rank, one.begin = len(change.a_RI), begins[same]
    return (packed(torch.cat(parts)), parts[0].shape[1], ranks) if parts else (None, 0, 0)
