"""A pretrained model with the head for a task: its body as it is, its head where that fits, else a new one."""

from __future__ import annotations

import torch

from langmill.common.errors import ModelError
from langmill.families.folder import Model, export_config
from langmill.model.config import Task
from langmill.model.init import init_
from langmill.model.transformer import Transformer


def with_head(model: Model, task: Task, labels: tuple[str, ...], seed: int) -> Transformer:
    """The same weights under a head for `task` with these labels; new ones are drawn from `seed`.

    A head for the same task and labels is kept as it is, so that a run can go on from a tuned model; a dense layer
    before the scores (BERT's pooler) is kept wherever the new head has the same one. ModelError where the model's
    family has no head of this kind.
    """
    if not isinstance(model, Transformer):
        raise ModelError("an LSTM cannot take another head: choose a Transformer")
    family = export_config(model.config)[1]
    if not hasattr(family, "with_task"):
        raise ModelError(
            f"models of type {family.MODEL_TYPES[0]} cannot {task}: choose an encoder such as BERT, or a decoder"
        )
    config = family.with_task(model.config, task, labels)
    if config == model.config:
        return model
    with torch.device("meta"):
        fresh = Transformer(config)
    fresh = fresh.to_empty(device=model.tokens.weight.device).to(model.tokens.weight.dtype)
    init_(fresh, seed)
    old, new, before = model.state_dict(), fresh.state_dict(), model.config.head
    same_dense = before is not None and config.head is not None and before.transform == config.head.transform
    same_dense = same_dense and before is not None and (before.task != "text")
    with torch.no_grad():
        for name, weight in new.items():
            if name.startswith(("head.", "output_bias")) or (name.startswith("head_") and not same_dense):
                continue
            weight.copy_(old[name])
    return fresh.train(model.training)
