"""Layers in 8 and 4 bits: what they compute is x Wᵀ of the weights that they say they have, whichever way is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from langmill.model import products
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.layers import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear, LoRA
from langmill.model.transformer import Transformer

KINDS = ("int8", "int4", "int4-lows")


@pytest.fixture(autouse=True, scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is remembered of this machine goes into a folder of the test's own."""
    place = tmp_path_factory.mktemp("home") / "products.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "KEPT", place)
        products.chosen.cache_clear()
        yield place
    products.chosen.cache_clear()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(layer: Any, seed: int = 0) -> Any:
    """Random codes, and steps that bfloat16 holds too."""
    generator = torch.Generator().manual_seed(seed)
    if layer.codes.dtype == torch.int8:
        layer.codes = torch.randint(-127, 128, layer.codes.shape, generator=generator, dtype=torch.int8)
    else:
        layer.codes = torch.randint(0, 256, layer.codes.shape, generator=generator, dtype=torch.uint8)
    steps = (torch.rand(layer.steps.shape, generator=generator) - 0.3).bfloat16()
    layer.steps = steps.to(layer.steps.dtype)
    if getattr(layer, "lows", None) is not None:
        layer.lows = torch.randn(layer.lows.shape, generator=generator).half()
    return layer


def made(kind: str, inputs: int = 64, outputs: int = 48, bias: bool = True, seed: int = 0) -> Any:
    own = nn.Parameter(random(outputs, seed=seed + 1)) if bias else None
    if kind == "int8":
        return fill(Int8Linear(inputs, outputs, own), seed)
    return fill(Int4Linear(inputs, outputs, own, symmetric=kind == "int4"), seed)


def near(y: torch.Tensor, exact: torch.Tensor, share: float) -> None:
    assert y.shape == exact.shape
    assert float((y.double() - exact).norm()) <= share * float(exact.norm()) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.integers(1, 40), outputs=st.integers(1, 70), groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_product_is_that_of_the_weights(
    kind: str, dtype: torch.dtype, rows: int, outputs: int, groups: int, seed: int
) -> None:
    layer = made(kind, 32 * groups, outputs, bias=False, seed=seed)
    x = random(rows, 32 * groups, seed=seed + 5).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    near(y, x.double() @ layer.weight.T.double(), 0.03 if dtype == torch.bfloat16 else 6e-3)
    near(layer(x[0]), x[0].double() @ layer.weight.T.double(), 0.03)


@pytest.mark.parametrize(
    ("bits", "name"), [(bits, name) for bits, ways in products.WAYS.items() for name in ways]
)
def test_every_way_gives_the_product_or_says_that_it_cannot(bits: int, name: str) -> None:
    layer = made("int8" if bits == 8 else "int4", 96, 5000, bias=False)
    packed = None if bits == 8 else products.pack(layer.codes[:4992], layer.steps[:4992], None)
    parts = (
        (layer.codes, layer.steps)
        if bits == 8
        else (layer.codes[:4992], layer.steps[:4992], None, lambda: packed)
    )
    x = torch.cat((random(3, 96), torch.zeros(1, 96), 1e4 * random(2, 96)))
    x[0, 5] = 300.0  # an outlier, as real activations have
    exact = x.double() @ layer.weight[: len(parts[0])].T.double()
    near(products.WAYS[bits][name](x, parts), exact, 6e-3 if "pack" in name else 1e-4)  # these take bfloat16
    if name == "int4pack":
        assert products.pack(layer.codes, layer.steps, None) is None  # 5000 outputs are no whole panels
        assert (
            products.pack(layer.codes[:16], layer.steps[:16] * 1.001, None) is None
        )  # bfloat16 would round these
        assert products.pack(layer.codes[:16], layer.steps[:16], layer.steps[:16]) is None


def test_eight_bits_lose_next_to_nothing_on_the_way() -> None:
    layer, x = made("int8", bias=False), random(20, 64)
    near(products.WAYS[8]["two products"](x, layer.parts), x.double() @ layer.weight.T.double(), 1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_is_that_of_the_weights_and_keeps_none_of_them(kind: str) -> None:
    layer, x = made(kind), random(3, 5, 64).requires_grad_()
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
        y = layer(x)
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(found, (2 * y.detach()) @ layer.weight, rtol=1e-4, atol=1e-3)
    plain = layer.weight.shape
    assert (
        plain not in [shape for shape in saved if kind != "int8"] and saved.count(plain) <= 1
    )  # int8: the codes


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_rounded_weights_gives_the_plain_forms_gradients(kind: str) -> None:
    layer = LoRA(made(kind), 4, 8)
    with torch.no_grad():
        layer.b.copy_(random(48, 4, seed=3))
    x, weight = random(2, 5, 64, seed=1).requires_grad_(), random(2, 5, 48, seed=2)
    wanted = (x, layer.a, layer.b)
    ways = [(y, torch.autograd.grad((y * weight).sum(), wanted)) for y in (layer(x), layer.plain(x))]
    for mine, plain in zip(*[(y, *gradients) for y, gradients in ways], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        near(layer(x), F.linear(x, layer.weight, layer.bias).double(), 6e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_gives_rows_and_a_tied_head_its_scores(kind: str) -> None:
    layer: Any = Int8Embedding(97, 64) if kind == "int8" else Int4Embedding(97, 64, symmetric=kind == "int4")
    fill(layer)
    ids = torch.arange(96).view(2, 3, 16)
    assert torch.equal(layer(ids), layer.weight[ids])
    near(layer.scores(random(5, 64)), random(5, 64).double() @ layer.weight.T.double(), 6e-3)
    stack = StackConfig(dim=64, layers=1, heads=2, kv_heads=2, head_dim=32, hidden=64)
    model = Transformer(ModelConfig(stack, Tokens(97, 32), head=Head(97)))
    init_(model, 0)
    plain, tokens = model.eval(), torch.arange(20)[None]
    with torch.no_grad():
        plain.tokens.weight.copy_(0.02 * layer.weight)
        expected = plain(tokens)
        layer.steps = layer.steps * 0.02
        if kind == "int4-lows":
            layer.lows = layer.lows * 0.02
        model.tokens = layer
        assert model.head_weight.shape == (97, 64)
        near(model(tokens), expected.double(), 1e-2)


def test_what_was_packed_is_made_anew_where_the_codes_change() -> None:
    layer, other, x = made("int4", bias=False), made("int4", bias=False, seed=9), random(1, 64)
    if products.pack(layer.codes, layer.steps, None) is None:
        pytest.skip("this torch has no int4pack")
    layer(x)
    layer.load_state_dict(other.state_dict())
    near(layer(x), x.double() @ other.weight.T.double(), 6e-3)


def test_the_fastest_way_is_raced_once_and_remembered(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raced: list[int] = []
    real = products.raced
    monkeypatch.setattr(products, "raced", lambda *given: (raced.append(1), real(*given))[1])
    kept.unlink(missing_ok=True)
    names = []
    for _ in range(2):
        products.chosen.cache_clear()  # as another process would
        names.append(products.chosen(8, torch.float32, 1, 1))
    assert names[0] == names[1] and len(raced) == 1
    saved = json.loads(kept.read_text())
    (key,) = saved["chosen"]
    assert torch.__version__ in key
    for broken in (
        "{",
        json.dumps(saved | {"chosen": {key: "none that is known"}}),
        json.dumps(saved | {"chosen": 3}),
    ):
        kept.write_text(broken)
        products.chosen.cache_clear()
        assert products.chosen(8, torch.float32, 1, 1) in products.WAYS[8]
    assert len(raced) == 4
    monkeypatch.setattr(products, "KEPT", Path("/proc/nothing/products.json"))
    products.chosen.cache_clear()
    assert products.chosen(8, torch.float32, 1, 1) in products.WAYS[8]


def test_a_way_that_is_wrong_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: torch.Tensor, weights: Any) -> torch.Tensor:
        raise RuntimeError("not in this build")

    ways = {
        "widened": products.WAYS[8]["widened"],
        "wrong": lambda x, weights: torch.zeros(len(x), len(weights[0])),
        "rounded": lambda x, weights: 1.002 * products.WAYS[8]["widened"](x, weights),
        "not here": fails,
    }
    monkeypatch.setattr(products, "WAYS", {8: ways})
    assert products.raced(8, torch.float32, 1) == "widened"
