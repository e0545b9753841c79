"""Zero- and few-shot labels: in any company as alone, and no text among its own examples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langmill import cli
from langmill.apps import classify
from langmill.apps.texts import Row
from langmill.apps.zero_shot import REPLACED, Example, Shots, chooser, shots
from langmill.common.configure import configure
from langmill.common.errors import DataError, UsageError
from langmill.common.metrics import Report
from langmill.common.settings import ClassifySettings
from langmill.families.folder import load, save
from langmill.infer.choices import likelihoods, question_ids
from langmill.model.config import Learned, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.classify import softmax
from langmill.text.tokenizer import Tokenizer

TEMPLATE = "{text} is {label}"
NAMES = ["fox", "dog", "night day"]
ROWS = [
    {"text": " ".join("the quick brown 春眠 fox every day dog".split()[i % 5 : i % 5 + 1 + i % 4]) + f" {i}",
     "label": NAMES[i % 3]}
    for i in range(14)
]  # fmt: skip


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, make: Callable[..., str]) -> str:
    return make(tmp_path_factory.mktemp("decoder") / "model", None, 160)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = Tokenizer.train(["the quick brown fox every day"] * 3, 280)
    stack = StackConfig(
        32, 2, 2, 2, 16, 48, norm="layer", norm_eps=1e-12, activation="gelu", gated=False, position=Learned(),
        bias=frozenset({"q", "k", "v", "o", "mlp"}), norm_order="post", causal=False,
    )  # fmt: skip
    model = Transformer(
        ModelConfig(encoder=stack, encoder_input=Tokens(tokenizer.vocab_size, 16, types=2, norm=True))
    )
    init_(model, 0)
    save(model, tokenizer, folder := tmp_path_factory.mktemp("encoder") / "bert")
    return str(folder)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def run(model: str, **given: Any) -> Report:
    given = {"model": model, "labels": NAMES, "template": TEMPLATE, "device": "cpu"} | given
    return classify.run(configure(ClassifySettings, None, [], **given), quiet=True, as_json=True)


def test_by_likelihood_and_by_similarity(
    encoder: str, decoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (encoder, decoder):
        words = ["classify", model, "a text", "--labels", "one", "--labels", "two", "--json"]
        assert cli.run(words) == 0
        (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
        assert found["label"] in ("one", "two") and sum(found["scores"].values()) == pytest.approx(1)
    assert cli.run(["classify", decoder, "a text", "--labels", "one", "--json"]) == 2
    assert "two labels or more" in capsys.readouterr().err
    for template in ("{text}", "{label}", "{label} {text}", "{label} {text} {label}"):
        with pytest.raises(UsageError, match="ends with {label}"):
            run(decoder, text=["a"], template=template)


def by_hand(folder: str, text: str, before: str) -> list[float]:
    """The scores of one text, with what the template says without it taken away."""
    model, tokenizer = load(folder)
    assert tokenizer is not None

    def logs(text: str) -> np.ndarray[Any, Any]:
        context, going = question_ids(tokenizer, f"{before}{text} is ", NAMES)
        return np.array([one.log for one in likelihoods(model, context, going)])

    return softmax(logs(text) - logs("")).tolist()


@pytest.mark.parametrize("size", [1, 5, 64])
def test_a_text_is_never_its_own_example_and_company_changes_no_score(
    size: int, decoder: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    found = run(decoder, file=path, examples=path, shots=4, batch_size=size)
    assert found.counts[REPLACED] == 4 and found.counts["texts"] == len(ROWS)
    usual = shots(ClassifySettings(model=decoder, labels=NAMES, template=TEMPLATE, examples=path, shots=4))
    results = found.extra["results"]
    assert [one["text"] for one in results] == [row["text"] for row in ROWS]
    replaced = 0
    for row, one in zip(ROWS, results, strict=True):
        others = write(tmp_path / "others.jsonl", [other for other in ROWS if other is not row])
        before = usual
        if f"{row['text']} is " in usual:  # then as many examples of each label as before, and not this one
            replaced += 1
            few = Shots([example(other) for other in ROWS], 4, 0, others, NAMES)
            before = "".join(f"{taken.shown}\n\n" for taken in few.taken({row["text"]}))
            kinds = [taken.kind for taken in few.taken(())]
            assert [taken.kind for taken in few.taken({row["text"]})] == kinds
            assert f"{row['text']} is " not in before and before.count(" is ") == 4
        assert [one["scores"][name] for name in NAMES] == pytest.approx(
            by_hand(decoder, row["text"], before), abs=1e-4
        )
    assert replaced == 4


def example(row: dict[str, Any]) -> Example:
    return Example(row["text"], f"{row['text']} is {row['label']}", row["label"])


def test_the_usual_examples_are_read_once_for_all_batches(decoder: str, tmp_path: Path) -> None:
    path = write(tmp_path / "few.jsonl", ROWS)
    asked = ClassifySettings(model=decoder, labels=NAMES, template=TEMPLATE, examples=path, shots=6)
    model, tokenizer = load(decoder)
    assert tokenizer is not None and isinstance(model, Transformer)
    before = len(tokenizer.encode(shots(asked)))
    read = Counter[str]()
    model.tokens.register_forward_pre_hook(lambda _, given: read.update(tokens=given[0].numel()))
    choose = chooser(asked, model, tokenizer)
    for batch in (["a fox"], ["a dog", "a day"], ["the fox"] * 9):
        assert len(list(choose([Row(text, text, {}) for text in batch], Counter()))) == len(batch)
    assert before > 90 and before < read["tokens"] < before + 13 * 30


def test_a_prompt_that_is_too_long_loses_the_text_s_end_or_is_refused(decoder: str, tmp_path: Path) -> None:
    path = write(tmp_path / "few.jsonl", ROWS)
    long = "the quick brown fox " * 60
    found = run(decoder, text=[long, "a fox"], examples=path, shots=2)
    assert found.counts["texts cut at their end"] == 1 and found.extra["results"][0]["text"] == long
    with pytest.raises(DataError, match="among text 1 to text 2: .* choose truncate"):
        run(decoder, text=[long, "a fox"], long_texts="error")
    with pytest.raises(UsageError, match="fewer --shots"):
        run(decoder, text=["a fox"], examples=path, shots=14 - 2)


def test_examples_are_rows_of_the_labels_and_stand_as_they_are(decoder: str, tmp_path: Path) -> None:
    rows = [{"text": f"t{{label}} {i}", "label": i % 2} for i in range(8)]
    path = write(tmp_path / "few.jsonl", [*rows, {"text": "t", "label": "other"}])
    given = {"model": decoder, "labels": ["0", "1"], "examples": path, "template": TEMPLATE}
    told = shots(configure(ClassifySettings, None, [], **given, shots=4))
    assert told.count("} ") == told.count("t{label} ") == 4 and told.count(" is 0\n\n") == 2
    with pytest.raises(DataError, match="has 4 rows of the label '0' that are not themselves asked: 5 are"):
        shots(configure(ClassifySettings, None, [], **given, shots=10))
    with pytest.raises(DataError, match="line 1 is no row"):
        given["examples"] = write(tmp_path / "bad.jsonl", [{"text": "t"}])
        shots(configure(ClassifySettings, None, [], **given))
    with pytest.raises(UsageError, match="is no file"):
        shots(configure(ClassifySettings, None, [], **given | {"examples": tmp_path / "none"}))
    (tmp_path / "old.jsonl").write_bytes(b'{"text": "\xe9", "label": 0}')
    with pytest.raises(DataError, match=r"old.jsonl is not UTF-8 \(byte 11\)"):
        shots(configure(ClassifySettings, None, [], **given | {"examples": tmp_path / "old.jsonl"}))
    asked = configure(ClassifySettings, None, [], **given | {"examples": path}, text=["a", "b"], batch_size=1)
    counts = classify.run(asked, quiet=True, as_json=True).counts
    assert counts["examples left out, with other labels than those asked: other"] == 1


KINDS = ["a", "b", "c"]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("rstuvwxyz"), st.sampled_from(KINDS)), max_size=30),
    st.integers(0, 7),
    st.integers(0, 3),
    st.sets(st.sampled_from("rstuvwxyz"), max_size=3),
)
def test_examples_are_balanced_drawn_by_the_seed_and_none_is_asked(
    pool: list[tuple[str, str]], count: int, seed: int, asked: set[str]
) -> None:
    examples = [Example(text, f"{text}{number}", kind) for number, (text, kind) in enumerate(pool)]
    try:
        few = Shots(examples, count, seed, None, KINDS)
    except DataError:
        assert any(sum(kind == own for _, own in pool) < -(-count // 3) for kind in KINDS)
        return
    usual, counted = few.taken(()), Counter[str]()
    held = Counter(one.kind for one in usual)
    assert len(usual) == count and all(count // 3 <= held[kind] <= -(-count // 3) for kind in KINDS)
    assert usual == Shots(examples, count, seed, None, KINDS).taken(())
    try:
        taken = few.taken(asked)
    except DataError as error:
        assert "not themselves asked" in str(error)
        return
    few.before(asked, counted)
    assert counted[REPLACED] == sum(one.asked in asked for one in usual)
    assert not any(one.asked in asked for one in taken) and len(set(taken)) == count
    assert [one.kind for one in taken] == [one.kind for one in usual]
    assert set(usual) - set(taken) == {one for one in usual if one.asked in asked}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--labels", "fox", "--labels", " "], "one of --labels is empty"),
        (["--labels", "fox", "--labels", "dog", "--shots", "3"], "--shots is for decoders"),
        (
            ["--labels", "fox", "--labels", "dog", "--template", "{text} {label}"],
            "--template is for decoders",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(
    encoder: str, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["classify", encoder, "a fox", *words]) == 2
    assert why in capsys.readouterr().err
