"""Pairs to a model whose vectors mean afterwards what they meant in training, for every reader of its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from langmill.adapt.lora import adapt
from langmill.apps import embed, sentence
from langmill.common.configure import configure
from langmill.common.errors import DataError, UsageError
from langmill.common.metrics import Report
from langmill.common.settings import (
    CompressSettings,
    EmbedSettings,
    EvaluateSettings,
    ExportSettings,
    FinetuneSettings,
    LoRASettings,
    MergeSettings,
)
from langmill.families.folder import load, save
from langmill.families.peft import write_adapter
from langmill.jobs import compress, evaluate, export, finetune, merge
from langmill.model.config import Learned, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

ROWS = [{"anchor": f"item{i} 海 old", "positive": f"about item{i} بحر"} for i in range(40)]
TEXTS = ["item3 old", "海", "بحر about", "item4 " * 30]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "bert"
    tokenizer = Tokenizer.train([json.dumps(row, ensure_ascii=False) for row in ROWS], 320)
    stack = StackConfig(
        32, 2, 2, 2, 16, 64, norm="layer", norm_eps=1e-12, activation="gelu", gated=False, position=Learned(),
        bias=frozenset({"q", "k", "v", "o", "mlp"}), norm_order="post", causal=False,
    )  # fmt: skip
    model = Transformer(
        ModelConfig(encoder=stack, encoder_input=Tokens(tokenizer.vocab_size, 64, types=2, norm=True))
    )
    init_(model, 0)
    save(model, tokenizer, folder)
    return folder


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def taught(model: Path, rows: list[Any], out: Path, *overrides: str) -> Report:
    more = [
        "dtype=float32",
        "compile=false",
        "threads=1",
        "max_steps=3",
        "holdout=0.2",
        "device=cpu",
        *overrides,
    ]
    asked = {
        "model": str(model),
        "task": "embed",
        "data": [written(out.with_suffix(".jsonl"), rows)],
        "out": out,
    }
    return finetune.run(configure(FinetuneSettings, None, more, **asked), quiet=True)


def vectors(model: Path, **more: Any) -> Any:
    settings = configure(EmbedSettings, None, [], model=str(model), text=TEXTS, device="cpu", **more)
    return np.array(
        [one["embedding"] for one in embed.run(settings, quiet=True, as_json=True).extra["results"]]
    )


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_the_folder_says_how_it_was_trained(pool: str, base: Path, tmp_path: Path) -> None:
    """As transformers, given the folder's own tokenizer, makes them: what sentence-transformers does."""
    report = taught(base, ROWS, tmp_path / "out", f"tasks.pool={pool}", "tasks.length=12")
    assert report.extra["vectors"] == {"pool": pool, "width": 32, "length": 12, "lower": False}
    assert np.array_equal(vectors(tmp_path / "out"), vectors(tmp_path / "out", pool=pool))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    for text, vector in zip(TEXTS, vectors(tmp_path / "out"), strict=True):
        given = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            states_TD = theirs(**given).last_hidden_state[0]
        x_D = {"mean": states_TD.mean(0), "first": states_TD[0], "last": states_TD[-1]}[pool].numpy()
        assert np.allclose(vector, x_D / np.linalg.norm(x_D), atol=1e-5)
    model, _ = load(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "1_Pooling")  # as if it had been killed before it wrote this
    for file in ("out/modules.json", "out.run/report.json"):
        (tmp_path / file).unlink()
    taught(base, ROWS, tmp_path / "out", f"tasks.pool={pool}", "tasks.length=12", "resume=true")
    again = taught(
        tmp_path / "out", ROWS, tmp_path / "on"
    )  # a base's own pooling and length are the defaults
    assert again.extra["vectors"] == report.extra["vectors"]
    assert sentence.recipe(tmp_path / "on", model) == sentence.recipe(tmp_path / "out", model)
    asked = {
        "model": str(tmp_path / "on"),
        "on": [str(tmp_path / "on.jsonl")],
        "device": "cpu",
        "resamples": 9,
    }
    told = evaluate.run(EvaluateSettings.model_validate(asked), quiet=True).extra["record"]
    assert told["models"][asked["model"]]["pooling"] == pool


def test_a_layer_behind_the_pooling_is_not_lost_unsaid(base: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(base, tmp_path / "dense"))
    modules = [
        {"type": kind, "path": path} for kind, path in (("Transformer", ""), ("Pooling", "1"), ("Dense", "2"))
    ]
    (place / "modules.json").write_text(json.dumps(modules))
    for name, said in (("1", {"pooling_mode": "cls"}), ("2", {"bias": False})):
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(said))
    save_file({"linear.weight": torch.eye(32)[:8]}, place / "2" / "model.safetensors")
    with pytest.raises(UsageError, match="pass a layer behind the pooling.*choose --pool first"):
        taught(place, ROWS, tmp_path / "out")
    assert taught(place, ROWS, tmp_path / "out", "tasks.pool=first").extra["vectors"]["width"] == 32
    assert vectors(place).shape == (4, 8) and vectors(tmp_path / "out").shape == (4, 32)


def test_what_is_made_of_a_model_makes_its_vectors(base: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(base, tmp_path / "first"))
    sentence.write(place, "first", 32, 12)
    export.run(ExportSettings(model=str(place), to="hf", out=tmp_path / "hf"), quiet=True)
    assert np.allclose(vectors(tmp_path / "hf"), vectors(place), atol=1e-6)
    compress.run(CompressSettings(model=str(place), bits=8, out=tmp_path / "small", device="cpu"), quiet=True)
    assert (vectors(tmp_path / "small") * vectors(place)).sum(1).min() > 0.99
    model, _ = load(place)
    adapt(model, LoRASettings(lora_r=2), 0)
    (tmp_path / "adapter").mkdir()
    write_adapter(model, tmp_path / "adapter", str(place))
    merge.run(MergeSettings(adapter=str(tmp_path / "adapter"), out=tmp_path / "merged"), quiet=True)
    export.run(ExportSettings(model=str(tmp_path / "adapter"), to="hf", out=tmp_path / "out"), quiet=True)
    for name in ("adapter", "merged", "out"):  # an adapter of zeros
        assert np.allclose(vectors(tmp_path / name), vectors(place), atol=1e-5)


def test_a_text_twice_in_a_row_is_left_out_and_named(base: Path, tmp_path: Path) -> None:
    twice = [["a cat", "a cat"], ["a cat", "a mat", "a mat"], ["a cat", "a mat", "a cat"]]
    rows = [[row["anchor"], row["positive"], "far"] for row in ROWS]
    report = taught(base, [*rows, *twice], tmp_path / "out")
    assert report.counts["examples"] + report.counts["held_out_examples"] == 40
    assert "left out: 3 a text twice in one row (such as " in report.text and "out.jsonl:41" in report.text
    with pytest.raises(DataError, match="2 x a text twice in one row"):
        taught(base, twice[:1] * 2, tmp_path / "none")
    report = taught(base, [*ROWS, *twice[:1]], tmp_path / "noise", "train.dropout=0.1")
    assert report.counts["anchors equal to their positive"] == 1 and "left out" not in report.text
