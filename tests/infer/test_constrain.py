"""Whatever a model writes, constrained text fits; a model of noise writes what no trained one would."""

from __future__ import annotations

import ast
import json
import random
import re
import sys
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from fake_engine import drain
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from langmill.common.errors import MissingExtra, ModelError, UsageError
from langmill.infer.constrain import Grammars
from langmill.infer.engine import CUT, Engine
from langmill.infer.request import Constraint, Event, Request
from langmill.infer.sampling import Sampling, allowed
from langmill.infer.speculative import PromptLookup
from langmill.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")
TEXT = 'a cat sat 12.5 {"name": "b", "tags": [true, null]} 你好世界 مرحبا بالعالم 🙂🙃 \n'
SOME = settings(deadline=None, max_examples=40)


@cache
def tokenizer(kind: Any = "bpe") -> Tokenizer:
    return Tokenizer.train([TEXT] * 30, vocab_size=340 if kind == "bpe" else 700, kind=kind)


@cache
def grammars(kind: str = "bpe") -> Grammars:
    return Grammars(tokenizer(kind), tokenizer(kind).vocab_size + 3)  # logits are often padded


class Noise:
    """A `Runner` whose scores are noise of the last two tokens and the place."""

    slots, length = 2, 256

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.held_SL = np.zeros((self.slots, self.length), np.int64)

    def run(self, tokens_N: Any, slots_N: Any, places_N: Any, wanted_W: Any) -> Tensor:
        self.held_SL[slots_N, places_N] = tokens_N
        found = []
        for slot, place in zip(slots_N[wanted_W], places_N[wanted_W], strict=True):
            key = [*self.held_SL[slot, max(0, place - 1) : place + 1], place // 8]
            numbers = np.random.default_rng(zlib.crc32(np.array(key, "<i8").tobytes()))
            found.append(torch.from_numpy(numbers.normal(size=self.vocab).astype(np.float32) * 3))
        return torch.stack(found) if found else torch.zeros(0, self.vocab)

    def copy(self, source: int, target: int, length: int) -> None:
        self.held_SL[target] = self.held_SL[source]


def write(
    constraint: Constraint, limit: int, seed: int = 0, kind: str = "bpe", propose: Any = None, **given: Any
) -> Event:
    logprobs = given.pop("logprobs", None)
    engine = Engine(Noise(tokenizer(kind).vocab_size + 3), tokenizer(kind), propose=propose)
    sampling = Sampling(limit, **{"temperature": 1.0, "seed": seed, **given})
    number = engine.submit(Request([seed % 7, 9], sampling, constraint=constraint, logprobs=logprobs))
    return drain(engine)[number]


def schemas(depth: int = 2) -> Any:
    """Small schemas, each with a value that meets it."""
    plain = st.one_of(
        st.just(({"type": "string"}, "")),
        st.builds(
            lambda n, m: ({"type": "string", "minLength": n, "maxLength": n + m}, "x" * n),
            st.integers(0, 4),
            st.integers(0, 5),
        ),
        st.builds(lambda n: ({"type": "integer", "minimum": n, "maximum": n + 50}, n), st.integers(-9, 99)),
        st.just(({"type": "number"}, 0)),
        st.just(({"type": "boolean"}, True)),
        st.just(({"type": "null"}, None)),
        st.lists(st.sampled_from(["a", "مرحبا", "你好", "🙂", 7, None]), min_size=1, max_size=3).map(
            lambda them: ({"enum": them}, them[0])
        ),
    )
    if not depth:
        return plain
    inner = schemas(depth - 1)
    arrays = st.builds(
        lambda item, n: ({"type": "array", "items": item[0], "minItems": n, "maxItems": 4}, [item[1]] * n),
        inner,
        st.integers(0, 2),
    )
    objects = st.builds(
        lambda parts: (
            {
                "type": "object",
                "properties": {name: schema for name, (schema, _) in parts.items()},
                "required": list(parts),
                "additionalProperties": False,
            },
            {name: value for name, (_, value) in parts.items()},
        ),
        st.dictionaries(st.sampled_from(["name", "b", "عمر", "年", "🙂"]), inner, max_size=3),
    )
    return st.one_of(plain, arrays, objects)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
    kind = {**kinds, "object": dict, "null": type(None)}[schema["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):  # type: ignore[arg-type]
        return False
    size = len(value) if isinstance(value, str | list) else 0
    if not schema.get("minLength", schema.get("minItems", 0)) <= size:
        return False
    if size > schema.get("maxLength", schema.get("maxItems", size)):
        return False
    if isinstance(value, list):
        return all(fits(one, schema["items"]) for one in value)
    if isinstance(value, dict):
        parts = schema["properties"]
        return value.keys() == parts.keys() and all(fits(value[name], parts[name]) for name in parts)
    return "minimum" not in schema or schema["minimum"] <= value <= schema["maximum"]


@given(schemas(), st.integers(1, 120), st.integers(0, 99))
@SOME
def test_json_meets_its_schema_within_the_limit(made: tuple[Any, Any], limit: int, seed: int) -> None:
    schema, value = made
    shortest = tokenizer().encode(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    event = write(grammars().json_schema(schema), limit, seed)
    assert event.finish in ("stop", "length") and len(event.ids) <= limit
    if event.reason is None:
        assert fits(json.loads(event.text), schema)
    else:
        assert event.reason == CUT and event.finish == "length" and limit < len(shortest) + 4


@pytest.mark.parametrize("pattern", [
    "[0-9]{3}-[0-9]{4}", "(ab|cd)*e", r"([A-Z][a-z]+, ){3}[A-Z][a-z]+\.", "a{70}", "[^\n]{3,30}\n", "(مر|你好|🙂){2,5}",
    "x?", r"([A-Z][^\n]{4,20}\n){2,9}",
])  # fmt: skip
def test_all_of_the_pattern_matches(pattern: str) -> None:
    for seed in range(5):
        event = write(grammars().regex(pattern), 90 + 25 * (seed % 3), seed)
        assert event.reason is None and re.fullmatch(pattern, event.text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@given(texts=st.lists(st.text(max_size=8), min_size=1, max_size=4), seed=st.integers(0, 9))
@example(texts=["مرحبا بالعالم", "你好", "🙂🙃", '"\\\n'], seed=1)
@settings(deadline=None, max_examples=30)
def test_one_of_the_choices(kind: str, texts: list[str], seed: int) -> None:
    texts = [text for text in texts if tokenizer(kind).decode(tokenizer(kind).encode(text)) == text] or ["a"]
    event = write(grammars(kind).choice(texts), 99, seed, kind)
    assert event.reason is None and event.text in texts


def test_a_grammar_in_larks_notation() -> None:
    lark = 'start: sum\nsum: term | sum "+" term\nterm: NUM | "(" sum ")"\nNUM: /[1-9][0-9]{0,3}/'
    for seed in range(8):
        event = write(grammars().grammar(lark), 60, seed)
        assert event.reason is None and ast.parse(event.text, mode="eval")


def test_a_limit_too_low_is_told() -> None:
    event = write(grammars().regex("[abc]{200}"), 5)
    assert (event.finish, event.reason) == ("length", CUT)
    event = write(grammars().choice(["a cat sat. It was"]), 50, stop=("sat",))
    assert (event.finish, event.reason, event.text) == ("stop", CUT, "a cat ")


def test_guesses_change_nothing() -> None:
    """With penalties and log-probabilities too: every place has its own mask."""
    schema = {"type": "array", "items": {"enum": ["cat", "sat", "مرحبا"]}, "minItems": 12}
    for given_ in ({}, {"temperature": 0.0}, {"repetition_penalty": 1.2, "logprobs": 2}):
        made: list[Callable[[], Constraint]] = [
            lambda: grammars().json_schema(schema), lambda: grammars().regex("(ab){20}(cat|sat)*!"),
        ]  # fmt: skip
        for make in made:
            plain, still = make(), make()
            still.forced = lambda: ()  # type: ignore[method-assign]
            events = [
                write(still, 90, 3, **given_),
                write(plain, 90, 3, **given_),
                write(make(), 90, 3, propose=PromptLookup(match=2, least=1), **given_),
            ]
            assert events[0].ids == events[1].ids == events[2].ids and events[0].reason is None
            assert [[one.log for one in event.likely] for event in events[1:]] == [
                [one.log for one in events[0].likely]
            ] * 2


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@given(made=schemas(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_ids_that_are_asked_for_alone_are_those_of_the_mask(
    kind: str, made: tuple[Any, Any], seed: int
) -> None:
    at, numbers, own = grammars(kind).json_schema(made[0]), random.Random(seed), tokenizer(kind)
    for _ in range(20):
        mask = allowed(at.mask(), own.vocab_size + 3)
        ids = [id for id in range(len(mask)) if id not in own.stop_ids]
        assert [at.allows(id) for id in ids] == mask[ids].tolist()
        if at.done or not mask[ids].any():
            break
        at.accept(numbers.choice([id for id in ids if mask[id]]))
    asked, masked = grammars(kind).json_schema(made[0]), grammars(kind).json_schema(made[0])
    masked.allows = lambda id: False  # type: ignore[method-assign]
    events = [write(one, 60, seed, kind, temperature=0.0) for one in (asked, masked)]
    assert events[0].ids == events[1].ids and events[0].reason == events[1].reason


def test_a_dead_end_ends_its_request_alone() -> None:
    dead = grammars().grammar('start: "x" | /[ab]{40}/ end\nend: "b" /[^\\x00-\\U0010ffff]/')
    dead.steer = lambda id, left: id  # type: ignore[method-assign]
    engine = Engine(Noise(tokenizer().vocab_size + 3), tokenizer())
    ask = Sampling(80, temperature=1.0)
    numbers = [engine.submit(Request([1], ask, constraint=one)) for one in (dead, grammars().regex("c{30}"))]
    found = drain(engine)
    if found[numbers[0]].text != "x":
        assert found[numbers[0]].finish == "error" and "dead end" in str(found[numbers[0]].reason)
    assert found[numbers[1]].text == "c" * 30


@pytest.mark.parametrize(("kind", "wrong", "words"), [
    ("json_schema", {"type": "string", "minLength": 5, "maxLength": 3}, "minLength"),
    ("json_schema", "{", "no JSON"), ("json_schema", "[1]", "a schema is an object"), ("json_schema", False, "false"),
    ("json_schema", {"not": {}}, "not"), ("json_schema", {"type": "strin"}, "strin"),
    ("json_schema", {"$ref": "#/nowhere"}, "nowhere"), ("json_schema", {"a": {1}}, "cannot be used"),
    ("regex", "a(", "unclosed group"), ("regex", "(?=x)y", "look-around"), ("regex", r"[^\x00-\U0010ffff]", "no text"),
    ("regex", r"a[^\x00-\U0010ffff]", "no text"), ("choice", [], "at least one"), ("choice", "abc", "a list"),
    ("grammar", "start: foo", "foo"), ("grammar", 'start: "a', "cannot be used"),
    ("grammar", 'start: "a" start', "no text"),
])  # fmt: skip
def test_what_cannot_be_met_is_refused_with_a_reason(kind: str, wrong: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        getattr(grammars(), kind)(wrong)


def test_blanks_end_and_stop_ids_wait_for_the_end() -> None:
    for seed in range(5):
        event = write(grammars().json_schema(True), 120, seed)
        assert event.finish == "stop" and event.reason is None
        json.loads(event.text)
        assert not re.search(r"\s{19}", re.sub(r'"(\\.|[^"\\])*"', "", event.text))
    greedy = grammars().regex("a+")
    stops = frozenset({*tokenizer().stop_ids, tokenizer().encode("a")[0]})
    engine = Engine(Noise(tokenizer().vocab_size + 3), tokenizer())
    number = engine.submit(Request([1], Sampling(9), constraint=greedy, stop_ids=stops))
    event = drain(engine)[number]
    assert event.finish == "error" and "allows no token" in str(
        event.reason
    )  # "a" may not stop an empty text


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = Tokenizer.train([TEXT] * 9, vocab_size=300)
    monkeypatch.setattr(Tokenizer, "stop_ids", frozenset())
    with pytest.raises(ModelError, match="eos_token"):
        Grammars(endless, 300)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match="structured"):
        Grammars(endless, 300)
