"""Units of work: the documents of some files through every step, stored whole or not at all.

UNITS/KEY/kept.parquet      id, text, source, meta
UNITS/KEY/dropped.parquet   id, source, dropped, bytes, text (how it begins), meta
UNITS/KEY/unit.json         what the unit read, and its flows: what came into each step, was dropped, and came out
UNITS/KEY/*.npy             what duplicates are found by (see minhash)

A step takes a batch, a table of id, text, source, meta and dropped (null: kept), and returns the same rows in the same
order. It may set `dropped` where that is null, as "step: reason", and change text and meta of rows that are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.parquet import ParquetWriter

from langmill.common.errors import DataError
from langmill.common.files import atomic_folder, read_json, write_json
from langmill.common.prepare_settings import InputSettings
from langmill.data.formats import Reading, Record, records
from langmill.data.guard import kept
from langmill.data.minhash import Shape, Signatures, sign
from langmill.data.sources import Piece, Unit

VERSION = 3  # of what units hold: another one makes all of them anew
ROWS, BYTES = 2000, 8 << 20  # of a batch, at most
LONGEST = 1 << 24  # characters of a text: steps hold about 80 bytes for each
SHOWN = 500  # characters of a dropped text that are kept
READ = "read"
KEPT = pa.schema(
    [("id", pa.string()), ("text", pa.large_string()), ("source", pa.string()), ("meta", pa.string())]
)
BATCH = KEPT.append(pa.field("dropped", pa.string()))
DROPPED = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("dropped", pa.string()), ("bytes", pa.int64()),
     ("text", pa.string()), ("meta", pa.string())]
)  # fmt: skip


class Step(Protocol):
    """See the top of the file. A picklable frozen dataclass, whose repr says all that decides what it does."""

    @property
    def name(self) -> str: ...
    def __call__(self, batch: pa.Table) -> pa.Table: ...


@dataclass(slots=True)
class Amount:
    """Documents, bytes of UTF-8 and characters."""

    documents: int = 0
    bytes: int = 0
    characters: int = 0

    def add(self, other: Amount) -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        self.characters += other.characters

    def as_list(self) -> list[int]:
        return [self.documents, self.bytes, self.characters]


@dataclass(slots=True)
class Flow:
    """One step: what came in is what was kept and dropped, as it came in; `out` is what was kept as it left.

    Of the first, which reads, the bytes that come in are those of the rows and pages in their files.
    """

    kept: Amount = field(default_factory=Amount)
    dropped: dict[str, Amount] = field(default_factory=dict)
    out: Amount = field(default_factory=Amount)
    changed: int = 0

    @property
    def came(self) -> Amount:
        total = Amount()
        for part in (self.kept, *self.dropped.values()):
            total.add(part)
        return total

    def add(self, other: Flow) -> None:
        self.kept.add(other.kept)
        self.out.add(other.out)
        self.changed += other.changed
        for reason, amount in other.dropped.items():
            self.dropped.setdefault(reason, Amount()).add(amount)

    def as_dict(self) -> dict[str, Any]:
        dropped = {reason: amount.as_list() for reason, amount in sorted(self.dropped.items())}
        return {
            "kept": self.kept.as_list(),
            "dropped": dropped,
            "out": self.out.as_list(),
            "changed": self.changed,
        }


Flows = dict[str, Flow]


def flows_of(record: dict[str, Any]) -> Flows:
    """What `Flow.as_dict` wrote, by step."""
    return {
        step: Flow(
            Amount(*flow["kept"]),
            {reason: Amount(*amount) for reason, amount in flow["dropped"].items()},
            Amount(*flow["out"]),
            flow["changed"],
        )
        for step, flow in record.items()
    }


@dataclass(frozen=True)
class Recipe:
    """How documents are made of files. `last`: steps that keys do not depend on, such as what was forgotten."""

    read: InputSettings
    steps: tuple[Step, ...]
    shape: Shape | None = None  # of signatures, where duplicates are looked for
    last: tuple[Step, ...] = ()
    reads: tuple[str, ...] = ()  # hashes of the files that steps read

    def fingerprint(self) -> str:
        """Of all that decides what a unit holds."""
        read = self.read.model_dump(exclude={"unit_bytes", "unit_files", "follow_links"})
        return hashlib.sha256(
            repr((VERSION, read, self.steps, self.shape, self.reads)).encode("utf-8")
        ).hexdigest()


def done(units: Path, unit: Unit) -> bool:
    return (units / unit.key / "unit.json").is_file()


def process(unit: Unit, recipe: Recipe, units: Path) -> str:
    """Do a unit's work and store it as UNITS/KEY, whole; "" or, where it could not be read to its end, why not.

    What goes wrong with a document is its own affair, and counted. DataError is for the unit: a file that changed or
    went away while it was read. OSError: the disk is full.
    """
    if done(units, unit):
        return ""
    with atomic_folder(units / unit.key, replace=True) as fresh:
        work = _Work(fresh, unit, recipe)
        try:
            guard = kept(recipe.read.seconds, recipe.read.memory)
            for piece in unit.pieces:
                for record in records(Reading(piece, recipe.read, guard, work.rejecter(piece))):
                    work.take(piece, record)
                _unchanged(piece)
            work.flush()
        finally:
            work.close()
        signed(fresh, recipe.shape)
        pieces = [[p.file.id, _shown(p.file.path), p.start, p.end, p.first, p.hash] for p in unit.pieces]
        value = {"source": unit.source, "pieces": pieces, "flows": work.record()}
        write_json(fresh / "unit.json", value, "prepared unit", VERSION)
    return ""


def _shown(path: Path) -> str:
    """A path as text; bytes of it that are no UTF-8 are written as \\xNN."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def signed(folder: Path, shape: Shape | None) -> None:
    """Write the signatures of what a unit kept."""
    if shape is None:
        return
    parts = [sign(batch["text"].combine_chunks(), shape) for batch in kept_batches(folder, ["text"])]
    parts = parts or [sign(pa.array([], pa.large_string()), shape)]
    ends = np.cumsum([0, *(len(part.shingles_S) for part in parts)])
    for part, end in zip(parts, ends, strict=False):
        part.rows_R["end"] += end
    rows = np.concatenate([part.rows_R for part in parts])
    keys = np.concatenate([part.keys_BR for part in parts], axis=1)
    Signatures(rows, np.concatenate([part.shingles_S for part in parts]), keys).write(folder)


def _unchanged(piece: Piece) -> None:
    try:
        status = piece.file.path.stat()
    except OSError as error:
        raise DataError(f"{piece.file.path} went away while it was read ({error.strerror})") from None
    if (status.st_size, status.st_mtime_ns) != (piece.file.size, piece.file.changed):
        raise DataError(f"{piece.file.path} changed while it was read")


class _Work:
    """A unit on its way: records wait for a full batch, batches go through the steps into two files."""

    def __init__(self, folder: Path, unit: Unit, recipe: Recipe) -> None:
        self.unit, self.steps = unit, (*recipe.steps, *recipe.last)
        self.flows: Flows = {READ: Flow()} | {step.name: Flow() for step in self.steps}
        self._kept = ParquetWriter(folder / "kept.parquet", KEPT, compression="zstd")
        self._dropped = ParquetWriter(folder / "dropped.parquet", DROPPED, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._gone: list[dict[str, Any]] = []
        self._bytes = 0

    def take(self, piece: Piece, record: Record) -> None:
        if len(record.text) > LONGEST:
            detail = f"{len(record.text):,} characters: cut it into documents"
            self.rejecter(piece)(
                record.place, f"text longer than {LONGEST:,} characters", record.size, "", detail
            )
            return
        meta = json.dumps(record.meta, ensure_ascii=False) if record.meta else "{}"
        row = {"id": f"{piece.file.id}#{record.place:08d}", "text": record.text, "meta": meta}
        self._rows.append(row)
        self._bytes += len(record.text)
        flow, size = self.flows[READ], len(record.text.encode("utf-8"))
        flow.kept.add(Amount(1, record.size, len(record.text)))
        flow.out.add(Amount(1, size, len(record.text)))
        if len(self._rows) >= ROWS or self._bytes >= BYTES:
            self.flush()

    def rejecter(self, piece: Piece) -> Any:
        """What `Reading.reject` is for a piece."""

        def reject(place: int, reason: str, size: int, text: str, detail: str) -> None:
            id = f"{piece.file.id}#{place:08d}" if place else piece.file.id
            shown = f"{detail}: {text}" if detail and text else detail or text
            shown = shown.encode("utf-8", "backslashreplace").decode("utf-8")
            self.flows[READ].dropped.setdefault(reason, Amount()).add(Amount(1, size, 0))
            self._gone.append(
                {"id": id, "dropped": f"{READ}: {reason}", "bytes": size, "text": shown[:SHOWN]}
            )
            if len(self._gone) >= ROWS:
                self.flush()

        return reject

    def flush(self) -> None:
        if self._rows:
            rows, self._rows, self._bytes = self._rows, [], 0
            source = {"source": self.unit.source, "dropped": None}
            self._store(
                through(pa.Table.from_pylist([row | source for row in rows], BATCH), self.steps, self.flows)
            )
        if self._gone:
            gone, self._gone = self._gone, []
            self._dropped.write_table(
                pa.Table.from_pylist([row | {"source": self.unit.source} for row in gone], DROPPED)
            )

    def _store(self, batch: pa.Table) -> None:
        kept = pc.is_null(batch["dropped"])
        self._kept.write_table(batch.filter(kept).select(KEPT.names).cast(KEPT))
        gone = batch.filter(pc.invert(kept))
        if len(gone):
            head = pc.cast(pc.utf8_slice_codeunits(gone["text"], 0, SHOWN), pa.string())
            size = pc.binary_length(gone["text"])
            columns = [gone["id"], gone["source"], gone["dropped"], size, head, gone["meta"]]
            self._dropped.write_table(pa.table(columns, names=DROPPED.names).cast(DROPPED))

    def record(self) -> dict[str, Any]:
        return {step: flow.as_dict() for step, flow in self.flows.items()}

    def close(self) -> None:
        self._kept.close()
        self._dropped.close()


def through(batch: pa.Table, steps: Sequence[Step], flows: Flows) -> pa.Table:
    """The batch after the steps, each one counted. DataError for a step that loses or moves rows."""
    for step in steps:
        after = step(batch)
        if not after["id"].equals(batch["id"]):
            raise DataError(
                f"the step {step.name} lost or moved rows: it must return those that it was given"
            )
        count(batch, after, flows[step.name], step.name)
        batch = after
    return batch


def count(before: pa.Table, after: pa.Table, flow: Flow, name: str) -> None:
    """Add to `flow` what a step did to the rows of `before` that came to it."""
    came = pc.is_null(before["dropped"])
    kept = pc.and_(came, pc.is_null(after["dropped"]))
    gone = pc.and_(came, pc.is_valid(after["dropped"]))
    flow.kept.add(amount(before["text"].filter(kept)))
    flow.out.add(amount(after["text"].filter(kept)))
    flow.changed += int(pc.sum(pc.and_(kept, pc.not_equal(before["text"], after["text"]))).as_py() or 0)
    reasons = after["dropped"].filter(gone)
    texts = before["text"].filter(gone)
    for reason in pc.unique(reasons).to_pylist():
        plain = reason.removeprefix(f"{name}: ")
        flow.dropped.setdefault(plain, Amount()).add(amount(texts.filter(pc.equal(reasons, reason))))


def amount(texts: Any) -> Amount:
    """Of a column of texts."""
    characters = pc.sum(pc.utf8_length(texts)).as_py() or 0
    return Amount(len(texts), pc.sum(pc.binary_length(texts)).as_py() or 0, characters)


def opened(folder: Path) -> dict[str, Any]:
    """unit.json of a unit."""
    return read_json(folder / "unit.json", "prepared unit", VERSION)


def kept_batches(folder: Path, columns: Sequence[str] = KEPT.names) -> Iterator[pa.Table]:
    """What a unit kept, row group by row group."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(folder / "kept.parquet") as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=list(columns))
