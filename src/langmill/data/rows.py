"""What encoders and encoder-decoders learn from, packed whole into rows: texts with labels, tags, answers, other texts.

A source holds N items and makes batches of them; TaskRows says which items share a row, in a resumable order. B rows,
T tokens in a row, S tokens in an encoder's row beside it, P places for items in a row, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import DataError
from langmill.data.batches import IGNORED, Batch, Ints, Packed, Pieces
from langmill.data.examples import apart

Bools = NDArray[np.bool_]
Shape = tuple[int, int, int]  # B, T, P


@dataclass(frozen=True)
class Text:
    """One text as ids, markers included. types: the segment of each (0 for all). key: texts with one key stay on one
    side of a split; by default the ids are it."""

    name: str
    ids: Sequence[int] | NDArray[Any]
    types: Sequence[int] | NDArray[Any] | None = None
    key: str | None = None


@dataclass(frozen=True)
class Texts:
    """N texts end to end, and where each begins."""

    ids: NDArray[np.int32]
    types: NDArray[np.int8] | None
    starts: Ints  # N + 1
    names: tuple[str, ...]
    keys: tuple[bytes, ...]
    pad_id: int

    @classmethod
    def of(cls, texts: Iterable[Text], pad_id: int) -> Texts:
        """All of `texts`; DataError where there is none, one is empty, or its types do not fit it."""
        kept = list(texts)
        if not kept:
            raise DataError("there is no example: every row was set aside")
        for text in kept:
            if not len(text.ids):
                raise DataError(f"{text.name} is empty: it has no token")
            if text.types is not None and len(text.types) != len(text.ids):
                raise DataError(f"{text.name} has {len(text.ids)} tokens and types for {len(text.types)}")
        ids = [np.asarray(text.ids, np.int32) for text in kept]
        types = None
        if any(text.types is not None for text in kept):
            parts = [np.zeros(len(text.ids)) if text.types is None else text.types for text in kept]
            types = np.concatenate(parts).astype(np.int8)
        # Once for a text: a long one has thousands of windows.
        encoded = {key: key.encode() for key in {text.key for text in kept} if key is not None}
        keys = tuple(
            part.tobytes() if text.key is None else encoded[text.key]
            for part, text in zip(ids, kept, strict=True)
        )
        together, starts = joined(ids, np.int32)
        return cls(together, types, starts, tuple(text.name for text in kept), keys, pad_id)

    def __len__(self) -> int:
        return len(self.names)

    def lengths(self, chosen: Ints) -> Ints:
        """The number of tokens of each."""
        return self.starts[chosen + 1] - self.starts[chosen]

    def tokens_of(self, number: int) -> NDArray[Any]:
        """The ids of one."""
        return self.ids[self.starts[number] : self.starts[number + 1]]

    def id_of(self, number: int) -> str:
        """Where it was read."""
        return self.names[number]

    @property
    def fingerprint(self) -> str:
        """Tells one set of texts from another."""
        return digest(self.ids, self.types, self.starts)

    def split(self, holdout: float) -> tuple[Ints, Ints]:
        """(training, held-out) numbers by the hash of their keys: equal ones stand on one side."""
        return apart(self.keys, holdout)

    def laid(self, rows: Sequence[Ints], shape: Shape) -> Laid:
        """These texts in the rows of a batch."""
        return lay(self.starts, rows, shape)

    def batch(self, laid: Laid, rows: Sequence[Row], shape: Shape, **more: Any) -> TaskBatch:
        """With nothing scored, unless `more` says what."""
        given: dict[str, Any] = {"tokens_BT": laid.taken(self.ids, self.pad_id, np.int64)}
        given["targets_BT"] = np.full(shape[:2], IGNORED, np.int64)
        if self.types is not None:
            given["types_BT"] = laid.taken(self.types, 0, np.int64)
        return made(laid, rows, shape, **{**given, **more})


def joined(parts: Sequence[NDArray[Any]], dtype: Any = np.int64) -> tuple[NDArray[Any], Ints]:
    """Arrays end to end, and where each begins."""
    starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype), starts


def digest(*things: Any) -> str:
    """Of arrays, dataclasses that hold some, and what repr tells apart."""
    sums = hashlib.sha256()
    for thing in things:
        if isinstance(thing, np.ndarray):
            sums.update(repr((thing.dtype.str, thing.shape)).encode() + thing.tobytes())
        elif is_dataclass(thing):
            sums.update(
                digest(type(thing).__name__, *(getattr(thing, f.name) for f in fields(thing))).encode()
            )
        else:
            sums.update(repr(thing).encode() + b"\0")
    return sums.hexdigest()


@dataclass(frozen=True, slots=True)
class Row:
    """The pieces of items that stand in a row. A piece is `sizes` places long and begins at place `firsts` of its item,
    0 where items are never cut. lot: seed and epoch, for what is left to chance."""

    numbers: Ints
    firsts: Ints
    sizes: Ints
    lot: tuple[int, int]

    def random(self, piece: int) -> np.random.Generator:
        """What chance decides about a piece in this epoch."""
        return np.random.default_rng((*self.lot, int(self.numbers[piece]), int(self.firsts[piece]), 1))


@dataclass(frozen=True, slots=True)
class Laid:
    """Texts in rows: each token's place in the array of all of them (-1: padding), its text's number within the row
    from 1 (0: padding), and its place in its text."""

    at_BT: Ints
    documents_BT: NDArray[np.int32]
    positions_BT: Ints

    def taken(self, values: NDArray[Any], empty: Any, dtype: Any) -> NDArray[Any]:
        """(B, T), each token's value."""
        return np.where(self.at_BT >= 0, values[self.at_BT], empty).astype(dtype)


def lay(starts: Ints, rows: Sequence[Ints], shape: Shape) -> Laid:
    """Texts, of which number n goes from starts[n] to starts[n + 1], into rows by their numbers."""
    at_BT = np.full(shape[:2], -1, np.int64)
    documents_BT, positions_BT = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], np.int64)
    for row, numbers in enumerate(rows):
        sizes = starts[numbers + 1] - starts[numbers]
        which, size = np.repeat(np.arange(len(numbers)), sizes), int(sizes.sum())
        places = np.arange(size) - (np.cumsum(sizes) - sizes)[which]
        at_BT[row, :size] = starts[numbers][which] + places
        documents_BT[row, :size], positions_BT[row, :size] = which + 1, places
    return Laid(at_BT, documents_BT, positions_BT)


@dataclass(frozen=True, slots=True)
class TaskBatch(Batch):
    """Rows of whole items; what a task has not is None.

    numbers_BP: which item of the source stands at each place of a row, -1: none; place p is document p + 1, or for
    pairs the documents from g·p + 1 on, g texts a group; `pairs_BP` are the same. targets_BT stand at the tokens
    themselves, or for a decoder at those before. types_BT: segments. labels_BP: class numbers, -1 where there is none;
    labels_BPC: 1 or 0 for each class, -1 unknown; values_BP: NaN where there is none. starts_BP, ends_BP: first and
    last token of an answer within its document, 0 and 0 without answer, -1 without document; allowed_BT: tokens that
    may be either. contents_BPG: numbers that equal texts of pairs share.
    """

    numbers_BP: Ints
    types_BT: Ints | None = None
    labels_BP: Ints | None = None
    labels_BPC: NDArray[np.int8] | None = None
    values_BP: NDArray[np.float32] | None = None
    starts_BP: Ints | None = None
    ends_BP: Ints | None = None
    allowed_BT: Bools | None = None
    encoder_tokens_BS: Ints | None = None
    encoder_documents_BS: NDArray[np.int32] | None = None
    encoder_positions_BS: Ints | None = None
    pairs_BP: Ints | None = None
    contents_BPG: Ints | None = None


def made(laid: Laid, rows: Sequence[Row], shape: Shape, **more: Any) -> TaskBatch:
    """A batch of what is laid out, and `more` of its fields."""
    numbers = [row.numbers for row in rows]
    sources = tuple(dict.fromkeys(number for row in numbers for number in row.tolist()))
    more |= {"documents_BT": laid.documents_BT, "positions_BT": laid.positions_BT, "sources": sources}
    return TaskBatch(**more, numbers_BP=placed(numbers, shape))


def placed(rows: Sequence[NDArray[Any]], shape: Shape, empty: Any = -1) -> NDArray[Any]:
    """(B, P, ...): what stands at each place of a row."""
    inner = rows[0].shape[1:] if rows else ()
    found = np.full((shape[0], shape[2], *inner), empty, rows[0].dtype if rows else np.int64)
    for row, values in enumerate(rows):
        found[row, : len(values)] = values
    return found


def tokens_of(batch: Batch) -> int:
    """Tokens that are read in a batch: for objectives that count something else."""
    more = getattr(batch, "encoder_documents_BS", None)
    return int((batch.documents_BT > 0).sum()) + (0 if more is None else int((more > 0).sum()))


class Source(Protocol):
    """N items by number. `predictions`: the places that each takes in a row, at most. `cut`: whether one may take more
    than a row has, and stands in several."""

    @property
    def pad_id(self) -> int: ...
    @property
    def cut(self) -> bool: ...
    def predictions(self, chosen: Ints) -> Ints: ...
    def identity(self) -> dict[str, Any]: ...
    def name(self, number: int) -> str: ...
    def batch(self, rows: Sequence[Row], shape: Shape) -> TaskBatch: ...


@dataclass(frozen=True, slots=True)
class _Dated(Pieces):
    epoch: int


class TaskRows(Packed):
    """Endless batches of a source's items, as Packed; a batch's shapes never change. DataError names an item that is
    longer than a row, where the source does not cut."""

    def __init__(
        self, source: Source, indices: Ints, length: int, rows: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self._items, shortest = source, 1
        if len(indices) and not source.cut:
            taken = source.predictions(indices)
            worst, shortest = int(taken.argmax()), max(1, int(taken.min()))
            if taken[worst] > length:
                raise DataError(
                    f"{source.name(int(indices[worst]))} takes {taken[worst]} places, and a row has {length}: "
                    "shorten it, leave it out or take longer rows"
                )
        self._places = max(1, length // shortest)
        # Packed asks a source for batches here and nowhere else, so it never copies single sequences.
        super().__init__(cast(Any, source), indices, length, rows, seed, rank, world)

    def _pack(self) -> Pieces:
        pieces = super()._pack()
        return _Dated(pieces.document, pieces.first, pieces.length, pieces.rows, self.epoch)

    def _fill(self, taken: list[tuple[Any, int]]) -> TaskBatch:
        rows = []
        for pieces, which in taken:
            cells = slice(pieces.rows[which], pieces.rows[which + 1])
            lot = (self._seed, pieces.epoch)
            rows.append(Row(pieces.document[cells], pieces.first[cells], pieces.length[cells], lot))
        return self._items.batch(rows, (self._rows, self._length, self._places))

    def once(self) -> Iterator[TaskBatch]:
        """The batches of the first epoch, from a fresh start on one rank; the last one's missing rows are empty."""
        taken: list[tuple[Any, int]] = []
        while not self.epoch:
            taken.append((self._pieces, self._row))
            self._row += 1
            if self._row == len(self._pieces.rows) - 1:
                self._advance()
            if len(taken) == self._rows or self.epoch:
                yield self._fill(taken)
                taken = []
