"""Paired intervals and verdicts, and overlap of translations against sacrebleu."""

from __future__ import annotations

import random

import numpy as np
import pytest
import sacrebleu

from langmill.common.errors import DataError
from langmill.evaluate.compare import Difference, differences, intervals
from langmill.evaluate.labels import interval
from langmill.evaluate.overlap import bleu, bleu_counts, chrf, chrf_counts

HITS = np.random.default_rng(0).random((60, 2)) < (0.5, 0.6)


def figures(column):
    return lambda k: {"acc": float(HITS[k, column].mean()), "log_loss": float(1 - HITS[k, column].mean())}


def test_an_interval_is_the_one_of_evaluate_labels():
    mine = intervals(figures(0), 60, 300, seed=3)
    assert mine["acc"] == interval(lambda k: float(HITS[k, 0].mean()), 60, 300, seed=3)
    assert intervals(figures(0), 1) == {}


def test_a_difference_is_paired():
    found = {one.name: one for one in differences(figures(0), figures(1), 60, 400, seed=1)}
    acc = found["acc"]
    by_row = HITS[:, 0].astype(float) - HITS[:, 1]
    assert acc.difference == pytest.approx(by_row.mean())
    assert acc.interval == pytest.approx(interval(lambda k: float(by_row[k].mean()), 60, 400, seed=1))
    assert found["log_loss"].difference == pytest.approx(-acc.difference)
    same = differences(figures(0), figures(0), 60)[0]
    assert same.interval == (0.0, 0.0) and same.verdict == "no difference shown"
    with pytest.raises(DataError, match="no row"):
        differences(figures(0), figures(1), 0)


def test_a_verdict_knows_which_way_is_better():
    assert Difference("acc", 0.6, 0.5, (0.02, 0.2)).verdict == "better"
    assert Difference("acc", 0.5, 0.6, (-0.2, -0.02)).verdict == "worse"
    assert Difference("bits_per_byte", 1.0, 1.1, (-0.2, -0.02)).verdict == "better"
    assert Difference("log_loss", 1.1, 1.0, (0.02, 0.2)).verdict == "worse"
    assert Difference("acc", 0.6, 0.5, (-0.1, 0.3)).verdict == "no difference shown"
    assert Difference("acc", 1.0, 0.0, None).verdict == "no difference shown"


def test_sums_of_counts_give_the_corpus_scores_of_sacrebleu():
    words = "the cat sat on a mat , and then the dog ran off . 猫 坐 在 قط".split()
    order = random.Random(0)
    wanted = [" ".join(order.choices(words, k=order.randint(1, 14))) for _ in range(40)]
    said = [" ".join(w for w in text.split() if order.random() < 0.8) for text in wanted]
    for chosen in ([*range(40)], [*range(7)], [3]):
        ours, theirs = [said[i] for i in chosen], [wanted[i] for i in chosen]
        counts = sum(bleu_counts(a, b) for a, b in zip(ours, theirs, strict=True))
        assert bleu(counts) == pytest.approx(sacrebleu.corpus_bleu(ours, [theirs]).score)
        counts = sum(chrf_counts(a, b) for a, b in zip(ours, theirs, strict=True))
        assert chrf(counts) == pytest.approx(sacrebleu.corpus_chrf(ours, [theirs]).score)
    assert chrf(chrf_counts("", "a")) == 0.0
