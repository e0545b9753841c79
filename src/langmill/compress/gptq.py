"""GPTQ: rounding one input's weights after the other, so that those still to come make good for the error.

Frantar et al. 2022, arXiv:2210.17323. The error that counts is that of a layer's outputs on calibration inputs, whose
second-order form is the Hessian Σ x xᵀ. O outputs, I inputs, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from langmill.common.errors import ModelError
from langmill.compress.rounding import Rounding, Steps, steps_for

BLOCK = 128  # inputs whose errors are handed on to the rest together
DAMPING = 0.05  # added to the diagonal, as a share of its mean
_MOST_DAMPING = 1e3


class Hessian:
    """Σ x xᵀ (I, I) over the inputs that a layer was given."""

    def __init__(self, inputs: int, device: torch.device | str = "cpu") -> None:
        self.sum_II = torch.zeros(inputs, inputs, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Count inputs (..., I) in."""
        x_NI = x.reshape(-1, x.shape[-1]).float()
        self.sum_II.addmm_(x_NI.T, x_NI)
        self.tokens += len(x_NI)

    def energy(self, weight_OI: Tensor) -> float:
        """The squared length of all outputs that these weights give, biases left out."""
        return float((weight_OI @ self.sum_II * weight_OI).sum(dtype=torch.float64).clamp(min=0))


def gptq(
    weight_OI: Tensor, hessian: Hessian, rounding: Rounding, damping: float = DAMPING
) -> tuple[Tensor, Steps]:
    """Numbers (O, I) and their steps. ModelError where the inputs were not finite.

    The steps are chosen first, each weight's error counted by its input's size; then inputs are rounded from the
    largest to the smallest (known as act-order, with steps that stay). An input that was never there is rounded to the
    nearest.
    """
    worth_I = hessian.sum_II.diagonal()
    mean = float(worth_I.mean())
    if not torch.isfinite(hessian.sum_II).all():
        raise ModelError("the calibration text gives activations that are not finite: the model is damaged")
    if mean == 0:  # nothing came in: every error counts alike
        worth_I, mean = torch.ones_like(worth_I), 1.0
    steps = steps_for(weight_OI, rounding, worth_I + damping * mean)
    order_I = worth_I.argsort(descending=True)
    upper_II = _inverse_root(hessian.sum_II[order_I][:, order_I], damping * mean)
    group_I = order_I // (weight_OI.shape[1] // steps.step.shape[1])
    rest_IO, step_IO, least_IO = (
        t.T.float().contiguous()
        for t in (weight_OI[:, order_I], steps.step[:, group_I], steps.least[:, group_I])
    )
    numbers_IO = _rounded(rest_IO, upper_II, step_IO, least_IO, rounding.reach)
    return numbers_IO[order_I.argsort()].T.contiguous(), steps


def _rounded(rest_IO: Tensor, upper_II: Tensor, step_IO: Tensor, least_IO: Tensor, reach: int) -> Tensor:
    """The numbers, each input's error spread over those after it (algorithm 1). An input's weights are a row."""
    numbers_IO = torch.empty_like(rest_IO)
    safe_IO, most_IO = torch.where(step_IO == 0, torch.inf, step_IO), least_IO + reach
    for start in range(0, len(rest_IO), BLOCK):
        end = min(start + BLOCK, len(rest_IO))
        errors = torch.empty_like(rest_IO[start:end])
        for at in range(start, end):
            w_O, numbers_O = rest_IO[at], numbers_IO[at]
            torch.clamp((w_O / safe_IO[at]).round_(), least_IO[at], most_IO[at], out=numbers_O)
            error_O = torch.addcmul(w_O, numbers_O, step_IO[at], value=-1).div_(upper_II[at, at])
            rest_IO[at + 1 : end].addr_(upper_II[at, at + 1 : end], error_O, alpha=-1)
            errors[at - start] = error_O
        rest_IO[end:].addmm_(upper_II[start:end, end:].T, errors, alpha=-1)
    return numbers_IO


def _inverse_root(hessian_II: Tensor, damping: float) -> Tensor:
    """The upper Cholesky root of the inverse, with as much damping as it takes."""
    eye_II = torch.eye(len(hessian_II), device=hessian_II.device)
    share = 1.0
    while share <= _MOST_DAMPING:
        lower_II, failed = torch.linalg.cholesky_ex(hessian_II + share * damping * eye_II)
        if not failed:
            upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
            if not failed:
                return upper_II
        share *= 10
    raise ModelError("the calibration inputs of a layer cannot be inverted: give other text by --data")
