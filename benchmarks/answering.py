"""Span extraction beside transformers: the same weights and questions, the loss of every one of 50 steps, in one run.

    scripts/bench answering [--steps 50] [--rows 8] [--threads 2]

MiniLM's encoder (asset `minilm`) with a head of random weights learns SQuAD-shaped rows (asset `questions`), 256 tokens
a window. Here a step is packed rows; transformers, whose loss counts padding, gets its questions one by one and their
mean. No dropout, AdamW at 5e-5 without decay, clipped at 1. Prints one JSON object: the largest relative difference of
the losses, and tokens a second of both. It exits 1 where the difference is above 0.001.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers

from langmill.adapt.heads import with_head
from langmill.common.settings import TrainSettings
from langmill.data.items import Spanned
from langmill.data.pipeline import Ledger
from langmill.data.rows import TaskRows, Text
from langmill.data.tasks import read_questions
from langmill.families.folder import load, save
from langmill.model.transformer import Transformer
from langmill.text.answer import answer_places, encode_question
from langmill.text.tasks import Limit
from langmill.text.tokenizer import Tokenizer
from langmill.train.optim import Optimizer
from langmill.train.step import tensors, train_step
from langmill.train.tasks import span

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets

RATE, LENGTH = 5e-5, 256


def windows_of(tokenizer: Tokenizer, wanted: int) -> Spanned:
    """The first windows, most of which hold the answer."""
    file, limit = assets.fetch("questions") / "squad.jsonl", Limit(LENGTH, "window", 64)
    texts, places = [], []
    for row, windows in read_questions(
        [file],
        Ledger(),
        lambda row: (row, encode_question(tokenizer, row.question, row.context, limit, Counter())),
    ):
        for window in windows:
            place = (0, 0) if row.span is None else answer_places(window, *row.span)
            if place != (0, 0):
                texts.append(Text(row.where, window.encoded.ids, window.encoded.types))
                places.append(place)
        if len(texts) >= wanted:
            break
    return Spanned.of(texts, places, tokenizer.pad_id or 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    body, tokenizer = load(assets.fetch("minilm"))
    assert tokenizer is not None and isinstance(body, Transformer)
    model = with_head(body, "answer", (), seed=0).train()
    with tempfile.TemporaryDirectory() as folder:
        save(model, None, Path(folder) / "model")
        peer = transformers.AutoModelForQuestionAnswering.from_pretrained(
            Path(folder) / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ).train()
    source = windows_of(tokenizer, options.steps * options.rows)
    settings = TrainSettings(weight_decay=0.0, beta1=0.9, beta2=0.999)
    optimizer, theirs = (
        Optimizer(model, settings),
        torch.optim.AdamW(peer.parameters(), lr=RATE, weight_decay=0.0),
    )
    losses: dict[str, list[float]] = {"langmill": [], "transformers": []}
    seconds, tokens = dict.fromkeys(losses, 0.0), 0
    for step in range(options.steps):
        numbers = np.arange(step * options.rows, (step + 1) * options.rows) % len(source)
        began = time.perf_counter()
        batches = [
            tensors(batch, torch.device("cpu")) for batch in TaskRows(source, numbers, 2048, 1, 0).once()
        ]
        done = train_step(model, optimizer, span, batches, learning_rate=RATE, max_grad_norm=1.0)
        seconds["langmill"] += time.perf_counter() - began
        losses["langmill"].append(done.loss)
        began, total = time.perf_counter(), 0.0
        theirs.zero_grad()
        for number in numbers.tolist():
            cells = slice(source.texts.starts[number], source.texts.starts[number + 1])
            ids = torch.from_numpy(source.texts.ids[cells].astype(np.int64))[None]
            assert source.texts.types is not None
            types = torch.from_numpy(source.texts.types[cells].astype(np.int64))[None]
            first, last = (torch.tensor([place]) for place in source.spans[number].tolist())
            out = peer(input_ids=ids, token_type_ids=types, start_positions=first, end_positions=last)
            (out.loss / options.rows).backward()
            total += float(out.loss.detach()) / options.rows
            tokens += ids.shape[1]
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        theirs.step()
        seconds["transformers"] += time.perf_counter() - began
        losses["transformers"].append(total)
    ours, other = np.array(losses["langmill"]), np.array(losses["transformers"])
    worst = float(np.abs(ours / other - 1).max())
    figures = {
        "steps": options.steps,
        "first_loss": [ours[0], other[0]],
        "last_loss": [ours[-1], other[-1]],
        "largest_relative_difference": worst,
        "tokens_per_second": {name: tokens / spent for name, spent in seconds.items()},
    }
    print(json.dumps(figures))
    return 0 if worst <= 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
