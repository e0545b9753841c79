"""`langmill pretrain --dry-run`: what the run would do, and the first row that the model would see."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from langmill.common.configure import as_yaml
from langmill.common.metrics import Report
from langmill.common.settings import PretrainSettings
from langmill.data.batches import IGNORED, Batch, Packed
from langmill.jobs import memory
from langmill.jobs.card import shape
from langmill.jobs.corpus import Corpus, Ints
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
    task, row_tokens = ready.task, train.max_length
    if task is None:
        batches: Packed = corpus.batches(train.max_length, train.micro_batch_size, settings.seed)
    else:
        batches, row_tokens = task.batches(corpus.train, settings.seed), task.length
    per_step = train.micro_batch_size * train.gradient_accumulation_steps
    epochs = 1.0 if train.num_train_epochs is None else train.num_train_epochs
    steps = train.max_steps or max(1, round(epochs * batches.rows_per_epoch / per_step))
    first = next(batches)
    whole = train.objective in ("causal", "infill")  # every token of a text is predicted
    pieces = list((_row if whole else _guesses)(corpus, first))
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
    rows = f"{per_step} rows of {row_tokens} tokens, {batches.fill:.0%} filled"
    after = "all after it is predicted:" if whole else "what stands after it is to be said:"
    lines = [
        f"text{part}: {text} ({bytes_each:.2f} bytes each), {held}",
        f"model: {shape(config)}, {size}",
        f"training{part}: {shown(steps)} steps of {rows}",
        f"the first row, document by document; what stands before | is given, {after}",
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


def _row(corpus: Corpus, batch: Batch) -> Iterator[str]:
    """The documents of the first packed row: the token that each starts from, and what is predicted after it."""
    tokens_T, targets_T, documents_T = batch.tokens_BT[0], batch.targets_BT[0], batch.documents_BT[0]
    for number in range(1, int(documents_T.max()) + 1):
        [places] = np.nonzero(documents_T == number)
        yield _shown(corpus, tokens_T[places[:1]], targets_T[places])


def _guesses(corpus: Corpus, batch: Any) -> Iterator[str]:
    """The documents of the first row: what is read of each, and the tokens to be said."""
    read_T, documents_T = batch.encoder_tokens_BS, batch.encoder_documents_BS
    if read_T is None:
        read_T, documents_T = batch.tokens_BT, batch.documents_BT
    for number in range(1, int(batch.documents_BT[0].max()) + 1):
        said_T = batch.targets_BT[0][batch.documents_BT[0] == number]
        yield _shown(corpus, read_T[0][documents_T[0] == number], said_T[said_T != IGNORED])


def _shown(corpus: Corpus, given: Ints, said: Ints) -> str:
    parts = [corpus.tokenizer.decode(ids.tolist(), skip_specials=False) for ids in (given, said)]
    parts = [part if len(part) <= CLIP else f"{part[: CLIP // 2]} … {part[-CLIP // 2 :]}" for part in parts]
    return "|".join(parts).replace("\n", "⏎")
