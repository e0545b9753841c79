"""An engine without a model: the next token is a pure function of all tokens in a slot and of the adapter that read
them, so any mixing-up shows."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from langmill.infer.adapters import Adapter
from langmill.infer.engine import Engine
from langmill.infer.request import Event, Request
from langmill.infer.runner import Floats, Ids
from langmill.infer.sampling import Sampling, sample, streams

VOCAB, LENGTH = 50, 32
RAISES, BROKEN = 48, 49  # a prompt with one makes the model raise, or give NaN
ZERO = {"requests": 0, "queued": 0, "queued_tokens": 0, "slots": 0, "owners": 0, "events": 0}


class Fake:
    """A `SourceRunner` and `AdaptedRunner` that holds its caller to the contract. passes: the tokens of each."""

    def __init__(self, slots: int = 3, length: int = LENGTH, source: int = 0):
        self.slots, self.length, self.vocab, self.source = slots, length, VOCAB, source
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.sources: list[list[int]] = [[] for _ in range(slots)]
        self.readers: list[list[int]] = [[] for _ in range(slots)]  # the adapter that read each token held
        self.passes: list[int] = []
        self.adapters = 0

    def adapt(self, changes: Any) -> int:
        self.adapters += 1
        return self.adapters

    def run(
        self, tokens_N: Ids, slots_N: Ids, places_N: Ids, wanted_W: Ids, adapters_N: Ids | None = None
    ) -> Tensor:
        adapters_N = np.zeros_like(tokens_N) if adapters_N is None else adapters_N
        assert len(adapters_N) == len(tokens_N) and 0 <= adapters_N.min() <= adapters_N.max() <= self.adapters
        assert {a.dtype for a in (tokens_N, slots_N, places_N, wanted_W)} == {np.dtype(np.int64)}
        assert len(tokens_N) == len(slots_N) == len(places_N) > 0 and sorted(set(wanted_W)) == list(wanted_W)
        begins = np.flatnonzero(np.diff(slots_N, prepend=-1))
        assert len(set(slots_N[begins])) == len(begins)  # tokens of one slot stand together
        self.passes.append(len(tokens_N))
        seen = []
        for token, slot, place, adapter in np.stack((tokens_N, slots_N, places_N, adapters_N), 1).tolist():
            assert place <= len(self.held[slot]) and place < self.length
            self.held[slot][place:], self.readers[slot][place:] = [token], [adapter]
            assert set(self.readers[slot]) == {adapter}
            seen.append((*self.sources[slot], -1 - adapter, *self.held[slot]))
        assert set(np.flatnonzero(np.diff(places_N) != 1) + 1) <= set(begins)
        return torch.stack([scores(seen[w]) for w in wanted_W]) if len(wanted_W) else torch.zeros(0, VOCAB)

    def copy(self, source: int, target: int, length: int) -> None:
        assert source != target and length <= len(self.held[source])
        self.held[target] = self.held[source][:length]
        self.readers[target] = self.readers[source][:length]

    def encode(self, slot: int, ids: Ids) -> None:
        if RAISES in ids:
            raise RuntimeError("no such source")
        self.sources[slot] = ids.tolist()


class FakeEmbedder:
    length, vocab = LENGTH, VOCAB

    def embed(self, texts: Sequence[Ids]) -> Floats:
        if any(RAISES in text for text in texts):
            raise RuntimeError("no such text")
        return np.stack([np.array([text.sum(), len(text)], np.float32) for text in texts])


def scores(seen: Sequence[int]) -> Tensor:
    """Logits behind these tokens."""
    if RAISES in seen:
        raise RuntimeError("no such token")
    if BROKEN in seen:
        return torch.full((VOCAB,), torch.nan)
    numbers = np.random.default_rng(zlib.crc32(np.array(seen, "<i8").tobytes()))
    values = numbers.normal(size=VOCAB).astype(np.float32)
    values[[RAISES, BROKEN]] = -30  # never written by themselves
    return torch.from_numpy(values)


def alone(request: Request, length: int = LENGTH) -> tuple[list[int], str]:
    """What a request writes without any engine, and how it ends; constraints and stop texts left out."""
    ids, written = [*(request.source or ()), -1 - request.adapter, *request.prompt], []
    numbers = streams(request.sampling.seed, [request.prompt] * (request.choice + 1))[-1:]
    while True:
        seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        seen[0, [*request.prompt, *written]] = True
        counts = torch.bincount(torch.tensor(written, dtype=torch.long), minlength=VOCAB)[None]
        id = int(sample(scores(ids)[None], request.sampling, seen, numbers, counts))
        ids.append(id)
        written.append(id)
        if id in (request.stop_ids or ()):
            return written, "stop"
        if len(written) == min(request.sampling.max_new_tokens, length - len(request.prompt) + 1):
            return written, "length"


def request(prompt: Sequence[int], stop_ids: Any = frozenset({7}), **given: Any) -> Request:
    """A request; the fields of `Sampling` may be given beside its own."""
    own = {name: given.pop(name) for name in list(given) if name in Request.__dataclass_fields__}
    return Request(prompt, Sampling(**given), stop_ids=stop_ids, **own)


def drain(engine: Engine, most: int = 10_000) -> dict[int, Event]:
    """All events of each request, joined to one, once the engine is idle again."""
    joined: dict[int, Event] = {}
    for _ in range(most):
        if engine.idle:
            assert engine.accounting() == ZERO
            return joined
        gather(joined, engine.step())
    raise AssertionError("the engine never becomes idle")


def gather(joined: dict[int, Event], events: Sequence[Event]) -> None:
    for event in events:
        one = joined.setdefault(event.request, Event(event.request))
        assert one.finish is None, "an event behind the last one"
        one.ids += event.ids
        one.text += event.text
        one.likely += event.likely
        one.prompt += event.prompt
        one.finish, one.reason, one.cached = event.finish, event.reason, event.cached
        one.vector = event.vector


def made(slots: int = 3, **given: Any) -> tuple[Engine, Fake]:
    runner, adapters = Fake(slots, source=given.pop("source", 0)), given.pop("adapters", 0)
    engine = Engine(runner, **{"pass_tokens": 8, "worth": 1, **given})
    for number in range(1, 1 + adapters):
        assert engine.adapt(Adapter({}, engine.tokenizer)) == number  # type: ignore[arg-type]
    return engine, runner


class TrueGuesses:
    """Guesses of what comes greedily, now and then a wrong one."""

    def __init__(self, wrong: random.Random):
        self.wrong = wrong

    def __call__(self, slots: Sequence[int], tokens: Sequence[Ids]) -> list[list[int]]:
        found = []
        for own in tokens:
            seen, guess = [-1, *own.tolist()], []
            for _ in range(self.wrong.randrange(5)):
                hit = self.wrong.random() < 0.8 and RAISES not in seen
                guess.append(int(scores(seen).argmax()) if hit else 3)
                seen.append(guess[-1])
            found.append(guess)
        return found

    def took(self, tokens: int, seconds: float) -> None:
        pass

    def leave(self, slot: int) -> None:
        pass


def check(asked: dict[int, Request], found: dict[int, Event], cancelled: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    """Everybody has one end, and wrote what it writes alone."""
    assert set(found) == set(asked)
    for number, one in asked.items():
        event = found[number]
        broken = next((t for t in (RAISES, BROKEN) if t in one.prompt), None)
        if event.finish == "cancelled":
            assert number in cancelled
            assert broken or event.ids == alone(one)[0][: len(event.ids)]
        elif broken:
            assert event.finish == "error" and event.ids == []
            assert ("no such token" if broken == RAISES else "not finite") in str(event.reason)
        else:
            assert (event.ids, event.finish) == alone(one)
        if event.ids:
            behind = range(1, len(one.prompt) * one.scored)
            logs = [scores([-1 - one.adapter, *one.prompt[:n]]).log_softmax(-1) for n in behind]
            assert [(likely.log, len(likely.top)) for likely in event.prompt] == [
                (float(own[one.prompt[n]]), one.logprobs) for n, own in zip(behind, logs, strict=True)
            ]
