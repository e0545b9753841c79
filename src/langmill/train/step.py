"""One optimizer step over several micro-batches, weighted by tokens.

The gradient is that of the loss summed over every scored token of the step, divided once by their number:
eight micro-batches of one row give what one of eight rows gives, however unequal their tokens are, and a
last, shorter window needs no case of its own. Over several ranks sums and numbers are added up first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from langmill.common.errors import TrainingError
from langmill.train.objectives import Objective, Tensors
from langmill.train.optim import Optimizer

# Adds the gradient of an objective's sum to every weight's .grad and returns (sum, number), both detached.
Gradients = Callable[[nn.Module, Objective, Tensors], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Step:
    """What one step measured. loss: mean nats a token; grad_norm: of that mean, before clipping.

    applied is False where either was NaN or infinite: then no weight was changed.
    """

    loss: float
    tokens: int
    grad_norm: float
    applied: bool


def backward(model: nn.Module, objective: Objective, batch: Tensors) -> tuple[Tensor, Tensor]:
    """The plain way to gradients."""
    loss, count = objective(model, batch)
    loss.backward()
    return loss.detach(), count


def tensors(batch: Any, device: torch.device) -> dict[str, Tensor]:
    """The arrays of a batch, a dataclass, as tensors on `device`: tokens_BT becomes "tokens"."""
    arrays = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {
        name.rpartition("_")[0]: torch.from_numpy(array).to(device)
        for name, array in arrays.items()
        if isinstance(array, np.ndarray)
    }


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    objective: Objective,
    batches: Sequence[Tensors],
    *,
    learning_rate: float,
    max_grad_norm: float,
    gradients: Gradients = backward,
) -> Step:
    """Change the weights once, by all of `batches`; memory is needed for one of them at a time.

    max_grad_norm: the gradient is scaled down to this norm where it is longer; 0 never.
    gradients: replaces the plain backward pass (gradients clipped by example, for one).
    Raises TrainingError where no token of the step is scored.
    """
    optimizer.clear()
    sums = [gradients(model, objective, batch) for batch in batches]
    loss = torch.stack([loss.float() for loss, _ in sums]).sum()
    count = torch.stack([count for _, count in sums]).sum()
    grads = [weight.grad for weight in optimizer.weights if weight.grad is not None]
    if dist.is_available() and dist.is_initialized():
        for total in (loss, count, *grads):
            dist.all_reduce(total)
    tokens = int(count)
    if tokens == 0:
        raise TrainingError(
            "no token of this step is scored: every target is masked, so nothing can be learned"
        )
    mean, norm = float(loss) / tokens, float(torch.nn.utils.get_total_norm(grads)) / tokens
    applied = math.isfinite(mean) and math.isfinite(norm)
    if applied:
        clip = min(1.0, max_grad_norm / norm) if max_grad_norm and norm else 1.0
        torch._foreach_mul_(grads, clip / tokens)
        optimizer.step(learning_rate)
    optimizer.clear()
    return Step(mean, tokens, norm, applied)
