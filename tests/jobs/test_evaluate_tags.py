"""`langmill evaluate` on rows of tags: spans as conlleval and seqeval count them, in any batch, and two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from langmill.common.errors import DataError, ModelError
from langmill.common.metrics import Report
from langmill.common.settings import EvaluateSettings
from langmill.evaluate.compare import intervals
from langmill.evaluate.labels import span_counts, span_scores, spans
from langmill.families.folder import save
from langmill.jobs import evaluate
from langmill.jobs.evaluate_rows import kind_of
from langmill.model.config import Head, Learned, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
ROWS: list[dict[str, Any]] = [
    {"tokens": f"Ada {i} went to Sankt Pölten , 玛丽 在 巴黎".split(),
     "tags": f"B-PER O O O B-LOC {'I-LOC' if i % 3 else 'O'} O I-PER O B-LOC".split()}
    for i in range(14)
]  # fmt: skip
LONG = {"text": "زارت ماري باريس. " * 9, "spans": [{"start": 5, "end": 9, "label": "PER"}]}


TAGS = Head(len(NAMES), False, True, task="tag", labels=NAMES)


def model(folder: Path, seed: int, head: Head = TAGS) -> str:
    tokenizer = Tokenizer.train([json.dumps(row, ensure_ascii=False) for row in [*ROWS, LONG]], 300)
    stack = StackConfig(
        32, 2, 2, 2, 16, 48, norm="layer", norm_eps=1e-12, activation="gelu", gated=False, position=Learned(),
        bias=frozenset({"q", "k", "v", "o", "mlp"}), norm_order="post", causal=False,
    )  # fmt: skip
    made = Transformer(
        ModelConfig(
            encoder=stack,
            encoder_input=Tokens(tokenizer.vocab_size, 48, types=2, norm=True),
            head=head,
        )
    )
    init_(made, seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)
    save(made, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tags")
    lines = [json.dumps(row, ensure_ascii=False) for row in [*ROWS, LONG]]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"a": model(folder / "a", 0), "b": model(folder / "b", 1), "rows": str(folder / "rows.jsonl")}


def run(name: str, on: str | Path, **given: Any) -> Report:
    asked = {"model": name, "on": [str(on)], "resamples": 60, "device": "cpu", **given}
    return evaluate.run(EvaluateSettings.model_validate(asked), quiet=True)


def test_spans_are_counted_by_hand_and_in_any_batch(at: dict[str, str], tmp_path: Path) -> None:
    report = run(at["a"], at["rows"], out=tmp_path / "o.jsonl", micro_batch_size=1)
    kept = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept[0]["spans"][1] == {"start": 14, "end": 19, "label": "LOC"}
    assert kept[0]["text"][14:19] == "Sankt" and kept[-1]["spans"][0]["label"] == "PER"
    for label in (None, "PER", "LOC"):
        true, said = (
            {(n, s["start"], s["end"], s["label"]) for n, row in enumerate(kept) for s in row[side]
             if label in (None, s["label"])} for side in ("spans", "said")
        )  # fmt: skip
        name = "f1" if label is None else f"f1_{label}"
        assert said and report.figures[name] == pytest.approx(2 * len(true & said) / (len(true) + len(said)))
        low, high = report.figures[f"{name}_interval"]
        assert low <= report.figures[name] <= high
    assert report.counts["rows"] == 15 and report.counts["tags repaired"] == 14
    assert report.counts["windowed"] == 1 and report.extra["record"]["task"] == "tag"
    assert run(at["a"], at["rows"], micro_batch_size=32).figures == report.figures


def test_against_another_model(at: dict[str, str]) -> None:
    found = run(at["a"], at["rows"], against=at["b"]).extra["against"]
    theirs = run(at["b"], at["rows"]).figures
    assert found["f1"]["theirs"] == pytest.approx(theirs["f1"])
    low, high = found["f1"]["interval"]
    assert low <= found["f1"]["difference"] <= high


def test_labels_that_are_not_known_are_named(at: dict[str, str], tmp_path: Path) -> None:
    rows = [*ROWS[:3], {"tokens": ["ACME", "Ltd", "rose"], "tags": ["B-ORG", "I-ORG", "O"]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    report = run(at["a"], path)
    assert report.extra["unknown_labels"] == {"ORG": 1} and report.figures["f1_ORG"] == 0
    assert (
        report.counts["labels the model was not taught"] == 1 and "'ORG' (in 1) is never said" in report.text
    )
    path.write_text(
        json.dumps(rows[3]) + '\n{"tokens": ["a"], "tags": [0]}\n{"tokens": ["a"], "ner_tags": ["O"]}\n'
    )
    with pytest.raises(DataError, match="none of the rows' labels: they are 'ORG', and it says 'LOC', 'PER'"):
        run(at["a"], path)
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    with pytest.raises(DataError, match=r'1 x tags that are numbers .* 1 x no field "tags"'):
        run(at["a"], path, task="tag")
    conll = tmp_path / "rows.conll"
    conll.write_text("\n".join(f"{w}\t{t}" for w, t in zip(rows[0]["tokens"], rows[0]["tags"], strict=True)))
    assert run(at["a"], conll).counts["rows"] == 1
    labels = Head(2, False, True, "tanh", pool="first", task="classify", labels=("a", "b"))
    with pytest.raises(ModelError, match="was not taught to tag"):
        run(model(tmp_path / "labels", 0, labels), conll)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.txt", "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n", "tag"),
        ("a.tsv", "Ada\tB-PER\r\nwent\tO\r\n", "tag"),
        ("a.txt", "Ada\tPROPN\nwent\tVERB\n\n玛丽\tPROPN\n", "tag"),
        ("a.txt", "Ada\tPROPN\nwent\tVERB\n\n", "text"),  # no sentence behind the blank line
        ("a.txt", "Ada went\tto Lagos\n\nThe end\tof it\n", "text"),
        ("a.txt", "Ada went to Lagos.\n\nMary, too.\n", "text"),
        ("a.txt", "one\n\ntwo\n", "text"),
        ("a.tsv", "text\tlabel\nAda\tB-PER\n", "classify"),
        ("a.txt", "", "text"),
    ],
)
def test_words_with_tags_are_told_from_other_texts(name: str, text: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert kind_of(EvaluateSettings(model="m", on=[str(tmp_path / name)])) == kind


def test_the_sums_of_texts_are_the_scores_of_all() -> None:
    truth = [[(0, 1, "A"), (2, 4, "B")], [(0, 2, "A")], []]
    said = [[(0, 1, "A"), (2, 3, "B")], [(0, 2, "B")], [(1, 2, "A")]]
    labels, counts = span_counts(truth, said)
    total, rows = spans(truth, said)
    found = span_scores(labels, counts)
    assert found == {**total, **{f"f1_{row['label']}": row["f1"] for row in rows}}
    assert found["precision"] == 0.25 and found["recall"] == pytest.approx(1 / 3)
    assert "f1_B" not in span_scores(labels, counts[2:])
    between = intervals(lambda k: span_scores(labels, counts[k]), 3, 200)
    values = [
        span_scores(labels, counts[k])["f1_B"]
        for random in [np.random.default_rng(0)]
        for k in (random.integers(3, size=3) for _ in range(200))
        if counts[k][:, 1].any()
    ]
    assert len(values) < 200 and between["f1_B"] == pytest.approx(np.percentile(values, (2.5, 97.5)))


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").touch()
    with pytest.raises(DataError, match=r"--on .*e.jsonl is empty"):
        evaluate.run(EvaluateSettings(model="m", on=[str(tmp_path / "e.jsonl")]))
