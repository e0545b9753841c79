"""The C++ pass against the Transformer itself, in every shape that it takes."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from langmill.infer import native, native_build
from langmill.infer.engine import Engine
from langmill.infer.generate import generate_ids
from langmill.infer.native import NativeRunner, refusal
from langmill.infer.request import Request
from langmill.infer.sampling import Sampling
from langmill.model.config import (
    Head,
    Learned,
    ModelConfig,
    Relative,
    Rope,
    RopeScaling,
    Sinusoidal,
    StackConfig,
    Tokens,
)
from langmill.model.init import init_
from langmill.model.replace import replace
from langmill.model.transformer import Transformer

VOCAB, LENGTH = 101, 80
ALL = frozenset(("q", "k", "v", "o", "mlp"))
LLAMA = StackConfig(dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=96)
SHAPES = {
    "llama": LLAMA,
    "odd sizes": changed(LLAMA, dim=44, heads=3, kv_heads=1, head_dim=10, hidden=70),
    "qwen2": changed(LLAMA, bias=frozenset("qkv")),
    "qwen3": changed(LLAMA, qk_norm=True, head_dim=24),
    "mistral": changed(LLAMA, window=(7, None)),
    "gpt2": changed(LLAMA, norm="layer", activation="gelu_tanh", gated=False, bias=ALL, position=Learned(), kv_heads=4),
    "opt": changed(LLAMA, norm="layer", activation="relu", gated=False, bias=ALL, position=Learned(2), scale=0.3),
    "waves": changed(LLAMA, norm="layer", norm_order="post", activation="gelu", gated=False, position=Sinusoidal()),
    "stretched": changed(LLAMA, position=Rope(scaling=RopeScaling("llama3", 8.0, 32))),
}  # fmt: skip


def made(stack: StackConfig, **head: Any) -> Transformer:
    model = Transformer(ModelConfig(stack, Tokens(VOCAB, LENGTH), head=Head(VOCAB, **head)))
    init_(model, 0)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.mul_(3 if parameter.ndim > 1 else 1).add_(0.05 * noise)
    return model.eval()


def ids(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(0, VOCAB, count)


def run(runner: NativeRunner, tokens: Any, slot: int = 0, first: int = 0) -> Tensor:
    places = np.arange(first, first + len(tokens))
    return runner.run(np.array(tokens), np.full(len(tokens), slot), places, np.arange(len(tokens)))


@torch.inference_mode()
def wanted(model: Transformer, tokens: Any) -> Tensor:
    return model(torch.tensor(tokens)[None])[0]


@pytest.mark.parametrize("name", SHAPES)
def test_scores_are_the_transformers(name: str) -> None:
    model = made(SHAPES[name])
    tokens = ids(50)
    torch.testing.assert_close(
        run(NativeRunner(model, 2, LENGTH, threads=2), tokens), wanted(model, tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "head", [{"tied": False}, {"tied": False, "bias": True}, {"bias": True}, {"scale": 0.25}]
)
def test_heads(head: dict[str, Any]) -> None:
    model = made(LLAMA, **head)
    tokens = ids(20)
    torch.testing.assert_close(
        run(NativeRunner(model, 1, LENGTH), tokens), wanted(model, tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("bits", [32, 8])
def test_no_row_depends_on_the_others_to_the_last_bit(bits: int) -> None:
    runner = NativeRunner(made(SHAPES["mistral"]), 4, LENGTH, threads=2, kv_bits=bits)
    tokens = ids(40)
    whole = run(runner, tokens)
    alone = torch.cat([run(runner, tokens[i : i + 1], 1, i) for i in range(40)])
    cut = torch.cat([run(runner, tokens[a:b], 2, a) for a, b in ((0, 17), (17, 39), (39, 40))])
    assert torch.equal(whole, alone) and torch.equal(whole, cut)
    # one pass: the end of slot 2's row, a piece of another prompt, one token behind slot 1's
    other = ids(23, 1)
    run(runner, other[:3], 3)
    mixed = runner.run(
        np.concatenate((tokens[39:], other[3:], [5])), np.array([2] + [3] * 20 + [1]),
        np.concatenate(([39], np.arange(3, 23), [40])), np.array([0, 20, 21]),
    )  # fmt: skip
    alone = torch.cat((whole[39:], run(runner, other, 0)[-1:]))
    assert torch.equal(mixed[:2], alone)
    runner.copy(1, 0, 40)
    assert torch.equal(mixed[2:], run(runner, [5], 0, 40))


def test_threads_and_portable_code_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rounded(made(LLAMA), 4)
    tokens = ids(30)
    results = [run(NativeRunner(model, 1, LENGTH, threads=threads), tokens) for threads in (1, 2, 3)]
    plain = native_build.library("-DPORTABLE")
    monkeypatch.setattr(native, "library", lambda: plain)
    results.append(run(NativeRunner(model, 1, LENGTH, threads=1), tokens))
    assert all(torch.equal(results[0], other) for other in results[1:])


class Rounded(nn.Module):
    """A linear layer or embedding in the form that quantised layers have."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int, lows: bool = False):
        super().__init__()
        groups = weight.unflatten(1, (-1, 32))
        self.bits, self.bias, self.lows = bits, bias, None
        if bits == 8:
            self.steps = weight.abs().amax(1) / 127
            self.codes = (weight / self.steps[:, None]).round().to(torch.int8)
            return
        if lows:
            self.lows = groups.amin(-1).half()
            self.steps = ((groups.amax(-1) - groups.amin(-1)) / 15).half()
        else:
            self.steps = (groups.abs().amax(-1) / 7).half()
        low = self.lows.float() if self.lows is not None else -8 * self.steps.float()
        codes = (
            ((groups - low[..., None]) / self.steps.float()[..., None]).round().clamp(0, 15).byte().flatten(1)
        )
        self.codes = codes[:, ::2] | codes[:, 1::2] << 4

    @property
    def weight(self) -> Tensor:
        if self.bits == 8:
            return self.codes.float() * self.steps[:, None]
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(1).unflatten(1, (-1, 32)).float()
        low = self.lows.float() if self.lows is not None else -8 * self.steps.float()
        return (codes * self.steps.float()[..., None] + low[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return self.weight[x]
        groups = x.unflatten(-1, (-1, 32))  # what native.cpp does to inputs
        steps = groups.abs().amax(-1, keepdim=True) / 127
        codes = (groups / torch.where(steps == 0, 1.0, steps)).round()
        return F.linear((codes * steps).flatten(-2), self.weight, self.bias)


def rounded(model: Transformer, bits: int, lows: bool = False) -> Transformer:
    replace(model, lambda _, layer: isinstance(layer, nn.Linear),
            lambda _, layer: Rounded(layer.weight.detach(), layer.bias, bits, lows))  # type: ignore[arg-type]  # fmt: skip
    model.tokens = Rounded(model.tokens.weight.detach(), None, bits, lows)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("bits, lows", [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fewer_bits(name: str, bits: int, lows: bool) -> None:
    model = rounded(made(SHAPES[name], tied=False), bits, lows)
    tokens = ids(30)

    def both() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            hoped = model.head(model.hidden(torch.tensor(tokens)[None]))[0]
        return run(NativeRunner(model, 1, LENGTH, threads=2), tokens), hoped

    got, hoped = both()
    assert (
        got - hoped
    ).norm() < 0.01 * hoped.norm()  # another order of sums moves a number across .5 now and then
    for block in model.main.blocks:  # one product alone: what stands in the table of tokens, times the head
        block.attention.o, block.mlp.down = (_zero(layer) for layer in (block.attention.o, block.mlp.down))
    torch.testing.assert_close(*both(), rtol=1e-4, atol=1e-4)


def _zero(layer: Any) -> nn.Linear:
    made = nn.Linear(layer.weight.shape[1], len(layer.weight), bias=False)
    nn.init.zeros_(made.weight)
    return made


def test_keys_and_values_in_8_bits_move_scores_little() -> None:
    model = made(LLAMA)
    tokens = ids(60)
    got, hoped = run(NativeRunner(model, 1, LENGTH, kv_bits=8), tokens), wanted(model, tokens)
    assert 0 < (got - hoped).norm() < 0.02 * hoped.norm()


def test_an_encoder_reads_whole_documents() -> None:
    stack = changed(SHAPES["gpt2"], norm_order="post", causal=False, activation="gelu")
    model = Transformer(ModelConfig(encoder=stack, encoder_input=Tokens(VOCAB, LENGTH, types=2, norm=True)))
    init_(model, 0)
    model.eval()
    runner = NativeRunner(model, 2, LENGTH, threads=2)
    first, second = ids(33), ids(9, 1)
    states = runner.states(
        np.concatenate((first, second)), np.array([0] * 33 + [1] * 9),
        np.concatenate((np.arange(33), np.arange(9))), np.array([33] * 33 + [9] * 9),
    )[:, : stack.dim]  # fmt: skip
    with torch.inference_mode():
        hoped = torch.cat([model.encode(torch.tensor(part)[None]).states_BSD[0] for part in (first, second)])
    torch.testing.assert_close(states, hoped, rtol=1e-4, atol=1e-4)


def test_what_it_cannot_run_it_refuses_with_the_reason() -> None:
    relative = made(changed(LLAMA, position=Relative()))
    assert "learned distances" in str(refusal(relative))
    with pytest.raises(ValueError, match="learned distances"):
        NativeRunner(relative, 1, LENGTH)
    runner = NativeRunner(made(LLAMA), 1, LENGTH, tokens=4)
    with pytest.raises(ValueError, match="5 tokens in a pass made for 4"):
        run(runner, ids(5))
    with pytest.raises(ValueError, match="out of range"):
        run(runner, [VOCAB])


def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "COMPILERS", ("no-such-compiler",))
    native_build.library.cache_clear()
    try:
        assert refusal(made(LLAMA)) == "there is no C++ compiler here (no-such-compiler)"
    finally:
        native_build.library.cache_clear()


def test_the_engine_writes_the_same_over_it() -> None:
    model = made(LLAMA)
    prompts = [ids(n, n).tolist() for n in (3, 30, 11, 7, 19)]
    alone = [
        [token.id for step in generate_ids(model, [prompt], Sampling(max_new_tokens=12)) for token in step]
        for prompt in prompts
    ]
    engine = Engine(NativeRunner(model, 3, LENGTH, tokens=16, threads=2), pass_tokens=16)
    numbers = [
        engine.submit(Request(prompt, Sampling(max_new_tokens=12), stop_ids=frozenset()))
        for prompt in prompts
    ]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while not engine.idle:
        for event in engine.step():
            found[event.request] += event.ids
    assert [found[number] for number in numbers] == alone
    assert not any(engine.accounting().values())
