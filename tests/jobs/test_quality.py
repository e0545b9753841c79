"""A classifier and a tagger in `data prepare`: scores are those of `langmill classify`, names are replaced, and what is
wrong with a model is told before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tests.data.test_prepare import batch
from tests.jobs.test_prepare import sentence
from tests.privacy.test_names import PEOPLE, saved

from langmill.apps import classify
from langmill.cli import run as cli
from langmill.common.errors import ModelError, UsageError
from langmill.common.settings import ClassifySettings, PrepareSettings
from langmill.families import folder as folders
from langmill.jobs import prepare
from langmill.jobs.quality import Quality
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

TEXTS = [sentence(i, 6 + i) for i in range(12)]


def judge(folder: Path, labels: tuple[str, ...] = ("bad", "good")) -> str:
    """A classifier of random weights."""
    tokenizer = Tokenizer.train(TEXTS, vocab_size=300)
    stack = StackConfig(dim=32, layers=1, heads=4, kv_heads=2, head_dim=8, hidden=48)
    head = Head(len(labels), tied=False, bias=False, task="classify", labels=labels, pool="last")
    model = Transformer(ModelConfig(stack, Tokens(tokenizer.vocab_size, 64), head=head))
    init_(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    folders.save(model, tokenizer, folder, replace=True)
    return str(folder)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "raw" / "rows.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path / "raw"


def settings(raw: Path, **more: object) -> PrepareSettings:
    made = {"source": [str(raw)], "out": raw.parent / "out", "workers": 1, "duplicates": {"near": None}}
    return PrepareSettings(**(made | {"language": {"detect": False}} | more))


def test_scores_are_those_of_classify_and_the_low_ones_go(tmp_path: Path, raw: Path) -> None:
    model = judge(tmp_path / "model")
    asked = ClassifySettings(model=model, text=TEXTS, long_texts="truncate", threads=1)
    said = classify.run(asked, quiet=True, as_json=True).extra["results"]
    scores = [row["scores"]["good"] for row in said]
    assert Quality(model, "good", 0).scores(TEXTS).tolist() == pytest.approx(scores, abs=1e-6)
    middle = sorted(scores)[6] - 1e-9
    made = settings(raw, quality={"model": model, "at_least": middle})
    report = prepare.run(made, quiet=True)
    rows = pq.read_table(tmp_path / "out" / "clean").to_pylist()
    assert len(rows) == 6 == report.counts["dropped"]
    kept = [score for score in scores if score >= middle]
    assert [json.loads(row["meta"])["quality"] for row in rows] == pytest.approx(kept, abs=1e-3)
    assert report.extra["units"]["reused"] == 0
    assert prepare.run(made, quiet=True).extra["units"]["reused"] == 1
    judge(tmp_path / "model", ("worse", "good"))  # another model in the same folder: all is done anew
    assert prepare.run(made, quiet=True).extra["units"]["reused"] == 0
    for file in (tmp_path / "model").iterdir():
        file.unlink()
    left = pq.read_table(tmp_path / "out" / "clean")["id"][0].as_py()  # what is forgotten needs no model
    assert cli(["data", "forget", str(tmp_path / "out"), "--id", left, "--quiet"]) == 0
    long = "word " * 5000
    assert len(Quality(judge(tmp_path / "again"), "good", 0)(batch(long, "", "x"))) == 3


def test_what_is_wrong_with_a_model_is_told_before_any_work(tmp_path: Path, raw: Path) -> None:
    model, tagger = judge(tmp_path / "model"), saved(tmp_path / "tagger", PEOPLE)
    wrong: list[tuple[dict[str, object], str, type[Exception]]] = [
        ({"quality": {"model": model, "label": "best"}}, "knows bad, good", UsageError),
        ({"quality": {"model": tagger}}, "not taught to classify", ModelError),
        ({"redact": {"names": model}}, "not taught to tag", ModelError),
        ({"redact": {"names": tagger, "policy": "none"}}, "redact.policy", UsageError),
        ({"redact": {"names": str(tmp_path / "no")}}, "does not exist", UsageError),
        ({"rules": {"words_at_most": ["rude=1"]}}, "no list is called 'rude'", UsageError),
        ({"rules": {"words": ["rude=no.txt"]}}, "no.txt is no file", UsageError),
    ]
    for more, told, kind in wrong:
        with pytest.raises(kind, match=told):
            prepare.run(settings(raw, **more), quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_tagger_finds_the_names_that_patterns_do_not(tmp_path: Path, raw: Path) -> None:
    tagger = saved(tmp_path / "tagger", PEOPLE)
    prepare.run(settings(raw, redact={"names": tagger, "policy": "label"}), quiet=True)
    rows = pq.read_table(tmp_path / "out" / "clean").to_pylist()
    found = [json.loads(row["meta"]).get("redacted", {}) for row in rows]
    assert any(one.get("person", 0) + one.get("address", 0) for one in found)
    assert any("[PERSON]" in row["text"] or "[ADDRESS]" in row["text"] for row in rows)
