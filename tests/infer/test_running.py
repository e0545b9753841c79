"""What commands write with: the same as the plain loop, whatever runs the model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from langmill.common.errors import ModelError, SettingsError
from langmill.infer import running
from langmill.infer.engine import Engine
from langmill.infer.generate import generate, generate_ids
from langmill.infer.native import NativeRunner
from langmill.infer.recurrence import RecurrentRunner
from langmill.infer.runner import TorchRunner
from langmill.infer.running import (
    borrowed,
    engine_for,
    places,
    row_bytes,
    runner_for,
    side_by_side,
    why_torch,
    writer,
)
from langmill.infer.sampling import Sampling
from langmill.infer.speculative import PromptLookup
from langmill.model.attend import attend
from langmill.model.config import Head, LSTMConfig, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.layers import LoRA
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

PROMPTS = [[3, 4, 5], list(range(40, 60)), [9], [3, 4, 5], list(range(40, 58))]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Rows of words, 一行一行."] * 3, vocab_size=300)


def made(**head: Any) -> Transformer:
    stack = StackConfig(dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=96)
    model = Transformer(ModelConfig(stack, Tokens(300, 96), head=Head(300, **head)))
    init_(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


def recurrent() -> LSTM:
    model = LSTM(LSTMConfig(vocab=300, length=64, dim=32, hidden=32))
    init_(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval()


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def plain(model: Any, tokenizer: Tokenizer, sampling: Sampling) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in PROMPTS]
    for step in generate_ids(model, PROMPTS, sampling, tokenizer.stop_ids):
        for token in step:
            found[token.row].append(token.id)
    return found


def told(write: Any, prompts: Sequence[list[int]], sampling: Sampling) -> tuple[list[list[int]], list[str]]:
    found: list[list[int]] = [[] for _ in prompts]
    ends = [""] * len(prompts)
    for event in (event for events in write(prompts, sampling) for event in events):
        found[event.request] += event.ids
        ends[event.request] = event.finish or ""
    return found, ends


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_the_engine_writes_what_the_plain_loop_writes(
    tokenizer: Tokenizer, tied: bool, temperature: float
) -> None:
    model, sampling = made(tied=tied), Sampling(20, temperature, seed=5)
    wanted = plain(model, tokenizer, sampling)
    for slots in (1, 3):
        found, ends = told(writer(model, tokenizer, slots, 60), PROMPTS, sampling)
        assert found == wanted and set(ends) <= {"stop", "length"}
    taken = deepcopy(model)
    freed = partial(running.written, engine_for(taken, tokenizer, slots=3, length=60, release=True))
    assert sum(part.numel() for part in taken.parameters() if part.ndim > 1) == 0
    assert told(freed, PROMPTS, sampling)[0] == wanted


@pytest.mark.parametrize("sampling", [Sampling(20), Sampling(20, 1.0, repetition_penalty=1.3, seed=5)])
def test_a_recurrence_writes_what_it_writes_alone(tokenizer: Tokenizer, sampling: Sampling) -> None:
    model = recurrent()
    wanted = plain(model, tokenizer, sampling)
    for slots in (1, 3):
        guess = PromptLookup(4, least=1)  # wrong ones are read, and then read over
        for propose in (None, guess):
            engine = engine_for(model, tokenizer, slots=slots, length=90, propose=propose, tokens=16)
            for _ in range(2):  # the second time from what slots hold
                assert told(partial(running.written, engine), PROMPTS, sampling)[0] == wanted
    longer = [[*PROMPTS[1], *wanted[1][:5], 7]]
    assert (
        told(partial(running.written, engine), longer, Sampling(8))[0]
        == told(writer(model, tokenizer, 1, 90), longer, Sampling(8))[0]
    )


def test_the_runner_is_the_faster_one_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    assert isinstance(runner_for(model, 2, 500), NativeRunner) and runner_for(model, 2, 500).length == 96
    narrow = deepcopy(model).to(torch.bfloat16)
    assert isinstance(runner_for(narrow, 2, 50), TorchRunner)
    with pytest.raises(SettingsError, match="kv_bits is 8, .* bfloat16 was asked for"):
        runner_for(narrow, 2, 50, kv_bits=8)
    assert isinstance(runner_for(recurrent(), 2, 50), RecurrentRunner)
    hooked = deepcopy(model)
    hooked.decoder.register_forward_hook(lambda module, given, out: out)  # type: ignore[union-attr]
    assert "hooks" in str(why_torch(hooked)) and isinstance(runner_for(hooked, 2, 50), TorchRunner)
    other: Any = deepcopy(model)
    other.decoder.blocks[1].attention.attend = lambda *given: attend(*given)
    assert "attention is not the usual one" in str(why_torch(other))
    other = deepcopy(model)
    other.decoder.blocks[1].mlp.up = Doubled(64, 96, bias=False)
    assert "no layer Doubled" in str(why_torch(other))
    other.decoder.blocks[1].mlp.up = LoRA(model.decoder.blocks[1].mlp.up, 2, 4.0)  # type: ignore[union-attr]
    assert why_torch(other) is None
    with pytest.raises(ModelError, match="that writes text"):
        runner_for(
            Transformer(
                ModelConfig(encoder=replace(model.config.main, causal=False), encoder_input=Tokens(300, 96))
            ),
            1,
            9,
        )
    monkeypatch.setattr(running, "refusal", lambda model: "there is no C++ compiler here (cc)")
    assert isinstance(runner_for(model, 2, 50), TorchRunner)
    with pytest.raises(SettingsError, match="no C\\+\\+ compiler"):
        runner_for(model, 2, 50, kv_bits=8)


def test_what_is_left_half_way_gives_its_slots_back(tokenizer: Tokenizer) -> None:
    engine = Engine(runner_for(made(), 2, 90), tokenizer)
    wanted = told(partial(running.written, engine), PROMPTS, Sampling(20))[0]
    for passes in (1, 4):
        with closing(running.written(engine, PROMPTS, Sampling(20))) as steps:
            for _ in range(passes):
                next(steps)
        assert engine.idle and not any(engine.accounting().values())
    assert told(partial(running.written, engine), PROMPTS, Sampling(20))[0] == wanted


def test_a_request_that_fails_says_why(tokenizer: Tokenizer) -> None:
    model = made(tied=False)
    with torch.no_grad():
        model.tokens.weight[7] = torch.nan
    write = writer(model, tokenizer, 2, 50)
    with pytest.raises(ModelError, match="prompt 2: .*not finite"):
        told(write, [[1, 2], [7, 3]], Sampling(4))


def test_a_runner_is_kept_with_its_model_until_a_weight_changes(tokenizer: Tokenizer) -> None:
    model = made()
    text = lambda: "".join(generate(model, tokenizer, [3, 4, 5], max_new_tokens=20))  # noqa: E731
    first = text()
    with borrowed(model, 10) as one, borrowed(model, 10) as two:
        assert one is not two  # it is nobody else's meanwhile
    with borrowed(model, 10) as again:
        assert again is one and text() == first
    steps = [iter(generate(model, tokenizer, [3, 4, 5], max_new_tokens=20)) for _ in range(2)]
    assert ["".join(pair) for pair in zip(*zip(*steps, strict=True), strict=True)] == [first, first]
    found = {first}
    adam = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    for change in (
        lambda: (model.logits(model.hidden(torch.tensor([[3, 4]]))).square().sum().backward(), adam.step()),
        lambda: init_(model, 7),
        lambda: model.load_state_dict(made().state_dict()),
    ):
        change()
        written = text()
        loop = [
            t.id for step in generate_ids(model, [[3, 4, 5]], Sampling(20), tokenizer.stop_ids) for t in step
        ]
        assert written == tokenizer.decode(loop)
        found.add(written)
    assert written == first and len(found) == 3


def test_a_kept_runner_goes_when_its_model_does(tokenizer: Tokenizer) -> None:
    model = made()
    list(generate(model, tokenizer, "Rows", max_new_tokens=4))
    with borrowed(model, 4) as runner:
        gone = weakref.ref(model), weakref.ref(runner)
    del model, runner
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_the_window_of_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    assert row_bytes(model.config) == 2 * 2 * 2 * 16 * 4 and row_bytes(model.config, 8) == 2 * 2 * 2 * 20
    assert places(model, None) == 96 and places(model, 40) == 40
    monkeypatch.setattr(running, "CACHE_BYTES", 50 * row_bytes(model.config))
    assert places(model) == 50 and places(model, slots=5) == 10 and places(recurrent()) == running.ENDLESS
    found = [side_by_side(model, 40, tokens) for tokens in (10, 11, 25, 10_000, 1)]
    assert found == [5, 4, 2, 1, 32] and side_by_side(model, 2, 10) == side_by_side(recurrent(), 2, 9**9) == 2
    with pytest.raises(SettingsError, match="context is 97, and the model has 96 positions"):
        places(model, 97)
