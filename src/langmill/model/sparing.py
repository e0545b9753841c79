"""Sums and products that keep less for the backward pass than autograd would.

They equal the plain forms, which stand beside them: compiled code takes those, since it makes the same savings itself.
N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def working_type(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: autocast's type where that is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def narrowed(x: Tensor) -> Tensor:
    """x in the type that products take, once: else each of several products makes and keeps a copy of its own."""
    return x.to(working_type(x)) if x.dtype == torch.float32 else x


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) · up, of which only gate and up are kept: the activation is computed again."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return activation(gate) * up
    product: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return product


def low_rank(
    x: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    bias_O: Tensor | None,
    made: Callable[..., Tensor],
    *parts: Tensor,
) -> Tensor:
    """W x + bias + scale·B(A x): x is kept as it came, and no copy of W = made(*parts, dtype), which is frozen."""
    y: Tensor = _LowRank.apply(x, a_RI, b_OR, scale, bias_O, made, *parts)[0]  # type: ignore[no-untyped-call]
    return y


class _Gated(torch.autograd.Function):
    generate_vmap_rule = True  # for per-example gradients

    @staticmethod
    def forward(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        return activation(gate) * up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.activation = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        made: Any = torch.func.vjp(ctx.activation, gate)
        opened, pull = made
        return pull(gradient * up)[0], gradient * opened, None


class _LowRank(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        bias_O: Tensor | None,
        made: Callable[..., Tensor],
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        dtype = working_type(x)
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        low_NR = scale * F.linear(x_NI, a_RI.to(dtype))
        y_NO = F.linear(x_NI, made(*parts, dtype), None if bias_O is None else bias_O.to(dtype))
        y_NO = torch.addmm(y_NO, low_NR, b_OR.to(dtype).T)  # in place it has no rule for torch.func
        return y_NO.view(*x.shape[:-1], -1), low_NR

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, a_RI, b_OR, ctx.scale, _, ctx.made, *parts = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, a_RI, b_OR, output[1], *parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
        x, a_RI, b_OR, low_NR, *parts = ctx.saved_tensors
        dtype = low_NR.dtype
        gradient_NO = gradient.reshape(-1, gradient.shape[-1])
        back_NR = ctx.scale * (gradient_NO @ b_OR.to(dtype))
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        of_a, of_b = (back_NR.T @ x_NI).to(a_RI.dtype), (gradient_NO.T @ low_NR).to(b_OR.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x_NI = torch.addmm(gradient_NO @ ctx.made(*parts, dtype), back_NR, a_RI.to(dtype))
            of_x = of_x_NI.view_as(x).to(x.dtype)
        return of_x, of_a, of_b, None, None, None, *[None for _ in parts]
