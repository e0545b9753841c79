"""Rows of labelled files and their fields: which columns a task looks for, and what they must hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from langmill.common.errors import DataError, UsageError
from langmill.data.chats import Unusable, json_rows, usable
from langmill.data.pipeline import Ledger
from langmill.data.streams import COMPRESSED
from langmill.data.tables import Rows, table_rows, tagged_sentences

T = TypeVar("T")
Row = Mapping[str, Any]
Paths = Sequence[str | Path]
Fields = Mapping[str, str]
FIELDS = {
    "classify": ("text", "label", "text_pair"),
    "tag": ("tokens", "tags", "text", "spans"),
    "answer": ("question", "context", "answers", "id", "answer", "answer_start"),
    "translate": ("translation", "source", "target"),
    "embed": ("anchor", "positive", "negative", "text_a", "text_b", "label"),
}
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
CONLL = (".conll", ".bio", ".iob", ".iob2", ".txt", ".tsv")  # for tags; there .tsv has no header


def read_files(
    task: str,
    paths: Paths,
    ledger: Ledger,
    parse: Callable[[str, Any], T],
    at: Fields,
    unfold: Callable[[Rows], Rows] = iter,
) -> Iterator[T]:
    """`parse(place, row)` of every row of files and folders, in order; `unfold` makes the rows of those in a file.

    Raises UsageError for a path that is missing or of another format, DataError where no row is left.
    """

    def checked(where: str, value: Any) -> T:
        if not isinstance(value, Mapping) and not (task == "embed" and isinstance(value, list)):
            raise Unusable("not a JSON object", f"a row is an object with {', '.join(at.values())}")
        return parse(where, value)

    found = False
    for file in _files(task, paths):
        rows = unfold(_rows_of(task, file, ledger, at))
        for made in usable(file, rows, ledger, checked, "not a usable row", ascii=True):
            found = True
            yield made
    if not found:
        reasons = [
            f"{count.documents} x {reason} ({next(iter(ledger.examples.get(reason, [])), '')[:400]})"
            for reason, count in ledger.dropped().items()
        ]
        raise DataError(
            f"found no row for {task} in {', '.join(map(str, paths)) or 'no path at all'}: "
            + ("set aside were " + "; ".join(reasons) if reasons else "there is nothing in it")
        )


def _rows_of(task: str, file: Path, ledger: Ledger, at: Fields) -> Rows:
    kind = _kind(file)
    if task == "tag" and kind in CONLL:
        return tagged_sentences(file, ledger)
    if kind in (".csv", ".tsv"):
        return table_rows(file, ledger, list(at.values()), quoted=kind == ".csv")
    return json_rows(file, ledger)


def _files(task: str, paths: Paths) -> Iterator[Path]:
    known = FORMATS + (CONLL if task == "tag" else ())
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in known)
            if not inside:
                raise UsageError(f"{path} holds no {', '.join(known)} file")
            yield from inside
        elif not path.exists():
            raise UsageError(f"{path} does not exist: give a file of rows, or a folder of them")
        elif _kind(path) not in known:
            raise UsageError(f"{path} is of no known format: known are {', '.join(known)}")
        else:
            yield path


def _kind(file: Path) -> str:
    plain = [suffix for suffix in map(str.lower, file.suffixes[-2:]) if suffix not in COMPRESSED]
    return plain[-1] if plain else ""


def names_of(task: str, fields: Fields | None) -> dict[str, str]:
    """The columns of a task's fields by the fields' own names; UsageError for a field that there is not."""
    known = FIELDS[task]
    if unknown := [name for name in fields or () if name not in known]:
        raise UsageError(f"rows for {task} have no field {unknown[0]}: they have {', '.join(known)}")
    return {name: name for name in known} | dict(fields or {})


def text_of(row: Row, name: str) -> str:
    """A field that holds text; Unusable where it does not."""
    value = row.get(name)
    if name not in row:
        raise Unusable(f'no field "{name}"', f"fields: {shown(row)}")
    if not isinstance(value, str):
        raise Unusable(f'field "{name}" is not text', f"it is {value!r}"[:400])
    if not value.strip():
        raise Unusable(f'field "{name}" is empty', "it holds no text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise Unusable("half a surrogate pair in the text", f'in the field "{name}"')
    return value


def list_of(row: Row, name: str) -> list[Any]:
    """A field that holds a list; Unusable where it does not."""
    value = parsed(row.get(name))
    if not isinstance(value, list):
        raise Unusable(f'field "{name}" is not a list', f"it is {value!r}"[:400])
    return value


def parsed(value: Any) -> Any:
    """A list or object, which in CSV is written as JSON."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def name_of(value: Any, what: str) -> str:
    """The name of a class: text as it is, numbers and truth values as JSON writes them."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables with gaps hold whole numbers as floats
    if isinstance(value, int):
        return json.dumps(value)
    if not isinstance(value, str) or not value.strip():
        why = (
            "numbers that are not whole need --kind regress" if isinstance(value, float) else "there is none"
        )
        raise Unusable(f"no usable {what}", f"the {what} is {value!r}: {why}"[:400])
    return value.strip()


def shown(row: Row) -> str:
    """Its fields, for a message."""
    return ", ".join(map(str, list(row)[:20])) or "none"
