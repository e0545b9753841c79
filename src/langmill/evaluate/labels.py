"""How well labels are told: accuracy, F1, confusion, calibration, spans of tags, numbers; with intervals.

K texts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from langmill.evaluate.compare import intervals
from langmill.evaluate.loss import Interval

Floats = NDArray[np.float64]
Span = tuple[int, int, str]
BINS = 10


def confusion(truth_K: ArrayLike, said_K: ArrayLike, classes: int) -> NDArray[np.int64]:
    """(C, C) counts: row the true class, column the one that was said."""
    cells = np.asarray(truth_K, np.int64) * classes + np.asarray(said_K, np.int64)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def f1(right: ArrayLike, said: ArrayLike, true: ArrayLike) -> Floats:
    """2 · right / (said + true), 0 where there is neither."""
    right, both = np.asarray(right, np.float64), np.asarray(said, np.float64) + np.asarray(true, np.float64)
    return np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0)


def by_class(table_CC: NDArray[np.int64], names: Sequence[str]) -> list[dict[str, Any]]:
    """[{"label", "precision", "recall", "f1", "count"}] of a confusion table; 0 for a ratio of nothing."""
    right, said, true = np.diag(table_CC), table_CC.sum(0), table_CC.sum(1)
    scores = f1(right, said, true)
    return [
        {
            "label": name,
            "precision": float(right[i] / said[i]) if said[i] else 0.0,
            "recall": float(right[i] / true[i]) if true[i] else 0.0,
            "f1": float(scores[i]),
            "count": int(true[i]),
        }
        for i, name in enumerate(names)
    ]


def classified(truth_K: ArrayLike, shares_KC: ArrayLike) -> dict[str, float]:
    """accuracy, macro_f1 (over the classes that occur), f1 of the last class where there are two, log_loss in nats, and
    calibration_error (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    truth, shares = np.asarray(truth_K, np.int64), np.asarray(shares_KC, np.float64)
    said, classes = shares.argmax(1), shares.shape[1]
    table = confusion(truth, said, classes)
    scores = f1(np.diag(table), table.sum(0), table.sum(1))
    seen = (table.sum(0) + table.sum(1)) > 0
    right = np.clip(shares[np.arange(len(truth)), truth], 1e-12, 1.0)
    found = {
        "accuracy": float((said == truth).mean()),
        "macro_f1": float(scores[seen].mean()),
        "log_loss": float(-np.log(right).mean()),
        "calibration_error": calibration_error(calibration(truth, shares)),
    }
    return found | ({"f1": float(scores[1])} if classes == 2 else {})


def calibration(truth_K: ArrayLike, shares_KC: ArrayLike, bins: int = BINS) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, count) of the texts in each tenth of confidence; empty ones left out."""
    truth, shares = np.asarray(truth_K, np.int64), np.asarray(shares_KC, np.float64)
    sure, right = shares.max(1), shares.argmax(1) == truth
    place = np.minimum((sure * bins).astype(int), bins - 1)
    found = [(sure[place == i], right[place == i]) for i in range(bins) if (place == i).any()]
    return [(float(confident.mean()), float(hits.mean()), len(hits)) for confident, hits in found]


def calibration_error(table: Sequence[tuple[float, float, int]]) -> float:
    """The mean distance of confidence and accuracy, weighted by count."""
    total = sum(count for _, _, count in table)
    return sum(abs(sure - right) * count for sure, right, count in table) / total if total else 0.0


def several(truth_KC: ArrayLike, shares_KC: ArrayLike, threshold: float = 0.5) -> dict[str, float]:
    """micro_f1, macro_f1 and exact (all labels right) where any number of classes holds; -1 in the truth is unknown."""
    truth, said = np.asarray(truth_KC), np.asarray(shares_KC) >= threshold
    known, hit = truth >= 0, (truth == 1) & said
    right, all_said, true = hit.sum(0), (said & known).sum(0), (truth == 1).sum(0)
    return {
        "micro_f1": float(f1(right.sum(), all_said.sum(), true.sum())),
        "macro_f1": float(f1(right, all_said, true).mean()),
        "exact": float((((truth == 1) == said) | ~known).all(1).mean()),
    }


def numbers(truth_K: ArrayLike, said_K: ArrayLike) -> dict[str, float]:
    """mean_absolute_error, root_mean_squared_error, pearson and spearman (0 where either side is constant)."""
    truth, said = np.asarray(truth_K, np.float64), np.asarray(said_K, np.float64)
    off = said - truth
    return {
        "mean_absolute_error": float(np.abs(off).mean()),
        "root_mean_squared_error": float(np.sqrt((off**2).mean())),
        "pearson": _correlation(truth, said),
        "spearman": _correlation(_ranks(truth), _ranks(said)),
    }


def span_counts(
    truth: Sequence[Sequence[Span]], said: Sequence[Sequence[Span]]
) -> tuple[list[str], NDArray[np.int64]]:
    """(the L labels that occur, (K, L, 3) spans of each text and label that agree in both ends and label, that were
    said, and that are true)."""
    labels = sorted({label for side in (truth, said) for spans in side for _, _, label in spans})
    number = {label: place for place, label in enumerate(labels)}
    counts_KLX = np.zeros((len(truth), len(labels), 3), np.int64)
    for text, (wanted, found) in enumerate(zip(truth, said, strict=True)):
        for kind, some in enumerate((set(wanted) & set(found), set(found), set(wanted))):
            for _, _, label in some:
                counts_KLX[text, number[label], kind] += 1
    return labels, counts_KLX


def span_scores(labels: Sequence[str], counts_KLX: NDArray[np.int64]) -> dict[str, float]:
    """precision, recall and f1 over all spans of texts with these `span_counts`, and f1_LABEL of each label that is
    true or said in them (as conlleval and seqeval count)."""
    by_label_LX = counts_KLX.sum(0)
    own = f1(*by_label_LX.T)
    found = {f"f1_{label}": float(own[i]) for i, label in enumerate(labels) if by_label_LX[i].any()}
    return _ratios(*map(int, by_label_LX.sum(0))) | found


def spans(
    truth: Sequence[Sequence[Span]], said: Sequence[Sequence[Span]]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(precision, recall and f1 over all spans, the same and "count" for each label)."""
    labels, counts_KLX = span_counts(truth, said)
    by_label = counts_KLX.sum(0).tolist()
    rows = [
        {"label": label, **_ratios(*own), "count": own[2]}
        for label, own in zip(labels, by_label, strict=True)
    ]
    return _ratios(*map(int, counts_KLX.sum((0, 1)))), rows


def _ratios(right: int, said: int, true: int) -> dict[str, float]:
    return {
        "precision": right / said if said else 0.0,
        "recall": right / true if true else 0.0,
        "f1": float(f1(right, said, true)),
    }


def interval(
    of: Callable[[NDArray[np.int64]], float], count: int, resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """95 % percentile bootstrap of `of(chosen)`, a figure of the chosen texts (Efron & Tibshirani 1993, chapter 13).

    For a difference let `of` take both sides of the same texts: that is the paired interval. None below two texts.
    """
    return intervals(lambda chosen: {"": of(chosen)}, count, resamples, seed).get("")


def _ranks(values: Floats) -> Floats:
    """From 0; equal values share the mean of their ranks."""
    order, places = np.argsort(values, kind="stable"), np.arange(len(values), dtype=np.float64)
    _, first, counts = np.unique(values[order], return_index=True, return_counts=True)
    means = np.repeat(first + (counts - 1) / 2, counts)
    places[order] = means
    return places


def _correlation(a: Floats, b: Floats) -> float:
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
