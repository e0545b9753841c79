"""Answers that stand in a text: a question and its context as windows, and the spans that a model's scores point at.

A document is the question, then as much of the context as fits; a longer context gives several (run_squad's windows).
A span's score is the start score of its first token plus the end score of its last. Over all windows the spans of at
most `max_length` tokens that lie within the context compete; the same characters count once, by their best window.
"No answer" is the first token's start plus end score, in the window where that is lowest; it wins where it exceeds the
best span by more than `threshold`. Probabilities are the softmax over the 20 best spans, as many as run_squad takes,
or as many as are listed, and "no answer". This is its rule, but with every span tried, not only those of the 20 best
starts and ends.
"""

from __future__ import annotations

import string
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
from numpy.typing import ArrayLike, NDArray

from langmill.common.errors import DataError
from langmill.text.classify import softmax
from langmill.text.frames import Encoded
from langmill.text.tag import UNSPACED
from langmill.text.tasks import Limit, TooLong
from langmill.text.tokenizer import Tokenizer

Span = tuple[int, int]
NEVER = 1e9  # a threshold under which "no answer" is never said
COMPETE = 20  # spans that share the probability, however few are listed
NOWHERE = "questions whose answers are whole in no window"
_ARTICLES = regex.compile(r"\b(a|an|the)\b")
_TOKEN = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[^\s{UNSPACED}]+")


@dataclass(frozen=True, slots=True)
class ContextWindow:
    """A question with a part of its context: `encoded.second` are the context's tokens, and `offsets` the characters of
    the context, from and to, that each of them stands for. from_token: how many of the context's come before them."""

    encoded: Encoded
    offsets: tuple[Span, ...]
    from_token: int

    @property
    def allowed(self) -> list[bool]:
        """Whether a token may begin or end an answer: the context's, and the first token, which stands for none."""
        return [place == 0 or place in self.encoded.second for place in range(len(self.encoded.ids))]


def encode_question(
    tokenizer: Tokenizer, question: str, context: str, limit: Limit, counted: Counter[str], number: int = 0
) -> list[ContextWindow]:
    """The documents of a question and its context; TooLong and `counted` as in `tasks.Limit`, about the context.

    The question is never cut: TooLong where it leaves no room. DataError where the context gives no token.
    """
    asked = tokenizer.encode(question)
    ids, offsets = tokenizer.encode_with_offsets(context)
    if not ids:
        raise DataError(f"the context of question {number + 1} is empty: it gives no token")
    room = limit.length - tokenizer.frame.room(pair=True) - len(asked)
    if room < 1:
        raise TooLong(
            f"question {number + 1} has {len(asked)} tokens, which leave no room for a context in {limit.length}"
        )
    cuts = limit.cuts(len(ids), room, f"the context of question {number + 1}", counted)
    return [
        ContextWindow(tokenizer.frame.two(asked, ids[first:end], number), tuple(offsets[first:end]), first)
        for first, end in cuts
    ]


def answer_places(window: ContextWindow, start: int, end: int) -> Span:
    """The first and last token of an answer, given as characters of the context; 0, 0 where not all of it is in this
    window."""
    offsets = window.offsets
    if not offsets or start < offsets[0][0] or end > offsets[-1][1]:
        return 0, 0
    # The last token that begins by `start` and the first that ends by `end`, or those inside where a gap lies there.
    first = bisect_right(offsets, start, key=lambda offset: offset[0]) - 1
    first += offsets[first][1] <= start
    last = bisect_left(offsets, end, key=lambda offset: offset[1])
    last -= offsets[last][0] >= end
    first = first if offsets[last][1] <= start else min(first, last)  # two tokens may share a character
    return (window.encoded.second[first], window.encoded.second[last]) if first <= last else (0, 0)


def answer_targets(
    windows: Sequence[ContextWindow], answers: Sequence[Span], counted: Counter[str]
) -> list[Span]:
    """For each window of a question `answer_places` of the first of its answers that is whole in it; `counted` is told
    of questions whose answers are whole in none (`NOWHERE`)."""
    found = [
        next((at for answer in answers if (at := answer_places(window, *answer)) != (0, 0)), (0, 0))
        for window in windows
    ]
    counted[NOWHERE] += bool(answers) and all(place == (0, 0) for place in found)
    return found


def best_answers(
    context: str,
    windows: Sequence[ContextWindow],
    starts: Sequence[ArrayLike],
    ends: Sequence[ArrayLike],
    *,
    n_best: int = 5,
    max_length: int = 30,
    no_answer: bool = True,
    threshold: float = 0.0,
) -> dict[str, Any]:
    """{"answer", "start", "end", "score", "no_answer_score", "best"} by the rule at the top of this file.

    windows: all of one question; starts, ends: a score for each token of each. `answer` is context[start:end] without
    white space at its ends; where "no answer" won it is "", and start and end are None. `best` lists the `n_best`
    spans as {"answer", "start", "end", "score"}, best first. no_answer: whether it may win.
    """
    spans: dict[Span, float] = {}
    null, compete = float("inf"), max(n_best, COMPETE)
    for window, start, end in zip(windows, starts, ends, strict=True):
        start_T, end_T = np.asarray(start, np.float64), np.asarray(end, np.float64)
        null = min(null, float(start_T[0] + end_T[0]))
        inside = slice(window.encoded.second.start, window.encoded.second.stop)
        for first, last, score in _top(start_T[inside], end_T[inside], 8 * compete, max_length):
            place = _stripped(context, window.offsets[first][0], window.offsets[last][1])
            if place[0] < place[1]:
                spans[place] = max(score, spans.get(place, score))
    ranked = sorted(spans.items(), key=lambda item: (-item[1], item[0]))[:compete]
    *shares, none = softmax(np.array([*(score for _, score in ranked), null])).tolist()
    best = [
        {"answer": context[a:b], "start": a, "end": b, "score": share}
        for ((a, b), _), share in zip(ranked[:n_best], shares[:n_best], strict=True)
    ]
    if not best or (no_answer and null - ranked[0][1] > threshold):
        chosen: dict[str, Any] = {"answer": "", "start": None, "end": None, "score": none}
    else:
        chosen = best[0]
    return {**chosen, "no_answer_score": none, "best": best}


def _top(
    start_T: NDArray[np.float64], end_T: NDArray[np.float64], count: int, max_length: int
) -> list[tuple[int, int, float]]:
    """(first, last, score) of the best spans of at most `max_length` tokens, best first."""
    size = len(start_T)
    lengths = range(min(max_length, size))
    scores = np.concatenate([start_T[: size - more] + end_T[more:] for more in lengths])
    firsts = np.concatenate([np.arange(size - more) for more in lengths])
    lasts = np.concatenate([np.arange(more, size) for more in lengths])
    order = np.argsort(-scores, kind="stable")[:count]
    return list(zip(firsts[order].tolist(), lasts[order].tolist(), scores[order].tolist(), strict=True))


def best_threshold(margins: ArrayLike, said: ArrayLike, empty: ArrayLike) -> float:
    """The threshold under which questions do best in the mean, as SQuAD 2.0's script finds it.

    margins: of each question by how much "no answer" beats its best span, which may be infinite; said, empty: the mark
    that the span gets, and that an empty answer gets. It lies midway between two margins, or 1 beyond all; of equals
    the nearest to 0 is taken, and 0 itself where it does as well.
    """
    margin_K, said_K, empty_K = (np.asarray(values, np.float64) for values in (margins, said, empty))
    finite = np.unique(margin_K[np.isfinite(margin_K)])
    if not len(finite):
        return 0.0
    between = np.concatenate(([finite[0] - 1], (finite[1:] + finite[:-1]) / 2, [finite[-1] + 1], [0.0]))
    candidates = between[np.argsort(np.abs(between), kind="stable")]
    means = [np.where(margin_K > at, empty_K, said_K).mean() for at in candidates]
    return float(candidates[int(np.argmax(means))])


def _stripped(text: str, start: int, end: int) -> Span:
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def normalised(text: str) -> str:
    """A text as SQuAD compares it: lower case, without punctuation and English articles, single spaces.

    As the official script for ASCII; beyond it NFKC, and punctuation of every script.
    """
    lower = unicodedata.normalize("NFKC", text).lower()
    kept = (c for c in lower if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return " ".join(_ARTICLES.sub(" ", "".join(kept)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is one of the answers, normalised, else 0; no answers: it must be empty."""
    return float(normalised(prediction) in {normalised(answer) for answer in answers or ("",)})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best overlap with one of the answers: harmonic mean of precision and recall of the words they share.

    Words as in SQuAD, at white space, but one by one the characters of scripts that have none between words. Where one
    of the two has no words, 1 if neither has.
    """
    return max(_overlap(_TOKEN.findall(normalised(prediction)), answer) for answer in answers or ("",))


def _overlap(predicted: list[str], answer: str) -> float:
    wanted = _TOKEN.findall(normalised(answer))
    if not predicted or not wanted:
        return float(predicted == wanted)
    same = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * same / (len(predicted) + len(wanted))
