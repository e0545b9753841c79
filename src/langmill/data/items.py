"""Sources for `rows.TaskRows`: texts with labels, tags or answers, texts with their translations, and groups of texts.

Each is made by `of` from plain sequences, splits so that equal texts stand on one side, and names its items in errors.
N items, C classes; the arrays of a batch are those of `rows.TaskBatch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain, pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from langmill.common.errors import DataError, UsageError
from langmill.data.batches import IGNORED, Ints
from langmill.data.examples import apart
from langmill.data.rows import Bools, Row, Shape, TaskBatch, Text, Texts, digest, made, placed


@dataclass(frozen=True)
class _OfTexts:
    """What sources whose items are single texts have in common."""

    texts: Texts
    cut: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def pad_id(self) -> int:
        return self.texts.pad_id

    def name(self, number: int) -> str:
        """Where it was read."""
        return self.texts.names[number]

    def predictions(self, chosen: Ints) -> Ints:
        """The tokens of each."""
        return self.texts.lengths(chosen)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        others = [getattr(self, field.name) for field in fields(self) if field.name != "texts"]
        return {"examples": digest(self.texts.fingerprint, *others)}

    def split(self, holdout: float) -> tuple[Ints, Ints]:
        """(training, held-out) numbers; texts with equal keys stand on one side."""
        return self.texts.split(holdout)


@dataclass(frozen=True)
class Labelled(_OfTexts):
    """Texts with one class each (labels (N,) int64), any number of classes ((N, C) int8: 1, 0, or -1 where unknown), or
    a number ((N,) float32)."""

    labels: NDArray[Any]

    @classmethod
    def of(cls, texts: Iterable[Text], labels: ArrayLike, pad_id: int) -> Labelled:
        """DataError where there are not as many labels as texts, or a number is not finite."""
        kept, given = Texts.of(texts, pad_id), np.asarray(labels)
        if len(given) != len(kept) or given.ndim not in (1, 2):
            raise DataError(f"{len(kept)} texts and labels of shape {given.shape}")
        if given.ndim == 2:
            return cls(kept, given.astype(np.int8))
        if given.dtype.kind in "iub":
            return cls(kept, given.astype(np.int64))
        values = given.astype(np.float32)
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(f"{kept.names[bad]} has the value {given[bad]}, and a finite number is needed")
        return cls(kept, values)

    def batch(self, rows: Sequence[Row], shape: Shape) -> TaskBatch:
        numbers = [row.numbers for row in rows]
        labels = [self.labels[chosen] for chosen in numbers]
        if self.labels.ndim == 2:
            more = {"labels_BPC": placed(labels, shape)}
        elif self.labels.dtype == np.float32:
            more = {"values_BP": placed(labels, shape, np.nan)}
        else:
            more = {"labels_BP": placed(labels, shape)}
        return self.texts.batch(self.texts.laid(numbers, shape), rows, shape, **more)


@dataclass(frozen=True)
class Tagged(_OfTexts):
    """Texts with a class number for each token, -100 where none is scored."""

    tags: Ints  # end to end, as the texts' ids

    @classmethod
    def of(cls, texts: Iterable[Text], tags: Iterable[Sequence[int]], pad_id: int) -> Tagged:
        """DataError names a text that has not as many tags as tokens."""
        kept = Texts.of(texts, pad_id)
        return cls(kept, _for_each_token(kept, tags, "tags").astype(np.int64))

    def batch(self, rows: Sequence[Row], shape: Shape) -> TaskBatch:
        laid = self.texts.laid([row.numbers for row in rows], shape)
        targets_BT = laid.taken(self.tags, IGNORED, np.int64)
        return self.texts.batch(laid, rows, shape, targets_BT=targets_BT)


def _for_each_token(texts: Texts, values: Iterable[Sequence[Any]], what: str) -> NDArray[Any]:
    parts = [np.asarray(part) for part in values]
    if len(parts) != len(texts):
        raise DataError(f"{len(texts)} texts, and {what} for {len(parts)}")
    for number, (part, length) in enumerate(zip(parts, np.diff(texts.starts).tolist(), strict=True)):
        if len(part) != length:
            raise DataError(f"{texts.names[number]} has {length} tokens and {len(part)} {what}")
    return np.concatenate(parts)


@dataclass(frozen=True)
class Spanned(_OfTexts):
    """Texts with an answer in them: its first and last token (N, 2), 0 and 0 where there is none. `allowed` says which
    tokens may begin or end one, the first always; None: all."""

    spans: Ints
    allowed: Bools | None  # end to end, as the texts' ids

    @classmethod
    def of(
        cls,
        texts: Iterable[Text],
        spans: Sequence[tuple[int, int]] | Ints,
        pad_id: int,
        allowed: Iterable[Sequence[bool]] | None = None,
    ) -> Spanned:
        """DataError names a text whose answer is not within it, or begins or ends where none may."""
        kept, pairs = Texts.of(texts, pad_id), np.asarray(spans, np.int64).reshape(-1, 2)
        if len(pairs) != len(kept):
            raise DataError(f"{len(kept)} texts and {len(pairs)} answers")
        first, last = pairs.T
        wrong = (first < 0) | (last < first) | (last >= np.diff(kept.starts))
        table = None
        if allowed is not None:
            table = _for_each_token(kept, allowed, "marks").astype(np.bool_)
            table[kept.starts[:-1]] = True
            wrong[~wrong] = ~(
                table[(kept.starts[:-1] + first)[~wrong]] & table[(kept.starts[:-1] + last)[~wrong]]
            )
        if wrong.any():
            bad = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"{kept.names[bad]} has an answer from token {first[bad]} to {last[bad]}: none can be there"
            )
        return cls(kept, pairs, table)

    def batch(self, rows: Sequence[Row], shape: Shape) -> TaskBatch:
        numbers = [row.numbers for row in rows]
        laid = self.texts.laid(numbers, shape)
        starts_BP, ends_BP = (placed([self.spans[chosen, i] for chosen in numbers], shape) for i in (0, 1))
        allowed_BT = (
            laid.documents_BT > 0 if self.allowed is None else laid.taken(self.allowed, False, np.bool_)
        )
        return self.texts.batch(
            laid, rows, shape, starts_BP=starts_BP, ends_BP=ends_BP, allowed_BT=allowed_BT
        )


@dataclass(frozen=True)
class Translated:
    """Texts and what a decoder writes of them: it begins with `start_id` and learns every id of `written`.

    ratio: an encoder's row has ratio[0] places for every ratio[1] of the decoder's. An item is as long as its longer
    side, in places of the decoder's row.
    """

    read: Texts
    written: Texts
    start_id: int
    ratio: tuple[int, int] = (1, 1)
    cut: ClassVar[bool] = False

    @classmethod
    def of(
        cls,
        read: Iterable[Text],
        written: Iterable[Sequence[int]],
        start_id: int,
        pad_id: int,
        ratio: tuple[int, int] = (1, 1),
    ) -> Translated:
        """DataError where the sides are not as many, or either is empty; markers are given, but for `start_id`."""
        left = Texts.of(read, pad_id)
        ids = list(written)
        if len(ids) != len(left):
            raise DataError(f"{len(left)} texts, and {len(ids)} that are written of them")
        if min(ratio) < 1:
            raise UsageError(f"a ratio of {ratio[0]} to {ratio[1]} places cannot be")
        right = Texts.of((Text(name, part) for name, part in zip(left.names, ids, strict=True)), pad_id)
        return cls(left, right, start_id, ratio)

    def __len__(self) -> int:
        return len(self.read)

    @property
    def pad_id(self) -> int:
        return self.read.pad_id

    def name(self, number: int) -> str:
        """Where it was read."""
        return self.read.names[number]

    def predictions(self, chosen: Ints) -> Ints:
        """The places that each takes in the decoder's row."""
        many, few = self.ratio
        return np.maximum(self.written.lengths(chosen), -(-self.read.lengths(chosen) * few // many))

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        sides = self.read.fingerprint, self.written.fingerprint
        return {"examples": digest(*sides, self.start_id, self.ratio)}

    def split(self, holdout: float) -> tuple[Ints, Ints]:
        """(training, held-out) numbers: items that share a text on either side stand together."""
        return apart(linked(self.read.keys, self.written.keys), holdout)

    def batch(self, rows: Sequence[Row], shape: Shape) -> TaskBatch:
        numbers = [row.numbers for row in rows]
        return two_sided(self.read, self.written, self.start_id, self.ratio, numbers, rows, shape)


def two_sided(
    read: Texts,
    written: Texts,
    start_id: int,
    ratio: tuple[int, int],
    numbers: Sequence[Ints],
    rows: Sequence[Row],
    shape: Shape,
) -> TaskBatch:
    """A batch of what an encoder reads and a decoder writes, by the texts' `numbers` in each row."""
    wide = (shape[0], shape[1] * ratio[0] // ratio[1], shape[2])
    left, right = read.laid(numbers, wide), written.laid(numbers, shape)
    targets_BT = right.taken(written.ids, IGNORED, np.int64)
    tokens_BT = np.full_like(targets_BT, read.pad_id)
    tokens_BT[:, 1:] = np.where(right.documents_BT[:, 1:] > 0, targets_BT[:, :-1], read.pad_id)
    tokens_BT[(right.documents_BT > 0) & (right.positions_BT == 0)] = start_id
    return made(
        right, rows, shape, tokens_BT=tokens_BT, targets_BT=targets_BT,
        encoder_tokens_BS=left.taken(read.ids, read.pad_id, np.int64),
        encoder_documents_BS=left.documents_BT, encoder_positions_BS=left.positions_BT,
    )  # fmt: skip


@dataclass(frozen=True)
class Contrasted:
    """N groups of `size` texts each: an anchor, its positive, and perhaps hard negatives; group n is the texts from
    n·size on, and stands whole in a row. contents (N, size): numbers that equal texts share."""

    texts: Texts
    size: int
    contents: Ints
    cut: ClassVar[bool] = False

    @classmethod
    def of(cls, groups: Iterable[Sequence[Text]], pad_id: int) -> Contrasted:
        """DataError names a group of another size than the first, which has two texts or more."""
        kept = list(groups)
        size = len(kept[0]) if kept else 2
        for number, group in enumerate(kept):
            if len(group) != size or size < 2:
                name = group[0].name if len(group) else f"group {number}"
                raise DataError(
                    f"{name} has {len(group)} texts; an anchor, a positive and {size - 2} negatives are needed"
                )
        texts, seen = Texts.of(chain.from_iterable(kept), pad_id), dict[bytes, int]()
        cuts = pairwise(texts.starts.tolist())
        same = [seen.setdefault(texts.ids[first:end].tobytes(), len(seen)) for first, end in cuts]
        return cls(texts, size, np.array(same, np.int64).reshape(-1, size))

    def __len__(self) -> int:
        return len(self.texts) // self.size

    @property
    def pad_id(self) -> int:
        return self.texts.pad_id

    def name(self, number: int) -> str:
        """Where its anchor was read."""
        return self.texts.names[self.size * number]

    def members(self, chosen: Ints) -> Ints:
        """The numbers of their texts, group after group."""
        return (self.size * chosen[:, None] + np.arange(self.size)).reshape(-1)

    def predictions(self, chosen: Ints) -> Ints:
        """The tokens of each group."""
        return self.texts.lengths(self.members(chosen)).reshape(-1, self.size).sum(axis=1)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        return {"examples": digest(self.texts.fingerprint, self.size)}

    def split(self, holdout: float) -> tuple[Ints, Ints]:
        """(training, held-out) numbers: groups that share an anchor or positive stand together."""
        keys = self.texts.keys
        return apart(linked(keys[:: self.size], keys[1 :: self.size]), holdout)

    def batch(self, rows: Sequence[Row], shape: Shape) -> TaskBatch:
        numbers = [row.numbers for row in rows]
        laid = self.texts.laid([self.members(chosen) for chosen in numbers], shape)
        contents_BPG = placed([self.contents[chosen] for chosen in numbers], shape)
        return self.texts.batch(laid, rows, shape, pairs_BP=placed(numbers, shape), contents_BPG=contents_BPG)


def linked(*columns: Sequence[bytes]) -> list[bytes]:
    """A key for each item, the same for all that are linked by a text that they share, in whichever column."""
    root = list(range(len(columns[0])))

    def find(item: int) -> int:
        while root[item] != item:
            root[item] = item = root[root[item]]
        return item

    first: dict[bytes, int] = {}
    for column in columns:
        for item, key in enumerate(column):
            root[find(item)] = find(first.setdefault(key, item))
    least: dict[int, bytes] = {}
    for item, key in enumerate(columns[0]):
        least[find(item)] = min(key, least.get(find(item), key))
    return [least[find(item)] for item in range(len(root))]
