"""Sources for `rows.TaskRows` that damage texts anew in every epoch: to be guessed, filled in or written out.

Texts are taken from a store without their markers, and cut into stretches that fill a row where they are longer. What
becomes of a stretch follows from the seed, the epoch and its place alone. T tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import UsageError
from langmill.data.batches import IGNORED, Ints
from langmill.data.corrupt import BlankInfilling, Denoising, FillInMiddle, Masking, SpanCorruption
from langmill.data.items import two_sided
from langmill.data.rows import Row, Shape, TaskBatch, Texts, digest, joined, lay, made


class Store(Protocol):
    """Texts as ids, by number: `shards.Shards` or `rows.Texts`."""

    @property
    def fingerprint(self) -> str: ...
    def lengths(self, documents: Any, /) -> Ints: ...
    def tokens_of(self, document: int, /) -> NDArray[Any]: ...
    def id_of(self, document: int, /) -> str: ...


@dataclass(frozen=True)
class _Stretches:
    """Texts in stretches that fill a row of `length` places. `how` damages a stretch; `front` and `back` are the
    markers around it."""

    store: Store
    how: Any
    length: int
    front: tuple[int, ...]
    back: tuple[int, ...]
    pad_id: int
    cut: ClassVar[bool] = True

    def taken(self, tokens: Ints) -> Ints:
        """The places that stretches of so many tokens take in a row, at most."""
        return tokens + len(self.front) + len(self.back)

    @cached_property
    def size(self) -> int:
        """The tokens of the longest stretch that fits; UsageError where not even one does."""
        low, high = 0, 1
        while self._fits(high):
            low, high = high, 2 * high
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(middle) else (low, middle)
        if not low:
            raise UsageError(f"a row of {self.length} tokens has no room for text beside its markers")
        return low

    def _fits(self, tokens: int) -> bool:
        return int(self.taken(np.array([tokens]))[0]) <= self.length

    def predictions(self, chosen: Ints) -> Ints:
        """The places that each text takes, in all its stretches: a full one takes a row."""
        tokens = np.asarray(self.store.lengths(chosen))
        full = np.maximum(-(-tokens // self.size), 1) - 1
        return full * self.length + self.taken(tokens - full * self.size)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        return {"tokenizer": self.store.fingerprint, "task": digest(self.how, self.front, self.back)}

    def name(self, number: int) -> str:
        """Where it was read."""
        return self.store.id_of(number)

    def stretches(self, rows: Sequence[Row]) -> Iterator[tuple[NDArray[Any], np.random.Generator, bool]]:
        """Each piece of each row: its tokens, what decides about it, and whether its text ends with it."""
        for row in rows:
            for piece, (number, first) in enumerate(
                zip(row.numbers.tolist(), row.firsts.tolist(), strict=True)
            ):
                at, ids = first // self.length * self.size, self.store.tokens_of(number)
                yield ids[at : at + self.size], row.random(piece), at + self.size >= len(ids)


def _numbered(rows: Sequence[Row]) -> list[Ints]:
    """The pieces of each row, counted through."""
    bounds = np.cumsum([0, *(len(row.numbers) for row in rows)])
    return [np.arange(first, end) for first, end in pairwise(bounds.tolist())]


@dataclass(frozen=True)
class Masked(_Stretches):
    """For an encoder: tokens to guess. `how` is a corrupt.Masking that knows the markers."""

    how: Masking

    def batch(self, rows: Sequence[Row], shape: Shape) -> TaskBatch:
        front, back = (np.array(ids, np.int64) for ids in (self.front, self.back))
        pairs = [self.how(np.concatenate((front, ids, back)), lot) for ids, lot, _ in self.stretches(rows)]
        inputs, starts = joined([pair[0] for pair in pairs])
        targets, _ = joined([pair[1] for pair in pairs])
        laid = lay(starts, _numbered(rows), shape)
        return made(
            laid, rows, shape, tokens_BT=laid.taken(inputs, self.pad_id, np.int64),
            targets_BT=laid.taken(targets, IGNORED, np.int64),
        )  # fmt: skip


@dataclass(frozen=True)
class Infilled(_Stretches):
    """For a decoder: gaps to fill, targets one place before what they predict. `front` is what a text starts with, and
    `back` ends one that is trained whole, or whose middle comes last."""

    how: FillInMiddle | BlankInfilling

    def taken(self, tokens: Ints) -> Ints:
        return self.how.reach(tokens) + len(self.front) + len(self.back) - 1

    def batch(self, rows: Sequence[Row], shape: Shape) -> TaskBatch:
        inputs, targets = [], []
        for ids, lot, last in self.stretches(rows):
            text, trained = self.how(ids, lot)
            moved = isinstance(self.how, FillInMiddle) and len(text) > len(ids)
            ended = self.back if moved or (last and trained.all()) else ()
            whole = np.concatenate((np.array(self.front, np.int64), text, np.array(ended, np.int64)))
            marks = np.concatenate(([False] * len(self.front), trained, [True] * len(ended))).astype(np.bool_)
            inputs.append(whole[:-1])
            targets.append(np.where(marks[1:], whole[1:], IGNORED))
        (tokens, starts), (wanted, _) = joined(inputs), joined(targets)
        laid = lay(starts, _numbered(rows), shape)
        return made(
            laid, rows, shape, tokens_BT=laid.taken(tokens, self.pad_id, np.int64),
            targets_BT=laid.taken(wanted, IGNORED, np.int64),
        )  # fmt: skip


@dataclass(frozen=True)
class Denoised(_Stretches):
    """For an encoder-decoder: damaged text to read, what was there to write. Both sides have the markers, as when it is
    taught to translate: a written text does not begin with the id that ends it, since the decoder begins with
    `start_id`. `length` and places are of the decoder's rows, `ratio` as in `items.Translated`."""

    how: SpanCorruption | Denoising
    start_id: int
    ratio: tuple[int, int] = (1, 1)

    def taken(self, tokens: Ints) -> Ints:
        read, written = self.how.reach(tokens)
        many, few = self.ratio
        around = len(self.front) + len(self.back)
        return np.maximum(written + around, -(-(read + around) * few // many))

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "sides": [self.start_id, *self.ratio]}

    def batch(self, rows: Sequence[Row], shape: Shape) -> TaskBatch:
        pairs = [self.how(ids, lot) for ids, lot, _ in self.stretches(rows)]
        ended = self.front[:1] == self.back[-1:]
        read = self._texts(self.front, [given for given, _ in pairs])
        written = self._texts(self.front[1:] if ended else self.front, [wanted for _, wanted in pairs])
        return two_sided(read, written, self.start_id, self.ratio, _numbered(rows), rows, shape)

    def _texts(self, begun: tuple[int, ...], parts: Sequence[Ints]) -> Texts:
        front, back = (np.array(ids, np.int64) for ids in (begun, self.back))
        ids, starts = joined([np.concatenate((front, part, back)) for part in parts], np.int32)
        return Texts(ids, None, starts, (), (), self.pad_id)
