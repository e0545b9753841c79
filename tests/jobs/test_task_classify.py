"""Labels that may be numbers or classes, rare or at odds: what is plain, what is said, held out and shown of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from langmill.common.configure import configure
from langmill.common.errors import DataError
from langmill.common.settings import FinetuneSettings
from langmill.data.pipeline import Ledger
from langmill.jobs import finetune_task
from langmill.jobs.task_classify import prepare
from langmill.jobs.work import Scored, Work, chosen
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer


def settled(file: Path, *given: str) -> FinetuneSettings:
    asked: dict[str, Any] = {
        "model": "m",
        "task": "classify",
        "data": [str(file)],
        "out": file.parent / "out",
    }
    return configure(FinetuneSettings, None, ["holdout=0.1", *given], **asked)


def prepared(file: Path, *given: str) -> tuple[Work, Ledger]:
    tokenizer = Tokenizer.train(["a text of words"] * 3, 280)
    vocab = tokenizer.vocab_size
    model = Transformer(ModelConfig(StackConfig(16, 1, 2, 2, 8, 32), Tokens(vocab, 32), head=Head(vocab)))
    ledger = Ledger()
    return prepare(settled(file, *given), model, tokenizer, ledger, True), ledger


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


def test_a_rare_label_is_held_out_and_one_that_cannot_be_is_named(tmp_path: Path) -> None:
    work, _ = prepared(rows(tmp_path, ["common"] * 76 + ["rare"] * 4 + ["once"]), "holdout=0.03")
    assert len(work.held) == 2 and 'no held-out text has the label "once" (1 in all)' in work.note
    found = work.score(work.model.eval(), True)
    assert [row["count"] for row in found.extra["by_label"]] == [1, 0, 1]
    assert sum(one["count"] for one in found.extra["calibration"]) == 2
    assert 'note: no held-out text has the label "once"' in "\n".join(finetune_task.aside(work))


def test_equal_texts_with_other_labels_are_counted_and_named(tmp_path: Path) -> None:
    file = rows(tmp_path, ["good", "bad"] * 8)
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines, lines[0].replace("good", "bad"), lines[1]]), encoding="utf-8")
    work, _ = prepared(file)
    assert work.counted["rows whose text others label otherwise"] == 2
    assert f"(such as {file}:1 and {file}:17)" in work.note


def test_windows_are_not_called_texts(tmp_path: Path) -> None:
    file = rows(tmp_path, ["good", "bad"] * 10)
    longer = file.read_text(encoding="utf-8").replace('"text ', '"' + "text of many words " * 9)
    file.write_text(longer, encoding="utf-8")
    work, _ = prepared(file, "tasks.long_texts=window", "tasks.overlap=4")
    assert (work.count(work.train), work.count(work.held)) == (18, 2) and len(work.train) > 36
    card = finetune_task.card(settled(file), work, {"answer_threshold": None})
    assert (
        f"by 18 texts ({len(work.train)} windows)" in card and f"2 texts ({len(work.held)} windows)" in card
    )
    assert "| answer threshold | never |" in card


@pytest.mark.parametrize("kind", ["several", "numbers"])
def test_the_report_shows_each_label_or_how_near_numbers_are(kind: str, tmp_path: Path) -> None:
    labels = [["a"], ["a", "b"], []] * 10 if kind == "several" else [0.5 * number for number in range(30)]
    more = () if kind == "several" else ("tasks.kind=regress",)
    work, _ = prepared(rows(tmp_path, labels), "holdout=0.3", *more)
    found = work.score(work.model.eval(), True)
    title = "Each label" if kind == "several" else "How near"
    assert [name for name, _ in found.sections] == [title]
    if kind == "numbers":
        groups = found.extra["by_value"]
        assert sum(one["count"] for one in groups) == 9 and groups == sorted(
            groups, key=lambda one: one["true"]
        )
        off = sum(one["mean_absolute_error"] * one["count"] for one in groups) / 9
        assert off == pytest.approx(found.figures["mean_absolute_error"])
    else:
        by_label = found.extra["by_label"]
        assert [one["label"] for one in by_label] == ["a", "b"] and min(one["count"] for one in by_label) > 0
        assert sum(one["f1"] for one in by_label) / 2 == pytest.approx(found.figures["macro_f1"])


def test_patience_counts_gains_of_the_figure_alone_also_of_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(Exception):
        pass

    file, asked = rows(tmp_path, ["good", "bad"] * 8), list[int]()
    quick = ("max_steps=40", "eval_every=2", "save_every=2", "patience=2", "dtype=float32", "compile=false")

    def scored(*_: Any) -> Scored:
        asked.append(0)
        if len(asked) == stop:
            raise Cut
        return Scored({"macro_f1": 1.0, "loss": 1 - len(asked) / 100})

    monkeypatch.setattr(finetune_task, "scored", scored)
    for stop in (0, 3):
        settings = settled(file, *quick, "threads=1", "device=cpu")
        work, folder = prepared(file, *quick)[0], tmp_path / f"{stop}.run"
        settings = settings.model_copy(update={"train": chosen(settings, work, True)})
        asked.clear()
        if stop:
            with pytest.raises(Cut):
                finetune_task.learn(settings, work, folder, True)
            settings = settings.model_copy(update={"resume": True})
        outcome = finetune_task.learn(settings, prepared(file, *quick)[0], folder, True)
        assert outcome.steps == outcome.best_step == 6  # of equals the one with the least loss


def test_figures_stand_in_the_report_of_a_task_that_shows_no_more(tmp_path: Path) -> None:
    work, _ = prepared(rows(tmp_path, ["good", "bad"] * 10))
    [(title, shown)] = finetune_task._figures(work, Scored({"mrr": 0.25, "accuracy_16": 0.125}))
    assert (
        title == "How well" and "accuracy 16" in shown and "0.125" in shown and "On 2 held-out texts" in shown
    )
