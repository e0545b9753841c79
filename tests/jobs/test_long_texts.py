"""Long texts mean the same in training, in its report, to evaluate and in use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from langmill.apps import answer, classify, tag
from langmill.common import settings as s
from langmill.common.configure import configure
from langmill.data.pipeline import Ledger
from langmill.families.folder import load, save
from langmill.jobs import evaluate, finetune, finetune_task
from langmill.model.config import Head, Learned, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tasks import Limit
from langmill.text.tokenizer import Tokenizer

PLACES = ("sea", "farm")


def long_rows(task: str) -> list[dict[str, Any]]:
    """Texts whose end speaks against their beginning, or holds what is asked for."""
    found: list[dict[str, Any]] = []
    for i in range(60):
        first, second = PLACES if i % 2 else PLACES[::-1]
        text = f"{i} " + f"{first} " * 25 + f"{second} " * 60
        if task == "classify":
            found.append({"text": text, "label": first})
        elif task == "tag":
            found.append({"text": text, "spans": [{"start": 0, "end": len(str(i)), "label": first.upper()}]})
        else:
            at = text.index(second)
            given = {"text": [second] if i % 3 else [], "answer_start": [at] if i % 3 else []}
            found.append({"question": "Where?", "context": text, "answers": given})
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.train([json.dumps(row) for row in long_rows("answer")] * 2, 320)
    stack = StackConfig(
        32, 1, 2, 2, 16, 64, norm="layer", norm_eps=1e-12, activation="gelu", gated=False, position=Learned(),
        bias=frozenset({"q", "k", "v", "o", "mlp"}), norm_order="post", causal=False,
    )  # fmt: skip
    vocab = tokenizer.vocab_size
    head = Head(vocab, True, True, "gelu", transform_norm=True)
    model = Transformer(
        ModelConfig(encoder=stack, encoder_input=Tokens(vocab, 64, types=2, norm=True), head=head)
    )
    init_(model, 0)
    folder = tmp_path_factory.mktemp("long") / "bert"
    save(model, tokenizer, folder)
    return folder


COMMANDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "classify": (classify.run, "ClassifySettings", {}),
    "tag": (tag.run, "TagSettings", {}),
    "answer": (answer.run, "AnswerSettings", {"question": "Where?"}),
}


@pytest.mark.parametrize(
    ("task", "policy"), [("classify", None), ("tag", "truncate"), ("answer", None), ("tag", None)]
)
def test_the_reports_figures_are_those_of_evaluate(
    task: str, policy: str | None, base: Path, tmp_path: Path
) -> None:
    file, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    lines = [json.dumps(row) for row in long_rows(task)]
    file.write_text("\n".join(lines), encoding="utf-8")
    given = {"model": str(base), "task": task, "data": [str(file)], "out": tmp_path / "out"}
    quick = ["max_steps=12", "learning_rate=3e-3", "length=24", "overlap=4", "holdout=0.3", "dtype=float32"]
    quick += ["compile=false", "threads=1", "device=cpu", *([f"long_texts={policy}"] if policy else [])]
    settings = configure(s.FinetuneSettings, None, quick, **given)
    work = finetune_task.prepared(settings, *load(base), Ledger(), True)
    assert work.owners is not None
    held.write_text("\n".join(lines[i] for i in sorted({*work.owners[work.held].tolist()})), encoding="utf-8")
    report = finetune.run(settings, quiet=True)

    limit = Limit(24, policy or ("truncate" if task == "classify" else "window"), 4)
    save(*load(tmp_path / "out"), tmp_path / "again")  # as compress and merge do
    for folder in ("out", "again"):
        head = load(tmp_path / folder)[0].config.head  # type: ignore[union-attr]
        assert head is not None and head.limit == limit
    asked = {
        "model": str(tmp_path / "again"),
        "on": [str(held)],
        "dtype": "float32",
        "device": "cpu",
        "task": task,
    }
    again = evaluate.run(s.EvaluateSettings.model_validate(asked), quiet=True)
    same = {name: value for name, value in report.figures.items() if name in again.figures}
    assert {name: again.figures[name] for name in same} == pytest.approx(same, abs=1e-5)
    assert len(same) > 1 and again.counts["rows"] == report.counts["held_out_examples"] == work.count(
        work.held
    )
    told = "truncated" if limit.policy == "truncate" else "windowed"
    assert again.counts[told] == again.counts["rows"]

    run, kind, more = COMMANDS[task]
    words = [row.get("text") or row["context"] for row in map(json.loads, lines[:3])]
    for wanted, own in (
        (told, {}),
        ("windowed", {"long_texts": "window"}),
        ("truncated", {"long_texts": "truncate"}),
    ):
        use = configure(getattr(s, kind), None, [], model=str(tmp_path / "out"), text=words, **more, **own)
        counts = run(use, quiet=True, as_json=True).counts
        assert counts[wanted] == 3 and (wanted == "windowed" or counts["tokens cut off"] > 0)
