"""Files and folders to documents: streaming, in bounded memory, and nothing is lost in silence.

A file or row that cannot be used is counted in the ledger with its reason, and reading goes on. Folders
are read recursively in sorted order, each folder once however many links lead to it; models and runs of
Langmill's own that lie among the texts are passed over. Bytes must be UTF-8 (a leading byte-order mark is
removed).
"""

from __future__ import annotations

import codecs
import csv
import json
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pydantic_core import from_json

from langmill.common.errors import DataError, MissingExtra, UsageError
from langmill.common.files import written_here
from langmill.common.settings import DataSettings
from langmill.data.pipeline import Ledger
from langmill.data.streams import BROKEN, CHUNK, COMPRESSED, first_bad_byte, lines, lost, no_text, open_bytes
from langmill.text.document import Document

MAX_ROW = 16 << 20  # bytes of one row of JSONL, CSV or Parquet: a longer one is rejected
_NAMED = 50  # a folder with more entries than this counts as one source, not each entry as one
_TOO_LONG = f"row longer than {MAX_ROW >> 20} MiB"


@dataclass(frozen=True, slots=True)
class _Reading:
    """One file being read."""

    file: Path
    source: str
    settings: DataSettings
    ledger: Ledger

    def document(self, place: int, text: str) -> Document:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
        self.ledger.take(self.source, size)
        return Document(f"{self.file.as_posix()}:{place}", text, self.source)

    def reject(self, place: int, reason: str, size: int, text: str = "", detail: str = "") -> None:
        """Count a row, or the rest of the file, that is none."""
        self.ledger.reject(self.source, f"{self.file.as_posix()}:{place}", reason, size, text, detail)

    def reject_all(self, reason: str, detail: str) -> None:
        """Count the whole file as one that is none."""
        size = self.file.stat().st_size
        self.ledger.reject(self.source, self.file.as_posix(), reason, size, "", detail)

    def broken(self, place: int, error: BaseException, whole: bool) -> None:
        """Count what could not be read: whole, the file with its size; else its rest, of which nobody knows how long
        it is, as 0 bytes."""
        opened = not isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError)
        reason = "file is damaged from here on" if opened else "cannot be opened"
        self.reject(place, reason, lost(self.file, not whole), "", str(error).partition("\n")[0])


def read(paths: Sequence[str | Path], settings: DataSettings, ledger: Ledger) -> Iterator[Document]:
    """Documents of files and folders, in the order named; every one is counted in by the ledger.

    .txt and .md are cut into documents of at most `settings.section_bytes` at blank lines, else lines
    (the pieces join to the file); .jsonl, .csv and .parquet give one for each row, from
    `settings.text_field`. Text formats may be compressed (.gz, .zst). UsageError as `check_paths` raises
    it, DataError where nothing at all was found, MissingExtra where .zst or .parquet needs a package.
    """
    check_paths(paths)
    found = False
    for file, source in files(paths, ledger):
        for document in READERS[format_of(file)](_Reading(file, source, settings, ledger)):
            found = True
            yield document
    if not found:
        reasons = [f"{count.documents} x {reason}" for reason, count in ledger.dropped().items()]
        raise DataError(
            f"found no documents in {', '.join(map(str, paths)) or 'no path at all'}. Looked for "
            f"{', '.join(READERS)} (text formats also with {' or '.join(COMPRESSED)}); "
            + ("set aside: " + "; ".join(reasons) if reasons else "there was no file")
        )


def check_paths(paths: Sequence[str | Path]) -> None:
    """UsageError where a path does not exist, or a file named by itself has no known format."""
    for path in map(Path, paths):
        if not path.exists():
            raise UsageError(f"{path} does not exist")
        if not path.is_dir() and not format_of(path):
            raise UsageError(f"{path} is not a known format: known are {', '.join(READERS)}")


def format_of(file: PurePath) -> str:
    """The file's format as the suffix that names it; "" where it is not a known one."""
    name = PurePath(file.name.lower())
    if name.suffix not in COMPRESSED:
        return name.suffix if name.suffix in READERS else ""
    suffix = PurePath(name.stem).suffix
    return suffix if suffix in READERS and suffix != ".parquet" else ""


def files(paths: Sequence[str | Path], ledger: Ledger) -> Iterator[tuple[Path, str]]:
    """Every file to read, with the source it counts for; what cannot be read is counted in the ledger."""
    seen: set[tuple[int, int]] = set()
    for path in map(Path, paths):
        if (path / "clean").is_dir() and (path / "manifest.json").is_file():
            yield from _folder(path / "clean", path.as_posix(), ledger, seen)  # what `data prepare` made
        elif path.is_dir():
            yield from _folder(path, None, ledger, seen)
        else:
            yield path, path.as_posix()


def _folder(
    folder: Path, source: str | None, ledger: Ledger, seen: set[tuple[int, int]]
) -> Iterator[tuple[Path, str]]:
    """The files under `folder`; a source of None names each entry of a small folder as its own."""
    name = folder.as_posix()
    try:
        status = folder.stat()
        entries = sorted(folder.iterdir())
    except OSError as error:
        ledger.reject(source or name, name, "folder cannot be read", 0, detail=str(error))
        return
    if (status.st_dev, status.st_ino) in seen:
        ledger.reject(source or name, name, "link to a folder that was read already", 0)
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        mine = source or (entry.as_posix() if len(entries) <= _NAMED else name)
        try:
            status = entry.stat()
        except OSError as error:
            ledger.reject(mine, entry.as_posix(), "cannot be opened", 0, detail=str(error))
            continue
        if entry.name.startswith("."):
            ledger.reject(mine, entry.as_posix(), "hidden file or folder", status.st_size)
        elif stat.S_ISDIR(status.st_mode) and written_here(entry):
            ledger.reject(mine, entry.as_posix(), "a model or run of Langmill", 0)
        elif stat.S_ISDIR(status.st_mode):
            yield from _folder(entry, mine, ledger, seen)
        elif not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            ledger.reject(mine, entry.as_posix(), "not a regular file", 0)
        elif not format_of(entry):
            reason = f"not a known format ({entry.suffix.lower() or 'no extension'})"
            ledger.reject(mine, entry.as_posix(), reason, status.st_size)
        else:
            yield entry, mine


def _text(reading: _Reading) -> Iterator[Document]:
    """Plain text, in sections. A file that is not UTF-8 to its end gives nothing."""
    if not _is_utf8(reading):
        return
    limit, rest, place = reading.settings.section_bytes, b"", 0
    given = False
    try:
        with open_bytes(reading.file) as stream:
            while data := stream.read1(CHUNK):
                rest += data
                if place == 0 and rest.startswith(codecs.BOM_UTF8):
                    rest, place = rest[3:], 3
                start = 0
                while len(rest) - start > limit:
                    end = _cut(rest, start, start + limit)
                    yield reading.document(place + start, rest[start:end].decode("utf-8"))
                    start, given = end, True
                rest, place = rest[start:], place + start
    except BROKEN as error:
        reading.broken(place + len(rest), error, whole=not rest and not given)
        given = True
    if rest or not given:
        yield reading.document(place, rest.decode("utf-8", errors="ignore"))


def _cut(data: bytes, start: int, end: int) -> int:
    """Where to end the section that starts at `start`: after a blank line, a line, or at a character."""
    blank = max(data.rfind(mark, start, end) + len(mark) for mark in (b"\n\n", b"\n\r\n"))
    if blank > start + max(3, (end - start) // 4):  # a search that found nothing gives 2 at most
        return blank
    line = data.rfind(b"\n", start, end) + 1
    if line > start:
        return line
    while data[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end


def _is_utf8(reading: _Reading) -> bool:
    """Whether the file is UTF-8 to its end, or to where it is damaged; it is rejected where not."""
    try:
        with open_bytes(reading.file) as stream:
            if detail := no_text(stream.peek()):
                reading.reject_all("not UTF-8", detail)
                return False
            bad = first_bad_byte(stream)
    except BROKEN:
        return True  # the reading that follows reports it
    if bad is not None:
        reading.reject_all("not UTF-8", f"byte {bad} is not part of a UTF-8 character")
    return bad is None


def _jsonl(reading: _Reading) -> Iterator[Document]:
    field, number = reading.settings.text_field, 0
    try:
        with open_bytes(reading.file) as stream:
            if detail := no_text(stream.peek()):
                reading.reject_all("not UTF-8", detail)
                return
            for number, line, size in lines(stream, MAX_ROW):
                if line is None:
                    reading.reject(number, _TOO_LONG, size)
                    continue
                try:
                    text = from_json(line)[field]
                except (ValueError, LookupError, TypeError):
                    text = None
                if isinstance(text, str):
                    yield reading.document(number, text)
                elif not line.isspace():
                    yield from _second_look(reading, number, line)
    except BROKEN as error:
        reading.broken(number + 1, error, whole=number == 0)


def _second_look(reading: _Reading, number: int, line: bytes) -> Iterator[Document]:
    """A line that the quick parser did not take: its document after all, or why there is none."""
    field = reading.settings.text_field
    try:
        row = json.loads(line.decode("utf-8"))
        if isinstance(row, dict) and isinstance(row.get(field), str):
            row[field].encode("utf-8")
            yield reading.document(number, row[field])
            return
        if not isinstance(row, dict):
            reason, detail = "not a JSON object", f"it is {_kind(row)}"
        elif field in row:
            reason, detail = f'field "{field}" is not text', f"it is {_kind(row[field])}"
        else:
            reason, detail = f'no field "{field}"', f"fields: {', '.join(list(row)[:20])}"
            detail += "; chat rows are for finetune --task chat" if "messages" in row else ""
    except UnicodeDecodeError as error:
        reason, detail = "not UTF-8", f"byte {error.start} of the line is not part of a UTF-8 character"
    except UnicodeEncodeError as error:
        reason, detail = "half a surrogate pair in the text", f"character {error.start} of the text"
    except (ValueError, RecursionError) as error:
        reason, detail = "broken JSON", str(error)
    reading.reject(number, reason, len(line), line[:400].decode("utf-8", errors="replace"), detail)


def _kind(value: object) -> str:
    kinds: dict[type, str] = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    kinds |= {list: "a list", dict: "an object", type(None): "null", bytes: "bytes"}
    return kinds.get(type(value), type(value).__name__)


def _csv(reading: _Reading) -> Iterator[Document]:
    if not _is_utf8(reading):
        return
    field, number = reading.settings.text_field, 1
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW))  # the library's default is 128 KiB
    try:
        with open_bytes(reading.file) as stream:
            texts = (_line(line) for _, line, _ in lines(stream, MAX_ROW))
            header = next(texts, "")
            column, delimiter = _column(header, field)
            if column < 0:
                reading.reject_all(f'no column "{field}"', f"columns: {header.strip()[:400]}")
                return
            for row in csv.reader(texts, delimiter=delimiter):
                number += 1
                if len(row) > column:
                    yield reading.document(number, row[column])
                elif row:
                    size = sum(len(cell.encode("utf-8")) for cell in row)
                    reading.reject(number, f'no field "{field}"', size, row[0], f"{len(row)} fields")
    except (*BROKEN, csv.Error, UnicodeDecodeError) as error:
        reading.broken(number + 1, error, whole=number == 1)


def _line(line: bytes | None) -> str:
    if line is None:
        raise csv.Error(_TOO_LONG)
    return line.decode("utf-8")


def _column(header: str, field: str) -> tuple[int, str]:
    """(number of the column, delimiter); -1 where no usual delimiter yields the column."""
    for delimiter in ",;\t":
        names = next(csv.reader([header], delimiter=delimiter), [])
        if field in names:
            return names.index(field), delimiter
    return -1, ","


def _parquet(reading: _Reading) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingExtra("data", "pyarrow") from None
    field, number = reading.settings.text_field, 0
    try:
        with ParquetFile(reading.file, buffer_size=CHUNK) as table:
            names = table.schema_arrow.names
            if field not in names:
                reading.reject_all(f'no column "{field}"', f"columns: {', '.join(names[:20])}")
                return
            for batch in table.iter_batches(batch_size=256, columns=[field], use_threads=False):
                for value in batch.column(0):
                    number += 1
                    yield from _cell(reading, number, value)
    except (pyarrow.ArrowException, *BROKEN) as error:
        reading.broken(number + 1, error, whole=number == 0)


def _cell(reading: _Reading, number: int, value: Any) -> Iterator[Document]:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        detail = f"byte {error.start} of the value is not part of a UTF-8 character"
        reading.reject(number, "not UTF-8", len(error.object), "", detail)
        return
    if not isinstance(text, str):
        reason = f'field "{reading.settings.text_field}" is not text'
        reading.reject(number, reason, 0, "", f"it is {_kind(text)}")
    elif len(text) > MAX_ROW:
        reading.reject(number, _TOO_LONG, len(text.encode("utf-8")))
    else:
        yield reading.document(number, text)


READERS: dict[str, Callable[[_Reading], Iterator[Document]]] = {
    ".txt": _text,
    ".md": _text,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
