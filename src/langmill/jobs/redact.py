"""`langmill privacy redact`: files without personal details and secrets, and how many of each there were."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langmill.apps.texts import fresh
from langmill.common.errors import DataError, MissingExtra, UsageError
from langmill.common.metrics import Report
from langmill.common.plain import delimiter
from langmill.common.privacy_settings import RedactionSettings
from langmill.common.progress import track
from langmill.common.settings import RedactSettings
from langmill.data.streams import COMPRESSED, no_text
from langmill.privacy.key import read_key
from langmill.privacy.names import names
from langmill.privacy.redact import Redact, Tally

LARGEST = 1 << 30  # bytes of a text file, which is read as a whole
_ROWS = 1024
_SMALL = 99_999  # a whole number up to this is nobody's
# What says its text in codes, between marks or packed: details would be missed there.
_CODED = {
    ".eml": "a mail",
    ".mbox": "mails",
    ".pdf": "a PDF",
    ".warc": "an archive of pages",
} | dict.fromkeys((".html", ".htm", ".xhtml"), "a page")
_BEGINS = {b"%PDF-": "a PDF", b"%!PS": "PostScript", b"{\\rtf": "rich text"}
_PARTS = re.compile(
    r"^content-transfer-encoding:[ \t]*(?:base64|quoted-printable)", re.IGNORECASE | re.MULTILINE
)


def step(settings: RedactionSettings) -> Redact:
    """The step that the settings describe, its key read. UsageError for a key without pseudonyms, or none with them."""
    keyed = settings.key_file is not None or settings.key_env is not None or settings.make_key
    if settings.policy != "pseudonym" and keyed:
        raise UsageError("a key is for pseudonyms: say --policy pseudonym too, or leave the key away")
    key = (
        read_key(settings.key_file, settings.key_env, settings.make_key)
        if settings.policy == "pseudonym"
        else None
    )
    finder = names(settings.names) if settings.names else None
    return Redact(settings.policy, tuple(settings.types), key, finder)


def run(settings: RedactSettings, *, quiet: bool = False) -> Report:
    """Redact files; see RedactSettings. Without --out the text itself is the report.

    UsageError for a file that is not there, an --out that is, or a kind of file that hides its text, such as mail and
    PDF; DataError for one that cannot be read: an --out of several files then holds those before it.
    """
    targets = _targets(settings)
    work = _Work(step(settings.redact), tuple(settings.field))
    if settings.out is None:
        text = io.StringIO()
        work.write(settings.file[0], text)
        if not quiet:
            print("\n".join(work.said()), file=sys.stderr)
        return Report(None, work.counts(), {}, text.getvalue(), {"text": text.getvalue(), **work.extra()})
    with track("redacting", sum(file.stat().st_size for file in targets), "B", quiet) as progress:
        for file, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with fresh(target, settings.force) as part:
                if file.suffix == ".parquet":
                    work.parquet(file, part)
                else:
                    with open(part, "w", encoding="utf-8", newline="") as out:
                        work.write(file, out)
            progress.advance(file.stat().st_size)
    return Report(settings.out, work.counts(), {}, "\n".join([f"{settings.out}", *work.said()]), work.extra())


def _targets(settings: RedactSettings) -> dict[Path, Path]:
    """Where each file goes, all looked at before the first is written."""
    files, out = list(dict.fromkeys(settings.file)), settings.out
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file} is no file: privacy redact takes files")
        _plain(file)
        if file.suffix != ".parquet" and file.stat().st_size > LARGEST:
            raise UsageError(
                f"{file} is larger than 1 GiB: langmill data prepare redacts as much as there is"
            )
    if out is None:
        if len(files) > 1 or files[0].suffix == ".parquet":
            raise UsageError("say where to write with --out: standard output takes one file of text")
        return {files[0]: Path()}
    single = len(files) == 1 and not out.is_dir()
    targets = {file: out if single else out / file.name for file in files}
    if len(set(targets.values())) < len(files):
        raise UsageError("two of the files have the same name: redact them into folders of their own")
    for target in targets.values():
        if target.exists() and not settings.force:
            raise UsageError(f"{target} exists: choose another --out, or --force")
    return targets


def _plain(file: Path) -> None:
    """UsageError for a file whose text is coded in it: what is found in it as it is would not be all."""
    kind, packed = file.suffix.lower(), file.suffix.lower() in COMPRESSED
    kind = Path(file.stem).suffix.lower() if packed else kind
    if kind in _CODED or packed:
        what = f"{_CODED[kind]}: its text is coded there" if kind in _CODED else "packed"
        raise UsageError(
            f"{file} is {what}, and details would be missed: langmill data prepare {file} --out DIR takes the text out "
            "and redacts it" + ("" if kind in _CODED else "; or unpack it first")
        )


@dataclass
class _Work:
    """Redacts file after file, and counts."""

    step: Redact
    fields: tuple[str, ...]
    tally: Tally = field(default_factory=Tally)
    files: int = 0
    texts: int = 0
    changed: int = 0
    left: Counter[str] = field(default_factory=Counter)  # what was not looked at or not replaced, and why

    def write(self, file: Path, out: Any) -> None:
        """A file of text, rows or a table, redacted, to a text stream. DataError names what cannot be read."""
        kind = {".csv": self._table, ".tsv": self._table} | dict.fromkeys((".jsonl", ".ndjson"), self._jsonl)
        kind |= dict.fromkeys((".json", ".ipynb", ".geojson"), self._json)
        self.files += 1
        with open(file, "rb") as raw:
            head = raw.read(4096)
        if why := no_text(head):
            raise DataError(f"{file} is not text in UTF-8: {why}")
        if what := next((what for mark, what in _BEGINS.items() if head.startswith(mark)), ""):
            raise DataError(f"{file} is {what}, where details would be missed: take its text out first")
        try:
            with open(file, encoding="utf-8", newline="") as stream:
                for piece in kind.get(file.suffix.lower(), self._text)(file, stream):
                    out.write(piece)
        except UnicodeDecodeError as reason:
            raise DataError(
                f"{file} is not text in UTF-8 ({reason.reason} near byte {reason.start}): convert or unpack it first"
            ) from None

    def _one(self, file: Path, text: str, name: str = "", text_of_a_row: bool = True) -> str:
        """The text redacted, and counted; numbers, fields and heads count where something is found in them."""
        new, finds = self.step.text(text, f"{name}: " if name else "")
        self.texts += text_of_a_row or bool(finds)
        self.changed += new != text
        self.tally.take(str(file), text, finds)
        if _has_parts(text):
            self.left[f"{file}: texts with parts in base64 or quoted-printable, which were not decoded"] += 1
        return new

    def _text(self, file: Path, stream: Any) -> Iterator[str]:
        text = stream.read()
        if _has_parts(text):
            raise DataError(
                f"{file} holds mail with parts in base64 or quoted-printable, where details would be missed: "
                "name it .eml or .mbox, and langmill data prepare takes its text out and redacts it"
            )
        yield self._one(file, text)

    def _jsonl(self, file: Path, stream: Any) -> Iterator[str]:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                yield line
                continue
            row = _parsed(line.lstrip("\ufeff"), f"{file}, line {number}")
            new = self._top(file, row)
            end = line[len(line.rstrip("\r\n")) :]
            yield line if new == row else json.dumps(new, ensure_ascii=False) + end

    def _json(self, file: Path, stream: Any) -> Iterator[str]:
        whole = stream.read()
        value = _parsed(whole.lstrip("\ufeff"), str(file))
        new = [self._top(file, one) for one in value] if isinstance(value, list) else self._top(file, value)
        yield whole if new == value else json.dumps(new, ensure_ascii=False, indent=2) + "\n"

    def _top(self, file: Path, row: Any) -> Any:
        """A row, in which `fields` are looked at alone."""
        if not self.fields:
            return self._deep(file, row)
        if not isinstance(row, dict):
            raise DataError(f"{file} has rows without fields: leave --field away")
        return {k: self._deep(file, v, k) if k in self.fields else v for k, v in row.items()}

    def _deep(self, file: Path, value: Any, name: str = "") -> Any:
        """Texts, whole numbers that are somebody's (which become texts), and names of fields."""
        if isinstance(value, str):
            return self._one(file, value, name)
        if isinstance(value, int) and abs(value) > _SMALL:
            new = self._one(file, str(value), name, False)
            return value if new == str(value) else new
        if isinstance(value, dict):
            made = {
                self._one(file, str(key), "", False): self._deep(file, own, str(key))
                for key, own in value.items()
            }
            if len(made) < len(value):
                raise DataError(f"{file} has fields whose names become the same: take --policy pseudonym")
            return made
        return [self._deep(file, own, name) for own in value] if isinstance(value, list) else value

    def _table(self, file: Path, stream: Any) -> Iterator[str]:
        csv.field_size_limit(LARGEST)
        head = stream.readline()
        mark = delimiter(head, self.fields) if self.fields or "," not in head else ","
        mark = "\t" if file.suffix.lower() == ".tsv" else mark
        stream.seek(0)
        reader = csv.reader(stream, delimiter=mark)
        line = io.StringIO()
        writer = csv.writer(line, delimiter=mark)  # its ends of lines are what it quotes
        heads: list[str] | None = None
        try:
            for row in reader:
                if heads is None:
                    heads = [head.lstrip("\ufeff") for head in row]
                    self._known(file, heads)
                    row = [
                        self._one(file, head, "", False) for head in row
                    ]  # a table may have none, but begin with its rows
                else:
                    names = heads + [""] * (len(row) - len(heads))
                    row = [
                        self._one(file, v, n) if self._asked(n) else v
                        for v, n in zip(row, names, strict=False)
                    ]
                writer.writerow(row)
                yield line.getvalue().removesuffix("\r\n") + ("\r\n" if stream.newlines == "\r\n" else "\n")
                line.seek(0)
                line.truncate()
        except csv.Error as reason:
            raise DataError(f"{file}, line {reader.line_num}: {reason}") from None

    def _asked(self, name: str) -> bool:
        return not self.fields or name in self.fields

    def _known(self, file: Path, names: list[str]) -> None:
        if missing := [name for name in self.fields if name not in names]:
            raise DataError(f"{file} has no column {missing[0]!r}: it has {', '.join(names)}")

    def parquet(self, file: Path, out: Path) -> None:
        """The same table with its texts redacted."""
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise MissingExtra("data", "pyarrow") from None
        self.files += 1
        try:
            with pq.ParquetFile(file) as source, pq.ParquetWriter(out, source.schema_arrow) as writer:
                self._known(file, source.schema_arrow.names)
                for batch in source.iter_batches(_ROWS):
                    columns = []
                    for name, column in zip(batch.schema.names, batch.columns, strict=True):
                        if self._asked(name) and _holds_text(column.type):
                            values = [self._deep(file, v, name) for v in column.to_pylist()]
                            columns.append(pa.array(values, column.type))
                        else:
                            columns.append(column)
                        if self._asked(name):
                            self._leaves(file, name, column)
                    writer.write_batch(pa.record_batch(columns, schema=batch.schema))
        except pa.ArrowInvalid as reason:
            raise DataError(f"{file} cannot be read as Parquet: {reason}") from None

    def _leaves(self, file: Path, name: str, column: Any) -> None:
        """Count what a column keeps: bytes, which nobody can read, and numbers, which cannot become stars."""
        if "binary" in str(column.type):
            self.left[f"{file}: values of column {name} ({column.type}), which were not looked at"] += len(
                column
            )
        if str(column.type).lstrip("u").startswith("int"):
            values = {abs(v) for v in column.to_pylist() if v is not None and abs(v) > _SMALL}
            found = sum(bool(self.step.text(str(value), f"{name}: ")[1]) for value in values)
            if found:
                said = f"{file}: numbers of column {name} ({column.type}) that look like somebody's, kept as they are"
                self.left[said] += found

    def counts(self) -> dict[str, int]:
        return {
            "files": self.files,
            "texts": self.texts,
            "changed": self.changed,
            "found": self.tally.total().total(),
        }

    def extra(self) -> dict[str, Any]:
        by_source = {source: dict(sorted(own.items())) for source, own in self.tally.counts.items()}
        return {"found": by_source, "samples": self.tally.samples, "left": dict(self.left)}

    def said(self) -> list[str]:
        counts = self.counts()
        what = f"{counts['found']:,} found in {counts['changed']:,} of {counts['texts']:,} texts, all of them replaced"
        return [
            what if counts["found"] else f"nothing found in {counts['texts']:,} texts",
            *self.tally.lines(),
            *(f"left: {count:,} x {what}" for what, count in self.left.items()),
        ]


def _has_parts(text: str) -> bool:
    """Whether it is mail, or quotes some, with parts that no pattern can read."""
    return ("ncoding:" in text or "NCODING:" in text) and bool(_PARTS.search(text))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise DataError(f"{where} cannot be read as JSON: {reason}") from None


def _holds_text(type: Any) -> bool:
    return "string" in str(type)
