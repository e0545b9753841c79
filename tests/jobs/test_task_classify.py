"""Labels that may be numbers or classes: the kind of the task is plain, or the error says how to say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from langmill.common.configure import configure
from langmill.common.errors import DataError
from langmill.common.settings import FinetuneSettings
from langmill.data.pipeline import Ledger
from langmill.jobs.task_classify import prepare
from langmill.jobs.work import Work
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer


def prepared(file: Path, *given: str) -> tuple[Work, Ledger]:
    tokenizer = Tokenizer.train(["a text of words"] * 3, 280)
    vocab = tokenizer.vocab_size
    model = Transformer(ModelConfig(StackConfig(16, 1, 2, 2, 8, 32), Tokens(vocab, 32), head=Head(vocab)))
    asked: dict[str, Any] = {
        "model": "m",
        "task": "classify",
        "data": [str(file)],
        "out": file.parent / "out",
    }
    settings, ledger = configure(FinetuneSettings, None, [*given, "holdout=0.1"], **asked), Ledger()
    return prepare(settings, model, tokenizer, ledger, True), ledger


def rows(folder: Path, labels: list[Any], suffix: str = ".jsonl") -> Path:
    file = folder / f"rows{suffix}"
    if suffix == ".csv":
        lines = ["text,label", *(f"text {i},{label}" for i, label in enumerate(labels))]
    else:
        lines = [json.dumps({"text": f"text {i}", "label": label}) for i, label in enumerate(labels)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_fractions_beside_other_labels_are_no_plain_task(suffix: str, tmp_path: Path) -> None:
    labels: list[Any] = [0.5, 1.25, "good", 2, "bad"] * 6
    with pytest.raises(DataError) as error:
        prepared(rows(tmp_path, labels, suffix))
    for said in ("12 of 30 labels are fractions (", "it is 'good')", "--kind regress", "write words"):
        assert said in str(error.value)
    work, ledger = prepared(tmp_path / f"rows{suffix}", "tasks.kind=regress")
    assert work.facts["labels"] == ["value"] and len(work.train) + len(work.held) == 18
    assert ledger.dropped()["a label that is no number"].documents == 12


def test_fractions_alone_are_numbers_or_must_be_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"12 x a label that is a fraction \(--kind regress"):
        prepared(rows(tmp_path, [0.5, 1.25] * 6))
    with pytest.raises(DataError, match='12 of 12 labels are fractions .*it is "0.5".: to learn numbers'):
        prepared(rows(tmp_path, [0.5, 1.25] * 6, ".csv"))
    work, _ = prepared(rows(tmp_path, ["0.5 stars", "1.25 stars"] * 12, ".csv"))
    assert work.facts["labels"] == ["0.5 stars", "1.25 stars"]


def test_a_slip_is_set_aside(tmp_path: Path) -> None:
    work, ledger = prepared(rows(tmp_path, ["good", "bad"] * 12 + [0.5, 3.0, 3, 3]))
    assert work.facts["labels"] == ["3", "bad", "good"]
    assert sum(count.documents for count in ledger.dropped().values()) == 1
