"""Weights as the rows of blocks that a GGUF file holds; quantised layers give their codes, nothing is rounded twice.

O outputs, I inputs, G groups of 32 along a row. F32, F16, BF16 are plain numbers. A block of 32 is Q8_0: a float16 step
and signed bytes; Q4_0: a step and codes 0 … 15 that count from 8; Q4_1: a step, a minimum and codes. Weight i of a
four-bit block shares its byte with weight i + 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from langmill.common.errors import ModelError

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK = 32  # numbers that share a step
TYPES = (*FLOATS, "Q8_0", "Q4_0", "Q4_1")
Rows = NDArray[np.uint8]
_SLICE = 1 << 20  # weights quantised at once: the working arrays stay small


def form(layer: object) -> str | None:
    """The type whose blocks hold the codes of a quantised layer as they are; None for plain weights."""
    codes = getattr(layer, "codes", None)
    if codes is None:
        return None
    if codes.dtype == torch.int8:
        return "Q8_0"
    return "Q4_0" if getattr(layer, "lows", None) is None else "Q4_1"


def packed(weight_OI: Tensor, kind: str, name: str) -> Rows:
    """Plain weights as rows of `kind`, (O, bytes of a row). ModelError names the tensor that cannot be held."""
    if not torch.isfinite(weight_OI).all():
        raise ModelError(f"tensor {name} holds numbers that are not finite: the model is damaged")
    if kind in FLOATS:
        narrow_OI = weight_OI.detach().to(FLOATS[kind]).contiguous()
        if not torch.isfinite(narrow_OI).all():
            raise ModelError(
                f"tensor {name} holds numbers beyond {kind}'s largest: choose --type BF16 or F32"
            )
        return narrow_OI.view(torch.uint8).numpy()
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    source, count = weight_OI.detach().float().numpy(), max(1, _SLICE // weight_OI.shape[1])
    starts = range(0, len(source), count)
    with np.errstate(over="ignore"):  # looked for below
        parts = [quantize(source[start : start + count], GGMLQuantizationType[kind]) for start in starts]
    rows: Rows = np.concatenate(parts)
    steps = rows.reshape(len(rows), weight_OI.shape[1] // BLOCK, -1)[..., : 4 if kind == "Q4_1" else 2]
    if not np.isfinite(np.ascontiguousarray(steps).view(np.float16)).all():
        raise ModelError(f"tensor {name} holds numbers too large for {kind}: choose --type BF16 or F32")
    return rows


def repacked(layer: Any) -> Rows:
    """The codes of a quantised layer as rows of the type that `form` names, (O, bytes of a row).

    Steps and minima become float16, which four-bit layers have already; `half_steps` is the rounding that 8 bits take.
    """
    codes = layer.codes.detach().cpu()
    rows, kind = len(codes), form(layer)
    if kind == "Q8_0":
        codes_OGW = codes.numpy().view(np.uint8).reshape(rows, -1, BLOCK)
        steps_OG1 = half_steps(layer)[:, None, None].expand(rows, codes_OGW.shape[1], 1)
        return np.concatenate([_bytes(steps_OG1), codes_OGW], axis=-1).reshape(rows, -1)
    both_OGW = np.stack([codes.numpy() & 15, codes.numpy() >> 4], axis=-1).reshape(rows, -1, BLOCK)
    codes_OGH = both_OGW[..., : BLOCK // 2] | both_OGW[..., BLOCK // 2 :] << 4
    scales = [layer.steps] if kind == "Q4_0" else [layer.steps, layer.lows]
    heads = [_bytes(scale_OG.detach().cpu().half()[..., None]) for scale_OG in scales]
    return np.concatenate([*heads, codes_OGH], axis=-1).reshape(rows, -1)


def half_steps(layer: Any) -> Tensor:
    """The steps of an 8-bit layer as the file holds them, (O,) float16."""
    steps_O: Tensor = layer.steps.detach().cpu().reshape(-1).half()
    if not torch.isfinite(steps_O).all():
        raise ModelError("a step of an 8-bit layer is beyond float16's largest: the model is damaged")
    return steps_O


def unpacked(rows: Rows, kind: str, width: int) -> Tensor:
    """What a reader makes of the rows: (O, I) float32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    if kind in FLOATS:
        return torch.from_numpy(rows).view(FLOATS[kind]).float()
    out = np.empty((len(rows), width), np.float32)
    count = max(1, _SLICE // width)
    for start in range(0, len(rows), count):
        out[start : start + count] = dequantize(rows[start : start + count], GGMLQuantizationType[kind])
    return torch.from_numpy(out)


def _bytes(numbers: Tensor) -> Rows:
    return numbers.contiguous().view(torch.uint8).numpy()


def narrowest(model: nn.Module) -> str:
    """The float type of two bytes that holds every matrix of a model exactly, F16 where none does."""
    weights: Sequence[Tensor] = [weight for weight in model.parameters() if weight.dim() > 1]
    for kind in ("F16", "BF16"):
        if all(torch.equal(weight.to(FLOATS[kind]).to(weight.dtype), weight) for weight in weights):
            return kind
    return "F16"
