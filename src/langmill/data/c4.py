"""C4's rules (Raffel et al. 2020, arXiv:1910.10683, section 2.2) as a step, and a step that joins wrapped lines.

Rules and their meaning are datatrove's: lines that end no sentence are left out, and texts with too little left. Signs
of more scripts than Latin end a sentence.
Hard-wrapped prose loses nearly all of its lines that way: put `JoinLines` first where texts are wrapped.
R rows, L lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from langmill.common.errors import UsageError
from langmill.data.characters import END, LETTER, OTHER, Bools, Ints, Spans, Texts, sums
from langmill.data.judge import Verdict, below, judge

if TYPE_CHECKING:
    import pyarrow as pa

CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
ENDS = (".", "?", "!", '"', "'", *"\u0964\u0965\u061f\u06d4\u1362")  # of Hindi, Arabic, Urdu, Amharic too
POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


@dataclass(frozen=True)
class C4:
    """Leaves out lines that end no sentence, are short, or speak of Javascript or cookies; drops what is left of code,
    placeholder text and texts of few sentences. Marks of citations go out of the lines that stay.

    A field that is None switches its rule off; the strings are looked for in lower case.
    """

    ends: tuple[str, ...] | None = ENDS  # a line must end with one, and not with an ellipsis
    min_sentences: int | None = 5
    min_words: int | None = 3  # of a line
    max_word_length: int | None = 1000  # of the longest word of a line
    javascript: bool = True  # lines with the word are left out
    policies: tuple[str, ...] = POLICIES  # in ASCII: lines with one are left out
    citations: bool = True
    lorem_ipsum: bool = True  # texts with it are dropped
    curly_brackets: bool = True
    single: bool = False  # characters of scripts without spaces are words of their own
    name: str = "c4"

    def __post_init__(self) -> None:
        for phrase in self.policies:
            if not phrase or not phrase.isascii():
                raise UsageError(f"C4's policies are looked for as ASCII text, and {phrase!r} is none")

    def __call__(self, batch: pa.Table) -> pa.Table:
        return judge(batch, self.name, self.judge, by_characters=self.single)

    def judge(self, rows: list[str]) -> Verdict:
        """(R,) which rows fail, for each reason, and the texts without the lines that were left out."""
        texts = Texts(rows, single=self.single, blank=CITATION if self.citations else None)
        lines = texts.split_lines()
        lower = texts.lower()
        good = self._good(texts, lines)
        lorem = good & _with(texts, lines, lower, ["lorem ipsum"] * self.lorem_ipsum)
        kept = good & ~_with(texts, lines, lower, ["javascript"] * self.javascript)
        curly = kept & _with(texts, lines, lower, ["{"] * self.curly_brackets)
        kept &= ~_with(texts, lines, lower, self.policies)
        sentences = sums(_sentences(texts, lines) * kept, lines.bounds)
        first = _first(lorem, lines) <= _first(curly, lines)  # the reason that a reader meets first
        has_lorem, has_curly = sums(lorem, lines.bounds) > 0, sums(curly, lines.bounds) > 0
        reasons = {
            "lorem ipsum": has_lorem & (first | ~has_curly),
            "curly bracket": has_curly,
            "too few sentences": below(sentences, self.min_sentences),
        }
        failing = np.logical_or.reduce(list(reasons.values()))
        return Verdict(reasons, _left(texts, lines, kept, ~failing, rows))

    def _good(self, texts: Texts, lines: Spans) -> Bools:
        """(L,) lines that end a sentence and have enough words, none of them too long."""
        runs = texts.runs
        first = np.searchsorted(runs.starts, lines.starts)
        after = np.searchsorted(runs.starts, lines.ends)
        words, filled = after - first, after > first
        ended = np.zeros(len(words), bool)
        last = runs.ends[after[filled] - 1]
        ended[filled] = _ends(texts, last, self.ends or ())
        for line in np.unique(np.searchsorted(lines.starts, _starts(texts.blanks), "right") - 1).tolist():
            text = texts.joined[lines.starts[line] : lines.ends[line]].strip()
            words[line] = len(text.split())
            text = CITATION.sub("", text)
            ended[line] = text.endswith(self.ends or ()) and not text.endswith("...")
        if self.single:
            words = np.diff(np.searchsorted(texts.words.starts, np.append(lines.starts, len(texts.codes_N))))
        good = ended if self.ends is not None else np.ones(len(words), bool)
        if self.min_words is not None:
            good &= words >= self.min_words
        if self.max_word_length is not None:
            long = runs.starts[runs.lengths > self.max_word_length]
            good[np.searchsorted(lines.starts, long, "right") - 1] = False
        return good


@dataclass(frozen=True)
class JoinLines:
    """Joins lines that were broken at a margin: a line of at least `width` characters and the one that follows it,
    unless that is indented or begins with no letter (lists, tables, headings' underlines). No text is dropped."""

    width: int = 50
    name: str = "join_lines"

    def __call__(self, batch: pa.Table) -> pa.Table:
        return judge(batch, self.name, self.judge, by_characters=None)

    def judge(self, rows: list[str]) -> Verdict:
        """No reasons: new texts of the rows in which lines were joined."""
        texts = Texts(rows)
        breaks = texts.find("\n")
        lines = texts.lines(breaks)
        wide = lines.ends[lines.lengths >= self.width]
        wide = wide[(texts.codes_N[wide] == ord("\n"))]
        wide = wide[(texts.flags_N[wide + 1] & LETTER) != 0]
        codes = texts.codes_N.copy()
        codes[wide] = ord(" ")
        found = np.flatnonzero(texts.count(wide)).tolist()
        spans = [(row, texts.starts_R[row], texts.ends_R[row]) for row in found]
        return Verdict({}, {row: codes[a:b].tobytes().decode("utf-32-le") for row, a, b in spans})


def _starts(blanks: list[tuple[int, int]]) -> Ints:
    return np.array([start for start, _ in blanks], np.int64)


def _ends(texts: Texts, ends: Ints, wanted: tuple[str, ...]) -> Bools:
    """Which of the places follow a wanted ending and no ellipsis of dots."""
    codes = texts.codes_N
    found = np.zeros(len(ends), bool)
    single = [ord(ending) for ending in wanted if len(ending) == 1]
    found |= np.isin(codes[ends - 1], single)
    longer = tuple(ending for ending in wanted if len(ending) > 1)
    if longer:
        longest = max(map(len, longer))
        found |= [texts.joined[max(0, end - longest) : end].endswith(longer) for end in ends.tolist()]
    before, earlier = codes[ends - 2], codes[np.maximum(ends - 3, 0)]
    dots = (codes[ends - 1] == 46) & (before == 46) & (earlier == 46)
    return found & ~dots


def _with(texts: Texts, lines: Spans, lower: bytes, phrases: Sequence[str]) -> Bools:
    """(L,) lines that hold one of the phrases, which are ASCII."""
    found = np.zeros(len(lines.starts), bool)
    places = []
    for phrase in phrases:
        wanted = phrase.lower().encode("ascii")
        at = lower.find(wanted)
        while at >= 0:
            places.append(at)
            at = lower.find(wanted, at + 1)
    found[np.searchsorted(lines.starts, np.array(places, np.int64), "right") - 1] = True
    return found


def _first(chosen: Bools, lines: Spans) -> Ints:
    """(R,) the first chosen line of each row; beyond all where there is none."""
    places = np.append(np.flatnonzero(chosen), len(chosen))
    first: Ints = places[np.searchsorted(places[:-1], lines.bounds[:-1])]
    return first


def _sentences(texts: Texts, lines: Spans) -> Ints:
    """(L,) sentences: one, and one more for each word behind a sign that ends a sentence, as spaCy counts them."""
    words, flags = texts.words, texts.word_flags
    ending = (words.lengths == 1) & ((flags & END) != 0)
    ended = np.concatenate(([0], np.cumsum(ending)))
    bounds = np.append(np.searchsorted(words.starts, lines.starts), len(words.starts))
    wordly = np.flatnonzero((flags & OTHER) != 0)
    line = np.searchsorted(bounds, wordly, "right") - 1
    before = np.concatenate(([0], ended[wordly[:-1]])) if len(wordly) else wordly
    new_line = np.concatenate(([True], line[1:] != line[:-1])) if len(wordly) else np.zeros(0, bool)
    before = np.where(new_line, ended[bounds[line]], before)
    more = ended[wordly] > before
    filled = np.diff(bounds) > 0
    return np.bincount(line[more], minlength=len(lines.starts)) + filled


def _left(texts: Texts, lines: Spans, kept: Bools, rows: Bools, old: list[str]) -> dict[int, str]:
    """The kept lines of the rows asked for, without white space around them and marks of citations."""
    blank = np.zeros(len(kept), bool)
    blank[np.searchsorted(lines.starts, _starts(texts.blanks), "right") - 1] = True
    joined, changed = texts.joined, {}
    for row in np.flatnonzero(rows).tolist():
        start, end = lines.bounds[row], lines.bounds[row + 1]
        own = np.flatnonzero(kept[start:end]) + start
        pieces = [
            CITATION.sub("", joined[a:b].strip()) if has else joined[a:b].strip()
            for a, b, has in zip(
                lines.starts[own].tolist(), lines.ends[own].tolist(), blank[own].tolist(), strict=True
            )
        ]
        text = "\n".join(pieces).strip()
        if text != old[row]:
            changed[row] = text
    return changed
