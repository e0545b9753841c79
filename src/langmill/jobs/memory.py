"""Whether a run fits into memory, told before it starts."""

from __future__ import annotations

from dataclasses import replace

import torch

from langmill.common.errors import TrainingError
from langmill.common.machine import available_bytes
from langmill.common.settings import LoopSettings
from langmill.jobs.report import bytes_shown
from langmill.model.config import Config
from langmill.model.count import Memory, training_memory
from langmill.train.objectives import CHUNK

SMALLER = "choose a smaller --size, or a machine with more memory"


def estimate(config: Config, train: LoopSettings, device: torch.device, whole: bool = True) -> Memory:
    """Bytes of a training step by part; `train` has its rows and length resolved.

    whole: all weights are trained; without it adapters, whose gradients and moments are next to nothing.
    """
    narrow = train.dtype == "bfloat16" or (train.dtype == "auto" and device.type == "cuda")
    parts = training_memory(
        config,
        train.micro_batch_size or 1,
        train.max_length or config.length,
        element=2 if narrow else 4,
        checkpointing=train.gradient_checkpointing,
        logits_chunk=CHUNK,
    )
    return (
        parts if whole else replace(parts, gradients=parts.gradients // 50, optimiser=parts.optimiser // 50)
    )


def free(device: torch.device) -> int:
    """Bytes that a run could take now, on the GPU where it trains there."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_bytes()


def check(
    config: Config, train: LoopSettings, device: torch.device, whole: bool = True, last: str = SMALLER
) -> None:
    """Raise TrainingError, naming the next lever, where the estimate is above what is free. last: see `lever`."""
    needed, there = estimate(config, train, device, whole).total, free(device)
    if needed <= there:
        return
    raise TrainingError(
        f"this run needs about {bytes_shown(needed)} of memory and {bytes_shown(there)} are free: "
        f"{lever(config, train, there, device, whole, last)}"
    )


def lever(
    config: Config, train: LoopSettings, there: int, device: torch.device, whole: bool = True, last: str = SMALLER
) -> str:  # fmt: skip
    """The mildest setting that makes the run fit: fewer rows at once, then recomputing; `last` where none does."""
    rows, steps = train.micro_batch_size or 1, train.gradient_accumulation_steps
    for checkpointing in (train.gradient_checkpointing, True):
        for halvings in range(rows.bit_length()):
            fewer = max(1, rows >> halvings)
            tried = train.model_copy(
                update={"micro_batch_size": fewer, "gradient_checkpointing": checkpointing}
            )
            if estimate(config, tried, device, whole).total <= there:
                named = [] if fewer == rows else [
                    f"train.micro_batch_size={fewer} train.gradient_accumulation_steps={steps * rows // fewer}"
                ]  # fmt: skip
                named += (
                    ["train.gradient_checkpointing=true"]
                    if checkpointing != train.gradient_checkpointing
                    else []
                )
                return f"set {' '.join(named)} (the result stays the same)"
    return last
