from __future__ import annotations

import pytest

from langmill.common.errors import SettingsError
from langmill.common.settings import TrainSettings
from langmill.train.schedule import learning_rate

# Ten steps, two of them warm-up, peak 0.6, floor 0.06: worked out by hand.
COSINE = [0.2, 0.4, 0.6, 0.579448, 0.520919, 0.433325, 0.33, 0.226675, 0.139081, 0.080552]
WSD = [0.2, 0.4, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.218162]
CONSTANT = [0.2, 0.4] + [0.6] * 8


@pytest.mark.parametrize(("schedule", "expected"), [("cosine", COSINE), ("wsd", WSD), ("constant", CONSTANT)])
def test_by_hand(schedule: str, expected: list[float]) -> None:
    settings = TrainSettings(
        learning_rate=0.6, warmup_ratio=0.2, min_lr_ratio=0.1, decay_ratio=0.2, schedule=schedule
    )
    assert [learning_rate(step, 10, settings) for step in range(10)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_edges_stay_inside(schedule: str, steps: int, share: float) -> None:
    settings = TrainSettings(
        learning_rate=1.0, warmup_ratio=share, decay_ratio=share, min_lr_ratio=0.0, schedule=schedule
    )
    rates = [learning_rate(step, steps, settings) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates), "no step is wasted on a rate of 0"


def test_a_missing_rate_is_named() -> None:
    with pytest.raises(SettingsError, match=r"train\.learning_rate is not set"):
        learning_rate(0, 10, TrainSettings())
