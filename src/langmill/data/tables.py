"""Rows of CSV and TSV files, and sentences of word-and-tag files, as (place, row, bytes); what is none is rejected.

.csv has quotes as in RFC 4180 and "," or ";" or a tab between fields, .tsv has tabs and no quotes; both begin with
the names of their columns. A word-and-tag file (CoNLL) has a word and, last on its line, a tag, behind white space, and
a blank line between sentences; -DOCSTART- lines are passed over. Text formats may be compressed (.gz, .zst).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from langmill.common.plain import delimiter
from langmill.data.pipeline import Ledger
from langmill.data.readers import MAX_ROW
from langmill.data.streams import BROKEN, lines, lost, no_text, open_bytes

Rows = Iterator[tuple[int | str, Any, int]]
_TOO_LONG = f"row longer than {MAX_ROW >> 20} MiB"
_DAMAGED = "file is damaged from here on"
_MARKER = "-DOCSTART-"


def table_rows(file: Path, ledger: Ledger, wanted: Sequence[str], quoted: bool) -> Rows:
    """Rows as objects of text by the header's names. `wanted` are columns of which at least one must be there."""
    source, size, number = file.as_posix(), 0, 0
    header: list[str] = []
    options: Any = {"strict": True} if quoted else {"quoting": csv.QUOTE_NONE, "delimiter": "\t"}

    def text() -> Iterator[str]:
        nonlocal size, number
        for place, line, length in lines(stream, MAX_ROW):
            number = place
            if line is None:
                ledger.reject(source, f"{source}:{place}", _TOO_LONG, length)
            else:
                size += length
                yield line.decode("utf-8", errors="surrogateescape")

    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW))  # the library's default is 128 KiB
    try:
        with open_bytes(file) as stream:
            if detail := no_text(stream.peek()):
                return ledger.reject(source, source, "not UTF-8", file.stat().st_size, detail=detail)
            found = text()
            head = next(found, "")
            if quoted:
                options["delimiter"] = delimiter(head, wanted)
            header = next(csv.reader([head], **options), [])
            if not set(wanted) & set(header):
                detail = f"columns: {', '.join(header)[:400]}"
                ledger.reject(
                    source, source, f"no column {' or '.join(wanted)}", file.stat().st_size, "", detail
                )
                return
            size, reader = 0, csv.reader(found, **options)
            while True:
                first = number + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    ledger.reject(source, f"{source}:{first}", "broken CSV", size, detail=str(error))
                else:
                    if why := _unfit(cells, header):
                        shown = ",".join(cells)[:400].encode("utf-8", "replace").decode()
                        ledger.reject(source, f"{source}:{first}", why, size, shown, f"{len(cells)} fields")
                    elif cells:
                        yield first, dict(zip(header, cells, strict=True)), size
                size = 0
    except BROKEN as error:
        size = size if number else lost(file, False) or size
        ledger.reject(source, f"{source}:{number + 1}", _DAMAGED, size, detail=str(error))


def _unfit(cells: Sequence[str], header: Sequence[str]) -> str:
    if any(not cell.isascii() and any("\udc80" <= c <= "\udcff" for c in cell) for cell in cells):
        return "not UTF-8"
    return "not as many fields as columns" if cells and len(cells) != len(header) else ""


def tagged_sentences(file: Path, ledger: Ledger) -> Rows:
    """Sentences as {"tokens", "tags"}, by the number of their first line."""
    source, number, first, size, wrong = file.as_posix(), 0, 1, 0, ""
    words: list[str] = []
    tags: list[str] = []
    try:
        with open_bytes(file) as stream:
            if detail := no_text(stream.peek()):
                return ledger.reject(source, source, "not UTF-8", file.stat().st_size, detail=detail)
            for number, line, length in _and_a_blank(stream):
                size += length
                if line is not None and not line.strip():
                    if wrong:
                        ledger.reject(source, f"{source}:{first}", wrong, size, " ".join(words)[:400])
                    elif words:
                        yield first, {"tokens": words, "tags": tags}, size
                    words, tags, size, wrong, first = [], [], 0, "", number + 1
                    continue
                columns, why = _columns(line)
                wrong = wrong or why
                if columns and columns[0] != _MARKER:
                    words.append(columns[0])
                    tags.append(columns[-1])
    except BROKEN as error:
        size = size if number else lost(file, False) or size
        ledger.reject(source, f"{source}:{number + 1}", _DAMAGED, size, detail=str(error))


def _and_a_blank(stream: Any) -> Iterator[tuple[int, bytes | None, int]]:
    number = 0
    for number, line, size in lines(stream, MAX_ROW):
        yield number, line, size
    yield number + 1, b"", 0


def _columns(line: bytes | None) -> tuple[list[str], str]:
    """(the columns of a line, or what is wrong with it)."""
    if line is None:
        return [], _TOO_LONG
    try:
        text = line.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError:
        return [], "not UTF-8"
    # A tab parts columns where there is one, so that a word may hold a space of another kind.
    columns = [column.strip() for column in text.split("\t")] if "\t" in text else text.split()
    if len(columns) < 2 and columns[0] != _MARKER:
        return [], "a line without a tag"
    return columns, ""
