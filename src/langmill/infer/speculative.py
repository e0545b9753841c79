"""Guesses of what comes next, so that one pass over the model writes several tokens; they change no result.

The engine reads guessed tokens in the same pass and keeps them as far as each is what it picks itself. That is
speculative sampling (Leviathan et al. 2023, arXiv:2211.17192, section 2.3) with proposals that are certain of
themselves: exact for greedy requests, and drawn from the model's own distribution for all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from langmill.infer.request import Ids
from langmill.infer.runner import Runner

PIECE = 256  # tokens that a draft reads in a pass
COUNTED = 64  # tokens of a pass, at most, that tells of prices: what reads prompts does not
SLOPE = 0.15  # of a first token's price, what each more costs before anything is known
# how likely a guess is right before any was made, and how many guesses that is worth
FAITH, WEIGHT = 0.7, 2.0
# how much of what guesses taught counts on after each one, and after each token without: lately, and in the long run
LATELY, LONG = (0.6, 0.9), (0.95, 0.98)


class Prices:
    """What a pass of so many tokens takes, learnt from those there were: a line through them, the latest count most.

    On one machine eight tokens cost twice as much as one, on another six times.
    """

    def __init__(self) -> None:
        self._weight = self._n = self._t = self._nn = self._nt = 0.0

    def took(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long."""
        if tokens > COUNTED:
            return
        kept = 0.98
        self._weight = kept * self._weight + 1
        self._n, self._nn = kept * self._n + tokens, kept * self._nn + tokens * tokens
        self._t, self._nt = kept * self._t + seconds, kept * self._nt + tokens * seconds

    def line(self) -> tuple[float, float]:
        """The price of a pass is the first number, and the second for each token."""
        if not self._t:
            return 1 - SLOPE, SLOPE
        tokens, seconds = self._n / self._weight, self._t / self._weight
        spread = self._nn / self._weight - tokens * tokens
        both = self._nt / self._weight - tokens * seconds
        usual = SLOPE * seconds / (1 + SLOPE * (tokens - 1))
        each = min(max((both + 0.2 * usual) / (spread + 0.2), 0.0), seconds / tokens)
        return seconds - each * tokens, each


class Pace:
    """How many tokens to guess for one request: as many as make most of a pass, by what they cost and how many of the
    guesses before came true (Leviathan et al. 2023, section 3.5)."""

    def __init__(self, most: int):
        self.most = most
        self._guess, self._at = np.empty(0, np.int64), 0
        self._counts = [
            [0.0, 0.0],
            [0.0, 0.0],
        ]  # guesses that came true, and were tried: lately, in the long run

    def now(self, known: Ids, price: tuple[float, float], rows: int = 1) -> int:
        """How many to guess behind these tokens, which show what came of the guess before. price: of a pass and of
        each token; rows: requests that share the pass."""
        came = len(known) - self._at
        if len(self._guess) and came:
            right = _common(self._guess, known[self._at :])
            self._learn([kept for kept, _ in (LATELY, LONG)], right, min(right + 1, len(self._guess)))
        else:
            self._learn([fades**came for _, fades in (LATELY, LONG)], 0, 0)
        self._guess, self._at = self._guess[:0], len(known)
        (right_lately, lately), (right_long, long) = self._counts
        usual = (right_long + FAITH * WEIGHT) / (long + WEIGHT)
        faith = (right_lately + usual * WEIGHT) / (lately + WEIGHT)
        cost, each = price[0] + rows * price[1], price[1]
        best, worth, gain, odds = 0, rows / max(cost, 1e-9), float(rows), 1.0
        for count in range(1, self.most + 1):
            odds *= faith
            gain += odds
            if gain / max(cost + count * each, 1e-9) > worth:
                best, worth = count, gain / max(cost + count * each, 1e-9)
        return best

    def _learn(self, kept: Sequence[float], right: int, tried: int) -> None:
        for counts, share in zip(self._counts, kept, strict=True):
            counts[0], counts[1] = counts[0] * share + right, counts[1] * share + tried

    def guessed(self, guess: Sequence[int]) -> None:
        """This is what was guessed."""
        self._guess = np.array(guess, np.int64)


class PromptLookup:
    """A `Propose` for texts that repeat themselves or their prompt, as edits, extracts and code do.

    Where the last tokens stood before, in the prompt or in what was written, what followed them there follows again:
    the longest of `match` down to `least` tokens that did, and its latest place (Yang et al. 2023, arXiv:2304.04487;
    Saxena 2023). most: tokens guessed at once. A token costs a few look-ups, whatever the length.
    """

    def __init__(self, most: int = 8, match: int = 3, least: int = 2):
        self.most, self.sizes = most, range(match, least - 1, -1)
        self._seen: dict[int, _Seen] = {}  # by slot
        self._prices = Prices()
        self.took = self._prices.took

    def __call__(self, slots: Sequence[int], tokens: Sequence[Ids]) -> list[list[int]]:
        price = self._prices.line()
        return [self._one(slot, known, price, len(slots)) for slot, known in zip(slots, tokens, strict=True)]

    def leave(self, slot: int) -> None:
        self._seen.pop(slot, None)

    def _one(self, slot: int, known: Ids, price: tuple[float, float], rows: int) -> list[int]:
        seen = self._seen.get(slot)
        if seen is None:
            seen = self._seen[slot] = _Seen(self.sizes, self.most)
        guess = seen.after(known, seen.pace.now(known, price, rows))
        seen.pace.guessed(guess)
        return guess


class _Seen:
    """A request's tokens, and where each few of them ended last."""

    def __init__(self, sizes: range, most: int):
        self.sizes, self.pace = sizes, Pace(most)
        self.ids: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}

    def after(self, known: Ids, count: int) -> list[int]:
        """What followed the last tokens of `known`, which goes on from the call before; [] where nothing did."""
        ids, ends = self.ids, self.ends
        new = known[len(ids) :].tolist()
        for id in new:  # the last tokens themselves are left out: they are looked for
            for size in self.sizes:
                if len(ids) >= size:
                    ends[tuple(ids[-size:])] = len(ids)
            ids.append(id)
        if not count:
            return []
        for size in self.sizes:
            if len(ids) >= size and (end := ends.get(tuple(ids[-size:]))) is not None:
                return [ids[end + i % (len(ids) - end)] for i in range(count)]
        return []


class Draft:
    """A `Propose` by a smaller model of the same vocabulary: what it would write greedily.

    runner: of the smaller model. Its slots follow the engine's of the same numbers, and those beyond its own get no
    guesses, nor do texts longer than its slots. most: tokens guessed at once. vocab: of the model that it guesses
    for, where that is smaller.
    """

    def __init__(self, runner: Runner, most: int = 4, vocab: int | None = None):
        self.runner, self.most = runner, most
        self.vocab = min(runner.vocab, vocab or runner.vocab)
        self._held_SL = np.full((runner.slots, runner.length), -1, np.int64)
        self._paces: dict[int, Pace] = {}
        self._prices = Prices()  # of the model that it guesses for; its own are left out
        self.took = self._prices.took

    def __call__(self, slots: Sequence[int], tokens: Sequence[Ids]) -> list[list[int]]:
        guesses: list[list[int]] = [[] for _ in slots]
        price = self._prices.line()
        counts = [
            self._count(slot, known, price, len(slots)) for slot, known in zip(slots, tokens, strict=True)
        ]
        going = [row for row, count in enumerate(counts) if count]
        reads = [tokens[row] for row in going]
        while going:
            next_ids = self._read([slots[row] for row in going], reads)
            for row, id in zip(going, next_ids, strict=True):
                guesses[row].append(id)
            going = [row for row in going if len(guesses[row]) < counts[row]]
            reads = [np.append(tokens[row], guesses[row]) for row in going]
        for slot, guess in zip(slots, guesses, strict=True):
            if slot in self._paces:
                self._paces[slot].guessed(guess)
        return guesses

    def leave(self, slot: int) -> None:
        self._paces.pop(slot, None)

    def _count(self, slot: int, known: Ids, price: tuple[float, float], rows: int) -> int:
        """How many to guess: as far as the slot has room."""
        if slot >= self.runner.slots or int(known.max()) >= self.runner.vocab:
            return 0
        pace = self._paces.setdefault(slot, Pace(self.most))
        return max(0, min(pace.now(known, price, rows), self.runner.length - len(known) + 1))

    def _read(self, slots: Sequence[int], texts: Sequence[Ids]) -> list[int]:
        """Bring the slots to these texts, in pieces; the likeliest id behind each."""
        best = [0] * len(slots)
        todo = []
        for row, (slot, ids) in enumerate(zip(slots, texts, strict=True)):
            start = _common(self._held_SL[slot], ids[:-1])
            self._held_SL[slot, start:] = -1
            self._held_SL[slot, start : len(ids)] = ids[start:]
            todo += [(row, place) for place in range(start, len(ids))]
        for piece in (todo[at : at + PIECE] for at in range(0, len(todo), PIECE)):
            rows_N, places_N = np.array(piece, np.int64).T
            slots_N = np.array(slots, np.int64)[rows_N]
            lasts_N = np.array([len(texts[row]) - 1 for row in rows_N], np.int64)
            wanted_W = np.flatnonzero(places_N == lasts_N)
            try:
                logits_WV = self.runner.run(self._held_SL[slots_N, places_N], slots_N, places_N, wanted_W)
                sick = bool(logits_WV.isnan().any())
            except BaseException:
                self._held_SL[:] = -1
                raise
            if sick:  # what it gives is no guess, and is read again from the beginning
                self._held_SL[slots_N] = -1
            for row, id in zip(rows_N[wanted_W], logits_WV[:, : self.vocab].argmax(-1).tolist(), strict=True):
                best[row] = id
        return best


def _common(one: Ids, other: Ids) -> int:
    """How many tokens at their beginning are the same."""
    size = min(len(one), len(other))
    same = one[:size] == other[:size]
    return size if same.all() else int(same.argmin())
