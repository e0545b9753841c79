"""GPTQ: less error on a layer's outputs than rounding to the nearest, on inputs that it has not seen too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from langmill.common.errors import ModelError
from langmill.compress.gptq import Hessian, gptq
from langmill.compress.rounding import Rounding, nearest, steps_for, values


def inputs(tokens: int, seed: int, width: int = 64) -> Tensor:
    """Correlated, as activations are: a few directions carry most of it, and some inputs are much larger."""
    mix = torch.randn(width // 4, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width // 4, generator=generator) @ mix
    x += 0.3 * torch.randn(tokens, width, generator=generator)
    x[:, ::16] *= 5
    return x


def hessian(x: Tensor) -> Hessian:
    found = Hessian(x.shape[-1])
    for part in x.split(50):
        found.add(part[None])
    return found


WEIGHT = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "rounding", [Rounding(4), Rounding(4, False, 7), Rounding(8)], ids=["4", "4 zeros", "8"]
)
def test_outputs_are_nearer_than_with_the_nearest_numbers(rounding: Rounding) -> None:
    x, fresh = inputs(400, 2), inputs(400, 3)
    numbers, steps = gptq(WEIGHT, hessian(x), rounding)
    close = values(numbers, steps)
    plain_steps = steps_for(WEIGHT, rounding)
    plain = values(nearest(WEIGHT, plain_steps, rounding), plain_steps)
    for given, share in ((x, 0.6), (fresh, 0.65)):
        found, simple = (float((given @ (WEIGHT - w).T).norm()) for w in (close, plain))
        assert found < share * simple
    lifted = numbers.unflatten(1, (-1, 64 // steps.step.shape[1])) - steps.least[..., None]
    assert float(lifted.min()) >= 0 and float(lifted.max()) <= rounding.reach
    total = hessian(x)
    expected = float((x @ (WEIGHT - close).T).square().sum())
    assert total.tokens == 400 and total.energy(WEIGHT - close) == pytest.approx(expected, rel=1e-3)


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_the_nearest() -> None:
    found = Hessian(64)
    found.sum_II = torch.eye(64)
    numbers, steps = gptq(WEIGHT, found, Rounding(4))
    assert torch.equal(numbers, nearest(WEIGHT, steps, Rounding(4)))
    assert torch.equal(
        gptq(WEIGHT, Hessian(64), Rounding(8))[0],
        nearest(WEIGHT, steps_for(WEIGHT, Rounding(8)), Rounding(8)),
    )


def test_an_input_that_is_never_there_is_rounded_to_the_nearest() -> None:
    x = inputs(300, 2)
    x[:, 5] = 0.0
    numbers, steps = gptq(WEIGHT, hessian(x), Rounding(4))
    assert torch.equal(numbers[:, 5], nearest(WEIGHT, steps, Rounding(4))[:, 5])


def test_few_inputs_are_enough_and_damaged_ones_are_refused() -> None:
    x = inputs(3, 2)  # the Hessian has rank 3
    numbers, steps = gptq(WEIGHT, hessian(x), Rounding(8))
    assert float((x @ (WEIGHT - values(numbers, steps)).T).norm()) < 0.005 * float((x @ WEIGHT.T).norm())
    x[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        gptq(WEIGHT, hessian(x), Rounding(8))
