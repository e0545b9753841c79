"""Learning from rewards: advantages and losses as pure functions, and the objective that fit() takes.

Group relative policy optimisation (GRPO: Shao et al. 2024, arXiv:2402.03300): several answers to a prompt are judged,
and each becomes likelier or less likely by how much better or worse it is than the others of its group. No value model
is needed. P prompts, G answers to each, B answers of a batch, T predictions in a row, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from langmill.common.settings import ReinforceSettings
from langmill.model.layers import LoRA
from langmill.model.replace import replace
from langmill.train.objectives import IGNORED, Objective, Tensors
from langmill.train.preferences import token_logps

FLAT = 1e-4  # added to a standard deviation: a group of equal rewards has none


def advantages(rewards_PG: Tensor, scale: str = "group") -> Tensor:
    """(P, G): each reward less the mean of its group, over the standard deviation (Shao et al., section 4.1.2).

    scale: "group", the deviation of a prompt's answers; "batch", that of all; "none", no division, so that easy and
    hard prompts do not weigh more than others (Liu et al. 2025, arXiv:2503.20783, section 3.1).
    """
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if scale == "none":
        return centred_PG
    spread = rewards_PG.std() if scale == "batch" else rewards_PG.std(1, keepdim=True)
    return centred_PG / (spread + FLAT)


def surrogate(
    logps_BT: Tensor, old_BT: Tensor, advantages_B: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Each token's -min(r·A, clip(r, 1 - low, 1 + high)·A), r = π/π_old (Shao et al., eq. 3), and where the clip
    holds, so that no gradient flows. high above low lets rare tokens grow (Yu et al. 2025, arXiv:2503.14476, eq. 10).
    """
    ratio_BT, advantages_B1 = (logps_BT - old_BT).exp(), advantages_B[:, None]
    free_BT, bound_BT = ratio_BT * advantages_B1, ratio_BT.clamp(1 - low, 1 + high) * advantages_B1
    return -torch.min(free_BT, bound_BT), bound_BT < free_BT


def k3(logps_BT: Tensor, reference_BT: Tensor) -> Tensor:
    """Each token's estimate of KL(π ‖ π_ref): π_ref/π - log π_ref/π - 1, unbiased and never below 0 (Shao et al.,
    eq. 4; Schulman 2020)."""
    log_BT = reference_BT - logps_BT
    return log_BT.expm1() - log_BT


def reduced(losses_BT: Tensor, mask_BT: Tensor, kind: str, longest: int) -> tuple[Tensor, Tensor]:
    """(sum, number) whose quotient, over a whole step, is the loss of this kind.

    grpo: the mean over answers of means over their tokens (Shao et al., eq. 3). dapo: the mean over all tokens (Yu et
    al., eq. 12); bnpo: the same, as micro-batches are weighed by their tokens here. dr_grpo: sums over tokens by
    `longest`, the tokens that an answer may have, so that a long wrong answer is not spared (Liu et al., section 3.2).
    """
    sums_B = torch.where(mask_BT, losses_BT, 0.0).sum(1)
    answers = torch.tensor(len(losses_BT), device=losses_BT.device)
    match kind:
        case "grpo":
            return (sums_B / mask_BT.sum(1).clamp(min=1)).sum(), answers
        case "dr_grpo":
            return sums_B.sum() / longest, answers
        case _:
            return sums_B.sum(), mask_BT.sum()


@dataclass
class Tally:
    """What the objective saw since `clear`: tokens, those where the clip held, and their KL estimates summed."""

    tokens: int = 0
    clipped: int = 0
    kl: float = 0.0

    def clear(self) -> None:
        """Begin anew."""
        self.tokens, self.clipped, self.kl = 0, 0, 0.0


def objective(settings: ReinforceSettings, tally: Tally) -> Objective:
    """The loss of a batch of answers (see `rollouts.AnswerBatch`) as `reduced` gives it; `tally` is told of it.

    Where the batch has no "old" log-probabilities its answers are those of the weights at hand, and the ratio is 1: the
    clip does not hold, and the gradient is that of plain policy gradients.
    """
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high

    def run(model: nn.Module, batch: Tensors) -> tuple[Tensor, Tensor]:
        logps_BT, mask_BT = logps(model, batch, settings.temperature), batch["targets"] != IGNORED
        old_BT = batch.get("old", logps_BT.detach())
        losses_BT, held_BT = surrogate(logps_BT, old_BT, batch["advantages"], settings.epsilon, high)
        tally.tokens += int(mask_BT.sum())
        tally.clipped += int((held_BT & mask_BT).sum())
        if settings.beta:
            kl_BT = k3(logps_BT, batch["reference"])
            losses_BT = losses_BT + settings.beta * kl_BT
            tally.kl += float(torch.where(mask_BT, kl_BT.detach(), 0.0).sum())
        return reduced(losses_BT, mask_BT, settings.loss_type, settings.max_completion_length)

    return run


def logps(model: nn.Module, batch: Tensors, temperature: float) -> Tensor:
    """log p of each target (B, T) at the temperature that the answers were drawn with, float32; 0 where none is.

    A row is a prompt and its answer, padded on the right, where a decoder's attention does not look.
    """
    network: Any = model
    h_BTD, bias = network.hidden(batch["tokens"]), getattr(model, "head_bias", None)
    if temperature != 1:
        h_BTD, bias = h_BTD / temperature, None if bias is None else bias / temperature
    flat_N = token_logps(h_BTD.flatten(0, 1), network.head_weight, batch["targets"].flatten(), bias)
    return flat_N.view_as(batch["targets"])


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its adapters left out: the one that training began with, at no cost of memory."""
    kept: dict[str, nn.Module] = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, LoRA)
    }

    def swap(to: dict[str, nn.Module]) -> None:
        replace(model, lambda name, layer: name in to, lambda name, layer: to[name])

    swap({name: layer.base for name, layer in kept.items()})  # type: ignore[misc]
    try:
        yield model
    finally:
        swap(kept)
