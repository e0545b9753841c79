"""Classification beside TF-IDF with logistic regression: the same splits, texts and scores.

    scripts/bench labels spam      SpamAssassin, 5 folds, near-duplicates on one side: mean F1 of spam
    scripts/bench labels topic     20 newsgroups, the published train and test: accuracy
    scripts/bench labels sentiment Chinese reviews, 5 folds: accuracy (--model: one pretrained on Chinese)

    [--folds N] [--rows N] [--epochs 2] [--length 256] [--long truncate] [--dropout 0.1] [--holdout 0.1]
    [--rate 1e-4] [--model FOLDER] [--threads 2] [--keep FOLDER]

The model (MiniLM, asset `minilm`, unless --model names another) is fine-tuned by `langmill finetune`, which chooses its
checkpoint on --holdout of the training texts; it learns from the first --length tokens of each text and reads as many
of a test text (--long window: the whole text, window by window). The peer's regularisation is chosen on a tenth
of them, and it is then fitted to all of them. Prints one JSON object: scores by fold, the mean, and the paired 95 %
bootstrap interval of the difference over all test texts. `folds` may be fewer than 5: then the first ones are run. What
a fold said is kept in FOLDER beside its model, and what is there is not run again: a bench that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _figures import read_rows, write_rows
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from langmill.apps import classify
from langmill.common.configure import configure
from langmill.common.settings import ClassifySettings, FinetuneSettings
from langmill.data.examples import apart
from langmill.evaluate.labels import confusion, f1, interval
from langmill.jobs import finetune

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets

Rows = list[dict[str, Any]]
FOLDS = 5
STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
FILES = {"spam": ("spam", "spam.jsonl"), "sentiment": ("reviews", "reviews.jsonl")}


def splits(task: str, folds: int, most: int | None) -> list[tuple[Rows, Rows]]:
    """(training, test) rows; a group of near-duplicates stands on one side."""
    if task == "topic":
        folder = assets.fetch("newsgroups")
        pair = (read_rows(folder / "train.jsonl"), read_rows(folder / "test.jsonl"))
        return [tuple(rows[:: max(1, len(rows) // most)] if most else rows for rows in pair)]  # type: ignore[list-item]
    name, file = FILES[task]
    rows = read_rows(assets.fetch(name) / file)
    rows = rows[:: max(1, len(rows) // most)] if most else rows
    groups = [row.get("group", place) for place, row in enumerate(rows)]
    fold = {
        group: place % FOLDS
        for place, group in enumerate(np.random.default_rng(0).permutation(sorted(set(groups))))
    }
    sides = [[fold[group] == number for group in groups] for number in range(folds)]
    return [
        ([row for row, held in zip(rows, side, strict=True) if not held],
         [row for row, held in zip(rows, side, strict=True) if held])
        for side in sides
    ]  # fmt: skip


def peer(kind: str, task: str, train: Rows, test: Rows) -> list[str]:
    """The better of its settings on held-out training texts, fitted to all of these."""
    grams: dict[str, Any] = (
        {"analyzer": "char", "ngram_range": (1, 3)} if task == "sentiment" else {"ngram_range": (1, 2)}
    )

    def made(strength: float) -> Any:
        last = LinearSVC(C=strength) if kind == "svc" else LogisticRegression(C=strength, max_iter=2000)
        return make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2, **grams), last)

    texts, labels = [row["text"] for row in train], [row["label"] for row in train]
    fit, held = apart([text.encode() for text in texts], 0.1)
    strengths = (0.1, 0.3, 1.0, 3.0) if kind == "svc" else STRENGTHS
    scores = []
    for strength in strengths:
        model = made(strength).fit([texts[i] for i in fit], [labels[i] for i in fit])
        scores.append(model.score([texts[i] for i in held], [labels[i] for i in held]))
    best = made(strengths[int(np.argmax(scores))]).fit(texts, labels)
    return [str(label) for label in best.predict([row["text"] for row in test])]


def ours(options: argparse.Namespace, train: Rows, test: Rows, model: Path) -> list[str]:
    """By the commands that a user has; a model that is there is not taught again."""
    with tempfile.TemporaryDirectory() as scratch:
        if not model.exists():
            start = options.model or str(assets.fetch("minilm"))
            taught(options, start, train, model, Path(scratch))
        return said_by(model, test, Path(scratch), options.long)


def taught(
    options: argparse.Namespace, start: str, train: Rows, out: Path, scratch: Path, *more: str
) -> Mapping[str, object]:
    """The figures of `langmill finetune --task classify`; `more` settings."""
    write_rows(scratch / "train.jsonl", ({"text": row["text"], "label": row["label"]} for row in train))
    words = [
        f"num_train_epochs={options.epochs}", f"tasks.length={options.length}", f"threads={options.threads}",
        f"holdout={options.holdout}", "compile=false", "tasks.long_texts=truncate", f"dropout={options.dropout}",
        f"learning_rate={options.rate}", *more,
    ]  # fmt: skip
    given = {"model": start, "task": "classify", "data": [str(scratch / "train.jsonl")], "out": out}
    return finetune.run(configure(FinetuneSettings, None, words, **given), quiet=False).figures


def said_by(model: Path, test: Rows, scratch: Path, long: str = "truncate") -> list[str]:
    """What `langmill classify` says of each text."""
    write_rows(scratch / "test.jsonl", ({"text": row["text"]} for row in test))
    given = {"model": str(model), "file": scratch / "test.jsonl", "long_texts": long}
    asked = configure(ClassifySettings, None, [], **given)
    found = classify.run(asked, quiet=True, as_json=True).extra["results"]
    return [one["label"] if isinstance(one["label"], str) else "" for one in found]


def answers(
    options: argparse.Namespace, number: int, train: Rows, test: Rows
) -> tuple[dict[str, list[str]], float]:
    """What each model says of the test texts of a fold, and the seconds that ours took."""
    about = {
        name: str(value) for name, value in vars(options).items() if name not in ("folds", "keep", "threads")
    }
    kept = options.keep and options.keep / f"{options.task}-{number}.json"
    held: dict[str, Any] = {"about": about, "found": {}, "seconds": 0.0}
    if kept and kept.exists():
        held = json.loads(kept.read_text(encoding="utf-8"))
        if held["about"] != about:
            raise SystemExit(f"{kept} was made by {held['about']}, not by {about}: choose another --keep")
    for name in ("langmill", "logistic", "svc"):
        if name in held["found"]:
            continue
        began = time.perf_counter()
        if name == "langmill":
            with tempfile.TemporaryDirectory() as scratch:
                model = (options.keep or Path(scratch)) / f"{options.task}-{number}"
                held["found"][name] = ours(options, train, test, model)
            held["seconds"] = time.perf_counter() - began
        else:
            held["found"][name] = peer(name, options.task, train, test)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(held), encoding="utf-8")
    return held["found"], held["seconds"]


def score(task: str, truth: NDArray[Any], said: NDArray[Any]) -> float:
    if task != "spam":
        return float((truth == said).mean())
    table = confusion(truth == "spam", said == "spam", 2)
    return float(f1(table[1, 1], table[:, 1].sum(), table[1].sum()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("spam", "topic", "sentiment"))
    parser.add_argument("--folds", type=int, default=FOLDS)
    parser.add_argument("--rows", type=int, help="so many rows alone, to see that this file works")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--long", choices=("truncate", "window"), default="truncate")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--holdout", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    said: dict[str, list[str]] = {"langmill": [], "logistic": [], "svc": []}
    truth: list[str] = []
    folds: list[dict[str, float]] = []
    for number, (train, test) in enumerate(splits(options.task, options.folds, options.rows)):
        wanted = [row["label"] for row in test]
        found, seconds = answers(options, number, train, test)
        truth += wanted
        for name, labels in found.items():
            said[name] += labels
        scores = {
            name: score(options.task, np.array(wanted), np.array(labels)) for name, labels in found.items()
        }
        folds.append({**scores, "seconds": seconds})
        print(json.dumps(folds[-1]), file=sys.stderr)
    right, sides = np.array(truth), {name: np.array(labels) for name, labels in said.items()}
    against = {
        name: interval(
            lambda k, own=own: (
                score(options.task, right[k], sides["langmill"][k]) - score(options.task, right[k], own[k])
            ),
            len(right),
        )
        for name, own in sides.items()
        if name != "langmill"
    }
    means = {name: float(np.mean([fold[name] for fold in folds])) for name in said}
    figures = {
        "task": options.task,
        "test_texts": len(right),
        "mean": means,
        "difference_interval": against,
        "folds": folds,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
