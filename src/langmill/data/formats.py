"""What stands in a file, record by record. A new format is one function here and its suffix in READ.

A function takes a `Reading` and yields `Record`s; what is none it rejects with a reason, and it goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from langmill.common.errors import MissingExtra, UsageError
from langmill.common.prepare_settings import InputSettings
from langmill.common.settings import DataSettings
from langmill.data import readers
from langmill.data.chats import Unusable, json_rows
from langmill.data.extract import LARGEST
from langmill.data.guard import Guard
from langmill.data.pipeline import Ledger
from langmill.data.sources import Piece, grouped
from langmill.data.streams import BROKEN, CHUNK, COMPRESSED, lines, no_text, open_bytes
from langmill.data.tables import table_rows
from langmill.data.threads import Post, threads

ROLES = ("id", "thread", "parent", "author", "time")
_MAX_ROW = readers.MAX_ROW
_TOO_LONG = f"row longer than {_MAX_ROW >> 20} MiB"
_DAMAGED = "file is damaged from here on"
_SMALL = 1 << 20  # a .gz file of less grows to 1 GiB at most
_LONG_META = 2000  # characters of a field kept in meta


@dataclass(frozen=True, slots=True)
class Record:
    """A text, its number in the file, the bytes it was read from, and what is known of it."""

    place: int
    text: str
    size: int
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """A piece of a file being read."""

    piece: Piece
    settings: InputSettings
    guard: Guard
    reject: Callable[[int, str, int, str, str], None]  # place, reason, bytes, text, detail

    @property
    def path(self) -> Path:
        return self.piece.file.path

    def open(self) -> io.BufferedReader:
        """The bytes of the piece, decompressed."""
        if self.path.suffix.lower() in COMPRESSED:
            return open_bytes(self.path)
        return io.BufferedReader(_Range(self.path, self.piece.start, self.piece.end), CHUNK)

    def rejects(self) -> Ledger:
        """A ledger for readers that count into one: what they reject is rejected here."""
        return _Passed(self)


class _Passed(Ledger):
    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self._reading = reading

    def drop(self, source: str, where: str, reason: str, size: int, text: str = "", detail: str = "") -> None:
        place = where.rpartition(":")[2] if where.startswith(f"{self._reading.path.as_posix()}:") else ""
        self._reading.reject(int(place) if place.isdigit() else 0, reason, size, text, detail)


class _Range(io.RawIOBase):
    """Some bytes of a file."""

    def __init__(self, path: Path, start: int, end: int) -> None:
        self._file = open(path, "rb", buffering=0)
        self._file.seek(start)
        self._left = end - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left)) or b""
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def check_fields(settings: InputSettings) -> dict[str, str]:
    """The map of `read.fields`, with the text's field; UsageError for a role that there is not."""
    found = {"text": settings.text_field}
    for given in settings.fields:
        role, equals, name = given.partition("=")
        if role not in ROLES or not equals or not name:
            raise UsageError(f"read.fields '{given}' is not NAME=FIELD with a NAME of {', '.join(ROLES)}")
        found[role] = name
    return found


def records(reading: Reading) -> Iterator[Record]:
    """The records of a piece. Damage, and a file that grows without end, are rejected where they are met."""
    given = False

    def reject(*told: Any) -> None:
        nonlocal given
        given = True
        reading.reject(*told)

    try:
        if reading.path.suffix.lower() in COMPRESSED and _is_bomb(reading.path, reading.settings.expansion):
            detail = f"it grows more than {reading.settings.expansion} times (read.expansion)"
            reading.reject(0, "compressed beyond belief", reading.piece.end, "", detail)
            return
        for record in READ[reading.piece.file.format](replace(reading, reject=reject)):
            given = True
            yield record
    except BROKEN as error:
        opened = not isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError)
        size = 0 if given else reading.piece.end - reading.piece.start
        reading.reject(0, _DAMAGED if opened else "cannot be opened", size, "", str(error).partition("\n")[0])


def _is_bomb(path: Path, expansion: int) -> bool:
    size = path.stat().st_size
    if size < _SMALL and path.suffix.lower() == ".gz":
        return False
    limit, grown = max(1 << 30, size * expansion), 0
    try:
        with open_bytes(path) as stream:
            while data := stream.read1(CHUNK):
                grown += len(data)
                if grown > limit:
                    return True
    except BROKEN:
        pass  # the reading that follows reports it
    return False


def text(reading: Reading) -> Iterator[Record]:
    """.txt, .md: documents of at most `section_bytes`, numbered from 0."""
    settings = DataSettings(section_bytes=reading.settings.section_bytes)
    ledger = reading.rejects()
    found = readers.READERS[".txt"](readers._Reading(reading.path, "", settings, ledger))
    for number, document in enumerate(found):
        yield Record(number, document.text, len(document.text.encode("utf-8")))


def jsonl(reading: Reading) -> Iterator[Record]:
    yield from _documents(reading, _json_lines(reading))


def json_file(reading: Reading) -> Iterator[Record]:
    yield from _documents(reading, json_rows(reading.path, reading.rejects()))


def csv(reading: Reading) -> Iterator[Record]:
    wanted, quoted = [reading.settings.text_field], reading.piece.file.format == ".csv"
    yield from _documents(reading, table_rows(reading.path, reading.rejects(), wanted, quoted))


def _json_lines(reading: Reading) -> Iterator[tuple[int, Any, int]]:
    with reading.open() as stream:
        if reading.piece.start == 0 and (detail := no_text(stream.peek())):
            return reading.reject(0, "not UTF-8", reading.piece.file.size, "", detail)
        for number, line, size in lines(stream, _MAX_ROW):
            place = reading.piece.first + number - 1
            if line is None:
                reading.reject(place, _TOO_LONG, size, "", "")
            elif not line.isspace():
                try:
                    yield place, from_json(line), size
                except ValueError:  # the quick parser takes no half surrogate pair
                    yield from _second_look(reading, place, line)


def _second_look(reading: Reading, place: int, line: bytes) -> Iterator[tuple[int, Any, int]]:
    try:
        yield place, json.loads(line.decode("utf-8")), len(line)
    except UnicodeDecodeError as error:
        detail = f"byte {error.start} of the line is not part of a UTF-8 character"
        reading.reject(place, "not UTF-8", len(line), line[:400].decode("utf-8", errors="replace"), detail)
    except (ValueError, RecursionError) as error:
        reading.reject(
            place, "broken JSON", len(line), line[:400].decode("utf-8", errors="replace"), str(error)
        )


def _documents(reading: Reading, rows: Iterator[tuple[Any, Any, int]]) -> Iterator[Record]:
    """A record of each row, or of each thread of rows."""
    at = check_fields(reading.settings)
    found = (record for row in rows if (record := _record(reading, at, *row)))
    if not grouped(reading.settings):
        yield from (record for record, _ in found)
        return
    posts = (Post(r.place, r.text, r.size, *(_key(roles.get(role)) for role in ROLES)) for r, roles in found)
    for place, told, size, meta in threads(posts):
        yield Record(place, told, size, meta)


_Row = tuple[Record, dict[str, Any]]


def _key(value: Any) -> str | None:
    return None if value is None else str(_plain(value))


def _record(reading: Reading, at: Mapping[str, str], place: int, row: Any, size: int) -> _Row | None:
    """(the record of a row, what it holds in its roles); None where it is rejected."""
    name = at["text"]
    value = _reach(row, name) if isinstance(row, dict) else None
    if isinstance(value, str) and value.strip():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            reading.reject(
                place, "half a surrogate pair in the text", size, "", f"character {error.start} of the text"
            )
            return None
        meta = {key: _plain(row[key]) for key in reading.settings.meta if row.get(key) is not None}
        roles = {role: _reach(row, field) for role, field in at.items() if role != "text"}
        if roles.get("id") is not None:
            meta["id"] = _plain(roles["id"])
        return Record(place, value, size, meta), roles
    if not isinstance(row, dict):
        reason, detail = "not a JSON object", f"it is {readers._kind(row)}"
    elif value is None and name not in row:
        reason, detail = f'no field "{name}"', f"fields: {', '.join(map(str, list(row)[:20]))}"
    elif isinstance(value, str):
        reason, detail = f'field "{name}" is empty', "it holds no text"
    else:
        reason, detail = f'field "{name}" is not text', f"it is {readers._kind(value)}"
    reading.reject(place, reason, size, "", detail)
    return None


def _reach(row: Any, name: str) -> Any:
    """A field; a.b is field b of the object in field a, where no field has the name a.b itself."""
    if not isinstance(row, dict) or name in row or "." not in name:
        return row.get(name) if isinstance(row, dict) else None
    first, _, rest = name.partition(".")
    return _reach(row.get(first), rest)


def _plain(value: Any) -> Any:
    """What meta holds of a field: numbers and truth values as they are, other things as text, cut when long."""
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value  # infinity is no JSON
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=True, default=str)
    return shown.encode("utf-8", "replace").decode("utf-8")[:_LONG_META]


def page(reading: Reading) -> Iterator[Record]:
    yield from _whole(reading, "html")


def eml(reading: Reading) -> Iterator[Record]:
    yield from _whole(reading, "mail")


def _whole(reading: Reading, kind: str) -> Iterator[Record]:
    with reading.open() as stream:
        data = stream.read(LARGEST + 1)
    yield from guarded(reading, 0, kind, data)


def guarded(reading: Reading, place: int, kind: str, data: bytes, *hints: str) -> Iterator[Record]:
    """The record that `extract.EXTRACT[kind]` makes of bytes."""
    if len(data) > LARGEST:
        reading.reject(place, f"larger than {LARGEST >> 20} MiB", len(data), "", "")
        return
    try:
        for text, meta in reading.guard.call(kind, data, *hints):
            yield Record(place, text.encode("utf-8", "replace").decode("utf-8"), len(data), meta)
    except Unusable as error:
        reading.reject(place, error.reason, len(data), "", str(error))


def pdf(reading: Reading) -> Iterator[Record]:
    size = reading.piece.file.size
    try:
        for text, meta in reading.guard.call("pdf", str(reading.path)):
            yield Record(0, text.encode("utf-8", "replace").decode("utf-8"), size, meta)
    except Unusable as error:
        reading.reject(0, error.reason, size, "", str(error))


def mbox(reading: Reading) -> Iterator[Record]:
    """Mails one after the other; each begins with a line "From " at the start or behind a blank line (RFC 4155)."""
    kept: list[bytes] = []
    place, size, blank = 0, 0, True
    with reading.open() as stream:
        while line := stream.readline(CHUNK):
            if blank and line.startswith(b"From "):
                if kept:
                    yield from guarded(reading, place, "mail", b"".join(kept))
                place, size, kept = place + 1, 0, []
            elif size <= LARGEST:  # of a longer one it is enough to know that it is too long
                size += len(line)
                kept.append(line[1:] if line.startswith((b">From ", b">>From ")) else line)
            blank = not line.strip()
    if kept:
        yield from guarded(reading, max(1, place), "mail", b"".join(kept))


def warc(reading: Reading) -> Iterator[Record]:
    """Pages and texts among the responses of a crawl, with address and date."""
    try:
        from warcio.archiveiterator import ArchiveIterator  # type: ignore[import-untyped]
        from warcio.exceptions import ArchiveLoadFailed  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra("data", "warcio") from None
    place = 0
    try:
        packed = reading.path.suffix.lower() == ".zst"  # of .gz the package needs the members, one a record
        with reading.open() if packed else open(reading.path, "rb") as stream:
            archive = iter(ArchiveIterator(stream))
            while (record := _following(archive)) is not None:
                if record.rec_type not in ("response", "resource", "conversion"):
                    continue
                place += 1
                yield from _archived(reading, place, record)
    except (ArchiveLoadFailed, ValueError, AttributeError, EOFError) as error:
        reading.reject(place + 1, _DAMAGED, 0, "", f"{type(error).__name__}: {error}"[:400])


def _following(archive: Iterator[Any]) -> Any:
    """The next record; None behind the last. What the package has to say of damage goes nowhere: it quotes the text."""
    with contextlib.redirect_stderr(io.StringIO()):
        return next(archive, None)


def _archived(reading: Reading, place: int, record: Any) -> Iterator[Record]:
    http = record.http_headers if record.http_headers is not None else record.rec_headers
    kind, _, more = (http.get_header("Content-Type") or "").lower().partition(";")
    charset = more.partition("charset=")[2].strip(" \"'").partition(";")[0]
    stated = int(record.rec_headers.get_header("Content-Length") or 0)
    status = http.get_statuscode() if record.http_headers is not None else "200"
    if not (status or "").startswith("2"):
        return reading.reject(place, "page was not there (HTTP status)", stated, "", f"status {status}")
    if kind.strip() not in ("text/html", "application/xhtml+xml", "text/plain"):
        return reading.reject(
            place, "not a page or text", stated, "", f"it is {kind.strip() or 'of no stated type'}"
        )
    begins = record.raw_stream.tell()
    data = record.content_stream().read(LARGEST + 1)
    while len(data) <= LARGEST and (further := record.content_stream().read(CHUNK)):
        data += further
    ends = record.raw_stream.tell()
    known = {
        "url": record.rec_headers.get_header("WARC-Target-URI"),
        "date": record.rec_headers.get_header("WARC-Date"),
    }
    meta = {name: value for name, value in known.items() if value}
    header = http.get_header("X-Robots-Tag")
    if len(data) <= LARGEST and record.length and ends - begins < record.length - begins:
        return reading.reject(
            place, "record is cut short", len(data), "", f"{ends} of {record.length} bytes are there"
        )
    for one in guarded(reading, place, "plain" if kind.strip() == "text/plain" else "html", data, charset):
        robots = [asked for asked in (one.meta.get("robots"), header) if asked]
        told = {"robots": ", ".join(robots)} if robots else {}
        yield Record(one.place, one.text, one.size, one.meta | meta | told)


READ: dict[str, Callable[[Reading], Iterator[Record]]] = {
    ".txt": text, ".md": text, ".html": page, ".htm": page, ".xhtml": page, ".warc": warc, ".pdf": pdf,
    ".jsonl": jsonl, ".ndjson": jsonl, ".json": json_file, ".parquet": json_file, ".csv": csv, ".tsv": csv,
    ".mbox": mbox, ".eml": eml,
}  # fmt: skip
