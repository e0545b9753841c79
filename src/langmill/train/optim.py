"""The optimizer of a run: AdamW for all weights, or Muon for the hidden matrices and AdamW for the rest.

AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, in torch's fused kernel.
Muon: Jordan et al. 2024, with the step of Liu et al. 2025, arXiv:2502.16982, eq. 4, scaled by
0.2·sqrt(max(rows, columns)) so that AdamW's learning rate and weight decay serve both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from langmill.common.errors import CheckpointError
from langmill.common.settings import LoopSettings


class Optimizer:
    """All trainable weights of a model under one `step`, with its state as named tensors.

    Weight decay falls on matrices only. Norms, biases and embeddings (so a tied output matrix too) are
    left alone: decay would pull gains and rare tokens' vectors to zero although no gradient holds them.
    Muon takes the matrices that are neither embedding nor output, its momentum is torch's 0.95.
    """

    def __init__(self, model: nn.Module, settings: LoopSettings) -> None:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        output = id(getattr(model, "head_weight", None))
        self._named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        hidden, other, plain = [], [], []
        for weight in self._named.values():
            if weight.ndim < 2 or id(weight) in embeddings:
                plain.append(weight)
            elif weight.ndim == 2 and id(weight) != output and settings.optimizer == "muon":
                hidden.append(weight)
            else:
                other.append(weight)
        groups = [
            {"params": other, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        ]
        if hidden:
            decay = settings.weight_decay
            self._parts.append(
                torch.optim.Muon(hidden, lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )

    @property
    def weights(self) -> list[nn.Parameter]:
        """What is trained, in the model's order."""
        return list(self._named.values())

    def step(self, learning_rate: float) -> None:
        """Change every weight by its gradient, in place."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()

    def clear(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state: `<weight's name>.<exp_avg | exp_avg_sq | step | momentum_buffer>`, not copied."""
        return {
            f"{name}.{key}": value
            for name, weight in self._named.items()
            for part in self._parts
            for key, value in part.state.get(weight, {}).items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state that `tensors` gave; CheckpointError names one that does not fit."""
        owner = {
            weight: part for part in self._parts for group in part.param_groups for weight in group["params"]
        }
        for part in self._parts:
            part.state.clear()
        for full_name, saved in tensors.items():
            name, _, key = full_name.rpartition(".")
            weight = self._named.get(name)
            if weight is None:
                raise CheckpointError(
                    f"the checkpoint's optimizer knows {name}, and this model has no such weight"
                )
            if key != "step" and saved.shape != weight.shape:
                raise CheckpointError(
                    f"{full_name} is {list(saved.shape)} in the checkpoint, and the weight {list(weight.shape)}"
                )
            # A copy in memory of torch's own, aligned as it was: some kernels round by alignment.
            owner[weight].state[weight][key] = torch.empty_like(saved, device=weight.device).copy_(saved)
