"""From text to batches: documents, their tokenizer, their shards, and which of them train or are held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import DataError, UsageError
from langmill.common.files import atomic_folder
from langmill.common.progress import track
from langmill.common.settings import DataSettings, TokenizerSettings
from langmill.data.batches import Documents, Packed
from langmill.data.pipeline import Ledger
from langmill.data.readers import read
from langmill.data.shards import Shards, write_shards
from langmill.evaluate.loss import Encoded
from langmill.jobs.prepared import prepared
from langmill.text.document import Document
from langmill.text.tokenizer import Tokenizer
from langmill.text.training import sample, vocab_for

Source = Callable[[Ledger], Iterator[Document]]  # reads the same documents each time it is called
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens, cut into those that train and those that are held out, by their numbers."""

    tokenizer: Tokenizer
    shards: Shards
    train: Ints
    held: Ints

    @property
    def train_tokens(self) -> int:
        """Predictions in one epoch: every token, and a boundary after each document."""
        return int(self.shards.lengths(self.train).sum()) + len(self.train)

    @property
    def counts(self) -> dict[str, int]:
        """What a report says of the text."""
        shards = self.shards
        return {
            "documents": shards.documents,
            "held_out_documents": len(self.held),
            "tokens": shards.tokens,
            "bytes": shards.bytes,
            "vocabulary": self.tokenizer.vocab_size,
        }

    def batches(self, length: int, rows: int, seed: int) -> Packed:
        """Endless packed batches of the training documents; equal arguments give equal batches."""
        t = self.tokenizer
        pad = t.fill_id  # masked in any case
        return Packed(Documents(self.shards, t.start_id, t.boundary_id, pad), self.train, length, rows, seed)

    def held_out(self, most_tokens: int) -> Ints:
        """Held-out documents of at most `most_tokens` together (at least one), an even choice by their hash."""
        order = self.held[np.argsort(np.asarray(self.shards.hashes)[self.held], kind="stable")]
        kept = max(1, int(np.searchsorted(np.cumsum(self.shards.lengths(order)), most_tokens, side="right")))
        return np.sort(order[:kept])

    def encoded(self, chosen: Iterable[int]) -> Iterator[Encoded]:
        """Documents as `evaluate.loss.score` takes them."""
        for index in map(int, chosen):
            yield Encoded(
                self.shards.id_of(index), self.shards.tokens_of(index), int(self.shards.bytes_of[index])
            )

    def texts(self, chosen: Iterable[int]) -> Iterator[str]:
        """The texts of documents, from their tokens."""
        for index in map(int, chosen):
            yield self.tokenizer.decode(self.shards.tokens_of(index).tolist(), skip_specials=False)


def files(paths: Sequence[str], settings: DataSettings) -> Source:
    """The documents of files and folders."""
    return lambda ledger: read(paths, settings, ledger)


def fixed(documents: Sequence[Document]) -> Source:
    """Documents that are in memory already."""

    def source(ledger: Ledger) -> Iterator[Document]:
        for document in documents:
            ledger.take(document.source, len(document.text.encode("utf-8")))
            yield document

    return source


def first(source: Source, most_bytes: int) -> Source:
    """The documents of `source` up to the one that reaches `most_bytes` of text."""

    def limited(ledger: Ledger) -> Iterator[Document]:
        size = 0
        for document in source(ledger):
            yield document
            size += len(document.text.encode("utf-8"))
            if size >= most_bytes:
                return

    return limited


def shards_among(paths: Sequence[str]) -> Path | None:
    """The prepared shards that `paths` names, if that is what it names; UsageError for a mixture."""
    found = [Path(path) for path in paths if (Path(path) / "shards.json").is_file()]
    if found and len(paths) > 1:
        raise UsageError(
            f"{found[0]} holds prepared shards, which stand alone: give one folder of shards, or text"
        )
    return found[0] if found else None


def tokenizer_of(shards: Path) -> Tokenizer:
    """The tokenizer that lies beside prepared shards."""
    if not (shards / "tokenizer.json").is_file():
        raise UsageError(f"{shards} holds no tokenizer.json: say which made it with tokenizer.path=FOLDER")
    return Tokenizer.load(shards)


def train_tokenizer(
    source: Source, settings: TokenizerSettings, folder: Path, quiet: bool, most: int | None = None,
    specials: Sequence[str] = (),
) -> Tokenizer:  # fmt: skip
    """Train on a bounded sample of all documents and keep the result in `folder`; reuse one that is there.

    most: the largest vocabulary, where settings leave its size open (from the model's size). specials: control tokens
    beside the usual ones.
    """
    if folder.is_dir():
        return Tokenizer.load(folder)
    with track("reading for the tokenizer", unit="B", quiet=quiet) as progress:
        kept, total = sample(_counted(source(Ledger()), progress.advance), settings.sample_bytes)
    vocab = settings.vocab_size or min(vocab_for(total), most or 1 << 30)
    with track("training the tokenizer", unit="B", quiet=quiet) as progress:
        tokenizer = Tokenizer.train(kept, vocab, settings.kind, settings.sample_bytes, specials)
        progress.advance(sum(len(text) for text in kept), vocabulary=tokenizer.vocab_size)
    with atomic_folder(folder) as fresh:
        tokenizer.save(fresh)
    return Tokenizer.load(folder)  # as a resumed run will see it


def _counted(documents: Iterable[Document], advance: Callable[[float], Any]) -> Iterator[str]:
    for document in documents:
        advance(len(document.text))
        yield document.text


def make_shards(
    source: Source, tokenizer: Tokenizer, folder: Path, settings: DataSettings, errors: Path, quiet: bool,
    paths: Sequence[str] = (),
) -> Shards:  # fmt: skip
    """Encode all documents into `folder`; reuse what is there if this tokenizer made it. paths: what `source` reads."""
    if folder.is_dir():
        return Shards.open(folder, expected=tokenizer.fingerprint)
    ledger = Ledger(errors)
    with track("encoding", unit="B", quiet=quiet) as progress:
        return write_shards(
            source(ledger),
            tokenizer,
            folder,
            shard_tokens=settings.shard_tokens,
            ledger=ledger,
            on_batch=lambda _, size: progress.advance(size),
            prepared=prepared(paths),
        )


def corpus(tokenizer: Tokenizer, shards: Shards, holdout: float) -> Corpus:
    """Split the shards. DataError where nothing is left to train on."""
    train, held = shards.split(holdout)
    if not len(train):
        raise DataError(f"with data.holdout={holdout} no document is left to train on: make it smaller")
    return Corpus(tokenizer, shards, train, held)
