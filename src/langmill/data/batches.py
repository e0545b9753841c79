"""Batches: whole sequences packed into rows of equal length, with boundaries, in a resumable order.

A document of the shards is the sequence [start, tokens..., boundary]; it predicts every token but the start. Examples
of another kind (conversations with a loss mask) come from a source of their own. What fits into a row is never cut; a
longer one gives full rows and a tail, which is packed like the rest (best-fit packing: Ding et al. 2024,
arXiv:2404.10830). Order and packing follow from the seed alone, block by block, so that neither memory nor the time to
the first batch grows with the corpus.

B rows, T predictions in a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import CheckpointError, DataError, UsageError
from langmill.data.shards import Shards

Ints = NDArray[np.int64]
IGNORED = -100
# Packed together: quick to pack, and at least so many rows that a last one half full is no matter.
_BLOCK_TOKENS, _BLOCK_DOCUMENTS, _BLOCK_ROWS = 1 << 22, 8192, 16


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed documents.

    `targets_BT` is -100 where nothing is predicted. `documents_BT` numbers the documents of a row from 1
    (0: padding); attention must stay inside one. `positions_BT` counts from 0 in each. `sources` are the
    numbers of the documents in the shards.
    """

    tokens_BT: Ints
    targets_BT: Ints
    documents_BT: NDArray[np.int32]
    positions_BT: Ints
    sources: tuple[int, ...]


class Sequences(Protocol):
    """What is packed, by number. `identity` tells one set of sequences from another, as JSON."""

    @property
    def pad_id(self) -> int: ...

    def predictions(self, chosen: Ints) -> Ints:
        """How many tokens each of them predicts."""

    def copy(self, sequence: int, first: int, inputs: Ints, targets: Ints) -> None:
        """Write predictions `first` and those after it: the tokens that are seen, and those that follow."""

    def identity(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Documents:
    """The documents of shards as sequences."""

    shards: Shards
    start_id: int
    boundary_id: int
    pad_id: int

    def predictions(self, chosen: Ints) -> Ints:
        return self.shards.lengths(chosen) + 1

    def copy(self, sequence: int, first: int, inputs: Ints, targets: Ints) -> None:
        ids, size = self.shards.tokens_of(sequence), len(inputs)
        inside = ids[first : first + size]  # one short where the piece ends with the boundary
        targets[: len(inside)] = inside
        if len(inside) < size:
            targets[-1] = self.boundary_id
        inputs[0] = ids[first - 1] if first else self.start_id
        inputs[1:] = ids[first : first + size - 1]

    def identity(self) -> dict[str, Any]:
        return {"tokenizer": self.shards.fingerprint}


@dataclass(frozen=True, slots=True)
class Pieces:
    """Stretches of documents: predictions `first` to `first + length` of `document`, end to end by row."""

    document: Ints
    first: Ints
    length: Ints
    rows: Ints  # where each row's pieces begin, and the end


def pack(lengths: Ints, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: which items (none longer than `capacity`) share a row.

    An item goes where it leaves the least room. `open_rows` keeps the rows by the room that is left,
    and the bits of `rooms` say which kinds of room exist, so that finding one costs a shift.
    """
    rows: list[list[int]] = []
    open_rows: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(item)
        if room > length:
            open_rows[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


def _packed(documents: Ints, predictions: Ints, length: int, order: np.random.Generator) -> Pieces:
    """Cut documents into pieces of at most `length` predictions, pack them, and shuffle the rows."""
    counts = -(-predictions // length)
    owner = np.repeat(np.arange(len(documents)), counts)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    sizes = np.minimum(predictions[owner] - nth * length, length)
    full = np.flatnonzero(sizes == length)
    rest = np.flatnonzero(sizes < length)
    rows = [[item] for item in full.tolist()] + [rest[row].tolist() for row in pack(sizes[rest], length)]
    rows = [rows[i] for i in order.permutation(len(rows))]
    items = np.array([item for row in rows for item in row], dtype=np.int64)
    bounds = np.cumsum([0, *map(len, rows)])
    return Pieces(documents[owner[items]], nth[items] * length, sizes[items], bounds)


def shuffled(positions: Ints, size: int, key: int) -> Ints:
    """Where a fixed random permutation of range(size), chosen by `key`, sends `positions`.

    A Feistel network over the next power of four, walked until it lands inside: no table is kept, so an
    epoch over 100 million documents costs no memory and starts at once (Black and Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    values = np.asarray(positions).astype(np.uint64)
    todo = np.arange(len(values))
    digest = hashlib.blake2b(key.to_bytes(16, "little"), digest_size=32).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    while len(todo):
        left, right = values[todo] >> np.uint64(half), values[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[todo] = left << np.uint64(half) | right
        todo = todo[values[todo] >= size]
    return values.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Packed:
    """Endless batches of `rows` rows of `length` predictions, epoch after epoch, for one of `world` ranks.

    `indices` are the sequences of `source` to use. Every token and boundary of them is predicted exactly once an
    epoch; a batch may hold the end of one epoch and the start of the next. At each step the ranks take
    neighbouring rows of one stream, so together they see what a single process would. `state` at any
    batch border, given to `restore`, brings back exactly the batches that follow.
    """

    def __init__(
        self,
        source: Sequences,
        indices: Ints,
        length: int,
        rows: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(indices) == 0:
            raise DataError("there is no document to train on")
        if length < 1 or rows < 1 or not 0 <= rank < world:
            raise UsageError(f"cannot make {rows} rows of {length} tokens for rank {rank} of {world}")
        self._source = source
        self._indices, self._length, self._rows, self._seed = indices, length, rows, seed
        self._rank, self._world = rank, world
        self.tokens_per_epoch = _predictions(source, indices)
        mean = max(1, self.tokens_per_epoch // len(indices))
        usual = min(_BLOCK_TOKENS // mean, _BLOCK_DOCUMENTS)
        self._block_documents = max(1, usual, _BLOCK_ROWS * length // mean)
        self._blocks = -(-len(indices) // self._block_documents)
        self.epoch = self._block = self._row = 0
        self._pieces = self._pack()
        seen = int(self._pieces.length.sum())
        rows_seen = len(self._pieces.rows) - 1
        self.fill = seen / (rows_seen * length)  # share of the first block's positions that predict
        self.rows_per_epoch = max(1, round(rows_seen * self.tokens_per_epoch / seen))

    def _pack(self) -> Pieces:
        first = self._block * self._block_documents
        places = np.arange(first, min(first + self._block_documents, len(self._indices)))
        chosen = self._indices[shuffled(places, len(self._indices), self._seed << 40 ^ self.epoch)]
        order = np.random.default_rng((self._seed, self.epoch, self._block))
        return _packed(chosen, self._source.predictions(chosen), self._length, order)

    def __iter__(self) -> Packed:
        return self

    def __next__(self) -> Batch:
        """The next batch of this rank; there is always one."""
        mine = range(self._rank * self._rows, (self._rank + 1) * self._rows)
        taken: list[tuple[Pieces, int]] = []
        for row in range(self._rows * self._world):
            if self._row == len(self._pieces.rows) - 1:
                self._advance()
            if row in mine:
                taken.append((self._pieces, self._row))
            self._row += 1
        return self._fill(taken)

    def once(self) -> Iterator[Batch]:
        """The batches of the first epoch, from a fresh start; exact where `rows` and `world` are 1."""
        for batch in self:
            if self.epoch:
                return
            yield batch

    def _advance(self) -> None:
        self._block, self._row = self._block + 1, 0
        if self._block == self._blocks:
            self.epoch, self._block = self.epoch + 1, 0
        self._pieces = self._pack()

    def _identity(self) -> dict[str, Any]:
        return {
            "documents": len(self._indices),
            "tokens": self.tokens_per_epoch,
            "length": self._length,
            "seed": self._seed,
            **self._source.identity(),
        }

    def state(self) -> dict[str, Any]:
        """The place in the stream, as JSON: the same for all ranks."""
        return {"epoch": self.epoch, "block": self._block, "row": self._row, "of": self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` gave. CheckpointError where it came from other data or settings."""
        mine = self._identity()
        for name, value in state["of"].items():
            if mine.get(name) != value:
                raise CheckpointError(
                    f"the checkpoint's data had {name} {value} and this run has {mine.get(name)}: "
                    "resume with the same data and settings, or start anew"
                )
        self.epoch, self._block, self._row = state["epoch"], state["block"], state["row"]
        self._pieces = self._pack()

    def _fill(self, taken: list[tuple[Pieces, int]]) -> Batch:
        shape = (self._rows, self._length)
        tokens_BT = np.full(shape, self._source.pad_id, dtype=np.int64)
        targets_BT = np.full(shape, IGNORED, dtype=np.int64)
        documents_BT = np.zeros(shape, dtype=np.int32)
        positions_BT = np.zeros(shape, dtype=np.int64)
        sources: dict[int, None] = {}
        count = np.arange(self._length)
        for row, (pieces, which) in enumerate(taken):
            at = 0
            for segment, piece in enumerate(range(pieces.rows[which], pieces.rows[which + 1]), 1):
                sequence, size = int(pieces.document[piece]), int(pieces.length[piece])
                cells = (row, slice(at, at + size))
                self._source.copy(sequence, int(pieces.first[piece]), tokens_BT[cells], targets_BT[cells])
                documents_BT[cells] = segment
                positions_BT[cells] = count[:size]
                sources[sequence] = None
                at += size
        return Batch(tokens_BT, targets_BT, documents_BT, positions_BT, tuple(sources))


def _predictions(source: Sequences, indices: Ints) -> int:
    """Predictions of all sequences, summed in pieces that fit the cache."""
    step = 1 << 20
    pieces = (indices[first : first + step] for first in range(0, len(indices), step))
    return sum(int(source.predictions(piece).sum()) for piece in pieces)
