"""Rows from every kind of file, and results that stream, with the least of models."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from langmill.apps import classify, embed
from langmill.apps.texts import Result, Row, each, rows
from langmill.common.configure import configure
from langmill.common.errors import DataError, UsageError
from langmill.common.settings import ClassifySettings, EmbedSettings, ReadSettings
from langmill.families.folder import save
from langmill.model.config import Head, Learned, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

TEXTS = ["a first text", "第二个文本", "نص ثالث"]


def asked(**given: object) -> ReadSettings:
    return configure(ReadSettings, None, [], **{"model": "none", **given})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "txt"])
def test_every_kind_of_file_gives_the_same_texts(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"texts.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"body": t, "n": i}) for i, t in enumerate(TEXTS)) + "\n\n")
    elif kind in ("csv", "tsv"):
        cut = "," if kind == "csv" else "\t"
        lines = [f"n{cut}body", *(f"{i}{cut}{t}" for i, t in enumerate(TEXTS))]
        path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": [0, 1, 2], "body": TEXTS}), path)
    else:
        path.write_text("\n".join(TEXTS), encoding="utf-8")
    found = list(rows(asked(file=path, field="body"), Counter()))
    assert [row.text for row in found] == TEXTS
    if kind != "txt":
        assert [int(row.fields["n"]) for row in found] == [0, 1, 2]


def test_the_first_field_that_holds_text_is_taken_unless_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"context": "a", "text": "b", "id": 1}\n{"text": "c", "context": null}\n{"body": "d"}\n')
    found = rows(asked(file=path), Counter(), fields=("context", "text"))
    assert [next(found).text, next(found).text] == ["a", "c"]
    with pytest.raises(DataError, match="line 3 has no text in 'context' or 'text' \\(it has body\\)"):
        next(found)
    named = rows(asked(file=path, field="text"), Counter(), fields=("context", "text"))
    row = next(named)
    assert (row.text, row.fields) == ("b", {"context": "a", "id": 1})


def test_standard_input_is_lines_or_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "one"}\n{"text": "two", "id": 7}\n'))
    assert [(row.text, row.fields) for row in rows(asked(), Counter())] == [("one", {}), ("two", {"id": 7})]
    monkeypatch.setattr("sys.stdin", io.StringIO("{not json\nplain\n"))
    assert [row.text for row in rows(asked(), Counter())] == ["{not json", "plain"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"body": "b"}\n', "line 2 has no text in 'text' \\(it has body\\): name the field"),
        ('{"text": "a"}\n[1]\n', "line 2 is no JSON object"),
        ('{"text": 3}\n', "has no text in 'text'"),
    ],
)
def test_a_row_that_is_no_text_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        list(rows(asked(file=tmp_path / "rows.jsonl"), Counter()))


def test_damaged_tables_and_forms_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.csv", 'text,n\n"open,1\nlast,2\n', "a.csv, in the row after line 1: unexpected end of data"),
        ("b.csv", "text,n\na, b,1\n", "b.csv, line 2 has more cells than its head"),
        ("c.parquet", "no parquet at all", "c.parquet cannot be read after row 0"),
        ("d.json", '[\n{"text": "a"}\n]\n', "d.json is one value, not one a line"),
        ("e.jsonl.gz", "", "e.jsonl.gz is packed"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises((DataError, UsageError), match=message):
            list(rows(asked(file=tmp_path / name), Counter()))


def test_what_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("été\n".encode() * 9000 + b"caf\xe9\n")
    with pytest.raises(DataError, match=r"is not UTF-8 \(line 9001, byte 4\): convert it first"):
        list(rows(asked(file=tmp_path / "old.txt"), Counter()))
    with pytest.raises(UsageError, match="is no file"):
        list(rows(asked(file=tmp_path / "none.txt"), Counter()))


def test_lines_without_text_are_counted_or_kept(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n\n  \ntwo\n")
    counted = Counter[str]()
    assert [row.text for row in rows(asked(file=tmp_path / "lines.txt"), counted)] == ["one", "two"]
    assert counted == {"empty lines left out": 2}
    kept = rows(asked(file=tmp_path / "lines.txt"), counted, blank=True)
    assert [row.text for row in kept] == ["one", "", "  ", "two"]
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert len(list(rows(asked(file=tmp_path / "rows.jsonl"), counted, blank=True))) == 2
    assert counted == {"empty lines left out": 2}


def test_results_are_not_called_what_they_are_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"would hold JSON lines: give --out a name that ends with .jsonl"):
        each(
            asked(text=["a"], out=tmp_path / "out.csv"),
            lambda batch, counted: iter(()),
            quiet=True,
            as_json=False,
        )
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_no_half_written_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{}\n')
    out = tmp_path / "out.jsonl"

    def read(batch: Sequence[Row], counted: Counter[str]) -> Iterator[Result]:
        yield from ({"text": row.text} for row in batch)

    settings = asked(file=tmp_path / "rows.jsonl", out=out, batch_size=1)
    with pytest.raises(DataError):
        each(settings, read, quiet=True, as_json=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        each(asked(text=["a"], out=out), read, quiet=True, as_json=False)
    each(asked(text=["a", "b"], out=out, force=True), read, quiet=True, as_json=False)
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["a", "b"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    tokenizer = Tokenizer.train(TEXTS * 3, 300)
    stack = StackConfig(
        32, 2, 2, 2, 16, 48, norm="layer", norm_eps=1e-12, activation="gelu", gated=False, position=Learned(),
        bias=frozenset({"q", "k", "v", "o", "mlp"}), norm_order="post", causal=False,
    )  # fmt: skip
    model = Transformer(
        ModelConfig(
            encoder=stack,
            encoder_input=Tokens(tokenizer.vocab_size, 16, types=2, norm=True),
            head=Head(2, False, True, "tanh", pool="first", task="classify", labels=("no", "yes")),
        )
    )
    init_(model, 0)
    save(model, tokenizer, folder)
    return folder


def test_vectors_in_every_form_are_the_same(encoder: Path, tmp_path: Path) -> None:
    texts = [*TEXTS, "a long text " * 9]
    for name in ("v.npy", "v.parquet", "v.jsonl"):
        settings = configure(EmbedSettings, None, [], model=str(encoder), text=texts, out=tmp_path / name)
        embed.run(settings, quiet=True)
    array = np.load(tmp_path / "v.npy")
    table = pyarrow.parquet.read_table(tmp_path / "v.parquet").to_pydict()
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text(encoding="utf-8").splitlines()]
    assert array.shape == (4, 32) and np.allclose(np.linalg.norm(array, axis=1), 1, atol=1e-5)
    assert np.allclose(array, table["embedding"]) and table["text"] == texts
    assert np.allclose(array, [line["embedding"] for line in lines], atol=1e-6)


def test_company_and_batches_change_no_score(encoder: Path) -> None:
    texts = [*TEXTS, "a long text " * 9, "b"]

    def scores(size: int) -> list[float]:
        settings = configure(ClassifySettings, None, [], model=str(encoder), text=texts, batch_size=size)
        found = classify.run(settings, quiet=True, as_json=True).extra["results"]
        return [one["scores"]["yes"] for one in found]

    assert scores(1) == pytest.approx(scores(32), abs=1e-6)


def test_too_long_is_refused_or_counted(encoder: Path) -> None:
    given = {"model": str(encoder), "text": ["a long text " * 9]}
    with pytest.raises(DataError, match="choose truncate or window"):
        classify.run(configure(ClassifySettings, None, [], **given, long_texts="error"), quiet=True)
    report = classify.run(configure(ClassifySettings, None, [], **given), quiet=True, as_json=True)
    assert report.counts["windowed"] == 1 and report.counts["windows"] > 1


def test_a_result_loses_no_field_of_its_row() -> None:
    row = Row("line 1", "cow", {"label": "gold", "id": 7, "score": 1})
    assert row.beside({"label": "farm", "score": 1}) == {
        "label": "farm", "id": 7, "score": 1, "given": {"label": "gold"}
    }  # fmt: skip
    assert row.beside({"entities": []}) == {"label": "gold", "id": 7, "score": 1, "entities": []}
