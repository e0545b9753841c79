"""Scores of labels against scikit-learn and scipy, and values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as oracle
from hypothesis import given
from hypothesis import strategies as st

from langmill.evaluate import labels


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_tables_and_f1_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    truth, said = map(np.array, zip(*pairs, strict=True))
    table = labels.confusion(truth, said, 4)
    assert (table == oracle.confusion_matrix(truth, said, labels=range(4))).all()
    shares = np.full((len(truth), 4), 0.1)
    shares[np.arange(len(truth)), said] = 0.7
    found = labels.classified(truth, shares)
    assert found["macro_f1"] == pytest.approx(oracle.f1_score(truth, said, average="macro", zero_division=0))
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(truth, said))
    assert found["log_loss"] == pytest.approx(oracle.log_loss(truth, shares, labels=range(4)))
    rows = labels.by_class(table, "abcd")
    precision, recall, f1, count = oracle.precision_recall_fscore_support(
        truth, said, labels=range(4), zero_division=0
    )
    assert [row["precision"] for row in rows] == pytest.approx(list(precision))
    assert [row["recall"] for row in rows] == pytest.approx(list(recall))
    assert [row["f1"] for row in rows] == pytest.approx(list(f1))
    assert [row["count"] for row in rows] == list(count)


def test_several_labels() -> None:
    truth = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0]])
    shares = np.array([[0.9, 0.2, 0.1], [0.1, 0.9, 0.1], [0.8, 0.4, 0.7]])
    found, said = labels.several(truth, shares), shares >= 0.5
    assert found["micro_f1"] == pytest.approx(oracle.f1_score(truth, said, average="micro"))
    assert found["macro_f1"] == pytest.approx(oracle.f1_score(truth, said, average="macro", zero_division=0))
    assert found["exact"] == pytest.approx(1 / 3)


def test_calibration_by_hand() -> None:
    shares = np.array([[0.95, 0.05], [0.92, 0.08], [0.6, 0.4]])
    table = labels.calibration([0, 1, 0], shares)
    assert [count for _, _, count in table] == [1, 2]
    assert table[1][:2] == (pytest.approx(0.935), 0.5)
    assert labels.calibration_error(table) == pytest.approx((0.4 + 2 * 0.435) / 3)


def test_numbers() -> None:
    found = labels.numbers([1, 2, 3, 4], [1, 2, 2, 6])
    assert found["mean_absolute_error"] == pytest.approx(0.75)
    assert found["root_mean_squared_error"] == pytest.approx((5 / 4) ** 0.5)
    assert found["spearman"] == pytest.approx(0.9486832980505138)
    assert labels.numbers([1, 1], [1, 2])["pearson"] == 0.0


def test_spans_count_only_where_both_ends_and_the_label_agree() -> None:
    truth = [[(0, 2, "PER"), (3, 4, "LOC")], [(0, 1, "LOC")]]
    said = [[(0, 2, "PER"), (3, 5, "LOC")], [(0, 1, "PER")]]
    total, rows = labels.spans(truth, said)
    assert total == {
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 3),
        "f1": pytest.approx(1 / 3),
    }
    assert [(row["label"], row["count"], row["recall"]) for row in rows] == [("LOC", 2, 0.0), ("PER", 1, 1.0)]


def test_a_paired_interval_is_narrower_than_two() -> None:
    random = np.random.default_rng(0)
    hard = random.random(400) < 0.4
    a, b = ~hard, ~hard | (random.random(400) < 0.1)
    low, high = labels.interval(lambda k: float(b[k].mean() - a[k].mean()), 400) or (0, 0)
    assert 0 < low < b.mean() - a.mean() < high
    assert high - low < 0.06
    assert labels.interval(lambda k: 0.0, 1) is None
