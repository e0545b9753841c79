"""Labels, tags, answers, translations and pairs to a model and back to results, on tiny models."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from langmill.apps import answer, classify, embed, tag, translate
from langmill.common import settings as s
from langmill.common.configure import configure
from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.metrics import Report
from langmill.families.folder import load, save
from langmill.jobs import finetune, finetune_task
from langmill.model.config import Head, Learned, ModelConfig, Sinusoidal, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tasks import Limit, encode_texts
from langmill.text.tokenizer import Tokenizer
from langmill.text.translate import encode_source

TOPICS = {
    "sea": "wave ship sail tide harbour fish 海 船".split(),
    "farm": "cow barn hay tractor field wheat 牛 田".split(),
    "sky": "cloud star moon plane wind comet 月 星".split(),
}
FILLER = "the a of on by near old big small green".split()
NAMES, PLACES = ["Ada", "Omar", "Li Wei"], ["Paris", "Cairo", "Oslo"]
ENGLISH = dict(
    zip("one two three red blue cat dog".split(), "eins zwei drei rot blau katze hund".split(), strict=True)
)
QUICK = ("dtype=float32", "compile=false", "threads=1", "learning_rate=0.003", "holdout=0.15")


def texts(count: int = 240) -> list[dict[str, Any]]:
    draw, rows = random.Random(0), []
    for _ in range(count):
        label = draw.choice(list(TOPICS))
        words = [draw.choice(FILLER) if draw.random() < 0.5 else draw.choice(TOPICS[label]) for _ in range(9)]
        rows.append({"text": " ".join([*words, draw.choice(TOPICS[label])]), "label": label})
    return rows


def tagged(count: int = 200) -> list[dict[str, Any]]:
    draw, rows = random.Random(1), []
    for _ in range(count):
        name, place = draw.choice(NAMES).split(), draw.choice(PLACES)
        tokens = [*name, "went", "from", "the", draw.choice(FILLER), "farm", "to", place, "."]
        first = ["B-PER"] + ["I-PER"] * (len(name) - 1)
        rows.append({"tokens": tokens, "tags": [*first, *["O"] * 6, "B-LOC", "O"]})
    return rows


def questions(count: int = 200) -> list[dict[str, Any]]:
    draw, rows = random.Random(2), []
    for i in range(count):
        name, place, thing = draw.choice(NAMES), draw.choice(PLACES), draw.choice(FILLER)
        context = f"In {place} the {thing} number {i} was seen by {name} at night."
        asked, found = draw.choice([("Who saw it?", name), ("Where was it?", place)])
        answers = {"text": [found], "answer_start": [context.index(found)]}
        rows.append({"id": str(i), "question": asked, "context": context, "answers": answers})
    return rows


def pairs(count: int = 200) -> list[dict[str, Any]]:
    draw, rows, seen = random.Random(3), [], set[tuple[str, ...]]()
    while len(rows) < count:
        words = tuple(draw.choice(list(ENGLISH)) for _ in range(draw.randint(2, 4)))
        if words not in seen:
            seen.add(words)
            rows.append({"translation": {"en": " ".join(words), "de": " ".join(ENGLISH[w] for w in words)}})
    return rows


def alike(count: int = 120) -> list[dict[str, Any]]:
    draw, rows = random.Random(4), []
    for i in range(count):
        own = f"item{i}"
        rows.append(
            {"anchor": f"{own} {draw.choice(FILLER)}", "positive": f"{draw.choice(FILLER)} about {own}"}
        )
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A BERT, a Marian and a BART of random weights, and the rows of every task."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "classify": texts(),
        "tag": tagged(),
        "answer": questions(),
        "translate": pairs(),
        "embed": alike(),
    }
    found = {task: written(folder / f"{task}.jsonl", own) for task, own in rows.items()}
    tokenizer = Tokenizer.train(
        [json.dumps(row, ensure_ascii=False) for own in rows.values() for row in own], 420
    )
    vocab, bias = tokenizer.vocab_size, frozenset({"q", "k", "v", "o", "mlp"})
    shape: dict[str, Any] = {
        "dim": 48, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 12, "hidden": 96, "norm": "layer",
        "activation": "gelu", "gated": False, "bias": bias, "norm_order": "post",
    }  # fmt: skip
    reader = ModelConfig(
        encoder=StackConfig(**shape, norm_eps=1e-12, position=Learned(), causal=False),
        encoder_input=Tokens(vocab, 64, types=2, norm=True),
        head=Head(vocab, True, True, "gelu", transform_norm=True),
    )
    sinusoidal: dict[str, Any] = {**shape, "norm_eps": 1e-5, "position": Sinusoidal()}
    writer = ModelConfig(
        encoder=StackConfig(**sinusoidal, causal=False),
        encoder_input=Tokens(vocab, 64, scale=48**0.5),
        decoder=StackConfig(**sinusoidal, cross=True),
        decoder_input=Tokens(vocab, 64, scale=48**0.5, start=tokenizer.pad_id),
        head=Head(vocab, True, True),
    )
    learned: dict[str, Any] = {**shape, "norm_eps": 1e-5, "position": Learned(2)}
    both = ModelConfig(
        encoder=StackConfig(**learned, causal=False),
        encoder_input=Tokens(vocab, 64, norm=True),
        decoder=StackConfig(**learned, cross=True),
        decoder_input=Tokens(vocab, 64, norm=True, start=tokenizer.eos_id),
        head=Head(vocab, True, True),
    )
    for name, config in (("bert", reader), ("marian", writer), ("bart", both)):
        model = Transformer(config)
        init_(model, 0)
        save(model, framed(tokenizer) if name == "bart" else tokenizer, folder / name)
        found[name] = folder / name
    yield found


def framed(tokenizer: Tokenizer) -> Tokenizer:
    """The same with eos around every text, as BART's puts it."""
    backend, end = Backend.from_str(tokenizer.to_json()), "<|endoftext|>"
    backend.post_processor = TemplateProcessing(
        f"{end} $A {end}", f"{end} $A {end} {end} $B {end}", [(end, backend.token_to_id(end))]
    )
    return Tokenizer(backend, tokenizer.specials)


def taught(
    places: dict[str, Path], task: str, out: Path, *more: str, base: str = "bert", **given: Any
) -> Report:
    known = {"model": str(places[base]), "task": task, "data": [str(places[task])], "out": out}
    settings = configure(s.FinetuneSettings, None, [*QUICK, *more], **known, **given)
    return finetune.run(settings, quiet=True)


def results(command: Any, kind: str, model: Path, *words: str, **given: Any) -> list[dict[str, Any]]:
    settings = configure(getattr(s, kind), None, [], model=str(model), text=list(words), **given)
    found: list[dict[str, Any]] = command(settings, quiet=True, as_json=True).extra["results"]
    return found


def test_classify(places: dict[str, Path], tmp_path: Path) -> None:
    report = taught(places, "classify", tmp_path / "out", "num_train_epochs=6")
    assert report.figures["macro_f1"] > 0.9 > 0.5 > report.figures["majority"]
    assert sum(map(sum, report.extra["confusion"])) == report.counts["held_out_examples"]
    first, second = results(
        classify.run, "ClassifySettings", tmp_path / "out", "the ship near a wave", "牛 by the barn"
    )
    assert (first["label"], second["label"]) == ("sea", "farm")
    assert sum(first["scores"].values()) == pytest.approx(1)
    model, _ = load(tmp_path / "out")
    assert model.config.head.labels == ("farm", "sea", "sky")  # type: ignore[union-attr]
    theirs = transformers.pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    assert [one["label"] for one in theirs(["the ship near a wave"])] == ["sea"]
    page = (tmp_path / "out.run/report.html").read_text(encoding="utf-8")
    assert "What is taken for what" in page and "Each label" in page
    assert "the ship" not in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_a_bart_classifies_by_the_state_of_its_last_token(places: dict[str, Path], tmp_path: Path) -> None:
    report = taught(places, "classify", tmp_path / "out", "num_train_epochs=6", base="bart")
    assert report.figures["macro_f1"] > 0.9 > 0.5 > report.figures["majority"]
    asked = ["the ship near a wave", "牛 by the barn"]
    found = results(classify.run, "ClassifySettings", tmp_path / "out", *asked)
    assert [one["label"] for one in found] == ["sea", "farm"]
    theirs = transformers.BartForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = encode_texts(Tokenizer.load(tmp_path / "out"), asked[:1], Limit(64), Counter())[0].ids
    shares = theirs(torch.tensor([ids])).logits.softmax(-1)[0].tolist()
    assert shares == pytest.approx([found[0]["scores"][name] for name in ("farm", "sea", "sky")], abs=1e-5)
    with pytest.raises(ModelError, match="cannot translate"):
        results(translate.run, "TranslateSettings", tmp_path / "out", "a text")
    with pytest.raises(ModelError, match="cannot translate"):
        taught({**places, "taught": tmp_path / "out"}, "translate", tmp_path / "b", base="taught")
    with pytest.raises(ModelError, match="models of type bart cannot tag"):
        taught(places, "tag", tmp_path / "c", base="bart")
    save(load(places["bart"])[0], load(places["bert"])[1], tmp_path / "bare")
    with pytest.raises(ModelError, match="by its last token, eos, and the tokenizer does not put one there"):
        taught({**places, "bare": tmp_path / "bare"}, "classify", tmp_path / "d", base="bare")


def test_a_killed_run_goes_on_to_the_same_weights(places: dict[str, Path], tmp_path: Path) -> None:
    """The best checkpoint and the order of the items survive."""
    more = ("max_steps=12", "save_every=3", "eval_every=3")
    taught(places, "classify", tmp_path / "whole", *more)
    stopped = tmp_path / "cut.run"

    class Cut(Exception):
        pass

    from langmill.train import loop

    original = loop._Run.step

    def step(run: Any) -> bool:
        if run.state.step == 7:
            raise Cut
        return original(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "step", step)
        with pytest.raises(Cut):
            taught(places, "classify", tmp_path / "cut", *more)
    assert sorted(path.name for path in (stopped / "checkpoints").glob("step-*"))[-1] == "step-00000006"
    taught(places, "classify", tmp_path / "cut", *more, resume=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_several_labels_and_numbers(places: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"text": row["text"], "label": [row["label"], "wet"] if row["label"] == "sea" else []}
        for row in texts()
    ]
    several = {**places, "classify": written(tmp_path / "several.jsonl", rows)}
    report = taught(
        several, "classify", tmp_path / "several", "num_train_epochs=6", "tasks.class_weights=true"
    )
    assert report.figures["micro_f1"] > 0.9
    (found,) = results(classify.run, "ClassifySettings", tmp_path / "several", "ship wave tide fish")
    assert set(found["label"]) == {"sea", "wet"}
    rows = [{"text": row["text"], "label": float(row["text"].count(" ")) / 10} for row in texts(60)]
    numbers = {**places, "classify": written(tmp_path / "numbers.jsonl", rows)}
    report = taught(numbers, "classify", tmp_path / "numbers", "num_train_epochs=1", "tasks.kind=regress")
    assert report.figures["mean_absolute_error"] >= 0
    (found,) = results(classify.run, "ClassifySettings", tmp_path / "numbers", "a text")
    assert isinstance(found["score"], float) and "label" not in found


@pytest.mark.parametrize("task", ["classify", "tag", "answer", "translate", "embed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_validation_is_in_the_runs_number_type_and_the_last_score_in_float32(
    task: str, dtype: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, narrow = finetune_task.scored, list[tuple[bool, bool]]()

    def scored(settings: Any, work: Any, model: Any, whole: bool) -> Any:
        narrow.append((whole, torch.is_autocast_enabled(model.main.like.device.type)))
        return original(settings, work, model, whole)

    monkeypatch.setattr(finetune_task, "scored", scored)
    base = "marian" if task == "translate" else "bert"
    report = taught(
        places, task, tmp_path / "out", "max_steps=2", "eval_every=1", f"dtype={dtype}", base=base
    )
    assert narrow == [(False, dtype == "bfloat16")] * 2 + [(True, False)]
    assert report.figures["loss"] is not None


def test_early_stopping_keeps_the_best(places: dict[str, Path], tmp_path: Path) -> None:
    more = ("max_steps=60", "eval_every=2", "tasks.patience=2", "learning_rate=1e-9")
    report = taught(places, "classify", tmp_path / "out", *more)
    assert report.counts["steps"] < 60


def test_tag(places: dict[str, Path], tmp_path: Path) -> None:
    report = taught(places, "tag", tmp_path / "out", "num_train_epochs=8")
    assert report.figures["f1"] > 0.9
    text = "Li Wei went from the old farm to Cairo."
    nothing, found = results(tag.run, "TagSettings", tmp_path / "out", "", text)
    assert nothing == {"text": "", "entities": []}
    assert [(e["label"], e["text"]) for e in found["entities"]] == [("PER", "Li Wei"), ("LOC", "Cairo")]
    assert all(text[e["start"] : e["end"]] == e["text"] for e in found["entities"])


def test_answer(places: dict[str, Path], tmp_path: Path) -> None:
    report = taught(places, "answer", tmp_path / "out", "num_train_epochs=10")
    assert report.figures["f1"] > 0.6
    context = "In Oslo the big number 7 was seen by Ada at night."
    (found,) = results(
        answer.run, "AnswerSettings", tmp_path / "out", context, question="Who saw it?", n_best=3
    )
    assert found["answer"] == context[found["start"] : found["end"]]
    assert len(found["best"]) == 3 and 0 <= found["no_answer_score"] <= 1


def test_translate(places: dict[str, Path], tmp_path: Path) -> None:
    report = taught(places, "translate", tmp_path / "out", "num_train_epochs=40", base="marian")
    assert report.figures["perplexity"] < 3 and report.figures["chrf"] > 30
    found = results(
        translate.run, "TranslateSettings", tmp_path / "out", "cat dog\n\n  red cat \n", "blue dog", beams=3
    )
    assert found[0]["translation"].count("\n") == 3 and found[0]["translation"].endswith(" \n")
    assert found[1]["translation"] == "blau hund"
    (tmp_path / "lines.txt").write_text("blue dog\n\nblue dog\n")
    lines = results(translate.run, "TranslateSettings", tmp_path / "out", file=tmp_path / "lines.txt")
    assert [line["translation"] for line in lines] == ["blau hund", "", "blau hund"]
    with pytest.raises(UsageError, match="piece by piece"):
        results(translate.run, "TranslateSettings", tmp_path / "out", "blue dog", long_texts="truncate")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = encode_source(Tokenizer.load(tmp_path / "out"), "blue dog", Limit(64), Counter())
    assert theirs("blue dog").input_ids == list(ours.ids)


def test_embed(places: dict[str, Path], tmp_path: Path) -> None:
    before = taught(places, "embed", tmp_path / "few", "max_steps=1", "learning_rate=1e-9").figures["mrr"]
    report = taught(places, "embed", tmp_path / "out", "num_train_epochs=15", "tasks.dims=[16]")
    assert report.figures["mrr"] > before and "accuracy_16" in report.figures
    one, two = results(embed.run, "EmbedSettings", tmp_path / "out", "item3 old", "green", dims=16)
    assert len(one["embedding"]) == 16 and sum(x * x for x in two["embedding"]) == pytest.approx(1)
    texts = ["about item1", "about item7", "about item40"]
    near = results(embed.similar, "SimilarSettings", tmp_path / "out", *texts, query="item7 about", top=2)
    assert near[0]["text"] == "about item7" and near[0]["score"] >= near[1]["score"]


@pytest.mark.parametrize(
    ("task", "learnt"),
    [
        ("classify", "→ s"),
        ("tag", "⟦B-PER⟧"),
        ("answer", "⟦"),
        ("translate", "→ "),
        ("embed", "= "),
    ],
)
def test_a_preview_shows_what_is_learnt(
    task: str, learnt: str, places: dict[str, Path], tmp_path: Path
) -> None:
    base = "marian" if task == "translate" else "bert"
    report = taught(places, task, tmp_path / "out", base=base, preview=4)
    assert learnt in report.text and f"{task}.jsonl" in report.text
    assert report.counts["trained"] > report.counts["held_out"] > 0
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_pairs_in_another_language_are_left_out_and_said(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"translation": {"en": "one cat sees two dogs", "de": "одна кошка видит двух собак"}}
    several = {**places, "translate": written(tmp_path / "rows.jsonl", [*pairs(40), wrong])}
    monkeypatch.setattr("langmill.data.languages._detector", lambda: None)
    report = taught(several, "translate", tmp_path / "a", base="marian", preview=1)
    assert (
        "left out: 1 target in another language (such as " in report.text and "rows.jsonl:41: " in report.text
    )
    assert (
        'pip install "langmill[data]"' in report.text
        and report.counts["trained"] + report.counts["held_out"] == 40
    )
    report = taught(
        several, "translate", tmp_path / "a", "tasks.check_languages=false", base="marian", preview=1
    )
    assert "left out" not in report.text and "pip install" not in report.text


def test_an_error_about_the_rows_that_are_left_says_which_were_not(
    places: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": 5, "label": "y"}]
    with pytest.raises(
        DataError, match=r'the one label "x".*; left out: 1 field "text" is not text \(such as'
    ):
        taught({**places, "classify": written(tmp_path / "rows.jsonl", rows)}, "classify", tmp_path / "a")


def test_what_cannot_be_taught_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    same = written(tmp_path / "same.jsonl", [{"text": f"text {i}", "label": "one"} for i in range(9)])
    with pytest.raises(DataError, match='only the one label|the one label "one"'):
        taught({**places, "classify": same}, "classify", tmp_path / "a")
    with pytest.raises(UsageError, match="method lora is for chat and prefer"):
        taught(places, "classify", tmp_path / "b", method="lora")
    with pytest.raises(ModelError, match="cannot translate"):
        taught(places, "translate", tmp_path / "c")
    with pytest.raises(ModelError, match="was not taught to classify"):
        results(classify.run, "ClassifySettings", places["bert"], "a text")
    with pytest.raises(ModelError, match="marian cannot classify"):
        taught(places, "classify", tmp_path / "d", base="marian")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="there is nothing in it"):
        taught({**places, "classify": tmp_path / "empty.jsonl"}, "classify", tmp_path / "e")
