from pathlib import Path

import pytest

from langmill.common.configure import configure
from langmill.common.errors import DataError
from langmill.common.settings import PretrainSettings
from langmill.jobs import preview

SMALL = "model.layers=1 model.dim=32 model.heads=2 tokenizer.vocab_size=400 max_length=256 micro_batch_size=2".split()


def test_a_dry_run_shows_the_plan_and_the_first_row_and_writes_nothing(texts: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = preview.run(
        configure(PretrainSettings, None, SMALL, path=[str(texts)], out=tmp_path / "m"), quiet=True
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert report.counts["documents"] == 60 and report.counts["set_aside"] == 1 and report.counts["steps"] > 1
    row = report.extra["row"]
    assert row and all(piece.startswith("<|endoftext|>|") or "|" in piece for piece in row)
    assert any(piece.endswith("<|endoftext|>") for piece in row)
    assert any(word in report.text for word in ("fox", "明月", "مرحبا"))
    (tmp_path / "run.yaml").write_text(report.text, encoding="utf-8")
    again = configure(PretrainSettings, tmp_path / "run.yaml")
    assert again.train.learning_rate == 0.006 and again.model.dim == 32


def test_it_fails_as_the_run_would(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found no documents"):
        preview.run(PretrainSettings(path=[str(tmp_path / "empty")], out=tmp_path / "m"), quiet=True)
