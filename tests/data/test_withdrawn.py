"""Shards that lose documents are what they would be, had those never been there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.data import withdrawn
from langmill.data.shards import Shards, write_shards
from langmill.data.withdrawn import cleared, withdraw
from langmill.text.document import Document
from langmill.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the cat sat on the mat. 你好，世界。\n"], 300)
TEXTS = [f"the cat {i} sat" * (1 + i % 7) for i in range(60)] + ["你好\x00", "x" * 900]


def write(folder: Path, texts: list[str]) -> Shards:
    documents = (Document(f"file\n{TEXTS.index(text)}", text, "s") for text in texts)
    return write_shards(documents, TOKENIZER, folder, shard_tokens=120, prepared=["old"])


def content(shards: Shards) -> list[tuple[str, list[int], int, int]]:
    return [
        (shards.id_of(i), shards.tokens_of(i).tolist(), int(shards.hashes[i]), int(shards.bytes_of[i]))
        for i in range(shards.documents)
    ]


@given(gone=st.sets(st.integers(0, len(TEXTS) - 1), max_size=len(TEXTS) - 1))
def test_what_stays_is_as_if_the_others_never_were(
    tmp_path_factory: pytest.TempPathFactory, gone: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("w")
    write(folder / "s", TEXTS)
    (folder / "s" / "tokenizer.json").write_text("{}")
    mask = np.isin(np.arange(len(TEXTS)), list(gone))
    withdraw(folder / "s", mask, ["new"])
    left = Shards.open(folder / "s")  # every checksum is compared
    never = write(folder / "never", [text for i, text in enumerate(TEXTS) if i not in gone])
    assert content(left) == content(never)
    assert (left.tokens, left.bytes, left.documents) == (never.tokens, never.bytes, never.documents)
    for name in ("index.bin", "ids.jsonl"):
        assert (folder / "s" / name).read_bytes() == (folder / "never" / name).read_bytes()
    assert left.manifest["prepared"] == ["new"] and left.manifest["removed"] == len(gone)
    assert (folder / "s" / "tokenizer.json").is_file() and {f.name for f in folder.iterdir()} == {
        "s",
        "never",
    }


def test_shards_that_lose_all_are_gone(tmp_path: Path) -> None:
    withdraw(write(tmp_path / "s", TEXTS).folder, np.ones(len(TEXTS), bool), [])
    assert list(tmp_path.iterdir()) == []


def test_killed_at_any_point_nothing_old_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.arange(len(TEXTS)) == 5
    write(tmp_path / "s", TEXTS)
    monkeypatch.setattr(withdrawn, "write_json", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        withdraw(tmp_path / "s", mask, [])
    assert Shards.open(tmp_path / "s").documents == len(TEXTS)
    monkeypatch.undo()
    shutil.copytree(tmp_path / "s", tmp_path / ".s.old")  # the new ones stand, the old were not removed yet
    cleared(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["s"]
    (tmp_path / "s").rename(tmp_path / ".s.old")  # the old were put aside, the new do not stand yet
    cleared(tmp_path)
    withdraw(tmp_path / "s", mask, [])
    assert Shards.open(tmp_path / "s").documents == len(TEXTS) - 1
    (tmp_path / "s").rename(tmp_path / ".s.old")  # half removed
    (tmp_path / ".s.old" / "shards.json").unlink()
    cleared(tmp_path)
    assert list(tmp_path.iterdir()) == []
