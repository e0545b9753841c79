"""The engine over a runner without a model: every request as if it were alone, and an end for each."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from fake_engine import (
    BROKEN,
    LENGTH,
    RAISES,
    VOCAB,
    ZERO,
    FakeEmbedder,
    TrueGuesses,
    alone,
    check,
    drain,
    gather,
    made,
    request,
    scores,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from langmill.common.errors import ModelError, QueueFull, SettingsError, UsageError
from langmill.infer.engine import Engine
from langmill.infer.pick import pick
from langmill.infer.request import Event, Live, Request
from langmill.infer.sampling import keep_top_p

SAMPLED = {"temperature": 1.0, "top_p": 0.9}
WAYS: list[dict[str, Any]] = [
    {}, SAMPLED, {"temperature": 2.0, "top_k": 9, "seed": 3}, {"repetition_penalty": 1.4},
    {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 0.8}, {"frequency_penalty": 0.7, "logit_bias": {5: 2.0}},
    {"temperature": 0.5, "presence_penalty": 1.5},
]  # fmt: skip


PROMPT = st.builds(
    lambda shared, own: [*range(20, 20 + shared), *own],
    st.integers(0, 12),
    st.lists(st.integers(0, 9) | st.sampled_from([0, 1, 2, RAISES, BROKEN]), min_size=1, max_size=8),
)
REQUEST = st.builds(
    lambda prompt, way, new, priority, choice, scored, adapter: request(
        prompt, max_new_tokens=new, priority=priority, choice=choice, scored=scored, logprobs=2, adapter=adapter, **way
    ),
    PROMPT, st.sampled_from(WAYS), st.integers(1, 30), st.integers(0, 2), st.integers(0, 1), st.booleans(),
    st.integers(0, 2),
)  # fmt: skip


@settings(max_examples=150)
@given(
    st.lists(REQUEST | st.integers(1, 12).map(lambda n: -n) | st.just(None), max_size=30),
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.none() | st.integers(0, 99),
)  # fmt: skip
def test_all_write_what_they_write_alone(
    script: list[Any], slots: int, room: int, worth: int, guessing: int | None
) -> None:
    """Requests arrive and are cancelled between steps, in any order, lengths, priorities and adapters."""
    propose = None if guessing is None else TrueGuesses(random.Random(guessing))
    engine, runner = made(slots, pass_tokens=slots + room, worth=worth, propose=propose, adapters=2)
    asked: dict[int, Request] = {}
    found: dict[int, Event] = {}
    cancelled = set()
    for line in script:
        if line is None:
            gather(found, engine.step())
        elif isinstance(line, int):
            if engine.cancel(-line):
                cancelled.add(-line)
        else:
            asked[engine.submit(line)] = line
    gather(found, drain(engine).values())
    check(asked, found, cancelled)
    assert {n for n, event in found.items() if event.finish == "cancelled"} == cancelled
    assert max(runner.passes, default=0) <= slots + room


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_writes_what_each_writes_alone(way: dict[str, Any]) -> None:
    engine, runner = made(4)
    asked = {}
    for size in (1, 5, 17, 3, 9, 2):
        one = request(range(size), max_new_tokens=12, **way)
        asked[engine.submit(one)] = one
    check(asked, drain(engine))
    assert max(runner.passes) == 8


def test_equal_prompts_with_different_choices_draw_differently() -> None:
    engine, _ = made()
    asked = {}
    for choice in (0, 1, 0):
        one = request([1, 2], max_new_tokens=9, choice=choice, stop_ids=frozenset(), **SAMPLED)
        asked[engine.submit(one)] = one
    first, second, again = drain(engine).values()
    assert first.ids == again.ids != second.ids
    check(asked, {1: first, 2: second, 3: again})


def test_guesses_that_come_true_spare_passes_and_change_nothing() -> None:
    one = request([1, 2, 3], max_new_tokens=20, stop_ids=frozenset())
    passes = []
    for propose in (None, TrueGuesses(random.Random(1))):
        engine, runner = made(1, propose=propose)
        number = engine.submit(one)
        check({number: one}, drain(engine))
        passes.append(len(runner.passes))
    assert passes[1] < passes[0] == 20
    assert 0 < engine.counts["guessed right"] < engine.counts["guessed"]


def test_what_was_read_before_is_not_read_again() -> None:
    """A system prompt of two users, then an earlier turn with its answer."""
    engine, _ = made()
    system = list(range(20, 30))
    first, second = request([*system, 1], max_new_tokens=5), request([*system, 2], max_new_tokens=5)
    engine.submit(first)
    engine.submit(second)
    found = drain(engine)
    assert [event.cached for event in found.values()] == [0, 10]
    assert engine.counts["read"] == 11 + 1 + sum(len(event.ids) - 1 for event in found.values())
    turn = request([*first.prompt, *found[1].ids, 3, 4], max_new_tokens=5)
    number = engine.submit(turn)
    again = drain(engine)
    check({number: turn}, again)
    assert again[number].cached == len(first.prompt) + len(found[1].ids) - 1


def test_a_request_that_must_give_way_goes_on_without_repeating() -> None:
    engine, _ = made(1)
    low = request([1, 2, 3], max_new_tokens=20, stop_ids=frozenset(), **SAMPLED)
    high = request([4, 5], max_new_tokens=3, stop_ids=frozenset(), priority=1)
    engine.submit(low)
    found: dict[int, Event] = {}
    for _ in range(4):
        gather(found, engine.step())
    assert len(found[1].ids) == 4
    engine.submit(high)
    gather(found, engine.step())
    assert engine.accounting() | {"queued": 1, "slots": 1} == engine.accounting()
    gather(found, drain(engine).values())
    assert len(found[1].ids) == 20 and engine.counts["preempted"] == 1
    check({1: low, 2: high}, found)


def test_one_event_a_step_and_the_stop_id_is_told() -> None:
    engine, _ = made()
    ids, _ = alone(request([1, 2], max_new_tokens=9, stop_ids=frozenset()))
    engine.submit(request([1, 2], max_new_tokens=9, stop_ids=frozenset({ids[4]})))
    steps = []
    while not engine.idle:
        steps.append(engine.step())
    told = [(event.ids, event.finish) for (event,) in steps]
    end = ids.index(ids[4])
    assert told == [([id], None) for id in ids[:end]] + [([ids[end]], "stop")]


def test_the_last_place_ends_a_request() -> None:
    engine, _ = made()
    engine.submit(request(range(20, 20 + LENGTH - 7), max_new_tokens=99, stop_ids=frozenset()))
    engine.submit(request([20] * LENGTH, max_new_tokens=99, stop_ids=frozenset()))
    found = drain(engine)
    assert [(len(found[n].ids), found[n].finish) for n in (1, 2)] == [(8, "length"), (1, "length")]


def test_only_the_culprit_ends_where_the_model_fails() -> None:
    engine, _ = made(4, pass_tokens=30)
    asked = {}
    for prompt in ([1, 2], [3, RAISES, 4], [5, BROKEN], [6], [RAISES]):
        one = request(prompt, max_new_tokens=6)
        asked[engine.submit(one)] = one
    check(asked, drain(engine))
    # what was read of them is not shared
    again = engine.submit(request([3, 1], max_new_tokens=1))
    assert drain(engine)[again].cached == 0


def test_what_cannot_be_done_is_refused_at_once() -> None:
    engine, _ = made(queue_tokens=20)
    for prompt, words in (
        ([1] * (LENGTH + 1), f"{LENGTH + 1} tokens and there is room for {LENGTH}"),
        ([], "no tokens"),
        ([1, VOCAB], f"1 to {VOCAB} and the model knows {VOCAB} tokens"),
    ):
        with pytest.raises(ModelError, match=words):
            engine.submit(request(prompt))
    with pytest.raises(ModelError, match="makes no vectors"):
        engine.submit(request([1], kind="embed"))
    with pytest.raises(ModelError, match="reads no source"):
        engine.submit(request([1], source=[1]))
    with pytest.raises(ModelError, match="writes nothing"):
        Engine(embedder=FakeEmbedder()).submit(request([1]))
    with pytest.raises(UsageError, match="no tokenizer"):
        engine.submit(request([1], stop=("x",)))
    with pytest.raises(UsageError, match="logprobs is 51"):
        engine.submit(request([1], logprobs=VOCAB + 1))
    with pytest.raises(UsageError, match="adapter is 1, and this engine has 0"):
        engine.submit(request([1], adapter=1))
    with pytest.raises(SettingsError, match="pass_tokens is 3"):
        made(3, pass_tokens=3)
    engine.submit(request([1] * 15))
    with pytest.raises(QueueFull, match="6 tokens cannot wait beside the 15"):
        engine.submit(request([1] * 6))
    drain(engine)


def test_cancelling_frees_the_slot_at_once() -> None:
    engine, _ = made(1)
    first = engine.submit(request([1, 2], max_new_tokens=30, stop_ids=frozenset()))
    waits = engine.submit(request([3], max_new_tokens=30))
    engine.step()
    assert engine.cancel(first) and engine.cancel(waits)
    assert not engine.cancel(first) and not engine.cancel(99)
    assert not engine.idle
    assert [(event.request, event.finish) for event in engine.step()] == [(1, "cancelled"), (2, "cancelled")]
    assert engine.idle and engine.accounting() == ZERO


def test_an_abort_ends_everybody_and_nothing_is_trusted_any_more() -> None:
    engine, _ = made(1)
    asked = [request([1, 2, 3], max_new_tokens=4), request([4], max_new_tokens=4)]
    for one in asked:
        engine.submit(one)
    engine.step()
    assert [(event.finish, event.reason) for event in engine.abort("no more")] == [("error", "no more")] * 2
    assert engine.idle and engine.accounting() == ZERO
    number = engine.submit(asked[0])
    found = drain(engine)
    check({number: asked[0]}, found)
    assert found[number].cached == 0


def test_a_copy_that_fails_loses_no_slot() -> None:
    engine, runner = made(2)
    runner.copy = None  # type: ignore[assignment, method-assign]
    for last in (1, 2):
        engine.submit(request([*range(20, 30), last], max_new_tokens=9))
    with pytest.raises(TypeError):
        drain(engine)
    assert [event.finish for event in engine.abort("no more")] == ["error"] * 2
    assert engine.idle and engine.accounting() == ZERO


class Steps:
    """A constraint that allows a set of ids at each place, `packed` 32 to an integer."""

    def __init__(self, *allowed: set[int] | None, packed: bool = False):
        self.allowed, self.at, self.packed = allowed, 0, packed

    @property
    def done(self) -> bool:
        return self.at == len(self.allowed)

    whole = done

    def allows(self, id: int) -> bool:
        ids = self.allowed[self.at]
        return ids is None or id in ids

    def steer(self, id: int, left: int) -> int:
        return id

    def forced(self) -> list[int]:
        return []

    def mask(self) -> Any:
        ids = self.allowed[self.at]
        if ids is None:
            return None
        flags = np.zeros(64, np.bool_)
        flags[list(ids)] = True
        return np.packbits(flags, bitorder="little").view(np.int32) if self.packed else flags[:40]

    def accept(self, id: int) -> None:
        if id == 13:
            raise ValueError("unlucky")
        self.at += 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", [{}, SAMPLED])
def test_a_constraint_allows_what_it_says_until_it_is_done(packed: bool, way: dict[str, Any]) -> None:
    engine, _ = made(propose=TrueGuesses(random.Random(0)))
    free = request([1, 2], max_new_tokens=9)
    numbers = {engine.submit(free): free}
    bound = engine.submit(
        request(
            [1, 2], constraint=Steps({5, 33}, {8}, None, {11, 12}, packed=packed), max_new_tokens=9, **way
        )
    )
    found = drain(engine)
    ids = found.pop(bound).ids
    assert len(ids) == 4 and ids[0] in (5, 33) and ids[1] == 8 and ids[3] in (11, 12)
    check(numbers, found)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}])
def test_draws_under_a_constraint_are_those_of_masked_scores(filters: dict[str, Any]) -> None:
    scores_V = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0])
    free = {1, 3, 4, 5}
    live = Live(
        0, request([0], constraint=Steps(free, packed=False), temperature=0.7, **filters), np.array([0])
    )
    live.numbers = random.Random(0)
    masked_V = scores_V / 0.7
    masked_V[[0, 2]] = -torch.inf
    wanted_V = (keep_top_p(masked_V[None], 0.8)[0] if filters else masked_V).double().softmax(-1).numpy()
    draws = [pick([live], scores_V[None].clone())[0].id for _ in range(5000)]
    seen_V = np.bincount(draws, minlength=6)
    likely = wanted_V > 0
    assert not seen_V[~likely].any() and chisquare(seen_V[likely], 5000 * wanted_V[likely]).pvalue > 1e-3


def test_an_impossible_or_broken_constraint_ends_its_request_alone() -> None:
    engine, _ = made(4)
    one = request([1, 2], max_new_tokens=9)
    number = engine.submit(one)
    wrong = {
        engine.submit(request([1, 2], constraint=Steps({5}, set()))): "allows no token",
        engine.submit(request([1, 2], constraint=Steps({13}, {1}))): "ValueError: unlucky",
        engine.submit(request([1, 2], constraint=Steps({999}))): "IndexError",
    }
    found = drain(engine)
    check({number: one}, {number: found.pop(number)})
    for other, words in wrong.items():
        assert found[other].finish == "error" and words in str(found[other].reason)
    assert [len(found[other].ids) for other in wrong] == [1, 1, 0]


def test_log_probabilities_are_the_models_own() -> None:
    engine, _ = made()
    number = engine.submit(request([1, 2], logprobs=3, max_new_tokens=4, repetition_penalty=2.0, **SAMPLED))
    event = drain(engine)[number]
    seen = [-1, 1, 2]
    for id, likely in zip(event.ids, event.likely, strict=True):
        logs = scores(seen).log_softmax(-1)
        assert likely.log == pytest.approx(float(logs[id]))
        best = logs.topk(3)
        assert likely.top == [
            (int(i), pytest.approx(float(v))) for i, v in zip(best.indices, best.values, strict=True)
        ]
        seen.append(id)
