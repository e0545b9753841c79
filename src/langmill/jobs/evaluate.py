"""`langmill evaluate`: how well a model predicts the text of files, folders or shards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import DataError
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import EvaluateSettings
from langmill.data.pipeline import Ledger
from langmill.data.readers import read
from langmill.data.shards import Shards, write_shards
from langmill.evaluate.loss import Encoded, Interval, Scores, score
from langmill.evaluate.yardstick import Yardstick
from langmill.infer.ready import ready
from langmill.jobs.report import shown
from langmill.text.document import text_hash
from langmill.text.tokenizer import Tokenizer

_WINDOW = 1024  # tokens, where the settings name no length: longer contexts cost much and change little
Part = tuple[Shards, NDArray[np.int64]]  # shards, and which of their documents to score


def run(settings: EvaluateSettings, *, quiet: bool = False) -> Report:
    """Loss, perplexity and bits per byte of a model on text, with 95 % intervals over documents.

    Figures: loss (nats a token), perplexity, bits_per_byte, each with NAME_interval ([low, high], or None
    for a single document), and for text also what gzip and xz make of the same bytes. Text is tokenised
    into a temporary folder that only this user can read and that is gone afterwards.
    """
    model, tokenizer = ready(settings.model, settings.dtype, settings.device, settings.threads)
    length = settings.max_length or min(model.config.length, _WINDOW)
    ledger = Ledger()
    with tempfile.TemporaryDirectory(prefix="langmill-", ignore_cleanup_errors=True) as scratch:
        parts = _parts(settings, tokenizer, ledger, Path(scratch) / "shards", quiet)
        total = sum(int(shards.lengths(chosen).sum()) for shards, chosen in parts)
        with track("scoring", total=total, unit="tokens", quiet=quiet) as progress:
            scores = score(
                model,
                _encoded(parts),
                start_id=tokenizer.start_id,
                length=length,
                rows=settings.micro_batch_size,
                resamples=settings.resamples,
                seed=settings.seed,
                on_tokens=progress.advance,
            )
        compressed = _compressed(settings, parts, quiet)
        del parts  # an open map cannot be deleted everywhere
    return _report(settings, scores, compressed, ledger, length)


def _is_shards(path: str) -> bool:
    return (Path(path) / "shards.json").is_file()


def _parts(
    settings: EvaluateSettings, tokenizer: Tokenizer, ledger: Ledger, scratch: Path, quiet: bool
) -> list[Part]:
    """Every document to score. Text becomes shards first, so that one path serves both."""
    found = [Shards.open(path, expected=tokenizer.fingerprint) for path in settings.on if _is_shards(path)]
    if texts := _texts(settings):
        with track("reading", unit="B", quiet=quiet) as progress:
            documents = read(texts, settings.data, ledger)
            advance = lambda _, size: progress.advance(size)  # noqa: E731
            found.append(write_shards(documents, tokenizer, scratch, ledger=ledger, on_batch=advance))
    if settings.split == "all":
        return [(shards, np.arange(shards.documents)) for shards in found]
    parts = [(shards, shards.split(settings.data.holdout)[1]) for shards in found]
    if not any(len(chosen) for _, chosen in parts):
        raise DataError(
            f"of the {sum(shards.documents for shards in found)} documents none is held out with "
            f"data.holdout={settings.data.holdout}: give more text, or evaluate with split=all"
        )
    return parts


def _texts(settings: EvaluateSettings) -> list[str]:
    return [path for path in settings.on if not _is_shards(path)]


def _encoded(parts: Sequence[Part]) -> Iterator[Encoded]:
    for shards, chosen in parts:
        for document in map(int, chosen):
            ids, size = shards.tokens_of(document), int(shards.bytes_of[document])
            yield Encoded(shards.id_of(document), ids, size)


def _compressed(settings: EvaluateSettings, parts: Sequence[Part], quiet: bool) -> dict[str, float]:
    """Bits per byte of general compressors on the scored texts; none where only their tokens are at hand."""
    texts = _texts(settings)
    if len(texts) < len(settings.on):
        return {}
    [(shards, chosen)] = parts
    scored = set(np.asarray(shards.hashes)[chosen].tolist())
    yardstick = Yardstick()
    total = int(shards.bytes_of[chosen].sum(dtype=np.int64))
    with track("compressing, to compare", total=total, unit="B", quiet=quiet) as progress:
        for document in read(texts, settings.data, Ledger()):
            if text_hash(document.text) in scored:
                progress.advance(yardstick.add(document.text))
    return yardstick.bits_per_byte()


def _report(
    settings: EvaluateSettings, scores: Scores, compressed: dict[str, float], ledger: Ledger, length: int
) -> Report:
    rows: list[tuple[str, float, Interval | None, str]] = [
        ("loss", scores.loss, scores.loss_interval, "nats a token"),
        ("perplexity", scores.perplexity, scores.perplexity_interval, ""),
        ("bits_per_byte", scores.bits_per_byte, scores.bits_per_byte_interval, ""),
    ]
    dropped = {reason: count.documents for reason, count in ledger.dropped().items()}
    lines = [
        f"{settings.model} on {shown(scores.documents)} documents, {shown(scores.tokens)} tokens, "
        f"{shown(scores.bytes)} bytes, in windows of {length} tokens"
    ]
    for name, value, interval, unit in rows:
        between = "" if interval is None else f"95 % interval {shown(interval[0])} to {shown(interval[1])}"
        lines.append(f"  {name.replace('_', ' '):<14}{shown(value):>8}  {between:<32}{unit}".rstrip())
    lines += [
        f"  {name:<14}{shown(value):>8}  bits per byte, to compare" for name, value in compressed.items()
    ]
    lines += [f"  set aside: {shown(count)} x {reason}" for reason, count in dropped.items()]
    figures: dict[str, object] = {}
    for name, value, interval, _ in rows:
        figures |= {name: value, f"{name}_interval": None if interval is None else list(interval)}
    return Report(
        counts={
            "documents": scores.documents,
            "tokens": scores.tokens,
            "bytes": scores.bytes,
            "set_aside": sum(dropped.values()),
        },
        figures=figures | {f"{name}_bits_per_byte": value for name, value in compressed.items()},
        text="\n".join(lines),
        extra={"ledger": ledger.as_dict(), "window": length, "split": settings.split},
    )
