import json
from pathlib import Path

import pytest

from langmill.common.errors import UsageError
from langmill.common.settings import DataSettings, ModelSettings, QuickstartSettings
from langmill.families.folder import load
from langmill.jobs import quickstart
from langmill.jobs.manual import Manual
from langmill.model.config import LSTMConfig
from langmill.model.count import parameters
from langmill.text.document import Document


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same path with a smaller model and rows."""
    train = {"micro_batch_size": 2, "max_length": 32, "dtype": "float32"}
    monkeypatch.setattr(quickstart, "LENGTH", 32)
    monkeypatch.setattr(quickstart, "MODEL", ModelSettings(size="500k"))
    monkeypatch.setattr(quickstart, "TRAIN", quickstart.TRAIN.model_copy(update=train))
    monkeypatch.setattr(quickstart, "LSTM_TRAIN", quickstart.LSTM_TRAIN.model_copy(update=train))
    monkeypatch.setattr(quickstart, "PROBE_SECONDS", 0.01)


def test_own_text_becomes_two_models_and_a_report(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "first"
    settings = QuickstartSettings(text=[str(texts)], out=out, minutes=0.02, data=DataSettings(holdout=0.2))
    report = quickstart.run(settings, quiet=True)
    ours, tokenizer = load(out)
    lstm, _ = load(tmp_path / "first.run" / "lstm" / "model")
    assert tokenizer is not None and isinstance(lstm.config, LSTMConfig)
    assert abs(parameters(lstm.config) / parameters(ours.config) - 1) < 0.01
    logs = [tmp_path / "first.run" / "metrics.jsonl", tmp_path / "first.run" / "lstm" / "metrics.jsonl"]
    seen = [
        [json.loads(line).get("tokens") for line in log.read_text(encoding="utf-8").splitlines()]
        for log in logs
    ]
    assert seen[0] == seen[1] and report.counts["steps"] == quickstart.LEAST_STEPS
    f = report.figures
    assert f["lstm_behind"] == pytest.approx(f["lstm_bits_per_byte"] - f["bits_per_byte"], abs=1e-9)
    assert f["lstm_behind_interval"][0] <= f["lstm_behind"] <= f["lstm_behind_interval"][1]
    assert f["xz_bits_per_byte"] > 0 and json.loads(json.dumps(report.extra)) == report.extra
    page = (tmp_path / "first.run" / "report.html").read_text(encoding="utf-8")
    assert "Your text became a language model" in page and "LSTM" in page and "bad.txt" in page
    with pytest.raises(UsageError, match="--force"):
        quickstart.run(settings, quiet=True)


def test_the_manual_is_the_default_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [
        Document(f"os.f{i}", f"os.f{i}(path)\n\nReturn the path {i}, joined with nothing.\n" * 5, "x")
        for i in range(40)
    ]
    few = Manual(tuple(pages), ("a part is missing",))
    monkeypatch.setattr(quickstart, "manual", lambda: few)
    report = quickstart.run(QuickstartSettings(out=tmp_path / "m", minutes=0.01), quiet=True)
    assert report.counts["documents"] == 40 and "a part is missing" in report.extra["notices"]
    assert report.counts["held_out_documents"] >= 1
    assert {s["model"] for s in report.extra["samples"]} == {"Transformer", "LSTM"}
    assert "--from MODEL" in report.text


def test_a_text_of_one_line_is_still_trained_on(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("春眠不觉晓，处处闻啼鸟。" * 4, encoding="utf-8")
    report = quickstart.run(
        QuickstartSettings(text=[str(tmp_path / "one.txt")], out=tmp_path / "m", minutes=0.01), quiet=True
    )
    assert "bits_per_byte" not in report.figures and report.counts["held_out_documents"] == 0
    assert "none could be held out" in (tmp_path / "m.run" / "report.html").read_text(encoding="utf-8")


def test_of_a_large_text_the_first_part_is_used_and_said(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "MOST_BYTES", 5000)
    settings = QuickstartSettings(text=[str(texts)], out=tmp_path / "m")
    corpus, notes = quickstart.read(settings, tmp_path / "m.run", quiet=True)
    assert 5000 <= corpus.shards.bytes < 7000 and "Only the first" in notes[0]
    assert len(corpus.held) >= 1
