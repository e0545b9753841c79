"""Labelled rows from files: .jsonl (.gz, .zst), .json, .csv and .tsv with a header, .parquet, and CoNLL files for tags.

    classify   {"text", "label"}, perhaps "text_pair"; a label is text, a whole number, true or false, a list of texts
               (several hold), or with `regression` any number
    tag        {"tokens": […], "tags": […]}       {"text", "spans": [{"start", "end", "label"}]}       word TAB tag
    answer     {"id", "question", "context", "answers": {"text": […], "answer_start": […]}}, SQuAD's nested file
    translate  {"translation": {"en": …, "de": …}}       {"source", "target"}
    embed      {"anchor", "positive"}, perhaps "negative" (a text or several)     {"text_a", "text_b"}     [a, b, …]
    sts        {"sentence1", "sentence2", "score"}     {"text_a", "text_b", "score"}, the score any number

`fields` gives other names: {"text": "review"}. In CSV a list is written as JSON. A row that is none of these, or that
`make` refuses with a DataError, is dropped in the ledger under its reason; DataError where no row is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from langmill.common.errors import DataError, UsageError
from langmill.data.chats import Unusable
from langmill.data.fields import (
    Fields,
    Paths,
    Row,
    list_of,
    name_of,
    names_of,
    parsed,
    read_files,
    shown,
    text_of,
)
from langmill.data.pipeline import Ledger
from langmill.data.tables import Rows
from langmill.text.classify import Label
from langmill.text.tag import Words, as_read, repaired, tags_of
from langmill.text.tasks import Text

T = TypeVar("T")
_SCORED = {name: name for name in ("sentence1", "sentence2", "text_a", "text_b", "score")}
FRACTION = "a label that is a fraction (--kind regress learns numbers)"
_NESTING = ("data", "paragraphs", "qas")


@dataclass(frozen=True, slots=True)
class LabelRow:
    """A text, or a pair of texts, and its label."""

    where: str
    text: Text
    label: Label


@dataclass(frozen=True, slots=True)
class WordRow:
    """Words and a tag for each. repaired: tags that were "I-" where an entity begins; widened: spans that did not end
    with words; cut: words that running text would give in parts ("U.S."), and that are learnt so."""

    where: str
    words: Words
    tags: tuple[str, ...]
    repaired: int = 0
    widened: int = 0
    cut: int = 0


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """A question about a context; `answers` stand in it from `starts` on, and there are none where it gives none."""

    where: str
    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]

    @property
    def span(self) -> tuple[int, int] | None:
        """The characters of the first answer."""
        return self.spans[0] if self.starts else None

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The characters of every answer."""
        pairs = zip(self.answers, self.starts, strict=True)
        return tuple((start, start + len(answer)) for answer, start in pairs)


@dataclass(frozen=True, slots=True)
class TranslationRow:
    """A text and what it is in another language."""

    where: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class GroupRow:
    """A text, one that is like it, and some that are not."""

    where: str
    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """Two texts, and how alike people found them."""

    where: str
    text_a: str
    text_b: str
    score: float


def read_labels(
    paths: Paths,
    ledger: Ledger,
    make: Callable[[LabelRow], T],
    fields: Fields | None = None,
    regression: bool = False,
) -> Iterator[T]:
    """`make` of every row of "classify"; regression: labels are numbers."""
    at = names_of("classify", fields)

    def parse(where: str, row: Row) -> T:
        text, pair = text_of(row, at["text"]), row.get(at["text_pair"])
        if at["label"] not in row:
            raise Unusable(f'no field "{at["label"]}"', f"fields: {shown(row)}")
        both = text if pair in (None, "") else (text, text_of(row, at["text_pair"]))
        return make(LabelRow(where, both, _label(row.get(at["label"]), regression)))

    yield from read_files("classify", paths, ledger, parse, at)


def read_words(
    paths: Paths, ledger: Ledger, make: Callable[[WordRow], T], fields: Fields | None = None
) -> Iterator[T]:
    """`make` of every row of "tag"."""
    at = names_of("tag", fields)

    def parse(where: str, row: Row) -> T:
        whole = at["tokens"] in row
        if missing := [
            at[name] for name in (("tags",) if whole else ("text", "spans")) if at[name] not in row
        ]:
            raise Unusable(f'no field "{missing[0]}"', f"fields: {shown(row)}")
        if not whole:
            return make(_marked(where, text_of(row, at["text"]), list_of(row, at["spans"])))
        words, tags = (list_of(row, at[name]) for name in ("tokens", "tags"))
        if len(words) != len(tags):
            raise Unusable("not as many tags as words", f"{len(words)} words and {len(tags)} tags")
        if bad := [word for word in words if not isinstance(word, str) or not word.strip()]:
            raise Unusable("a word that is none", f"{bad[0]!r} is not a word")
        if any(isinstance(tag, int) for tag in tags):
            raise Unusable(
                "tags that are numbers", f'write their names, such as "O" and "B-PER", not {tags!r}'[:400]
            )
        given = [name_of(tag, "tag") for tag in words and tags]
        right = repaired(given)
        changed = sum(a != b for a, b in zip(given, right, strict=True))
        read, spread, cut = as_read(Words.joined(words), right)
        return make(WordRow(where, read, tuple(spread), repaired=changed, cut=cut))

    yield from read_files("tag", paths, ledger, parse, at)


def _marked(where: str, text: str, spans: Sequence[Any]) -> WordRow:
    words = Words.split(text)
    found: list[tuple[int, int, str]] = []
    for span in spans:
        start, end = (span.get("start"), span.get("end")) if isinstance(span, Mapping) else (None, None)
        if type(start) is not int or type(end) is not int:
            raise Unusable(
                "a span without its place", f"a span has start, end and label, and is not {span!r}"
            )
        found.append((start, end, name_of(span.get("label"), "label")))
    try:
        tags, widened = tags_of(words, found)
    except DataError as error:
        raise Unusable("spans that do not fit the text", str(error)) from None
    return WordRow(where, words, tuple(tags), widened=widened)


def read_questions(
    paths: Paths, ledger: Ledger, make: Callable[[QuestionRow], T], fields: Fields | None = None
) -> Iterator[T]:
    """`make` of every question of "answer". An answer whose place is not given must occur once in the context."""
    at = names_of("answer", fields)

    def parse(where: str, row: Row) -> T:
        question, context = text_of(row, at["question"]), text_of(row, at["context"])
        texts, starts = _answers(row, at)
        found = [_placed(context, *answer) for answer in zip(texts, starts, strict=True)]
        id = str(row.get(at["id"]) or where)
        answers = tuple(answer for answer, _ in found)
        return make(QuestionRow(where, id, question, context, answers, tuple(start for _, start in found)))

    yield from read_files("answer", paths, ledger, parse, at, _nested)


def _answers(row: Row, at: Fields) -> tuple[list[Any], list[Any]]:
    """(texts, where they start); without any the question has no answer."""
    if at["answers"] not in row and row.get("is_impossible") is not True:
        if at["answer"] not in row:
            raise Unusable(f'no field "{at["answers"]}"', f"fields: {shown(row)}")
        start, text = row.get(at["answer_start"]), row[at["answer"]]
        number = int(start) if isinstance(start, str) and start.isdecimal() else start
        return ([text], [None if number == "" else number]) if text else ([], [])
    value = parsed(row.get(at["answers"]))
    if isinstance(value, list) and all(isinstance(answer, Mapping) for answer in value):
        value = {name: [answer.get(name) for answer in value] for name in ("text", "answer_start")}
    if row.get("is_impossible") is True or value is None:
        return [], []
    texts = value.get("text") if isinstance(value, Mapping) else None
    starts = value.get("answer_start") if isinstance(value, Mapping) else None
    texts = [texts] if isinstance(texts, str) else texts
    starts = [starts] if isinstance(starts, int) else starts
    if not isinstance(texts, list) or (starts is not None and not isinstance(starts, list)):
        raise Unusable(
            "answers that are none", f"answers have text and answer_start, and are not {value!r}"[:400]
        )
    starts = [None] * len(texts) if starts is None else starts
    if len(starts) != len(texts):
        raise Unusable("answers that are none", f"{len(texts)} answers and {len(starts)} places")
    return texts, starts


def _placed(context: str, answer: Any, start: Any) -> tuple[str, int]:
    """An answer and where it starts, without white space around it."""
    if not isinstance(answer, str) or not answer.strip():
        raise Unusable("answers that are none", f"{answer!r} is not an answer")
    if start is None:
        if context.count(answer) != 1:
            why = f'"{answer[:80]}" occurs {context.count(answer)} times in the context, and has no answer_start'
            raise Unusable("an answer without its place", why)
        start = context.index(answer)
    if type(start) is not int:
        raise Unusable(
            "an answer_start that is no number", f"it is {start!r}: a count of characters, such as 4"[:400]
        )
    if start < 0 or context[start : start + len(answer)] != answer:
        there = context[start : start + len(answer)][:80] if start >= 0 else ""
        raise Unusable(
            "an answer that does not stand in its context", f'"{answer[:80]}" is not "{there}" at {start}'
        )
    return answer.strip(), start + len(answer) - len(answer.lstrip())


def _nested(rows: Rows) -> Rows:
    """The questions of SQuAD's nested rows, each with its context, the bytes with the first; others as they are."""
    for place, value, size in rows:
        if not isinstance(value, Mapping) or not any(isinstance(value.get(name), list) for name in _NESTING):
            yield place, value, size
            continue
        for number, question in enumerate(_below(value, value.get("context")), 1):
            yield f"{place}.{number}", question, size if number == 1 else 0


def _below(value: Any, context: Any) -> Iterator[Any]:
    """The questions under an article or paragraph; what should be one and is not comes as it is."""
    inner = value if isinstance(value, Mapping) else {}
    name = next((name for name in _NESTING if isinstance(inner.get(name), list)), None)
    if name is None:
        yield {"context": context, **inner} if inner else value
    else:
        for part in inner[name]:
            yield from _below(part, inner.get("context", context))


def read_translations(
    paths: Paths,
    ledger: Ledger,
    make: Callable[[TranslationRow], T],
    fields: Fields | None = None,
    languages: tuple[str, str] | None = None,
    check: Callable[[str, str], str] | None = None,
) -> Iterator[T]:
    """`make` of every row of "translate". languages: source and target, as "translation" names them; where None those
    of the first row, in its order. A row with other languages, an empty side or two equal sides is dropped, and one of
    which `check(text, its language's name)` says why a side is in another language."""
    at, known = names_of("translate", fields), languages

    def parse(where: str, row: Row) -> T:
        nonlocal known
        sides: Any = row
        names = (at["source"], at["target"])
        if at["translation"] in row:
            sides = parsed(row[at["translation"]])
            if not isinstance(sides, Mapping) or len(sides) < 2:
                raise Unusable(
                    "a translation that is none", f"it has two languages, and is not {sides!r}"[:400]
                )
            if known is None and len(sides) != 2:
                raise UsageError(f"{where} has {shown(sides)}: say which is the source and which the target")
            first, second, *_ = sides
            names = known = known or (str(first), str(second))
        source, target = (text_of(sides, name) for name in names)
        if source.strip() == target.strip():
            raise Unusable("source equal to target", source[:200])
        for side, text, name in zip(("source", "target"), (source, target), names, strict=True):
            if check is not None and (why := check(text, name)):
                raise Unusable(f"{side} in another language", why)
        return make(TranslationRow(where, source, target))

    yield from read_files("translate", paths, ledger, parse, at)


def read_groups(
    paths: Paths, ledger: Ledger, make: Callable[[GroupRow], T], fields: Fields | None = None
) -> Iterator[T]:
    """`make` of every row of "embed". A pair whose "label" says that it is none is dropped."""
    at = names_of("embed", fields)

    def parse(where: str, row: Row | list[Any]) -> T:
        if isinstance(row, list):
            row = dict(zip((at["anchor"], at["positive"]), row, strict=False)) | {at["negative"]: row[2:]}
        if str(row.get(at["label"], "")).lower() in ("0", "0.0", "false"):
            raise Unusable("a pair of texts that are not alike", f"its {at['label']} is {row[at['label']]}")
        pair = (
            ("text_a", "text_b")
            if at["anchor"] not in row and at["text_a"] in row
            else ("anchor", "positive")
        )
        anchor, positive = (text_of(row, at[name]) for name in pair)
        name = at["negative"]
        given = parsed(row.get(name))
        others = list(given) if isinstance(given, list) else [] if given in (None, "") else [given]
        others += [
            row[key] for key in sorted(row) if key.startswith(f"{name}_") and row[key] not in (None, "")
        ]
        return make(GroupRow(where, anchor, positive, tuple(text_of({name: text}, name) for text in others)))

    yield from read_files("embed", paths, ledger, parse, at)


def read_scored(paths: Paths, ledger: Ledger, make: Callable[[ScoredRow], T]) -> Iterator[T]:
    """`make` of every row of "sts"."""

    def parse(where: str, row: Row) -> T:
        names = ("text_a", "text_b") if "text_a" in row else ("sentence1", "sentence2")
        first, second = (text_of(row, name) for name in names)
        if "score" not in row:
            raise Unusable('no field "score"', f"fields: {shown(row)}")
        return make(ScoredRow(where, first, second, _number(row["score"], "score")))

    yield from read_files("sts", paths, ledger, parse, _SCORED)


def _number(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Unusable(f"a {what} that is no number", f"it is {value!r}"[:400])
    return number


def _label(value: Any, regression: bool) -> Label:
    if regression:
        return _number(value, "label")
    if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
        raise Unusable(FRACTION, f"it is {value!r}")
    several = parsed(value)
    if isinstance(several, list):
        return tuple(dict.fromkeys(name_of(label, "label") for label in several))
    return name_of(value, "label")
