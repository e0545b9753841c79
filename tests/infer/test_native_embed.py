"""Vectors by native.cpp against those by torch's operators, in float32 and in 8 bits."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from langmill.common.errors import ModelError
from langmill.infer import native, native_build
from langmill.infer.native_embed import NativeEmbedder, eight_bits, is_rounded, why_not
from langmill.infer.runner import TorchEmbedder
from langmill.model.config import Learned, ModelConfig, Relative, Rope, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.layers import Int8Linear, LoRA
from langmill.model.transformer import Transformer

VOCAB, LENGTH = 101, 80
BERT = StackConfig(
    48, 2, 3, 3, 16, 112, norm="layer", activation="gelu", gated=False, position=Learned(2),
    bias=frozenset({"q", "k", "v", "o", "mlp"}), norm_order="post", causal=False,
)  # fmt: skip
ROTARY = changed(BERT, position=Rope(), norm_order="pre", activation="silu", gated=True, head_dim=24)
WINDOWED = changed(ROTARY, causal=True, window=(7, None))
STACKS = {"bert": BERT, "rotary": ROTARY, "decoder": WINDOWED, "odd": changed(BERT, dim=44, hidden=70)}
SIZES = (33, 1, 80, 16, 5, 17, 64, 2, 47, 31)
TEXTS = [np.random.default_rng(size).integers(0, VOCAB, size) for size in SIZES]


def made(stack: StackConfig) -> Transformer:
    inputs = Tokens(VOCAB, LENGTH, types=2, norm=True)
    parts: dict[str, Any] = {"decoder": stack, "decoder_input": Tokens(VOCAB, LENGTH)}
    if not stack.causal:
        parts = {"encoder": stack, "encoder_input": inputs}
    model = Transformer(ModelConfig(**parts))
    init_(model, 0)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.mul_(3 if parameter.ndim > 1 else 1).add_(0.05 * noise)
    return model.eval()


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
@pytest.mark.parametrize("name", STACKS)
def test_float_vectors_are_torchs(name: str, pool: Any) -> None:
    model = made(STACKS[name])
    for normalise in (True, False):
        got = NativeEmbedder(model, pool, normalise, tokens=100).embed(TEXTS)
        np.testing.assert_allclose(
            got, TorchEmbedder(model, pool, normalise).embed(TEXTS), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", STACKS)
def test_8_bits_move_vectors_little_and_alike_by_both_ways(name: str) -> None:
    model = made(STACKS[name])
    plain = TorchEmbedder(model).embed(TEXTS)
    names = eight_bits(model)
    assert len(names) == sum(isinstance(layer, Int8Linear) for layer in model.modules()) >= 12
    assert is_rounded(model)
    native, torchs = NativeEmbedder(model).embed(TEXTS), TorchEmbedder(model).embed(TEXTS)
    for one, other in ((native, plain), (torchs, plain), (native, torchs)):
        assert 0.995 < (one * other).sum(1).min() < 0.9999999


@pytest.mark.parametrize("name", STACKS)
def test_neither_company_nor_threads_nor_portable_code_change_a_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(STACKS[name])
    eight_bits(model)
    embedder = NativeEmbedder(model, tokens=200, threads=1)
    whole = embedder.embed(TEXTS)
    assert np.array_equal(whole, np.concatenate([embedder.embed([text]) for text in TEXTS]))
    assert np.array_equal(whole, embedder.embed(TEXTS[::-1])[::-1])
    assert np.array_equal(whole, NativeEmbedder(model, tokens=1000, threads=3).embed(TEXTS))
    plain = native_build.library("-DPORTABLE")
    monkeypatch.setattr(native, "library", lambda: plain)
    assert np.array_equal(whole, NativeEmbedder(model).embed(TEXTS))


def test_a_text_of_no_numbers_spoils_no_other() -> None:
    model = made(BERT)
    with torch.no_grad():
        model.tokens.weight[7] = torch.nan
    embedder = NativeEmbedder(model)
    sound = [text[text != 7] for text in TEXTS]
    before = embedder.embed(sound)
    spoilt = embedder.embed([np.array([7, 7, 1]), *sound[1:], sound[0]])
    assert np.isnan(spoilt[0]).all() and np.array_equal(spoilt[1:], np.concatenate((before[1:], before[:1])))


def test_rounding_takes_the_nearest_and_merges_adapters() -> None:
    layer = nn.Linear(44, 20)
    layer.weight.data[3] = 0
    rounded = Int8Linear.of(layer)
    error = (rounded.weight - layer.weight).abs()
    assert (error <= rounded.steps[:, None] * 0.5001).all() and rounded.bias is layer.bias
    assert (rounded.codes.abs().amax(1)[[0, 3]] == torch.tensor([127, 0])).all()
    model = made(BERT)
    adapted = LoRA(model.main.blocks[0].attention.q, 2, 4)
    nn.init.normal_(adapted.b)
    model.main.blocks[0].attention.q = adapted
    assert "encoder.blocks.0.attention.q" in eight_bits(model)
    merged = model.main.blocks[0].attention.q
    assert (merged.weight - adapted.weight).abs().max() <= merged.steps.max() * 0.51


def test_what_cannot_be_read_is_said() -> None:
    model = made(BERT)
    embedder = NativeEmbedder(model)
    for size in (0, LENGTH + 1):
        with pytest.raises(
            ModelError, match=f"{size} tokens, special ones included, and the model reads 1 to 80"
        ):
            embedder.embed([TEXTS[0][:0] if size == 0 else np.ones(size, np.int64)])
    assert embedder.embed([]).shape == (0, 48)
    relative = made(changed(BERT, position=Relative()))
    assert "learned distances" in str(why_not(relative))
    with pytest.raises(ValueError, match="learned distances"):
        NativeEmbedder(relative)


def test_matrices_are_released_where_asked() -> None:
    model, whole = made(BERT), NativeEmbedder(made(BERT)).embed(TEXTS)
    assert np.array_equal(NativeEmbedder(model, release=True).embed(TEXTS), whole)
    assert model.main.blocks[0].mlp.up.weight.numel() == 0
