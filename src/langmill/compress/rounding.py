"""Weights as a step times a whole number: which step, and which numbers.

A row, or each group of 32 weights in it, shares a step. The steps tried are some around the one that just reaches the
largest weight, and for the numbers that each gives the step that suits these best; the one with the least squared error
is taken. O outputs, I inputs, G groups, W weights in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from langmill.model.layers import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear
from langmill.model.products import GROUP, packed_nibbles

LARGEST = 65504.0  # of float16, in which steps are kept
# Steps that are tried, as shares of the one that reaches the largest weight; rounded themselves, they fall beside it.
SHARES = {8: (1.07, 1.0, 0.97, 0.94, 0.9, 0.85, 0.8), 4: (1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}
_SLICE = 1 << 22  # weights worked on at once


@dataclass(frozen=True)
class Rounding:
    """How a matrix is rounded. bits: 8, a step for each row, or 4, a step for each group.

    symmetric: zero is one of the sixteen numbers of 4 bits, the ninth; without it each group has its own. digits:
    binary digits of a step that count. Eight are exact in float16 and in bfloat16 alike; with four (8 bits) a step's
    products with the numbers are exact in float16, with seven (4 bits, not symmetric) those with the zero.
    """

    bits: int
    symmetric: bool = True
    digits: int = 8

    @property
    def group(self) -> int | None:
        """Weights that share a step; None: a row."""
        return GROUP if self.bits == 4 else None

    @property
    def lowest(self) -> int:
        """The least number, where zero is in the middle."""
        return -127 if self.bits == 8 else -8

    @property
    def reach(self) -> int:
        """How far the largest number is from the least."""
        return 254 if self.bits == 8 else 15


@dataclass(frozen=True)
class Steps:
    """What numbers stand for: `step` (O, G), and the least number of each group, `least` (O, G)."""

    step: Tensor
    least: Tensor


def digits_kept(steps: Tensor, digits: int) -> Tensor:
    """The nearest numbers with so many binary digits that float16 holds too."""
    mantissa, exponent = torch.frexp(steps.float())
    whole = (mantissa * 2.0**digits).round()
    return torch.ldexp(whole, exponent - digits).clamp(-LARGEST, LARGEST).half().float()


def steps_for(weight_OI: Tensor, rounding: Rounding, worth_I: Tensor | None = None) -> Steps:
    """The steps with the least squared error; worth_I says how much each input's errors count."""
    rows = max(1, _SLICE // weight_OI.shape[1])
    worth = torch.ones_like(weight_OI[0]) if worth_I is None else worth_I
    parts = [_steps(some, rounding, worth) for some in weight_OI.float().split(rows)]
    return Steps(torch.cat([p.step for p in parts]), torch.cat([p.least for p in parts]))


def _steps(weight_OI: Tensor, rounding: Rounding, worth_I: Tensor) -> Steps:
    width = rounding.group or weight_OI.shape[1]
    w_OGW, worth_GW = weight_OI.unflatten(1, (-1, width)), worth_I.unflatten(0, (-1, width))
    found: Steps | None = None
    best_OG = torch.full(w_OGW.shape[:2], torch.inf, device=w_OGW.device)
    for step, least in _tried(w_OGW, rounding):
        for again in (False, True):
            numbers = _numbers(w_OGW, step, least, rounding)
            if again:  # the best step for these numbers, which may change them
                square = (worth_GW * numbers.square()).sum(-1)
                step = (worth_GW * w_OGW * numbers).sum(-1) / torch.where(square == 0, 1.0, square)
                step = digits_kept(step, rounding.digits)
                numbers = _numbers(w_OGW, step, least, rounding)
            error_OG = (worth_GW * (w_OGW - numbers * step[..., None]).square()).sum(-1)
            better = error_OG < best_OG
            best_OG = torch.where(better, error_OG, best_OG)
            old = found or Steps(step, least)
            found = Steps(torch.where(better, step, old.step), torch.where(better, least, old.least))
    assert found is not None
    return found


def _tried(w_OGW: Tensor, rounding: Rounding) -> Any:
    """Pairs of steps and least numbers (O, G)."""
    low, high = w_OGW.amin(-1), w_OGW.amax(-1)
    if not rounding.symmetric and rounding.bits == 4:
        low, high = low.clamp(max=0), high.clamp(min=0)
        for share in SHARES[4]:
            step = digits_kept(share * (high - low) / 15, rounding.digits)
            yield step, (low / torch.where(step == 0, 1.0, step)).round().clamp(-15, 0)
        return
    largest = torch.maximum(-low, high)
    signs = (1,) if rounding.bits == 8 else (1, -1)  # of 4 bits the negative side reaches further
    for sign in signs:
        for share in SHARES[rounding.bits]:
            step = digits_kept(sign * share * largest / -rounding.lowest, rounding.digits)
            yield step, torch.full_like(step, rounding.lowest)


def _numbers(w_OGW: Tensor, step_OG: Tensor, least_OG: Tensor, rounding: Rounding) -> Tensor:
    step = step_OG[..., None]
    least = least_OG[..., None]
    return (w_OGW / torch.where(step == 0, torch.inf, step)).round().clamp(least, least + rounding.reach)


def nearest(weight_OI: Tensor, steps: Steps, rounding: Rounding) -> Tensor:
    """The nearest numbers (O, I)."""
    width = weight_OI.shape[1] // steps.step.shape[1]
    return _numbers(weight_OI.unflatten(1, (-1, width)), steps.step, steps.least, rounding).flatten(1)


def values(numbers_OI: Tensor, steps: Steps) -> Tensor:
    """What the numbers stand for, (O, I)."""
    width = numbers_OI.shape[1] // steps.step.shape[1]
    return (numbers_OI.unflatten(1, (-1, width)) * steps.step[..., None]).flatten(1)


def made(layer: nn.Module, numbers_OI: Tensor, steps: Steps, rounding: Rounding) -> nn.Module:
    """The rounded layer that takes the place of a plain linear one or of an embedding."""
    outputs, inputs = numbers_OI.shape
    if isinstance(layer, nn.Embedding):
        if rounding.bits == 8:
            return _eight(Int8Embedding(outputs, inputs), numbers_OI, steps)
        return _four(Int4Embedding(outputs, inputs, rounding.symmetric), numbers_OI, steps)
    bias: Any = layer.bias
    if rounding.bits == 8:
        return _eight(Int8Linear(inputs, outputs, bias), numbers_OI, steps)
    return _four(Int4Linear(inputs, outputs, bias, rounding.symmetric), numbers_OI, steps)


def _eight(layer: Any, numbers_OI: Tensor, steps: Steps) -> nn.Module:
    layer.codes, layer.steps = numbers_OI.to(torch.int8), steps.step[:, 0].float().clone()
    return layer


def _four(layer: Any, numbers_OI: Tensor, steps: Steps) -> nn.Module:
    codes = numbers_OI.unflatten(1, (-1, GROUP)) - steps.least[..., None]
    layer.codes, layer.steps = packed_nibbles(codes.flatten(1)), steps.step.half()
    if layer.lows is not None:
        layer.lows = (steps.least * steps.step).half()
    return layer
