"""Many texts as one array of characters: words, lines and their hashes for a whole batch, without a loop over rows.

R rows, N characters of all rows with one between each two, W words or lines (spans). Bounds are (R + 1,) indices:
the spans of row r are bounds[r] to bounds[r + 1].

Words are counted as spaCy's English rules count them, near enough that what is judged by counts is judged alike:
punctuation at either end of a run without white space is a word for each character (dots and ellipses for each run),
hyphens, slashes and the like split between letters, and so do "n't", "'s" and other short forms; addresses with "://"
and abbreviations with dots stay whole. Characters written without spaces between words (Han, kana, Thai, ...) are
words of their own where `single` is true.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Reals = NDArray[np.float64]
Hashes = NDArray[np.uint64]

SPACE, BREAK, LETTER, WORDLY, OPEN, CLOSE, INNER, ALWAYS = (1 << i for i in range(8))
LOWER, UPPER, DIGIT, QUOTE, END, LONE, OTHER, NAME = (1 << i for i in range(8, 16))
_CLASSES = {
    SPACE: r"\s\x1c-\x1f",
    BREAK: r"\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029",  # what str.splitlines() breaks at
    LETTER: r"\p{L}",
    # What begins a word no more than a comma does: punctuation, the signs of ASCII and control characters.
    WORDLY: r"^\s\p{P}\p{Cc}$+<=>^`|~´＋＜＝＞｜～",
    OPEN: r"\p{Sc}\p{Ps}\p{Pe}\p{Pi}\p{Pf}<>,:;!?¿؟¡_#*&§%=—–·।،۔؛٪。？！，、；：～\"'`´",
    CLOSE: r"\p{Ps}\p{Pe}\p{Pi}\p{Pf}<>,:;!?¿؟¡_#*&—–·।،۔؛٪。？！，、；：～\"'`´",
    INNER: r"\-–—~:<>=/,.+*^",
    ALWAYS: r"…\p{So}",
    LOWER: r"\p{Ll}\p{Lo}\p{Lm}",
    UPPER: r"\p{Lu}\p{Lt}\p{Lo}\p{Lm}",
    DIGIT: r"\p{Nd}",
    QUOTE: r"\"'`´\p{Pi}\p{Pf}",
    END: r"\p{Sentence_Terminal}．｡",
    OTHER: r"^\s\p{P}",  # neither white space nor punctuation
    NAME: r"\p{L}\p{M}\p{N}",
    LONE: r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}",
}
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_MIX = np.uint64(0xD6E8FEB86659FD93)
_LOWER = bytes(range(128)).lower() + b"\xff" * 128
_DOT, _PLUS, _PERCENT, _COLON, _SLASH, _QUOTE, _RIGHT_QUOTE = map(ord, ".+%:/'’")


@lru_cache(maxsize=1)
def classes() -> NDArray[np.uint16]:
    """(0x110000,) the classes of each character, as bits."""
    every = _every()
    table = np.zeros(0x110000, np.uint16)
    for bit, members in _CLASSES.items():
        for found in regex.finditer(f"[{members}]+", every):
            table[found.start() : found.end()] |= bit
    return table


def _every() -> str:
    """All characters, with NUL for the surrogates, which are none."""
    return "".join(map(chr, range(0xD800))) + "\0" * 0x800 + "".join(map(chr, range(0xE000, 0x110000)))


@lru_cache(maxsize=1)
def lower_case() -> NDArray[np.uint32]:
    """(0x110000,) each character in lower case, where that is one character."""
    table = np.arange(0x110000, dtype=np.uint32)
    for letter in regex.findall(r"[\p{Lu}\p{Lt}]", _every()):
        lower = letter.lower()
        table[ord(letter)] = ord(lower) if len(lower) == 1 else ord(letter)
    return table


@lru_cache(maxsize=1)  # those for a very long text are not held on to
def _powers(size: int) -> tuple[Hashes, Hashes]:
    """(size,) powers of the base and of its inverse, modulo 2**64."""
    found = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        factors = np.full(size, base, np.uint64)
        factors[0] = 1
        found.append(np.multiply.accumulate(factors))
    return found[0], found[1]


@dataclass(frozen=True, slots=True)
class Spans:
    """(W,) where spans start and end (exclusive), in order, and (R + 1,) the bounds of each row's."""

    starts: Ints
    ends: Ints
    bounds: Ints

    @property
    def lengths(self) -> Ints:
        """(W,) in characters."""
        return self.ends - self.starts

    @property
    def counts(self) -> Ints:
        """(R,) how many spans each row has."""
        return np.diff(self.bounds)

    def where(self, chosen: Bools) -> Spans:
        """Those that are true in `chosen` (W,)."""
        total = np.concatenate(([0], np.cumsum(chosen)))
        return Spans(self.starts[chosen], self.ends[chosen], total[self.bounds])

    @property
    def rows(self) -> Ints:
        """(W,) the row of each."""
        return np.repeat(np.arange(len(self.bounds) - 1), self.counts)


def sums(values: NDArray[Any], bounds: Ints) -> Ints:
    """(R,) of (W,) values; 0 for a row without any."""
    total = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=total[1:])
    return total[bounds[1:]] - total[bounds[:-1]]


def longer(grams: Hashes, words: Hashes) -> Hashes:
    """Hashes of n + 1 words in a row, from those of n and of the words that follow each."""
    mixed = grams[: len(words)] * _MIX
    return (mixed ^ (mixed >> np.uint64(29))) + words


class Texts:
    """Texts as one array. `single`: characters of scripts without spaces are words of their own.

    `fold`: hashes do not tell capitals. `blank`: what it finds is taken for white space. About 80 bytes of memory
    for each character.
    """

    def __init__(
        self,
        rows: Sequence[str],
        *,
        single: bool = False,
        fold: bool = False,
        blank: re.Pattern[str] | None = None,
    ) -> None:
        self.joined = "\0".join(["", *rows, ""])
        self.codes_N = np.frombuffer(self.joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        self.lengths_R = np.fromiter(map(len, rows), np.int64, len(rows))
        self.ends_R = np.cumsum(self.lengths_R + 1)
        self.starts_R = self.ends_R - self.lengths_R
        self.flags_N = classes().take(self.codes_N)
        self.flags_N[self.ends_R] = SPACE
        self.flags_N[0] = SPACE
        self.blanks: list[tuple[int, int]] = []
        if blank is not None:
            for found in blank.finditer(self.joined):
                self.blanks.append(found.span())
                self.flags_N[found.start() : found.end()] = SPACE
        self.single = single
        self._fold = fold

    def __len__(self) -> int:
        return len(self.lengths_R)

    def at(self, positions: Ints) -> Ints:
        """(R + 1,) bounds of each row among sorted positions of characters."""
        return np.concatenate((np.searchsorted(positions, self.starts_R), [len(positions)]))

    def count(self, positions: Ints) -> Ints:
        """(R,) how many of the sorted positions lie in each row."""
        return np.diff(self.at(positions))

    def find(self, character: str) -> Ints:
        """Where a character stands."""
        return np.flatnonzero(self.codes_N == ord(character))

    def lower(self) -> bytes:
        """(N,) a byte for each character: ASCII in lower case, 255 for all others."""
        return np.minimum(self.codes_N, 255).astype(np.uint8).tobytes().translate(_LOWER)

    @cached_property
    def runs(self) -> Spans:
        """What str.split() gives."""
        space = (self.flags_N & SPACE) != 0
        starts = np.flatnonzero(space[:-1] & ~space[1:]) + 1
        ends = np.flatnonzero(~space[:-1] & space[1:]) + 1
        return Spans(starts, ends, self.at(starts))

    @cached_property
    def words(self) -> Spans:
        """Words as the top of this file says."""
        space = (self.flags_N & SPACE) != 0
        cut = self._cuts(space)
        starts = np.flatnonzero(~space[1:] & (space[:-1] | cut[1:])) + 1
        ends = np.flatnonzero(~space[:-1] & (space[1:] | cut[1:])) + 1
        return Spans(starts, ends, self.at(starts))

    @cached_property
    def names(self) -> Spans:
        """Runs of letters, digits and marks; characters of scripts without spaces each on their own."""
        flags = self.flags_N
        inside = (flags & NAME) != 0
        lone = (flags & LONE) != 0 if (flags & LONE).any() else None
        if lone is None:
            first, last = inside[1:] & ~inside[:-1], inside[:-1] & ~inside[1:]
        else:
            first = inside[1:] & (~inside[:-1] | lone[1:] | lone[:-1])
            last = inside[:-1] & (~inside[1:] | lone[1:] | lone[:-1])
        starts = np.flatnonzero(first) + 1
        return Spans(starts, np.flatnonzero(last) + 1, self.at(starts))

    @cached_property
    def word_flags(self) -> NDArray[np.uint16]:
        """(W,) the classes of all characters of each word; white space has none that is asked for here."""
        starts = self.words.starts
        if not len(starts):
            return np.zeros(0, np.uint16)
        found: NDArray[np.uint16] = np.bitwise_or.reduceat(self.flags_N, starts)
        return found

    def lines(self, breaks: Ints) -> Spans:
        """What lies between breaks (sorted positions of single characters), as str.split gives it."""
        starts = np.sort(np.concatenate((self.starts_R, breaks + 1)))
        ends = np.sort(np.concatenate((self.ends_R, breaks)))
        return Spans(starts, ends, self.at(starts))

    def split_lines(self) -> Spans:
        """What str.splitlines() gives; "\\r" stays where "\\n" follows it."""
        breaks = np.flatnonzero(self.flags_N & BREAK)
        codes = self.codes_N
        breaks = breaks[~((codes[breaks] == 13) & (codes[breaks + 1] == 10))]
        lines = self.lines(breaks)
        last = np.zeros(len(lines.starts), bool)
        last[lines.bounds[1:] - 1] = True
        return lines.where(~(last & (lines.starts == lines.ends)))

    def hashes(self, spans: Spans) -> Hashes:
        """(W,) 64 bits of each span: equal for equal texts (whatever case, if `fold`), and for hardly any others."""
        _, inverses = _powers(_size(len(self.codes_N)))
        sums_N = self._sums
        return (sums_N[spans.ends] - sums_N[spans.starts]) * inverses[spans.starts]

    @cached_property
    def _sums(self) -> Hashes:
        """(N + 1,) sums of the characters before each place, times powers of the base."""
        powers, _ = _powers(_size(len(self.codes_N)))
        total = np.zeros(len(self.codes_N) + 1, np.uint64)
        codes = lower_case().take(self.codes_N) if self._fold else self.codes_N
        np.cumsum(codes * powers[: len(codes)], out=total[1:])
        return total

    def _cuts(self, space: Bools) -> Bools:
        """(N,) true where a word starts within a run without white space."""
        codes, flags = self.codes_N, self.flags_N
        cut = np.zeros(len(codes) + 1, bool)
        asked = OPEN | CLOSE | INNER | ALWAYS | QUOTE | (LONE if self.single else 0)
        at = np.flatnonzero(flags & asked)
        at = at[~space[at]]  # never the first or last, which are white space
        code, own, before, after = codes[at], flags[at], flags[at - 1], flags[at + 1]
        dots = (code == _DOT) & ((codes[at - 1] == _DOT) | (codes[at + 1] == _DOT))
        always = dots | ((own & ALWAYS) != 0)
        opening = always | ((own & OPEN) != 0) | ((code == _PLUS) & ((after & DIGIT) == 0))
        closing = always | ((own & CLOSE) != 0) | self._closing_dots(at, code, before)
        closing |= ((code == _PERCENT) | (code == _PLUS)) & ((before & DIGIT) != 0)
        inner = always | self._inner(at, code, before, after)
        if self.single:
            inner |= (own & LONE) != 0
        chosen = inner | _reaching(at, opening, space, -1) | _reaching(at, closing, space, 1)
        # A run of dots is one word: it is cut before its first and behind its last only.
        first = ~dots | (codes[at - 1] != _DOT)
        last = ~dots | (codes[at + 1] != _DOT)
        cut[at[chosen & first]] = True
        cut[at[chosen & last] + 1] = True
        cut[self._short_forms(at[(code == _QUOTE) | (code == _RIGHT_QUOTE)])] = True
        return cut[:-1]

    def _closing_dots(self, at: Ints, code: NDArray[np.uint32], before: NDArray[np.uint16]) -> Bools:
        """Dots that end a word: not those of e.g. and U.S."""
        codes, flags = self.codes_N, self.flags_N
        earlier = np.maximum(at - 2, 0)
        usual = (before & (LOWER | DIGIT | QUOTE | CLOSE)) != 0
        usual |= np.isin(codes[at - 1], [ord(c) for c in "%+-²"])
        usual |= ((before & UPPER) != 0) & ((flags[earlier] & UPPER) != 0)
        dotted = (codes[earlier] == _DOT) & ((before & LETTER) != 0)
        return (code == _DOT) & usual & ~dotted

    def _inner(
        self, at: Ints, code: NDArray[np.uint32], before: NDArray[np.uint16], after: NDArray[np.uint16]
    ) -> Bools:
        """Signs that split a word between the characters on both sides of them."""
        letter, digit = (before & LETTER) != 0, (before & DIGIT) != 0
        found = np.isin(code, [ord(c) for c in "-–—~:<>=/"]) & (letter | digit) & ((after & LETTER) != 0)
        found |= (code == ord(",")) & letter & ((after & LETTER) != 0)
        found |= (code == _DOT) & ((before & (LOWER | QUOTE)) != 0) & ((after & (UPPER | QUOTE)) != 0)
        signs = np.isin(code, [ord(c) for c in "+-*^"]) & digit
        found |= signs & (((after & DIGIT) != 0) | (self.codes_N[at + 1] == ord("-")))
        codes = self.codes_N
        colons = at[(code == _COLON) & (codes[at + 1] == _SLASH)]
        addresses = colons[codes[np.minimum(colons + 2, len(codes) - 1)] == _SLASH]
        if len(addresses):
            run = np.searchsorted(self.runs.starts, at, "right")
            found &= ~np.isin(run, np.searchsorted(self.runs.starts, addresses, "right"))
        return found

    def _short_forms(self, quotes: Ints) -> Ints:
        """Where the second word of it's, don't, we'll and the like starts."""
        flags, codes = self.flags_N, self.codes_N
        quotes = quotes[((flags[quotes - 1] & LETTER) != 0) & ((flags[quotes + 1] & LETTER) != 0)]
        found = []
        for quote in quotes.tolist():
            rest = self.joined[quote + 1 : quote + 4].lower()
            ends = re.match(r"(?:s|d|m|t|ll|re|ve)(?![^\W_])", rest)
            if ends and not (rest[0] == "t" and codes[quote - 1] | 32 != ord("n")):
                found.append(quote - (rest[0] == "t"))
        return np.array(found, np.int64)


def _reaching(at: Ints, chosen: Bools, space: Bools, step: int) -> Bools:
    """Which of the chosen characters reach white space on one side (-1, 1) by chosen ones alone."""
    places = at[chosen]
    found = np.zeros(len(at), bool)
    if not len(places):
        return found
    new = np.concatenate(([True], np.diff(places) != 1))
    run = np.cumsum(new) - 1
    if step < 0:
        outer = places[new]
    else:
        outer = places[np.concatenate((new[1:], [True]))]
    found[np.flatnonzero(chosen)] = space[outer + step][run]
    return found


def _size(length: int) -> int:
    """One size for all but very long texts."""
    return max(1 << 20, 1 << length.bit_length())
