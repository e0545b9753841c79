"""What a fine-tuning run will take, told in one line before it starts."""

from __future__ import annotations

import math

import torch

from langmill.common.settings import LoopSettings
from langmill.jobs import memory
from langmill.jobs.report import bytes_shown, seconds_shown
from langmill.model.config import Config
from langmill.model.count import training_flops
from langmill.train.measure import matmul_flops

REACHED = 0.5  # share of the matrix-product rate that training reaches, before anything is measured
FROZEN = 2 / 3  # of the operations are left where no gradient of the weights themselves is made


def foretold(
    config: Config, train: LoopSettings, tokens: int, device: torch.device, whole: bool = True
) -> str:
    """Steps, memory and about how long: `tokens` are those of one epoch; `train` has its rows and length resolved."""
    rows, length = train.micro_batch_size or 1, train.max_length or config.length
    step = rows * length * train.gradient_accumulation_steps
    steps = train.max_steps or math.ceil((train.num_train_epochs or 1) * tokens / step)
    rate = matmul_flops(
        "bfloat16" if train.dtype == "bfloat16" or device.type == "cuda" else "float32", device
    )
    operations = steps * step * training_flops(config, length) * (1 if whole else FROZEN)
    needed, there = memory.estimate(config, train, device, whole).total, memory.free(device)
    return (
        f"about {steps:,} steps of {train.gradient_accumulation_steps} × {rows} × {length} tokens, "
        f"{seconds_shown(operations / (REACHED * rate))}; memory about {bytes_shown(needed)} of {bytes_shown(there)}"
    )
