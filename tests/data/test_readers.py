"""Readers: what is good is read exactly, what is bad is counted with its reason, nothing is lost in silence."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import DataError, MissingExtra, UsageError
from langmill.common.settings import DataSettings
from langmill.data import readers
from langmill.data.pipeline import Ledger
from langmill.data.readers import _cut, read
from langmill.text.document import Document

SETTINGS = DataSettings(section_bytes=256)


def load(*paths: Path, **settings: Any) -> tuple[list[Document], Ledger]:
    """All documents, kept, with a ledger that adds up."""
    ledger = Ledger()
    documents = list(read(list(paths), DataSettings(**({"section_bytes": 256} | settings)), ledger))
    for document in documents:
        ledger.keep(document.source, len(document.text.encode("utf-8")))
    ledger.check()
    return documents, ledger


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def reasons(ledger: Ledger) -> dict[str, int]:
    return {reason: count.documents for reason, count in ledger.dropped().items()}


@pytest.mark.parametrize("suffix", ["txt", "md", "txt.gz", "txt.zst"])
def test_the_pieces_of_a_text_file_join_to_the_file(tmp_path: Path, suffix: str) -> None:
    text = "".join(f"Paragraph {i} 你好 😀.\r\nSecond line\x00 of it.\n\n" for i in range(400))
    text += "x" * 1000 + "你" * 500 + "\n" + "line\n" * 300
    documents, ledger = load(put(tmp_path / f"a.{suffix}", text))
    assert "".join(texts(documents)) == text and reasons(ledger) == {}
    assert max(len(t.encode()) for t in texts(documents)) <= 256
    assert all(t.endswith("\n\n") for t in texts(documents)[:80])  # cut at blank lines where there are any
    assert len({document.id for document in documents}) == len(documents)
    starts = [int(document.id.rpartition(":")[2]) for document in documents]
    assert text.encode()[starts[7] :].startswith(documents[7].text.encode())


@given(
    st.text("ab\n\r 你😀", min_size=1, max_size=60).map(lambda text: (text * 300).encode()),
    st.integers(16, 300),
)
def test_a_cut_is_in_bounds_and_splits_no_character(data: bytes, limit: int) -> None:
    start, pieces = 0, []
    while len(data) - start > limit:
        end = _cut(data, start, start + limit)
        assert start < end <= start + limit
        pieces.append(data[start:end].decode("utf-8"))
        start = end
    assert "".join(pieces) + data[start:].decode("utf-8") == data.decode("utf-8")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_rows_that_are_no_documents_are_set_aside_with_their_reason(tmp_path: Path, suffix: str) -> None:
    good = ["a", "你好\x00😀\r\n", "", "x" * 5000]
    rows = [json.dumps({"text": text, "n": 1}) for text in good]
    rows += ['{"text": "in spite of it", "title": "\\ud800"}', "", "  "]
    bad = {
        "broken JSON": ['{"text": "a', "{'text': 1}", "nothing", '{"text": "a"} {}'],
        'no field "text"': ['{"messages": []}', "{}"],
        'field "text" is not text': ['{"text": null}', '{"text": 3.5}', '{"text": ["a"]}'],
        "not a JSON object": ["[1]", '"a"', "7"],
        "half a surrogate pair in the text": ['{"text": "a\\ud800b"}'],
    }
    lines = [*rows, *(line for group in bad.values() for line in group)]
    raw = "\ufeff".encode() + "\n".join(lines).encode() + b'\n{"text": "\xff"}\n{"text": "last"}'
    documents, ledger = load(put(tmp_path / f"a.{suffix}", raw))
    assert texts(documents) == [*good, "in spite of it", "last"]
    assert reasons(ledger) == {reason: len(group) for reason, group in bad.items()} | {"not UTF-8": 1}
    assert ledger.examples['no field "text"'][0].endswith(
        ":12: fields: messages; chat rows are for finetune --task chat"
    )
    assert documents[-1].id.endswith(f"a.{suffix}:{len(lines) + 2}")


def test_another_field_and_a_row_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW", 1000)
    long = json.dumps({"body": "y" * 2_000_000})
    file = put(tmp_path / "a.jsonl", f'{{"body": "a"}}\n{long}\n{{"body": "b"}}\n')
    documents, ledger = load(file, text_field="body")
    assert texts(documents) == ["a", "b"]
    assert ledger.dropped()[readers._TOO_LONG].bytes == len(long) + 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_cut_short_gives_the_rows_before(tmp_path: Path, suffix: str) -> None:
    rows = "".join(json.dumps({"text": os.urandom(50).hex()}) + "\n" for _ in range(5000))
    file = put(tmp_path / f"a.jsonl{suffix}", rows)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    documents, ledger = load(file)
    assert 1000 < len(documents) < 4000 and texts(documents)[-1] in rows
    assert reasons(ledger) == {"file is damaged from here on": 1}
    text = put(tmp_path / f"b.txt{suffix}", rows)
    text.write_bytes(text.read_bytes()[: text.stat().st_size // 2])
    documents, ledger = load(text)
    assert rows.startswith("".join(texts(documents))) and len(documents) > 1000
    assert reasons(ledger) == {"file is damaged from here on": 1}
    foreign = tmp_path / f"c.jsonl{suffix}"
    foreign.write_bytes(b"no such format")
    with pytest.raises(DataError, match="1 x file is damaged"):
        load(foreign)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.csv.gz", "a.parquet"])
def test_a_file_that_is_damaged_from_its_beginning_counts_with_its_size(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such format" * 9)
    put(tmp_path / "b.txt", "kept")
    documents, ledger = load(tmp_path)
    assert texts(documents) == ["kept"] and ledger.total("read").bytes == 14 * 9 + 4
    assert ledger.dropped()["file is damaged from here on"].bytes == 14 * 9


def test_frames_end_to_end(tmp_path: Path) -> None:
    big = "z" * 3_000_000
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)):
        file = tmp_path / f"a.txt{suffix}"
        file.write_bytes(pack(b"one ") + pack(big.encode()) + pack(b" three") + bytes(512))
        documents, ledger = load(file, section_bytes=1 << 20)
        assert "".join(texts(documents)) == f"one {big} three" and reasons(ledger) == {}


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"a" * 2_000_000 + b"\xff", "byte 2000000 is not"),
        ("é".encode("latin-1") + b" caf", "byte 0 is not"),
        ("你".encode()[:2], "byte 0 is not"),
        ("text".encode("utf-16"), "it is UTF-16"),
        ("text".encode("utf-16-le"), "UTF-16 without a mark"),
    ],
)
def test_a_file_that_is_not_utf8_is_set_aside_whole(tmp_path: Path, content: bytes, detail: str) -> None:
    bad = [put(tmp_path / f"a.{suffix}", content) for suffix in ("txt", "csv")]
    documents, ledger = load(put(tmp_path / "b.txt", "\ufeffgood"), *bad)
    assert texts(documents) == ["good"] and reasons(ledger) == {"not UTF-8": 2}
    assert detail in ledger.examples["not UTF-8"][0] and detail in ledger.examples["not UTF-8"][1]
    assert ledger.dropped()["not UTF-8"].bytes == 2 * len(content)


def test_csv(tmp_path: Path) -> None:
    long = "w" * 200_000  # beyond the csv module's own limit
    file = put(tmp_path / "a.csv", f'id,text\n1,"two\nlines, ""quoted"""\n2\n3,{long}\n\n4,\x00你\n')
    semicolons = put(tmp_path / "b.csv", "text;id\r\nhello, world;1\r\n")
    other = put(tmp_path / "c.csv", "id,body\n1,a\n")
    broken = put(tmp_path / "d.csv", 'text\nfine\n"never closed\n' + "x\n" * 10)
    documents, ledger = load(file, semicolons, other, broken)
    assert texts(documents)[:4] == ['two\nlines, "quoted"', long, "\x00你", "hello, world"]
    assert texts(documents)[4] == "fine" and len(documents) == 6
    assert reasons(ledger) == {'no field "text"': 1, 'no column "text"': 1}


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    values = ["a", None, "你😀", "", "z" * 10_000]
    parquet.write_table(pa.table({"text": values, "n": range(5)}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"body": values}), tmp_path / "b.parquet")
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "c.parquet")
    raw = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    parquet.write_table(pa.table({"text": raw}), tmp_path / "d.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "e.parquet").write_bytes(data[: len(data) // 2])
    documents, ledger = load(tmp_path)
    assert texts(documents) == ["a", "你😀", "", "z" * 10_000]
    assert reasons(ledger) == {
        'field "text" is not text': 3, 'no column "text"': 1, "not UTF-8": 1, "file is damaged from here on": 1,
    }  # fmt: skip


def test_folders_are_read_in_order_and_every_other_file_is_counted(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.md", "a.jsonl", "c/deep/er/x.txt", "B.TXT"):
        put(tmp_path / name, '{"text": "row"}' if name.endswith("jsonl") else name)
    for name in (".hidden/x.txt", ".git.txt", "image.png", "README", "d.json", "e.parquet.gz"):
        put(tmp_path / name, "content")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "c" / "loop").symlink_to(tmp_path)
    (tmp_path / "z.txt").symlink_to(tmp_path / "b" / "2.txt")
    documents, ledger = load(tmp_path)
    assert texts(documents) == ["B.TXT", "row", "b/1.md", "b/2.txt", "c/deep/er/x.txt", "b/2.txt"]
    assert reasons(ledger) == {
        "hidden file or folder": 2, "not a known format (.png)": 1, "not a known format (no extension)": 1,
        "not a known format (.json)": 1, "not a known format (.gz)": 1, "not a regular file": 1,
        "cannot be opened": 1, "link to a folder that was read already": 1,
    }  # fmt: skip
    assert ledger.sources[(tmp_path / "b").as_posix()].kept.documents == 2
    for i in range(60):
        put(tmp_path / "many" / f"{i}.txt", "x")
    _, ledger = load(tmp_path / "many")
    assert list(ledger.sources) == [(tmp_path / "many").as_posix()]  # many small files are one source


def test_own_models_and_runs_are_no_text(tmp_path: Path) -> None:
    """A run started where the texts are writes its folders among them."""
    put(tmp_path / "a.txt", "mine")
    for name in ("m/lineage.json", "m/README.md", "m.run/lock", "m.run/errors.jsonl", "s/shards.json"):
        put(tmp_path / name, '{"text": "copied"}')
    documents, ledger = load(tmp_path)
    assert texts(documents) == ["mine"] and reasons(ledger) == {"a model or run of Langmill": 3}


def test_nothing_to_read_says_what_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load(tmp_path / "no")
    with pytest.raises(DataError, match=r"found no documents in .*\.jsonl.*there was no file"):
        load(tmp_path)
    with pytest.raises(UsageError, match=r"known are \.txt"):
        load(put(tmp_path / "a.png", "x"))
    put(tmp_path / "a.jsonl", "{}\n{}")
    with pytest.raises(
        DataError, match=r'1 x not a known format \(\.png\).*2 x no field "text"|2 x no field'
    ):
        load(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(MissingExtra, match=r"langmill\[data\]"):
        load(put(tmp_path / "b.jsonl.zst", "x"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_counted(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "x").chmod(0)
    put(tmp_path / "b.txt", "y")
    documents, ledger = load(tmp_path)
    assert texts(documents) == ["y"] and reasons(ledger) == {"cannot be opened": 1}
