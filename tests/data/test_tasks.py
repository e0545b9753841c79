"""Labelled rows from every format: each is a row or an exclusion with its reason, and nothing is lost."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import DataError, UsageError
from langmill.data.pipeline import Ledger
from langmill.data.tasks import (
    FRACTION,
    GroupRow,
    QuestionRow,
    ScoredRow,
    WordRow,
    read_groups,
    read_labels,
    read_questions,
    read_scored,
    read_translations,
    read_words,
)
from langmill.text.tag import spans_of
from langmill.text.tasks import Limit, encode_texts
from langmill.text.tokenizer import Tokenizer

Reader = Callable[..., Any]


def write(folder: Path, name: str, rows: Any) -> Path:
    """A file of rows: JSON lines, or text or bytes as they are."""
    file = folder / name
    if isinstance(rows, list):
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = rows if isinstance(rows, bytes) else rows.encode("utf-8")
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return file


def read(reader: Reader, *paths: Path, **options: Any) -> tuple[list[Any], dict[str, int]]:
    """(rows, how many were set aside for each reason)."""
    ledger = Ledger()
    rows = list(reader(paths, ledger, lambda row: row, **options))
    ledger.check()
    assert ledger.total("kept").documents == len(rows)
    return rows, {reason: count.documents for reason, count in ledger.dropped().items()}


TABLE = [("A good film, \"really\"", "pos"), ("很差。\n第二行", "neg"), ("فيلم جيد", "[SEP]")]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz", "a.tsv", "a.parquet"]
)
def test_texts_and_labels_from_every_format(tmp_path: Path, name: str) -> None:
    kind, table = name.split(".")[1], TABLE
    rows: Any = [{"text": text, "label": label, "n": "1"} for text, label in table]
    if kind == "csv":
        quoted = (",".join(f'"{cell}"' for cell in (t.replace('"', '""'), la, "1")) for t, la in table)
        rows = "\ufefftext,label,n\r\n" + "\r\n".join(quoted)
    elif kind == "tsv":
        table = [(text.replace("\n", " "), label) for text, label in table]
        rows = "n\ttext\tlabel\n" + "".join(f"1\t{text}\t{label}\n" for text, label in table)
    elif kind == "json":
        rows = json.dumps(rows)
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        write(tmp_path, name, rows)
    found, dropped = read(read_labels, tmp_path)
    assert [(row.text, row.label) for row in found] == table and not dropped
    assert found[1].where.startswith((tmp_path / name).as_posix() + ":")


def test_labels_of_every_kind(tmp_path: Path) -> None:
    labels = ["a ", 3, 3.0, True, ["b", "a", "b"], [], 2.5, None, "", {"a": 1}, float("nan")]
    file = write(tmp_path, "a.jsonl", [{"review": "x", "other": "y", "stars": label} for label in labels])
    fields = {"text": "review", "label": "stars", "text_pair": "other"}
    rows, dropped = read(read_labels, file, fields=fields)
    assert [row.label for row in rows] == ["a", "3", "3", "true", ("b", "a"), ()]
    assert (
        rows[0].text == ("x", "y")
        and sum(dropped.values()) == 5
        and set(dropped) <= {"no usable label", "broken JSON", FRACTION}
        and dropped[FRACTION] == 1
    )
    rows, dropped = read(read_labels, file, fields=fields, regression=True)
    assert [row.label for row in rows] == [3.0, 3.0, 2.5] and dropped["a label that is no number"] >= 7
    with pytest.raises(UsageError, match="no field txt"):
        read(read_labels, file, fields={"txt": "review"})


def test_bad_rows_are_counted_by_their_reason(tmp_path: Path) -> None:
    good = {"text": "x" * (1 << 20), "label": "a"}
    lines = [json.dumps(good).encode(), b'{"text": "caf\xe9", "label": "a"}', b"[1]", b"{", b"",
             b'{"label": "a"}', b'{"text": 5, "label": "a"}', b'{"text": " ", "label": "a"}',
             b'{"text": "\\ud800", "label": "a"}', b'{"text": "a", "label": "x"}']  # fmt: skip
    rows, dropped = read(read_labels, write(tmp_path, "a.jsonl", b"\n".join(lines)))
    assert [len(row.text) for row in rows] == [1 << 20, 1]
    assert dropped == {
        "not UTF-8": 1, "broken JSON": 2, "not a JSON object": 1, 'no field "text"': 1, 'field "text" is not text': 1,
        'field "text" is empty': 1}  # fmt: skip
    surrogate = write(tmp_path, "b.json", '[{"text": "a\\ud800", "label": "a"}, {"text": "a", "label": "a"}]')
    assert read(read_labels, surrogate)[1] == {"half a surrogate pair in the text": 1}


def test_tables_with_damage(tmp_path: Path) -> None:
    text = b'text;label\ngood;a\n"caf\xe9\n, two";a\nmany;a;b\n"x"y;a\nfine;b\n"never closed;a\nlost;b\n'
    rows, dropped = read(read_labels, write(tmp_path, "a.csv", text))
    assert [row.text for row in rows] == ["good", "fine"]
    assert dropped == {"not UTF-8": 1, "not as many fields as columns": 1, "broken CSV": 2}
    for name, content, reason in (
        ("empty.csv", b"", "no column"),
        ("other.csv", b"a,b\n1,2\n", "no column text or label"),
        ("empty.jsonl", b"", "there is nothing in it"),
        ("empty.tsv", b"text\tlabel\n", "there is nothing in it"),
        (
            "wide.csv",
            "text,label\ngood,a\n".encode("utf-16"),
            r"1 x not UTF-8 \(.*wide.csv: it is UTF-16: save it as",
        ),
        (
            "short.csv",
            b"text,stars\ngood,a\n",
            r'1 x no field "label" \(.*short.csv:2: fields: text, stars\)',
        ),
        ("none.jsonl", b'{"text": "good"}\n', r'1 x no field "label" \(.*none.jsonl:1: fields: text\)'),
    ):
        with pytest.raises(DataError, match=f"found no row for classify.*{reason}"):
            read(read_labels, write(tmp_path, name, content))
    cut = write(tmp_path, "cut.csv.gz", "text,label\n" + "good,a\n" * 9000)
    cut.write_bytes(cut.read_bytes()[:-20])
    assert "file is damaged from here on" in read(read_labels, cut)[1]


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "no", "does not exist"), (tmp_path, "holds no .jsonl"),
                       (write(tmp_path, "a.xml", "x"), "of no known format")):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            read(read_labels, path)


def test_what_make_refuses_is_counted_too(tmp_path: Path) -> None:
    tokenizer, counted = Tokenizer.train(["a b c"], 300), Counter[str]()
    file = write(tmp_path, "a.jsonl", [{"text": "a b", "label": "x"}, {"text": "a" * 99, "label": "x"}])
    ledger = Ledger()
    made = read_labels([file], ledger, lambda row: encode_texts(tokenizer, [row.text], Limit(20), counted))
    assert len(list(made)) == 1
    assert ledger.as_dict()["dropped"]["longer than the model reads"]["documents"] == 1


def tagged(row: WordRow) -> list[tuple[str, str]]:
    return [(row.words.text[a:b], tag) for (a, b), tag in zip(row.words.spans, row.tags, strict=True)]


def test_tags_from_rows_and_word_files(tmp_path: Path) -> None:
    rows = [
        {"tokens": ["Marie", "sah", "巴", "黎"], "tags": ["I-PER", "O", "B-LOC", "I-LOC"]},
        {"text": "ماري في باريس.", "spans": [{"start": 8, "end": 13, "label": "LOC"}]},
        {"text": "in Parisian", "spans": [{"start": 3, "end": 8, "label": "LOC"}]},
        {"tokens": ["a"], "tags": []},
        {"tokens": ["a", " "], "tags": ["O", "O"]},
        {"text": "abc", "spans": [{"start": 2, "end": 9, "label": "X"}]},
        {"text": "abc", "spans": [{"start": 2}]},
        {"tokens": "a b", "tags": ["O"]},
    ]
    found, dropped = read(read_words, write(tmp_path, "a.jsonl", rows))
    assert tagged(found[0]) == [("Marie", "B-PER"), ("sah", "O"), ("巴", "B-LOC"), ("黎", "I-LOC")]
    assert found[0].repaired == 1 and found[0].words.text == "Marie sah巴黎"
    assert tagged(found[1]) == [("ماري", "O"), ("في", "O"), ("باريس", "B-LOC"), (".", "O")]
    assert (found[2].tags, found[2].widened) == (("O", "B-LOC"), 1)
    assert dropped == {
        "not as many tags as words": 1, "a word that is none": 1, "spans that do not fit the text": 1,
        "a span without its place": 1, 'field "tokens" is not a list': 1}  # fmt: skip
    conll = (
        "-DOCSTART- -X- O\n\nMarie NNP I-PER\r\nCurie NNP I-PER\n# O\n\n\nlonely\nx O\n\n巴黎\tB-LOC\nx y\tO"
    )
    for name in ("b.conll", "b.txt", "b.tsv", "b.bio.gz"):
        found, dropped = read(read_words, write(tmp_path, name, conll))
        assert [row.tags for row in found] == [("B-PER", "I-PER", "O"), ("B-LOC", "I-LOC", "O", "O")]
        assert tagged(found[0])[2] == ("#", "O") and tagged(found[1])[2:] == [("x", "O"), ("y", "O")]
        assert [row.cut for row in found] == [0, 2]
        assert dropped == {"a line without a tag": 1} and found[1].where.endswith(":11")
    found, dropped = read(read_words, write(tmp_path, "c.conll", b"a\tO\n\ncaf\xe9\tO\nb\tO\n"))
    assert len(found) == 1 and dropped == {"not UTF-8": 1}
    with pytest.raises(DataError, match=r"1 x not UTF-8 \(.*e.conll: it is UTF-16"):
        read(read_words, write(tmp_path, "e.conll", "a\tO\n".encode("utf-16")))
    with pytest.raises(DataError, match="nothing in it"):
        read(read_words, write(tmp_path, "d.txt", "\n\n"))


@given(
    st.lists(st.tuples(st.sampled_from(["a", "你", "مر"]), st.sampled_from(["O", "B-X", "I-X"])), min_size=1)
)
def test_words_and_tags_come_back(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    file = write(tmp_path_factory.mktemp("t"), "a.txt", "".join(f"{word} {tag}\n" for word, tag in pairs))
    (row,), _ = read(read_words, file)
    assert [word for word, _ in tagged(row)] == [word for word, _ in pairs]
    assert spans_of(row.tags) == spans_of([tag for _, tag in pairs])


CONTEXT = "Curie lived in Paris. 居里在巴黎。 Paris!"


def test_questions_in_every_shape(tmp_path: Path) -> None:
    flat = [
        {
            "id": "q1",
            "question": "Where?",
            "context": CONTEXT,
            "answers": {"text": ["Paris"], "answer_start": [15]},
        },
        {
            "question": "Where?",
            "context": CONTEXT.replace("在", "在 "),
            "answers": [{"text": " 巴黎", "answer_start": 25}],
        },
        {"question": "When?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
        {"question": "Who?", "context": CONTEXT, "answers": {"text": "Curie"}},
        {"question": "Where?", "context": CONTEXT, "answers": {"text": ["Paris"], "answer_start": [14]}},
        {"question": "Where?", "context": CONTEXT, "answers": {"text": ["Paris"]}},
        {"question": "Where?", "context": CONTEXT, "answers": {"text": ["Paris"], "answer_start": [-5]}},
        {"question": "Where?", "context": CONTEXT, "answers": {"text": ["Paris"], "answer_start": ["15"]}},
        {"question": "Where?", "context": CONTEXT, "answers": {"text": [""], "answer_start": [0]}},
        {"question": "Where?", "context": CONTEXT},
        {"question": " ", "context": CONTEXT, "answers": None},
    ]
    found, dropped = read(read_questions, write(tmp_path, "a.jsonl", flat))
    assert [(row.answers, row.starts) for row in found] == [
        (("Paris",), (15,)), (("巴黎",), (26,)), ((), ()), (("Curie",), (0,))]  # fmt: skip
    assert found[0].id == "q1" and found[1].id == found[1].where and found[2].span is None
    assert all(row.context[slice(*row.span)] == row.answers[0] for row in found if row.span)
    assert dropped == {
        "an answer that does not stand in its context": 2, "an answer without its place": 1,
        "an answer_start that is no number": 1,
        "answers that are none": 1, 'no field "answers"': 1, 'field "question" is empty': 1}  # fmt: skip
    csv = f'question,context,answer,answer_start\nWhere?,"{CONTEXT}",Paris,15\nWhen?,"{CONTEXT}",,\n'
    found, _ = read(read_questions, write(tmp_path, "a.csv", csv))
    assert [row.starts for row in found] == [(15,), ()]


def test_squads_nested_file(tmp_path: Path) -> None:
    qas = [
        {
            "id": "a",
            "question": "Where?",
            "answers": [{"text": "Paris", "answer_start": 15}],
            "is_impossible": False,
        },
        {"id": "b", "question": "When?", "answers": [], "is_impossible": True},
        {"id": "c", "question": "Where?", "answers": [{"text": "Rome", "answer_start": 15}]},
    ]
    paragraphs = [{"context": CONTEXT, "qas": qas}, {"context": "b", "qas": "none"}, 5]
    nested = {"version": "2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}
    found, dropped = read(read_questions, write(tmp_path, "a.json", json.dumps(nested)))
    assert [(row.id, row.span) for row in found] == [("a", (15, 20)), ("b", None)]
    assert isinstance(found[0], QuestionRow) and found[0].where.endswith("a.json:1.1")
    assert dropped == {
        "an answer that does not stand in its context": 1,
        'no field "question"': 1,
        "not a JSON object": 1,
    }


def test_translations(tmp_path: Path) -> None:
    pairs = [("Hello.", "你好。"), ("Bye.", "再见。"), ("Peace", "سلام")]
    named = [{"translation": {"en": en, "zh": zh}} for en, zh in pairs]
    bad = [
        {"translation": {"zh": "同", "en": "同 "}}, {"translation": {"en": "", "zh": "空"}},
        {"translation": {"en": "a", "de": "b"}}, {"translation": {"en": "a"}}, {"translation": "a"},
    ]  # fmt: skip
    found, dropped = read(read_translations, write(tmp_path, "a.jsonl", named + bad))
    assert [(row.source, row.target) for row in found] == pairs
    assert dropped == {
        "source equal to target": 1, 'field "en" is empty': 1, 'no field "zh"': 1,
        "a translation that is none": 2}  # fmt: skip
    found, _ = read(read_translations, tmp_path, languages=("zh", "en"))
    assert (found[0].source, found[0].target) == pairs[0][::-1]
    csv = write(tmp_path, "b.csv", "source,target\nHello.,Hallo.\n")
    assert read(read_translations, csv)[0][0].target == "Hallo."
    three = write(tmp_path, "c.jsonl", [{"translation": {"en": "a", "de": "b", "fr": "c"}}])
    with pytest.raises(UsageError, match="say which is the source"):
        read(read_translations, three)
    assert read(read_translations, three, languages=("fr", "en"))[0][0].source == "c"


def test_groups(tmp_path: Path) -> None:
    rows = [
        {"anchor": "a", "positive": "b"},
        {"anchor": "a", "positive": "b", "negative": "c"},
        {"anchor": "a", "positive": "b", "negative": ["c", "d"], "negative_1": "e"},
        {"text_a": "a", "text_b": "b", "label": 1},
        ["a", "b", "c", "d"],
        {"text_a": "a", "text_b": "b", "label": 0},
        ["a"],
        {"anchor": "a", "positive": "b", "negative": [5]},
        {"text": "a"},
    ]
    found, dropped = read(read_groups, write(tmp_path, "a.jsonl", rows))
    assert all(isinstance(row, GroupRow) and (row.anchor, row.positive) == ("a", "b") for row in found)
    assert [row.negatives for row in found] == [(), ("c",), ("c", "d", "e"), (), ("c", "d")]
    assert dropped == {
        "a pair of texts that are not alike": 1, 'no field "positive"': 1, 'field "negative" is not text': 1,
        'no field "anchor"': 1}  # fmt: skip


def test_texts_with_scores(tmp_path: Path) -> None:
    pair = {"sentence1": "a", "sentence2": "b"}
    rows = [pair | {"score": 4}, {"text_a": "a", "text_b": "b", "score": "0.25"}, pair, {"score": 1}]
    rows += [pair | {"score": bad} for bad in ("high", True, None, "nan")]
    found, dropped = read(read_scored, write(tmp_path, "a.jsonl", rows))
    assert [(row.text_a, row.text_b, row.score) for row in found] == [("a", "b", 4.0), ("a", "b", 0.25)]
    assert dropped == {'no field "score"': 1, 'no field "sentence1"': 1, "a score that is no number": 4}
    found, _ = read(read_scored, write(tmp_path, "a.tsv", "sentence1\tsentence2\tscore\nx\ty\t2.5\n"))
    assert isinstance(found[0], ScoredRow) and found[0].score == 2.5


def test_a_parquet_value_that_is_no_text_costs_its_row_alone(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw = pyarrow.array([b"good", b"caf\xe9", None, b"fine"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers(), raw.null_count)
    parquet.write_table(pyarrow.table({"text": texts, "label": ["a"] * 4}), tmp_path / "a.parquet")
    rows, dropped = read(read_labels, tmp_path / "a.parquet")
    assert [(row.text, row.where[-2:]) for row in rows] == [("good", ":1"), ("fine", ":4")]
    assert dropped == {"not UTF-8": 1, 'field "text" is not text': 1}
