"""Tagging: texts as words, a class for each word, and the entities that a row of tags spells.

A word's class is learnt and read at its first token. A long text is cut between words into windows, and each word
counts in the one where it stands furthest from an edge. Tags are "O", "B-X", "I-X" (also E-, L-, S-, U-), or plain.

Repair: an "I-X" (or E-, L-) that follows no tag of X begins an entity, as in conlleval; so IOB1 is read as it is meant.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
from numpy.typing import ArrayLike

from langmill.common.errors import DataError
from langmill.text.classify import Floats, Labels, softmax
from langmill.text.frames import Encoded
from langmill.text.tasks import Limit, TooLong
from langmill.text.tokenizer import Tokenizer

IGNORED = -100
OUTSIDE = "O"
Span = tuple[int, int]
# Scripts that put no space between words: their characters are words.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# One such character with its marks; a run of what is neither space, punctuation nor symbol; one mark or symbol.
_WORD = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[^\s\p{{P}}\p{{S}}{UNSPACED}]+|(?!\s)\X")
_CLOSE = regex.compile(rf"[{UNSPACED}\u3000-\u303f\uff00-\uffef]")  # what stands beside words without a space
_BEGINS, _ENDS = "BSU", "ESLU"


@dataclass(frozen=True, slots=True)
class Words:
    """A text and where its words stand in it, in order."""

    text: str
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.spans)

    @classmethod
    def split(cls, text: str) -> Words:
        """The words of running text: between white space, marks and symbols alone, and for scripts without spaces
        character by character."""
        return cls(text, tuple(found.span() for found in _WORD.finditer(text)))

    @classmethod
    def joined(cls, words: Sequence[str]) -> Words:
        """Words that are given one by one, as a text with a space between any two, but not beside a character of a
        script that has none."""
        text, spans = "", []
        for word in words:
            close = not text or not word or _CLOSE.match(text[-1]) or _CLOSE.match(word)
            text += word if close else f" {word}"
            spans.append((len(text) - len(word), len(text)))
        return cls(text, tuple(spans))


@dataclass(frozen=True, slots=True)
class WordWindow:
    """A document and what it decides: `words`, the numbers of the words that count here, and `places`, where the first
    token of each stands. Over the windows of a text every word that gives a token counts once."""

    encoded: Encoded
    words: tuple[int, ...]
    places: tuple[int, ...]


def encode_words(
    tokenizer: Tokenizer,
    texts: Sequence[Words],
    limit: Limit,
    counted: Counter[str],
    first: int = 0,
    names: Sequence[str] | None = None,
) -> list[WordWindow]:
    """The documents of texts, in order; those of text i have the number `first` + i. Words are encoded one by one.

    Under "window" a window begins with the last words of the one before, of at most `limit.overlap` tokens. A word that
    is longer than a window is cut. TooLong and `counted` as in `tasks.Limit`; "without tokens" counts words that the
    tokenizer takes for nothing, which are tagged "O". DataError where a text has no words; `names` of the texts are
    said in errors.
    """
    spaced = _spaced(tokenizer)
    pieces = iter(tokenizer.encode_batch([piece for words in texts for piece in _pieces(words, spaced)]))
    found: list[WordWindow] = []
    for number, words in enumerate(texts, first):
        what = names[number - first] if names else f"text {number + 1}"
        if not len(words):
            raise DataError(f"{what} is empty: it has no word")
        ids = list(itertools.islice(pieces, len(words)))
        counted["without tokens"] += sum(not word for word in ids)
        found += _windows(tokenizer, ids, limit, counted, number, what)
    return found


def _spaced(tokenizer: Tokenizer) -> bool:
    """Whether a word inside a text is encoded with the space before it, and the tokenizer does not put one itself."""
    whole, bare, spaced = tokenizer.encode_batch(["a b", "b", " b"])
    return whole[-len(bare) :] != bare or (bare != spaced and whole[-len(spaced) :] == spaced)


def _pieces(words: Words, spaced: bool) -> Iterator[str]:
    for start, end in words.spans:
        before = spaced and start > 0 and words.text[start - 1].isspace()
        yield (" " if before else "") + words.text[start:end]


def _windows(
    tokenizer: Tokenizer, ids: list[list[int]], limit: Limit, counted: Counter[str], number: int, what: str
) -> Iterator[WordWindow]:
    frame, lengths = tokenizer.frame, [len(word) for word in ids]
    room, total = limit.length - tokenizer.frame.room(), sum(map(len, ids))
    if total > room and (limit.policy == "error" or room < 1):
        raise TooLong(limit.says(total, room, what))
    cuts = _cuts(lengths, room, limit.overlap)
    if total > room and limit.policy == "truncate":
        cuts = cuts[:1]
        counted["truncated"] += 1
    elif total > room:
        counted["windowed"] += 1
        counted["windows"] += len(cuts)
    # A word loses what it has beyond one window, and with "truncate" what lies behind the first.
    counted["tokens cut off"] += sum(
        max(0, n - room) if i < cuts[-1][1] else n for i, n in enumerate(lengths)
    )
    best = _owners(lengths, cuts)
    for window, (begin, end) in enumerate(cuts):
        tokens: list[int] = []
        words: list[int] = []
        places: list[int] = []
        for word in range(begin, end):
            if best[word] == window and ids[word]:
                words.append(word)
                places.append(len(tokens))
            tokens += ids[word][:room]
        encoded = frame.one(tokens, number)
        yield WordWindow(encoded, tuple(words), tuple(encoded.first.start + place for place in places))


def _cuts(lengths: Sequence[int], room: int, overlap: int) -> list[Span]:
    """(first, end) of runs of words of at most `room` tokens, which cover all and each add a word to those before."""
    found, first, count = [], 0, len(lengths)
    while True:
        end, held = first, 0
        while end < count and (end == first or held + lengths[end] <= room):
            held += lengths[end]
            end += 1
        found.append((first, end))
        if end == count:
            return found
        first, held = end, 0
        spare = min(overlap, room // 2, room - lengths[end])
        while first > found[-1][0] + 1 and held + lengths[first - 1] <= spare:
            first -= 1
            held += lengths[first]


def _owners(lengths: Sequence[int], cuts: Sequence[Span]) -> list[int]:
    """For each word the window where the nearer edge is furthest away, in tokens; the text's own ends are none."""
    starts = [0, *itertools.accumulate(lengths)]
    best, reach = [-1] * len(lengths), [-1.0] * len(lengths)
    for window, (begin, end) in enumerate(cuts):
        left = float("-inf") if begin == 0 else starts[begin]
        right = float("inf") if end == len(lengths) else starts[end]
        for word in range(begin, end):
            away = min(starts[word] - left, right - starts[word + 1])
            if away > reach[word]:
                best[word], reach[word] = window, away
    return best


def tag_targets(window: WordWindow, tags: Sequence[str], labels: Labels) -> list[int]:
    """For each token of a window the class of the word that begins there and counts here, -100 elsewhere.

    tags: of all words of the text. DataError names an unknown one.
    """
    targets = [IGNORED] * len(window.encoded.ids)
    for word, place in zip(window.words, window.places, strict=True):
        targets[place] = labels.number(tags[word])
    return targets


def word_scores(words: int, windows: Sequence[WordWindow], logits_TC: Sequence[ArrayLike]) -> Floats:
    """(words, C) softmax scores of one text from a model's output for each of its windows; NaN for a word that counts
    in none."""
    outputs = [np.asarray(logits, np.float64) for logits in logits_TC]
    scores = np.full((words, outputs[0].shape[-1]), np.nan)
    for window, output in zip(windows, outputs, strict=True):
        scores[list(window.words)] = softmax(output[list(window.places)])
    return scores


def best_tags(scores_NC: ArrayLike, labels: Labels) -> list[str]:
    """The best class of each word; "O" where there are no scores."""
    scores = np.asarray(scores_NC, np.float64)
    best = np.nan_to_num(scores, nan=-1.0).argmax(axis=-1)
    return [OUTSIDE if np.isnan(row).all() else labels.names[i] for row, i in zip(scores, best, strict=True)]


def entities(words: Words, scores_NC: ArrayLike, labels: Labels) -> list[dict[str, Any]]:
    """[{"label", "score", "text", "start", "end"}]: what the best tags spell, repaired; start and end are characters of
    the text, the score is the mean over its words."""
    scores = np.asarray(scores_NC, np.float64)
    found = []
    for first, end, label in spans_of(best_tags(scores, labels)):
        start, stop = words.spans[first][0], words.spans[end - 1][1]
        score = float(np.nanmax(scores[first:end], axis=-1).mean())
        found.append(
            {
                "label": label,
                "score": score,
                "text": words.text[start:stop],
                "start": start,
                "end": stop,
            }
        )
    return found


def _parts(tag: str) -> tuple[str, str]:
    """(prefix, name); a tag without a prefix stands for one word, as S- does."""
    return (tag[0], tag[2:]) if len(tag) > 2 and tag[1] == "-" and tag[0] in "BIESLU" else ("S", tag)


def spans_of(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first word, end, name) of the entities that tags spell, by the rule of repair above."""
    found: list[tuple[int, int, str]] = []
    going = None  # the name of an entity that may go on
    for place, tag in enumerate(tags):
        prefix, name = _parts(tag)
        if tag == OUTSIDE:
            going = None
            continue
        if prefix in _BEGINS or going != name:
            found.append((place, place + 1, name))
        else:
            found[-1] = (found[-1][0], place + 1, name)
        going = None if prefix in _ENDS else name
    return found


def repaired(tags: Sequence[str]) -> list[str]:
    """The same tags with "B-" where an "I-" begins an entity."""
    begins = {first for first, _, _ in spans_of(tags)}
    return ["B" + tag[1:] if i in begins and tag.startswith("I-") else tag for i, tag in enumerate(tags)]


def as_read(words: Words, tags: Sequence[str]) -> tuple[Words, list[str], int]:
    """Given words cut where `Words.split` cuts running text, so that learning meets the words that use will; the tags
    of the parts, which spell the same entities; and how many words were cut. A plain tag holds for every part."""
    spans: list[Span] = []
    found: list[str] = []
    cut = 0
    for (start, end), tag in zip(words.spans, tags, strict=True):
        parts = Words.split(words.text[start:end]).spans
        spans += [(start + a, start + b) for a, b in parts]
        cut += len(parts) > 1
        prefix, name = _parts(tag)
        if len(parts) == 1 or name == tag:
            found += [tag] * len(parts)
            continue
        opens = {"S": "B", "U": "B", "E": "I", "L": "I"}.get(prefix, prefix)
        closes = {"S": "E", "U": "L", "B": "I"}.get(prefix, prefix)
        found += [f"{opens}-{name}", *[f"I-{name}"] * (len(parts) - 2), f"{closes}-{name}"]
    return Words(words.text, tuple(spans)), found, cut


def tags_of(words: Words, spans: Sequence[tuple[int, int, str]]) -> tuple[list[str], int]:
    """BIO tags of words from spans of characters (start, end, label), and how many spans had to be widened to whole
    words. DataError for a span that is empty or not within the text, or for two that share a word."""
    tags, widened = [OUTSIDE] * len(words), 0
    starts, ends = [first for first, _ in words.spans], [last for _, last in words.spans]
    for start, end, label in spans:
        if not 0 <= start < end <= len(words.text):
            raise DataError(
                f"the span {start} to {end} is not within the text's {len(words.text)} characters"
            )
        inside = range(bisect_right(ends, start), bisect_left(starts, end))
        if not inside:
            raise DataError(f"the span {start} to {end} holds no word")
        if any(tags[i] != OUTSIDE for i in inside):
            raise DataError(f"the span {start} to {end} shares a word with another one")
        widened += starts[inside[0]] < start or ends[inside[-1]] > end
        for i in inside:
            tags[i] = f"{'B' if i == inside[0] else 'I'}-{label}"
    return tags, widened
