"""Texts in, results out: what the commands that read share. Rows stream, so that files may be larger than memory."""

from __future__ import annotations

import contextlib
import csv
import difflib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from langmill.common.errors import DataError, MissingExtra, UsageError
from langmill.common.metrics import Report
from langmill.common.plain import delimiter, json_line
from langmill.common.plain import plain as plainly
from langmill.common.progress import track
from langmill.common.settings import ReadSettings

LONGEST_LINE = 64 << 20  # characters: a longer one is no text
KEPT = "surrogateescape"  # bytes that are no UTF-8, so that their line can be named
TABLES = (".csv", ".tsv")
UNREAD = {
    ".gz": "is packed",
    ".zst": "is packed",
    ".json": "is one value, not one a line",
    ".xlsx": "is no text",
}
OTHER_FORMS = (".csv", ".tsv", ".parquet", ".npy", ".json", ".xlsx")  # what --out does not write
Result = dict[str, Any]
Fields = tuple[str, ...]
TEXT: Fields = ("text",)


@dataclass(frozen=True)
class Row:
    """One thing to read: where it stands, its text, and the other fields of its row."""

    where: str
    text: str
    fields: dict[str, Any]

    def beside(self, found: Result) -> Result:
        """What was found, with the row's other fields; those of a name that both have are kept under "given"."""
        given = {name: value for name, value in self.fields.items() if name in found and found[name] != value}
        return {**self.fields, **found, **({"given": given} if given else {})}


Read = Callable[
    [Sequence[Row], "Counter[str]"], Iterator[Result]
]  # a batch; what is to be told of it is counted


def rows(
    settings: ReadSettings, counted: Counter[str], blank: bool = False, fields: Fields = TEXT
) -> Iterator[Row]:
    """The texts given as arguments, then the file's, or standard input where there is neither.

    fields: the names of a row's text where no --field is given; the first that it has text in counts. Lines without
    text are left out of plain lines and `counted`, or with `blank` are texts as the others are.
    UsageError where there is nothing to read, DataError names a row that is no text: nothing is left out silently.
    """
    drop = None if blank else counted
    fields = fields if settings.field is None else (settings.field,)
    for number, text in enumerate(settings.text, 1):
        _check(text, f"text {number}")
        yield Row(f"text {number}", text, {})
    if settings.file is not None:
        yield from _file(settings.file, fields, drop)
    elif not settings.text:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("there is no text: give one, or --file FILE, or text on standard input")
        if reconfigure := getattr(sys.stdin, "reconfigure", None):
            reconfigure(encoding="utf-8-sig", errors=KEPT)
        yield from _lines(sys.stdin, "standard input", fields, None, drop)


def _file(path: Path, fields: Fields, drop: Counter[str] | None) -> Iterator[Row]:
    if not path.is_file():
        raise UsageError(f"{path} is no file: --file takes one with texts{_instead(path)}")
    kind = path.suffix.lower()
    if kind in UNREAD:
        raise UsageError(f"{path} {UNREAD[kind]}: --file takes .jsonl, .csv, .tsv, .parquet or plain lines")
    if kind == ".parquet":
        yield from _parquet(path, fields)
        return
    with open(path, encoding="utf-8-sig", errors=KEPT, newline="" if kind in TABLES else None) as file:
        if kind in TABLES:
            yield from _table(file, path, fields)
        else:
            yield from _lines(file, str(path), fields, kind == ".jsonl", drop)


def _instead(path: Path) -> str:
    """What is there where a file is not: those of like names, or the first."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder}"
    names = sorted(one.name for one in folder.iterdir() if one.is_file() and not one.name.startswith("."))
    found = difflib.get_close_matches(path.name, names, 3, 0.6) or names[:10]
    more = ", …" if len(found) == 10 < len(names) else ""
    return f"; {folder} has {', '.join(found) + more if found else 'no files'}"


def _check(text: str, name: str, where: str = "") -> None:
    """DataError where a text has bytes that were no UTF-8, which reading kept as halves of surrogate pairs."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as reason:
        byte = len(text[: reason.start].encode()) + 1
        raise DataError(f"{name} is not UTF-8 ({where}byte {byte}): convert it first") from None


def _lines(
    file: TextIO, name: str, fields: Fields, as_rows: bool | None, drop: Counter[str] | None
) -> Iterator[Row]:
    """JSON rows or plain lines; None: rows where the first line is a JSON object. Plain lines without text are dropped
    where there is a counter for them; between rows they are nothing."""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), 1):
        where = f"{name}, line {number}"
        _check(line, name, f"line {number}, ")
        if len(line) == LONGEST_LINE:
            raise DataError(f"{where} is longer than {LONGEST_LINE:,} characters: is it text?")
        if not line.strip():
            if not as_rows and drop is None:
                yield Row(where, line.rstrip("\r\n"), {})
            elif not as_rows and drop is not None:
                drop["empty lines left out"] += 1
            continue
        if as_rows is None:
            as_rows = line.lstrip().startswith("{") and _object(line) is not None
        if not as_rows:
            yield Row(where, line.rstrip("\r\n"), {})
            continue
        row = _object(line)
        if row is None:
            raise DataError(f"{where} is no JSON object: a row has {_or(fields)}")
        if ("\\ud" in line or "\\uD" in line) and (half := _half(row)):
            raise DataError(f"{where} holds {half}, half of a surrogate pair, which is no character")
        yield _row(where, row, fields)


def _half(row: dict[str, Any]) -> str:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as reason:
        return f"\\u{ord(reason.object[reason.start]):04x}"
    return ""


def _object(line: str) -> dict[str, Any] | None:
    """The row; its numbers that are none (NaN, Infinity), which JSON does not have, are null."""
    try:
        found = json.loads(line, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _table(file: TextIO, path: Path, fields: Fields) -> Iterator[Row]:
    """As `finetune` reads tables: .csv has quotes, and "," or ";" or a tab; .tsv has tabs and no quotes."""
    csv.field_size_limit(LONGEST_LINE)
    lines = iter(lambda: file.readline(LONGEST_LINE), "")
    head = next(lines, "")
    form: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if path.suffix.lower() == ".csv":
        form = {"delimiter": delimiter(head, fields), "strict": True}
    reader = csv.DictReader(_decoded(chain([head], lines), path), **form)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise DataError(f"{where} has more cells than its head: is a quote missing?")
            yield _row(where, {str(key): value for key, value in row.items()}, fields)
    except csv.Error as reason:
        raise DataError(f"{path}, in the row after line {reader.line_num}: {reason}") from None


def _decoded(lines: Iterator[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        _check(line, str(path), f"line {number}, ")
        yield line


def _parquet(path: Path, fields: Fields) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("data", "pyarrow") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield _row(f"{path}, row {number}", {str(key): plainly(v) for key, v in row.items()}, fields)
    except (pyarrow.ArrowException, OSError) as reason:
        raise DataError(f"{path} cannot be read after row {number}: {reason}") from None


def _row(where: str, row: dict[str, Any], fields: Fields) -> Row:
    field = next((name for name in fields if isinstance(row.get(name), str)), None)
    if field is not None:
        return Row(where, row[field], {key: value for key, value in row.items() if key != field})
    if there := [f"{name!r} is {json.dumps(row[name])[:40]}" for name in fields if name in row]:
        raise DataError(f"{where} has no text in {_or(fields)}: {', '.join(there)}")
    known = ", ".join(map(str, list(row)[:20])) or "nothing"
    raise DataError(f"{where} has no text in {_or(fields)} (it has {known}): name the field with --field")


def _or(names: Fields) -> str:
    return " or ".join(map(repr, names))


def each(
    settings: ReadSettings,
    read: Read,
    *,
    quiet: bool,
    as_json: bool,
    plain: Callable[[Result], str] | None = None,
    blank: bool = False,
    fields: Fields = TEXT,
) -> Report:
    """`read` every batch of rows and write its results as they come, one JSON object a line, in the rows' order.

    With --json nothing streams: `results` of the report holds them. `plain` writes a result as text instead. blank,
    fields: see `rows`.
    """
    counted: Counter[str] = Counter()
    results: list[Result] = []
    began, count = time.perf_counter(), 0
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(_out(settings))
        progress = stack.enter_context(
            track("reading", unit="texts", quiet=quiet or as_json or out is sys.stdout)
        )
        for batch in batches(rows(settings, counted, blank, fields), settings.batch_size):
            for result in read(batch, counted):
                count += 1
                if as_json and settings.out is None:
                    results.append(result)
                    continue
                out.write((plain(result) if plain else json_line(result)) + "\n")
            out.flush()
            progress.advance(len(batch))
    seconds = time.perf_counter() - began
    if not quiet:
        said = [f"{count:,} texts in {seconds:.1f} s", *(f"{n:,} {what}" for what, n in counted.items() if n)]
        print(", ".join(said), file=sys.stderr)
    figures = {"texts_per_second": count / seconds if seconds else 0.0}
    return Report(
        settings.out, {"texts": count, **counted}, figures, "", {"results": results} if results else {}
    )


@contextlib.contextmanager
def _out(settings: ReadSettings) -> Iterator[TextIO]:
    """Standard output, or --out, which appears whole or not at all."""
    if settings.out is None:
        yield sys.stdout
        return
    if settings.out.suffix.lower() in OTHER_FORMS:
        raise UsageError(f"{settings.out} would hold JSON lines: give --out a name that ends with .jsonl")
    with fresh(settings.out, settings.force) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        yield file


@contextlib.contextmanager
def fresh(path: Path, force: bool) -> Iterator[Path]:
    """A place beside `path` to write to, which takes its name if all goes well. UsageError where it exists already."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists: choose another --out, or --force")
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def within(batch: Sequence[Row]) -> Iterator[None]:
    """Say among which rows it was that a text could not be read."""
    try:
        yield
    except DataError as error:
        raise DataError(f"among {batch[0].where} to {batch[-1].where}: {error}") from None


def batches(source: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """`size` rows at a time, fewer at the end."""
    while batch := list(islice(source, size)):
        yield batch
