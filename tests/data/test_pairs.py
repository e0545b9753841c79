from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from langmill.common.errors import CheckpointError, DataError
from langmill.data.chats import Chat, Completion
from langmill.data.pairs import Item, Pair, PairRows, Pairs, Rated, crossed, pairs_once, parse_preference
from langmill.text.turns import Example

ASKED = {"role": "user", "content": "你好?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("مرحبا", "no"))


def test_every_form_of_a_pair_is_read() -> None:
    chats = [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "你好?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "你好?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": "مرحبا", "rejected": "no"},
    ]
    for row in chats:
        found = parse_preference("here", row)
        assert found == Pair(Chat("here", [ASKED, GOOD], None, 1), Chat("here", [ASKED, BAD], None, 1)), row
    texts = [
        {"prompt": "Q: a\nA:", "chosen": " yes, b", "rejected": " yet"},
        {"chosen": "Q: a\nA: yes, b", "rejected": "Q: a\nA: yet"},  # parts before the word that differs
    ]
    for row in texts:
        found = parse_preference("here", row)
        assert isinstance(found, Pair)
        assert found.chosen == Completion("here", "Q: a\nA:", " yes, b")
        assert found.rejected == Completion("here", "Q: a\nA:", " yet")
    rated = parse_preference("here", {"prompt": "a", "completion": " b", "label": False})
    assert rated == Rated(Completion("here", "a", " b"), False)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([], "JSON object"),
        ({"text": "x"}, "this one has text"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c"]}, "both text, or both lists"),
        ({"prompt": "a", "chosen": 1, "rejected": 2}, "both text, or both lists"),
        ({"chosen": "b", "rejected": "c"}, "do not begin alike"),
        ({"chosen": [ASKED], "rejected": [ASKED, BAD]}, "beginning of the other"),
        ({"prompt": [ASKED], "chosen": [ASKED], "rejected": [BAD]}, "no assistant turn"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "completion is empty"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "label is 'good'"),
        ({"completion": "b", "label": True}, "both text, or both lists"),
    ],
)
def test_what_is_no_preference_is_named(row: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        parse_preference("here", row)


def example(*ids: int, prompt: int) -> Example:
    return Example(list(ids), [place >= prompt for place in range(len(ids))])


def some(count: int = 30) -> Pairs:
    random = np.random.default_rng(0)
    sizes = random.integers(2, 9, (count, 2))
    return Pairs.of(
        (
            Item(
                f"{i}", *(example(i % 20, *random.integers(0, 99, size).tolist(), prompt=1) for size in pair)
            )
            for i, pair in enumerate(sizes)
        ),
        pad_id=7,
    )


def test_rows_hold_pairs_whole_and_go_on_where_they_were() -> None:
    pairs, numbers = some(), np.arange(30)
    seen = [n for batch in pairs_once(pairs, numbers, 24) for n in batch.numbers_BP[0].tolist() if n >= 0]  # type: ignore[attr-defined]
    assert sorted(seen) == list(range(30))
    rows = PairRows(pairs, numbers, 24, rows=2, seed=1)
    for _ in range(5):
        next(rows)
    place, after = rows.state(), next(rows)
    other = PairRows(pairs, numbers, 24, rows=2, seed=1)
    other.restore(place)
    again = next(other)
    for name in ("tokens_BT", "targets_BT", "documents_BT", "scored_BT", "numbers_BP"):
        np.testing.assert_array_equal(getattr(after, name), getattr(again, name))
    last = np.unique(again.documents_BT[0])
    assert set(last.tolist()) - {0} == set(range(1, int(last.max()) + 1)) and last.max() % 2 == 0
    pairs.reference[3] = 1
    with pytest.raises(CheckpointError, match="labels and reference"):
        other.restore(place)
    with pytest.raises(DataError, match="cannot hold every pair"):
        PairRows(pairs, numbers, 8, rows=1, seed=0)


def test_no_prompt_stands_on_both_sides() -> None:
    pairs = some()
    training, held = pairs.split(0.3)
    first = pairs.examples.ids[pairs.examples.starts[:-1:2]]
    assert len(held) and len(training) + len(held) == 30
    assert not set(first[training].tolist()) & set(first[held].tolist())
    assert len(pairs.split(0)[1]) == 0


def test_kto_crosses_prompts_with_the_answers_of_others() -> None:
    answers = [("a", example(1, 10, prompt=1), False), ("b", example(2, 20, 21, prompt=1), True),
               ("c", example(3, 30, 31, 32, prompt=1), True)]  # fmt: skip
    found = list(crossed(answers, length=2))
    assert [(item.name, item.label) for item in found] == [("b", 1), ("c", 1), ("a", -1)]
    assert [item.rejected.ids for item in found] == [[2, 10], [3, 20, 21], [1, 30, 31]]
    assert found[0].rejected.trained == [False, True]
