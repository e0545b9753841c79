"""Adapters beside the weights: what a merged model says, each row with its own, and the base as if there were none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_engine import Fake
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.infer.test_native import LENGTH, LLAMA, SHAPES, ids, made, rounded, run, wanted
from torch import Tensor, nn

from langmill.common.errors import ModelError, UsageError
from langmill.families.peft import LowRank, write_adapter
from langmill.infer.adapters import Adapter, read
from langmill.infer.engine import Engine
from langmill.infer.generate import generate_ids
from langmill.infer.native import NativeRunner
from langmill.infer.native_adapt import adapter as packed_adapter
from langmill.infer.request import Event, Request
from langmill.infer.runner import TorchRunner
from langmill.infer.sampling import Sampling
from langmill.model.config import Head, ModelConfig, Tokens
from langmill.model.layers import LoRA
from langmill.model.replace import replace
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

Want = Callable[[str], bool]


def adapted(model: Transformer, rank: int, seed: int, dora: bool = False, want: Want = bool) -> Transformer:
    """The model with an adapter that changes much."""
    numbers = torch.Generator().manual_seed(seed)

    def layer_of(_: str, layer: Any) -> nn.Module:
        layer = LoRA(layer, rank, 2 * rank, dora=dora)
        with torch.no_grad():
            layer.a.normal_(0, 0.1, generator=numbers)
            layer.b.normal_(0, 0.1, generator=numbers)
            if dora:
                layer.m.mul_(1 + 0.2 * torch.rand(layer.m.shape, generator=numbers))
        return layer

    made = copy.deepcopy(model)
    replace(made, lambda n, layer: isinstance(layer, nn.Linear) and ".blocks." in n and want(n), layer_of)
    return made.eval()


@torch.no_grad()
def changes(model: Transformer) -> dict[str, LowRank]:
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRA):
            b, lengths = layer.scale * layer.b, None
            if layer.m is not None:
                lengths = layer.m / (layer.base.weight + b @ layer.a).norm(dim=1)
            found[name] = LowRank(layer.a.detach(), b, lengths)
    return found


def run_as(runner: NativeRunner, tokens: Any, adapter: int, slot: int = 0, first: int = 0) -> Tensor:
    places = np.arange(first, first + len(tokens))
    every = np.arange(len(tokens))
    return runner.run(np.array(tokens), every * 0 + slot, places, every, every * 0 + adapter)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_scores_are_those_of_the_adapter_in_the_model(name: str, dora: bool) -> None:
    model, tokens = made(SHAPES[name]), ids(40)
    others = [adapted(model, 3, 1, dora), adapted(model, 20, 2, dora)]
    runner = NativeRunner(model, 1, LENGTH, threads=2)
    base = run(runner, tokens)
    for number, other in enumerate(others, 1):
        assert runner.adapt(changes(other)) == number
        got, hoped = run_as(runner, tokens, number), wanted(other, tokens)
        torch.testing.assert_close(got, hoped, rtol=1e-4, atol=1e-4)
        assert (got - base).abs().max() > 0.1
    assert torch.equal(run(runner, tokens), base)


@pytest.mark.parametrize(
    "want", [lambda n: n.endswith(("q", "v")), lambda n: ".0." in n and n.endswith("down")]
)
def test_an_adapter_of_some_layers(want: Want) -> None:
    model, tokens = made(LLAMA), ids(20)
    other = adapted(model, 5, 1, want=want)
    runner = NativeRunner(model, 1, LENGTH, threads=2)
    runner.adapt(changes(other))
    torch.testing.assert_close(run_as(runner, tokens, 1), wanted(other, tokens), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=[None, 8, 4])
def shared(request: pytest.FixtureRequest) -> tuple[NativeRunner, list[Tensor], np.ndarray[Any, Any]]:
    """A runner with two adapters, what 40 tokens give with each number, and the tokens."""
    model, tokens = made(SHAPES["mistral"]), ids(40)
    others = [adapted(model, 3, 1), adapted(model, 20, 2, dora=True)]
    base = NativeRunner(
        model if request.param is None else rounded(model, request.param), 9, LENGTH, threads=2
    )
    alone = [run(base, tokens)]
    for number, other in enumerate(others, 1):
        base.adapt(changes(other))
        alone.append(run_as(base, tokens, number))
    return base, alone, tokens


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 39), st.integers(1, 40)), min_size=1, max_size=9
    )
)
def test_a_row_does_not_depend_on_the_others_to_the_last_bit(
    shared: Any, rows: list[tuple[int, int, int]]
) -> None:
    """Pieces of texts in slots of their own, each with its adapter, in one pass."""
    runner, alone, tokens = shared
    parts = []
    for slot, (adapter, first, size) in enumerate(rows):
        places = np.arange(first, min(first + size, 40))
        if first:
            run_as(runner, tokens[:first], adapter, slot)
        parts.append((tokens[places], places * 0 + slot, places, places * 0 + adapter))
    ids_N, slots_N, places_N, adapters_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    mixed = runner.run(ids_N, slots_N, places_N, np.arange(len(ids_N)), adapters_N)
    assert torch.equal(mixed, torch.cat([alone[a][p] for _, _, p, a in parts for a in [int(a[0])]]))


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_in_fewer_bits_stay_so(bits: int) -> None:
    model, tokens = rounded(made(SHAPES["gpt2"], tied=False), bits), ids(30)
    change = changes(adapted(made(SHAPES["gpt2"], tied=False), 4, 1))
    runner = NativeRunner(model, 1, LENGTH)
    base = run(runner, tokens)
    runner.adapt(change)

    class Both(nn.Module):
        def __init__(self, layer: nn.Module, one: LowRank) -> None:
            super().__init__()
            self.layer, self.one = layer, one

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x) + x @ self.one.a_RI.T @ self.one.b_OR.T
            return y

    replace(model, lambda name, _: name in change, lambda name, layer: Both(layer, change[name]))
    with torch.inference_mode():
        hoped = model.head(model.hidden(torch.tensor(tokens)[None]))[0]
    got = run_as(runner, tokens, 1)
    # another order of sums moves an input of a product across .5 now and then
    assert (got - hoped).norm() < 0.01 * hoped.norm() < 0.1 * (got - base).norm()


def test_what_several_layers_share_stands_there_once() -> None:
    a = torch.randn(3, 64)
    names = [f"decoder.blocks.0.attention.{one}" for one in "qkv"]
    shared = {name: LowRank(a.clone(), torch.randn(8, 3), None) for name in names}
    layers = packed_adapter(shared, 1, lambda rows: None if rows is None else len(rows))
    assert (layers[0].low[0].a, layers[0].low[0].inputs, layers[0].low[0].ranks) == (3, 64, 3)
    assert [(one.rank, one.begin) for one in layers[0].high[:4]] == [(3, 0)] * 3 + [(0, 0)]


@pytest.mark.parametrize("name", ["decoder.blocks.9.attention.q", "decoder.blocks.0.cross.q", "head"])
def test_what_it_has_no_place_for_is_refused(name: str) -> None:
    runner = NativeRunner(made(LLAMA), 1, LENGTH)
    with pytest.raises(ValueError, match=r"no layer|is no layer of a block"):
        runner.adapt({name: LowRank(torch.zeros(2, 64), torch.zeros(64, 2), None)})
    for adapter in (-1, 1):
        with pytest.raises(ValueError, match="an adapter out of range"):
            run_as(runner, [1], adapter)


def test_an_engine_serves_a_model_and_its_adapters_together() -> None:
    model = made(LLAMA)
    others = [model, adapted(model, 4, 1), adapted(model, 9, 2)]
    engine = Engine(NativeRunner(model, 4, LENGTH, tokens=16, threads=2), pass_tokens=16, worth=1)
    for other in others[1:]:
        engine.adapt(Adapter(changes(other), None))  # type: ignore[arg-type]
    sampling, prompts = Sampling(max_new_tokens=12), [ids(n, n).tolist() for n in (3, 30, 11, 18)]
    asked = [(prompt, adapter) for prompt in prompts for adapter in (0, 1, 2)]
    found = asking(engine, asked, sampling)
    for (prompt, adapter), event in zip(asked, found, strict=True):
        alone = generate_ids(others[adapter], [prompt], sampling)
        assert event.ids == [token.id for step in alone for token in step]
    assert len({tuple(event.ids) for event in found}) > 2 * len(prompts)
    assert not any(engine.accounting().values())
    # what was read is good for the same adapter alone
    fresh = ids(20, 99).tolist()
    assert [asking(engine, [(fresh, a)], sampling)[0].cached for a in (1, 0, 2, 1, 0)] == [0, 0, 0, 19, 19]


def asking(engine: Engine, asked: list[tuple[list[int], int]], sampling: Sampling) -> list[Event]:
    numbers = [
        engine.submit(Request(ids, sampling, stop_ids=frozenset(), adapter=adapter)) for ids, adapter in asked
    ]
    found = {number: Event(number) for number in numbers}
    while not engine.idle:
        for event in engine.step():
            found[event.request].ids += event.ids
            found[event.request].cached = event.cached
            assert event.finish in (None, "length"), event.reason
    return [found[number] for number in numbers]


def test_an_engine_refuses_adapters_where_there_is_no_place_for_them() -> None:
    engine = Engine(TorchRunner(made(LLAMA), 1, LENGTH))
    with pytest.raises(ModelError, match="merge it into the model"):
        engine.adapt(Adapter({}, None))  # type: ignore[arg-type]
    engine = Engine(Fake(1))
    engine.adapt(Adapter({}, None))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="makes no vectors"):
        engine.submit(Request([1], kind="embed", adapter=1))


def test_a_tokenizer_that_does_the_same_is_kept_once(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["The quick brown fox"] * 3, vocab_size=270)
    model = Transformer(ModelConfig(LLAMA, Tokens(270, LENGTH), head=Head(270)))
    write_adapter(adapted(model, 2, 1), tmp_path, base="x")
    assert read(tmp_path, model, tokenizer).tokenizer is tokenizer
    tokenizer.save(tmp_path)
    assert read(tmp_path, model, tokenizer).tokenizer is tokenizer
    tokenizer.with_template("{{ messages }}").save(tmp_path)
    own = read(tmp_path, model, tokenizer).tokenizer
    assert own.chat_template == "{{ messages }}" and own._backend is tokenizer._backend
    Tokenizer.train(["春眠不觉晓"] * 3, vocab_size=270).save(tmp_path)
    assert read(tmp_path, model, tokenizer).tokenizer.fingerprint != tokenizer.fingerprint
