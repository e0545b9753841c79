"""Marian with transformers: Seq2SeqTrainer on pairs of ids, or beam search: run by the peers' Python.

python marian_trainer.py MODEL PAIRS --steps 40 --dtype float32|bfloat16 [--save FOLDER]   trains
python marian_trainer.py MODEL PAIRS --beams 5 --rows 16 [--count N]                       translates

PAIRS: lines {"input_ids", "labels"}. Prints one JSON object.
"""

import argparse
import json
import time

import torch
from clock import Clock
from datasets import Dataset
from transformers import (
    MarianMTModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=7e-4)
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save")
    parser.add_argument("--beams", type=int, default=0)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--count", type=int)
    return parser.parse_args()


def padded(rows, fill):
    """(B, T) ids, the longest row setting T."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def train(given, model, rows):
    """Tokens a second of each step, both sides counted without padding, and the losses."""
    tokens, pad = [], model.config.pad_token_id

    def collate(group):
        read = padded([one["input_ids"] for one in group], pad)
        labels = padded([one["labels"] for one in group], -100)
        written = model.prepare_decoder_input_ids_from_labels(labels=labels)
        mask = padded([[1] * len(one["input_ids"]) for one in group], 0)
        return {"input_ids": read, "attention_mask": mask, "labels": labels, "decoder_input_ids": written}

    settings = Seq2SeqTrainingArguments(
        output_dir="unused", max_steps=given.steps, per_device_train_batch_size=given.batch, learning_rate=given.rate,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=round(given.warmup * given.steps), weight_decay=0.0, adam_beta2=0.98, max_grad_norm=1.0,
        label_smoothing_factor=0.1, bf16=given.dtype == "bfloat16", use_cpu=True, report_to=[], save_strategy="no",
        logging_steps=10, disable_tqdm=True, seed=0, train_sampling_strategy="group_by_length",
    )  # fmt: skip
    clock = Clock()
    trainer = Seq2SeqTrainer(
        model, args=settings, train_dataset=Dataset.from_list(rows), data_collator=collate, callbacks=[clock]
    )
    step = trainer.training_step

    def counted(model, inputs, *more):
        tokens.append(int(inputs["attention_mask"].sum() + (inputs["labels"] >= 0).sum()))
        return step(model, inputs, *more)

    trainer.training_step = counted
    trainer.train()
    if given.save:
        trainer.save_model(given.save)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"tokens": sum(tokens), "seconds": sum(clock.seconds), "losses": losses}


def translate(given, model, rows):
    """Ids of each row's translation, the longest sources together, and the seconds that it took."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    found, began, pad = [[] for _ in rows], time.perf_counter(), model.config.pad_token_id
    for at in range(0, len(order), given.rows):
        group = order[at : at + given.rows]
        read = [rows[i]["input_ids"] for i in group]
        written = model.generate(
            padded(read, pad), attention_mask=padded([[1] * len(ids) for ids in read], 0), num_beams=given.beams,
            max_new_tokens=256, do_sample=False, length_penalty=1.0, early_stopping=False, bad_words_ids=None,
        ).tolist()  # fmt: skip
        for i, ids in zip(group, written, strict=True):
            found[i] = [one for one in ids[1:] if one not in (pad, model.config.eos_token_id)]
    return {"seconds": time.perf_counter() - began, "ids": found}


def main():
    given = arguments()
    torch.set_num_threads(given.threads)
    with open(given.pairs, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    model = MarianMTModel.from_pretrained(given.model, dtype=torch.float32)
    if given.beams:
        with torch.no_grad():
            print(json.dumps(translate(given, model.eval(), rows[: given.count])))
    else:
        print(json.dumps(train(given, model, rows)))


if __name__ == "__main__":
    main()
