from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from langmill.train import objectives
from langmill.train.objectives import causal, head_loss
from langmill.train.step import tensors


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("whole", [None, 0, 1 << 25], ids=["in cache", "chunks", "whole"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_way_gives_the_plain_loss(
    monkeypatch: pytest.MonkeyPatch, mixed: bool, whole: int | None, bias: bool
) -> None:
    monkeypatch.setattr(objectives, "CHUNK", 7)
    if whole is not None:  # as where this is compiled, or on a GPU
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(objectives, "WHOLE", whole)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((40, 8), (30, 8), (30,))]
    targets = torch.randint(0, 30, (40,), generator=generator)
    targets[::3] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = head_loss(leaves[0], leaves[1], targets, leaves[2] if bias else None)
    used = leaves if bias else leaves[:2]
    found = torch.autograd.grad(loss, used)
    plain = F.cross_entropy(
        leaves[0] @ leaves[1].T + (leaves[2] if bias else 0), targets, reduction="sum", ignore_index=-100
    )
    assert loss.dtype == torch.float32, "a sum in bfloat16 would be off by percents"
    torch.testing.assert_close(loss, plain, rtol=3e-3 if mixed else 1e-6, atol=0)
    for mine, theirs in zip(found, torch.autograd.grad(plain, used), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02 if mixed else 1e-5, atol=0.1 if mixed else 1e-5)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
def test_a_frozen_output_layer_gives_the_same_loss_and_gradient(
    monkeypatch: pytest.MonkeyPatch, mixed: bool
) -> None:
    monkeypatch.setattr(objectives, "FROZEN_CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(40, 8, generator=generator).mul_(4).requires_grad_()
    weight, bias = torch.randn(30, 8, generator=generator), torch.randn(30, generator=generator)
    targets = torch.randint(0, 30, (40,), generator=generator)
    targets[::3] = -100
    with torch.no_grad():
        h[1] *= 1e3  # a target whose probability underflows
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = head_loss(h, weight, targets, bias)
    (found,) = torch.autograd.grad(3 * loss, h)
    plain = F.cross_entropy(h @ weight.T + bias, targets, reduction="sum", ignore_index=-100)
    (expected,) = torch.autograd.grad(3 * plain, h)
    assert loss.isfinite() and loss.dtype == torch.float32 and not found[::3].any()
    torch.testing.assert_close(loss, plain, rtol=3e-3 if mixed else 1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=0.02 if mixed else 1e-5, atol=0.2 if mixed else 1e-5)
    nothing = head_loss(h, weight, torch.full_like(targets, -100))
    assert nothing == 0 and not torch.autograd.grad(nothing, h)[0].any()


@pytest.mark.parametrize("kind", ["llama", "untied", "lstm"])
def test_causal_sums_and_counts(tiny: ModuleType, kind: str) -> None:
    model, batch = tiny.model(kind), tensors(next(tiny.Rows()), torch.device("cpu"))
    loss, count = causal(model, batch)
    scores = model(batch["tokens"], positions_BT=batch["positions"], documents_BT=batch["documents"])
    plain = F.cross_entropy(scores.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    torch.testing.assert_close(loss, plain)
    assert int(count) == int((batch["targets"] >= 0).sum()) < batch["targets"].numel()
