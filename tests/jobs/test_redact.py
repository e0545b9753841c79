"""`langmill privacy redact` over files of every kind: the same rows and columns, errors that say where."""

from __future__ import annotations

import csv
import json
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from langmill.cli import run as command
from langmill.common.errors import DataError, UsageError
from langmill.common.settings import RedactSettings
from langmill.jobs.redact import run

ROW = {
    "id": 7,
    "phone": "4155550123",
    "messages": [{"role": "user", "content": "I am joe@example.com"}],
    "n": None,
}


def redact(*files: Path, **given: Any) -> Any:
    return run(RedactSettings(file=list(files), **given), quiet=True)


def put(file: Path, text: str) -> Path:
    file.write_bytes(text.encode("utf-8"))
    return file


def test_rows_tables_and_texts(tmp_path: Path) -> None:
    rows = put(tmp_path / "a.jsonl", json.dumps(ROW) + "\r\n\n" + '{"x":  "kept as it is"}\n')
    table = put(tmp_path / "b.csv", '\ufeffname,phone\r\nJoe,"415 555 0123"\r\n')
    text = put(tmp_path / "c.txt", "one\r\ntel. 030 1234567\r\n")
    whole = put(tmp_path / "d.json", json.dumps([ROW]))
    columns = pa.table({"n": [1], "text": ["joe@example.com"], "tags": [["x", "+49 30 1234567"]]})
    pq.write_table(columns, tmp_path / "e.parquet")
    out = tmp_path / "out"
    report = redact(rows, table, text, whole, tmp_path / "e.parquet", out=out, redact={"policy": "label"})
    first, empty, last = (out / "a.jsonl").read_bytes().decode().splitlines(keepends=True)
    made = ROW | {"phone": "[PHONE]", "messages": [{"role": "user", "content": "I am [EMAIL]"}]}
    assert (
        json.loads(first) == made
        and first.endswith("\r\n")
        and (empty, last) == ("\n", '{"x":  "kept as it is"}\n')
    )
    assert (out / "b.csv").read_bytes() == b"\xef\xbb\xbfname,phone\r\nJoe,[PHONE]\r\n"
    assert (out / "c.txt").read_bytes() == b"one\r\ntel. [PHONE]\r\n"
    assert json.loads((out / "d.json").read_text(encoding="utf-8")) == [made]
    read = pq.read_table(out / "e.parquet")
    assert (
        read.to_pylist() == [{"n": 1, "text": "[EMAIL]", "tags": ["x", "[PHONE]"]}]
        and read.schema == columns.schema
    )
    assert report.counts["found"] == 8 and report.counts["files"] == 5
    assert (report.counts["texts"], report.counts["changed"]) == (13, 8)
    assert report.extra["found"][str(table)] == {"phone": 1} and "joe" not in repr(report)


def test_numbers_names_of_fields_and_tables_without_a_head(tmp_path: Path) -> None:
    row = put(tmp_path / "a.jsonl", '{"phone": 4155550123, "count": 4155550123, "joe@example.com": true}\n')
    made = json.loads(redact(row, redact={"policy": "label"}).text)
    assert made == {"phone": "[PHONE]", "count": 4155550123, "[EMAIL]": True}
    two = put(tmp_path / "b.jsonl", '{"joe@example.com": 1, "ann@example.com": 2}\n')
    with pytest.raises(DataError, match="become the same: take --policy pseudonym"):
        redact(two)
    bare = put(tmp_path / "c.csv", "joe@example.com,1\nann@example.com,2\n")
    assert redact(bare, redact={"policy": "label"}).text == "[EMAIL],1\n[EMAIL],2\n"


def test_a_table_keeps_what_parts_its_cells(tmp_path: Path) -> None:
    table = put(
        tmp_path / "t.csv", 'name;note\n"Doe; Joe";"says ""hi"" to joe@example.com"\nAnn;"two\nlines"\n'
    )
    redact(table, out=tmp_path / "o.csv", field=["note"])
    with open(tmp_path / "o.csv", encoding="utf-8", newline="") as file:
        found = list(csv.reader(file, delimiter=";"))
    assert found[0] == ["name", "note"] and found[1][0] == "Doe; Joe" and found[2] == ["Ann", "two\nlines"]
    assert found[1][1].startswith('says "hi" to ') and "joe@example.com" not in found[1][1]


def test_fields_alone(tmp_path: Path) -> None:
    rows = put(tmp_path / "a.jsonl", '{"text": "joe@example.com", "by": "joe@example.com"}\n')
    assert json.loads(redact(rows, field=["by"]).text) == {"text": "joe@example.com", "by": "***@*******.***"}
    table = put(tmp_path / "a.csv", "a,b\njoe@example.com,joe@example.com\n")
    assert redact(table, field=["b"]).text == "a,b\njoe@example.com,***@*******.***\n"
    with pytest.raises(DataError, match="no column 'c': it has a, b"):
        redact(table, field=["c"])


def test_pseudonyms_are_the_same_across_files_and_runs(tmp_path: Path) -> None:
    file, key = put(tmp_path / "a.txt", "joe@example.com\n"), tmp_path / "key"
    given: Any = {"policy": "pseudonym", "key_file": key, "make_key": True}
    one = redact(file, redact=given)
    assert one.text == redact(file, redact=given).text != file.read_text(encoding="utf-8")
    assert key.read_text(encoding="utf-8").strip() not in repr(one)


def test_what_cannot_be_done_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    text = put(tmp_path / "a.txt", "x")
    for wrong, given, said in (
        ([tmp_path / "no"], {}, "is no file"),
        ([text, put(tmp_path / "b.txt", "y")], {}, "say where to write"),
        ([text], {"out": text}, "exists: choose another --out"),
        ([text], {"redact": {"key_env": "K"}}, "a key is for pseudonyms"),
        ([text], {"redact": {"policy": "pseudonym"}}, "--key-file"),
        ([text], {"redact": {"names": "presidio"}}, "say which spaCy pipeline"),
    ):
        with pytest.raises(UsageError, match=said):
            redact(*wrong, **given)
    assert text.read_text(encoding="utf-8") == "x"
    for name, content, said in (
        ("a.jsonl", b'{"a": 1}\n{', "line 2 cannot be read as JSON"),
        ("a.bin", b"\x1f\x8b\x08", "is not text in UTF-8"),
        ("wide.txt", "joe@example.com".encode("utf-16-le"), "it is UTF-16"),
        ("b.txt", b"%PDF-1.7\njoe", "is a PDF, where details would be missed"),
        ("c.txt", b"{\\rtf1 joe}", "is rich text"),
        ("a.parquet", b"PAR0", "cannot be read as Parquet"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=said):
            redact(tmp_path / name, out=tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*part"))


def mail(text: str, coded: str) -> str:
    message = EmailMessage()
    message["From"] = "joe@example.com"
    message.set_content(text, cte=coded)
    return message.as_string()


@pytest.mark.parametrize("coded", ["base64", "quoted-printable"])
def test_mail_hides_nothing(tmp_path: Path, coded: str) -> None:
    """A coded body is never written as it came: mail is refused by name and by what it holds; rows are counted."""
    said = mail("Call 030 1234567, or write to joe=@example.com", coded)
    for name in ("a.eml", "b.mbox", "c.EML", "d.html", "e.pdf", "f.warc", "g.eml.gz", "h.jsonl.zst"):
        with pytest.raises(UsageError, match=r"langmill data prepare .* takes the text out and redacts it"):
            redact(put(tmp_path / name, said))
    with pytest.raises(DataError, match=r"mail with parts in base64.* name it \.eml"):
        redact(put(tmp_path / "inbox.txt", said), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rows = redact(put(tmp_path / "rows.jsonl", json.dumps({"mail": said}) + "\n"))
    assert list(rows.extra["left"].values()) == [1] and "joe@" not in rows.text
    plain = put(tmp_path / "plain.txt", mail("Call 030 1234567", "7bit"))
    assert "030" not in redact(plain).text and not redact(plain).extra["left"]


def test_a_notebook_is_rows_and_what_a_column_keeps_is_said(tmp_path: Path) -> None:
    book = put(tmp_path / "a.ipynb", json.dumps({"cells": [{"source": ["\u0661 joe@example.com"]}]}))
    assert json.loads(redact(book, redact={"policy": "label"}).text) == {
        "cells": [{"source": ["\u0661 [EMAIL]"]}]
    }
    table = pa.table({"phone": [4155550123, 7], "year": [2024, None], "image": [b"joe@example.com", b"x"]})
    pq.write_table(table, tmp_path / "a.parquet")
    report = redact(tmp_path / "a.parquet", out=tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet") == table
    assert sorted(report.extra["left"].values()) == [1, 2] and "left: 1 x" in report.text
    assert not redact(tmp_path / "a.parquet", field=["year"], out=tmp_path / "two.parquet").extra["left"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = put(tmp_path / "a.txt", "joe@example.com\n")
    assert command(["privacy", "redact", str(file), "--policy", "label", "--json", "--quiet"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        said["text"] == "[EMAIL]\n"
        and said["found"] == {str(file): {"email": 1}}
        and said["counts"]["found"] == 1
    )
    assert command(["privacy", "redact", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out == "***@*******.***\n" and "1 found in 1 of 1 texts" in err
