"""Gopher's rules of repetition (Rae et al. 2021, arXiv:2112.11446, table A1) as a step over batches.

Thresholds and their meaning are datatrove's. R rows, W words; a gram is known by the hash of its words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from langmill.data.characters import Bools, Hashes, Ints, Spans, Texts, longer, sums
from langmill.data.judge import Verdict, above, judge

if TYPE_CHECKING:
    import pyarrow as pa

TOP = ((2, 0.20), (3, 0.18), (4, 0.16))
DUPLICATE = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
_PARAGRAPHS, _LINES = re.compile(r"\n{2,}"), re.compile(r"\n+")
_LAST = (1 << 32) - 1
_STEP = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class GopherRepetition:
    """Drops texts that say the same again: shares of lines, paragraphs and of the characters in them and in n-grams.

    `top`: (n, most): share of characters in the most frequent n-gram. `duplicate`: share of characters in n-grams
    that were there before, none counted twice. A threshold that is None, or an empty tuple, switches its rule off.
    """

    max_lines: float | None = 0.30
    max_paragraphs: float | None = 0.30
    max_line_characters: float | None = 0.20
    max_paragraph_characters: float | None = 0.20
    top: tuple[tuple[int, float], ...] = TOP
    duplicate: tuple[tuple[int, float], ...] = DUPLICATE
    single: bool = False  # characters of scripts without spaces are words of their own
    name: str = "gopher_repetition"

    def __call__(self, batch: pa.Table) -> pa.Table:
        return judge(batch, self.name, self.judge, by_characters=self.single)

    def judge(self, rows: list[str]) -> Verdict:
        """(R,) which rows fail, for each reason."""
        texts = Texts(rows, single=self.single)
        size = np.maximum(texts.lengths_R, 1)
        reasons = {"empty": texts.lengths_R == 0}
        for what, spans, most, most_characters in (
            ("paragraphs", paragraphs(texts), self.max_paragraphs, self.max_paragraph_characters),
            ("lines", lines(texts), self.max_lines, self.max_line_characters),
        ):
            count, characters = repeated_characters(spans, texts.hashes(spans))
            reasons[f"repeated {what}"] = above(count / np.maximum(spans.counts, 1), most)
            reasons[f"characters in repeated {what}"] = above(characters / size, most_characters)
        grams = Grams(texts)
        for n, most in self.top:
            reasons[f"most frequent {n}-gram"] = grams.top(n) / size > most
        open_R = ~np.logical_or.reduce(list(reasons.values()))
        reasons |= self._duplicates(grams, size, open_R)
        return Verdict(reasons)

    def _duplicates(self, grams: Grams, size: Ints, open_R: Bools) -> dict[str, Bools]:
        """The exact count goes gram by gram, so only rows that may fail are counted."""
        found = {}
        for n, most in self.duplicate:
            failing = open_R & (grams.covered(n) / size > most)
            rows = np.flatnonzero(failing)
            failing[rows] = [grams.repeated(row, n) / size[row] > most for row in rows.tolist()]
            found[f"repeated {n}-grams"] = failing
            open_R = open_R & ~failing
        return found


class Grams:
    """The n-grams of words of many texts. Those of one n are held at a time: ask for each n in turn, from the least."""

    def __init__(self, texts: Texts) -> None:
        self.words = texts.words
        self.bounds = texts.words.bounds
        self._gap = 0 if texts.single else 1  # characters between words
        self.lengths_W = self.words.lengths
        self.before_W = np.concatenate(
            ([0], np.cumsum(self.lengths_W))
        )  # characters in the words before each
        self.hashes_W = texts.hashes(self.words)
        self.rows_W = self.words.rows
        self.left_W = self.bounds[1:][self.rows_W] - np.arange(
            len(self.rows_W)
        )  # words from each to its row's end
        self._start()

    def _start(self) -> None:
        self._n, self._grams = 0, self.hashes_W
        self._again: tuple[Ints, Ints, Ints] | None = None

    def again(self, n: int) -> tuple[Ints, Ints, Ints]:
        """Places of all n-grams that their row has more than once, in order; of each its row's first, and how many."""
        if n < self._n:
            self._start()
        while self._n < n:
            self._n += 1
            if self._n > 1:
                self._grams = longer(self._grams, self.hashes_W[self._n - 1 :])
            if self._n > 1 or n == 1:  # single words are not worth while as a step to pairs
                self._again = self._find(self._n)
        assert self._again is not None
        return self._again

    def _find(self, n: int) -> tuple[Ints, Ints, Ints]:
        if self._again is None:
            places = np.flatnonzero(self.left_W >= n)
        else:  # what occurs twice begins and ends with what occurs twice
            shorter = self._again[0]
            following = np.searchsorted(shorter, shorter + 1)
            both = np.append(shorter, -1)[following] == shorter + 1
            places = shorter[both & (self.left_W[shorter] >= n)]
        if not len(places):
            return places, places, places
        keys = self._grams[places] + self.rows_W[places].astype(np.uint64) * np.uint64(0xA0761D6478BD642F)
        # The place in the low bits: one fast sort brings equal ones together and in order.
        bits = np.uint64(int(places[-1]).bit_length())
        keys ^= keys >> np.uint64(32)
        keys = np.sort(((keys * _STEP) >> bits << bits) | places.astype(np.uint64))
        sorted_places = (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
        keys >>= bits
        new = np.concatenate(([True], keys[1:] != keys[:-1]))
        starts = np.flatnonzero(new)
        counts = np.diff(np.append(starts, len(keys)))
        first_W, count_W = np.zeros(len(self.rows_W), np.int64), np.zeros(len(self.rows_W), np.int64)
        first_W[sorted_places] = np.repeat(sorted_places[starts], counts)
        count_W[sorted_places] = np.repeat(counts, counts)
        found = np.flatnonzero(count_W > 1)
        return found, first_W[found], count_W[found]

    def top(self, n: int) -> Ints:
        """(R,) characters of the most frequent n-gram (of several the first), times how often it is there."""
        counts = np.diff(self.bounds)
        found = np.where(
            counts >= n, self._size(np.minimum(self.bounds[:-1], len(self.lengths_W)), n, counts), 0
        )
        places, firsts, several = self.again(n)
        own = places == firsts
        places, several = places[own], several[own]
        if len(places):
            rows = self.rows_W[places]
            starts = np.flatnonzero(np.concatenate(([True], rows[1:] != rows[:-1])))
            best = np.maximum.reduceat((several << 32) + _LAST - places, starts)  # of equal counts the first
            found[rows[starts]] = self._span(_LAST - (best & _LAST), n) * (best >> 32)
        return found

    def _span(self, places: Ints, n: int) -> Ints:
        """Characters of the n-grams at these places, with the spaces between words."""
        return self.before_W[places + n] - self.before_W[places] + (n - 1) * self._gap

    def _size(self, firsts: Ints, n: int, counts: Ints) -> Ints:
        last = np.minimum(firsts + n, len(self.lengths_W))
        return self.before_W[last] - self.before_W[firsts] + (n - 1) * self._gap

    def covered(self, n: int) -> Ints:
        """(R,) characters in n-grams that their row had before: no count of longer ones is more."""
        places, firsts, _ = self.again(n)
        later = places[places != firsts]
        edge = np.zeros(len(self.lengths_W) + 1, np.int64)
        edge[later] += 1
        edge[later + n] -= 1
        return sums(self.lengths_W * (np.cumsum(edge)[:-1] > 0), self.bounds)

    def repeated(self, row: int, n: int) -> int:
        """Characters in n-grams that the row had before; the words of one that is counted begin no other."""
        places, firsts, _ = self.again(n)  # no other n-gram comes into it
        own = slice(*np.searchsorted(places, self.bounds[row : row + 2]).tolist())
        seen: set[int] = set()
        free, total = 0, 0
        for place, first in zip(places[own].tolist(), firsts[own].tolist(), strict=True):
            if place < free:
                continue
            if first in seen:
                total += int(self.before_W[place + n] - self.before_W[place])
                free = place + n
            seen.add(first)
        return total


def repeated_characters(spans: Spans, hashes: Hashes) -> tuple[Ints, Ints]:
    """(R,) how many spans of each row it had before, and their characters."""
    order = np.lexsort((hashes, spans.rows))  # stable: the first of equal ones stays the first
    same = np.zeros(len(order), bool)
    if len(order):
        rows, sorted_hashes = spans.rows[order], hashes[order]
        same[1:] = (rows[1:] == rows[:-1]) & (sorted_hashes[1:] == sorted_hashes[:-1])
    again = np.zeros(len(order), bool)
    again[order] = same
    return sums(again, spans.bounds), sums(spans.lengths * again, spans.bounds)


def lines(texts: Texts) -> Spans:
    """Between runs of line breaks; an empty one before the first break or behind the last counts."""
    return _between(texts, 1, texts.starts_R, texts.ends_R)


def paragraphs(texts: Texts) -> Spans:
    """Between two or more line breaks, of the text without white space at its ends."""
    runs = texts.runs
    filled = runs.counts > 0
    starts, ends = texts.starts_R.copy(), texts.starts_R.copy()
    starts[filled] = runs.starts[runs.bounds[:-1][filled]]
    ends[filled] = runs.ends[runs.bounds[1:][filled] - 1]
    return _between(texts, 2, starts, ends)


def _between(texts: Texts, least: int, starts_R: Ints, ends_R: Ints) -> Spans:
    """Spans between runs of at least so many line breaks, from the starts to the ends of rows."""
    breaks = texts.find("\n")
    row = np.searchsorted(starts_R, breaks, "right") - 1
    breaks = breaks[(row >= 0) & (breaks < ends_R[row])]
    new = np.concatenate(([True], np.diff(breaks) != 1)) if len(breaks) else np.zeros(0, bool)
    firsts, lasts = breaks[new], breaks[np.append(new[1:], True)] if len(breaks) else breaks
    long = lasts - firsts + 1 >= least
    starts = np.sort(np.concatenate((starts_R, lasts[long] + 1)))
    ends = np.sort(np.concatenate((ends_R, firsts[long])))
    return Spans(starts, ends, np.append(np.searchsorted(starts, starts_R), len(starts)))
