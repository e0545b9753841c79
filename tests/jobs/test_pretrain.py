import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from langmill.common.configure import configure
from langmill.common.errors import ModelError, SettingsError, TrainingError, UsageError
from langmill.common.files import run_lock
from langmill.common.settings import (
    ModelSettings,
    PretrainSettings,
    ShardsSettings,
    TokenizerTrainSettings,
    TrainSettings,
)  # fmt: skip
from langmill.families.folder import load
from langmill.infer.generate import generate
from langmill.jobs import memory, pretrain
from langmill.jobs.shards import run as make_shards
from langmill.jobs.size import resolve
from langmill.jobs.tokenizer import train as train_tokenizer

SMALL = (
    "model.layers=1 model.dim=32 model.heads=2 model.hidden=64 tokenizer.vocab_size=400 max_length=32 "
    "micro_batch_size=4 max_steps=6 dtype=float32 compile=false data.holdout=0.1 threads=1"
).split()


def settings(texts: Path, out: Path, *more: str, **named: Any) -> PretrainSettings:
    given = [*([] if "from" in named else SMALL), *more]
    return configure(PretrainSettings, None, given, path=[str(texts)], out=out, **named)


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_text_becomes_a_model_a_card_and_a_report(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "模型"
    report = pretrain.run(settings(texts, out), quiet=True)
    model, tokenizer = load(out)
    assert tokenizer and "".join(generate(model, tokenizer, "床前", max_new_tokens=4)) is not None
    assert report.counts["documents"] == 60 and report.counts["steps"] == 6
    assert report.counts["held_out_documents"] >= 1
    low, high = report.figures["bits_per_byte_interval"]
    assert low <= report.figures["bits_per_byte"] <= high < 8
    assert report.extra["ledger"]["dropped"]["not UTF-8"]["documents"] == 1
    assert "number of parameters" not in report.text and f"langmill generate {out}" in report.text.replace(
        "'", ""
    )
    assert json.loads(json.dumps(report.figures)) == report.figures
    lineage = json.loads((out / "lineage.json").read_text(encoding="utf-8"))
    assert lineage["data"]["documents"] == 60 and lineage["parent"] is None
    assert lineage["settings"]["path"] == ["texts"] and str(tmp_path) not in json.dumps(lineage)
    assert "AutoModelForCausalLM" in (out / "README.md").read_text(encoding="utf-8")
    for file in out.iterdir():
        assert b"fox jumps over" not in file.read_bytes(), f"{file.name} holds training text"
    page = (tmp_path / "模型.run" / "report.html").read_text(encoding="utf-8")
    assert "bad.txt" in page and "<svg" in page and "--from MODEL" in page
    with pytest.raises(UsageError, match="--resume"):
        pretrain.run(settings(texts, out), quiet=True)
    again = pretrain.run(settings(texts, out, resume=True), quiet=True)
    assert "finished already" in again.text and again.figures == report.figures
    with pytest.raises(SettingsError, match=r"train.max_steps was 6 and is 7"):
        pretrain.run(settings(texts, out, "max_steps=7", resume=True), quiet=True)


def test_force_removes_nothing_when_the_run_cannot_start(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    out.mkdir()
    (out / "lineage.json").write_text("{}")
    bare = [word for word in SMALL if not word.startswith("model.")]
    for given in (
        {"path": [str(tmp_path / "typo")]},
        {"path": [str(texts)], "model.size": "huge"},
        {"path": [str(texts)], "from": str(out)},
        {"path": [str(out)]},
    ):
        wrong = configure(PretrainSettings, None, bare, out=out, force=True, **given)
        with pytest.raises(UsageError):
            pretrain.run(wrong, quiet=True)
        assert (out / "lineage.json").is_file(), given


def test_one_document_held_out_has_no_interval_to_show(tmp_path: Path) -> None:
    for number, words in enumerate(("a cat sat on a mat. ", "a dog ran to a log. ")):
        (tmp_path / f"{number}.txt").write_text(words * 40)
    report = pretrain.run(settings(tmp_path, tmp_path / "m"), quiet=True)
    assert report.counts["held_out_documents"] == 1
    assert "bits per byte; gzip" in report.text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, write_texts: Callable[[Path], Path]) -> bytes:
    """The weights of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    pretrain.run(settings(write_texts(folder / "texts"), folder / "m"), quiet=True)
    return weights(folder / "m")


@pytest.mark.parametrize("stage", ["make_shards", "fit", "_score", "export", "write_report"])
def test_a_run_that_dies_between_stages_goes_on_to_the_same_model(
    texts: Path, tmp_path: Path, whole: bytes, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        place = pretrain.text if hasattr(pretrain.text, stage) else pretrain
        work = getattr(place, stage)

        def die(*args: Any, **named: Any) -> None:
            if stage not in ("_score", "write_report"):
                work(*args, **named)
            raise MemoryError("killed")

        patch.setattr(place, stage, die)
        with pytest.raises(MemoryError):
            pretrain.run(settings(texts, tmp_path / "cut"), quiet=True)
    # What was given at first need not be given again.
    resumed = PretrainSettings(path=[str(texts)], out=tmp_path / "cut", resume=True)
    report = pretrain.run(resumed, quiet=True)
    assert weights(tmp_path / "cut") == whole
    assert report.counts["steps"] == 6 and (tmp_path / "cut.run" / "report.html").is_file()


def test_resuming_with_other_settings_is_refused_by_name(
    texts: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(pretrain, "fit", lambda *a, **b: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(settings(texts, tmp_path / "m"), quiet=True)
    with pytest.raises(SettingsError, match=r"train.max_steps was 6 and is 7"):
        pretrain.run(settings(texts, tmp_path / "m", "max_steps=7", resume=True), quiet=True)
    kept = pretrain.settled(settings(texts, tmp_path / "m", "log_every=3", resume=True), tmp_path / "m.run")
    assert kept.train.log_every == 3 and kept.train.learning_rate and kept.resume


def test_going_on_from_a_model_scores_it_before_and_after(texts: Path, tmp_path: Path) -> None:
    pretrain.run(settings(texts, tmp_path / "first"), quiet=True)
    more = (
        "max_steps=8",
        "max_length=32",
        "learning_rate=0.01",
        "threads=1",
        "data.holdout=0.1",
        "dtype=float32",
    )
    named = {"from": str(tmp_path / "first")}
    report = pretrain.run(settings(texts, tmp_path / "second", *more, **named), quiet=True)
    first = json.loads((tmp_path / "first.run" / "report.json").read_text(encoding="utf-8"))
    assert report.figures["before_bits_per_byte"] == pytest.approx(
        first["figures"]["bits_per_byte"], abs=1e-6
    )
    assert report.figures["bits_per_byte"] < report.figures["before_bits_per_byte"]
    assert report.extra["notices"] == []
    lineage = json.loads((tmp_path / "second" / "lineage.json").read_text(encoding="utf-8"))
    assert lineage["parent"]["name"] == "first" and len(lineage["parent"]["sha256"]) == 64
    with pytest.raises(UsageError, match="model.size"):
        pretrain.run(settings(texts, tmp_path / "third", "model.size=tiny", **named), quiet=True)
    with pytest.raises(UsageError, match="tokenizer.path"):
        pretrain.run(settings(texts, tmp_path / "third", "tokenizer.path=x", **named, force=True), quiet=True)


def test_prepared_shards_train_and_foreign_ones_are_refused(texts: Path, tmp_path: Path) -> None:
    paths = {"path": [str(texts)]}
    train_tokenizer(TokenizerTrainSettings(**paths, out=tmp_path / "tok", vocab_size=400), quiet=True)
    train_tokenizer(TokenizerTrainSettings(**paths, out=tmp_path / "other", vocab_size=350), quiet=True)
    made = make_shards(
        ShardsSettings(**paths, tokenizer=str(tmp_path / "tok"), out=tmp_path / "shards"), quiet=True
    )
    assert made.counts["documents"] == 60 and made.counts["set_aside"] == 1
    report = pretrain.run(settings(tmp_path / "shards", tmp_path / "m"), quiet=True)
    assert report.counts["vocabulary"] == 400 and not (tmp_path / "m.run" / "shards").exists()
    with pytest.raises(ModelError, match="was made with the tokenizer"):
        pretrain.run(
            settings(tmp_path / "shards", tmp_path / "n", f"tokenizer.path={tmp_path / 'other'}"), quiet=True
        )
    with pytest.raises(UsageError, match="stand alone"):
        mixed = settings(tmp_path / "shards", tmp_path / "o").model_copy(
            update={"path": [str(tmp_path / "shards"), str(texts)]}
        )
        pretrain.run(mixed, quiet=True)


def test_two_writers_are_kept_apart(texts: Path, tmp_path: Path) -> None:
    with run_lock(tmp_path / "m"), pytest.raises(UsageError, match="in use"):
        pretrain.run(settings(texts, tmp_path / "m", resume=True), quiet=True)


def test_a_run_that_cannot_fit_names_the_next_lever(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    config, train = resolve(
        ModelSettings(size="small"), TrainSettings(micro_batch_size=64, dtype="float32"), 8192
    )
    needed = memory.estimate(config, train, cpu).total
    states = 16 * 13_773_696
    for there, word in (
        (needed // 2, "micro_batch_size=16"),
        (states + 60_000_000, "checkpointing=true"),
        (states // 2, "--size"),
    ):
        monkeypatch.setattr(memory, "free", lambda device, there=there: there)
        with pytest.raises(TrainingError, match=word):
            memory.check(config, train, cpu)
    monkeypatch.setattr(memory, "free", lambda device: needed)
    memory.check(config, train, cpu)


def test_an_lstm_trains_by_the_same_command(texts: Path, tmp_path: Path) -> None:
    more = ("model.family=lstm", "model.dim=24", "model.hidden=24", "model.heads=none", "model.layers=2")
    report = pretrain.run(settings(texts, tmp_path / "m", *more, "data.holdout=0"), quiet=True)
    assert report.figures["parameters"] > 0 and "bits_per_byte" not in report.figures
    assert "langmill_lstm" in (tmp_path / "m" / "config.json").read_text(encoding="utf-8")
