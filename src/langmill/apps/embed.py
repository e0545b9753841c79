"""`langmill embed`: a vector for each text. `langmill similar`: the texts nearest to a query, by their cosines."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from langmill.apps.classify import limit_of
from langmill.apps.texts import Result, Row, batches, each, fresh, rows
from langmill.common.errors import MissingExtra, ModelError, UsageError
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import EmbedSettings, SimilarSettings
from langmill.families.folder import Model
from langmill.families.hub import resolve
from langmill.infer.native_embed import NativeEmbedder, eight_bits, is_rounded, why_not
from langmill.infer.read import embeddings
from langmill.infer.ready import ready
from langmill.model.config import Pool
from langmill.text.frames import Encoded
from langmill.text.tasks import Limit, encode_texts
from langmill.text.tokenizer import Tokenizer

Floats = NDArray[np.float32]
POOLING = "1_Pooling/config.json"  # where sentence-transformers keeps how a model pools


def run(settings: EmbedSettings, *, quiet: bool = False, as_json: bool = False) -> Report:
    """Results: {"text", "embedding"}; --out X.npy holds the vectors (N, D) in float32, X.parquet texts and vectors."""
    reader = Reader.of(settings, quiet)
    suffix = settings.out.suffix if settings.out else ""
    if suffix not in (".npy", ".parquet"):

        def read(batch: Sequence[Row], counted: Counter[str]) -> Iterator[Result]:
            for row, vector in zip(batch, reader.vectors(batch, counted), strict=True):
                yield {"text": row.text, **row.beside({"embedding": vector.tolist()})}

        return each(settings, read, quiet=quiet, as_json=as_json)
    assert settings.out is not None
    with fresh(settings.out, settings.force) as part:
        texts, vectors_ND, counted = _all(reader, settings, quiet)
        _write(part, suffix, texts, vectors_ND)
    counts = {"texts": len(texts), "dimensions": vectors_ND.shape[1], **counted}
    said = [f"{settings.out}: {len(texts):,} vectors of {vectors_ND.shape[1]} numbers"]
    said += [f"{number:,} {what}" for what, number in counted.items() if number]
    return Report(settings.out, counts, {}, ", ".join(said))


def similar(settings: SimilarSettings, *, quiet: bool = False, as_json: bool = False) -> Report:
    """Results: {"text", "score", "rank"}, the nearest first; score is the cosine."""
    reader = Reader.of(settings, quiet)
    texts, vectors_ND, counted = _all(reader, settings, quiet)
    (query_D,) = reader.vectors([Row("the query", settings.query, {})], Counter())
    lengths_N = np.linalg.norm(vectors_ND, axis=1) * np.linalg.norm(query_D)
    scores_N = vectors_ND @ query_D / np.maximum(lengths_N, 1e-12)
    best = np.argsort(-scores_N, kind="stable")[: settings.top]
    results = [
        {"rank": rank, "score": float(scores_N[place]), "text": texts[place]}
        for rank, place in enumerate(best, 1)
    ]
    words = "" if as_json else "\n".join(json.dumps(result, ensure_ascii=False) for result in results)
    return Report(None, {"texts": len(texts), **counted}, {}, words, {"results": results})


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
        pool: Pool,
        settings: EmbedSettings,
        alone: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.limit, self.pool = model, tokenizer, limit, pool
        self.slow: str | None = None
        self._native: NativeEmbedder | None = None
        if settings.bits == 8 or is_rounded(model):
            self.slow = why_not(model, tokenizer.frame)
            if settings.bits == 8:
                eight_bits(model)
            if self.slow is None:
                self._native = NativeEmbedder(
                    model, pool, normalise=False, length=limit.length, release=alone
                )
        self.normalise, self.dims = settings.normalise, settings.dims
        width = model.config.main.dim if hasattr(model.config, "main") else 0
        if self.dims is not None and self.dims > width:
            raise UsageError(f"--dims {self.dims} of vectors of {width} numbers cannot be kept")

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
        pool = pooling(resolve(settings.model)) if settings.pool == "auto" else settings.pool
        return cls(model, tokenizer, limit_of(settings, model), pool, settings, alone)

    def vectors(self, batch: Sequence[Row], counted: Counter[str]) -> Iterator[Floats]:
        """The vector of each row; that of a text in several windows is their mean, by their tokens."""
        texts, names = [row.text for row in batch], [row.where for row in batch]
        documents = encode_texts(self.tokenizer, texts, self.limit, counted, names=names)
        both = zip(documents, self._read(documents), strict=True)
        for _, windows in groupby(both, key=lambda pair: pair[0].number):
            yield self._finished([(len(document.ids), vector) for document, vector in windows])

    def _read(self, documents: Sequence[Encoded]) -> Iterable[Floats]:
        if self._native is None:
            return embeddings(self.model, documents, self.pool, normalise=False)
        return self._native.embed([np.array(document.ids, np.int64) for document in documents])

    def _finished(self, windows: Sequence[tuple[int, Floats]]) -> Floats:
        sizes = np.array([size for size, _ in windows], np.float32)
        vector = np.average(np.stack([part for _, part in windows]), axis=0, weights=sizes)[: self.dims]
        length = float(np.linalg.norm(vector))
        return (vector / length if self.normalise and length else vector).astype(np.float32)


def pooling(path: Path) -> Pool:
    """How the model's folder says that it pools, as sentence-transformers writes it; mean where it does not say."""
    try:
        said = json.loads((path / POOLING).read_text(encoding="utf-8"))
    except OSError:
        return "mean"
    except ValueError as reason:
        raise ModelError(f"{path / POOLING} cannot be read as JSON: {reason}") from None
    names: dict[str, Pool] = {"mean_tokens": "mean", "cls_token": "first", "lasttoken": "last"}
    on = [pool for key, pool in names.items() if said.get(f"pooling_mode_{key}")]
    modes = [key for key, value in said.items() if key.startswith("pooling_mode_") and value]
    if len(on) != 1 or len(modes) != 1:
        raise ModelError(
            f"{path / POOLING} pools by {', '.join(modes) or 'nothing'}: choose --pool mean, first or last"
        )
    return on[0]


def _all(reader: Reader, settings: EmbedSettings, quiet: bool) -> tuple[list[str], Floats, Counter[str]]:
    """Every text and its vector (N, D)."""
    counted: Counter[str] = Counter()
    texts: list[str] = []
    vectors: list[Floats] = []
    with track("reading", unit="texts", quiet=quiet) as progress:
        for batch in batches(rows(settings, counted), settings.batch_size):
            texts += [row.text for row in batch]
            vectors += reader.vectors(batch, counted)
            progress.advance(len(batch))
    if not vectors:
        raise UsageError("there is no text to read")
    return texts, np.stack(vectors), counted


def _write(path: Path, suffix: str, texts: Sequence[str], vectors_ND: Floats) -> None:
    """The vectors alone, or texts and vectors."""
    if suffix == ".npy":
        with open(path, "wb") as file:
            np.save(file, vectors_ND)
        return
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("data", "pyarrow") from None
    parquet.write_table(pyarrow.table({"text": list(texts), "embedding": list(vectors_ND)}), path)
