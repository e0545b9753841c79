"""Folders of sentence-transformers: pooling, what follows it, where texts are cut; by hand from a model's states."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from langmill.apps import embed, sentence
from langmill.apps.texts import Row
from langmill.common.configure import configure
from langmill.common.errors import DataError, ModelError, UsageError
from langmill.common.settings import ClassifySettings, EmbedSettings
from langmill.families.folder import load, save
from langmill.model.config import Learned, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

TEXTS = ["A first text", "第二个文本", "نص ثالث", "a long text " * 9]
OFF = {"pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False, "include_prompt": True}
POOLINGS: list[tuple[dict[str, Any], str]] = [
    ({"pooling_mode": "mean"}, "mean"),
    ({"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}, "first"),
    ({"pooling_mode": ["lasttoken"]}, "last"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, **OFF}, "first"),
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, **OFF}, "mean"),
    ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True, **OFF}, "last"),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"pooling_mode": "max"}, "pools by max: choose --pool mean"),
    ({"pooling_mode": ["mean", "max"]}, "pools by mean and max"),
    ({"pooling_mode_weightedmean_tokens": True}, "pools by weightedmean"),
    ({}, "pools by nothing"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    tokenizer = Tokenizer.train(TEXTS * 3, 300)
    stack = StackConfig(
        32, 2, 2, 2, 16, 64, norm="layer", norm_eps=1e-12, activation="gelu", gated=False, position=Learned(),
        bias=frozenset({"q", "k", "v", "o", "mlp"}), norm_order="post", causal=False,
    )  # fmt: skip
    model = Transformer(
        ModelConfig(encoder=stack, encoder_input=Tokens(tokenizer.vocab_size, 24, types=2, norm=True))
    )
    init_(model, 0)
    save(model, tokenizer, folder)
    return folder


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


def put(place: Path, kinds: str, pooling: Any = None, **config: Any) -> Path:
    """A folder with these modules, as sentence-transformers numbers them. config: of the Transformer."""
    paths = [f"{at}_{kind}" if at else "" for at, kind in enumerate(kinds.split())]
    modules = [{"idx": at, "path": path, "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}"}
               for at, path in enumerate(paths)]  # fmt: skip
    (place / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (place / "1_Pooling").mkdir()
        (place / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (place / "sentence_bert_config.json").write_text(json.dumps(config))
    return place


def dense(
    folder: Path, ins: int, outs: int, name: str = "torch.nn.modules.activation.Tanh", **more: Any
) -> Any:
    generator = torch.Generator().manual_seed(outs)
    weights = {
        "linear.weight": torch.randn(outs, ins, generator=generator),
        "linear.bias": torch.randn(outs, generator=generator),
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    said = {"in_features": ins, "out_features": outs, "bias": True, "activation_function": name, **more}
    (folder / "config.json").write_text(json.dumps(said))
    return [tensor.numpy() for tensor in weights.values()]


def vectors(model: Path, texts: list[str] = TEXTS, **more: Any) -> Any:
    return counted(model, texts, **more)[0]


def counted(model: Path, texts: list[str] = TEXTS, **more: Any) -> tuple[Any, Counter[str]]:
    settings = configure(EmbedSettings, None, [], model=str(model), device="cpu", **more)
    reader, told = embed.Reader.of(settings, quiet=True), Counter[str]()
    return np.stack(list(reader.vectors([Row(text, text, {}) for text in texts], told))), told


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(("said", "pool"), POOLINGS)
def test_how_a_folder_pools(said: dict[str, Any], pool: str, place: Path) -> None:
    plain = vectors(place, pool=pool, long_texts="truncate")
    assert np.allclose(vectors(put(place, "Transformer Pooling Normalize", said)), plain, atol=1e-6)
    assert pool == "mean" or not np.allclose(vectors(place), vectors(place, pool="mean"), atol=1e-3)


@pytest.mark.parametrize(("said", "message"), REFUSED)
def test_what_is_not_a_pooling_of_ours_is_refused(said: dict[str, Any], message: str, place: Path) -> None:
    with pytest.raises(ModelError, match=message):
        vectors(put(place, "Transformer Pooling", said))
    vectors(place, pool="mean")


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (
            "Transformer Pooling LSTM",
            "has LSTM as module 2, which is not applied here .*sentence-transformers",
        ),
        ("Transformer WordWeights Pooling", "has WordWeights as module 1"),
        ("Transformer Pooling", "names 1_Pooling, and .*config.json is missing: fetch the folder whole"),
        ("Transformer Normalize", "names no Pooling"),
    ],
)
def test_modules_that_are_not_known_or_not_there_are_named(kinds: str, message: str, place: Path) -> None:
    with pytest.raises(ModelError, match=message):
        vectors(put(place, kinds))
    (place / "modules.json").write_text('[{"type": "Transformer", "path": ".."}]')
    with pytest.raises(ModelError, match=r"names \.\., which is no folder beside it"):
        vectors(place)


def test_without_such_files_the_mean_is_taken_and_a_broken_one_is_named(place: Path) -> None:
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    first = vectors(place)
    shutil.rmtree(place / "1_Pooling")
    assert np.array_equal(vectors(place), vectors(place, pool="mean")) and not np.allclose(
        first, vectors(place)
    )
    for text in ("[", "{}", '[{"path": ""}]', "[3]"):
        (place / "modules.json").write_text(text)
        with pytest.raises(ModelError, match="is no list of modules, each with its type and path"):
            vectors(place)


def test_linear_layers_behind_the_pooling(place: Path) -> None:
    pooled = vectors(place, normalise=False, long_texts="truncate")
    put(place, "Transformer Pooling Dense Normalize Dense Normalize", {"pooling_mode": "mean"})
    one, plus = dense(place / "2_Dense", 32, 12)
    two, more = dense(place / "4_Dense", 12, 40, "torch.nn.modules.linear.Identity")
    by_hand = unit(np.tanh(pooled @ one.T + plus)) @ two.T + more
    assert np.allclose(vectors(place), unit(by_hand), atol=1e-5)
    assert np.allclose(vectors(place, normalise=False), by_hand, atol=1e-4)
    assert np.allclose(vectors(place, dims=36), unit(by_hand[:, :36]), atol=1e-5)
    assert (vectors(place, bits=8) * unit(by_hand)).sum(1).min() > 0.99
    with pytest.raises(UsageError, match="of vectors of 40 numbers"):
        vectors(place, dims=41)


@pytest.mark.parametrize(
    ("ins", "more", "message"),
    [
        (31, {}, "holds no linear.weight for vectors of 32 numbers"),
        (32, {"bias": False}, "disagree about linear.bias"),
        (32, {"use_residual": True}, "asks for more than a linear layer"),
        (32, {"name": "my.own.Swish"}, "asks for more than a linear layer and Identity, Tanh"),
        (32, {"module_input_name": "token_embeddings"}, "asks for more"),
    ],
)
def test_other_layers_are_refused(ins: int, more: dict[str, Any], message: str, place: Path) -> None:
    put(place, "Transformer Pooling Dense", {"pooling_mode": "mean"})
    dense(place / "2_Dense", ins, 8, **more)
    with pytest.raises(ModelError, match=message):
        vectors(place)
    (place / "2_Dense" / "model.safetensors").write_bytes(b"\x10")
    if ins == 31:
        with pytest.raises(ModelError, match="cannot be read"):
            vectors(place)
        (place / "2_Dense" / "model.safetensors").unlink()
        with pytest.raises(ModelError, match="is missing: fetch the folder whole"):
            vectors(place)


@pytest.mark.parametrize("said", [{"max_seq_length": 9}, {"processor_kwargs": {"model_max_length": 9}}, {}])
def test_texts_are_cut_where_sentence_transformers_cuts_them(said: dict[str, Any], place: Path) -> None:
    if not said:  # the tokenizer says it
        file = place / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 9}))
    put(place, "Transformer Pooling", {"pooling_mode": "mean"}, **said)
    model, tokenizer = load(place)
    assert tokenizer is not None and isinstance(model, Transformer)
    around = tokenizer.frame.room()
    wanted = [tokenizer.frame.one(tokenizer.encode(text)[: 9 - around]).ids for text in TEXTS]
    with torch.no_grad():
        by_hand = np.stack([model.hidden(torch.tensor([ids]))[0].mean(0).numpy() for ids in wanted])
    found, told = counted(place)
    assert (
        np.allclose(found, unit(by_hand), atol=1e-5) and told["truncated"] >= 1 and told["tokens cut off"] > 9
    )
    assert not told["windowed"] and counted(place, long_texts="window")[1]["windowed"] == told["truncated"]
    with pytest.raises(DataError, match="choose truncate or window"):
        vectors(place, long_texts="error")


def test_a_length_beyond_the_model_is_the_models(place: Path) -> None:
    for length in (1000, None, 1e30, -1):
        put(place, "Transformer Pooling Normalize", max_seq_length=length)
        assert embed.Reader.of(EmbedSettings(model=str(place), pool="mean", device="cpu")).limit.length == 24


def test_what_stands_in_front_of_texts_and_small_letters(place: Path) -> None:
    put(place, "Transformer Pooling", {"pooling_mode": "mean"}, do_lower_case=True)
    prompts = {"prompts": {"query": "first ", "document": ""}, "default_prompt_name": "query"}
    (place / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    found = vectors(place, TEXTS[:3])
    (place / "config_sentence_transformers.json").write_text(
        json.dumps({**prompts, "default_prompt_name": None})
    )
    assert np.allclose(found, vectors(place, [f"First {text}".swapcase() for text in TEXTS[:3]]), atol=1e-6)
    (place / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (place / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean", "include_prompt": false}')
    with pytest.raises(ModelError, match='leaves the prompt "first " out'):
        vectors(place)


def test_what_is_written_is_read_and_copied(base: Path, place: Path, tmp_path: Path) -> None:
    model, _ = load(place)
    for _ in range(2):
        sentence.write(place, "last", 32, 11)
    assert sentence.recipe(place, model) == sentence.Recipe("last", 32, 11)
    dense(place / "2_Dense", 32, 4)
    copied = Path(shutil.copytree(base, tmp_path / "copied"))
    sentence.copy(place, copied)
    assert np.array_equal(vectors(copied), vectors(place))
    assert (copied / "2_Dense" / "model.safetensors").is_file()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(place)}))
    assert sentence.recipe(adapter, model).pool == "last"
    (adapter / "modules.json").write_bytes((place / "modules.json").read_bytes())
    with pytest.raises(ModelError, match="names 1_Pooling"):
        sentence.recipe(adapter, model)


def test_zero_shot_reads_a_text_as_embed_does(place: Path) -> None:
    from langmill.apps.classify import reader

    put(place, "Transformer Pooling", {"pooling_mode": "cls"}, max_seq_length=9)
    model, tokenizer = load(place)
    assert tokenizer is not None
    settings = configure(ClassifySettings, None, [], model=str(place), labels=TEXTS[1:3], device="cpu")
    told = Counter[str]()
    list(reader(settings, model, tokenizer)([Row("text 1", TEXTS[3], {})], told))
    assert told["truncated"] == 1 and not told["windowed"]
