"""Held-out texts of every label, and labels that contradict each other."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from langmill.data.examples import apart
from langmill.jobs.strata import contradicted, stratified, unscored

KEYED = st.lists(
    st.tuples(st.integers(0, 30).map(lambda n: b"%d" % n), st.sets(st.sampled_from("abcde"), max_size=3)),
    max_size=60,
)


@given(KEYED, st.floats(0, 0.9))
def test_keys_stay_together_and_no_label_is_lost_to_training(
    items: list[tuple[bytes, set[str]]], holdout: float
) -> None:
    keys, labels = [key for key, _ in items], [own for _, own in items]
    train, held = stratified(keys, labels, holdout)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(items)))
    assert not {keys[i] for i in train} & {keys[i] for i in held}
    assert {label for i in train for label in labels[i]} == set().union(*labels)
    assert len({keys[i] for i in held}) <= len({keys[i] for i in apart(keys, holdout)[1]})


@given(st.lists(st.sampled_from("aaaaaabbbc"), min_size=8, max_size=200), st.floats(0.4, 0.6))
def test_each_label_of_two_keys_has_its_share(names: list[str], holdout: float) -> None:
    keys = [b"%d" % number for number in range(len(names))]
    _, held = stratified(keys, [{name} for name in names], holdout)
    total, found = Counter(names), Counter(names[i] for i in held)
    for name, count in total.items():
        assert bool(found[name]) == (count > 1)
        assert abs(found[name] - holdout * count) <= 2.5
    assert len(held) == min(round(holdout * len(names)), sum(count - 1 for count in total.values()))


def test_a_rare_label_is_held_out_however_small_the_share() -> None:
    names = ["common"] * 380 + ["rare"] * 20 + ["once"]
    keys = [b"%d" % number for number in range(401)]
    for place in range(20):  # whatever the hashes are
        named = [b"%d/" % place + key for key in keys]
        _, held = stratified(named, [{name} for name in names], 0.005)
        assert sorted(names[i] for i in held) == ["common", "rare"]


def test_without_labels_the_split_is_that_of_other_tasks() -> None:
    keys = [b"%d" % (number % 70) for number in range(100)]
    for holdout in (0.0, 0.01, 0.3, 0.99):
        for ours, theirs in zip(stratified(keys, [()] * 100, holdout), apart(keys, holdout), strict=True):
            assert np.array_equal(ours, theirs)


def test_labels_that_are_not_scored_are_named() -> None:
    labels = [("a",), ("b",), ("a", "c"), ("b",)]
    assert unscored(labels, {0}) == (
        'no held-out text has the label "b" (2 in all), "c" (1 in all): the figures say nothing of that.'
    )
    assert unscored(labels, {1, 2}) == "" == unscored(labels, set())
    assert ", 5 more:" in unscored([(f"{number:02}",) for number in range(16)], {0})


def test_labels_that_contradict_each_other_are_counted_and_named() -> None:
    rows = [("f:1", "x", "a"), ("f:2", "x", "a"), ("f:3", "y", "a"), ("f:4", "x", "b"), ("f:5", "y", "a")]
    count, said = contradicted(rows)
    assert count == 3 and "1 texts occur with different labels (such as f:1 and f:4)" in said
    assert contradicted(rows[:3]) == (0, "")
