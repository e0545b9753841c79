from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from langmill.model.blocks import ACTIVATIONS
from langmill.model.layers import Int4Linear, LoRA
from langmill.model.sparing import gated, narrowed

BF16 = torch.bfloat16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapted(kind: str, bias: bool = True, dropout: float = 0.0) -> LoRA:
    torch.manual_seed(0)
    base: Any = torch.nn.Linear(64, 48, bias=bias)
    layer = LoRA(Int4Linear.of(base) if kind == "int4" else base, 4, 8, dropout)
    with torch.no_grad():
        layer.b.copy_(random(48, 4))
    return layer


def kept(run: Any) -> int:
    """Bytes that the backward pass of run() holds on to, parameters and buffers among them."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_that_is_computed_again_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    act = ACTIVATIONS[name]
    gate, up, weight = (random(2, 9, 16, seed=seed).to(dtype).requires_grad_() for seed in range(3))
    mine, plain = gated(act, gate, up), act(gate) * up
    assert torch.equal(mine, plain)
    found = [torch.autograd.grad((y * weight.detach()).sum(), (gate, up)) for y in (mine, plain)]
    assert all(map(torch.equal, *found))
    assert kept(lambda: gated(act, gate, up)) == gate.nbytes + up.nbytes <= kept(lambda: act(gate) * up)
    if name == "silu":
        assert kept(lambda: act(gate) * up) == 3 * gate.nbytes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["linear", "int4"])
def test_an_adapter_gives_the_plain_forms_gradients(kind: str, bias: bool) -> None:
    layer = adapted(kind, bias).train()
    x, weight = random(2, 5, 64, seed=1).requires_grad_(), random(2, 5, 48, seed=2)
    wanted = (x, layer.a, layer.b)
    ways = [(y, torch.autograd.grad((y * weight).sum(), wanted)) for y in (layer(x), layer.plain(x))]
    for mine, plain in zip(*[(y, *gradients) for y, gradients in ways], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "int4"])
def test_in_mixed_precision_it_is_no_further_from_the_truth(kind: str) -> None:
    layer, x = adapted(kind), random(7, 64, seed=1).requires_grad_()
    weight = random(7, 48, seed=2)

    def errors(forward: Any) -> list[float]:
        exact = torch.autograd.grad((layer.plain(x) * weight).sum(), (x, layer.a, layer.b))
        with torch.autocast("cpu", BF16):
            y = forward(x)
        assert y.dtype == BF16
        found = torch.autograd.grad((y * weight).sum(), (x, layer.a, layer.b))
        assert all(gradient.dtype == torch.float32 for gradient in found)
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    for mine, plain in zip(errors(layer), errors(layer.plain), strict=True):
        assert mine < max(1.2 * plain, 2e-3) and mine < 0.01


def test_an_adapter_keeps_its_input_and_no_copy() -> None:
    layer, x = adapted("linear", bias=False), random(1000, 64).requires_grad_()
    with torch.autocast("cpu", BF16):
        saved = kept(lambda: layer(x))
        plain = kept(lambda: layer.plain(x))
        inputs = narrowed(x)
        together = kept(lambda: (layer(inputs), layer(inputs)))
    weights = sum(weight.nbytes for weight in layer.parameters())
    low = 1000 * 4 * 2
    assert saved == x.nbytes + low + weights and together == x.nbytes // 2 + 2 * low + weights
    assert plain > 1000 * (64 + 4) * 2 + 48 * 64 * 2  # of each such layer, a narrow copy of x and of W


def test_what_draws_numbers_or_is_no_plain_layer_takes_the_plain_form() -> None:
    layer, x = adapted("linear", dropout=0.5), random(3, 64)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer.plain(x))
    twice = LoRA(layer, 2, 4)
    torch.testing.assert_close(twice(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "int4"])
def test_gradients_by_example_are_those_of_each_example(kind: str) -> None:
    layer, x = adapted(kind), random(3, 5, 64, seed=1)
    names = {"a": layer.a.detach(), "b": layer.b.detach()}

    def loss(weights: dict[str, torch.Tensor], x_TI: torch.Tensor) -> torch.Tensor:
        y = torch.func.functional_call(layer, weights, (x_TI,))
        return gated(F.silu, y, 2 * y).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(names, x)
    for index, row in enumerate(x):
        y = layer.plain(row)
        plain = torch.autograd.grad((F.silu(y) * 2 * y).square().sum(), (layer.a, layer.b))
        for mine, theirs in zip((found["a"][index], found["b"][index]), plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
