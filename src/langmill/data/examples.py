"""Examples with a loss mask, held in memory, as sequences that `batches.Packed` packs like documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import DataError
from langmill.data.batches import IGNORED, Batch, Ints, Packed
from langmill.data.chats import Unusable
from langmill.text.turns import Example


@dataclass(frozen=True)
class Examples:
    """N examples end to end: `ids` and `trained` (5 bytes a token), where each begins, and its name."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    starts: Ints  # N + 1
    names: tuple[str, ...]
    pad_id: int

    @classmethod
    def of(cls, named: Iterable[tuple[str, Example]], pad_id: int) -> Examples:
        """All of `named`; DataError where there is none."""
        names, parts, masks = [], [], []
        for name, example in named:
            names.append(name)
            parts.append(np.asarray(example.ids, np.int32))
            masks.append(np.asarray(example.trained, np.bool_))
        if not parts:
            raise DataError("there is no example to train on: every row was set aside")
        starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(np.concatenate(parts), np.concatenate(masks), starts, tuple(names), pad_id)

    def __len__(self) -> int:
        return len(self.names)

    def example(self, number: int) -> Example:
        """One of them."""
        cells = slice(self.starts[number], self.starts[number + 1])
        return Example(self.ids[cells].tolist(), self.trained[cells].tolist())

    def predictions(self, chosen: Ints) -> Ints:
        """Every token but the first is predicted, whether it is trained or not."""
        return self.starts[chosen + 1] - self.starts[chosen] - 1

    def copy(self, sequence: int, first: int, inputs: Ints, targets: Ints) -> None:
        start, size = int(self.starts[sequence]) + first, len(inputs)
        inputs[:] = self.ids[start : start + size]
        after = slice(start + 1, start + 1 + size)
        targets[:] = np.where(self.trained[after], self.ids[after], IGNORED)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        digest = hashlib.sha256(self.ids.tobytes() + self.trained.tobytes() + self.starts.tobytes())
        return {"examples": digest.hexdigest()}

    def split(self, holdout: float) -> tuple[Ints, Ints]:
        """(training, held-out) numbers by the hash of the ids, so that equal examples stand on one side.

        With `holdout` above 0 and two different examples neither side is empty.
        """
        cuts = zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)
        return apart([self.ids[first:end].tobytes() for first, end in cuts], holdout)

    def trained_tokens(self, chosen: Ints) -> int:
        """Tokens that the loss counts, in these examples."""
        return sum(int(self.trained[self.starts[i] + 1 : self.starts[i + 1]].sum()) for i in chosen.tolist())


def hash_of(content: bytes) -> int:
    """By which it is decided on which side of a split a content stands; it fits a signed word."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def apart(contents: Iterable[bytes], holdout: float) -> tuple[Ints, Ints]:
    """(training, held-out) numbers by the hash of each content, so that equal ones stand on one side."""
    every = list(contents)
    digests = {content: hash_of(content) for content in set(every)}
    hashes = np.array([digests[content] for content in every], dtype=np.int64)
    order = np.unique(hashes)
    none = holdout == 0 or len(order) < 2
    count = 0 if none else min(len(order) - 1, max(1, round(holdout * len(order))))
    held = np.isin(hashes, order[len(order) - count :])
    return np.flatnonzero(~held), np.flatnonzero(held)


def once(examples: Examples, chosen: Ints, length: int) -> Iterator[Batch]:
    """Every prediction of the chosen examples once, a packed row at a time."""
    return Packed(examples, chosen, length, rows=1, seed=0).once()


def fitted(example: Example, length: int, policy: str, counted: dict[str, int]) -> Example:
    """The example, if it has at most `length` predictions. `policy` says what becomes of a longer one: drop; truncate,
    which keeps the beginning where some of it is trained; split, which trains on all of it in pieces that do not see
    each other. `counted` is told how many were "truncated" and "split"; one that is dropped raises Unusable.
    """
    if len(example.ids) <= length + 1:
        return example
    if policy == "split":
        counted["split"] += 1
        return example
    if policy == "truncate" and any(example.trained[1 : length + 1]):
        counted["truncated"] += 1
        return Example(example.ids[: length + 1], example.trained[: length + 1])
    raise Unusable("longer than train.max_length", f"{len(example.ids)} tokens, and a row has {length}")


def shown(pieces: Sequence[str], trained: Sequence[bool], colour: bool) -> str:
    """An example as text with its trained stretches in green, or between ⟦ and ⟧ where there is no colour."""
    on, off = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    text, inside = "", False
    for piece, is_trained in zip(pieces, trained, strict=True):
        text += (on if is_trained else off) * (is_trained != inside) + piece
        inside = is_trained
    return text + off * inside
