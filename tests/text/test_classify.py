"""Labels by their numbers, and scores of windows as one result for a text."""

from __future__ import annotations

import numpy as np
import pytest

from langmill.common.errors import DataError
from langmill.text.classify import Labels, class_result, class_scores, class_weights


def test_labels_are_those_of_the_data_in_order() -> None:
    assert Labels.of(["spam", "ham", "spam", "[SEP]"]).names == ("[SEP]", "ham", "spam")
    assert Labels.of(["10", "9", "-1", "b", "a"]).names == ("-1", "9", "10", "a", "b")
    assert Labels.of(["好", "差", "سيئ"]).number("好") == sorted(["好", "差", "سيئ"]).index("好")
    several = Labels.of([("b", "a"), (), "c"])
    assert (several.names, several.task) == (("a", "b", "c"), "multilabel")
    assert several.target(("c", "a")) == [1, 0, 1] and several.target(()) == [0, 0, 0]
    assert Labels.of(["a", "b"]).target("b") == 1 and Labels.of([1.5], "regress").target(2.5) == 2.5
    assert Labels.of(["B-X", "O"], "tag").task == "tag"


def test_labels_that_cannot_be_learnt_or_are_unknown() -> None:
    with pytest.raises(DataError, match='the one label "ham"'):
        Labels.of(["ham", "ham"])
    with pytest.raises(DataError, match="no label at all"):
        Labels.of([()])
    with pytest.raises(DataError, match='"eggs" is not among the 2 known: ham, spam'):
        Labels.of(["ham", "spam"]).target("eggs")
    with pytest.raises(DataError, match="2 labels, and the model gives one"):
        Labels(("a", "b")).target(("a", "b"))


def test_the_scores_of_a_text_are_the_mean_over_its_windows() -> None:
    logits = np.log(np.array([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]))
    texts, scores = class_scores(logits, [4, 9, 4], "classify")
    assert texts == [4, 9] and np.allclose(scores, [[0.35, 0.65], [0.6, 0.4]])
    _, scores = class_scores([[0.0, 800.0], [0.0, -800.0]], [0, 0], "multilabel")
    assert np.allclose(scores, [[0.5, 0.5]])
    _, scores = class_scores([[3.0], [5.0]], [0, 0], "regress")
    assert class_result(scores[0], Labels(("value",), "regress")) == {"score": 4.0}


def test_results_name_the_classes_best_first() -> None:
    labels = Labels(("ham", "spam", "eggs"))
    result = class_result([0.2, 0.5, 0.3], labels)
    assert result == {"label": "spam", "score": 0.5, "scores": {"ham": 0.2, "spam": 0.5, "eggs": 0.3}}
    assert list(result["scores"]) == ["spam", "eggs", "ham"]
    several = Labels(labels.names, "multilabel")
    assert class_result([0.2, 0.5, 0.9], several)["label"] == ["eggs", "spam"]
    assert class_result([0.2, 0.5, 0.9], several)["score"] == 0.5
    assert class_result([0.2, 0.5, 0.9], several, threshold=0.95)["label"] == []


def test_class_weights_make_every_class_count_the_same() -> None:
    weights = class_weights([0, 0, 0, 1], 3)
    assert np.allclose(weights, [4 / 9, 4 / 3, 0])
    sklearn = [4 / (2 * 3), 4 / (2 * 1)]  # n / (classes * count), by hand
    assert np.allclose(class_weights([0, 0, 0, 1], 2), sklearn)
