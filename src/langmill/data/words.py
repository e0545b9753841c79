"""A step that counts words of lists in each text, says so in its meta, and drops texts that hold too many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from langmill.common.errors import DataError, UsageError
from langmill.data.characters import Hashes, Ints, Texts
from langmill.data.decontaminate import each_gram
from langmill.data.judge import chunks
from langmill.data.meta import told

if TYPE_CHECKING:
    import pyarrow as pa

_LONG = 50  # words of an entry


@dataclass(frozen=True)
class Words:
    """Says how many of a text's words are in each list, as meta's "words": {name: count}, where there are any.

    lists: (name, file) pairs; a file is UTF-8 and holds a word or a phrase a line, # begins a remark. Case and
    punctuation do not count. A Chinese, Japanese or Thai entry is found wherever its characters stand in a row: these
    scripts put no spaces between words. at_most: (name, n): texts with more than n in a thousand words are dropped.
    DataError, on first use, for a file that cannot be read or is empty.
    """

    lists: tuple[tuple[str, str], ...]
    at_most: tuple[tuple[str, float], ...] = field(default=())
    name: str = "words"

    def read(self) -> dict[str, dict[int, Hashes]]:
        """The lists by name; read once in a process."""
        return {name: _entries(file) for name, file in self.lists}

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        dropped, meta = batch["dropped"].to_pylist(), batch["meta"].to_pylist()
        asked = np.flatnonzero(batch["dropped"].is_null().to_numpy())
        most = dict(self.at_most)
        for rows, texts in chunks(batch["text"].combine_chunks(), asked):
            read = Texts(texts, fold=True)
            words_R = read.names.counts
            counts = {name: _count(read, entries) for name, entries in self.read().items()}
            for place, row in enumerate(rows.tolist()):
                own = {name: int(counts_R[place]) for name, counts_R in counts.items() if counts_R[place]}
                if own:
                    meta[row] = told(meta[row], "words", own)
                for name, count in own.items():
                    if dropped[row] is None and count > most.get(name, np.inf) * words_R[place] / 1000:
                        dropped[row] = f"{self.name}: too many of the list {name}"
        for name, column in (("meta", meta), ("dropped", dropped)):
            batch = batch.set_column(batch.column_names.index(name), name, pa.array(column, pa.string()))
        return batch


def _count(texts: Texts, entries: dict[int, Hashes]) -> Ints:
    """(R,) entries of a list in each text."""
    found = np.zeros(len(texts), np.int64)
    bounds, rows_W = texts.names.bounds, texts.names.rows
    left_W = bounds[1:][rows_W] - np.arange(len(rows_W))
    for n, hashes in each_gram(texts, max(entries)):
        if (wanted := entries.get(n)) is not None and len(hashes):
            place = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
            hit = (wanted[place] == hashes) & (left_W[: len(hashes)] >= n)
            found += np.bincount(rows_W[: len(hashes)][hit], minlength=len(texts))
    return found


@lru_cache(maxsize=16)
def _entries(file: str) -> dict[int, Hashes]:
    """Sorted hashes of a list's entries, by their number of words."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the word list {file} cannot be read: {error}") from None
    texts = Texts([line.partition("#")[0] for line in lines], fold=True)
    counts = texts.names.counts
    if len(lines) and counts.max(initial=0) > _LONG:
        number = int(counts.argmax()) + 1
        raise DataError(f"{file}:{number} has {counts.max()} words: an entry has {_LONG} at most, one a line")
    found = {}
    for n, hashes in each_gram(texts, int(counts.max(initial=0))):
        if (rows := np.flatnonzero(counts == n)).size:
            found[n] = np.unique(hashes[texts.names.bounds[rows]])
    if not found:
        raise DataError(f"the word list {file} holds no word")
    return found


def pairs(given: Sequence[str], name: str) -> list[tuple[str, str]]:
    """The settings NAME=VALUE; UsageError where one is none."""
    found = [one.partition("=") for one in given]
    for one, (left, equals, right) in zip(given, found, strict=True):
        if not (left.isidentifier() and equals and right):
            raise UsageError(f"{name} '{one}' is not NAME=VALUE with a NAME of letters and digits")
    return [(left, right) for left, _, right in found]
