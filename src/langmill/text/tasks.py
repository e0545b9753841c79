"""How a task's text becomes model inputs and targets: shared by training and use.

Here is what the tasks have in common: cutting, and what becomes of a text that is longer than a model reads. Each task
has a file of its own: classify.py, tag.py, answer.py, translate.py; `encode_texts` alone serves embeddings too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import DataError, UsageError
from langmill.text.frames import Encoded
from langmill.text.tokenizer import Tokenizer

READS = 512  # tokens of a text at once, where a model could read more: attention's cost grows with the square
POLICIES = ("error", "truncate", "window")
Text = str | tuple[str, str]


class TooLong(DataError):
    """A text that is longer than a model reads, under the policy "error"; `reason` is what a ledger counts it under."""

    reason = "longer than the model reads"


@dataclass(frozen=True, slots=True)
class Limit:
    """The most tokens of one document, special ones included, and what becomes of a longer text.

    policy: "error" raises TooLong; "truncate" keeps its beginning; "window" makes several documents of it, each of
    which begins with the last `overlap` tokens of the one before (what transformers calls the stride).
    """

    length: int
    policy: str = "error"
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(
                f'there is no policy "{self.policy}" for long texts: choose {", ".join(POLICIES)}'
            )
        if self.length < 1 or self.overlap < 0:
            raise UsageError(
                f"a document of {self.length} tokens, of which {self.overlap} overlap, cannot be"
            )

    def cuts(self, count: int, room: int, what: str, counted: Counter[str]) -> list[tuple[int, int]]:
        """(first, end) of each part of `count` tokens where `room` fit; `counted` is told of the texts "truncated" and
        "windowed", of the "windows" made of them, and of the "tokens cut off"."""
        if count <= room:
            return [(0, count)]
        if room < 1 or self.policy == "error":
            raise TooLong(self.says(count, room, what))
        if self.policy == "truncate":
            counted["truncated"] += 1
            counted["tokens cut off"] += count - room
            return [(0, room)]
        found = overlapping(count, room, self.overlap)
        counted["windowed"] += 1
        counted["windows"] += len(found)
        return found

    def says(self, count: int, room: int, what: str, cure: str = "truncate or window") -> str:
        """The message about a text that does not fit; `cure`: the policies that help."""
        if room < 1:
            return f"{what}: what stands beside it leaves no room for its {count} tokens in {self.length}"
        return (
            f"{what} has {count} tokens, and the model reads {room} of a text beside the special ones: "
            f"choose {cure} for long texts, or shorten it"
        )


def overlapping(count: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """(first, end) of parts of at most `room` that cover `count` tokens, each beginning `overlap` before the end of the
    last. An overlap of more than half of `room` counts as half, so that windows advance."""
    step = room - min(overlap, room // 2)
    return [(first, min(first + room, count)) for first in range(0, max(1, count - room + step), step)]


def encode_texts(
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    limit: Limit,
    counted: Counter[str],
    first: int = 0,
    names: Sequence[str] | None = None,
) -> list[Encoded]:
    """The documents of texts and pairs of texts, in order; those of text i have the number `first` + i.

    Of a pair that is too long, "truncate" takes tokens off the longer text until both are of one length, then off both
    (what transformers calls longest first), and "window" moves over the longer text, the other one whole in each.
    DataError where a text gives no token at all, TooLong as the limit says; both say `names` of the texts where given.
    `counted` as `Limit.cuts`, and of the "empty texts", which give special tokens alone.
    """
    frame = tokenizer.frame
    parts = [text for item in texts for text in ((item,) if isinstance(item, str) else item)]
    ids = iter(tokenizer.encode_batch(parts))
    found: list[Encoded] = []
    for number, text in enumerate(texts, first):
        what = names[number - first] if names else f"text {number + 1}"
        if isinstance(text, str):
            one, room = next(ids), limit.length - frame.room()
            made = [frame.one(one[a:b], number) for a, b in limit.cuts(len(one), room, what, counted)]
        else:
            made = list(_pair(tokenizer, next(ids), next(ids), limit, counted, what))
        if not made[0].ids:
            raise DataError(f"{what} is empty: it gives no token")
        if not made[0].first and not made[0].second:
            counted["empty texts"] += 1
        found += [replace(encoded, number=number) for encoded in made]
    return found


def _pair(
    tokenizer: Tokenizer, one: list[int], two: list[int], limit: Limit, counted: Counter[str], what: str
) -> Iterator[Encoded]:
    frame = tokenizer.frame
    room = limit.length - frame.room(pair=True)
    if len(one) + len(two) > room and limit.policy == "truncate" and room > 1:
        counted["truncated"] += 1
        counted["tokens cut off"] += len(one) + len(two) - room
        longer = max(room - min(len(one), len(two)), room - room // 2)
        fit = (room - longer, longer) if len(one) <= len(two) else (longer, room - longer)
        yield frame.two(one[: fit[0]], two[: fit[1]])
    elif len(one) <= len(two):
        for a, b in limit.cuts(len(two), room - len(one), what, counted):
            yield frame.two(one, two[a:b])
    else:
        for a, b in limit.cuts(len(one), room - len(two), what, counted):
            yield frame.two(one[a:b], two)


def windows(
    ids: Sequence[int] | NDArray[Any], length: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Cut one sequence [start, tokens..., boundary] into (inputs, targets) of at most `length` predictions.

    Every token but the first is a target exactly once; the inputs of a window start with the last target
    of the window before it. A sequence of fewer than two ids predicts nothing and gives no window.
    """
    if length < 1:
        raise ValueError(f"a window needs at least one prediction, not {length}")
    sequence = np.asarray(ids, dtype=np.int64)
    inputs, targets = sequence[:-1], sequence[1:]
    return [(inputs[i : i + length], targets[i : i + length]) for i in range(0, len(targets), length)]
