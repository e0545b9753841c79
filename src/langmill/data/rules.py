"""Quality rules of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1) and FineWeb (Penedo et al. 2024,
arXiv:2406.17557, section 3.6) as steps over batches.

Thresholds and their meaning are datatrove's, so that a set made with it and one made here can be compared. A field
that is None switches its rule off. With `single` a rule judges texts in scripts without spaces, by characters, and
those alone; without it, all others: cjk_rules.py has thresholds for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from langmill.data.characters import END, LETTER, WORDLY, Bools, Ints, Reals, Spans, Texts, sums
from langmill.data.judge import Verdict, above, below, judge
from langmill.data.repetition import repeated_characters

if TYPE_CHECKING:
    import pyarrow as pa

SURE = 0.5  # of a language: below it the rules for English hold
_SAID = r'"language":"(?P<language>[\w-]+)","language_score":(?P<score>[\d.]+)'
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


@dataclass(frozen=True)
class GopherQuality:
    """Drops texts that are no running prose: by counts of words, signs, bullets and stop words.

    A word that is punctuation alone does not count towards `min_words`, `max_words` and the mean length. The stop words
    are those of `language`: a document that an earlier step said is in another one, and was surer than not, is spared
    them; None: no document is.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_word_length: float | None = 3.0  # mean, in characters
    max_word_length: float | None = 10.0
    max_signs: float | None = 0.1  # hashes, and ellipses, for each word
    max_bullets: float | None = 0.9  # share of lines that begin with one
    max_ellipsis_lines: float | None = 0.3  # share of lines that end in one
    min_with_letters: float | None = 0.8  # share of words with a letter
    min_stop_words: int | None = 2  # different ones
    stop_words: tuple[str, ...] = STOP_WORDS
    language: str | None = "en"
    single: bool = False  # characters of scripts without spaces are words of their own
    name: str = "gopher_quality"

    def __call__(self, batch: pa.Table) -> pa.Table:
        foreign = in_another(batch, self.language)
        spared = replace(self, min_stop_words=None)
        batch = judge(batch, self.name, spared.judge, by_characters=self.single, among=foreign)
        return judge(batch, self.name, self.judge, by_characters=self.single, among=~foreign)

    def judge(self, rows: list[str]) -> Verdict:
        """(R,) which rows fail, for each reason."""
        texts = Texts(rows, single=self.single)
        flags_W = texts.word_flags
        words, counts = texts.words, texts.words.counts
        wordly = (flags_W & WORDLY) != 0
        real = sums(wordly, words.bounds)
        reasons = {
            "too few words": below(real, self.min_words),
            "too many words": above(real, self.max_words),
        }
        letters = sums(words.lengths * wordly, words.bounds)
        reasons |= {
            "words too short": below(ratio(letters, real), self.min_word_length),
            "words too long": above(ratio(letters, real), self.max_word_length),
            "too many hashes": above(ratio(texts.count(texts.find("#")), counts), self.max_signs),
            "too many ellipses": above(ratio(texts.count(ellipses(texts)), counts), self.max_signs),
        }
        bullets, trailing = line_ends(texts)
        reasons["mostly bullets"] = above(bullets, self.max_bullets)
        reasons["lines end in ellipses"] = above(trailing, self.max_ellipsis_lines)
        lettered = ratio(sums((flags_W & LETTER) != 0, words.bounds), counts)
        reasons["too few words with letters"] = below(lettered, self.min_with_letters)
        reasons["too few stop words"] = below(stop_words(texts, self.stop_words), self.min_stop_words)
        return Verdict(reasons)


@dataclass(frozen=True)
class FineWeb:
    """Drops lists, menus and pages put together of short or repeated lines.

    Hard-wrapped prose ends few lines with a full stop: where it matters, join lines first (`c4.JoinLines`).
    """

    min_ended_lines: float | None = 0.12  # share of lines that end in a full stop or the like
    max_short_lines: float | None = 0.67  # share of lines of `short_line` characters or fewer
    short_line: int = 30
    max_duplicate_characters: float | None = 0.01  # share of characters in lines that were there before
    max_line_breaks: float | None = 0.3  # for each word
    single: bool = False  # characters of scripts without spaces are words of their own
    name: str = "fineweb"

    def __call__(self, batch: pa.Table) -> pa.Table:
        return judge(batch, self.name, self.judge, by_characters=self.single)

    def judge(self, rows: list[str]) -> Verdict:
        """(R,) which rows fail, for each reason."""
        texts = Texts(rows, single=self.single)
        breaks = texts.find("\n")
        lines = texts.lines(breaks)
        lines = lines.where(holds_word(texts, lines))
        ended = (texts.flags_N[lines.ends - 1] & END) != 0
        short = lines.lengths <= self.short_line
        newlines = texts.count(breaks)
        repeated = repeated_characters(lines, texts.hashes(lines))[1]
        empty = lines.counts == 0
        return Verdict(
            {
                "empty": empty,
                "few lines end a sentence": below(
                    ratio(sums(ended, lines.bounds), lines.counts), self.min_ended_lines
                ),
                "mostly short lines": above(
                    ratio(sums(short, lines.bounds), lines.counts), self.max_short_lines
                ),
                "repeated lines": above(
                    ratio(repeated, texts.lengths_R - newlines), self.max_duplicate_characters
                ),
                "mostly line breaks": above(ratio(newlines, texts.words.counts), self.max_line_breaks),
            }
        )


def ratio(part: Ints, whole: Ints) -> Reals:
    """(R,) part of the whole; not a number, which fails no rule, where there is nothing."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def ellipses(texts: Texts) -> Ints:
    """Where "..." (each three of a run of dots) or "…" starts."""
    dots = texts.find(".")
    new = np.concatenate(([True], np.diff(dots) != 1)) if len(dots) else np.zeros(0, bool)
    firsts = dots[new]
    place = dots - np.repeat(firsts, np.diff(np.append(np.flatnonzero(new), len(dots))))
    whole = (place % 3 == 2) if len(dots) else np.zeros(0, bool)
    return np.sort(np.concatenate((dots[whole] - 2, texts.find("…"))))


def line_ends(texts: Texts) -> tuple[Reals, Reals]:
    """(R,) the share of lines that begin with a bullet, and of those that end in an ellipsis."""
    lines = texts.split_lines()
    runs = texts.runs
    first = np.searchsorted(runs.starts, lines.starts)
    last = np.searchsorted(runs.ends, lines.ends, "right") - 1
    filled = np.flatnonzero(first <= last)
    codes = texts.codes_N
    begin, end = runs.starts[first[filled]], runs.ends[last[filled]] - 1
    bullet, trailing = np.zeros(len(first), bool), np.zeros(len(first), bool)
    bullet[filled] = np.isin(codes[begin], [ord("•"), ord("-")])
    three = (codes[end] == 46) & (codes[end - 1] == 46) & (codes[np.maximum(end - 2, 0)] == 46)
    trailing[filled] = three | (codes[end] == ord("…"))
    shares = [ratio(sums(found, lines.bounds), lines.counts) for found in (bullet, trailing)]
    return shares[0], shares[1]


def holds_word(texts: Texts, lines: Spans) -> Bools:
    """(W,) lines that are not white space alone."""
    starts = texts.runs.starts
    following = np.searchsorted(starts, lines.starts)
    return np.append(starts, len(texts.codes_N))[following] < lines.ends


def in_another(batch: pa.Table, language: str | None) -> Bools:
    """(rows,) documents whose meta says another language, with a score above SURE; None: none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if language is None:
        return np.zeros(len(batch), bool)
    said = pc.extract_regex(batch["meta"], pattern=_SAID)
    score = pc.cast(pc.struct_field(said, "score"), pa.float32())
    other = pc.and_(pc.not_equal(pc.struct_field(said, "language"), language), pc.greater(score, SURE))
    return np.asarray(pc.fill_null(other, False).to_numpy(zero_copy_only=False))


def stop_words(texts: Texts, wanted: tuple[str, ...]) -> Ints:
    """(R,) how many different stop words each row has, as they are written."""
    if not wanted:
        return np.zeros(len(texts), np.int64)
    words = texts.words
    own = Texts(wanted)
    whole = Spans(own.starts_R, own.ends_R, np.arange(len(wanted) + 1))
    short = np.flatnonzero(words.lengths <= max(map(len, wanted)))
    hashes = texts.hashes(Spans(words.starts[short], words.ends[short], words.bounds))
    keys = own.hashes(whole)
    order = np.argsort(keys)
    place = np.minimum(np.searchsorted(keys[order], hashes), len(keys) - 1)
    hit = keys[order][place] == hashes
    pairs = np.unique(words.rows[short[hit]] * len(keys) + place[hit])
    return np.bincount(pairs // len(keys), minlength=len(texts))
