from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

from langmill.common.errors import CheckpointError
from langmill.train.optim import Optimizer

NORMS = [
    "decoder.blocks.0.attention_norm.weight", "decoder.blocks.0.mlp_norm.weight",
    "decoder.blocks.1.attention_norm.weight", "decoder.blocks.1.mlp_norm.weight", "decoder.norm.weight",
]  # fmt: skip


def steps(model: nn.Module, update: object, count: int = 3) -> None:
    """`count` updates along gradients that depend on nothing but the count."""
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator) * 0.1
        update(0.01 * (step + 1))  # type: ignore[operator]


def reference(model: nn.Module, parts: list[torch.optim.Optimizer]) -> object:
    def update(rate: float) -> None:
        for part in parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    return update


@pytest.mark.parametrize(("kind", "spared"), [("llama", {"tokens.weight"}), ("untied", {"tokens.weight"})])
def test_adamw_is_torchs_with_decay_on_matrices_only(tiny: ModuleType, kind: str, spared: set[str]) -> None:
    mine, theirs = tiny.model(kind), tiny.model(kind)
    named = dict(theirs.named_parameters())
    free = [named[name] for name in [*NORMS, *spared]]
    decayed = [weight for name, weight in named.items() if name not in {*NORMS, *spared}]
    assert len(decayed) == 14 + (kind == "untied")
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=False)
    steps(mine, Optimizer(mine, tiny.settings()).step)
    steps(theirs, reference(theirs, [plain]))
    for name, weight in mine.named_parameters():
        torch.testing.assert_close(weight, named[name], rtol=1e-5, atol=1e-6, msg=name)


def test_muon_takes_the_hidden_matrices(tiny: ModuleType) -> None:
    mine, theirs = tiny.model("untied"), tiny.model("untied")
    named = dict(theirs.named_parameters())
    hidden = [weight for name, weight in named.items() if "blocks" in name and weight.ndim == 2]
    muon = torch.optim.Muon(hidden, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    free = [named[name] for name in [*NORMS, "tokens.weight"]]
    groups = [{"params": [named["head.weight"]], "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=False)
    optimizer = Optimizer(mine, tiny.settings(optimizer="muon"))
    steps(mine, optimizer.step)
    steps(theirs, reference(theirs, [adamw, muon]))
    for name, weight in mine.named_parameters():
        torch.testing.assert_close(weight, named[name], rtol=1e-5, atol=1e-6, msg=name)
    kept = optimizer.tensors()
    assert "decoder.blocks.0.mlp.up.weight.momentum_buffer" in kept and "head.weight.exp_avg_sq" in kept
    assert len(kept) == 14 + 3 * 7


def test_the_state_fits_or_is_refused_by_name(tiny: ModuleType) -> None:
    mine = tiny.model()
    optimizer = Optimizer(mine, tiny.settings())
    steps(mine, optimizer.step)
    saved = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    other = Optimizer(tiny.model(), tiny.settings())
    other.load(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in other.tensors().items())
    assert other.tensors().keys() == saved.keys()
    with pytest.raises(CheckpointError, match=r"knows head\.weight"):
        other.load({"head.weight.exp_avg": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"tokens\.weight\.exp_avg is \[3\] .* \[50, 16\]"):
        other.load({"tokens.weight.exp_avg": torch.zeros(3)})


def test_frozen_weights_are_left_out(tiny: ModuleType) -> None:
    mine = tiny.model()
    mine.tokens.weight.requires_grad_(False)
    assert all(weight is not mine.tokens.weight for weight in Optimizer(mine, tiny.settings()).weights)
