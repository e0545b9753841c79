"""`langmill evaluate` on rows: what a row is, its scores in any batch, two models side by side, what is recorded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch

from langmill import cli
from langmill.apps import answer
from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.metrics import Report
from langmill.common.settings import AnswerSettings, EvaluateSettings
from langmill.evaluate.labels import classified
from langmill.families.folder import load, save
from langmill.infer.choices import likelihoods, question_ids
from langmill.infer.generate import generate
from langmill.jobs import evaluate
from langmill.jobs.evaluate_rows import kind_of
from langmill.model.config import Head, Learned, ModelConfig, Sinusoidal, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.answer import exact_match, f1
from langmill.text.tokenizer import Tokenizer

WORDS = "the cat sat on a mat and 猫坐在垫子上 then قطة ran off far away".split()
CHOICES = [
    {
        "question": f"What did {WORDS[i % 9]} do {i}?",
        "choices": [WORDS[(i + k) % 12] for k in range(4)],
        "answer": i % 4,
    }
    for i in range(40)
]
PROMPTS = [{"prompt": f"{WORDS[i % 9]} {WORDS[i % 5]}", "answer": [WORDS[i % 7], "mat"]} for i in range(12)]
LABELLED = [
    {"text": " ".join(WORDS[i % 5 : i % 5 + i % 6 + 1]), "label": "yes" if i % 3 else "no"} for i in range(30)
]
PAIRS = [
    {"translation": {"en": f"{WORDS[i % 9]} {WORDS[i % 4]}.", "de": f"{WORDS[i % 7]} und {WORDS[i % 5]}."}}
    for i in range(8)
]
LONG = " ".join(WORDS)
CONTEXTS = [
    {
        "question": f"What did {WORDS[i]}?",
        "context": LONG * (1 + i % 2),
        "answers": {"text": [word], "answer_start": [LONG.index(word)]}
        if word
        else {"text": [], "answer_start": []},
    }
    for i, word in enumerate(("cat sat", "mat", "", "猫坐在垫子上", "ran off"))
]
LENGTH = 96


def shuffled(model: Transformer, seed: int) -> Transformer:
    init_(model, seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    files = {
        "choices": CHOICES, "generate": PROMPTS, "classify": LABELLED, "translate": PAIRS, "answer": CONTEXTS
    }  # fmt: skip
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = Tokenizer.train([json.dumps(row, ensure_ascii=False) for row in CHOICES + LABELLED], 300)
    vocab, bias = tokenizer.vocab_size, frozenset({"q", "k", "v", "o", "mlp"})
    plain = ModelConfig(StackConfig(32, 2, 4, 2, 8, 48), Tokens(vocab, LENGTH), head=Head(vocab))
    shape: dict[str, Any] = {
        "dim": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16, "hidden": 48, "norm": "layer",
        "activation": "gelu", "gated": False, "bias": bias, "norm_order": "post",
    }  # fmt: skip
    reader = ModelConfig(
        encoder=StackConfig(**shape, norm_eps=1e-12, position=Learned(), causal=False),
        encoder_input=Tokens(vocab, 32, types=2, norm=True),
        head=Head(2, False, True, "tanh", pool="first", task="classify", labels=("no", "yes")),
    )
    waves: dict[str, Any] = {**shape, "norm_eps": 1e-5, "position": Sinusoidal()}
    writer = ModelConfig(
        encoder=StackConfig(**waves, causal=False),
        encoder_input=Tokens(vocab, 64, scale=32**0.5),
        decoder=StackConfig(**waves, cross=True),
        decoder_input=Tokens(vocab, 64, scale=32**0.5, start=tokenizer.pad_id),
        head=Head(vocab, True, True),
    )
    points = replace(reader, head=Head(2, False, True, task="answer"))
    named = {"a": plain, "b": plain, "bert": reader, "marian": writer, "points": points}
    for seed, (name, config) in enumerate(named.items()):
        save(shuffled(Transformer(config), seed), tokenizer, folder / name)
    return {path.stem: str(path) for path in folder.iterdir()}


def run(model: str, *on: str | Path, **given: Any) -> Report:
    given = {"device": "cpu", "resamples": 50} | given
    return evaluate.run(EvaluateSettings(model=model, on=[str(path) for path in on], **given), quiet=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


MODELS = {"choices": "a", "generate": "a", "classify": "bert", "translate": "marian", "answer": "points"}


@pytest.mark.parametrize("task", list(MODELS))
def test_the_score_is_the_same_in_batches_of_1_and_32(task: str, at: dict[str, str], tmp_path: Path) -> None:
    found = [
        run(
            at[MODELS[task]],
            at[task],
            micro_batch_size=size,
            max_new_tokens=6,
            out=tmp_path / f"{size}.jsonl",
        )
        for size in (1, 32)
    ]
    assert found[0].extra["record"]["task"] == task  # found from the fields
    assert found[0].figures.keys() == found[1].figures.keys()
    for name, value in found[0].figures.items():
        assert value == pytest.approx(found[1].figures[name], rel=1e-5)
    assert all(f"{name}_interval" in found[0].figures for name in found[0].figures if "interval" not in name)
    one, many = rows_of(tmp_path / "1.jsonl"), rows_of(tmp_path / "32.jsonl")
    assert [row["where"] for row in one] == [row["where"] for row in many] and len(one) == found[0].counts[
        "rows"
    ]
    assert [row.get("said") for row in one] == [row.get("said") for row in many]


def test_multiple_choice_by_hand(at: dict[str, str], tmp_path: Path) -> None:
    report = run(at["a"], at["choices"], out=tmp_path / "rows.jsonl")
    model, tokenizer = load(at["a"])
    assert tokenizer is not None
    hits = []
    for row, kept in zip(CHOICES, rows_of(tmp_path / "rows.jsonl"), strict=True):
        texts = [f" {choice}" for choice in row["choices"]]
        context, going = question_ids(tokenizer, f"Question: {row['question']}\nAnswer:", texts)
        logs = [one.log for one in likelihoods(model.eval(), context, going)]
        assert kept["logs"] == pytest.approx(logs, abs=1e-4)
        normed = [log / len(choice) for log, choice in zip(logs, row["choices"], strict=True)]
        hits.append([np.argmax(logs) == row["answer"], np.argmax(normed) == row["answer"]])
    assert [report.figures["acc"], report.figures["acc_norm"]] == pytest.approx(
        np.mean(hits, axis=0).tolist()
    )
    assert "multiple choice" in report.text and "95 % interval" in report.text


def test_what_is_recorded(at: dict[str, str]) -> None:
    found = run(at["a"], at["choices"], seed=7, micro_batch_size=4).extra["record"]
    assert found["template"] == "Question: {question}\nAnswer:"
    assert found["template_sha256"] == hashlib.sha256(found["template"].encode()).hexdigest()
    path = Path(at["choices"])
    assert found["files"] == {path.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()}
    assert (found["seed"], found["micro_batch_size"], found["resamples"]) == (7, 4, 50)
    assert found["models"][at["a"]] == {"dtype": "float32", "device": "cpu"}
    assert found["versions"]["torch"] and found["versions"]["python"]
    json.dumps(found)


def test_examples_stand_before_the_prompt_and_are_never_those_asked(
    at: dict[str, str], tmp_path: Path
) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in CHOICES[:6]), encoding="utf-8"
    )
    given = {"examples": Path(at["choices"]), "template": "{question}"}
    none = run(at["a"], asked, template="{question}", out=tmp_path / "0.jsonl")
    two = run(at["a"], asked, shots=2, **given, out=tmp_path / "2.jsonl")
    assert two.extra["record"]["examples_sha256"] and none.extra["record"]["examples_sha256"] is None
    assert rows_of(tmp_path / "0.jsonl")[0]["logs"] != rows_of(tmp_path / "2.jsonl")[0]["logs"]
    again = run(at["a"], asked, shots=2, **given)
    assert again.extra["record"] == two.extra["record"]
    many = run(at["a"], asked, shots=20, **given)
    assert many.counts["prompts cut at their beginning"] == 6
    assert many.counts["examples that were themselves asked and replaced"] >= 1
    with pytest.raises(DataError, match="34 rows that are not themselves asked: 35 are needed"):
        run(at["a"], asked, shots=35, **given)
    with pytest.raises(UsageError, match="--examples"):
        run(at["a"], asked, shots=1)


def test_generation_by_hand(at: dict[str, str], tmp_path: Path) -> None:
    report = run(at["a"], at["generate"], max_new_tokens=5, out=tmp_path / "rows.jsonl")
    model, tokenizer = load(at["a"])
    scores = []
    for row, kept in zip(PROMPTS, rows_of(tmp_path / "rows.jsonl"), strict=True):
        said = "".join(
            generate(model.eval(), tokenizer, row["prompt"], max_new_tokens=5, stop=("\n",))
        ).strip()
        assert kept["said"] == said
        scores.append(f1(said, row["answer"]))
    assert report.figures["f1"] == pytest.approx(np.mean(scores))
    right = tmp_path / "right.jsonl"
    rows = [{"prompt": row["prompt"], "answer": one["said"] or "x"} for row, one in
            zip(PROMPTS, rows_of(tmp_path / "rows.jsonl"), strict=True)]  # fmt: skip
    right.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run(at["a"], right, max_new_tokens=5).figures["exact_match"] == 1.0


def test_answers_found_in_texts_by_hand(at: dict[str, str], tmp_path: Path) -> None:
    report = run(at["points"], at["answer"], out=tmp_path / "rows.jsonl")
    used = answer.run(
        AnswerSettings(model=at["points"], file=Path(at["answer"]), device="cpu"),
        quiet=True,
        as_json=True,
    )
    rows, own = rows_of(tmp_path / "rows.jsonl"), used.extra["results"]
    assert [row["said"] for row in rows] == [one["answer"] for one in own] and len(rows) == 5
    marks = [
        (exact_match(r["said"], r["answers"] or ("",)), f1(r["said"], r["answers"] or ("",))) for r in rows
    ]
    assert [report.figures["exact_match"], report.figures["f1"]] == pytest.approx(
        np.mean(marks, axis=0).tolist()
    )
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps(CONTEXTS[0]) + "\n" + json.dumps({"context": "the cat", "question": " "}))
    with pytest.raises(DataError, match=r"silent.jsonl, line 2 has no question"):
        answer.run(AnswerSettings(model=at["points"], file=silent, device="cpu"), quiet=True, as_json=True)
    plain = run(at["a"], at["answer"], max_new_tokens=3)
    assert plain.extra["record"]["task"] == "generate"  # another model writes its answers
    with pytest.raises(ModelError, match="marian writes no text by itself"):
        run(at["marian"], at["answer"])
    with pytest.raises(ModelError, match="was not taught to answer"):
        run(at["a"], at["answer"], task="answer")


def test_a_taught_classifier_and_a_label_that_it_does_not_know(at: dict[str, str], tmp_path: Path) -> None:
    report = run(at["bert"], at["classify"], out=tmp_path / "rows.jsonl")
    kept = rows_of(tmp_path / "rows.jsonl")
    truth = [int(row["label"] == "yes") for row in LABELLED]
    shares = [
        [1 - r["score"], r["score"]] if r["said"] == "yes" else [r["score"], 1 - r["score"]] for r in kept
    ]
    expected = classified(truth, shares)
    for name in ("accuracy", "macro_f1", "calibration_error"):
        assert report.figures[name] == pytest.approx(expected[name])
    odd = tmp_path / "odd.jsonl"
    odd.write_text("".join(json.dumps(row) + "\n" for row in [*LABELLED, {"text": "a", "label": "perhaps"}]))
    more = run(at["bert"], odd)
    assert more.counts["labels the model was not taught"] == 1 and more.counts["rows"] == 31
    assert more.extra["unknown_labels"] == {"perhaps": 1} and "'perhaps' (in 1) is never said" in more.text
    assert more.figures["accuracy"] == pytest.approx(expected["accuracy"] * 30 / 31)
    odd.write_text('{"text": "a", "label": "ja"}\n{"text": "b", "label": 1}\n')
    with pytest.raises(
        DataError, match="none of the rows' labels: they are '1', 'ja', and it says 'no', 'yes'"
    ):
        run(at["bert"], odd)


def test_labels_that_a_decoder_was_never_taught(at: dict[str, str], tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    rows = [*LABELLED, {"text": "the cat sat " * 60, "label": "no"}]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = run(at["a"], long, template="{text}: {label}")
    assert report.counts == {"rows": 31, "set_aside": 0, "texts cut at their end": 1}
    assert report.extra["record"]["template"] == "{text}: {label}" and 0 <= report.figures["macro_f1"] <= 1
    few = run(at["a"], at["classify"], template="{text}: {label}", shots=2, examples=Path(at["classify"]))
    assert few.extra["record"]["shots"] == 2
    assert few.counts["examples that were themselves asked and replaced"] >= 2


def test_translation_is_scored_as_sacrebleu_does(at: dict[str, str], tmp_path: Path) -> None:
    report = run(at["marian"], at["translate"], beams=2, max_new_tokens=8, out=tmp_path / "rows.jsonl")
    kept = rows_of(tmp_path / "rows.jsonl")
    said, wanted = [row["said"] for row in kept], [[row["target"] for row in kept]]
    assert report.figures["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, wanted).score)
    assert report.figures["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, wanted).score)
    back = run(at["marian"], at["translate"], source="de", target="en", beams=1, max_new_tokens=4)
    assert back.counts["rows"] == 8


@pytest.mark.parametrize("task", ["choices", "text"])
def test_against_another_model_on_the_same_rows(task: str, at: dict[str, str], tmp_path: Path) -> None:
    report = run(
        at["a"], at["classify" if task == "text" else task], against=at["b"], task=task, out=tmp_path / "o"
    )
    alone = [run(at[name], at["classify" if task == "text" else task], task=task) for name in ("a", "b")]
    name = "acc" if task == "choices" else "bits_per_byte"
    found = report.extra["against"][name]
    assert [found["ours"], found["theirs"]] == pytest.approx([one.figures[name] for one in alone])
    assert found["difference"] == pytest.approx(found["ours"] - found["theirs"])
    low, high = found["interval"]
    assert low <= found["difference"] <= high
    assert found["verdict"] in ("better", "worse", "no difference shown") and found["verdict"] in report.text
    assert {row["model"] for row in rows_of(tmp_path / "o")} == {at["a"], at["b"]}
    same = run(at["a"], at["choices"], against=at["a"]).extra["against"]["acc"]
    assert same["verdict"] == "no difference shown" and same["interval"] == [0.0, 0.0]


def test_bad_rows_are_counted_under_their_reasons(at: dict[str, str], tmp_path: Path) -> None:
    bad = [
        {"question": "q", "choices": ["one"], "answer": 0},
        {"question": "q", "choices": ["one", ""], "answer": 0},
        {"question": "q", "choices": ["one", "two"], "answer": 2},
        {"question": "q", "choices": ["one", "two"], "answer": True},
        {"choices": ["one", "two"], "answer": 0},
        [1],
    ]
    path = tmp_path / "bad.jsonl"
    good = [*CHOICES[:2], {"question": "q", "choices": ["one", "two"], "answer": "two"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in good + bad), encoding="utf-8")
    report = run(at["a"], path)
    assert report.counts["rows"] == 3 and report.counts["set_aside"] == 6
    for reason in ("no two choices", "a choice that is no text", 'no text in the field "question"'):
        assert f"1 x {reason}" in report.text
    assert "2 x an answer that is none of the choices" in report.text
    path.write_text(json.dumps(bad[0]), encoding="utf-8")
    with pytest.raises(DataError, match="no row for choices: 1 x no two choices"):
        run(at["a"], path)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"context": "c", "choices": ["a", "b"], "answer": 0}, "choices"),
        ({"question": "q", "context": "c", "answers": {"text": ["c"]}}, "generate"),
        ({"text": "t", "label": 1}, "classify"),
        ({"source": "s", "target": "t"}, "translate"),
        ({"tokens": ["t"], "tags": ["O"]}, "tag"),
        ({"text": "t", "spans": []}, "tag"),
        ({"anchor": "a", "positive": "b"}, "embed"),
        ({"text_a": "a", "text_b": "b"}, "embed"),
        (["a", "b"], "embed"),
        ({"sentence1": "a", "sentence2": "b", "score": 1}, "sts"),
        ({"text_a": "a", "text_b": "b", "score": 1}, "sts"),
        ({"text": "t", "id": 1}, "text"),
        ([1, 2], "text"),
    ],
)
def test_the_kind_of_rows_is_found_from_the_fields(row: Any, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert kind_of(EvaluateSettings(model="m", on=[str(path)])) == kind
    assert kind_of(EvaluateSettings(model="m", on=[str(path)], task="text")) == "text"
    assert kind_of(EvaluateSettings(model="m", on=[str(tmp_path)])) == "text"


def test_the_command_line(at: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    words = [
        "evaluate",
        at["a"],
        "--on",
        at["choices"],
        "--out",
        str(out),
        "--resamples",
        "20",
        "--json",
        "--quiet",
    ]
    assert cli.run([*words, "--against", at["b"]]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["out"] == str(out) and found["against"]["model"] == at["b"] and len(rows_of(out)) == 80
    assert cli.run(words) == 2 and "--force" in capsys.readouterr().err
    assert cli.run(["evaluate", at["bert"], "--on", at["choices"], "--quiet"]) == 1
    assert "take a decoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"task": "text", "shots": 1}, "--shots does nothing for text rows"),
        ({"task": "choices", "split": "held_out"}, "--split does nothing"),
        ({"task": "translate", "template": "{text}"}, "--template does nothing"),
        ({"task": "choices", "chat": True}, "--chat does nothing"),
        ({"task": "classify", "target_delimiter": ""}, "--target_delimiter does nothing"),
        ({"task": "choices", "source": "en"}, "--source does nothing"),
        ({"task": "translate", "source": "en"}, "come together"),
        ({"task": "choices", "template": "no field"}, "has fields of the rows"),
    ],
)
def test_no_setting_is_passed_over_in_silence(given: dict[str, Any], said: str, at: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=said):
        run(at["a"], at["choices"], **given)
    with pytest.raises(UsageError, match="zero-shot"):
        run(at["bert"], at["classify"], template="{text} {label}")
