"""`langmill embed`: a vector for each text. `langmill similar`: the texts nearest to a query, by their cosines."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langmill.apps.classify import limit_of
from langmill.apps.sentence import Recipe, recipe
from langmill.apps.texts import Result, Row, batches, each, fresh, rows
from langmill.common.errors import DataError, MissingExtra, UsageError
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import EmbedSettings, SimilarSettings
from langmill.families.folder import Model
from langmill.infer.native_embed import NativeEmbedder, eight_bits, is_rounded, why_not
from langmill.infer.read import embeddings
from langmill.infer.ready import ready
from langmill.text.frames import Encoded
from langmill.text.tasks import Limit, encode_texts
from langmill.text.tokenizer import Tokenizer

Floats = NDArray[np.float32]


def run(settings: EmbedSettings, *, quiet: bool = False, as_json: bool = False) -> Report:
    """Results: {"text", "embedding"}, other fields of a row kept beside them, in X.parquet too; --out X.npy holds the
    vectors alone, (N, D) in float32."""
    reader = Reader.of(settings, quiet)
    suffix = settings.out.suffix if settings.out else ""
    if suffix not in (".npy", ".parquet"):

        def read(batch: Sequence[Row], counted: Counter[str]) -> Iterator[Result]:
            for row, vector in zip(batch, reader.vectors(batch, counted), strict=True):
                yield {"text": row.text, **row.beside({"text": row.text, "embedding": vector.tolist()})}

        return each(settings, read, quiet=quiet, as_json=as_json)
    assert settings.out is not None
    with fresh(settings.out, settings.force) as part:
        read_rows, vectors_ND, counted = _all(reader, settings, quiet)
        _write(part, suffix, read_rows, vectors_ND)
    counts = {"texts": len(read_rows), "dimensions": vectors_ND.shape[1], **counted}
    said = [f"{settings.out}: {len(read_rows):,} vectors of {vectors_ND.shape[1]} numbers"]
    said += [f"{number:,} {what}" for what, number in counted.items() if number]
    return Report(settings.out, counts, {}, ", ".join(said))


def similar(settings: SimilarSettings, *, quiet: bool = False, as_json: bool = False) -> Report:
    """Results: {"text", "score", "rank"}, the nearest first; score is the cosine."""
    if not settings.query.strip():
        raise UsageError("the query is empty: say what to look for")
    reader = Reader.of(settings, quiet)
    found, vectors_ND, counted = _all(reader, settings, quiet)
    (query_D,) = reader.vectors([Row("the query", settings.query, {})], Counter())
    lengths_N = np.linalg.norm(vectors_ND, axis=1) * np.linalg.norm(query_D)
    scores_N = vectors_ND @ query_D / np.maximum(lengths_N, 1e-12)
    best = np.argsort(-scores_N, kind="stable")[: settings.top]
    results = [
        {"rank": rank, "score": float(scores_N[place]), "text": found[place].text}
        for rank, place in enumerate(best, 1)
    ]
    words = "" if as_json else "\n".join(json.dumps(result, ensure_ascii=False) for result in results)
    return Report(None, {"texts": len(found), **counted}, {}, words, {"results": results})


class Reader:
    """A model that makes vectors of texts, set up as the settings and its folder say.

    Where layers are in 8 or 4 bits native.cpp reads. Where it cannot, `slow` says why, and torch's operators do.
    alone: the model serves nothing else, and need not be whole afterwards.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        limit: Limit,
        made: Recipe,
        settings: EmbedSettings,
        alone: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.limit, self.made = model, tokenizer, limit, made
        self.slow: str | None = None
        self._native: NativeEmbedder | None = None
        if settings.bits == 8 or is_rounded(model):
            self.slow = why_not(model, tokenizer.frame)
            if settings.bits == 8:
                eight_bits(model)
            if self.slow is None:
                self._native = NativeEmbedder(
                    model, made.pool, normalise=False, length=limit.length, release=alone
                )
        self.normalise, self.dims = settings.normalise, settings.dims
        if self.dims is not None and self.dims > made.width:
            raise UsageError(f"--dims {self.dims} of vectors of {made.width} numbers cannot be kept")

    @classmethod
    def of(cls, settings: EmbedSettings, quiet: bool = False) -> Reader:
        model, tokenizer = ready(settings.model, settings.dtype, settings.device, settings.threads)
        reader = cls.over(model, tokenizer, settings, alone=True)
        if reader.slow and not quiet:
            print(
                f"read by torch's operators, slower than the C++ pass for fewer bits: {reader.slow}",
                file=sys.stderr,
            )
        return reader

    @classmethod
    def over(cls, model: Model, tokenizer: Tokenizer, settings: EmbedSettings, alone: bool = False) -> Reader:
        """With a model that is loaded already. With bits 8 its layers are rounded where they stand."""
        made = recipe(settings.model, model, settings.pool)
        return cls(model, tokenizer, _limit(settings, model, made), made, settings, alone)

    def vectors(self, batch: Sequence[Row], counted: Counter[str]) -> Iterator[Floats]:
        """The vector of each row; that of a text in several windows is their mean, by their tokens."""
        texts, names = [self.made.given(row.text) for row in batch], [row.where for row in batch]
        documents = encode_texts(self.tokenizer, texts, self.limit, counted, names=names)
        both = zip(documents, self._read(documents), strict=True)
        for _, windows in groupby(both, key=lambda pair: pair[0].number):
            yield self._finished([(len(document.ids), vector) for document, vector in windows])

    def _read(self, documents: Sequence[Encoded]) -> Iterable[Floats]:
        if self._native is None:
            return embeddings(self.model, documents, self.made.pool, normalise=False)
        return self._native.embed([np.array(document.ids, np.int64) for document in documents])

    def _finished(self, windows: Sequence[tuple[int, Floats]]) -> Floats:
        sizes = np.array([size for size, _ in windows], np.float32)
        mean_D = np.average(np.stack([part for _, part in windows]), axis=0, weights=sizes)
        vector = self.made.finished(mean_D[None])[0, : self.dims]
        length = float(np.linalg.norm(vector))
        return (vector / length if self.normalise and length else vector).astype(np.float32)


def _limit(settings: EmbedSettings, model: Model, made: Recipe) -> Limit:
    """Long texts are read in windows; where sentence-transformers cuts them they are cut too, unless another policy is
    asked for."""
    limit = limit_of(settings, model)
    if made.length is None:
        return limit
    asked = "long_texts" in settings.model_fields_set
    return replace(limit, length=made.length, policy=limit.policy if asked else "truncate")


def _all(reader: Reader, settings: EmbedSettings, quiet: bool) -> tuple[list[Row], Floats, Counter[str]]:
    """Every row and its vector (N, D)."""
    counted: Counter[str] = Counter()
    found: list[Row] = []
    vectors: list[Floats] = []
    with track("reading", unit="texts", quiet=quiet) as progress:
        for batch in batches(rows(settings, counted), settings.batch_size):
            found += batch
            vectors += reader.vectors(batch, counted)
            progress.advance(len(batch))
    if not vectors:
        raise UsageError("there is no text to read")
    return found, np.stack(vectors), counted


def _write(path: Path, suffix: str, found: Sequence[Row], vectors_ND: Floats) -> None:
    """The vectors alone, or a column for each field of the rows too. DataError names a field that makes no column."""
    if suffix == ".npy":
        with open(path, "wb") as file:
            np.save(file, vectors_ND)
        return
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("data", "pyarrow") from None
    # the vectors' place is held by None, so that a field of this name is kept under "given"
    results = [row.beside({"text": row.text, "embedding": None}) for row in found]
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(["text", *(name for result in results for name in result)]):
        try:
            columns[name] = pyarrow.array([result.get(name) for result in results])
        except (pyarrow.ArrowException, OverflowError) as reason:
            raise DataError(
                f"the field {name} is no column: {reason}; take a name for --out that ends in .jsonl"
            ) from None
    columns["embedding"] = pyarrow.array(list(vectors_ND))
    try:
        parquet.write_table(pyarrow.table(columns), path)
    except pyarrow.ArrowException as reason:
        raise DataError(f"these fields do not go into .parquet: {reason}; take .jsonl") from None
