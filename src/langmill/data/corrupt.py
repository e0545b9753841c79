"""Damage to learn from: texts as ids, with tokens masked, spans taken out or sentences shuffled, and what was there.

Each is a frozen dataclass that is called with the ids of one text and a numpy Generator, from which alone the outcome
follows. `special` marks the ids (V,) that are never touched: among the tokens that are left they keep their order.
Markers at the ends of a text are not for the span methods, but put around what comes of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import decoders

from langmill.common.errors import UsageError
from langmill.text.training import CONTINUES

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Random = np.random.Generator
IGNORED = -100
# Scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # how vocabularies with "▁" spell what they lack


def flags(ids: Iterable[int], size: int) -> Bools:
    """(size,), True at these ids."""
    table = np.zeros(size, np.bool_)
    table[list(ids)] = True
    return table


@dataclass(frozen=True)
class Words:
    """Which ids begin a word, and after which one begins whatever comes: (V,) each."""

    begins: Bools
    ends: Bools

    @classmethod
    def of(cls, vocabulary: Sequence[str | None]) -> Words:
        """From how a vocabulary spells its tokens: WordPiece ("##" goes on), byte-level ("Ġ" is a space) or "▁".

        Punctuation marks are words, and each token that begins with a character of a script without spaces is one.
        """
        tokens = [token or "" for token in vocabulary]

        def marked(mark: str) -> bool:
            return sum(token.startswith(mark) for token in tokens) * 50 > len(tokens)

        goes_on = next((mark for mark in ("##", CONTINUES) if marked(mark)), None)
        bytewise = goes_on == CONTINUES or (goes_on is None and marked("Ġ") and not marked("▁"))
        spell = decoders.ByteLevel()
        begins, ends = np.zeros(len(tokens), np.bool_), np.zeros(len(tokens), np.bool_)
        for number, token in enumerate(tokens):
            inside = goes_on is not None and token.startswith(goes_on) and token != goes_on
            bare = token[len(goes_on or "") :] if inside else token
            if byte := _BYTE.fullmatch(bare):
                begins[number] = (
                    0xE3 <= int(byte[1], 16) <= 0xE9
                )  # the first third of a Han character or kana
                continue
            text = spell.decode([bare]) if bytewise else bare.replace("▁", " ")
            if text:
                part = bytewise and "\xe3" <= bare[0] <= "\xe9"  # as above
                begins[number] = (goes_on is not None and not inside) or part or _alone(text[0])
                ends[number] = _alone(text[-1])
        return cls(begins, ends)

    def starts(self, ids: Ints, kept: Bools) -> Bools:
        """Whether each token begins a word; `kept` are markers, which are words of their own."""
        found: Bools = self.begins[ids] | kept
        found[:1] = True
        found[1:] |= self.ends[ids[:-1]] | kept[:-1]
        return found


def _alone(letter: str) -> bool:
    """Whether it parts words: white space, a mark or sign, or a character that is a word by itself."""
    mark = unicodedata.category(letter)[0] in "PS" and letter != "\ufffd"
    return letter.isspace() or mark or bool(_UNSPACED.match(letter))


@dataclass(frozen=True)
class Masking:
    """15 % of the tokens are to be guessed: 80 % of those become the mask, 10 % any other token, 10 % stay (Devlin et
    al. 2018, arXiv:1810.04805, section 3.1). With `words`, all tokens of a word or none.

    How many are guessed is `rate` times the tokens in the mean, rounded up or down by lot, and never none.
    """

    mask_id: int
    special: Bools
    words: Words | None = None
    rate: float = 0.15

    def __call__(self, ids: NDArray[Any], random: Random) -> tuple[Ints, Ints]:
        """(inputs, targets), aligned; targets are -100 where nothing is to be guessed."""
        inputs = ids.astype(np.int64)
        targets = np.full_like(inputs, IGNORED)
        kept = self.special[inputs]
        free = np.flatnonzero(~kept)
        if not len(free):
            return inputs, targets
        wanted = min(len(free), max(1, int(len(free) * self.rate + random.random())))
        if self.words is None:
            chosen = random.choice(free, wanted, replace=False)
        else:
            words: Ints = np.cumsum(self.words.starts(inputs, kept), dtype=np.int64)
            chosen = _whole_words(words[free], free, wanted, random)
        targets[chosen] = inputs[chosen]
        lot = random.random(len(chosen))
        swapped = chosen[(lot >= 0.8) & (lot < 0.9)]
        inputs[chosen[lot < 0.8]] = self.mask_id
        inputs[swapped] = self._ordinary[random.integers(len(self._ordinary), size=len(swapped))]
        return inputs, targets

    @cached_property
    def _ordinary(self) -> Ints:
        return np.flatnonzero(~self.special)


def _whole_words(word: Ints, free: Ints, wanted: int, random: Random) -> Ints:
    """The tokens of some words, `wanted` in the mean: the word that would be too much is taken by lot."""
    _, word, sizes = np.unique(word, return_inverse=True, return_counts=True)
    order = random.permutation(len(sizes))
    upto = np.cumsum(sizes[order])
    count = int(np.searchsorted(upto, wanted, side="right"))
    if count < len(order):
        left = wanted - (upto[count - 1] if count else 0)
        count += bool(random.random() * sizes[order[count]] < left)
    return free[np.isin(word, order[: max(1, count)])]


def span_counts(length: int, density: float, mean: float) -> tuple[int, int]:
    """How many of `length` tokens are taken out and in how many spans, as T5's reference code has it."""
    if length < 2:
        return length, length
    tokens = min(max(round(length * density), 1), length - 1)
    return tokens, min(max(round(tokens / mean), 1), length - tokens)


def noise_mask(length: int, tokens: int, spans: int, random: Random) -> Bools:
    """Which tokens are taken out: T5's `random_spans_noise_mask`. Kept and taken spans alternate, a kept one first and
    a taken one last; each kind is cut into its number of spans with all cuts equally likely."""
    if length < 2:
        return np.ones(length, np.bool_)
    kept, taken = _cut(length - tokens, spans, random), _cut(tokens, spans, random)
    sizes = np.stack((kept, taken), axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, sizes)


def _cut(total: int, parts: int, random: Random) -> Ints:
    """Sizes of `parts` parts, at least 1 each."""
    cuts = np.sort(random.choice(max(1, total - 1), parts - 1, replace=False)) + 1
    bounds = np.array([0, *cuts.tolist(), total], np.int64)
    return bounds[1:] - bounds[:-1]


def _free(text: Ints, special: Bools, needed: int) -> Ints:
    """The places that may be taken out. Where specials leave fewer than `needed`, they count as text."""
    plain = np.flatnonzero(~special[text])
    return plain if len(plain) >= needed else np.arange(len(text))


def _spans(length: int, density: float, mean: float, sentinels: int) -> tuple[int, int]:
    """`span_counts`; UsageError where there are too few sentinels."""
    tokens, spans = span_counts(length, density, mean)
    if spans > sentinels:
        raise UsageError(
            f"{length} tokens have {spans} spans taken out, and there are {sentinels} sentinels: take shorter rows, "
            "longer spans or a tokenizer with more sentinels"
        )
    return tokens, spans


@dataclass(frozen=True)
class SpanCorruption:
    """T5's pretraining task (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4): each span that is taken out leaves a
    sentinel; the target is every sentinel followed by its span. `sentinels` in the order of their use.

    T5's spans never begin a text and always end it, so that of a text with a single span (30 tokens) the end is always
    taken out. `anywhere` makes all places equally likely instead; sizes and numbers are the same.
    """

    sentinels: tuple[int, ...]
    special: Bools
    density: float = 0.15
    mean: float = 3.0
    anywhere: bool = False

    def __call__(self, ids: NDArray[Any], random: Random) -> tuple[Ints, Ints]:
        """(what the encoder reads, what the decoder writes). UsageError where there are fewer sentinels than spans."""
        text = ids.astype(np.int64)
        tokens, spans = _spans(len(text), self.density, self.mean, len(self.sentinels))
        free = _free(text, self.special, tokens + spans)
        if self.anywhere and spans:
            taken = np.zeros(len(free), np.bool_)
            taken[_inside(*_scattered(len(free), _cut(tokens, spans, random), random))] = True
        else:
            taken = noise_mask(len(free), tokens, spans, random)
        begins = np.flatnonzero(taken & ~np.concatenate(([False], taken[:-1])))
        names = np.array(self.sentinels[:spans], np.int64)
        gone = np.zeros(len(text), np.bool_)
        gone[free[taken]] = True
        read = _replaced(text, gone, free[begins], names)
        return read, np.insert(text[gone], np.cumsum(taken)[begins] - 1, names)

    def reach(self, lengths: Ints) -> tuple[Ints, Ints]:
        """How long both sides are, of texts of these lengths."""
        counts = [span_counts(length, self.density, self.mean) for length in lengths.tolist()]
        tokens, spans = np.array(counts, np.int64).reshape(-1, 2).T
        return lengths - tokens + spans, tokens + spans


def _replaced(text: Ints, gone: Bools, places: Ints, by: Ints | int) -> Ints:
    """The text without what is gone, and with something else before these places."""
    return np.insert(text, places, by)[~np.insert(gone, places, False)]


@dataclass(frozen=True)
class Denoising:
    """BART's pretraining task (Lewis et al. 2019, arXiv:1910.13461, section 2.2): sentences in random order, then spans
    of Poisson(`mean`) tokens, `rate` of all tokens together, each become one mask, as do places where nothing was. The
    target is the whole text. `stops` marks the ids (V,) that end a sentence; None leaves sentences where they are."""

    mask_id: int
    special: Bools
    stops: Bools | None = None
    rate: float = 0.3
    mean: float = 3.0

    def __call__(self, ids: NDArray[Any], random: Random) -> tuple[Ints, Ints]:
        """(what the encoder reads, what the decoder writes); the first is never longer than the second."""
        whole = text = ids.astype(np.int64)
        if self.stops is not None:
            text = shuffled_sentences(text, np.flatnonzero(self.stops[text]) + 1, random)
        free = np.flatnonzero(~self.special[text])
        wanted = round(len(free) * self.rate)
        drawn: list[int] = []
        while sum(drawn) < wanted:
            drawn.append(min(int(random.poisson(self.mean)), wanted - sum(drawn)))
        drawn = sorted(drawn, reverse=True)[:wanted]  # masks where nothing was make no text longer
        starts, sizes = _scattered(len(free), np.array(drawn, np.int64), random)
        gone = np.zeros(len(text), np.bool_)
        gone[free[_inside(starts, sizes)]] = True
        return _replaced(text, gone, np.append(free, len(text))[starts], self.mask_id), whole

    def reach(self, lengths: Ints) -> tuple[Ints, Ints]:
        """How long both sides are at most, of texts of these lengths."""
        return lengths, lengths


def shuffled_sentences(text: Ints, ends: Ints, random: Random) -> Ints:
    """The sentences that end before the places `ends`, in random order; what follows the last is one too."""
    sentences = [part for part in np.split(text, ends) if len(part)]
    parts = [sentences[i] for i in random.permutation(len(sentences))]
    return np.concatenate(parts) if parts else text


def _scattered(length: int, sizes: Ints, random: Random) -> tuple[Ints, Ints]:
    """(starts, sizes) of spans among `length` tokens, in random order, none touching another; all places are equally
    likely. Of more spans than places the last are left out."""
    sizes = random.permutation(sizes[: length - int(sizes.sum()) + 1])
    gaps = np.sort(random.choice(length - int(sizes.sum()) + 1, len(sizes), replace=False))
    return gaps + np.cumsum(sizes) - sizes, sizes


def _inside(starts: Ints, sizes: Ints) -> Ints:
    """The places that spans cover, in order."""
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))


@dataclass(frozen=True)
class FillInMiddle:
    """Fill in the middle for decoders (Bavarian et al. 2022, arXiv:2207.14255, section 3): with probability `rate` a
    text is cut at two places and its middle comes last, as PSM (prefix, suffix, middle) or, in the share `spm`, as SPM
    in the paper's joint form (suffix, then prefix and middle). Every token is trained."""

    prefix_id: int
    suffix_id: int
    middle_id: int
    rate: float = 0.5
    spm: float = 0.5

    def __call__(self, ids: NDArray[Any], random: Random) -> tuple[Ints, Bools]:
        """(ids, whether each is trained)."""
        text = ids.astype(np.int64)
        change, spm = (random.random(2) < (self.rate, self.spm)).tolist()
        if change:
            low, high = np.sort(random.integers(0, len(text), size=2, endpoint=True)).tolist()
            head, middle, tail = np.split(text, [low, high])
            prefix, suffix, between = np.array(
                [[self.prefix_id], [self.suffix_id], [self.middle_id]], np.int64
            )
            psm = (prefix, head, suffix, tail, between, middle)
            text = np.concatenate((prefix, suffix, tail, between, head, middle) if spm else psm)
        return text, np.ones(len(text), np.bool_)

    def reach(self, lengths: Ints) -> Ints:
        """How many ids texts of these lengths become at most."""
        return lengths + 3


@dataclass(frozen=True)
class BlankInfilling:
    """GLM's pretraining task (Du et al. 2022, arXiv:2103.10360, section 2.1) for a plain decoder: spans are taken out
    and follow the text in random order, each behind the sentinel that stands in its place; only they and the `end_id`
    behind each are trained.

    GLM tells blanks apart by a second position and draws their sizes from Poisson(3) until enough is taken out. Here
    sentinels tell, and sizes are 1 + Poisson(mean - 1) given their sum and T5's number of spans, so that a text's
    length says how long it becomes. A share `plain` of the texts stays whole and is trained whole, so that the model
    learns to write on as well (section 2.1.2 has longer blanks for it).
    """

    sentinels: tuple[int, ...]
    end_id: int
    special: Bools
    density: float = 0.15
    mean: float = 3.0
    plain: float = 0.0

    def __call__(self, ids: NDArray[Any], random: Random) -> tuple[Ints, Bools]:
        """(ids, whether each is trained). UsageError where there are fewer sentinels than blanks."""
        text = ids.astype(np.int64)
        if self.plain and random.random() < self.plain:
            return text, np.ones(len(text), np.bool_)
        tokens, spans = _spans(len(text), self.density, self.mean, len(self.sentinels))
        free = _free(text, self.special, tokens + spans)
        if not spans:
            return text, np.zeros(0, np.bool_)
        extra = random.multinomial(tokens - spans, np.full(spans, 1 / spans))
        starts, sizes = _scattered(len(free), 1 + extra.astype(np.int64), random)
        gone = np.zeros(len(text), np.bool_)
        gone[free[_inside(starts, sizes)]] = True
        names = np.array(self.sentinels[:spans], np.int64)
        read = _replaced(text, gone, free[starts], names)
        parts, marks = [read], [np.zeros(len(read), np.bool_)]
        for span in random.permutation(spans).tolist():
            inside = text[free[starts[span] : starts[span] + sizes[span]]]
            parts.append(np.array([names[span], *inside, self.end_id], np.int64))
            marks.append(np.arange(len(inside) + 2) > 0)
        return np.concatenate(parts), np.concatenate(marks)

    def reach(self, lengths: Ints) -> Ints:
        """How many ids texts of these lengths become."""
        spans = [span_counts(length, self.density, self.mean)[1] for length in lengths.tolist()]
        return lengths + 3 * np.array(spans, np.int64)
