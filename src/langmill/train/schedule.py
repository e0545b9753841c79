"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from langmill.common.errors import SettingsError
from langmill.common.settings import LoopSettings


def learning_rate(step: int, steps: int, settings: LoopSettings) -> float:
    """The rate of optimizer step `step`, counted from 0, in a run of `steps`.

    A linear warm-up over `warmup_ratio` of the run, which reaches the peak on the step after it; then
    cosine: down to min_lr_ratio of the peak along half a cosine (Loshchilov and Hutter 2017,
        arXiv:1608.03983, eq. 5);
    wsd: the peak, and in the last `decay_ratio` of the run down along 1 - sqrt(progress) (Hu et al. 2024,
        arXiv:2404.06395; this shape: Hägele et al. 2024, arXiv:2405.18392, section 3);
    constant: the peak.
    Raises SettingsError where settings hold no learning_rate.
    """
    peak = settings.learning_rate
    if peak is None:
        raise SettingsError(
            "train.learning_rate is not set: give it, or choose a model size, which brings one"
        )
    warmup = round(settings.warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return peak
    begin = warmup
    if settings.schedule == "wsd":
        begin = max(warmup, steps - round(settings.decay_ratio * steps))
    progress = max(0.0, (step - begin) / max(1, steps - begin))
    left = 1 - math.sqrt(progress) if settings.schedule == "wsd" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * left)
