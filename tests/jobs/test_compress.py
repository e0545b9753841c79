"""`langmill compress` from the command line: a folder that works, a report that tells, and errors that help."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from langmill import cli
from langmill.families.folder import load, save
from langmill.jobs import compress
from langmill.model import products
from langmill.model.config import Head, Learned, LSTMConfig, ModelConfig, Sinusoidal, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.layers import Int4Linear, Int8Embedding
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

TEXTS = [f"The boat of number {i} went down the long river. 第{i}句很长。" * (1 + i % 4) for i in range(60)]
SHAPE = StackConfig(dim=64, layers=2, heads=2, kv_heads=2, head_dim=32, hidden=96)


@pytest.fixture(autouse=True, scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "KEPT", tmp_path_factory.mktemp("home") / "products.json")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and models of random weights, large enough to predict something."""
    folder = tmp_path_factory.mktemp("compress")
    tokenizer = Tokenizer.train(TEXTS, 320)
    vocab = tokenizer.vocab_size
    source = replace(SHAPE, position=Sinusoidal(), causal=False, norm_order="post", norm="layer", activation="relu",
                     gated=False, bias=frozenset({"q", "k", "v", "o", "mlp"}))  # fmt: skip
    bert = replace(source, position=Learned(), activation="gelu", norm_eps=1e-12)
    start = Tokens(vocab, 64, start=tokenizer.fill_id)
    configs = {
        "decoder": ModelConfig(SHAPE, Tokens(vocab, 64), head=Head(vocab)),
        "odd": ModelConfig(replace(SHAPE, hidden=40), Tokens(vocab, 64), head=Head(vocab)),
        "narrow": ModelConfig(StackConfig(24, 1, 2, 2, 12, 40), Tokens(vocab, 64), head=Head(vocab)),
        "encoder": ModelConfig(
            encoder=bert, encoder_input=Tokens(vocab, 64, types=2, norm=True)
        ),
        "both": ModelConfig(
            replace(source, causal=True, cross=True), start, source, Tokens(vocab, 64), Head(vocab, True, True)
        ),
    }  # fmt: skip
    for name, config in configs.items():
        model: Any = Transformer(config)
        init_(model, 0)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 2:
                    weight.mul_(4.0)
        save(model, tokenizer, folder / name)
    recurrent = LSTM(LSTMConfig(vocab, 32, 64, 64))
    init_(recurrent, 0)
    save(recurrent, tokenizer, folder / "lstm")
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
    (folder / "rows.jsonl").write_text(rows + '{"title": 1}\n', encoding="utf-8")
    pairs = [
        {"translation": {"en": f"{i} boats on the river", "de": f"{i} Boote auf dem Fluss"}}
        for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs), encoding="utf-8")
    (folder / "encoder" / "1_Pooling").mkdir()
    (folder / "encoder" / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true}', encoding="utf-8"
    )
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object, ok: bool = True) -> dict[str, Any]:
    code = cli.run(["compress", *map(str, words), "--threads", "1", "--quiet", "--json"])
    out, err = capsys.readouterr()
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    assert (code == 0) is ok, err
    return found


def test_a_decoder_gets_smaller_and_the_report_says_what_it_cost(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, source = tmp_path / "small", place / "decoder"
    found = run(capsys, source, "--bits", 4, "--out", out, "--data", place / "rows.jsonl", "--samples", 8)
    figures, counts = found["figures"], found["counts"]
    assert counts["layers"] == 15 and counts["left"] == 0 and 0 < counts["held_out_documents"] < 30
    assert counts["calibration_tokens"] == 8 * 64 and found["calibration"].startswith("by GPTQ on")
    assert (
        figures["bytes"]
        < 0.4 * figures["bytes_before"]
        == 0.4 * (source / "model.safetensors").stat().st_size
    )
    assert abs(figures["bits_per_byte"] - figures["bits_per_byte_before"]) < 0.2
    low, high = figures["bits_per_byte_difference_interval"]
    assert low <= figures["bits_per_byte_difference"] <= high
    assert 0 < figures["states_error"] < 0.3 and figures["tokens_per_second"] > 0
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["tokens"]["bits"] == 8 and layers["tokens"]["output_error"] is None
    assert layers["decoder.blocks.1.mlp.down"]["output_error"] > 0
    assert found["ledger"]["dropped"] and json.loads((out / "lineage.json").read_text())["settings"][
        "data"
    ] == ["rows.jsonl"]
    page = (tmp_path / "small.run" / "report.html").read_text(encoding="utf-8")
    assert "decoder.blocks.1.mlp.down" in page and "Bits per byte" in page
    saved = json.loads((tmp_path / "small.run" / "report.json").read_text(encoding="utf-8"))
    assert saved["figures"] == figures
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "compressed-tensors" in card and "langmill generate small" in card
    model: Any = load(out)[0]
    assert isinstance(model.decoder.blocks[0].mlp.up, Int4Linear) and isinstance(model.tokens, Int8Embedding)
    before = load(source)[0]
    tokens = torch.arange(30)[None] % before.config.vocab
    assert float((model(tokens) - before(tokens)).norm() / before(tokens).norm()) < 0.3
    assert cli.run(["generate", str(out), "The boat", "--max-new-tokens", "4", "--threads", "1"]) == 0
    assert (
        cli.run(["evaluate", str(out), "--on", str(place / "rows.jsonl"), "--threads", "1", "--quiet"]) == 0
    )
    capsys.readouterr()
    error = run(capsys, out, "--bits", 4, "--out", tmp_path / "again", ok=False)["error"]
    assert "rounded already" in error["message"]
    error = run(capsys, source, "--bits", 4, "--out", out, ok=False)["error"]
    assert "exists already" in error["message"]
    whole = (out / "model.safetensors").read_bytes()
    words = (source, "--out", out, "--force", "--data", tmp_path / "small.run" / "settings.yaml")
    assert not run(capsys, *words, ok=False)["ok"] and (out / "model.safetensors").read_bytes() == whole
    nearest = ("--bits", 8, "--force", "--method", "nearest")
    again = run(capsys, source, "--out", out, *nearest, "--on", place / "rows.jsonl")
    assert again["counts"]["held_out_documents"] == 60 and again["counts"]["calibration_tokens"] == 0
    assert abs(again["figures"]["bits_per_byte_difference"]) < 0.02 < figures["states_error"]


def test_without_text_a_decoder_writes_its_own_and_others_are_rounded_to_the_nearest(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(
        capsys, place / "decoder", "--bits", 4, "--out", tmp_path / "a", "--samples", 4, "--no-portable"
    )
    assert "4 texts that the model writes itself" in found["calibration"]
    assert found["counts"]["calibration_tokens"] == 4 * 64 and found["figures"]["bits_per_byte"] is None
    assert not (tmp_path / "a" / "embedding.json").exists()
    run(capsys, place / "decoder", "--bits", 4, "--out", tmp_path / "b", "--samples", 4, "--no-portable")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second
    found = run(capsys, place / "encoder", "--out", tmp_path / "c")
    assert "to the nearest, since this model does not write text itself" in found["calibration"]
    assert (tmp_path / "c" / "1_Pooling" / "config.json").is_file()
    error = run(capsys, place / "encoder", "--out", tmp_path / "d", "--method", "gptq", ok=False)["error"]
    assert "--method gptq needs text" in error["message"] and not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("kind", "data"), [("encoder", "rows.jsonl"), ("both", "pairs.jsonl"), ("both", "rows.jsonl")]
)
def test_models_with_an_encoder_are_calibrated_by_what_they_read(
    place: Path, kind: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = []
    for method in ("gptq", "nearest"):
        out = tmp_path / method
        words = ("--bits", 4, "--head-bits", 16, "--out", out, "--data", place / data, "--method", method)
        found = run(capsys, place / kind, *words)
        assert found["figures"]["bits_per_byte"] is None and found["figures"]["tokens_per_second"] is None
        errors.append(found["figures"]["states_error"])
    assert errors[0] < 0.9 * errors[1]
    assert load(tmp_path / "gptq")[0].config == load(place / kind)[0].config


def test_layers_that_do_not_divide_stay_and_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(capsys, place / "odd", "--bits", 4, "--out", tmp_path / "odd", "--method", "nearest")
    assert found["counts"] == {"layers": 13, "left": 2, "calibration_tokens": 0, "held_out_documents": 0}
    assert found["left"]["decoder.blocks.0.mlp.down"] == "40 inputs are not a multiple of 32"
    assert "2 layers stay as they are" in (tmp_path / "odd.run" / "report.html").read_text(encoding="utf-8")
    said = json.loads((tmp_path / "odd" / "config.json").read_text())["quantization_config"]
    assert [name for name in said["ignore"] if "down_proj" in name]
    load(tmp_path / "odd")
    for name, words in (("narrow", "no linear layer of its blocks can be rounded"), ("lstm", "LSTM")):
        error = run(capsys, place / name, "--out", tmp_path / "none", ok=False)["error"]
        assert words in error["message"] and not (tmp_path / "none").exists()


def test_a_dry_run_names_the_layers_and_writes_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(capsys, place / "odd", "--bits", 4, "--out", tmp_path / "none", "--dry-run")
    assert found["layers"]["decoder.blocks.0.mlp.up"] == 4 and found["layers"]["tokens"] == 8
    assert set(found["left"]) == {f"decoder.blocks.{i}.mlp.down" for i in range(2)}
    assert "writes itself" in found["calibration"] and not list(tmp_path.iterdir())
    assert 0 < found["figures"]["bytes"] < 200_000


def test_text_that_is_not_there_is_an_error(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = place / "decoder", tmp_path / "none"
    error = run(capsys, model, "--out", out, "--data", tmp_path / "nowhere", ok=False)["error"]
    assert "nowhere" in error["message"]
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "  "}\n', encoding="utf-8")
    error = run(capsys, model, "--out", out, "--data", empty, ok=False)["error"]
    assert error["type"] == "DataError" and not out.exists()


def test_what_was_not_rounded_keeps_the_files_number_type(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load(place / "decoder", dtype=torch.bfloat16)
    save(model, tokenizer, tmp_path / "narrow")
    run(capsys, tmp_path / "narrow", "--out", tmp_path / "small", "--head-bits", 16, "--method", "nearest")
    said = json.loads((tmp_path / "small" / "config.json").read_text())
    assert said["dtype"] == "bfloat16"
    small: Any = load(tmp_path / "small", dtype=torch.bfloat16)[0]
    assert torch.equal(small.tokens.weight, model.tokens.weight)


def test_equal_texts_stand_on_one_side() -> None:
    pairs = [(f"text {i % 7}",) * 2 for i in range(40)]
    ordered = sorted(pairs, key=lambda pair: compress.text_hash(pair[1]))
    kept, held = compress._split(ordered, 0.3)  # type: ignore[arg-type]
    assert kept and held and not {*kept} & {*held} and len(kept) + len(held) == 40
    assert compress._split(ordered, 0.0) == (ordered, [])
    assert compress._split(ordered[:1], 0.5) == (ordered[:1], [])
