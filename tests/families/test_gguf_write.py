"""GGUF files of ours: the gguf package, transformers and our reader find in them what was written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

gguf = pytest.importorskip("gguf")

from langmill.common.errors import ModelError  # noqa: E402
from langmill.families import bert, family, gpt2, llama  # noqa: E402
from langmill.families.gguf import NAMES, half_split, load_gguf  # noqa: E402
from langmill.families.gguf_file import read  # noqa: E402
from langmill.families.gguf_pack import TYPES, packed, unpacked  # noqa: E402
from langmill.families.gguf_write import differing, paired, pieces, save_gguf  # noqa: E402
from langmill.model.config import RopeScaling  # noqa: E402
from langmill.model.layers import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear  # noqa: E402
from langmill.model.replace import replace  # noqa: E402
from langmill.model.transformer import Transformer  # noqa: E402
from langmill.text.specials import Specials  # noqa: E402
from langmill.text.tokenizer import Tokenizer  # noqa: E402

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300, "head_dim": 16}
TINY: dict[str, dict[str, Any]] = {
    name: {**shape, **SHAPE, "model_type": name.partition("-")[0]}
    for name, shape in llama.TINY.items()
    if name not in ("llama-dynamic", "qwen2-windows")  # the format cannot say these
}
TINY["llama-odd"] = {**TINY["llama"], "intermediate_size": 56}  # rows that are no whole blocks
for untied in (False, True):
    TINY["gpt2-untied" if untied else "gpt2"] = {
        **gpt2.TINY["gpt2"], "n_embd": 64, "vocab_size": 300, "model_type": "gpt2", "tie_word_embeddings": not untied,
    }  # fmt: skip
FOUR = ("llama", "qwen2", "qwen3", "gpt2")
TOKENS = torch.arange(3, 43)[None] * 7 % 300


def model_of(name: str, **changes: Any) -> Transformer:
    """A model of random weights, biases and norms included."""
    shape = {**TINY[name], **changes}
    model = Transformer(family(shape["model_type"], name).config(shape)).eval()
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0.0 if weight.dim() > 1 else 0.5, 0.2)
    return model


def ending() -> Tokenizer:
    """A tokenizer of bytes and one more token, which ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: id for id, token in enumerate([*letters, "<|endoftext|>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Tokenizer(backend, Specials(eos=256))


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS)
    return found


@pytest.mark.parametrize("name", TINY)
def test_what_is_read_back_computes_the_same(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    before = logits(model)
    found = save_gguf(model, None, tmp_path / "x.gguf", "F32")
    again, tokenizer = load_gguf(tmp_path / "x.gguf")
    assert tokenizer is None and (logits(again) - before).abs().max() < 1e-4
    assert {piece.kind for piece in found} == {"F32"}
    ours, theirs = model.config.main, again.config.main  # type: ignore[union-attr]
    assert (ours.norm_eps, ours.window) == (theirs.norm_eps, theirs.window)


@pytest.mark.parametrize("name", FOUR)
def test_transformers_reads_the_file(name: str, tmp_path: Path) -> None:
    granted = {"qwen3": {"head_dim": 128}, "gpt2": {"n_positions": 1024}}  # it does not read these
    model = model_of(name, **granted.get(name, {}))
    save_gguf(model, ending(), tmp_path / "x.gguf", "F32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert (logits(theirs.eval()).logits - logits(model)).abs().max() < 1e-4  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", [*FOUR, "llama-odd"])
def test_every_type_holds_what_the_gguf_package_makes_of_the_weights(
    name: str, kind: str, tmp_path: Path
) -> None:
    model, path = model_of(name), tmp_path / "x.gguf"
    original = {key: weight.clone() for key, weight in model.state_dict().items()}
    found = save_gguf(model, None, path, kind, settle=True)
    file, reader = read(path), {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(reader) == [piece.name for piece in found]
    for piece in found:
        weight = torch.cat([original[own] for own in piece.ours]).numpy()
        weight = paired(weight, piece.heads) if piece.heads else weight
        made = gguf.GGMLQuantizationType[piece.kind]
        raw = gguf.quants.quantize(weight, made)
        assert reader[piece.name].tensor_type == made
        assert np.array_equal(
            reader[piece.name].data.view(np.uint8).reshape(-1), raw.view(np.uint8).reshape(-1)
        )
        assert np.array_equal(
            file.dequantize(piece.name), gguf.quants.dequantize(raw, made).reshape(weight.shape)
        )
    kinds = {piece.name.split(".")[-2]: piece.kind for piece in found if piece.name.endswith("weight")}
    ends = "Q8_0" if kind.startswith("Q4") else kind
    assert kinds["token_embd"] == ends and kinds.get("output", ends) == ends
    assert kinds["attn_norm"] == "F32" and kinds.get("position_embd", "F32") == "F32"
    assert kinds["ffn_down"] == ("F16" if name == "llama-odd" and kind.startswith("Q") else kind)
    assert differing(model, path, found) is None  # settled: the model has the numbers of the file
    assert (logits(load_gguf(path)[0]) - logits(model)).abs().max() < 1e-4


def rounded(name: str, bits: str) -> tuple[Transformer, dict[str, Any]]:
    """A model whose layers hold codes, the embedding too, and these layers by name."""
    model, random = model_of(name), torch.Generator().manual_seed(3)

    def made(where: str, layer: Any) -> Any:
        embeds = isinstance(layer, torch.nn.Embedding)
        size = tuple(layer.weight.shape) if embeds else (layer.in_features, layer.out_features)
        outputs, inputs = layer.weight.shape
        if bits == "Q8_0":
            new: Any = Int8Embedding(*size) if embeds else Int8Linear(*size)
            new.codes = torch.randint(-127, 128, (outputs, inputs), generator=random).to(torch.int8)
            new.steps = (torch.rand(outputs, generator=random) * 0.002 + 1e-4).half().float()
        else:
            kind = Int4Embedding if embeds else Int4Linear
            new = kind(*size, symmetric=bits == "Q4_0")
            new.codes = torch.randint(0, 256, (outputs, inputs // 2), generator=random).to(torch.uint8)
            new.steps = (torch.rand(outputs, inputs // 32, generator=random) * 0.03).half()
            if bits == "Q4_1":
                new.lows = (-torch.rand(outputs, inputs // 32, generator=random) * 0.3).half()
        if not embeds:
            new.bias = layer.bias
        return new

    names = replace(
        model,
        lambda where, layer: (
            isinstance(layer, torch.nn.Linear | torch.nn.Embedding) and "positions" not in where
        ),
        made,
    )
    return model, {where: model.get_submodule(where) for where in names}


@pytest.mark.parametrize("bits", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", [*FOUR, "gpt2-untied"])
def test_rounded_layers_give_their_own_codes(name: str, bits: str, tmp_path: Path) -> None:
    model, layers = rounded(name, bits)
    weights = {f"{where}.weight": layer.weight.clone() for where, layer in layers.items()}
    path = tmp_path / "x.gguf"
    found = save_gguf(model, None, path, settle=True)
    matrices = [piece for piece in found if len(piece.shape) > 1 and piece.name != "position_embd.weight"]
    assert {piece.kind for piece in matrices} == {bits} and matrices
    again, _ = load_gguf(path)
    state = again.state_dict()
    for own, weight in weights.items():
        assert torch.equal(state[own], weight), own
    assert differing(model, path, found) is None
    save_gguf(model, None, path, "F32", "F32")  # asked for, they are given as floats
    assert torch.equal(load_gguf(path)[0].state_dict()[own], weight)
    other = "Q4_0" if bits != "Q4_0" else "Q8_0"
    with pytest.raises(ModelError, match=f"quantised to {bits}, and {other} would round it once more"):
        save_gguf(model, None, tmp_path / "y.gguf", other)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


def test_eight_bit_steps_that_float16_does_not_hold_are_rounded_and_told_to_the_model(tmp_path: Path) -> None:
    model, layers = rounded("llama", "Q8_0")
    layer = layers["decoder.blocks.0.mlp.up"]
    layer.steps = layer.steps * 1.0001
    before = layer.weight.clone()
    found = save_gguf(model, None, tmp_path / "x.gguf", settle=True)
    assert not torch.equal(layer.weight, before) and torch.allclose(layer.weight, before, rtol=1e-3)
    assert differing(model, tmp_path / "x.gguf", found) is None


@given(data=st.data(), heads=st.integers(1, 5), half=st.integers(1, 4), width=st.integers(1, 3))
def test_pairing_rows_is_undone_by_the_reader(data: st.DataObject, heads: int, half: int, width: int) -> None:
    rows = torch.randn(
        heads * 2 * half, width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    )
    assert torch.equal(half_split(torch.from_numpy(paired(rows.numpy(), heads)), heads), rows)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
        ("gpt2", {"activation_function": "relu"}, "the activation relu"),
        ("gpt2", {"scale_attn_weights": False}, "attention scaled by 1.0"),
        ("qwen3", {"attention_bias": True}, "biases in qwen3's attention"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, "windows that differ"),
        ("llama", {"rope_parameters": llama.TINY["llama-dynamic"]["rope_parameters"]}, "dynamic scaling"),
        ("qwen2", {"rope_parameters": llama.TINY["llama-llama3"]["rope_parameters"]}, "llama3 scaling"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}, "models that write"),
    ],
)  # fmt: skip
def test_shapes_that_the_format_cannot_say(
    name: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        save_gguf(model_of(name, **changes), None, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_encoders_and_broken_weights_are_refused(tmp_path: Path) -> None:
    encoder = Transformer(bert.config({**bert.TINY["bert"], "model_type": "bert"}))
    with pytest.raises(ModelError, match="GGUF is written for llama, mistral"):
        save_gguf(encoder, None, tmp_path / "x.gguf")
    model = model_of("llama")
    model.decoder.blocks[1].mlp.up.weight.data[0, 0] = 1e5  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight holds numbers beyond F16's largest"):
        save_gguf(model, None, tmp_path / "x.gguf", "F16")
    model.decoder.blocks[1].mlp.up.weight.data[0, 0] = 1e9  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight holds numbers too large for Q4_0"):
        save_gguf(model, None, tmp_path / "x.gguf", "Q4_0")
    model.decoder.blocks[1].mlp.up.weight.data[0, 0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight holds numbers that are not finite"):
        save_gguf(model, None, tmp_path / "x.gguf", "F32")
    model = model_of("llama")
    model.decoder.blocks[0].more = torch.nn.Linear(2, 2)  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"decoder\.blocks\.0\.more\.weight has no place"):
        save_gguf(model, None, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", TYPES)
def test_packing_and_opening_are_within_the_types_error(kind: str) -> None:
    weight = (
        torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 40)[:, None]
    )
    apart = (unpacked(packed(weight, kind, "w"), kind, 96) - weight).abs()
    widest = weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    share = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.005, "Q4_0": 0.126, "Q4_1": 0.07}[kind]
    assert (apart <= share * widest + (0 if kind in ("F32", "BF16") else 1e-7 * 127)).all()


def test_yarn_keeps_its_factor_of_attention(tmp_path: Path) -> None:
    model = model_of("llama-yarn")
    position = model.config.main.position
    assert isinstance(position.scaling, RopeScaling)  # type: ignore[union-attr]
    scaling = dataclasses.replace(position.scaling, attention_factor=1.7, beta_fast=20.0)  # type: ignore[union-attr]
    main = dataclasses.replace(model.config.main, position=dataclasses.replace(position, scaling=scaling))  # type: ignore[type-var]
    other = Transformer(dataclasses.replace(model.config, decoder=main)).eval()
    other.load_state_dict(model.state_dict())
    save_gguf(other, None, tmp_path / "x.gguf", "F32")
    assert (logits(load_gguf(tmp_path / "x.gguf")[0]) - logits(other)).abs().max() < 1e-4
    assert (logits(other) - logits(model)).abs().max() > 1e-3


def test_both_directions_use_one_table() -> None:
    for name in FOUR:
        model = model_of(name)
        arch = name
        stems = {piece.name.split(".")[-2] for piece in pieces(model, "F32", None)}
        assert stems <= set(NAMES[arch]), "every name written is one that is read"
