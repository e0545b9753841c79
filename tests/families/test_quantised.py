"""Folders of rounded weights: what is written is read back bit for bit, by the format's own rules, without a copy."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from langmill.common.errors import ModelError
from langmill.compress.quantize import plan, quantise
from langmill.families import modules
from langmill.families.folder import load, save
from langmill.model import products
from langmill.model.layers import ROUNDED, Int4Linear, Int8Embedding
from langmill.model.transformer import Transformer

TINY = {name: shape for module in modules().values() for name, shape in getattr(module, "TINY", {}).items()}
WIDE = dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), 64) | dict.fromkeys(
    ("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 128
)
KINDS = (
    "llama",
    "llama-biased",
    "qwen3",
    "gpt2",
    "bert",
    "distilbert",
    "roberta",
    "marian",
    "bart",
    "t5",
    "t5-v1.1",
)
VARIANTS: dict[str, tuple[Any, ...]] = {
    "8": (8,), "4": (4,), "4 with zeros": (4, 8, False), "packed": (4, 8, True, False), "head in 4": (4, 4),
    "head as it is": (8, 16),
}  # fmt: skip
TOKENS = torch.arange(3, 25)[None]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "KEPT", tmp_path / "products.json")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each kind, wide enough for groups of 32, as transformers writes it."""
    import transformers

    found = {}
    for name in KINDS:
        shape = {k: WIDE.get(k, v) for k, v in TINY[name].items() if k != "head_dim"}
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(
            name.partition("-")[0], **({"bos_token_id": 1, "eos_token_id": 2} | shape)
        )
        classes = ("AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForCausalLM")
        mapping = next(c for c in classes if type(config) in getattr(transformers, c)._model_mapping)
        found[name] = tmp_path_factory.mktemp(name) / "plain"
        getattr(transformers, mapping).from_config(config).save_pretrained(found[name])
    return found


def rounded(where: Path, *args: Any) -> Transformer:
    model: Any = load(where)[0]
    quantise(model, plan(model, *args))
    return model


def as_plain(model: Transformer) -> Transformer:
    """The same with the rounded layers as plain ones of the weights that they stand for."""
    made = copy.deepcopy(model)
    for name, layer in list(made.named_modules()):
        if isinstance(layer, ROUNDED):
            parent, _, leaf = name.rpartition(".")
            fresh: Any = nn.Embedding(1, 1) if name == "tokens" else nn.Linear(1, 1, bias=False)
            fresh.weight = nn.Parameter(layer.weight, requires_grad=False)
            if name != "tokens":
                fresh.bias = layer.bias
            setattr(made.get_submodule(parent), leaf, fresh)
    return made


def given(model: Transformer) -> dict[str, Tensor]:
    return {"encoder_tokens": TOKENS} if len(model.config.stacks) > 1 else {}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_back_bit_for_bit(
    plain: dict[str, Path], kind: str, variant: str, tmp_path: Path
) -> None:
    model = rounded(plain[kind], *VARIANTS[variant])
    save(model, None, tmp_path / "one")
    again, _ = load(tmp_path / "one")
    mine, theirs = model.state_dict(), again.state_dict()
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert {type(m) for m in again.modules()} == {type(m) for m in model.modules()}
    with torch.no_grad():
        assert torch.equal(model(TOKENS, **given(model)), again(TOKENS, **given(model)))
    save(again, None, tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("variant", ["8", "4", "head as it is"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("gpt2")])
def test_transformers_reads_the_same_logits(
    plain: dict[str, Path], kind: str, variant: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    import transformers

    model = rounded(plain[kind], *VARIANTS[variant])
    save(model, None, tmp_path / "model")
    architecture = json.loads((tmp_path / "model" / "config.json").read_text())["architectures"][0]
    more: dict[str, Any] = {}
    if kind.startswith("t5"):  # whose own code asks for layer.weight while it loads
        more["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    other = (
        getattr(transformers, architecture)
        .from_pretrained(tmp_path / "model", dtype=torch.float32, **more)
        .eval()
    )
    with torch.no_grad():
        if given(model):
            logits = other(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
        else:
            logits = other(TOKENS).logits
        torch.testing.assert_close(as_plain(model)(TOKENS, **given(model)), logits, rtol=1e-4, atol=1e-4)


def decoded(tensors: dict[str, Tensor], stem: str, bits: int) -> np.ndarray[Any, Any]:
    """The format by its definition: codes lie one after another in the bits of each row's words."""
    words = tensors[f"{stem}.weight_packed"].numpy().view("<u4")
    outputs, inputs = tensors[f"{stem}.weight_shape"].tolist()
    places = np.arange(inputs) * bits
    codes = (words[:, places // 32] >> (places % 32)) & (2**bits - 1)
    scale = tensors[f"{stem}.weight_scale"].float().numpy()
    zero: Any = 2 ** (bits - 1)
    if (name := f"{stem}.weight_zero_point") in tensors:
        packed, rows = tensors[name].numpy().view("<u4"), np.arange(outputs)
        zero = (packed[rows // 8] >> ((rows % 8) * 4)[:, None]) & 15
        zero = np.repeat(zero, inputs // scale.shape[1], axis=1)
    numbers = codes.astype(np.int64) - zero
    return numbers * np.repeat(scale, inputs // scale.shape[1], axis=1)


@pytest.mark.parametrize("variant", ["8", "4", "4 with zeros"])
def test_the_file_holds_what_the_format_says(plain: dict[str, Path], variant: str, tmp_path: Path) -> None:
    model = rounded(plain["llama-biased"], *VARIANTS[variant])
    save(model, None, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    layer: Any = model.decoder.blocks[1].mlp.down  # type: ignore[union-attr,index]
    found = decoded(tensors, "model.layers.1.mlp.down_proj", 8 if variant == "8" else 4)
    torch.testing.assert_close(torch.from_numpy(found).float(), layer.weight, rtol=1e-6, atol=0)
    assert torch.equal(tensors["model.embed_tokens.weight"].float(), model.tokens.weight)
    head = decoded(tensors, "lm_head", 8)
    torch.testing.assert_close(torch.from_numpy(head).float(), model.head_weight, rtol=1e-6, atol=0)
    said = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["format"] == "pack-quantized"
    targets = [target for group in said["config_groups"].values() for target in group["targets"]]
    assert "Linear" in targets and r"re:.*lm_head$" in targets and said["ignore"] == []
    assert {group["weights"]["symmetric"] for group in said["config_groups"].values()} >= {
        variant != "4 with zeros"
    }


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is read from /proc")
def test_codes_of_four_bits_stay_in_the_mapped_file(plain: dict[str, Path], tmp_path: Path) -> None:
    save(rounded(plain["llama"], 4), None, tmp_path / "model")
    model, _ = load(tmp_path / "model")
    maps = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if str(tmp_path) in line
    ]
    layers = [layer for layer in model.modules() if isinstance(layer, Int4Linear)]
    assert len(layers) == 14
    for layer in layers:
        for part in (layer.codes, layer.steps):
            assert any(start <= part.data_ptr() < end for start, end in maps)


@pytest.mark.parametrize("size", [32, 64, None])
def test_other_tools_groups_and_types_are_read(
    plain: dict[str, Path], size: int | None, tmp_path: Path
) -> None:
    """W4A16 as others write it: groups of any multiple of 32 or whole rows, steps in bfloat16."""
    model: Any = load(plain["llama"])[0]
    save(model, None, tmp_path / "model")
    file, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    tensors, expected = load_file(file), dict[str, Tensor]()
    for name in [name for name in tensors if "proj" in name]:
        weight, stem = tensors.pop(name), name.removesuffix(".weight")
        groups = weight.unflatten(1, (-1, size or weight.shape[1]))
        scale = (groups.abs().amax(-1) / 7).bfloat16()
        numbers = (groups / scale.float()[..., None]).round().clamp(-8, 7)
        expected[name] = (numbers * scale.float()[..., None]).flatten(1)
        nibbles = (numbers.flatten(1) + 8).long().unflatten(1, (-1, 8))
        words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
        tensors[f"{stem}.weight_packed"] = words.numpy().astype(np.uint32).view(np.int32)  # type: ignore[assignment]
        tensors[f"{stem}.weight_packed"] = torch.from_numpy(tensors[f"{stem}.weight_packed"])  # type: ignore[arg-type]
        tensors[f"{stem}.weight_scale"] = scale
        tensors[f"{stem}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, file, metadata={"format": "pt"})
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group" if size else "channel",
            "group_size": size, "actorder": "static", "observer": "minmax", "dynamic": False}  # fmt: skip
    told = {"quant_method": "compressed-tensors", "format": "pack-quantized", "sparsity_config": {},
            "transform_config": {}, "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
            "ignore": ["lm_head"], "kv_cache_scheme": None, "version": "0.12.2"}  # fmt: skip
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": told}))
    found: Any = load(tmp_path / "model")[0]
    for i, block in enumerate(found.decoder.blocks):
        torch.testing.assert_close(
            block.mlp.up.weight, expected[f"model.layers.{i}.mlp.up_proj.weight"], rtol=1e-3, atol=1e-6
        )
    save(found, None, tmp_path / "own")
    own: Any = load(tmp_path / "own")[0]
    assert torch.equal(own.decoder.blocks[0].attention.q.weight, found.decoder.blocks[0].attention.q.weight)


def test_schemes_that_are_not_known_are_refused(plain: dict[str, Path], tmp_path: Path) -> None:
    save(rounded(plain["llama"], 4), None, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    whole = json.loads(file.read_text())
    said = whole["quantization_config"]
    group = said["config_groups"]["group_0"]

    def refused(words: str, **changed: Any) -> None:
        file.write_text(json.dumps(whole | {"quantization_config": said | changed}))
        with pytest.raises(ModelError, match=words):
            load(tmp_path / "model")

    def weights(words: str, **changed: Any) -> None:
        refused(words, config_groups={"group_0": group | {"weights": group["weights"] | changed}})

    refused("quantised \\(awq\\); take the model before that", quant_method="awq")
    refused("kv_cache_scheme", kv_cache_scheme={"num_bits": 8})
    refused("sparsity_config", sparsity_config={"format": "sparse-bitmask"})
    refused("transform_config", transform_config={"config_groups": {"R1": {}}})
    refused("no config_groups", config_groups={})
    refused(
        "input_activations, which are rounded too",
        config_groups={"g": group | {"input_activations": {"num_bits": 8}}},
    )
    refused("the format 'int-quantized'", config_groups={"g": group | {"format": "int-quantized"}})
    refused("group_0 has no weights", config_groups={"group_0": ["Linear"]})
    weights("weights of 3 bits", num_bits=3)
    weights("weights of 8 bits, float", num_bits=8, type="float")
    weights("order of activations 'group'", actorder="group")
    weights("groups of 16 weights", group_size=16)
    weights("groups of 32 weights of 8 bits", num_bits=8)
    weights("the strategy 'tensor'", strategy="tensor")
    weights("zeros of 8 bits", num_bits=8, strategy="channel", symmetric=False)
    file.write_text(json.dumps(whole | {"quantization_config": "gptq"}))
    with pytest.raises(ModelError, match="quantised \\(gptq\\)"):
        load(tmp_path / "model")


def test_damaged_tensors_are_refused_by_name(plain: dict[str, Path], tmp_path: Path) -> None:
    save(rounded(plain["llama"], 4), None, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    whole = load_file(file)
    stem = "model.layers.0.mlp.up_proj"
    packed, scale = whole[f"{stem}.weight_packed"], whole[f"{stem}.weight_scale"]

    def refused(words: str, **changed: Tensor | None) -> None:
        tensors = whole | {f"{stem}.weight_{part}": value for part, value in changed.items()}
        save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, file)
        with pytest.raises(ModelError, match=words):
            load(tmp_path / "model")

    refused("no weight_scale", scale=None)
    refused("no weight_shape", shape=None)
    refused("has shape \\(96, 32\\)", shape=torch.tensor([96, 32]))
    refused("int32", packed=packed.float())
    refused("neither 8 bits by channel nor 4 bits", packed=packed[:, :3])
    refused("not a finite row for each output", scale=scale[:5])
    refused("not a finite row", scale=torch.full_like(scale, torch.nan))
    refused("largest", scale=torch.full(scale.shape, 1e6))
    refused(
        "weight_zero_point of shape \\(3, 2\\) does not fit", zero_point=torch.zeros(3, 2, dtype=torch.int32)
    )
    refused("weight_g_idx is not part of this model", g_idx=torch.zeros(64, dtype=torch.int32))
    refused("is missing", packed=None)
    other = {**whole, "model.norm.weight_packed": packed.clone()}
    save_file(other, file)
    with pytest.raises(ModelError, match="model.norm has a weight_packed, but no weight_scale"):
        load(tmp_path / "model")


def test_steps_that_belong_to_another_embedding_are_refused(plain: dict[str, Path], tmp_path: Path) -> None:
    model = rounded(plain["llama"], 8)
    save(model, None, tmp_path / "model")
    own = tmp_path / "model" / "embedding.json"
    said = json.loads(own.read_text())
    assert isinstance(load(tmp_path / "model")[0].tokens, Int8Embedding)
    other = copy.deepcopy(model)
    assert isinstance(other.tokens, Int8Embedding)
    other.tokens.steps = other.tokens.steps.flip(0)
    save(other, None, tmp_path / "other")
    for text, words in (
        ((tmp_path / "other" / "embedding.json").read_text(), "not made of its steps"),
        (json.dumps(said | {"steps": said["steps"][:40]}), "do not fit the embedding"),
        (json.dumps(said | {"steps": "?"}), "no steps that can be read"),
        (json.dumps({k: v for k, v in said.items() if k != "steps"}), "no steps that can be read"),
        ("{", "damaged"),
    ):
        own.write_text(text)
        with pytest.raises(ModelError, match=words):
            load(tmp_path / "model")
    own.unlink()  # without them it is a plain embedding of the same values
    assert torch.equal(load(tmp_path / "model")[0].tokens.weight, model.tokens.weight)


def test_minima_that_no_folder_holds_are_refused(plain: dict[str, Path], tmp_path: Path) -> None:
    model: Any = load(plain["llama"])[0]
    block = model.decoder.blocks[0].mlp
    block.up = Int4Linear.of(block.up)
    with pytest.raises(ModelError, match="minima that are no whole steps"):
        save(model, None, tmp_path / "model")
    gpt2: Any = load(plain["gpt2"])[0]
    gpt2.decoder.blocks[0].attention.q = Int4Linear.of(gpt2.decoder.blocks[0].attention.q)
    with pytest.raises(ModelError, match="different numbers of bits"):
        save(gpt2, None, tmp_path / "model")
