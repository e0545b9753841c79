"""Every layer that a saved model may hold in the place of a linear one: low-rank adapters, and four-bit weights.

They take (..., inputs) and give (..., outputs), as nn.Linear does, and have its `in_features`, `out_features`, `bias`
and `weight` (O, I), which a quantised layer makes anew at each use. O outputs, I inputs, R rank, G groups of 32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from langmill.model.sparing import low_rank

GROUP = 32  # weights that share a scale and a minimum


class Linear(Protocol):
    """What LoRA stands on."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    @property
    def weight(self) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class LoRA(nn.Module):
    """A frozen linear layer and a trained change of low rank: W x + s·B(A x), s = alpha / rank (Hu et al. 2021,
    arXiv:2106.09685, eq. 3).

    `rslora`: s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732). `dora`: the rows of W + s·B A are brought
    to trained lengths m (Liu et al. 2024, arXiv:2402.09353, eq. 5, with the norm taken as a constant, section 4.3).
    It begins as the layer it stands on: B is zero and m the lengths of W's rows.
    """

    def __init__(
        self,
        base: Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
    ) -> None:
        super().__init__()
        self.base: Any = base
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = dropout
        device = base.weight.device
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.m = nn.Parameter(base.weight.detach().float().norm(dim=1)) if dora else None
        for weight in self.base.parameters():
            weight.requires_grad_(False)

    @property
    def in_features(self) -> int:
        return int(self.base.in_features)

    @property
    def out_features(self) -> int:
        return int(self.base.out_features)

    @property
    def bias(self) -> nn.Parameter | None:
        bias: nn.Parameter | None = self.base.bias
        return bias

    @property
    def weight(self) -> Tensor:
        """W with the change in it, (O, I): what a merged layer holds."""
        weight_OI = self.base.weight
        whole_OI = weight_OI + (self.scale * (self.b @ self.a)).to(weight_OI.dtype)
        if self.m is None:
            return whole_OI
        return (self.m / whole_OI.float().norm(dim=1))[:, None].to(whole_OI.dtype) * whole_OI

    def forward(self, x: Tensor) -> Tensor:
        if self.m is None and not (self.dropout and self.training) and not torch.compiler.is_compiling():
            if isinstance(self.base, Int4Linear):
                base = self.base
                parts = (base.codes, base.steps, base.lows)
                return low_rank(x, self.a, self.b, self.scale, base.bias, unpacked, *parts)
            if type(self.base) is nn.Linear:
                plain = self.base
                return low_rank(x, self.a, self.b, self.scale, plain.bias, Tensor.to, plain.weight)
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """`forward` without savings: what compiled code and dropout take."""
        low = F.dropout(x, self.dropout, self.training) if self.dropout else x
        change = F.linear(self.scale * F.linear(low, self.a.to(x.dtype)), self.b.to(x.dtype))
        if self.m is None:
            y: Tensor = self.base(x) + change
            return y
        with torch.no_grad():  # the norm counts as a constant, which saves its gradient
            length_O = (self.base.weight + self.scale * (self.b @ self.a)).float().norm(dim=1)
        plain = self.base(x) if self.bias is None else self.base(x) - self.bias
        out = (self.m / length_O).to(x.dtype) * (plain + change)
        return out if self.bias is None else out + self.bias


class Int4Linear(nn.Module):
    """A frozen linear layer in 4 bits: each group of 32 weights along a row is minimum + step·(0 … 15).

    `codes` holds two weights a byte, `steps` and `lows` are float16: 5 bits a weight. Weights that were in this form
    already (a Q4_1 GGUF) are met exactly up to float16's rounding. A backward pass needs the packed form alone.
    """

    codes: Tensor
    steps: Tensor
    lows: Tensor

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if in_features % GROUP:
            raise ValueError(f"{in_features} inputs are not whole groups of {GROUP}")
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        groups = in_features // GROUP
        self.register_buffer("codes", torch.zeros(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("steps", torch.zeros(out_features, groups, dtype=torch.float16))
        self.register_buffer("lows", torch.zeros(out_features, groups, dtype=torch.float16))

    @classmethod
    def of(cls, layer: nn.Linear) -> Int4Linear:
        """The nearest to a plain layer: its groups' minima and maxima are the ends of the sixteen steps."""
        made = cls(layer.in_features, layer.out_features, layer.bias)
        grouped_OGW = layer.weight.detach().float().unflatten(1, (-1, GROUP))
        low_OG1, high_OG1 = grouped_OGW.amin(-1, keepdim=True), grouped_OGW.amax(-1, keepdim=True)
        made.lows = low_OG1[..., 0].half()
        made.steps = ((high_OG1 - low_OG1) / 15)[..., 0].half()
        steps = made.steps.float()[..., None]
        codes_OGW = (grouped_OGW - made.lows.float()[..., None]) / torch.where(steps == 0, 1.0, steps)
        codes_OI = codes_OGW.round().clamp(0, 15).to(torch.uint8).flatten(1)
        made.codes = codes_OI[:, ::2] | codes_OI[:, 1::2] << 4
        return made

    @property
    def weight(self) -> Tensor:
        """The weights as float32, (O, I)."""
        return unpacked(self.codes, self.steps, self.lows, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _FourBit.apply(x, self.codes, self.steps, self.lows)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)


def unpacked(codes: Tensor, steps: Tensor, lows: Tensor, dtype: torch.dtype) -> Tensor:
    """(O, I) weights of four-bit codes (O, I/2) by their groups' steps and minima (O, G)."""
    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).unflatten(1, (-1, GROUP))
    return torch.addcmul(lows[..., None].to(dtype), both.to(dtype), steps[..., None].to(dtype)).flatten(1)


class _FourBit(torch.autograd.Function):
    """x Wᵀ that keeps the codes for the backward pass and not the weights made of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, steps: Tensor, lows: Tensor) -> Tensor:
        ctx.save_for_backward(codes, steps, lows)
        dtype = (
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        )
        return F.linear(x.to(dtype), unpacked(codes, steps, lows, dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        codes, steps, lows = ctx.saved_tensors
        return gradient @ unpacked(codes, steps, lows, gradient.dtype), None, None, None
