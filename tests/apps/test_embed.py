"""Vectors in 8 bits by the command, with a C++ compiler and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from langmill.apps import embed
from langmill.common.configure import configure
from langmill.common.errors import DataError, UsageError
from langmill.common.settings import EmbedSettings, SimilarSettings
from langmill.families.folder import load, save
from langmill.infer import native_build
from langmill.infer.native_embed import eight_bits
from langmill.model.config import Learned, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

TEXTS = ["a first text", "第二个文本", "نص ثالث", "a long text " * 9]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    tokenizer = Tokenizer.train(TEXTS * 3, 300)
    stack = StackConfig(
        32, 2, 2, 2, 16, 64, norm="layer", norm_eps=1e-12, activation="gelu", gated=False, position=Learned(),
        bias=frozenset({"q", "k", "v", "o", "mlp"}), norm_order="post", causal=False,
    )  # fmt: skip
    model = Transformer(
        ModelConfig(encoder=stack, encoder_input=Tokens(tokenizer.vocab_size, 16, types=2, norm=True))
    )
    init_(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    save(model, tokenizer, folder)
    return folder


def vectors(model: Path, **more: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    settings = configure(EmbedSettings, None, [], model=str(model), text=TEXTS, device="cpu", **more)
    results = embed.run(settings, quiet=more.pop("quiet", True), as_json=True).extra["results"]
    return np.array([result["embedding"] for result in results], np.float32)


def test_8_bits_are_near_whole_numbers_in_any_batch(encoder: Path) -> None:
    plain, eight = vectors(encoder, long_texts="window"), vectors(encoder, bits=8, long_texts="window")
    assert 0.99 < (plain * eight).sum(1).min() < 0.9999999
    assert np.array_equal(eight, vectors(encoder, bits=8, batch_size=1, long_texts="window"))
    asked = configure(
        SimilarSettings, None, [], model=str(encoder), text=TEXTS, query=TEXTS[1], bits=8, device="cpu"
    )
    (best, *_) = embed.similar(asked, quiet=True, as_json=True).extra["results"]
    assert best["text"] == TEXTS[1] and best["score"] == pytest.approx(1)


def test_a_folder_in_8_bits_embeds_the_same_way(encoder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(encoder)
    eight_bits(model)
    save(model, tokenizer, tmp_path / "eight")
    settings = configure(EmbedSettings, None, [], model=str(tmp_path / "eight"), text=TEXTS, device="cpu")
    assert embed.Reader.of(settings)._native is not None
    assert np.array_equal(vectors(tmp_path / "eight"), vectors(encoder, bits=8))


def test_without_a_compiler_it_says_so_and_reads_all_the_same(
    encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native = vectors(encoder, bits=8)
    monkeypatch.setattr(native_build, "COMPILERS", ("no-such-compiler",))
    native_build.library.cache_clear()
    try:
        asked = configure(EmbedSettings, None, [], model=str(encoder), text=TEXTS, bits=8, device="cpu")
        reader = embed.Reader.of(asked)
        slow = vectors(encoder, bits=8)
    finally:
        native_build.library.cache_clear()
    said = "read by torch's operators, slower than the C++ pass for fewer bits: there is no C++ compiler here"
    assert said in capsys.readouterr().err and reader.slow is not None
    assert (native * slow).sum(1).min() > 0.999


def test_parquet_keeps_the_rows_other_columns_as_jsonl_does(encoder: Path, tmp_path: Path) -> None:
    rows = [
        {"id": 7, "text": TEXTS[0], "embedding": [1.0], "tags": ["a"]},
        {"id": 8, "body": TEXTS[1], "text": TEXTS[2]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name in ("v.parquet", "v.jsonl"):
        asked = {
            "model": str(encoder),
            "file": tmp_path / "rows.jsonl",
            "out": tmp_path / name,
            "device": "cpu",
        }
        embed.run(configure(EmbedSettings, None, [], **asked), quiet=True)
    table = pyarrow.parquet.read_table(tmp_path / "v.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, line in zip(table, lines, strict=True):
        assert np.allclose(row.pop("embedding"), line.pop("embedding"), atol=1e-6)
        assert {name: value for name, value in row.items() if value is not None} == line
    assert lines[0] == {"id": 7, "text": TEXTS[0], "tags": ["a"], "given": {"embedding": [1.0]}}
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "x": 1}\n{"text": "b", "x": "one"}', encoding="utf-8")
    asked["out"] = tmp_path / "w.parquet"
    with pytest.raises(DataError, match="the field x is no column"):
        embed.run(configure(EmbedSettings, None, [], **asked), quiet=True)
    assert not asked["out"].exists()


def test_a_query_without_words_is_refused(encoder: Path) -> None:
    asked = configure(SimilarSettings, None, [], model=str(encoder), text=TEXTS, query=" \n", device="cpu")
    with pytest.raises(UsageError, match="the query is empty"):
        embed.similar(asked, quiet=True)
