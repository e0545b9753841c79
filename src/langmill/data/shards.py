"""Token shards: a folder of memory-mapped token files with an index and checksums.

    shards.json        format version, number type, tokenizer fingerprint, files with sizes and SHA-256, ledger,
                       the clean sets that the documents are of
    tokens-00000.bin   ids of whole documents end to end, little-endian uint16 or uint32, no specials
    index.bin          one row a document, and one more that closes the last: see ROW
    ids.jsonl          one JSON string a document

The folder appears whole or not at all. A file that was cut short or altered is an error that names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import DataError, ModelError
from langmill.common.files import atomic_folder, read_json, sha256, write_json
from langmill.data.pipeline import Ledger
from langmill.text.document import Document, text_hash
from langmill.text.tokenizer import Tokenizer

FORMAT, VERSION = "shards", 1
# First token over all shards, first byte in ids.jsonl, hash of the text, bytes of the text as UTF-8.
ROW = np.dtype([("start", "<i8"), ("id", "<i8"), ("hash", "<u8"), ("bytes", "<u4")])
_BATCH_BYTES, _BATCH_DOCUMENTS = 4 << 20, 16384

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    shard_tokens: int = 64_000_000,
    ledger: Ledger | None = None,
    replace: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
    prepared: Sequence[str] = (),
) -> Shards:
    """Encode documents into `folder` in bounded memory, and open the result.

    A shard holds at most `shard_tokens` tokens (a longer document has one to itself). Documents without
    text, or whose text gives no token, are dropped with a reason. `ledger` must have counted the documents
    in, as `readers.read` does; None counts them here. `on_batch(documents, bytes)` is called with what
    each batch added. `prepared`: hashes of the manifests of the clean sets that the documents are of, which
    shards.json names. DataError where nothing is left to keep.
    """
    folder = Path(folder)
    if ledger is None:
        ledger = Ledger()
        documents = _taken(documents, ledger)
    with atomic_folder(folder, replace=replace) as fresh, ThreadPoolExecutor(1) as worker:
        writer = _Writer(fresh, tokenizer, shard_tokens, ledger)
        pending: Future[_Encoded] | None = None
        for batch in _batches(documents):
            encoding = worker.submit(_encode, tokenizer, batch)  # while the batch before it is written
            if pending is not None:
                writer.add(pending.result(), on_batch)
            pending = encoding
        if pending is not None:
            writer.add(pending.result(), on_batch)
        writer.close(prepared)
    return Shards.open(folder, verify=False)


def _taken(documents: Iterable[Document], ledger: Ledger) -> Iterator[Document]:
    for document in documents:
        ledger.take(document.source, len(document.text.encode("utf-8")))
        yield document


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A batch: its documents, their UTF-8, hashes, ids end to end and the offsets between them."""

    documents: list[Document]
    sizes: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    ids: NDArray[np.uint32]
    offsets: NDArray[np.int64]


def _encode(tokenizer: Tokenizer, documents: list[Document]) -> _Encoded:
    texts = [document.text.encode("utf-8") for document in documents]
    ids, offsets = tokenizer.bulk.encode(texts)
    sizes = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    hashes = np.fromiter(map(text_hash, texts), dtype=np.uint64, count=len(texts))
    return _Encoded(documents, sizes, hashes, ids, offsets)


class File:
    """A file being written, its size and its hash."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.size = 0
        self._hash = hashlib.sha256()
        self._file: IO[bytes] = open(path, "wb")

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"name": self.name, "bytes": self.size, "sha256": self._hash.hexdigest()}


class _Writer:
    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int, ledger: Ledger) -> None:
        self.folder, self.tokenizer, self.shard_tokens, self.ledger = folder, tokenizer, shard_tokens, ledger
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.index, self.names = File(folder / "index.bin"), File(folder / "ids.jsonl")
        self.files: list[dict[str, Any]] = []
        self.shards: list[dict[str, Any]] = []
        self.tokens = self.documents = self.bytes = 0
        self._file: File | None = None

    def add(self, batch: _Encoded, on_batch: Callable[[int, int], None] | None) -> None:
        lengths = np.diff(batch.offsets)
        keep = np.array([not document.text.isspace() for document in batch.documents]) & (lengths > 0)
        for i in np.flatnonzero(~keep):
            document = batch.documents[i]
            self.ledger.drop(document.source, document.id, "no text in it", int(batch.sizes[i]))
        kept = np.flatnonzero(keep)
        self._index(batch, kept, lengths[kept])
        for i in kept:
            self.ledger.keep(batch.documents[i].source, int(batch.sizes[i]))
        self._tokens(batch, kept, lengths[kept])
        if on_batch is not None:
            on_batch(len(batch.documents), int(batch.sizes.sum()))

    def _index(self, batch: _Encoded, kept: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        names = [json.dumps(batch.documents[i].id, ensure_ascii=False).encode() + b"\n" for i in kept]
        ends = np.cumsum([0, *map(len, names)])
        rows = np.zeros(len(kept), dtype=ROW)
        rows["start"] = self.tokens + np.cumsum(lengths) - lengths
        rows["id"] = self.names.size + ends[:-1]
        rows["hash"], rows["bytes"] = batch.hashes[kept], batch.sizes[kept]
        self.names.write(b"".join(names))
        self.index.write(rows.tobytes())
        self.documents += len(kept)
        self.bytes += int(batch.sizes[kept].sum())

    def _tokens(self, batch: _Encoded, kept: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Write the kept documents, as many at once as the open shard takes."""
        ids = batch.ids
        if len(kept) < len(batch.documents):
            ids = np.concatenate([ids[batch.offsets[i] : batch.offsets[i + 1]] for i in kept] or [ids[:0]])
        ids = ids.astype(self.dtype)
        ends = np.cumsum(lengths)
        first = 0
        while first < len(kept):
            written = int(ends[first - 1]) if first else 0
            room = self.shard_tokens - (self.shards[-1]["tokens"] if self._file else 0)
            last = int(np.searchsorted(ends, written + room, side="right"))
            if last <= first:  # not even one more fits
                if self._file:
                    self._end_shard()
                    continue
                last = first + 1
            self._append(ids[written : ends[last - 1]], last - first)
            first = last

    def _append(self, ids: NDArray[Any], documents: int) -> None:
        if self._file is None:
            name = f"tokens-{len(self.shards):05d}.bin"
            self._file = File(self.folder / name)
            self.shards.append({"name": name, "documents": 0, "tokens": 0, "start": self.tokens})
        self._file.write(ids.tobytes())
        self.shards[-1]["documents"] += documents
        self.shards[-1]["tokens"] += len(ids)
        self.tokens += len(ids)

    def _end_shard(self) -> None:
        if self._file is not None:
            self.files.append(self._file.close())
            self._file = None

    def close(self, prepared: Sequence[str]) -> None:
        if not self.documents:
            raise DataError(f"no document was left to write: {_summary(self.ledger)}")
        self.ledger.check()
        self._end_shard()
        self.index.write(np.array([(self.tokens, self.names.size, 0, 0)], dtype=ROW).tobytes())
        files = [*self.files, self.index.close(), self.names.close()]
        value = {
            "dtype": self.dtype.name,
            "tokenizer": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "encoder": self.tokenizer.bulk.note,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "shards": self.shards,
            "files": files,
            "ledger": self.ledger.as_dict(),
            "prepared": sorted(prepared),
        }
        write_json(self.folder / "shards.json", value, FORMAT, VERSION)


def _summary(ledger: Ledger) -> str:
    reasons = [f"{count.documents} dropped ({reason})" for reason, count in ledger.dropped().items()]
    return ", ".join(reasons) or "there was none to read"


class Shards:
    """Documents as tokens, opened read-only and memory-mapped: nothing is read before it is used.

    `documents`, `tokens`, `bytes` are totals; `fingerprint` is the tokenizer's; `manifest` is shards.json; `index`
    holds a ROW for each document and one more.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.documents: int = manifest["documents"]
        self.tokens: int = manifest["tokens"]
        self.bytes: int = manifest["bytes"]
        self.fingerprint: str = manifest["tokenizer"]
        self.index: NDArray[Any] = np.memmap(folder / "index.bin", dtype=ROW, mode="r")
        self._starts = [shard["start"] for shard in manifest["shards"]]
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._tokens = [
            np.memmap(folder / shard["name"], dtype=dtype, mode="r") for shard in manifest["shards"]
        ]

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True, expected: str | None = None) -> Self:
        """Open a folder that `write_shards` wrote.

        Sizes are always compared; `verify` reads every byte and compares checksums too (about a second
        for a gigabyte). `expected` is the fingerprint of the tokenizer in use: ModelError where the shards
        were made with another. DataError names a file that is missing, cut short or altered.
        """
        folder = Path(folder)
        manifest = read_json(folder / "shards.json", FORMAT, VERSION)
        if expected is not None and manifest["tokenizer"] != expected:
            raise ModelError(
                f"{folder} was made with the tokenizer {manifest['tokenizer'][:12]}, and the one in use is "
                f"{expected[:12]}: use that tokenizer, or make the shards again"
            )
        for entry in manifest["files"]:
            _check(folder / entry["name"], entry, verify)
        return cls(folder, manifest)

    def tokens_of(self, document: int) -> Tokens:
        """The ids of one document, without specials: a view of the file."""
        start, stop = int(self.index["start"][document]), int(self.index["start"][document + 1])
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        first = self._starts[shard]
        view: Tokens = self._tokens[shard][start - first : stop - first]
        return view

    def lengths(self, documents: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """The number of tokens of each of `documents`."""
        starts = self.index["start"]
        length: NDArray[np.int64] = starts[np.asarray(documents) + 1] - starts[documents]
        return length

    @property
    def bytes_of(self) -> NDArray[np.uint32]:
        """UTF-8 bytes of each document's text, (documents,)."""
        view: NDArray[np.uint32] = self.index["bytes"][:-1]
        return view

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """`text_hash` of each document's text, (documents,)."""
        view: NDArray[np.uint64] = self.index["hash"][:-1]
        return view

    def id_of(self, document: int) -> str:
        """The document's id."""
        first, last = int(self.index["id"][document]), int(self.index["id"][document + 1])
        with open(self.folder / "ids.jsonl", "rb") as file:
            file.seek(first)
            name: str = json.loads(file.read(last - first))
        return name

    @cached_property
    def ledger(self) -> dict[str, Any]:
        """What was read, kept and dropped when the shards were made."""
        value: dict[str, Any] = self.manifest["ledger"]
        return value

    def split(self, holdout: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(training, held-out) document numbers, by the hash of their text.

        Equal texts stand on one side. With `holdout` above 0 and at least two distinct texts, neither side
        is empty; a single distinct text trains. The largest hashes are held out, because the tokenizer's
        sample prefers the smallest.
        """
        hashes = np.asarray(self.hashes)
        held = np.zeros(len(hashes), dtype=bool)
        if holdout > 0 and hashes.min() != hashes.max():
            held = hashes >= np.uint64(min(int((1 - holdout) * 2**64), 2**64 - 1))
            held = held & (hashes != hashes.min()) | (hashes == hashes.max())
        return np.flatnonzero(~held), np.flatnonzero(held)


def _check(file: Path, entry: dict[str, Any], verify: bool) -> None:
    again = "make the shards again from the documents"
    if not file.is_file():
        raise DataError(f"{file} is missing: {again}")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise DataError(f"{file} holds {size} bytes and was written with {entry['bytes']}: {again}")
    if verify and sha256(file) != entry["sha256"]:
        raise DataError(f"{file} was altered since it was written (its checksum differs): {again}")
