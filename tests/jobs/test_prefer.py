"""Preferences to an adapter, end to end on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from langmill.common.configure import configure
from langmill.common.errors import DataError, SettingsError
from langmill.common.metrics import Report
from langmill.common.settings import FinetuneSettings, ModelSettings
from langmill.families.folder import load, save
from langmill.jobs import finetune, prefer
from langmill.jobs.pretrain import fresh
from langmill.jobs.size import config_for
from langmill.text.tokenizer import Tokenizer
from langmill.train import measure

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FEW = (
    "max_steps=8",
    "micro_batch_size=2",
    "learning_rate=0.002",
    "dtype=float32",
    "compile=false",
    "threads=1",
    "save_every=3",
    "holdout=0.2",
)


def preferences(count: int = 40) -> list[dict[str, Any]]:
    """Kind answers are chosen, curt ones are not; as messages and as text."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        asked, kind, curt = (
            f"How much is item {i}?",
            f"Item {i} costs {i * 3} euros, thank you.",
            f"No idea {i}.",
        )
        if i % 2:
            rows.append({"prompt": asked, "chosen": " " + kind, "rejected": " " + curt})
        else:
            user = {"role": "user", "content": asked}
            both = [[user, {"role": "assistant", "content": text}] for text in (kind, curt)]
            rows.append({"chosen": both[0], "rejected": both[1]})
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = Tokenizer.train([json.dumps(row) for row in preferences()], 400).with_template(TEMPLATE)
    save(fresh(config_for(ModelSettings(size="200k"), tokenizer.vocab_size, 256), 0), tokenizer, folder)
    return folder


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "matmul_flops", lambda dtype, device: 1e9)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answers before and after: they take longer than all else."""
    monkeypatch.setattr(prefer, "ask", lambda *given, **named: [])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "preferences.jsonl", preferences())


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def settings(base: Path, data: Path, out: Path, *more: str, **named: Any) -> FinetuneSettings:
    return configure(
        FinetuneSettings,
        None,
        [*FEW, *more],
        model=str(base),
        data=[str(data)],
        out=out,
        task="prefer",
        **named,
    )


def better(report: Report) -> None:
    f = report.figures
    assert f["loss"] < f["before_loss"]
    assert f["margin"] > f["before_margin"] and f["accuracy"] > f["before_accuracy"]


@pytest.mark.parametrize("loss", ["ipo", "kto", "orpo", "simpo"])
def test_every_loss_raises_margin_and_accuracy(
    base: Path, data: Path, tmp_path: Path, silent: None, loss: str
) -> None:
    report = finetune.run(settings(base, data, tmp_path / "mine", f"prefer.loss={loss}"), quiet=True)
    better(report)
    assert report.counts["pairs"] + report.counts["held_out_pairs"] == (80 if loss == "kto" else 40)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_dpo_starts_at_its_reference_and_leaves_it(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    if method != "lora":
        monkeypatch.setattr(prefer, "ask", lambda *given, **named: [])
    report = finetune.run(settings(base, data, tmp_path / "mine", method=method), quiet=True)
    better(report)
    f = report.figures
    assert (f["before_margin"], f["before_accuracy"]) == (0, 0.5)
    assert f["before_loss"] == pytest.approx(0.693147, abs=1e-6)
    folder = tmp_path / "mine.run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["eval_accuracy"] for row in rows if "eval_accuracy" in row][-1] == f["accuracy"]
    assert {"eval_loss", "eval_margin"} <= {name for row in rows for name in row}
    first = next(row for row in rows if "tokens" in row)
    assert first["tokens"] > 8 * 2 * 2, "tokens are counted, not pairs"
    page = (folder / "report.html").read_text("utf-8")
    assert "Prefers the chosen answer" in page and "http" not in page.split("<main>")[1]
    assert "preferences (DPO" in (tmp_path / "mine" / "README.md").read_text("utf-8")
    _, tokenizer = load(tmp_path / "mine")
    assert tokenizer is not None and tokenizer.chat_template == TEMPLATE
    if method == "lora":
        assert report.counts["answered"] == report.counts["held_out_pairs"] == 8


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_killed_run_goes_on_to_the_same_bytes_and_reads_its_reference(
    base: Path, data: Path, tmp_path: Path, silent: None, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    more = (f"prefer.loss={loss}", "gradient_accumulation_steps=2")
    finetune.run(settings(base, data, tmp_path / "whole", *more), quiet=True)
    fit, scores, counted = prefer.fit, prefer.scores, list[int]()

    def killed(*arguments: Any, **named: Any) -> Any:
        def stop(step: int, state: Any) -> None:
            if step == 5:
                raise KeyboardInterrupt

        return fit(*arguments, **named, hooks=[stop])

    def noted(model: Any, pairs: Any, numbers: Any, *more: Any) -> Any:
        counted.append(len(numbers))
        return scores(model, pairs, numbers, *more)

    monkeypatch.setattr(prefer, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(settings(base, data, tmp_path / "cut", *more), quiet=True)
    reference = tmp_path / "cut.run" / "reference.safetensors"
    kept = reference.read_bytes()
    monkeypatch.setattr(prefer, "fit", fit)
    monkeypatch.setattr(prefer, "scores", noted)
    finetune.run(settings(base, data, tmp_path / "cut", *more, resume=True), quiet=True)
    assert counted and max(counted) <= (16 if loss == "kto" else 8), "only what is held out is read again"
    assert reference.read_bytes() == kept
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_bad_rows_are_named_and_counted(base: Path, tmp_path: Path, silent: None) -> None:
    bad = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "completion": "b", "label": True},
        {"text": "x"},
        {"prompt": "How much?", "chosen": " It is 3.", "rejected": " euros" * 300},
    ]
    data = write(tmp_path / "bad.jsonl", [*preferences(6), *bad])
    given = settings(base, data, tmp_path / "drop", "train.max_length=64")
    _, tokenizer = load(base)
    assert tokenizer is not None
    ready = prefer.prepare(given, tokenizer, 256, tmp_path / "errors.jsonl", quiet=True)
    dropped = {reason: count.documents for reason, count in ready.ledger.dropped().items()}
    assert (
        dropped == {"not a usable preference": 3, "longer than train.max_length": 1} and len(ready.pairs) == 6
    )
    ready.ledger.check()
    errors = (tmp_path / "errors.jsonl").read_text("utf-8")
    assert "are the same" in errors and "prefer.loss=kto" in errors and "this one has text" in errors
    cut = settings(base, data, tmp_path / "cut", "train.max_length=64", too_long="truncate")
    ready = prefer.prepare(cut, tokenizer, 256, None, quiet=True)
    assert len(ready.pairs) == 7 and ready.counted == {"truncated": 1}
    kto = settings(base, data, tmp_path / "kto", "train.max_length=64", "prefer.loss=kto")
    assert len(prefer.prepare(kto, tokenizer, 256, None, quiet=True).pairs) == 13
    with pytest.raises(DataError, match=r"no preference is left.*1 not a usable preference.*are the same"):
        finetune.run(settings(base, write(tmp_path / "none.jsonl", bad[:1]), tmp_path / "none"), quiet=True)


def test_settings_that_contradict_each_other_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    for wrong, words in (
        ("prefer.simpo_gamma=1", "is for simpo, and prefer.loss is dpo"),
        ("prefer.desirable_weight=2", "is for kto"),
        ("too_long=split", "cannot be compared in pieces"),
    ):
        with pytest.raises(SettingsError, match=words):
            finetune.run(settings(base, data, tmp_path / "no", wrong), quiet=True)


def test_the_preview_shows_both_answers(base: Path, data: Path, tmp_path: Path) -> None:
    text = finetune.run(settings(base, data, tmp_path / "no", preview=1), quiet=True).text
    assert "chosen" in text and "rejected" in text
    assert "⟦Item 0 costs 0 euros, thank you.<|im_end|>⟧" in text and "⟦No idea 0.<|im_end|>⟧" in text


def test_steps_time_and_memory_are_told_before_the_run(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.run(settings(base, data, tmp_path / "m", "train.max_length=64", "max_steps=1"))
    assert re.search(r"about 1 steps of 1 × \d+ × 128 tokens, .*; memory about", capsys.readouterr().err)
