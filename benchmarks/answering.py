"""Span extraction beside transformers: the same weights and questions, the loss of every step, or the answers' scores.

    scripts/bench answering [--steps 50] [--rows 8] [--threads 2]          the losses of so many steps, in one run
    scripts/bench answering --scores [--epochs 3] [--length 512] [--rows N] [--keep FOLDER] [--peers PYTHON]

Losses: MiniLM's encoder (asset `minilm`) with a head of random weights learns SQuAD-shaped rows (asset `questions`),
256 tokens a window. Here a step is packed rows; transformers, whose loss counts padding, gets its questions one by one
and their mean. No dropout, AdamW at 5e-5 without decay, clipped at 1. Prints one JSON object: the largest relative
difference of the losses, and tokens a second of both. It exits 1 where the difference is above 0.001.

--scores: a fifth of the passages, with all their questions, is the test. The same start learns the others by
`langmill finetune --task answer` and by transformers' Trainer (peers/squad_trainer.py): the same head, batch, rate,
schedule, dropout, windows and epochs; the last weights count, for no row is held out to choose by. Each then says its
answers to the test by its own means, `langmill evaluate --task answer` and the usual windows and best spans. One scorer
marks both, and SQuAD's official normalisation once more, to see that it agrees. Prints one JSON object: exact match and
F1 of all rows, of those that have an answer, and how often "no answer" is rightly said (null where every row has one),
with 95 % bootstrap intervals over passages, and the paired differences. What is in FOLDER is not made again. PYTHON
belongs to an environment with transformers, accelerate and datasets; the first use makes one in .venv-peers.
--rows: so many rows alone, to see that it works; --data FILE: other rows; --model FOLDER: another start.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _figures import read_rows, said, write_rows
from finetune import peers

from langmill.adapt.heads import with_head
from langmill.common.configure import configure
from langmill.common.files import run_folder
from langmill.common.settings import EvaluateSettings, FinetuneSettings, TrainSettings
from langmill.data.items import Spanned
from langmill.data.pipeline import Ledger
from langmill.data.rows import TaskRows, Text
from langmill.data.tasks import read_questions
from langmill.evaluate.compare import Figures, Ints, differences, intervals
from langmill.families.folder import load, save
from langmill.jobs import evaluate, finetune
from langmill.jobs.evaluate_report import flat
from langmill.model.transformer import Transformer
from langmill.text.answer import answer_places, encode_question, exact_match, f1
from langmill.text.tasks import Limit
from langmill.text.tokenizer import Tokenizer
from langmill.train.optim import Optimizer
from langmill.train.step import tensors, train_step
from langmill.train.tasks import span

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / "benchmarks" / "peers" / "squad_trainer.py"
RATE, LENGTH = 5e-5, 256
TEST = 0.2  # of the passages
Rows = list[dict[str, Any]]


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


def step_losses(options: argparse.Namespace) -> int:
    """The loss of each step of both."""
    rows = options.rows or 8
    torch.set_num_threads(options.threads)
    body, tokenizer = load(assets.fetch("minilm"))
    assert tokenizer is not None and isinstance(body, Transformer)
    model = with_head(body, "answer", (), seed=0).train()
    with tempfile.TemporaryDirectory() as folder:
        save(model, None, Path(folder) / "model")
        peer = transformers.AutoModelForQuestionAnswering.from_pretrained(
            Path(folder) / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ).train()
    source = windows_of(tokenizer, options.steps * rows)
    settings = TrainSettings(weight_decay=0.0, beta1=0.9, beta2=0.999)
    optimizer, theirs = (
        Optimizer(model, settings),
        torch.optim.AdamW(peer.parameters(), lr=RATE, weight_decay=0.0),
    )
    losses: dict[str, list[float]] = {"langmill": [], "transformers": []}
    seconds, tokens = dict.fromkeys(losses, 0.0), 0
    for step in range(options.steps):
        numbers = np.arange(step * rows, (step + 1) * rows) % len(source)
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
            (out.loss / rows).backward()
            total += float(out.loss.detach()) / rows
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


def split(rows: Rows) -> tuple[Rows, Rows]:
    """(learned, test): a passage, with all its questions, stands on one side."""
    passages = sorted({passage(row) for row in rows})
    order = np.random.default_rng(0).permutation(len(passages)).tolist()
    held = {passages[i] for i in order[: max(1, round(TEST * len(passages)))]}
    return [row for row in rows if passage(row) not in held], [row for row in rows if passage(row) in held]


def passage(row: dict[str, Any]) -> str:
    """What is the same passage, however it is spaced."""
    return " ".join(row["context"].split()).casefold()


def started(options: argparse.Namespace, folder: Path) -> Path:
    """The start with the head that both learn from, made once."""
    if not folder.exists():
        body, tokenizer = load(options.model or assets.fetch("minilm"))
        save(with_head(body, "answer", (), seed=options.seed), tokenizer, folder)
    return folder


def our_answers(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """By the commands that a user has."""
    out, results = folder / "langmill", folder / "langmill.jsonl"
    words = [
        f"num_train_epochs={options.epochs}", f"learning_rate={options.rate}", f"tasks.batch_size={options.batch}",
        "schedule=cosine", "min_lr_ratio=0.1", "warmup_ratio=0.03", "weight_decay=0", "beta2=0.999", "max_grad_norm=1",
        f"dropout={options.dropout}", f"tasks.length={options.length}", f"tasks.overlap={options.overlap}",
        "tasks.long_texts=window", "holdout=0", "dtype=float32", "compile=false", f"threads={options.threads}",
        f"seed={options.seed}", f"resume={str((run_folder(out) / 'settings.yaml').exists()).lower()}",
    ]  # fmt: skip
    given = {
        "model": str(folder / "start"),
        "data": [str(folder / "train.jsonl")],
        "task": "answer",
        "out": out,
    }
    learned = finetune.run(configure(FinetuneSettings, None, words, **given), quiet=False)
    given = {"model": str(out), "on": [str(folder / "test.jsonl")], "task": "answer", "out": results}
    words = ["force=true", f"threads={options.threads}"]
    told = evaluate.run(configure(EvaluateSettings, None, words, **given), quiet=False).figures
    found = read_rows(results)
    marks = {name: float(np.mean([row[name] for row in found])) for name in ("exact_match", "f1")}
    assert all(abs(value - float(str(told[name]))) < 1e-9 for name, value in marks.items())
    about = {"steps": learned.counts["steps"], "windows": learned.counts["examples"]}
    return about | {"said": [row["said"] for row in found]}


def their_answers(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The peer's script, in a process of its own."""
    names = ("epochs", "batch", "rate", "length", "overlap", "dropout", "seed", "threads")
    words = [word for name in names for word in (f"--{name}", getattr(options, name))]
    files = (folder / "start", folder / "train.jsonl", folder / "test.jsonl")
    return said([options.peers, PEER, *files, "--out", folder / "transformers", *words])


def answers(options: argparse.Namespace, folder: Path, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
    """What each says of the test rows, with the steps and windows that it learned from."""
    about = {
        name: str(value) for name, value in vars(options).items()
        if name not in ("scores", "keep", "threads", "steps", "peers")
    }  # fmt: skip
    file = folder / "answers.json"
    held: dict[str, Any] = {"about": about, "found": {}}
    if file.exists():
        held = json.loads(file.read_text(encoding="utf-8"))
    if held["about"] != about:
        raise SystemExit(f"{file} was made by {held['about']}, not by {about}: choose another --keep")
    file.write_text(json.dumps(held), encoding="utf-8")
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "test.jsonl", test)
    started(options, folder / "start")
    for name, call in (("langmill", our_answers), ("transformers", their_answers)):
        if name in held["found"]:
            continue
        began = time.perf_counter()
        held["found"][name] = call(options, folder)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        file.write_text(json.dumps(held), encoding="utf-8")
    found: dict[str, dict[str, Any]] = held["found"]
    return found


def official(said: str, wanted: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) as SQuAD's own script has it: lower case, no ASCII punctuation, no articles."""

    def words(text: str) -> list[str]:
        plain = "".join(one for one in text.lower() if one not in string.punctuation)
        return re.sub(r"\b(?:a|an|the)\b", " ", plain).split()

    def overlap(one: list[str], other: list[str]) -> float:
        same = sum((Counter(one) & Counter(other)).values())
        return 2 * same / (len(one) + len(other)) if one and other else float(one == other)

    right = [words(one) for one in wanted or ("",)]
    return float(words(said) in right), max(overlap(words(said), one) for one in right)


def figures_of(test: Rows, marks: Sequence[tuple[float, float]]) -> tuple[Figures, int]:
    """(the figures of chosen passages, how many passages there are)."""
    names, owners = np.unique([passage(row) for row in test], return_inverse=True)
    rows_of = [np.flatnonzero(owners == i) for i in range(len(names))]
    exact, overlap = np.array(marks, np.float64).T
    has = np.array([bool(row["answers"]["text"]) for row in test])

    def figures(chosen: Ints) -> dict[str, float]:
        k = np.concatenate([rows_of[i] for i in chosen])
        found = {"exact_match": float(exact[k].mean()), "f1": float(overlap[k].mean())}
        if has[k].any():
            some = k[has[k]]
            found["has_answer_exact_match"] = float(exact[some].mean())
            found["has_answer_f1"] = float(overlap[some].mean())
        if not has[k].all():
            found["no_answer_accuracy"] = float(exact[k[~has[k]]].mean())
        return found

    return figures, len(names)


def answer_scores(options: argparse.Namespace) -> int:
    """The answers of both to passages that neither has seen."""
    rows = read_rows(options.data or assets.fetch("questions") / "squad.jsonl")
    train, test = split(rows[:: max(1, len(rows) // options.rows)] if options.rows else rows)
    peers(options.peers)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = answers(options, folder, train, test)
    sides, told, differ = dict[str, Figures](), dict[str, Any](), 0
    for name, one in found.items():
        pairs = list(zip(one["said"], (row["answers"]["text"] for row in test), strict=True))
        marks = [(exact_match(own, right), f1(own, right)) for own, right in pairs]
        plain = [official(own, right) for own, right in pairs]
        differ += sum(
            abs(a - b) > 1e-9 for two in zip(marks, plain, strict=True) for a, b in zip(*two, strict=True)
        )
        sides[name], passages = figures_of(test, marks)
        told[name] = {key: one[key] for key in ("steps", "windows")} | {"no_answer_accuracy": None}
        told[name] |= flat(sides[name](np.arange(passages)), intervals(sides[name], passages))
        told[name]["official"] = dict(
            zip(("exact_match", "f1"), np.mean(plain, axis=0).tolist(), strict=True)
        )
    between = differences(sides["langmill"], sides["transformers"], passages)
    figures = {
        "learned_rows": len(train),
        "test_rows": len(test),
        "test_rows_without_answer": sum(not row["answers"]["text"] for row in test),
        "test_passages": passages,
        **told,
        "difference": {one.name: one.as_dict() for one in between},
        "marks_that_differ_from_official": differ,
    }
    print(json.dumps(figures))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, help="losses: questions a step, 8; scores: so many rows alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scores", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--overlap", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    options = parser.parse_args()
    return answer_scores(options) if options.scores else step_losses(options)


if __name__ == "__main__":
    sys.exit(main())
