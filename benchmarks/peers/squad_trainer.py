"""Span extraction with transformers' Trainer, as is usual for SQuAD: run by the peers' Python.

python squad_trainer.py START TRAIN TEST --out FOLDER --epochs 3 --batch 32 --rate 1e-4 --length 512 --overlap 64

TRAIN, TEST: lines {"question", "context", "answers": {"text", "answer_start"}}; the first answer is learned, and a
window that does not hold it points at its first token. Of a test row the best span of at most 30 tokens is said, of the
20 likeliest starts and ends of each window; where some row of TEST has no answer, "" may be said. FOLDER keeps a
checkpoint an epoch, and a run goes on from the last. Prints one JSON object.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

BEST, LONGEST, ROWS = 20, 30, 16


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("start")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--warmup", type=float, default=0.03)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--overlap", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def read(path):
    """JSON, a row a line."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def windows(given, tokenizer, rows):
    """(what the model reads of each window, the row's number of each, the characters of each token of the context)."""
    made = tokenizer(
        [row["question"].strip() for row in rows], [row["context"] for row in rows], truncation="only_second",
        max_length=given.length, stride=given.overlap, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in made]
    inputs = [{name: made[name][i] for name in names} for i in range(len(made["input_ids"]))]
    places = [
        [place if side == 1 else None for place, side in zip(offsets, made.sequence_ids(i), strict=True)]
        for i, offsets in enumerate(made["offset_mapping"])
    ]
    return inputs, made["overflow_to_sample_mapping"], places


def target(row, places):
    """The first and last token of the first answer, 0 and 0 where the window does not hold all of it."""
    inside = [i for i, place in enumerate(places) if place is not None]
    if not row["answers"]["text"] or not inside:
        return 0, 0
    start = row["answers"]["answer_start"][0]
    end = start + len(row["answers"]["text"][0])
    if places[inside[0]][0] > start or places[inside[-1]][1] < end:
        return 0, 0
    first = max(i for i in inside if places[i][0] <= start)
    last = min(i for i in inside if places[i][1] >= end)
    return (first, last) if first <= last else (0, 0)


def train(given, model, tokenizer, rows):
    """Teach the model in place: steps, windows and losses."""
    inputs, owners, places = windows(given, tokenizer, rows)
    for one, owner, own in zip(inputs, owners, places, strict=True):
        one["start_positions"], one["end_positions"] = target(rows[owner], own)
    steps = math.ceil(math.ceil(len(inputs) / given.batch) * given.epochs)
    settings = TrainingArguments(
        output_dir=str(given.out), num_train_epochs=given.epochs, per_device_train_batch_size=given.batch,
        learning_rate=given.rate, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=round(given.warmup * steps), weight_decay=0.0, adam_beta2=0.999, max_grad_norm=1.0, use_cpu=True,
        report_to=[], save_strategy="epoch", save_total_limit=1, logging_steps=10, disable_tqdm=True, seed=given.seed,
    )  # fmt: skip
    collate = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, args=settings, train_dataset=Dataset.from_list(inputs), data_collator=collate)
    trainer.train(resume_from_checkpoint=any(given.out.glob("checkpoint-*")))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"steps": trainer.state.global_step, "windows": len(inputs), "losses": losses}


@torch.inference_mode()
def scores(model, tokenizer, inputs):
    """(start, end) scores of each window's tokens, the longest windows together."""
    found, order = (
        [None] * len(inputs),
        sorted(range(len(inputs)), key=lambda i: -len(inputs[i]["input_ids"])),
    )
    for at in range(0, len(order), ROWS):
        group = order[at : at + ROWS]
        out = model(**tokenizer.pad([inputs[i] for i in group], return_tensors="pt"))
        for i, start, end in zip(group, out.start_logits.numpy(), out.end_logits.numpy(), strict=True):
            count = len(inputs[i]["input_ids"])
            found[i] = start[:count], end[:count]
    return found


def spans(start, end, places):
    """(score, first character, last) of the spans among the likeliest starts and ends of a window."""
    lasts = np.argsort(-end)[:BEST].tolist()
    for first in np.argsort(-start)[:BEST].tolist():
        for last in lasts:
            if places[first] and places[last] and first <= last < first + LONGEST:
                yield float(start[first] + end[last]), places[first][0], places[last][1]


def answers(given, model, tokenizer, rows):
    """What is said of each row: a part of its context, or "" where no answer is likelier and some row has none."""
    inputs, owners, places = windows(given, tokenizer, rows)
    empty = any(not row["answers"]["text"] for row in rows)
    best, none = [(-math.inf, 0, 0) for _ in rows], [math.inf for _ in rows]
    for owner, own, (start, end) in zip(owners, places, scores(model, tokenizer, inputs), strict=True):
        none[owner] = min(none[owner], float(start[0] + end[0]))
        best[owner] = max([best[owner], *spans(start, end, own)], key=lambda span: span[0])
    return [
        "" if empty and null > score else row["context"][first:last]
        for row, (score, first, last), null in zip(rows, best, none, strict=True)
    ]


def main():
    given = arguments()
    torch.set_num_threads(given.threads)
    tokenizer = AutoTokenizer.from_pretrained(given.start)
    model = AutoModelForQuestionAnswering.from_pretrained(
        given.start, dtype=torch.float32, hidden_dropout_prob=given.dropout,
        attention_probs_dropout_prob=given.dropout,
    )  # fmt: skip
    about = train(given, model, tokenizer, read(given.train))
    print(json.dumps(about | {"said": answers(given, model.eval(), tokenizer, read(given.test))}))


if __name__ == "__main__":
    main()
