"""Copies: what is told for one, which stays, and tests that are found in texts."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langmill.common.errors import DataError, UsageError
from langmill.data.decontaminate import Decontaminate
from langmill.data.dedup import Parts, find, jaccard
from langmill.data.minhash import Shape, shingle_sets, sign

MANUAL = [text for text in topics.values() if len(text.split()) > 200]
CHINESE = "这个软件包的工具读取用户写下的内容，这就是它们在这里要做的全部工作，一定要小心。"


def texts(*rows: str) -> Any:
    return pa.array(rows, pa.large_string())


def write(folder: Path, rows: list[str], parts: int = 1, shape: Shape | None = None) -> list[Path]:
    """Rows signed in so many parts, in order."""
    folders = [folder / f"{part}" for part in range(parts)]
    size = -(-len(rows) // parts)
    for part, own in enumerate(folders):
        own.mkdir(parents=True)
        sign(texts(*rows[part * size : (part + 1) * size]), shape or Shape()).write(own)
    return folders


def copies(folder: Path, rows: list[str], **told: Any) -> list[tuple[int, int]]:
    """(exact, near) of each row."""
    found = find(write(folder, rows), texts(*(f"{n:03d}" for n in range(len(rows)))), **told)
    return list(zip(found.exact_N.tolist(), found.near_N.tolist(), strict=True))


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


def edit(text: str, share: float, rng: random.Random) -> str:
    """The text with a share of its words replaced."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), max(1, int(share * len(words)))):
        words[place] = f"new{rng.randrange(10**6)}"
    return " ".join(words)


@given(
    st.lists(
        st.lists(st.sampled_from("a b C dd Ee 1".split()), max_size=12).map(" ".join), min_size=1, max_size=4
    )
)
def test_ngrams_are_sets_of_words(rows: list[str]) -> None:
    found, ends = shingle_sets(rows, 3)
    own = [set(part.tolist()) for part in np.split(found, ends)[:-1]]
    wanted = [shingles(row, 3) for row in rows]
    assert [len(part) for part in own] == [len(part) for part in wanted]
    for (a, b), (c, d) in zip(combinations(own, 2), combinations(wanted, 2), strict=True):
        assert len(a & b) == len(c & d)


def test_capitals_and_signs_do_not_count_and_characters_are_words() -> None:
    def same(a: str, b: str) -> bool:
        found, ends = shingle_sets([a, b], 5)
        return found[: ends[0]].tolist() == found[ends[0] :].tolist()

    assert same("One, TWO: three four -- five Élan", "one two three (four) five élan!")
    assert same(CHINESE, CHINESE.replace("，", " "))
    assert len(shingle_sets([CHINESE], 5)[0]) == sum(c not in "，。" for c in CHINESE) - 4
    assert not same("one two", "one two three") and same("مرحبا بالعالم، هذا", "مرحبا بالعالم هذا")


def test_exact_copies(tmp_path: Path) -> None:
    rows = ["Some text.", "some  TEXT.\n", "other text.", "", " ", "Some text"]
    found = copies(tmp_path / "a", rows, threshold=None)
    assert found == [(1, -1), (-1, -1), (-1, -1), (4, -1), (-1, -1), (-1, -1)]  # the longest stays
    found = copies(tmp_path / "b", rows, keep="first", threshold=None)
    assert [exact for exact, _ in found] == [-1, 0, -1, -1, 3, -1]
    # What is left after exact copies is compared: signs apart, these are one.
    assert copies(tmp_path / "c", rows)[5] == (-1, 1)
    longer = ["Some text", "some text", "Some text!"]
    assert copies(tmp_path / "d", longer) == [(-1, 2), (2, -1), (-1, -1)]  # all for the one that stays


def test_planted_near_copies_are_found_and_others_not(tmp_path: Path) -> None:
    rng = random.Random(0)
    planted = []
    for text in MANUAL:
        paragraphs = text.split("\n\n")
        moved = paragraphs[1:] + paragraphs[:1]
        planted += [edit(text, 0.01, rng), "\n\n".join(moved), "Printed from the manual.\n\n" + text]
    rows = MANUAL + planted
    order = rng.sample(range(len(rows)), len(rows))
    parts = write(tmp_path, [rows[i] for i in order], 3)
    found = find(parts, texts(*(f"{n:05d}" for n in range(len(rows)))))
    place = np.argsort(order)
    group = np.where(found.near_N < 0, np.arange(len(rows)), found.near_N)
    group = np.where(found.exact_N < 0, group, group[found.exact_N])
    sets = [shingles(" ".join("".join(c if c.isalnum() else " " for c in row).split())) for row in rows]
    alike = [
        (i, len(MANUAL) + 3 * i + kind)
        for i in range(len(MANUAL))
        for kind in range(3)
        if len(sets[i] & sets[len(MANUAL) + 3 * i + kind])
        >= 0.8 * len(sets[i] | sets[len(MANUAL) + 3 * i + kind])
    ]
    hit = sum(group[place[a]] == group[place[b]] for a, b in alike)
    assert len(alike) > len(MANUAL) and hit >= 0.97 * len(alike)
    originals = group[place[: len(MANUAL)]]
    assert len(set(originals.tolist())) == len(MANUAL)  # none is taken for another
    stays = np.flatnonzero((found.near_N < 0) & (found.exact_N < 0))
    assert set(found.near_N[found.near_N >= 0].tolist()) <= set(stays.tolist())
    # The same in one part; the parts do not matter.
    whole = find(
        write(tmp_path / "one", [rows[i] for i in order]), texts(*(f"{n:05d}" for n in range(len(rows))))
    )
    assert whole.near_N.tolist() == found.near_N.tolist() and whole.exact_N.tolist() == found.exact_N.tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_similarity_is_that_of_the_sets(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(30)]
    rows = [" ".join(rng.choices(words[:6], k=rng.randrange(1, 40))) for _ in range(6)]
    parts = Parts(write(tmp_path_factory.mktemp("parts"), rows, 2, Shape(n=2)))
    left, right = np.array(list(combinations(range(6), 2))).T
    wanted = [
        len(shingles(rows[a], 2) & shingles(rows[b], 2)) / len(shingles(rows[a], 2) | shingles(rows[b], 2))
        for a, b in zip(left, right, strict=True)
    ]
    assert jaccard(parts, left, right) == pytest.approx(wanted)


def test_chains_join_and_the_best_copy_stays(tmp_path: Path) -> None:
    words = [f"w{i:03d}" for i in range(200)]
    chain = [" ".join(words[start : start + 160 + (start == 20)]) for start in (0, 10, 20, 30)]
    found = copies(tmp_path / "a", chain)
    assert [near for _, near in found] == [
        2,
        2,
        -1,
        2,
    ]  # 0 and 3 share 130 of 190 words: joined by those between
    assert [near for _, near in copies(tmp_path / "b", chain, keep="first")] == [-1, 0, 0, 0]
    assert [near for _, near in copies(tmp_path / "c", chain, threshold=0.95)] == [-1] * 4


def test_what_was_not_compared_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = " ".join(f"line{i}" for i in range(100))
    rows = [f"{form} " + " ".join(f"x{i}y{j}" for j in range(40)) for i in range(8)]
    shape, ids = Shape(bands=4, rows=1), texts(*map(str, range(8)))
    assert find(write(tmp_path / "a", rows, shape=shape), ids).left == 0
    monkeypatch.setattr("langmill.data.dedup.LEADERS", 1)
    found = find(write(tmp_path / "b", rows, shape=shape), ids)
    assert found.left > 0 and found.similar == 0 and (found.near_N == -1).all()


def test_keys_are_equal_as_often_as_the_formula_says() -> None:
    rng = random.Random(1)
    rows = [" ".join(f"w{rng.randrange(10**6)}" for _ in range(300)) for _ in range(300)]
    shape = Shape(n=1, bands=40, rows=2)
    own = sign(texts(*rows), shape).keys_BR
    other = sign(
        texts(*(" ".join(row.split()[:200] + [f"x{i}" for i in range(100)]) for row in rows)), shape
    ).keys_BR
    assert (own == other).mean() == pytest.approx(0.5**2, abs=0.02)  # 200 of 400 words are in both
    assert shape.caught(0.5) == pytest.approx(1 - 0.75**40)
    assert Shape().caught(0.8) > 0.99


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    nothing = find([], texts())
    assert len(nothing.exact_N) == 0 and nothing.compared == 0
    parts = write(tmp_path / "a", ["one", "two"]) + write(tmp_path / "b", ["three"], shape=Shape(bands=3))
    with pytest.raises(DataError, match="different numbers of bands"):
        find(parts, texts("a", "b", "c"))
    with pytest.raises(DataError, match="1 ids were given for 2 texts"):
        find(parts[:1], texts("a"))
    with pytest.raises(UsageError, match="bands of at least 1"):
        Shape(bands=0)
    assert find(write(tmp_path / "c", [], 1), texts()).near_N.tolist() == []


def test_tests_are_found_in_texts(tmp_path: Path) -> None:
    question = "Which of the tools reads what the user wrote and says it in one line again?"
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"q": question, "choices": [{"text": CHINESE}, "no"], "n": 1}) + "\n"
    )
    (tmp_path / "short.txt").write_text("eight words are the least that is looked for\n\nfar too short\n")
    step = Decontaminate((str(tmp_path / "q.jsonl"), str(tmp_path / "short.txt")))
    rows = [
        f"Here it is: {question.upper()} Yes.",
        "tools reads what the user wrote and says it in one line",
        f"他说：{CHINESE[:24]}。" + "天" * 9,
        f"他说：{CHINESE[:10]}。",
        "We say: eight words are the least, that is looked for.",
        "which of the tools",
        "",
    ]
    table = pa.table(
        {
            "text": texts(*rows),
            "dropped": pa.nulls(len(rows), pa.string()),
            "id": [str(i) for i in range(len(rows))],
        }
    )
    said = step(table).column("dropped").to_pylist()
    assert [reason and reason.removeprefix("decontaminate: holds tests of ") for reason in said] == [
        "q.jsonl",
        None,
        "q.jsonl",
        None,
        "short.txt",
        None,
        None,
    ]


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("a.jsonl", "{}\n{bad\n", r"a.jsonl:2 cannot be read as jsonl"),
        ("a.json", "[", r"a.json cannot be read as json"),
        ("a.txt", "short\n", r"holds no text of 8 words or 13 characters"),
        ("a.pdf", "", r"tests are read from"),
    ],
)
def test_tests_that_cannot_be_read_are_said(tmp_path: Path, name: str, content: str, wanted: str) -> None:
    (tmp_path / name).write_text(content)
    table = pa.table({"text": texts("some text"), "dropped": pa.nulls(1, pa.string())})
    with pytest.raises(DataError, match=wanted):
        Decontaminate((str(tmp_path / name),))(table)
    with pytest.raises(DataError, match="cannot be read"):
        Decontaminate((str(tmp_path / "none.txt"),))(table)
    with pytest.raises(UsageError, match="must have 1 to 13"):
        Decontaminate((), least_words=14)
