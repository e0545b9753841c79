"""Hidden tokens, middles and damaged texts: pretraining by the other objectives, on tiny models."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from langmill.apps import generate
from langmill.common.configure import configure
from langmill.common.errors import DataError, ModelError, SettingsError, UsageError
from langmill.common.settings import (
    DataSettings,
    EvaluateSettings,
    FinetuneSettings,
    GenerateSettings,
    PlanSettings,
    PretrainSettings,
    ShardsSettings,
)
from langmill.data.batches import IGNORED
from langmill.families.folder import load
from langmill.jobs import evaluate, finetune, plan, pretrain, preview, shards
from langmill.jobs.pretrain_task import HELD_SEED, guess
from langmill.model.config import gap_order
from langmill.text.infill import gap_ids
from langmill.text.tasks import Limit
from langmill.text.tokenizer import Tokenizer
from langmill.text.training import FIM, MASK
from langmill.text.translate import encode_source
from langmill.train.step import tensors

SMALL = (
    "model.layers=1 model.dim=32 model.heads=2 model.hidden=64 tokenizer.vocab_size=450 max_length=64 "
    "micro_batch_size=4 max_steps=6 dtype=float32 compile=false data.holdout=0.1 threads=1"
).split()
QUICK = ("dtype=float32", "compile=false", "threads=1", "max_steps=3", "holdout=0.2")


def settings(texts: Path, out: Path, objective: str, *more: str, **named: Any) -> PretrainSettings:
    shape = [word for word in SMALL if not ("from" in named and word.startswith(("model.", "tokenizer.")))]
    given = [*shape, f"objective={objective}", *more]
    return configure(PretrainSettings, None, given, path=[str(texts)], out=out, **named)


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def taught(model: Path, task: str, rows: list[dict[str, Any]], out: Path) -> Any:
    file = out.with_suffix(".jsonl")
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    given = configure(FinetuneSettings, None, QUICK, model=str(model), task=task, data=[str(file)], out=out)
    return finetune.run(given, quiet=True)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, write_texts: Callable[[Path], Path]) -> Path:
    """The folder of texts and of a masked model "m" that nothing interrupted."""
    folder = tmp_path_factory.mktemp("masked")
    pretrain.run(settings(write_texts(folder / "texts"), folder / "m", "masked", "max_steps=40"), quiet=True)
    return folder


def test_a_masked_model_is_a_bert_that_transformers_loads(masked: Path) -> None:
    report = json.loads((masked / "m.run" / "report.json").read_text(encoding="utf-8"))
    figures = report["figures"]
    assert 0 < figures["loss"] < np.log(450) and 0 <= figures["accuracy"] <= 1 and figures["guessed"] > 50
    assert "bits_per_byte" not in figures and "xz_bits_per_byte" not in figures
    for name in ("loss", "accuracy"):
        low, high = figures[f"{name}_interval"]
        assert low < figures[name] < high
    assert "finetune" in report["text"] and "--task classify" in report["text"]
    page = (masked / "m.run" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "bad.txt" in page and "What it writes" not in page
    assert "AutoModelForMaskedLM" in (masked / "m" / "README.md").read_text(encoding="utf-8")
    lineage = json.loads((masked / "m" / "lineage.json").read_text(encoding="utf-8"))
    assert lineage["results"]["accuracy"] == figures["accuracy"]
    theirs, notes = transformers.BertForMaskedLM.from_pretrained(masked / "m", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    names = transformers.AutoTokenizer.from_pretrained(masked / "m")
    assert names.mask_token == MASK
    ids = names(f"The quick brown {MASK} jumps", return_tensors="pt")["input_ids"]
    ours, tokenizer = load(masked / "m")
    assert tokenizer is not None and tokenizer.mask_id in ids[0].tolist()
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(ids).logits, ours(ids), atol=1e-4)


def test_held_out_guesses_are_scored_as_said(masked: Path) -> None:
    """Loss, accuracy and entropy, from whole scores and one batch at a time."""
    given = settings(masked / "texts", masked / "m", "masked", resume=True)
    ready = pretrain.prepare(given, masked / "m.run", True)
    model, task, held = load(masked / "m")[0], ready.guesses, ready.corpus.held
    assert task is not None
    found, losses, hits, wanted = guess(model, task, held).summary(), [], [], []
    with torch.no_grad():
        for batch in task.batches(held, HELD_SEED).once():
            t = tensors(batch, torch.device("cpu"))
            scores = model(t["tokens"], positions_BT=t["positions"], documents_BT=t["documents"])
            places = t["targets"] != IGNORED
            losses += (-scores.log_softmax(-1)[places, t["targets"][places]]).tolist()
            hits += (scores.argmax(-1) == t["targets"])[places].tolist()
            wanted += t["targets"][places].tolist()
    assert found.guessed == len(losses) and found.documents == len(held)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5) and found.accuracy == np.mean(hits)
    shares = np.unique(wanted, return_counts=True)[1] / len(wanted)
    assert found.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert guess(model, task, held).summary() == found
    alone = [
        guess(model, task, held[i : i + 1]).summary() for i in range(len(held))
    ]  # damaged as among the others
    nll = sum(one.loss * one.guessed for one in alone)
    assert sum(one.guessed for one in alone) == found.guessed and nll / found.guessed == pytest.approx(
        found.loss
    )
    random, means = np.random.default_rng(0), []
    for _ in range(1000):
        drawn = [alone[i] for i in random.integers(len(alone), size=len(alone))]
        means.append(sum(one.loss * one.guessed for one in drawn) / sum(one.guessed for one in drawn))
    assert found.loss_interval == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))))
    assert alone[0].loss_interval is None


@pytest.mark.parametrize("objective", ["masked", "denoise"])
def test_evaluate_scores_a_model_that_guesses_by_its_guesses(
    masked: Path, tmp_path: Path, objective: str
) -> None:
    where, texts = masked / "m", masked / "texts"
    if objective == "denoise":
        where = tmp_path / "m"
        pretrain.run(settings(texts, where, "denoise"), quiet=True)
    known = json.loads((where.parent / "m.run" / "report.json").read_text(encoding="utf-8"))["figures"]
    given = {"on": [str(texts)], "split": "held_out", "data": DataSettings(holdout=0.1), "device": "cpu"}
    rows = tmp_path / "rows.jsonl"
    report = evaluate.run(
        EvaluateSettings(model=str(where), out=rows, against=str(where), **given), quiet=True
    )
    for name in ("loss", "accuracy", "unigram_entropy", "loss_interval", "accuracy_interval"):
        assert report.figures[name] == pytest.approx(known[name]), name
    assert report.counts["guessed"] == known["guessed"] and report.counts["documents"] == known["documents"]
    assert "bits_per_byte" not in report.figures and "95 % interval" in report.text
    assert report.extra["against"]["loss"]["verdict"] == "no difference shown"
    made = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert sum(row["guessed"] for row in made) == known["guessed"] and "txt" in made[0]["where"]
    json.dumps([report.counts, report.figures, report.extra])


def test_evaluate_refuses_what_says_no_words_or_guesses_otherwise(
    masked: Path, texts: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"{word} number {i}", "label": word} for i in range(20) for word in ("fox", "dog")]
    taught(masked / "m", "classify", rows, tmp_path / "c")
    given = {"on": [str(texts)], "device": "cpu"}
    with pytest.raises(ModelError, match="has no rows that it could be asked"):
        evaluate.run(EvaluateSettings(model=str(tmp_path / "c"), **given), quiet=True)
    pretrain.run(settings(texts, tmp_path / "a", "causal"), quiet=True)
    with pytest.raises(UsageError, match="cannot be compared on text: .* is an encoder .* is a decoder"):
        evaluate.run(
            EvaluateSettings(model=str(masked / "m"), against=str(tmp_path / "a"), **given), quiet=True
        )
    pretrain.run(settings(texts, tmp_path / "b", "masked", "tokenizer.vocab_size=400"), quiet=True)
    with pytest.raises(DataError, match="other tokenizers"):
        evaluate.run(
            EvaluateSettings(model=str(masked / "m"), against=str(tmp_path / "b"), **given), quiet=True
        )


@pytest.mark.parametrize("stage", ["make_shards", "fit", "_score", "write_guesses"])
def test_a_masked_run_that_dies_goes_on_to_the_same_bytes(
    masked: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        place = pretrain.text if hasattr(pretrain.text, stage) else pretrain
        work = getattr(place, stage)

        def die(*args: Any, **named: Any) -> None:
            if stage == "fit":  # in its middle
                named["hooks"] = [lambda step, state: step == 17]
            if stage not in ("_score", "write_guesses"):
                work(*args, **named)
            raise MemoryError("killed")

        patch.setattr(place, stage, die)
        with pytest.raises(MemoryError):
            pretrain.run(settings(masked / "texts", tmp_path / "m", "masked", "max_steps=40"), quiet=True)
    resumed = PretrainSettings(path=[str(masked / "texts")], out=tmp_path / "m", resume=True)
    report = pretrain.run(resumed, quiet=True)
    assert weights(tmp_path / "m") == weights(masked / "m") and report.counts["steps"] == 40
    with pytest.raises(SettingsError, match="train.objective was masked and is denoise"):
        pretrain.run(settings(masked / "texts", tmp_path / "m", "denoise", resume=True), quiet=True)


def test_a_masked_model_goes_on_and_learns_to_classify(masked: Path, tmp_path: Path) -> None:
    named = {"from": str(masked / "m")}
    more = ("whole_words=true", "mask_rate=0.3", "learning_rate=0.003", "max_steps=20")
    report = pretrain.run(settings(masked / "texts", tmp_path / "m", "masked", *more, **named), quiet=True)
    assert report.figures["loss"] < report.figures["before_loss"] and "before" in report.text
    rows = [{"text": f"{word} number {i}", "label": word} for i in range(20) for word in ("fox", "dog")]
    assert taught(tmp_path / "m", "classify", rows, tmp_path / "c").figures["macro_f1"] >= 0
    assert (tmp_path / "c" / "config.json").is_file()
    with pytest.raises(ModelError, match=r"an encoder with a masked head: take train.objective=masked"):
        pretrain.run(settings(masked / "texts", tmp_path / "n", "causal", **named), quiet=True)
    with pytest.raises(ModelError, match=r"take train.objective=masked"):
        pretrain.run(settings(masked / "texts", tmp_path / "n", "denoise", **named, force=True), quiet=True)
    taught_one = {"from": str(tmp_path / "c")}
    with pytest.raises(ModelError, match="no head that says words"):
        pretrain.run(settings(masked / "texts", tmp_path / "o", "masked", **taught_one), quiet=True)


def test_infilling_keeps_a_writer_that_is_scored_as_one(texts: Path, tmp_path: Path) -> None:
    report = pretrain.run(settings(texts, tmp_path / "m", "infill"), quiet=True)
    assert 0 < report.figures["bits_per_byte"] < 8 and "xz_bits_per_byte" in report.figures
    model, tokenizer = load(tmp_path / "m")
    assert tokenizer is not None and set(FIM) <= set(tokenizer.vocab) and model.config.writes
    assert gap_order(model.config) == "spm"
    given = settings(texts, tmp_path / "m", "infill", resume=True)
    ready = pretrain.prepare(given, tmp_path / "m.run", True)
    assert ready.task is not None and ready.guesses is None
    prefix, _, middle = (tokenizer.vocab[name] for name in FIM)
    rows = ready.task.batches(ready.corpus.train, 0)
    seen = [next(rows).tokens_BT for _ in range(4)]
    pieces = sum(int((row == tokenizer.start_id).sum()) for row in seen)
    assert 0.2 < sum(int((row == prefix).sum()) for row in seen) / pieces < 0.8
    assert any((row == middle).any() for row in seen)
    pretrain.run(settings(texts, tmp_path / "a", "causal"), quiet=True)
    with pytest.raises(ModelError, match=r"<\|fim_prefix\|>"):
        pretrain.run(settings(texts, tmp_path / "b", "infill", **{"from": str(tmp_path / "a")}), quiet=True)


def test_blanks_are_written_behind_the_text_and_filled_so(texts: Path, tmp_path: Path) -> None:
    report = pretrain.run(settings(texts, tmp_path / "m", "blanks"), quiet=True)
    assert 0 < report.figures["bits_per_byte"] < 8
    model, tokenizer = load(tmp_path / "m")
    assert tokenizer is not None and gap_order(model.config) == "blank"
    ready = pretrain.prepare(settings(texts, tmp_path / "m", "blanks", resume=True), tmp_path / "m.run", True)
    assert ready.task is not None and ready.guesses is None
    batch = next(ready.task.batches(ready.corpus.train, 0))
    said = {int(id) for id in batch.targets_BT.flat}
    first = tokenizer.sentinel_ids[0]
    assert tokenizer.boundary_id in said and first in batch.tokens_BT and not said & {*tokenizer.sentinel_ids}

    ids = gap_ids(tokenizer, "a", "b", "blank")
    assert ids == [tokenizer.start_id, *tokenizer.encode("a"), first, *tokenizer.encode("b"), first]
    given = GenerateSettings(
        model=str(tmp_path / "m"), prompt=["The"], suffix="end.", max_new_tokens=4, device="cpu"
    )
    assert generate.run(given, quiet=True).counts


@pytest.mark.parametrize(
    ("family", "theirs"), [("marian", "MarianMTModel"), ("t5", "MT5ForConditionalGeneration")]
)
def test_a_denoiser_reads_writes_and_learns_to_translate(
    texts: Path, tmp_path: Path, family: str, theirs: str
) -> None:
    more = () if family == "marian" else ("model.family=t5",)
    report = pretrain.run(settings(texts, tmp_path / "m", "denoise", *more, "max_steps=20"), quiet=True)
    assert 0 < report.figures["loss"] < np.log(450) and "bits_per_byte" not in report.figures
    model, tokenizer = load(tmp_path / "m")
    assert tokenizer is not None and model.config.input.start == tokenizer.pad_id
    other, notes = getattr(transformers, theirs).from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    ids, begun = torch.tensor([[0, 9, 8, 7]]), torch.tensor([[1, 5, 6]])
    with torch.no_grad():
        own = model(begun, encoder_tokens=ids)
        assert torch.allclose(own, other.eval()(input_ids=ids, decoder_input_ids=begun).logits, atol=1e-4)
    rows = [{"translation": {"en": f"word {i}", "de": f"Wort {i}"}} for i in range(30)]
    assert taught(tmp_path / "m", "translate", rows, tmp_path / "t").figures["perplexity"] > 1
    named = {"from": str(tmp_path / "m")}
    on = pretrain.run(settings(texts, tmp_path / "m2", "denoise", "learning_rate=0.003", **named), quiet=True)
    assert on.figures["loss"] < on.figures["before_loss"]


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_other_tools_end_a_denoisers_source_as_training_did(texts: Path, tmp_path: Path, family: str) -> None:
    """From text and from shards whose own tokenizer puts nothing behind a text; such shards serve the model still."""
    shape = f"model.family={family}"
    pretrain.run(settings(texts, tmp_path / "m", "denoise", shape), quiet=True)
    plain = tmp_path / "m.run" / "tokenizer"
    asked = {"path": [str(texts)], "tokenizer": str(plain), "out": tmp_path / "s"}
    shards.run(configure(ShardsSettings, None, [], **asked), quiet=True)
    pretrain.run(settings(tmp_path / "s", tmp_path / "n", "denoise", shape), quiet=True)
    wanted = encode_source(Tokenizer.load(plain), "床前明月光, the fox", Limit(64), Counter()).ids
    for name, path in (("m", texts), ("n", tmp_path / "s")):
        given = settings(path, tmp_path / name, "denoise", shape, resume=True)
        ready = pretrain.prepare(given, tmp_path / f"{name}.run", True)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)("床前明月光, the fox")[
            "input_ids"
        ]
        assert theirs == wanted and ready.task is not None
        batch: Any = next(ready.task.batches(ready.corpus.train, 0))
        source = batch.encoder_tokens_BS[0][batch.encoder_documents_BS[0] == 1].tolist()
        assert (source[0], source[-1]) == (theirs[0], theirs[-1]) and theirs[
            -1
        ] == ready.corpus.tokenizer.eos_id
    on = settings(tmp_path / "s", tmp_path / "o", "denoise", **{"from": str(tmp_path / "m")})
    assert pretrain.run(on, quiet=True).counts["steps"] == 6
    for path in (tmp_path / "s", tmp_path / "m.run" / "shards"):
        rows = EvaluateSettings(model=str(tmp_path / "m"), on=[str(path)], device="cpu")
        assert evaluate.run(rows, quiet=True).counts["guessed"] > 0


@pytest.mark.parametrize(
    ("objective", "family", "says"),
    [
        ("masked", "llama", "trains bert; llama is trained by causal or infill or blanks"),
        ("denoise", "bert", "trains marian, t5; bert is trained by masked"),
        ("causal", "t5", "t5 is trained by denoise"),
    ],
)
def test_objective_and_family_must_fit(
    texts: Path, tmp_path: Path, objective: str, family: str, says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        pretrain.run(settings(texts, tmp_path / "m", objective, f"model.family={family}"), quiet=True)
    assert not (tmp_path / "m.run").exists()


def test_a_tokenizer_without_the_mark_is_refused(masked: Path, tmp_path: Path) -> None:
    path = f"tokenizer.path={masked / 'm'}"
    with pytest.raises(ModelError, match=r"needs a tokenizer with a <extra_id_0>"):
        pretrain.run(
            settings(masked / "texts", tmp_path / "m", "denoise", "model.family=t5", path), quiet=True
        )


@pytest.mark.parametrize(
    ("objective", "shows"),
    [("masked", MASK), ("denoise", "|"), ("infill", "<|endoftext|>|"), ("blanks", "<extra_id_0>")],
)
def test_a_dry_run_shows_what_is_read_and_said(
    texts: Path, tmp_path: Path, objective: str, shows: str
) -> None:
    report = preview.run(settings(texts, tmp_path / "m", objective), quiet=True)
    assert any(shows in piece for piece in report.extra["row"]) and not (tmp_path / "m").exists()


def test_a_plan_of_a_reader_has_closed_forms_and_no_measurement() -> None:
    given = ("size=1M", "vocab_size=1024", "objective=masked")
    report = plan.run(configure(PlanSettings, None, given, tokens=10**6, probe=False), quiet=True)
    assert abs(report.counts["parameters"] / 1e6 - 1) < 0.1 and "bert" in report.text
    with pytest.raises(UsageError, match="probe=false"):
        plan.run(configure(PlanSettings, None, given, tokens=10**6), quiet=True)
