"""What `classify` and its like read is what `finetune` reads: texts that are texts, tables, bad bytes, other types."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from langmill import cli
from langmill.apps.texts import Row, each, rows
from langmill.common.configure import configure
from langmill.common.errors import DataError, UsageError
from langmill.common.plain import json_line
from langmill.common.settings import ReadSettings


def read(path: Path | None = None, **given: Any) -> list[Row]:
    return list(rows(configure(ReadSettings, None, [], model="none", file=path, **given), Counter()))


def settings(*words: str) -> Any:
    call = cli._parse(words)
    assert isinstance(call, cli.Call)
    return cli.read_settings(call)


@pytest.mark.parametrize("command", ["classify", "tag", "answer", "translate", "embed"])
def test_a_text_with_an_equals_sign_is_a_text(command: str) -> None:
    texts = ["E=mc2 is famous", "text=hello", "out=pwned.txt", "batch_size=1"]
    found = settings(command, "m", *texts, "--batch-size", "7")
    assert found.text == texts and found.out is None and found.batch_size == 7
    found = settings("similar", "m", "top=1", "field=x")
    assert (found.query, found.text, found.field) == ("top=1", ["field=x"], None)


def test_labels_are_no_yaml() -> None:
    found = settings("classify", "m", "x", "--labels", "[SEP]", "--labels=[a, b]", "--labels", "{x: 1}")
    assert found.labels == ["[SEP]", "[a, b]", "{x: 1}"]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_table_is_read_as_it_was_taught(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "T.CSV"
    path.write_text(f'\ufeffid{mark}text{mark}label\r\n1{mark}"a{mark}\n""b"""{mark}c\r\n', encoding="utf-8")
    (row,) = read(path)
    assert (row.text, row.fields) == (f'a{mark}\n"b"', {"id": "1", "label": "c"})
    (tmp_path / "t.tsv").write_text('text\tlabel\nboats "quoted sail\tx\n')  # a .tsv has no quotes
    assert [row.text for row in read(tmp_path / "t.tsv")] == ['boats "quoted sail']


def test_endings_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "X.JSONL").write_text('{"text": "a", "n": 1}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["b"]}), tmp_path / "X.PARQUET")
    assert [read(tmp_path / name)[0].text for name in ("X.JSONL", "X.PARQUET")] == ["a", "b"]
    (tmp_path / "X.GZ").touch()
    with pytest.raises(UsageError, match="X.GZ is packed"):
        read(tmp_path / "X.GZ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('\ufeff{"text": "船 sails"}\n'.encode(), "船 sails"),
        (b"good\nbad \xe4\n", "standard input is not UTF-8 (line 2, byte 5): convert it first"),
    ],
)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_standard_input_is_utf8_whatever_the_locale(given: bytes, said: str, locale: str) -> None:
    code = (
        "from collections import Counter; from langmill import cli; from langmill.apps.texts import rows\n"
        "from langmill.common.settings import ReadSettings\n"
        "cli.run = lambda _: print([r.text for r in rows(ReadSettings(model='m'), Counter())][0]) or 0\n"
        "cli.main()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], input=given, capture_output=True, env={"LC_ALL": locale}
    )
    assert said in (found.stdout + found.stderr).decode()


def test_half_characters_and_nulls_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ok \\ud83d\\ude00"}\n{"text": "x", "by": "\\uD800"}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2 holds \\ud800, half of a surrogate pair"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"text 1 is not UTF-8 \(byte 3\)"):
        read(text=["a \udce4"])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["b", None], "n": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match=r"n.parquet, row 2 has no text in 'text': 'text' is null"):
        read(tmp_path / "n.parquet")


def test_results_are_json_whatever_the_columns_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "text": "a", "when": datetime(2020, 1, 2, 3), "day": date(2020, 1, 2), "cost": Decimal("1.50"),
        "blob": b"\x00\xff", "none": float("nan"), "many": [{"at": date(2021, 1, 1)}],
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([values]), tmp_path / "t.parquet")
    asked = configure(ReadSettings, None, [], model="none", file=tmp_path / "t.parquet")
    each(
        asked,
        lambda batch, _: ({"text": r.text, **r.beside({"y": 1.0})} for r in batch),
        quiet=True,
        as_json=False,
    )
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "text": "a", "when": "2020-01-02T03:00:00", "day": "2020-01-02", "cost": "1.50", "blob": "AP8=", "none": None,
        "many": [{"at": "2021-01-01"}], "y": 1.0,
    }  # fmt: skip
    (tmp_path / "n.jsonl").write_text('{"text": "a", "v": NaN, "w": [Infinity]}\n')
    assert read(tmp_path / "n.jsonl")[0].beside({"y": 1}) == {"v": None, "w": [None], "y": 1}
    assert json_line({"f": float("inf"), "t": (1, "é")}) == '{"f": null, "t": [1, "é"]}'


def test_a_file_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").touch()
    (tmp_path / "sub").mkdir()
    for path, said in (
        (tmp_path / "text.jsnl", r"text.jsnl is no file: .* has texts.jsonl"),
        (tmp_path, r"is no file: .* has texts.jsonl"),
        (tmp_path / "sub" / "x.jsonl", r"sub has no files"),
        (tmp_path / "gone" / "x.jsonl", r"there is no folder .*gone"),
    ):
        with pytest.raises(UsageError, match=said):
            read(path)


def test_a_prompt_that_is_no_utf8_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"bad \xe4\n"), encoding="utf-8"))
    with pytest.raises(UsageError, match="standard input is not UTF-8"):
        settings("generate", "m")
