"""The ledger adds up, stays small, and says so when it does not add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from langmill.common.errors import DataError
from langmill.data import pipeline
from langmill.data.pipeline import Ledger


def test_it_adds_up_and_reports(tmp_path: Path) -> None:
    file = tmp_path / "run" / "errors.jsonl"
    ledger = Ledger(file)
    ledger.take("a", 10)
    ledger.take("a", 20)
    ledger.keep("a", 10)
    with pytest.raises(DataError, match="ledger of a does not add up: 2 documents of 30 bytes"):
        ledger.check()
    ledger.drop("a", "a:2", "no text in it", 20)
    ledger.reject("b", "b:7", "broken JSON", 5, text="{" * 500, detail="line 1")
    ledger.check()
    ledger.keep("a", 1, documents=0)
    with pytest.raises(DataError, match="31 bytes were kept or dropped"):
        ledger.check()
    ledger.take("a", 1, documents=0)
    report = ledger.as_dict()
    assert report["read"] == {"documents": 3, "bytes": 36} and report["kept"] == {"documents": 1, "bytes": 11}
    assert report["dropped"]["broken JSON"] == {"documents": 1, "bytes": 5, "examples": ["b:7: line 1"]}
    assert report["sources"]["a"]["dropped"] == {"no text in it": {"documents": 1, "bytes": 20}}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["where"] for line in lines] == ["a:2", "b:7"] and len(lines[1]["text"]) == 200


def test_it_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in (("SOURCES", 5), ("REASONS", 4), ("LINES", 10)):
        monkeypatch.setattr(pipeline, name, limit)
    ledger = Ledger(tmp_path / "errors.jsonl")
    for i in range(50):
        ledger.reject(f"source {i}", f"row {i}", f"reason {i}", 1)
    ledger.check()
    assert len(ledger.sources) == 6 and len(ledger.examples) == 5
    assert ledger.total("read").documents == sum(c.documents for c in ledger.dropped().values()) == 50
    assert len((tmp_path / "errors.jsonl").read_text().splitlines()) == 10
    assert max(map(len, ledger.examples.values())) == pipeline.EXAMPLES
