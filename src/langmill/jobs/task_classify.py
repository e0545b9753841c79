"""Texts with labels for a fine-tuning run: one label, several, or a number a text.

Figures: accuracy, macro_f1, f1 (of the second label, where there are two), log_loss, calibration_error, and `majority`,
what always saying the most frequent label would reach; micro_f1, macro_f1 and exact for several labels; for numbers
mean_absolute_error, root_mean_squared_error, pearson and spearman.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from langmill.adapt.heads import with_head
from langmill.common.errors import DataError
from langmill.common.progress import track
from langmill.common.settings import FinetuneSettings
from langmill.data.batches import Ints
from langmill.data.items import Labelled
from langmill.data.pipeline import Count, Ledger
from langmill.data.rows import Text
from langmill.data.tasks import FRACTION, LabelRow, read_labels
from langmill.evaluate import labels as scores
from langmill.infer.read import document_scores
from langmill.jobs.charts import Bar, Series, bar_chart, line_chart
from langmill.jobs.report import Html, join, shown, table, text
from langmill.jobs.results import path_shown
from langmill.jobs.work import Scored, Work, limit_of
from langmill.model.config import Task
from langmill.model.transformer import Transformer
from langmill.text.classify import Labels, class_scores, class_weights
from langmill.text.frames import Encoded
from langmill.text.tasks import encode_texts
from langmill.text.tokenizer import Tokenizer
from langmill.train import tasks as objectives
from langmill.train.objectives import Objective

MOST_CELLS = 40  # labels of a confusion table that is still shown
SLIPS = 0.1  # of the labels that may be fractions where the others are classes


def prepare(
    settings: FinetuneSettings, model: Transformer, tokenizer: Tokenizer, ledger: Ledger, quiet: bool
) -> Work:
    """Rows to items; a text in several windows is several items with its label, all on one side of the split."""
    t, counted, limit = settings.tasks, Counter[str](), limit_of(settings, model)
    with track("reading", unit="texts", quiet=quiet) as progress:

        def make(row: LabelRow) -> tuple[LabelRow, list[Encoded]]:
            progress.advance(1)
            return row, encode_texts(tokenizer, [row.text], limit, counted)

        read = list(read_labels(settings.data, ledger, make, regression=t.kind == "regress"))
    if t.kind is None:
        _plain([row for row, _ in read], ledger)
    labels = Labels.of((row.label for row, _ in read), t.kind)
    items, owners = [], []
    for number, (row, documents) in enumerate(read):
        key = repr(row.text)
        for document in documents:
            items.append(Text(row.where, document.ids, document.types, key=key))
            owners.append(number)
    targets = [labels.target(row.label) for row, _ in read]
    source = Labelled.of(items, [targets[owner] for owner in owners], tokenizer.fill_id)
    train, held = source.split(settings.holdout)
    if labels.task == "classify":
        _covered(labels, [targets[owners[i]] for i in train.tolist()])
    owner = np.array(owners)
    head: Task = labels.task  # type: ignore[assignment]
    heldout = _Held(labels, held, owner, targets, [item for _, group in read for item in group])
    best, higher = {"classify": ("macro_f1", True), "multilabel": ("micro_f1", True)}.get(
        labels.task, ("root_mean_squared_error", False)
    )
    return Work(
        model=with_head(model, head, labels.names, settings.seed),
        source=source,
        train=train,
        held=held,
        objective=objective(settings, labels, [targets[owner] for owner in owner[train].tolist()]),
        score=heldout.score,
        best=best,
        higher=higher,
        ledger=ledger,
        counted=counted,
        what="texts",
        use=[
            ("Label a text:", f'langmill classify {path_shown(settings.out)} "A text"'),
            (
                "Label a file:",
                f"langmill classify {path_shown(settings.out)} --file texts.jsonl --out labels.jsonl",
            ),
        ],
        facts={"labels": list(labels.names)},
    )


def _plain(rows: Sequence[LabelRow], ledger: Ledger) -> None:
    """DataError where so many labels are fractions that they are no slips: numbers may be meant, or classes."""
    count = ledger.dropped().get(FRACTION, Count()).documents
    spelt = [row for row in rows if isinstance(row.label, str) and _is_fraction(row.label)]
    if count + len(spelt) <= SLIPS * (count + len(rows)):
        return
    first = ledger.examples[FRACTION][0] if count else f'{spelt[0].where}: it is "{spelt[0].label}"'
    other = next((row for row in rows if not _is_fraction(str(row.label))), None)
    others = "" if other is None else f", and others are not ({other.where}: it is {other.label!r})"
    raise DataError(
        f"{count + len(spelt)} of {count + len(rows)} labels are fractions ({first}){others}: to learn numbers say "
        "--kind regress, which sets aside rows without one; for classes write words, such as 2.5 stars"
    )


def _is_fraction(label: str) -> bool:
    try:
        return math.isfinite(number := float(label)) and not number.is_integer()
    except ValueError:
        return False


def _covered(labels: Labels, trained: list[Any]) -> None:
    missing = [name for number, name in enumerate(labels.names) if number not in set(trained)]
    if missing:
        raise DataError(
            f'every text with the label "{missing[0]}" is held out: give more of them, or a smaller --holdout'
        )


def objective(settings: FinetuneSettings, labels: Labels, trained: list[Any]) -> Objective:
    """The loss that suits the labels, weighted where that is asked for."""
    t = settings.tasks
    if labels.task == "regress":
        return objectives.regress
    if labels.task == "multilabel":
        counts = np.asarray(trained).sum(0)
        positive = (
            tuple(((len(trained) - counts) / np.maximum(counts, 1)).tolist()) if t.class_weights else None
        )
        return partial(objectives.multilabel, positive=positive)
    weights = tuple(class_weights(trained, len(labels.names)).tolist()) if t.class_weights else None
    return partial(objectives.classify, weights=weights, label_smoothing=t.label_smoothing)


class _Held:
    """The held-out texts, and how a model does on them."""

    def __init__(self, labels: Labels, held: Ints, owner: Ints, targets: list[Any], documents: list[Encoded]):
        self.labels, self.items, self.owners, self.documents = (
            labels,
            held.tolist(),
            owner[held].tolist(),
            documents,
        )
        texts = list(dict.fromkeys(self.owners))
        self.truth = np.array([targets[number] for number in texts])

    def score(self, model: Transformer, whole: bool) -> Scored:
        """Figures of windows that are put together again."""
        logits = list(document_scores(model, (self.documents[item] for item in self.items)))
        place = {owner: at for at, owner in enumerate(dict.fromkeys(self.owners))}
        _, found = class_scores(logits, [place[owner] for owner in self.owners], self.labels.task)
        if self.labels.task == "regress":
            return Scored(scores.numbers(self.truth, found[:, 0]))
        if self.labels.task == "multilabel":
            return Scored(scores.several(self.truth, found))
        counts = np.bincount(self.truth, minlength=len(self.labels.names))
        figures = scores.classified(self.truth, found) | {"majority": float(counts.max() / counts.sum())}
        return self._shown(figures, found) if whole else Scored(figures)

    def _shown(self, figures: dict[str, float], found: Any) -> Scored:
        names, said = self.labels.names, found.argmax(1)
        counts = scores.confusion(self.truth, said, len(names))
        rows = scores.by_class(counts, names)
        between = scores.interval(
            lambda k: scores.classified(self.truth[k], found[k])["macro_f1"], len(said), 200
        )
        bars = [Bar(row["label"], row["f1"], style="s0") for row in rows[:MOST_CELLS]]
        sections: list[tuple[str, Html]] = [
            ("Each label", join(bar_chart("F1 of each label", bars, "F1"), _class_table(rows))),
            ("What is taken for what", _confusion(names, counts)),
            ("How sure, and how right", _calibration(scores.calibration(self.truth, found))),
        ]
        extra = {
            "by_label": rows,
            "confusion": counts.tolist(),
            "macro_f1_interval": between and list(between),
        }
        return Scored(figures, sections, extra)


def _class_table(rows: list[dict[str, Any]]) -> Html:
    head = ("label", "precision", "recall", "F1", "texts")
    cells = [
        (r["label"], shown(r["precision"]), shown(r["recall"]), shown(r["f1"]), str(r["count"])) for r in rows
    ]
    return table("Held-out texts of each label", head, cells, numbers=4)


def _confusion(names: tuple[str, ...], counts: Any) -> Html:
    if len(names) > MOST_CELLS:
        return text(f"{len(names)} labels are too many for a table; report.json holds all counts.", note=True)
    cells = [(name, *map(str, row)) for name, row in zip(names, counts.tolist(), strict=True)]
    return table(
        "Rows: the true label; columns: what the model said", ("", *names), cells, numbers=len(names)
    )


def _calibration(bins: list[tuple[float, float, int]]) -> Html:
    line = Series("accuracy", [(sure, right) for sure, right, _ in bins], "s0")
    ideal = Series("confidence", [(0.0, 0.0), (1.0, 1.0)], "s3")
    chart = line_chart(
        "Of texts that the model is so sure of, so many are right", [line, ideal], "confidence", "right"
    )
    cells = [(shown(sure), shown(right), str(count)) for sure, right, count in bins]
    return join(chart, table("By confidence", ("confidence", "right", "texts"), cells, numbers=2))
