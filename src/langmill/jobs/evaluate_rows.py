"""The rows that `langmill evaluate` asks a model about: their kind, their prompts and the examples shown before them.

choices    {"question" or "context" or "prompt", "choices": […], "answer": its number, or the choice itself}
generate   {"prompt" or "question", perhaps "context", "answer" or "answers": a text, a list, SQuAD's object}
answer     {"question", "context", "answers"}, for a model that was taught to point at them
classify   {"text", "label"}          tag  {"tokens", "tags"}, {"text", "spans"}, CoNLL files
translate  {"translation": {…}}, {"source", "target"}          text  the rest
sts        {"sentence1", "sentence2", "score"}, {"text_a", "text_b", "score"}
embed      {"anchor", "positive"}, perhaps "negative", {"text_a", "text_b"}, [a, b, …], as `finetune --task embed`
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from langmill.apps.zero_shot import Example, Shots
from langmill.common.errors import DataError, UsageError
from langmill.common.settings import EvaluateSettings
from langmill.data.chats import Unusable, read_rows
from langmill.data.fields import CONLL, FORMATS, read_files
from langmill.data.pipeline import Ledger
from langmill.data.streams import BROKEN, COMPRESSED, lines, open_bytes

Kind = Literal["text", "choices", "generate", "answer", "classify", "tag", "translate", "sts", "embed"]
_SHAPES: tuple[
    tuple[Kind, tuple[str, ...], tuple[str, ...]], ...
] = (  # one of the first, and one of the second
    ("choices", ("choices",), ("question", "context", "prompt")),
    ("translate", ("translation",), ("translation",)),
    ("translate", ("source",), ("target",)),
    ("generate", ("prompt", "question"), ("answer", "answers")),
    ("classify", ("text",), ("label",)),
    ("tag", ("tokens",), ("tags",)),
    ("tag", ("text",), ("spans",)),
    ("embed", ("anchor",), ("positive",)),
    ("sts", ("sentence1", "text_a"), ("score",)),
    ("embed", ("text_a",), ("text_b",)),
)
_KNOWN = sorted({name for _, first, second in _SHAPES for name in first + second})
_PLACE = re.compile(r"\{(\w+)\}")
_FIRST_LINES = 200  # of a file, that say whether it holds words and tags
_TAG = re.compile(r"O|[BIESLU]-\S+")
_MORE = re.compile(r"^[^\t]*$|[^\t] +[^\t ]")  # no tab, or a space within a column


@dataclass(frozen=True)
class Asked:
    """A prompt and its answers: of `choices` the one with the number `right`; without any, all that are right."""

    where: str
    prompt: str
    answers: tuple[str, ...]
    right: int = -1

    @property
    def answer(self) -> str:
        """What an example shows."""
        return self.answers[max(self.right, 0)] if self.answers else ""


def kind_of(settings: EvaluateSettings) -> Kind:
    """As the settings say, or as the fields of the first row do; folders and shards are text."""
    if settings.task is not None:
        return settings.task
    first = Path(settings.on[0])
    plain = [suffix for suffix in map(str.lower, first.suffixes[-2:]) if suffix not in COMPRESSED]
    suffix = plain[-1] if plain else ""
    if first.is_file() and suffix in CONLL and (suffix not in (".txt", ".tsv") or _tagged(first)):
        return "tag"
    if not first.is_file() or suffix not in FORMATS:
        return "text"
    if not first.stat().st_size:
        raise DataError(f"--on {first} is empty: there is nothing to ask")
    try:
        row: Any = next(
            read_files("embed", [first], Ledger(), lambda _, row: row, {name: name for name in _KNOWN})
        )
    except (DataError, UsageError):
        return "text"  # whose reader says better what is wrong
    if isinstance(row, list):
        return "embed" if len(row) > 1 and all(isinstance(text, str) for text in row) else "text"
    for kind, some, others in _SHAPES:
        if any(name in row for name in some) and any(name in row for name in others):
            return kind
    return "text"


def _tagged(file: Path) -> bool:
    """Whether a file begins with words that have tags: "O" or "B-PER" at the end of every line; or any tags behind
    tabs, with blank lines between sentences."""
    try:
        with open_bytes(file) as stream:
            found = [line for _, line, _ in islice(lines(stream, 1 << 12), _FIRST_LINES)]
    except BROKEN:
        return False
    texts = ["" if line is None else line.decode("utf-8", "replace").strip("\r\n") for line in found]
    told = [text for text in texts if text.strip() and not text.startswith("-DOCSTART-")]
    rows = [text.split("\t" if "\t" in text else None) for text in told]
    if not rows or None in found or min(map(len, rows)) < 2:
        return False
    if all(_TAG.fullmatch(row[-1].strip()) for row in rows):
        return True
    parted = any(not text.strip() for text in texts[: texts.index(told[-1])])
    return parted and not any(_MORE.search(text) for text in told)


def check(settings: EvaluateSettings, kind: Kind) -> None:
    """UsageError names a setting that this kind of rows has no use for, so that none is passed over in silence."""
    prompted, few = (
        kind in ("choices", "generate", "classify"),
        settings.shots or settings.examples is not None,
    )
    idle = {
        "template": settings.template is not None and not prompted,
        "shots": few and not prompted,
        "target_delimiter": settings.target_delimiter is not None and kind not in ("choices", "generate"),
        "chat": settings.chat and kind != "generate",
        "stop": settings.stop and kind != "generate",
        "source": (settings.source or settings.target) and kind != "translate",
        "split": settings.split != "all" and kind != "text",
    }
    if wrong := [name for name, is_idle in idle.items() if is_idle]:
        raise UsageError(f"--{wrong[0]} does nothing for {kind} rows (say what they are with --task)")
    if (settings.source is None) != (settings.target is None):
        raise UsageError("--source and --target come together: two languages of the rows")


def template_for(row: Mapping[str, Any]) -> str:
    """The prompt where none is given, of the fields that a row has, as the harness's tasks of this kind have it."""
    if "prompt" in row:
        return "{prompt}"
    if "question" not in row:
        return "{context}"
    return ("{context}\n" if row.get("context") else "") + "Question: {question}\nAnswer:"


def read(
    paths: Sequence[str], kind: Kind, template: str | None, ledger: Ledger, what: str = "on"
) -> tuple[list[Asked], str]:
    """(the rows of files, the template that made their prompts). Rows that are none are dropped in the ledger."""
    made: list[str] = [] if template is None else [template]

    def parse(where: str, row: Any) -> Asked:
        if not isinstance(row, Mapping):
            raise Unusable("not a JSON object", f"a row is an object, not {type(row).__name__}")
        if not made:
            made.append(template_for(row))
        prompt = filled(made[0], row)
        if kind == "choices":
            choices = _choices(row.get("choices"))
            return Asked(where, prompt, choices, _right(row.get("answer"), choices))
        return Asked(where, prompt, _answers(row))

    rows = list(read_rows(paths, ledger, parse, "not a usable row"))
    if not rows:
        reasons = "; ".join(f"{count.documents} x {reason}" for reason, count in ledger.dropped().items())
        raise DataError(f"--{what} {', '.join(paths)} has no row for {kind}: {reasons or 'it is empty'}")
    return rows, made[0]


def filled(template: str, row: Mapping[str, Any]) -> str:
    """A template with a row's fields in their places; Unusable where the row lacks one."""

    def value(match: re.Match[str]) -> str:
        found = row.get(match[1])
        if not isinstance(found, str):
            raise Unusable(
                f'no text in the field "{match[1]}"', f"fields: {', '.join(map(str, list(row)[:20]))}"
            )
        return found

    if not _PLACE.search(template):
        raise UsageError(f"a template has fields of the rows, such as {{question}}: this one is {template!r}")
    return _PLACE.sub(value, template)


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise Unusable("no two choices", f"choices are a list of texts, and not {value!r}"[:400])
    if bad := [choice for choice in value if not isinstance(choice, str) or not choice.strip()]:
        raise Unusable("a choice that is no text", f"it is {bad[0]!r}"[:400])
    return tuple(value)


def _right(value: Any, choices: tuple[str, ...]) -> int:
    if isinstance(value, str) and choices.count(value) == 1:
        return choices.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    why = f"an answer is 0 to {len(choices) - 1}, or one of the choices, and not {value!r}"
    raise Unusable("an answer that is none of the choices", why[:400])


def _answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = row["answers"] if "answers" in row else row.get("answer")
    value = value.get("text") if isinstance(value, Mapping) else value
    found = value if isinstance(value, list) else [value]
    if "answers" not in row and value is None:
        raise Unusable("no answer", f"fields: {', '.join(map(str, list(row)[:20]))}")
    if bad := [one for one in found if isinstance(one, bool) or not isinstance(one, (str, int, float))]:
        raise Unusable("answers that are none", f"an answer is text, and not {bad[0]!r}"[:400])
    return tuple(str(one).strip() for one in found)


def shots(
    settings: EvaluateSettings,
    kind: Kind,
    template: str,
    rows: Sequence[Asked],
    counted: Counter[str] | None = None,
) -> str:
    """What stands before every prompt: see `few`; `counted` says how many were replaced. UsageError where there is no
    file of examples."""
    if not settings.shots:
        return ""
    counted = Counter() if counted is None else counted
    return few(settings, kind, template).before({row.prompt for row in rows}, counted)


def few(settings: EvaluateSettings, kind: Kind, template: str) -> Shots:
    """`shots` examples of the file, as `langmill classify` takes them: none that is itself asked, with its answer after
    its prompt. DataError where the file holds too few."""
    if settings.examples is None:
        raise UsageError("--shots needs --examples FILE: rows like those of --on, but other ones")
    found, _ = read([str(settings.examples)], kind, template, Ledger(), "examples")
    between = settings.target_delimiter
    made = [Example(row.prompt, row.prompt + joined(row.prompt, row.answer, between)) for row in found]
    return Shots(made, settings.shots, settings.seed, settings.examples)


def joined(prompt: str, answer: str, delimiter: str | None = None) -> str:
    """An answer as it goes on from its prompt: after the delimiter, or a space unless there is one."""
    if delimiter is None:
        delimiter = "" if prompt[-1:].isspace() else " "
    return delimiter + answer


def batches(count: int, size: int) -> Iterator[slice]:
    """0 to count, `size` at a time."""
    return (slice(at, at + size) for at in range(0, count, size))


OnRows = Callable[[int], object]
