"""Attention inside packed documents on a GPU: one call of the flash kernel for all of them, and no mask.

A mask of all pairs keeps torch from its flash kernel, and costs memory with the square of a row's length.
B rows, T tokens, N = B·T, H query heads, G key and value heads, D head dimension, K documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from langmill.model.sparing import working_type

WIDEST = 256  # head dimensions that the kernel knows, in steps of 8
OLDEST = (8, 0)  # compute capability
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Packed:
    """Documents behind one another. starts_K1: int32 (K + 1,), the place among the flattened tokens where each begins,
    and the end. longest: tokens of one, at most. window: see `attend.visible`."""

    starts_K1: Tensor
    longest: int
    causal: bool
    window: int | None = None


def suits(x_BTD: Tensor, head_dim: int) -> bool:
    """Whether the kernel takes what is made of these states: 16 bits, by their type or by autocast, on a GPU. Compiled
    code is left with a mask: how many documents there are differs from batch to batch."""
    device = x_BTD.device
    if device.type != "cuda" or torch.compiler.is_compiling() or head_dim % 8 or head_dim > WIDEST:
        return False
    return working_type(x_BTD) in HALVES and torch.cuda.get_device_capability(device) >= OLDEST


def starts(documents_BT: Tensor) -> Tensor:
    """(K + 1,) where the runs of equal document numbers begin in the flattened tokens, and their end; none crosses from
    a row into the next."""
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    places_K = begins_BT.flatten().nonzero().squeeze(1)
    return torch.cat((places_K, places_K.new_tensor([documents_BT.numel()])))


def attend_packed(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, packed: Packed, scale: float | None
) -> Tensor:
    """`attend.attend` inside each document, (B, H, T, D) in the working type (Dao 2023, arXiv:2307.08691)."""
    from torch.nn.attention.varlen import varlen_attn  # it registers operators, which no CPU needs

    dtype = working_type(q_BHTD)
    q_NHD, k_NGD, v_NGD = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (q_BHTD, k_BGTD, v_BGTD))
    before = -1 if packed.window is None else packed.window - 1
    mixed_NHD = varlen_attn(
        q_NHD,
        k_NGD,
        v_NGD,
        packed.starts_K1,
        packed.starts_K1,
        packed.longest,
        packed.longest,
        scale=scale,
        window_size=(before, 0 if packed.causal else -1),
        enable_gqa=q_NHD.shape[1] != k_NGD.shape[1],
    )
    assert isinstance(mixed_NHD, Tensor)
    return mixed_NHD.unflatten(0, (len(q_BHTD), -1)).transpose(1, 2)
