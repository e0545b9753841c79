"""The engine's other work: vectors, answers to sources, and text."""

from __future__ import annotations

import random

import pytest
from fake_engine import RAISES, Fake, FakeEmbedder, TrueGuesses, check, drain, gather, made, request

from langmill.common.errors import ModelError
from langmill.infer.engine import Engine
from langmill.infer.request import Event, Request
from langmill.text.tokenizer import Tokenizer


def test_vectors_and_answers_share_the_passes() -> None:
    engine = Engine(Fake(1), embedder=FakeEmbedder(), pass_tokens=8)
    one = request([1, 2], max_new_tokens=5, stop_ids=frozenset())
    texts = {engine.submit(request(range(size), kind="embed")): size for size in (3, 4, 20, 2)}
    bad = engine.submit(request([1, RAISES], kind="embed"))
    number = engine.submit(one)
    with pytest.raises(ModelError, match="text has 33 tokens"):
        engine.submit(request(range(33), kind="embed"))
    found = drain(engine)
    for text, size in texts.items():
        vector = found[text].vector
        assert (
            vector is not None
            and vector.tolist() == [sum(range(size)), size]
            and found[text].finish == "stop"
        )
    assert found[bad].finish == "error" and "no such text" in str(found[bad].reason)
    check({number: one}, {number: found[number]})


def test_answers_to_sources() -> None:
    engine, _ = made(2, source=12)
    asked = {}
    for source in ([1, 2, 3], [4], [1, 2, 3], list(range(12)), [5, RAISES]):
        one = request([0], source=source, max_new_tokens=6)
        asked[engine.submit(one)] = one
    low = request([0], source=[9, 9], max_new_tokens=12, stop_ids=frozenset(), priority=-1)
    asked[engine.submit(low)] = low
    found: dict[int, Event] = {}
    while engine.counts["reused"] == 0 and not any(n == 6 for n in found):
        gather(found, engine.step())
    late = request([0], source=[8], max_new_tokens=3)
    for _ in range(2):  # both slots: the low one must give way, and its source be read once more
        asked[engine.submit(late)] = late
    gather(found, drain(engine).values())
    failed = found.pop(5)
    assert failed.finish == "error" and "no such source" in str(failed.reason)
    del asked[5]
    check(asked, found)
    assert engine.counts["preempted"] == 1 and engine.counts["reused"] == 0
    with pytest.raises(ModelError, match="give a source"):
        engine.submit(request([0]))
    with pytest.raises(ModelError, match="source has 13 tokens and there is room for 12"):
        engine.submit(request([0], source=[1] * 13))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(
        ["the first ids are bytes: a model of fifty writes those alone"] * 3, vocab_size=270
    )


def test_text_is_what_the_ids_decode_to_and_ends_before_a_stop_text(tokenizer: Tokenizer) -> None:
    engine = Engine(Fake(2), tokenizer, pass_tokens=8, propose=TrueGuesses(random.Random(2)))
    prompts = [[8, 9], [9, 10, 11], [12]]
    numbers = [engine.submit(Request(prompt, request([], max_new_tokens=25).sampling)) for prompt in prompts]
    found = drain(engine)
    for number in numbers:
        assert found[number].text == tokenizer.decode(found[number].ids)
    text = found[numbers[0]].text
    assert len(text) > 6
    stop = text[3:5]
    number = engine.submit(Request(prompts[0], request([], max_new_tokens=25, stop=(stop,)).sampling))
    event = drain(engine)[number]
    assert event.text == text.split(stop)[0] and event.finish == "stop"
    assert len(event.ids) <= len(found[numbers[0]].ids)
