"""`langmill data forget`: shards lose what a clean set loses, and every model that saw it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from langmill.cli import run as cli
from langmill.common.errors import UsageError
from langmill.common.files import run_lock, sha256
from langmill.common.prepare_settings import RuleSettings
from langmill.common.settings import ForgetSettings, PrepareSettings, ShardsSettings, TokenizerTrainSettings
from langmill.data.forgotten import load
from langmill.data.shards import Shards
from langmill.data.withdrawn import withdraw
from langmill.jobs import forget, prepare
from langmill.jobs.prepared import prepared
from langmill.jobs.shards import run as make_shards
from langmill.jobs.tokenizer import train as train_tokenizer
from langmill.text.tokenizer import Tokenizer

TEXTS = [
    f"Boat {i} went down the river, with {i * 7 % 31} cows and a letter for house {i}." for i in range(40)
]
SECRET = "Boat 13 went"
PROSE = " ".join(f"word{i}" for i in range(100))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A prepared folder, shards of it, of its clean/ and of the raw texts, and a model that was trained on each."""
    (tmp_path / "raw").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "raw" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    prepare.run(settings(tmp_path), quiet=True)
    train_tokenizer(
        TokenizerTrainSettings(path=[str(tmp_path / "raw")], out=tmp_path / "tok", vocab_size=300), quiet=True
    )
    for name, path in (("shards", "out"), ("two", "out/clean"), ("others", "raw")):
        chosen = ShardsSettings(
            path=[str(tmp_path / path)], tokenizer=str(tmp_path / "tok"), out=tmp_path / name
        )
        make_shards(
            chosen.model_copy(update={"data": chosen.data.model_copy(update={"shard_tokens": 99})}),
            quiet=True,
        )
        model(tmp_path / f"of-{name}", prepared([tmp_path / name]))
    return tmp_path


def settings(place: Path) -> PrepareSettings:
    return PrepareSettings(
        source=[str(place / "raw")], out=place / "out", workers=1, language={"detect": False}
    )


def model(folder: Path, versions: list[str]) -> None:
    folder.mkdir()
    (folder / "lineage.json").write_text(json.dumps({"data": {"prepared": versions}}), encoding="utf-8")


def texts(folder: Path) -> list[str]:
    shards, tokenizer = Shards.open(folder), Tokenizer.load(folder)
    return [tokenizer.decode(shards.tokens_of(i).tolist()) for i in range(shards.documents)]


def told(place: Path, **asked: Any) -> Any:
    return forget.run(ForgetSettings(folder=place / "out", **asked), quiet=True)


def test_shards_made_of_a_clean_set_lose_the_document_and_models_are_named(place: Path) -> None:
    before = sha256(place / "out" / "manifest.json")
    assert prepared([place / "shards"]) == prepared([place / "two"]) == prepared([place / "out"]) == [before]
    model(place / "adapted", prepared([], place / "of-shards"))
    found = told(place, match=[SECRET])
    assert found.counts == {"removed": 1, "models": 3, "shards": 2}
    assert {Path(m).name for m in found.extra["models"]} == {"of-shards", "of-two", "adapted"}
    assert [Path(m).name for m in found.extra["others"]] == ["others"]
    for name in ("shards", "two"):
        assert sorted(texts(place / name)) == sorted(text for text in TEXTS if SECRET not in text)
    assert len(texts(place / "others")) == 40
    after = sha256(place / "out" / "manifest.json")
    assert prepared([place / "shards"]) == [after] != [before]
    again = told(place, id=["raw/07.txt"])
    assert again.counts["shards"] == 2 and again.counts["models"] == 3 and len(texts(place / "two")) == 38
    model(place / "later", prepared([place / "shards"]))
    assert {Path(m).name for m in told(place, id=["raw/08.txt"]).extra["models"]} >= {"later", "adapted"}


def test_what_a_rule_left_out_is_shown_no_more(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for name, text in (("a", "Ada said so. " * 40), ("b", PROSE)):
        row = json.dumps({"text": text, "title": f"of {name}", "id": f"own-{name}"})
        (tmp_path / "raw" / f"{name}.jsonl").write_text(row, encoding="utf-8")
    ruled = settings(tmp_path).model_copy(update={"rules": RuleSettings(preset="repetition")})
    prepare.run(ruled, quiet=True)
    shown = [tmp_path / "out" / "report.html", *(tmp_path / "out.run").rglob("dropped.parquet")]
    assert sum(b"Ada said" in file.read_bytes() or b"of a" in file.read_bytes() for file in shown) == 2
    asked = ForgetSettings(folder=tmp_path / "out", match=["Ada said"])
    assert forget.run(asked, quiet=True).counts["removed"] == 1
    prepare.run(ruled.model_copy(update={"force": True}), quiet=True)
    shown = [tmp_path / "out" / "report.html", *(tmp_path / "out.run").rglob("dropped.parquet")]
    assert not any(b"Ada said" in file.read_bytes() or b"of a" in file.read_bytes() for file in shown)


def state(place: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in place.rglob("*") if file.is_file() and file.name != "lock"}


def test_a_preview_names_what_would_go_and_changes_nothing(place: Path) -> None:
    asked = ForgetSettings(folder=place / "out", match=[SECRET, "Boat 14 went"])
    before = state(place)
    said = forget.preview(asked, quiet=True)
    assert said.extra["ids"] == ["raw/13.txt#00000000", "raw/14.txt#00000000"] and said.extra["dry_run"]
    assert (
        state(place) == before and "2 documents would be removed" in said.text and "raw/13.txt" in said.text
    )
    done = forget.run(asked, quiet=True)
    assert said.counts == done.counts == {"removed": 2, "models": 2, "shards": 2}
    assert {name: said.extra[name] for name in done.extra} == done.extra
    with pytest.raises(UsageError, match="nothing in .* is called or holds that"):
        forget.preview(asked)


def test_models_made_after_are_not_named(place: Path) -> None:
    told(place, id=["raw/07.txt"])
    model(place / "clean-model", prepared([place / "shards"]))
    assert load(place / "out.run")["begun"] == []
    for name in ("of-shards", "of-two"):
        (place / name / "lineage.json").unlink()
    found = told(place, id=["raw/08.txt"])
    assert [Path(m).name for m in found.extra["models"]] == ["clean-model"]  # it saw 8, and not 7


def test_shards_in_use_are_left_for_the_same_command_again(place: Path) -> None:
    with run_lock(place / "two"), pytest.raises(UsageError, match="two keeps what was to go.*in use"):
        told(place, match=[SECRET])
    assert len(texts(place / "two")) == 40 and load(place / "out.run")["begun"]
    with pytest.raises(UsageError, match="end that first"):
        prepare.run(settings(place), quiet=True)
    found = told(place)
    assert found.counts == {"removed": 0, "models": 2, "shards": 1} and len(texts(place / "two")) == 39
    assert not load(place / "out.run")["begun"]
    prepare.run(settings(place), quiet=True)


def test_an_older_record_is_read(place: Path) -> None:
    file = place / "out.run" / "forgotten.json"
    for begun, known in ((False, []), (True, ["a"])):
        file.write_text(json.dumps({"format": "forgotten", "version": 1, "hashes": ["a"], "begun": begun}))
        assert load(place / "out.run")["begun"] == known


def test_damaged_shards_of_others_hinder_nothing(place: Path) -> None:
    (place / "others" / "index.bin").write_bytes(b"")
    found = told(place, match=[SECRET])
    assert found.counts["shards"] == 2 and "perhaps" in found.extra["others"][0]
    withdraw(place / "two", np.ones(39, bool), [])
    assert not (place / "two").exists()


def test_the_versions_go_into_the_lineage_of_every_model(place: Path) -> None:
    seen = prepared([place / "out"])
    budget = (
        "size=100k train.max_steps=1 train.max_length=64 train.micro_batch_size=2 train.device=cpu".split()
    )
    runs = {
        "m": ["pretrain", str(place / "shards"), *budget],
        "n": ["pretrain", str(place / "out"), *budget, "tokenizer.vocab_size=300"],
        "more": ["pretrain", str(place / "raw"), "--from", str(place / "m"), *budget[1:]],
        "hf": ["export", str(place / "m"), "--to", "hf"],
    }
    for name, words in runs.items():
        assert cli([*words, "--out", str(place / name), "--quiet"]) == 0
        lineage = json.loads((place / name / "lineage.json").read_text(encoding="utf-8"))
        assert lineage["data"]["prepared"] == seen, name
    found = told(place, match=[SECRET])
    assert {Path(m).name for m in found.extra["models"]} >= set(runs)
    assert {Path(s).name for s in found.extra["shards"]} == {"shards", "two"} and found.counts["shards"] == 3
    assert Shards.open(place / "n.run" / "shards").documents == 39
