"""Questions that may have no answer: how much likelier that must be is found on what is held out, kept and used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from langmill.apps import answer
from langmill.common.configure import configure
from langmill.common.errors import ModelError
from langmill.common.settings import AnswerSettings, FinetuneSettings
from langmill.families.folder import load, save
from langmill.jobs import finetune
from langmill.model.config import Head, Learned, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Of a few steps, after which a model says "no answer" whatever it is asked."""
    return taught(tmp_path_factory.mktemp("answers"), 5, "num_train_epochs=4")


def taught(folder: Path, none: int, *more: str) -> tuple[Path, dict[str, Any]]:
    """A model and its figures, after questions of which each `none`-th has no answer."""
    rows = []
    for i in range(1, 61):
        context = f"Row {i} was seen by Ada at night. " + "Nothing else is said here at all. " * 4
        given = (
            {"text": ["Ada"], "answer_start": [context.index("Ada")]}
            if i % none
            else {"text": [], "answer_start": []}
        )
        rows.append(json.dumps({"id": str(i), "question": "Who?", "context": context, "answers": given}))
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    tokenizer = Tokenizer.train(rows, 300)
    stack = StackConfig(
        32, 1, 2, 2, 16, 64, norm="layer", norm_eps=1e-12, activation="gelu", gated=False, position=Learned(),
        bias=frozenset({"q", "k", "v", "o", "mlp"}), norm_order="post", causal=False,
    )  # fmt: skip
    head = Head(tokenizer.vocab_size, True, True, "gelu", transform_norm=True)
    model = Transformer(
        ModelConfig(
            encoder=stack, encoder_input=Tokens(tokenizer.vocab_size, 24, types=2, norm=True), head=head
        )
    )
    init_(model, 0)
    save(model, tokenizer, folder / "bert")
    words = [*more, "holdout=0.3", "learning_rate=1e-3", "threads=1", "device=cpu"]
    asked = {"model": str(folder / "bert"), "data": [str(folder / "rows.jsonl")], "task": "answer"}
    report = finetune.run(configure(FinetuneSettings, None, words, **asked, out=folder / "out"), quiet=True)
    return folder / "out", report.figures


def said(folder: Path, *given: str) -> list[dict[str, Any]]:
    asked = {"model": str(folder), "file": str(folder.parent / "rows.jsonl"), "device": "cpu"}
    found: list[dict[str, Any]] = answer.run(
        configure(AnswerSettings, None, [*given], **asked), quiet=True, as_json=True
    ).extra["results"]
    return found


def test_the_threshold_is_kept_with_the_model_and_used(learned: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = learned
    threshold = figures["answer_threshold"]
    counts = json.loads((folder.parent / "out.run/report.json").read_text(encoding="utf-8"))["counts"]
    assert (counts["examples"], counts["held_out_examples"]) == (42, 18) and counts["held_out_windows"] > 36
    assert 0 < threshold < 1e9 and figures["f1"] > 0.2  # a fifth has no answer: more than saying so always
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["answer_threshold"] == threshold
    model: Any = load(folder)[0]
    assert model.config.head.threshold == threshold
    own, named, plain = said(folder), said(folder, f"threshold={threshold}"), said(folder, "threshold=0")
    assert own == named != plain and not any(one["answer"] for one in plain)


def test_where_every_question_has_an_answer_none_is_withheld(tmp_path: Path) -> None:
    folder, figures = taught(tmp_path, 10**6, "max_steps=1")
    assert figures["answer_threshold"] is None
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["answer_threshold"] is None
    loaded: Any = load(folder)[0]
    assert loaded.config.head.threshold is None
    assert "| answer threshold | never |" in (folder / "README.md").read_text(encoding="utf-8")
    report = (tmp_path / "out.run/report.html").read_text(encoding="utf-8")
    assert "never" in report and "1,000,000,000" not in report
    assert all(one["answer"] for one in said(folder)) and not all(
        one["answer"] for one in said(folder, "threshold=0")
    )


@pytest.mark.parametrize("wrong", ["NaN", '"much"', "true"])
def test_a_threshold_that_is_no_number_is_refused(
    learned: tuple[Path, dict[str, Any]], tmp_path: Path, wrong: str
) -> None:
    for file in learned[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    kept = json.dumps(json.loads(text)["answer_threshold"])
    (tmp_path / "config.json").write_text(text.replace(kept, wrong), encoding="utf-8")
    with pytest.raises(ModelError, match="answer_threshold"):
        load(tmp_path)
