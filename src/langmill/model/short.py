"""Attention over short documents in bfloat16, for training on a CPU.

torch's flash kernel there takes 1.4 to 2.9 times as long for a forward and backward pass over 64 to 384 tokens, most of
it in the backward pass. These are plain products, whose scores may be kept because they are small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LONGEST = 384  # tokens; beyond it the flash kernel wins
# Tokens of a document, on average: with fewer the flash kernel wins, in float32, by its single call.
TINY = 64


def tiny(q_BHTD: Tensor, k_BGSD: Tensor, documents: int) -> bool:
    """Whether packed documents are so short that the number of calls is what counts (0.2 to 0.5 of the time)."""
    tokens = len(q_BHTD) * max(q_BHTD.shape[2], k_BGSD.shape[2])
    return tokens < TINY * documents and _narrow_on_cpu(q_BHTD) and _learning(q_BHTD, k_BGSD)


def _learning(q_BHTD: Tensor, k_BGSD: Tensor) -> bool:
    return torch.is_grad_enabled() and (q_BHTD.requires_grad or k_BGSD.requires_grad)


def _narrow_on_cpu(q_BHTD: Tensor) -> bool:
    cpu = q_BHTD.dtype == torch.bfloat16 and q_BHTD.device.type == "cpu"
    return cpu and not torch.compiler.is_compiling()


def suits(q_BHTD: Tensor, k_BGSD: Tensor) -> bool:
    """Whether `attend_short` is the faster way for these."""
    tokens = q_BHTD.shape[2], k_BGSD.shape[2]
    small = min(tokens) > 0 and max(tokens) <= LONGEST  # one side of a padded pair may have none
    return small and _narrow_on_cpu(q_BHTD) and _learning(q_BHTD, k_BGSD)


def attend_short(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, causal: bool, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v, shape (B, H, T, D), all in bfloat16 but the softmax, which is float32.

    causal: query t sees keys up to t; T and S are then equal.
    """
    mixed: Tensor = _Short.apply(q_BHTD, k_BGSD, v_BGSD, causal, scale)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return mixed


class _Short(torch.autograd.Function):
    """Queries that share a key head stand below one another, so that no key or value is repeated."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, causal: bool, scale: float
    ) -> Tensor:
        groups, keys = k_BGSD.shape[1:3]
        q_BGRD = (q_BHTD * scale).unflatten(1, (groups, -1)).flatten(2, 3)
        s_BHTS = torch.matmul(q_BGRD, k_BGSD.mT).view(*q_BHTD.shape[:3], keys)
        if causal:
            s_BHTS += torch.full(s_BHTS.shape[2:], -torch.inf, dtype=s_BHTS.dtype).triu(1)
        p_BGRS = torch.softmax(s_BHTS, -1, dtype=torch.float32).to(q_BHTD.dtype).view(*q_BGRD.shape[:3], keys)
        mixed_BGRD = torch.matmul(p_BGRS, v_BGSD)
        ctx.save_for_backward(q_BGRD, k_BGSD, v_BGSD, p_BGRS, mixed_BGRD)
        ctx.scale = scale
        return mixed_BGRD.view(*q_BHTD.shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BGRD, k_BGSD, v_BGSD, p_BGRS, mixed_BGRD = ctx.saved_tensors
        shape = grads[0].shape
        g_BGRD = grads[0].reshape(mixed_BGRD.shape)
        own_BGR1 = (g_BGRD.float() * mixed_BGRD).sum(-1, keepdim=True).to(g_BGRD.dtype)
        ds_BGRS = (torch.matmul(g_BGRD, v_BGSD.mT) - own_BGR1).mul_(p_BGRS)  # the softmax's derivative
        dq_BHTD = torch.matmul(ds_BGRS, k_BGSD).mul_(ctx.scale).view(*shape[:3], -1)
        return dq_BHTD, torch.matmul(ds_BGRS.mT, q_BGRD), torch.matmul(p_BGRS.mT, g_BGRD), None, None
