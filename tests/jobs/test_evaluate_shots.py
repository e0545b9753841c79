"""Few-shot multiple choice beside lm-evaluation-harness: the same examples give the same prompts and scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from langmill.common.settings import EvaluateSettings
from langmill.evaluate.harness import harness_model
from langmill.families.folder import load, save
from langmill.jobs import evaluate, evaluate_rows, evaluate_tasks
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

WORDS = "the cat sat on a mat and 猫坐在垫子上 then قطة ran off far away".split()
ROWS = [
    {
        "question": f"What did {WORDS[i % 9]} do {i}?",
        "choices": [WORDS[(i + k) % 12] + f" {i}" * (k % 2) for k in range(3)],
        "answer": i % 3,
    }
    for i in range(16)
]
ASKED, POOL = ROWS[:10], ROWS[8:]  # two rows are in both, and may not be examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers loads too, and the rows."""
    made = tmp_path_factory.mktemp("shots")
    tokenizer = Tokenizer.train([json.dumps(row, ensure_ascii=False) for row in ROWS], 300)
    vocab = tokenizer.vocab_size
    model = Transformer(ModelConfig(StackConfig(32, 2, 4, 2, 8, 48), Tokens(vocab, 256), head=Head(vocab)))
    init_(model, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    save(model, tokenizer, made / "model")
    for name, rows in (("asked", ASKED), ("pool", POOL)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (made / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return made


def ours(
    folder: Path, out: Path, **given: Any
) -> tuple[list[dict[str, Any]], list[list[tuple[str, str]]], dict[str, Any]]:
    """(the rows of `langmill evaluate`, what the model was asked of each, the figures)."""
    asked: dict[str, list[tuple[str, str]]] = {}
    real = evaluate_tasks.question

    def question(tokenizer: Tokenizer, context: str, choices: Sequence[str], most: int | None) -> Any:
        asked[context] = [(context, choice) for choice in choices]
        return real(tokenizer, context, choices, most)

    settings = EvaluateSettings(
        model=str(folder / "model"),
        on=[str(folder / "asked.jsonl")],
        examples=folder / "pool.jsonl",
        shots=2,
        seed=3,
        device="cpu",
        resamples=20,
        out=out,
        **given,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_tasks, "question", question)
        report = evaluate.run(settings, quiet=True)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return rows, list(asked.values()), dict(report.figures)


def examples(folder: Path, template: str) -> list[dict[str, Any]]:
    """The rows that `langmill evaluate` shows, in their order."""
    settings = EvaluateSettings(
        model="m", on=["none"], examples=folder / "pool.jsonl", shots=2, seed=3, template=template
    )
    by_prompt = {template.replace("{question}", str(row["question"])): row for row in ROWS}
    taken = evaluate_rows.few(settings, "choices", template).taken(
        {template.replace("{question}", str(row["question"])) for row in ASKED}
    )
    return [by_prompt[one.asked] for one in taken]


def harness(model: Any, task: dict[str, Any], shown: list[dict[str, Any]]) -> Any:
    """What the harness makes of the same rows: its own prompts, its own figures."""
    datasets = pytest.importorskip("datasets")
    from lm_eval import simple_evaluate

    return simple_evaluate(
        model=model,
        tasks=[
            {
                "task": "local",
                "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(ASKED)},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{answer}}",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
                "num_fewshot": 2,
                "fewshot_config": {"sampler": "first_n", "samples": shown},
                **task,
            }
        ],
        bootstrap_iters=0,
        log_samples=True,
    )


@pytest.mark.parametrize(
    ("theirs", "template", "task"),
    [
        ("transformers", "Question: {question}\nAnswer:", {"doc_to_text": "Question: {{question}}\nAnswer:"}),
        ("ours", "{question}\nA:\n", {"doc_to_text": "{{question}}\nA:", "target_delimiter": "\n"}),
        ("ours", "问：{question}答：", {"doc_to_text": "问：{{question}}答：", "target_delimiter": ""}),
    ],
)
def test_two_shots_are_those_of_the_harness(
    theirs: str, template: str, task: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    between = {"target_delimiter": ""} if task.get("target_delimiter") == "" else {}
    rows, asked, figures = ours(folder, tmp_path / "rows.jsonl", template=template, **between)
    if theirs == "ours":
        model = harness_model(*load(folder / "model"))
    else:
        from lm_eval.models.huggingface import HFLM

        model = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", add_bos_token=True)
    found = harness(model, task, examples(folder, template))
    samples = sorted(found["samples"]["local"], key=lambda one: one["doc_id"])
    assert len(samples) == len(rows) == len(asked)
    for row, own, sample in zip(rows, asked, samples, strict=True):
        pairs = [tuple(pair) for pair in sample["arguments"]]
        if template[-1:].isspace():  # a difference in words alone: there it stands before each choice
            assert ["".join(pair) for pair in own] == ["".join(pair) for pair in pairs]
        else:
            assert own == pairs
        assert own[0][0].count("What did") == 3
        assert row["logs"] == pytest.approx([float(one[0]) for one in sample["filtered_resps"]], abs=1e-4)
        assert (row["acc"], row["acc_norm"]) == (sample["acc"], sample["acc_norm"])
    for name in ("acc", "acc_norm"):
        assert figures[name] == pytest.approx(found["results"]["local"][f"{name},none"])
