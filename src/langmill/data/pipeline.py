"""The ledger: every document and byte that came in is either kept or dropped for a stated reason."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langmill.common.errors import DataError

SOURCES = 1000  # distinct sources counted by name; what comes after is counted together
REASONS = 200
EXAMPLES = 3  # kept for each reason
LINES = 10_000  # rejections written to errors.jsonl
_TEXT = 200  # characters of a rejected text
_OTHERS = "(others)"


@dataclass(slots=True)
class Count:
    """Documents, and their bytes: of the text where one was read, of the raw row or file where not."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, size: int) -> None:
        self.documents += documents
        self.bytes += size

    def as_dict(self) -> dict[str, int]:
        return {"documents": self.documents, "bytes": self.bytes}


@dataclass(slots=True)
class Entry:
    """What became of the documents of one source."""

    read: Count = field(default_factory=Count)
    kept: Count = field(default_factory=Count)
    dropped: dict[str, Count] = field(default_factory=dict)


class Ledger:
    """Counts by source: readers `take` or `reject`, steps `drop`, and whoever stores them `keep`s.

    `errors`: a file that gets a line for each of the first `LINES` rejections, with where it was found
    and the start of its text; it belongs in the private run folder. Memory is bounded: sources and
    reasons beyond `SOURCES` and `REASONS` are counted under "(others)".
    """

    def __init__(self, errors: Path | None = None) -> None:
        self.sources: dict[str, Entry] = {}
        self.examples: dict[str, list[str]] = {}
        self._errors = errors
        self._lines = 0
        if errors is not None:
            errors.parent.mkdir(parents=True, exist_ok=True)
            errors.write_bytes(b"")

    def take(self, source: str, size: int, documents: int = 1) -> None:
        """Count documents in."""
        self._entry(source).read.add(documents, size)

    def keep(self, source: str, size: int, documents: int = 1) -> None:
        """Count documents that were taken as stored."""
        self._entry(source).kept.add(documents, size)

    def drop(self, source: str, where: str, reason: str, size: int, text: str = "", detail: str = "") -> None:
        """Count one document that was taken as dropped; `where` says which, `detail` what exactly."""
        if reason not in self.examples and len(self.examples) >= REASONS:
            reason = _OTHERS
        dropped = self._entry(source).dropped
        dropped.setdefault(reason, Count()).add(1, size)
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{where}: {detail}" if detail else where)
        if self._errors is not None and self._lines < LINES:
            self._lines += 1
            line = {"where": where, "reason": reason, "detail": detail, "bytes": size, "text": text[:_TEXT]}
            with open(self._errors, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def reject(
        self, source: str, where: str, reason: str, size: int, text: str = "", detail: str = ""
    ) -> None:
        """Count one file or row that never became a document: in, and dropped."""
        self.take(source, size)
        self.drop(source, where, reason, size, text, detail)

    def _entry(self, source: str) -> Entry:
        entry = self.sources.get(source)
        if entry is None:
            if len(self.sources) >= SOURCES:
                source = _OTHERS
            entry = self.sources.setdefault(source, Entry())
        return entry

    def dropped(self) -> dict[str, Count]:
        """What was dropped, by reason, over all sources."""
        total: dict[str, Count] = {}
        for entry in self.sources.values():
            for reason, count in entry.dropped.items():
                total.setdefault(reason, Count()).add(count.documents, count.bytes)
        return total

    def total(self, what: str) -> Count:
        """The sum over sources of "read" or "kept"."""
        counts: list[Count] = [getattr(entry, what) for entry in self.sources.values()]
        return Count(sum(count.documents for count in counts), sum(count.bytes for count in counts))

    def as_dict(self) -> dict[str, Any]:
        """The whole ledger as JSON: totals, reasons with examples, sources."""
        return {
            "read": self.total("read").as_dict(),
            "kept": self.total("kept").as_dict(),
            "dropped": {
                reason: count.as_dict() | {"examples": self.examples.get(reason, [])}
                for reason, count in sorted(self.dropped().items())
            },
            "sources": {
                source: {
                    "read": entry.read.as_dict(),
                    "kept": entry.kept.as_dict(),
                    "dropped": {reason: count.as_dict() for reason, count in sorted(entry.dropped.items())},
                }
                for source, entry in sorted(self.sources.items())
            },
        }

    def check(self) -> None:
        """DataError naming the source unless documents and bytes in equal kept plus dropped, for each."""
        for source, entry in self.sources.items():
            parts = [entry.kept, *entry.dropped.values()]
            documents, size = sum(part.documents for part in parts), sum(part.bytes for part in parts)
            if (documents, size) != (entry.read.documents, entry.read.bytes):
                raise DataError(
                    f"the ledger of {source} does not add up: {entry.read.documents} documents of "
                    f"{entry.read.bytes} bytes were read, {documents} of {size} bytes were kept or dropped"
                )
