"""Steps and numbers: exact where they must be, and never further from the weights than simpler ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from langmill.compress.rounding import Rounding, digits_kept, made, nearest, steps_for, values
from langmill.model.layers import Int8Embedding

KINDS = {
    "8": Rounding(8),
    "8 for float16": Rounding(8, digits=4),
    "4": Rounding(4),
    "4 with zeros": Rounding(4, symmetric=False, digits=7),
}


def weights(seed: int, rows: int, groups: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, 32 * groups, generator=generator) * scale
    w[torch.rand(w.shape, generator=generator) < 0.02] *= 6  # some stand out
    w[0, :32] = 0.0
    return w


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 999), rows=st.integers(1, 9), groups=st.integers(1, 4), power=st.integers(-6, 3))
def test_steps_are_exact_in_float16_and_numbers_in_range(
    kind: str, seed: int, rows: int, groups: int, power: int
) -> None:
    rounding, w = KINDS[kind], weights(seed, rows, groups, 2.0**power)
    steps = steps_for(w, rounding)
    assert torch.equal(steps.step.half().float(), steps.step) and torch.equal(
        steps.step.bfloat16().float(), steps.step
    )
    numbers = nearest(w, steps, rounding)
    width = w.shape[1] // steps.step.shape[1]
    lifted = numbers.unflatten(1, (-1, width)) - steps.least[..., None]
    assert float(lifted.min()) >= 0 and float(lifted.max()) <= rounding.reach
    assert torch.equal(numbers, numbers.round())
    made_of = values(numbers, steps)
    if kind == "8 for float16":
        assert torch.equal(made_of.half().float(), made_of)
    if kind == "4 with zeros":
        lows = steps.least * steps.step
        assert torch.equal(lows.half().float(), lows)
    naive = naive_values(w, rounding)
    assert (
        float((made_of - w).norm())
        <= float((naive - w).norm()) * (1.0 if kind != "8 for float16" else 1.25) + 1e-9
    )
    layer = made(nn.Linear(w.shape[1], len(w)), numbers, steps, rounding)
    torch.testing.assert_close(layer.weight, made_of, rtol=1e-6, atol=0)


def naive_values(w: Tensor, rounding: Rounding) -> Tensor:
    """What reaches the largest weight, with steps of the same digits."""
    groups = w.unflatten(1, (-1, rounding.group or w.shape[1]))
    if rounding.symmetric:
        step = digits_kept(groups.abs().amax(-1) / -rounding.lowest, 8)[..., None]
        least = torch.tensor(float(rounding.lowest))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        step = digits_kept((high - low) / 15, 7)[..., None]
        least = (low[..., None] / torch.where(step == 0, 1.0, step)).round()
    numbers = (groups / torch.where(step == 0, 1.0, step)).round()
    return (numbers.clamp(least, least + rounding.reach) * step).flatten(1)


def test_a_zero_of_its_own_and_the_longer_side_of_four_bits_are_made_use_of() -> None:
    w = torch.linspace(0, 1.5, 32)[None]
    shifted, symmetric = (
        float((values(nearest(w, s := steps_for(w, r), r), s) - w).norm())
        for r in (KINDS["4 with zeros"], KINDS["4"])
    )
    assert shifted < 0.65 * symmetric
    assert float(steps_for(w, KINDS["4"]).step) < 0  # eight numbers on the side where the weights are


def test_errors_count_as_they_are_weighted() -> None:
    w = weights(5, 4, 1)
    worth = torch.full((32,), 1e-4)
    worth[3] = 1.0
    steps = steps_for(w, KINDS["4"], worth)
    plain = steps_for(w, KINDS["4"])
    found, other = (float((values(nearest(w, s, KINDS["4"]), s) - w)[1:, 3].norm()) for s in (steps, plain))
    assert found < other


def test_an_embedding_in_eight_bits_is_one() -> None:
    w = weights(1, 10, 2)
    plain = nn.Embedding.from_pretrained(w)
    steps = steps_for(w, Rounding(8))
    layer = made(plain, nearest(w, steps, Rounding(8)), steps, Rounding(8))
    assert isinstance(layer, Int8Embedding) and layer.out_features == 10
    assert float((layer(torch.tensor([4])) - w[4]).norm()) < 0.01 * float(w[4].norm())
