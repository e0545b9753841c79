"""`langmill pretrain --dry-run`: what the run would do, and the first row that the model would see."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from langmill.common.configure import as_yaml
from langmill.common.metrics import Report
from langmill.common.settings import PretrainSettings
from langmill.jobs import memory
from langmill.jobs.card import shape
from langmill.jobs.corpus import Corpus
from langmill.jobs.pretrain import Prepared, prepare
from langmill.jobs.report import bytes_shown, count_shown, shown
from langmill.model.count import parameters

MOST_BYTES = 16_000_000  # of text to look at
CLIP = 200  # characters shown of each document in the row


def run(settings: PretrainSettings, *, quiet: bool = False) -> Report:
    """Read the first 16 MB of the text, make tokenizer, batches and model in a temporary folder, show them, and stop.

    Nothing is written beside it. Raises what the run itself would raise: unreadable text, too little memory.
    """
    with tempfile.TemporaryDirectory(prefix="langmill-", ignore_cleanup_errors=True) as scratch:
        ready = prepare(settings, Path(scratch), quiet, MOST_BYTES)
        report = _report(ready)
        del ready  # an open map cannot be deleted everywhere
    return report


def _report(ready: Prepared) -> Report:
    settings, corpus, train = ready.settings, ready.corpus, ready.settings.train
    shards, config = corpus.shards, ready.model.config
    assert train.max_length and train.micro_batch_size
    batches = corpus.batches(train.max_length, train.micro_batch_size, settings.seed)
    per_step = train.micro_batch_size * train.gradient_accumulation_steps
    epochs = 1.0 if train.num_train_epochs is None else train.num_train_epochs
    steps = train.max_steps or max(1, round(epochs * batches.rows_per_epoch / per_step))
    pieces = list(_row(corpus, train.max_length, train.micro_batch_size, settings.seed))
    part = " (of its first part)" if shards.bytes >= MOST_BYTES else ""
    counts = {
        "documents": shards.documents,
        "held_out_documents": len(corpus.held),
        "tokens": shards.tokens,
        "bytes": shards.bytes,
        "vocabulary": corpus.tokenizer.vocab_size,
        "steps": steps,
        "set_aside": sum(count["documents"] for count in shards.ledger["dropped"].values()),
    }
    needed = memory.estimate(config, train, ready.device).total
    bytes_each = shards.bytes / shards.tokens
    held = f"{shown(len(corpus.held))} documents held out, {shown(counts['set_aside'])} set aside"
    text = f"{shown(shards.documents)} documents, {bytes_shown(shards.bytes)}, {shown(shards.tokens)} tokens"
    size = f"{count_shown(parameters(config))} parameters, about {bytes_shown(needed)} of memory"
    rows = f"{per_step} rows of {train.max_length} tokens, {batches.fill:.0%} filled"
    lines = [
        f"text{part}: {text} ({bytes_each:.2f} bytes each), {held}",
        f"model: {shape(config)}, {size}",
        f"training{part}: {shown(steps)} steps of {rows}",
        "the first row, document by document; what stands before | is given, all after it is predicted:",
        *(f"  [{number}] {piece}" for number, piece in enumerate(pieces, 1)),
    ]
    return Report(
        counts=counts,
        figures={
            "parameters": parameters(config),
            "bytes_per_token": bytes_each,
            "fill": batches.fill,
            "memory_bytes": needed,
        },
        # The plan stands in comments, so that the whole is a file for --config.
        text=as_yaml(settings) + "\n".join(f"# {line}" for line in lines),
        extra={"settings": settings.model_dump(mode="json", by_alias=True), "row": pieces},
    )


def _row(corpus: Corpus, length: int, rows: int, seed: int) -> Iterator[str]:
    """The documents of the first packed row: the token that each starts from, and what is predicted after it."""
    batch = next(corpus.batches(length, rows, seed))
    tokens_T, targets_T, documents_T = batch.tokens_BT[0], batch.targets_BT[0], batch.documents_BT[0]
    for number in range(1, int(documents_T.max()) + 1):
        [places] = np.nonzero(documents_T == number)
        given = corpus.tokenizer.decode([int(tokens_T[places[0]])], skip_specials=False)
        words = corpus.tokenizer.decode(targets_T[places].tolist(), skip_specials=False)
        words = words if len(words) <= CLIP else f"{words[: CLIP // 2]} … {words[-CLIP // 2 :]}"
        yield f"{given}|{words}".replace("\n", "⏎")
