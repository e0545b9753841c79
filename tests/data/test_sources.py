"""Sources: every file once and in order, units that growth leaves alone, and nothing that leads out or never ends."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import UsageError
from langmill.common.prepare_settings import InputSettings
from langmill.data.sources import File, Unit, _pieces, files, format_of, roots, units


def listed(*sources: Path | str, follow: bool = False) -> tuple[list[str], dict[str, str]]:
    gone: dict[str, str] = {}
    found = files(
        [str(s) for s in sources], follow, lambda source, id, reason, size, detail: gone.update({id: reason})
    )
    return [file.id for file in found], gone


def put(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_ids_are_names_below_the_source_in_order(tmp_path: Path) -> None:
    for name in (
        "b/2.txt",
        "b/10.md",
        "a.html",
        "b.jsonl.gz",
        "b/deep/er/x.eml",
        "notes.docx",
        ".git/config.txt",
    ):
        put(tmp_path / "raw" / name)
    found, gone = listed(tmp_path / "raw")
    assert found == ["raw/a.html", "raw/b.jsonl.gz", "raw/b/10.md", "raw/b/2.txt", "raw/b/deep/er/x.eml"]
    assert gone == {"raw/notes.docx": "not a known format (.docx)", "raw/.git": "hidden file or folder"}
    assert listed(str(tmp_path / "raw" / "*" / "*.md"))[0] == ["raw/b/10.md"]
    assert listed(tmp_path / "raw" / "a.html")[0] == ["a.html"]


def test_sources_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("one/raw/a.txt", "two/raw/a.txt"):
        put(tmp_path / name)
    found, _ = listed(tmp_path / "one" / "raw", tmp_path / "two" / "raw")
    assert found == ["one/raw/a.txt", "two/raw/a.txt"]


def test_a_source_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        roots([str(tmp_path / "none")])
    with pytest.raises(UsageError, match="no file matches"):
        roots([str(tmp_path / "*.txt")])
    with pytest.raises(UsageError, match="not a known format"):
        roots([str(put(tmp_path / "a.zip"))])


def test_links_neither_loop_nor_climb_out(tmp_path: Path) -> None:
    put(tmp_path / "secret.txt")
    raw = put(tmp_path / "raw" / "in" / "a.txt").parent.parent
    (raw / "in" / "up").symlink_to(raw)
    (raw / "self.txt").symlink_to(raw / "self.txt")
    (raw / "out.txt").symlink_to(tmp_path / "secret.txt")
    (raw / "same.txt").symlink_to(raw / "in" / "a.txt")
    (raw / "gone.txt").symlink_to(raw / "nothing.txt")
    os.mkfifo(raw / "pipe.txt")
    found, gone = listed(raw)
    assert found == ["raw/in/a.txt"]
    assert {id: reason.split()[0] for id, reason in gone.items()} == {
        "raw/in/up": "link", "raw/self.txt": "cannot", "raw/out.txt": "link", "raw/same.txt": "link",
        "raw/gone.txt": "cannot", "raw/pipe.txt": "not",
    }  # fmt: skip
    assert listed(raw, follow=True)[0] == ["raw/in/a.txt", "raw/out.txt"]


def test_what_was_prepared_below_a_source_is_none_of_it(tmp_path: Path) -> None:
    put(tmp_path / "raw" / "a.txt")
    for name in ("manifest.json", "report.html", "clean/part-00000.parquet"):
        put(tmp_path / "raw" / "out" / name)
    found, gone = listed(tmp_path / "raw")
    assert found == ["raw/a.txt"] and gone == {"raw/out": "a prepared folder: give its clean folder"}


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.TXT", ".txt"), ("a.warc.gz", ".warc"), ("a.jsonl.zst", ".jsonl"), ("a.pdf.gz", ""),
     ("a.gz", ""), ("a.zip", "")],
)  # fmt: skip
def test_formats_are_told_by_names(name: str, format: str) -> None:
    assert format_of(Path(name)) == format


@given(
    lines=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=40),
    cut=st.integers(1, 60),
)
def test_pieces_join_to_the_file_and_end_with_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], cut: int
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    path.write_bytes(data := b"\n".join(lines))
    found = list(_pieces(File(path, "a", "s", len(data), 0), cut))
    assert b"".join(data[piece.start : piece.end] for piece in found) == data
    assert all(data[: piece.start].endswith(b"\n") or piece.start == 0 for piece in found)
    assert [piece.first for piece in found] == [1 + data.count(b"\n", 0, piece.start) for piece in found]
    assert all(piece.end - piece.start >= cut for piece in found[:-1])


def planned(folder: Path, **settings: int) -> list[Unit]:
    found = files([str(folder)], False, lambda *given: None)
    return list(units(found, InputSettings(**settings), "recipe", lambda *given: None))  # type: ignore[arg-type]


def test_growth_leaves_the_units_before_it_alone(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"row {i}"}) + "\n" for i in range(400)]
    long = put(tmp_path / "raw" / "rows.jsonl", "".join(rows))
    for i in range(300):
        put(tmp_path / "raw" / "pages" / f"{i:03}.txt", f"page {i}")
    before = planned(tmp_path / "raw", unit_bytes=1024)
    assert len(before) > 8 and len({unit.key for unit in before}) == len(before)
    long.write_text("".join(rows) + '{"text": "new"}\n')
    put(tmp_path / "raw" / "pages" / "100a.txt", "new")
    after = {unit.key for unit in planned(tmp_path / "raw", unit_bytes=1024)}
    assert 1 <= len([unit for unit in before if unit.key not in after]) <= 4
    assert [unit.key for unit in planned(tmp_path / "raw", unit_bytes=1024)] != [unit.key for unit in before]
