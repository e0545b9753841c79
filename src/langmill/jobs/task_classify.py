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
from langmill.jobs.strata import contradicted, stratified, unscored
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
CONTRADICTED = "rows whose text others label otherwise"
TENTHS = 10  # groups of held-out numbers, by their size
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
    rows = [row for row, _ in read]
    labels = Labels.of((row.label for row in rows), t.kind)
    owners = [number for number, (_, documents) in enumerate(read) for _ in documents]
    documents = [document for _, own in read for document in own]
    items = [
        Text(rows[owner].where, document.ids, document.types, key=repr(rows[owner].text))
        for owner, document in zip(owners, documents, strict=True)
    ]
    targets = [labels.target(row.label) for row in rows]
    source = Labelled.of(items, [targets[owner] for owner in owners], tokenizer.fill_id)
    named = [_names(row, labels) for row in rows]
    train, held = stratified(source.texts.keys, [named[owner] for owner in owners], settings.holdout)
    owner = np.array(owners)
    head: Task = labels.task  # type: ignore[assignment]
    heldout = _Held(labels, held, owner, targets, documents)
    note = _noted(rows, named, set(owner[held].tolist()), counted)
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
        note=note,
        owners=owner,
        limit=limit,
    )


def _names(row: LabelRow, labels: Labels) -> tuple[str, ...]:
    """The names of a row's labels; a number has none."""
    if labels.task == "regress":
        return ()
    return row.label if isinstance(row.label, tuple) else (str(row.label),)


def _noted(
    rows: Sequence[LabelRow], named: Sequence[tuple[str, ...]], held: set[int], counted: Counter[str]
) -> str:
    """What to know of the labels: which are not scored, and which contradict each other."""
    both = zip(rows, named, strict=True)
    count, found = contradicted((row.where, row.text, frozenset(own)) for row, own in both)
    counted[CONTRADICTED] += count
    return " ".join(filter(None, (unscored(named, held), found)))


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
            figures = scores.numbers(self.truth, found[:, 0])
            return _numbers_shown(figures, self.truth, found[:, 0]) if whole else Scored(figures)
        if self.labels.task == "multilabel":
            figures = scores.several(self.truth, found)
            return self._several_shown(figures, found >= 0.5) if whole else Scored(figures)
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
        bins = scores.calibration(self.truth, found)
        sections: list[tuple[str, Html]] = [
            _each_label(rows),
            ("What is taken for what", _confusion(names, counts)),
            ("How sure, and how right", _calibration(bins)),
        ]
        extra = {
            "by_label": rows,
            "confusion": counts.tolist(),
            "calibration": [dict(zip(("confidence", "accuracy", "count"), one, strict=True)) for one in bins],
            "macro_f1_interval": between and list(between),
        }
        return Scored(figures, sections, extra)

    def _several_shown(self, figures: dict[str, float], said: Any) -> Scored:
        true = self.truth == 1
        hits, claimed, count = (true & said).sum(0), said.sum(0), true.sum(0)
        columns = {
            "precision": (hits / np.maximum(claimed, 1)).tolist(),
            "recall": (hits / np.maximum(count, 1)).tolist(),
            "f1": scores.f1(hits, claimed, count).tolist(),
            "count": count.tolist(),
        }
        rows = [
            {"label": name} | {key: values[i] for key, values in columns.items()}
            for i, name in enumerate(self.labels.names)
        ]
        return Scored(figures, [_each_label(rows)], {"by_label": rows})


def _numbers_shown(figures: dict[str, float], truth: Any, said: Any) -> Scored:
    """How far numbers are off, in all and by their size."""
    groups = np.array_split(np.argsort(truth, kind="stable"), min(TENTHS, len(truth)))
    rows = [
        {
            "true": float(truth[own].mean()),
            "said": float(said[own].mean()),
            "mean_absolute_error": float(np.abs(said[own] - truth[own]).mean()),
            "count": len(own),
        }
        for own in groups
    ]
    whole = [(name.replace("_", " "), value) for name, value in figures.items()]
    whole.append(("root mean squared error of always saying their mean", float(truth.std())))
    lines = [
        Series("said", [(row["true"], row["said"]) for row in rows], "s0"),
        Series("true", [(row["true"], row["true"]) for row in rows], "s3"),
    ]
    head = ("true", "said", "mean absolute error", "texts")
    cells = [tuple(shown(value) for value in row.values()) for row in rows]
    section = join(
        table("Over all held-out texts", ("figure", "value"), whole, numbers=1),
        line_chart("Means of texts whose numbers are alike", lines, "true", "said"),
        table("The same, from the smallest numbers to the largest", head, cells, numbers=4),
    )
    return Scored(figures, [("How near", section)], {"by_value": rows})


def _each_label(rows: list[dict[str, Any]]) -> tuple[str, Html]:
    bars = [Bar(row["label"], row["f1"], style="s0") for row in rows[:MOST_CELLS]]
    return "Each label", join(bar_chart("F1 of each label", bars, "F1"), _class_table(rows))


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
