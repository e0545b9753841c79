"""Preferences from files, and pairs of sequences packed whole into rows.

    {"prompt", "chosen", "rejected"}        {"chosen", "rejected"}, two conversations or texts that begin alike
    {"prompt", "completion", "label": true or false}, for KTO

Prompts and answers are texts, or lists of messages. A row that is none of these is set aside with its reason.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import DataError
from langmill.data.batches import Batch, Ints, Packed
from langmill.data.chats import Row, parse
from langmill.data.examples import Examples, apart
from langmill.text.turns import ASSISTANT, Example

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """A prompt with the answer that was preferred and the one that was not."""

    chosen: Row
    rejected: Row


@dataclass(frozen=True)
class Rated:
    """A prompt with one answer that is good, or is not."""

    answer: Row
    good: bool


@dataclass(frozen=True)
class Item:
    """A pair as ids. KTO's example has label 1 or -1 and, in the place of `rejected`, its prompt with the answer to
    another one."""

    name: str
    chosen: Example
    rejected: Example
    label: int = 1


def parse_preference(where: str, row: Any) -> Pair | Rated:
    """One row; DataError says what is wrong with it."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row is a JSON object with chosen and rejected, not {type(row).__name__}")
    if "chosen" in row and "rejected" in row:
        return _pair(where, row)
    if "completion" in row and "label" in row:
        if row["label"] not in (True, False):
            raise DataError(
                f"label is {row['label']!r}, and is true for a good answer or false for a bad one"
            )
        return Rated(_answer(where, row, row.get("prompt"), row["completion"]), bool(row["label"]))
    known = "prompt, chosen and rejected, or prompt, completion and label"
    there = ", ".join(map(str, list(row)[:20])) or "nothing"
    more = " (conversations are for --task chat)" if "messages" in row or "conversations" in row else ""
    raise DataError(f"a row has {known}; this one has {there}{more}")


def _pair(where: str, row: Mapping[str, Any]) -> Pair:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise DataError("chosen and rejected are both text, or both lists of messages")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same")
    if prompt is None or (isinstance(prompt, str) and _whole(chosen)):
        shared = _shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise DataError("there is no prompt, and chosen and rejected do not begin alike")
        if not chosen or not rejected:
            raise DataError(f"{'rejected' if chosen else 'chosen'} is but the beginning of the other")
    return Pair(_answer(where, row, prompt, chosen), _answer(where, row, prompt, rejected))


def _whole(messages: Any) -> bool:
    """Whether a list of messages holds its prompt: it begins with another turn than an answer."""
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, Mapping) and first.get("role") not in ASSISTANT


def _shared(chosen: Any, rejected: Any) -> int:
    """How much both begin with. Texts part at the white space before they differ, so that no word is cut."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    count = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if isinstance(chosen, str) and count < min(len(chosen), len(rejected)):
        spaces = [found.start() for found in re.finditer(r"\s", chosen[:count])]
        return spaces[-1] if spaces and spaces[-1] else count
    return count


def _answer(where: str, row: Mapping[str, Any], prompt: Any, answer: Any) -> Row:
    """A prompt and its answer as a conversation whose last turns are learnt from. Where one is text and the other
    messages, the text is a turn of its own."""
    if isinstance(prompt, str) and isinstance(answer, list):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return parse(where, {"prompt": prompt, "completion": answer, "tools": row.get("tools")})


def crossed(items: Sequence[tuple[str, Example, bool]], length: int) -> Iterator[Item]:
    """KTO's examples: each with the answer of the one before it, cut where both are longer than `length` predictions.

    Good ones come first, so that the two answers to one prompt are no neighbours.
    """
    ordered = sorted(items, key=lambda item: not item[2])
    for (name, example, good), (_, other, _) in zip(ordered, [ordered[-1], *ordered[:-1]], strict=True):
        cut, start = example.trained.index(True), other.trained.index(True)
        ids = (example.ids[:cut] + other.ids[start:])[: length + 1]
        trained = (example.trained[:cut] + other.trained[start:])[: length + 1]
        mixed = Example(ids, trained) if len(ids) > 1 else example
        yield Item(name, example, mixed, 1 if good else -1)


@dataclass(frozen=True)
class Pairs:
    """N pairs: sequences 2i and 2i + 1 of `examples`, the chosen one first. `labels`: see Item. `reference`: summed
    log-probabilities (N, 2) of what is trained in each, by the model that training begins with."""

    examples: Examples
    labels: NDArray[np.int8]
    reference: Floats

    @classmethod
    def of(cls, items: Iterable[Item], pad_id: int) -> Pairs:
        """All of `items`, their reference still zero; DataError where there is none."""
        kept = list(items)
        both = [(item.name, example) for item in kept for example in (item.chosen, item.rejected)]
        labels = np.array([item.label for item in kept], np.int8)
        return cls(Examples.of(both, pad_id), labels, np.zeros((len(kept), 2), np.float32))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pad_id(self) -> int:
        return self.examples.pad_id

    def name(self, pair: int) -> str:
        """Where it was read."""
        return self.examples.names[2 * pair]

    def sequences(self, chosen: Ints) -> Ints:
        """The numbers of their sequences in `examples`."""
        return np.stack([2 * chosen, 2 * chosen + 1], axis=1).reshape(-1)

    def predictions(self, chosen: Ints) -> Ints:
        """Of both sequences together."""
        return self.examples.predictions(self.sequences(chosen)).reshape(-1, 2).sum(axis=1)

    def copy(self, sequence: int, first: int, inputs: Ints, targets: Ints) -> None:
        """Both sequences of a pair, one behind the other; a pair is never cut, so `first` is 0."""
        at, starts = 0, self.examples.starts
        for number in (2 * sequence, 2 * sequence + 1):
            ids = self.examples.ids[starts[number] : starts[number + 1]]
            inputs[at : at + len(ids) - 1], targets[at : at + len(ids) - 1] = ids[:-1], ids[1:]
            at += len(ids) - 1

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        digest = hashlib.sha256(self.labels.tobytes() + self.reference.tobytes())
        return {**self.examples.identity(), "labels and reference": digest.hexdigest()}

    def split(self, holdout: float) -> tuple[Ints, Ints]:
        """(training, held-out) numbers by the hash of the prompt, so that no prompt stands on both sides."""
        starts, examples = self.examples.starts, self.examples
        prompts = []
        for first in starts[:-1:2].tolist():
            before = int(examples.trained[first:].argmax())
            prompts.append(examples.ids[first : first + before].tobytes())
        return apart(prompts, holdout)


@dataclass(frozen=True, slots=True)
class PairBatch(Batch):
    """Rows of whole pairs, P = T/2 places for them in a row. Place p's chosen sequence is document 2p + 1 and its
    rejected one document 2p + 2; `targets_BT` are all that follows, of which `scored_BT` is learnt. `numbers_BP` is -1
    and `labels_BP` 0 where there is no pair."""

    scored_BT: NDArray[np.bool_]
    reference_BP2: Floats
    labels_BP: NDArray[np.int8]
    numbers_BP: Ints


class PairRows(Packed):
    """Endless batches of pairs, as Packed. `length`: at least the predictions of any pair, and even."""

    def __init__(self, pairs: Pairs, indices: Ints, length: int, rows: int, seed: int) -> None:
        if len(indices) and (length % 2 or int(pairs.predictions(indices).max()) > length):
            raise DataError(f"a row of {length} predictions cannot hold every pair whole")
        self._pairs = pairs
        super().__init__(pairs, indices, length, rows, seed)

    def _fill(self, taken: list[tuple[Any, int]]) -> PairBatch:
        plain, pairs = super()._fill(taken), self._pairs
        documents_BT, positions_BT = np.zeros_like(plain.documents_BT), np.zeros_like(plain.positions_BT)
        scored_BT = np.zeros(documents_BT.shape, np.bool_)
        places = (len(documents_BT), documents_BT.shape[1] // 2)
        reference_BP2, labels_BP = np.zeros((*places, 2), np.float32), np.zeros(places, np.int8)
        numbers_BP = np.full(places, -1, np.int64)
        for row, (pieces, which) in enumerate(taken):
            held = pieces.document[pieces.rows[which] : pieces.rows[which + 1]]
            reference_BP2[row, : len(held)] = pairs.reference[held]
            labels_BP[row, : len(held)], numbers_BP[row, : len(held)] = pairs.labels[held], held
            at, starts = 0, pairs.examples.starts
            for document, sequence in enumerate(pairs.sequences(held).tolist(), 1):
                first, size = starts[sequence] + 1, int(starts[sequence + 1] - starts[sequence]) - 1
                cells = (row, slice(at, at + size))
                documents_BT[cells], positions_BT[cells] = document, np.arange(size)
                scored_BT[cells] = pairs.examples.trained[first : first + size]
                at += size
        return PairBatch(
            plain.tokens_BT, plain.targets_BT, documents_BT, positions_BT, plain.sources, scored_BT, reference_BP2,
            labels_BP, numbers_BP,
        )  # fmt: skip


def pairs_once(pairs: Pairs, chosen: Ints, length: int) -> Iterator[Batch]:
    """Every one of the chosen pairs once, a packed row at a time."""
    return PairRows(pairs, chosen, length, rows=1, seed=0).once()
