"""Guesses change no token and no odds; they follow requests and leave with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from fake_engine import BROKEN, RAISES, VOCAB, Fake, drain, request
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from langmill.infer.engine import Engine
from langmill.infer.request import Request
from langmill.infer.runner import Ids, Runner, TorchRunner
from langmill.infer.scheduler import Propose
from langmill.infer.speculative import Draft, Pace, Prices, PromptLookup
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer

WAYS: list[dict[str, Any]] = [
    {}, {"temperature": 1.0, "top_p": 0.9}, {"repetition_penalty": 1.3}, {"logprobs": 2, "temperature": 0.7},
]  # fmt: skip
REPEATS = st.builds(
    lambda part, times, end: (part * times + end)[:20],
    st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 5), st.lists(st.integers(0, 9), max_size=3),
)  # fmt: skip


def model() -> Transformer:
    stack = StackConfig(dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48)
    made = Transformer(ModelConfig(stack, Tokens(VOCAB, 48), head=Head(VOCAB)))
    init_(made, 0)
    with torch.no_grad():  # a wide spread, so that no two scores are nearly equal
        for parameter in made.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return made.eval()


class Circle(Fake):
    """A model of few words: what follows depends on the last one, so that texts repeat themselves."""

    def __init__(self, slots: int, length: int = 48, words: int = 3, seed: int | None = None):
        super().__init__(slots, length)
        self.words = words
        drawn = torch.randn(words, words, generator=torch.Generator().manual_seed(seed or 0))
        turned = torch.stack([torch.tensor([0.0, 1.0, -0.5]).roll(n) for n in range(3)])
        self.table = turned if seed is None else 2 * drawn

    def logits(self, last: int) -> Tensor:
        values = torch.full((VOCAB,), -torch.inf)
        values[: self.words] = self.table[last % self.words]
        return values

    def run(self, tokens_N: Ids, slots_N: Ids, places_N: Ids, wanted_W: Ids) -> Tensor:
        super().run(tokens_N, slots_N, places_N, wanted_W[:0])
        return torch.cat(
            [torch.zeros(0, VOCAB), *(self.logits(t)[None] for t in tokens_N[wanted_W].tolist())]
        )


def results(runner: Runner, propose: Propose | None, requests: Sequence[Request]) -> tuple[list[Any], Engine]:
    engine = Engine(runner, pass_tokens=24, worth=4, propose=propose)
    for one in requests:
        engine.submit(one)
    events = dict(sorted(drain(engine).items()))  # drain holds all accounts to zero
    likely = [[(round(one.log, 3), len(one.top)) for one in event.likely] for event in events.values()]
    return [(event.ids, event.finish) for event in events.values()] + likely, engine


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(REPEATS, st.sampled_from(WAYS), st.integers(1, 20)), min_size=1, max_size=6),
    st.integers(0, 9),
)  # fmt: skip
def test_the_same_seeds_give_the_same_tokens(
    asked: list[tuple[list[int], dict[str, Any], int]], seed: int
) -> None:
    requests = [request(prompt, max_new_tokens=new, **way) for prompt, way, new in asked]
    plain, _ = results(Circle(3, words=9, seed=seed), None, requests)
    for propose in (PromptLookup(), PromptLookup(3, 2, 1), Draft(Circle(2, words=9, seed=seed + 1))):
        assert results(Circle(3, words=9, seed=seed), propose, requests)[0] == plain


def test_a_real_model_writes_the_same_with_guesses() -> None:
    """The draft is the model itself: all its greedy guesses come true, also for those that wait for a slot."""
    greedy = [request([n, 5, n, 5], max_new_tokens=12, stop_ids=frozenset()) for n in range(5)]
    drawn = [request([n, 5, n, 5], max_new_tokens=12, **way) for n, way in enumerate(WAYS)]
    real = model()
    plain, without = results(TorchRunner(real, 3, 48), None, greedy)
    draft = Draft(TorchRunner(real, 2, 48))  # the third slot is beyond its own
    draft.took = lambda tokens, seconds: None  # guess, however slow this machine is
    found, engine = results(TorchRunner(real, 3, 48), draft, greedy)
    assert found == plain
    assert engine.counts["guessed right"] == engine.counts["guessed"] > 20
    assert engine.counts["passes"] < without.counts["passes"]
    plain, _ = results(TorchRunner(real, 3, 48), None, drawn)
    for propose in (draft, PromptLookup(3, 2, 1)):
        found, engine = results(TorchRunner(real, 3, 48), propose, drawn)
        assert found == plain and engine.counts["guessed"]


def test_a_draft_reads_only_what_is_new() -> None:
    runner = Circle(1)
    draft = Draft(runner, most=3)
    text = np.arange(10, 20)
    assert draft([0], [text]) == [[2, 0, 1]]
    assert runner.passes == [10, 1, 1]
    assert draft([0], [np.array([*text, 2, 2])]) == [[0, 1]]  # one came true: fewer are guessed
    assert runner.passes[3:] == [1, 1]
    draft.leave(0)
    assert draft([0], [np.array([*text[:8], 3, 4])]) == [[2, 0, 1]]
    assert runner.passes[5:] == [2, 1, 1]
    assert draft([0], [np.arange(runner.length + 1) % 9]) == [[]]  # beyond its slots
    assert Draft(runner, vocab=1)([0], [text])[0][0] == 0


def test_a_draft_that_fails_is_read_anew() -> None:
    runner = Fake(2)
    draft, fresh = Draft(runner, most=2), Draft(Fake(2), most=2)([0], [np.array([1, 2, 3])])
    with pytest.raises(RuntimeError):
        draft([0], [np.array([1, 2, RAISES])])
    assert draft([0], [np.array([1, 2, 3])]) == fresh
    assert runner.passes == [3, 3, 1]
    draft([1], [np.array([BROKEN, 2])])  # it gives NaN
    draft.leave(1)
    draft([1], [np.array([BROKEN, 2])])
    assert runner.passes[3:] == [2, 3, 2, 3]


def test_lookup_takes_the_longest_match_and_of_these_the_latest() -> None:
    def guess(*ids: int, most: int = 3) -> list[int]:
        return PromptLookup(most)([0], [np.array(ids)])[0]

    assert guess(1, 2, 3, 4, 5, 9, 2, 3, 6, 7, 1, 2, 3) == [4, 5, 9]  # three match first, not the later two
    assert guess(1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 1, 2, 3) == [5, 6, 7]  # the latest
    assert guess(7, 2, 3, 4, 5, 1, 2, 3) == [4, 5, 1]  # two, where three do not
    assert guess(8, 1, 2, 1, 2, most=3) == [1, 2, 1]  # what goes round goes on
    assert guess(1, 2, 3, 4) == guess(1) == []


def test_lookup_learns_as_a_text_grows_and_forgets_with_its_slot() -> None:
    lookup, text = PromptLookup(2), [1, 2, 3, 4]
    assert lookup([0, 2], [np.array(text), np.array([5, 6, 7, 5, 6])]) == [[], [7, 5]]
    assert lookup([0], [np.array([*text, 9, 1, 2])]) == [[3, 4]]
    lookup.leave(0)
    assert lookup([0], [np.array([7, 7, 1, 2])]) == [[]]
    lookup.leave(0), lookup.leave(2), lookup.leave(2)
    assert not lookup._seen


def test_guesses_that_fail_become_fewer_and_rest_and_are_tried_again() -> None:
    pace, known, counts, cheap = Pace(8), np.zeros(1, np.int64), [], (0.85, 0.15)
    for _ in range(40):
        counts.append(pace.now(known, cheap))
        pace.guessed([1] * counts[-1])
        known = np.append(known, 0)
    assert counts[0] == 3 > counts[1] and 0 in counts[:9]
    assert np.count_nonzero(counts) < 12 and np.count_nonzero(counts[20:])
    for _ in range(99):  # now they come true
        size = pace.now(known, cheap)
        pace.guessed([1] * size)
        known = np.append(known, [1] * (size + 1))
    assert size == 8
    dear = (0.0, 1.0)  # each token costs as much as the first
    assert pace.now(known, dear) == 0 < pace.now(known, cheap, rows=4)


@given(st.floats(0.01, 9), st.floats(0.001, 9), st.lists(st.integers(1, 20), min_size=400, max_size=400))
@settings(max_examples=20, deadline=None)
def test_prices_are_learnt_from_the_passes(once: float, each: float, sizes: list[int]) -> None:
    prices = Prices()
    assert prices.line() == pytest.approx((0.85, 0.15))
    for size in [*range(1, 9), *sizes]:
        prices.took(size, once + size * each)
    prices.took(512, 99.0)  # a prompt
    a, b = prices.line()
    if len({*sizes[-30:]}) > 5:
        assert a + 8 * b == pytest.approx(once + 8 * each, rel=0.1)


def test_a_text_that_repeats_itself_takes_few_passes() -> None:
    lookup = PromptLookup()
    lookup.took = lambda tokens, seconds: None  # the runner here is no guide to prices
    engine = Engine(runner := Circle(1, length=400), propose=lookup)
    number = engine.submit(request([1, 2], max_new_tokens=300, stop_ids=frozenset()))
    event = drain(engine)[number]
    assert len(event.ids) == 300 and len(runner.passes) < 60
    assert engine.counts["written"] == 300 == engine.counts["guessed right"] + engine.counts["passes"]


def test_draws_have_the_models_odds() -> None:
    """Chi-squared over the 27 texts of three words; fixed seeds."""
    runner, prompt, draws = Circle(16, length=12), [0, 1, 2, 0, 1, 2, 0], 3000
    engine = Engine(runner, propose=(lookup := PromptLookup(4, 2, 1)), worth=99)
    for size in range(1, 65):  # a runner for which guesses cost next to nothing
        lookup.took(size, 1 + 0.001 * size)
    lookup.took = lambda tokens, seconds: None
    for seed in range(draws):
        engine.submit(request(prompt, max_new_tokens=3, stop_ids=frozenset(), temperature=1.0, seed=seed))
    seen = Counter(tuple(event.ids) for event in drain(engine).values())
    odds = {}
    for text in product(range(runner.words), repeat=3):
        steps = zip((prompt[-1], *text[:-1]), text, strict=True)
        odds[text] = float(
            np.prod([float(runner.logits(last).double().softmax(-1)[id]) for last, id in steps])
        )
    assert sum(odds.values()) == pytest.approx(1)
    found = chisquare([seen[text] for text in odds], [draws * share for share in odds.values()])
    assert found.pvalue > 0.001
    assert engine.counts["guessed right"] > draws / 2
