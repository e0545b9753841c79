"""Every layer that a saved model may hold in the place of a linear one or of an embedding: low-rank adapters, and
weights in 8 and in 4 bits.

They take (..., inputs) and give (..., outputs), as nn.Linear does, and have its `in_features`, `out_features`, `bias`
and `weight` (O, I), which a rounded layer makes anew at each use. An embedding has these too, one output a token, so
that it serves as the output layer that is tied to it. O outputs, I inputs, R rank, G groups of 32, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from langmill.model.products import GROUP as GROUP
from langmill.model.products import pack, packed_nibbles, product, unpacked, widened
from langmill.model.sparing import low_rank, working_type


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
            if isinstance(self.base, Int8Linear | Int4Linear) and torch.is_grad_enabled():
                base = self.base
                parts: Any = base.parts
                return low_rank(x, self.a, self.b, self.scale, base.bias, base.made, *parts)
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


class Int8Linear(nn.Module):
    """A frozen linear layer in 8 bits: the weights of each output are step·(-127 … 127).

    `codes` is int8 (O, I), `steps` float32 (O,): 8 bits a weight.
    """

    codes: Tensor
    steps: Tensor
    made: Callable[..., Tensor] = staticmethod(widened)

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("steps", torch.zeros(out_features))

    @classmethod
    def of(cls, layer: nn.Linear | LoRA) -> Int8Linear:
        """The nearest to a layer of which the largest weight of each output is 127 steps."""
        weight_OI = layer.weight.detach().float()
        made = cls(layer.in_features, layer.out_features, layer.bias)
        made.steps = weight_OI.abs().amax(1) / 127
        codes_OI = weight_OI / torch.where(made.steps == 0, 1.0, made.steps)[:, None]
        made.codes = codes_OI.round().to(torch.int8)
        return made

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What `made` makes the weights of."""
        return self.codes, self.steps

    @property
    def weight(self) -> Tensor:
        """The weights as float32, (O, I)."""
        return widened(self.codes, self.steps, torch.float32)

    def scores(self, x: Tensor) -> Tensor:
        """x Wᵀ (..., O): the bias left out."""
        return _times(8, x, self.parts, widened, self.parts)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scores(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int4Linear(nn.Module):
    """A frozen linear layer in 4 bits: each group of 32 weights along a row is minimum + step·(0 … 15).

    `codes` holds two weights a byte, the even input in the low half; `steps` and `lows` are float16 (O, G): 5 bits a
    weight. lows None: the minimum is -8 steps, as in a Q4_0 GGUF: 4.5 bits. Weights that were in such a form already
    are met exactly up to float16's rounding. A backward pass needs the packed form alone.
    """

    codes: Tensor
    steps: Tensor
    lows: Tensor | None
    made: Callable[..., Tensor] = staticmethod(unpacked)

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None = None, symmetric: bool = False
    ) -> None:
        super().__init__()
        _check_groups(in_features)
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        _register_groups(self, out_features, in_features, symmetric)

    @classmethod
    def of(cls, layer: nn.Linear) -> Int4Linear:
        """The nearest to a plain layer: its groups' minima and maxima are the ends of the sixteen steps."""
        made = cls(layer.in_features, layer.out_features, layer.bias)
        grouped_OGW = layer.weight.detach().float().unflatten(1, (-1, GROUP))
        low_OG1, high_OG1 = grouped_OGW.amin(-1, keepdim=True), grouped_OGW.amax(-1, keepdim=True)
        lows = low_OG1[..., 0].half()
        made.lows, made.steps = lows, ((high_OG1 - low_OG1) / 15)[..., 0].half()
        steps = made.steps.float()[..., None]
        codes_OGW = (grouped_OGW - lows.float()[..., None]) / torch.where(steps == 0, 1.0, steps)
        made.codes = packed_nibbles(codes_OGW.round().clamp(0, 15).flatten(1))
        return made

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """What `made` makes the weights of."""
        return self.codes, self.steps, self.lows

    @property
    def weight(self) -> Tensor:
        """The weights as float32, (O, I)."""
        return unpacked(self.codes, self.steps, self.lows, torch.float32)

    def scores(self, x: Tensor) -> Tensor:
        """x Wᵀ (..., O): the bias left out."""
        return _times(4, x, self.parts, unpacked, (*self.parts, lambda: _packed(self)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scores(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int8Embedding(nn.Module):
    """A frozen embedding in 8 bits, a step for each token: `codes` int8 (V, I), `steps` float32 (V,)."""

    codes: Tensor
    steps: Tensor
    bias = None

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.in_features, self.out_features = dim, tokens
        self.register_buffer("codes", torch.zeros(tokens, dim, dtype=torch.int8))
        self.register_buffer("steps", torch.zeros(tokens))

    @property
    def weight(self) -> Tensor:
        """The vectors as float32, (V, I)."""
        return widened(self.codes, self.steps, torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors (..., I) of ids (...), float32."""
        return self.codes[ids].float() * self.steps[ids][..., None]

    def scores(self, x: Tensor) -> Tensor:
        """x Wᵀ (..., V): the tied output layer."""
        parts = (self.codes, self.steps)
        return _times(8, x, parts, widened, parts)


class Int4Embedding(nn.Module):
    """A frozen embedding in 4 bits; `codes`, `steps` and `lows` are those of `Int4Linear`, one output a token."""

    codes: Tensor
    steps: Tensor
    lows: Tensor | None
    bias = None

    def __init__(self, tokens: int, dim: int, symmetric: bool = False) -> None:
        super().__init__()
        _check_groups(dim)
        self.in_features, self.out_features = dim, tokens
        _register_groups(self, tokens, dim, symmetric)

    @property
    def weight(self) -> Tensor:
        """The vectors as float32, (V, I)."""
        return unpacked(self.codes, self.steps, self.lows, torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors (..., I) of ids (...), float32."""
        flat = ids.reshape(-1)
        lows = None if self.lows is None else self.lows[flat]
        x = unpacked(self.codes[flat], self.steps[flat], lows, torch.float32)
        return x.view(*ids.shape, self.in_features)

    def scores(self, x: Tensor) -> Tensor:
        """x Wᵀ (..., V): the tied output layer."""
        parts = (self.codes, self.steps, self.lows)
        return _times(4, x, parts, unpacked, (*parts, lambda: _packed(self)))


ROUNDED = (Int8Linear, Int4Linear, Int8Embedding, Int4Embedding)


def _check_groups(in_features: int) -> None:
    if in_features % GROUP:
        raise ValueError(f"{in_features} inputs are not whole groups of {GROUP}")


def _register_groups(layer: nn.Module, outputs: int, inputs: int, symmetric: bool) -> None:
    groups = (outputs, inputs // GROUP)
    layer.register_buffer("codes", torch.zeros(outputs, inputs // 2, dtype=torch.uint8))
    layer.register_buffer("steps", torch.zeros(groups, dtype=torch.float16))
    layer.register_buffer("lows", None if symmetric else torch.zeros(groups, dtype=torch.float16))


def _packed(layer: Any) -> tuple[Tensor, Tensor] | None:
    """What int4pack takes, made once and kept beside the codes."""
    key = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in (layer.codes, layer.steps)]
    kept = layer.__dict__.get("_kept")
    if kept is None or kept[0] != key:
        kept = layer.__dict__["_kept"] = (key, pack(layer.codes, layer.steps, layer.lows))
    return kept[1]


def _times(bits: int, x: Tensor, parts: Any, made: Callable[..., Tensor], weights: Any) -> Tensor:
    """x Wᵀ: with a gradient by weights made for the moment, without one by the fastest way here."""
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _Rounded.apply(x, made, *parts)  # type: ignore[no-untyped-call]
        return y
    return product(bits, x.to(working_type(x)), weights)


class _Rounded(torch.autograd.Function):
    """x Wᵀ that keeps the codes for the backward pass and not the weights made of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: Callable[..., Tensor], *parts: Tensor | None) -> Tensor:
        ctx.made = made
        ctx.save_for_backward(*parts)
        dtype = working_type(x)
        return F.linear(x.to(dtype), made(*parts, dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        parts = ctx.saved_tensors
        return gradient @ ctx.made(*parts, gradient.dtype), None, *[None for _ in parts]
