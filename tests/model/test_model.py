"""The core's own promises, where no other tool is the oracle."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from langmill.common.errors import ModelError
from langmill.families import gpt2, llama
from langmill.families.folder import load, save
from langmill.model import count
from langmill.model.config import Head, LSTMConfig, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Transformer

SHAPES = [llama.config({"model_type": name.split("-")[0], **shape}) for name, shape in llama.TINY.items()]
SHAPES += [gpt2.config(shape) for shape in gpt2.TINY.values()]
LSTMS = [LSTMConfig(97, 64, 32, 32), LSTMConfig(97, 64, 24, 40, layers=3, tied=False)]


def build(config: ModelConfig | LSTMConfig, seed: int = 0) -> Transformer | LSTM:
    model = LSTM(config) if isinstance(config, LSTMConfig) else Transformer(config)
    init_(model, seed)
    return model.eval()


@pytest.mark.parametrize("config", [*SHAPES, *LSTMS])
def test_parameters_are_counted_as_built(config: ModelConfig | LSTMConfig) -> None:
    assert count.parameters(config) == sum(weight.numel() for weight in build(config).parameters())
    assert 0 < count.multiplied(config) <= count.parameters(config)


@pytest.mark.parametrize("config", [SHAPES[0], SHAPES[-1], LSTMS[1]])
def test_first_weights_depend_on_the_seed_alone(config: ModelConfig | LSTMConfig) -> None:
    first = build(config).state_dict()
    torch.manual_seed(99)
    again, other = build(config).state_dict(), build(config, seed=1).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["tokens.weight"], other["tokens.weight"])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sampled_from([SHAPES[0], SHAPES[8], *SHAPES[-1:], *LSTMS]),
)
@torch.no_grad()
def test_a_document_in_a_pack_is_scored_as_if_alone(
    lengths: list[int], config: ModelConfig | LSTMConfig
) -> None:
    model = build(config)
    documents = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    numbers = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)])
    rows = torch.stack(
        [torch.cat(documents), torch.cat(documents)]
    )  # two rows, so that rows end documents too
    packed = model(rows, documents_BT=torch.stack([numbers, numbers]))
    alone = torch.cat([model(document[None])[0] for document in documents])
    torch.testing.assert_close(packed[0], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [SHAPES[0], LSTMS[0], LSTMS[1]])
@torch.no_grad()
def test_a_cache_goes_on_where_the_row_ended(config: ModelConfig | LSTMConfig) -> None:
    model = build(config)
    rows = [torch.arange(3), torch.arange(8), torch.arange(40, 45)]
    cache = model.new_cache(3, 12)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    model(padded, cache=cache, lengths_B=torch.tensor([3, 8, 5]))
    following = torch.tensor([[1], [2], [3]])
    cache.select(torch.tensor([1, 2]))
    logits = model(following[1:], cache=cache)
    for place, row in enumerate((1, 2)):
        expected = model(torch.cat([rows[row], following[row]])[None])[0, -1]
        torch.testing.assert_close(logits[place, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [SHAPES[0], SHAPES[-2]])
def test_recomputing_activations_changes_no_gradient(config: ModelConfig) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(config).train()
        model.checkpointing = checkpointing
        model(torch.arange(20)[None]).square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@pytest.mark.parametrize("config", [SHAPES[0], SHAPES[-2]])
@torch.no_grad()
def test_dropout_is_for_training_alone_and_keeps_the_mean(config: ModelConfig) -> None:
    model, tokens = build(config), torch.arange(20)[None]
    whole = model(tokens)
    model.dropout = 0.2
    assert torch.equal(model(tokens), whole)
    model.train()
    torch.manual_seed(0)
    first = model(tokens)
    torch.manual_seed(0)
    assert torch.equal(model(tokens), first) and not torch.equal(model(tokens), first)
    block = model.main.blocks[0]
    x = torch.randn(1, 20, config.main.dim)
    drawn = torch.zeros_like(x)
    for _ in range(400):
        drawn += block._add(x, torch.nn.Identity(), torch.ones_like) / 400
    torch.testing.assert_close(drawn, x + 1, atol=0.15, rtol=0)  # 0.025 is one standard deviation


@torch.no_grad()
def test_lengths_that_do_not_fit_are_refused_with_both_numbers() -> None:
    model = build(SHAPES[-2])  # learned positions
    with pytest.raises(ModelError, match="65 tokens exceed the 64 positions"):
        model(torch.zeros(1, 65, dtype=torch.long))
    cache = model.new_cache(1, 4)
    with pytest.raises(ModelError, match="5 tokens do not fit in a cache made for 4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=cache)
    model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
    with pytest.raises(ModelError, match="5 tokens do not fit"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


@torch.no_grad()
def test_attention_can_be_replaced_from_outside() -> None:
    from langmill.model.attend import attend

    model, seen = build(SHAPES[0]), []

    def recording(q, k, v, mask, scale):  # type: ignore[no-untyped-def]
        seen.append(tuple(q.shape))
        return attend(q, k, v, mask, scale)

    plain = model(torch.arange(5)[None])
    for block in model.decoder.blocks:
        block.attention.attend = recording
    assert torch.equal(model(torch.arange(5)[None]), plain)
    assert seen == [(1, 4, 5, 8)] * 2


def test_shapes_that_cannot_be_are_refused() -> None:
    good = {"dim": 8, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 4, "hidden": 8}
    wrong = [{"heads": 0}, {"heads": 3, "kv_heads": 2}, {"head_dim": 3}, {"window": (1, 2)}]
    for change in wrong:
        with pytest.raises(ModelError):
            StackConfig(**(good | change))
    with pytest.raises(ModelError, match="tied head"):
        ModelConfig(StackConfig(**good), Tokens(10, 8), head=Head(11))
    with pytest.raises(ModelError, match="tied LSTM"):
        LSTMConfig(10, 8, 4, 5)


def test_training_flops_follow_the_definition() -> None:
    """6 a weight by hand for one layer, and attention's by counting the pairs of a causal row."""
    config = ModelConfig(StackConfig(8, 1, 2, 2, 4, 16), Tokens(10, 32), head=Head(10))
    weights = 4 * 8 * 8 + 3 * 8 * 16 + 3 * 8 + 10 * 8
    pairs = sum(1 for query, key in itertools.product(range(32), repeat=2) if key <= query)
    # a pair costs 2·D in q·k and 2·D in its share of v, forward; twice that again backward; 2 heads of 4
    assert count.training_flops(config, 32) == pytest.approx(6 * weights + 3 * 2 * (2 + 2) * 4 * pairs / 32)


def test_weights_that_are_pieces_of_one_storage_are_saved(tmp_path: Path) -> None:
    """As cuDNN keeps those of an LSTM on a GPU."""
    model = build(LSTMS[1])
    weights = [model.lstm.weight_ih_l0, model.lstm.weight_hh_l0]  # type: ignore[union-attr]
    whole = torch.cat([weight.detach().flatten() for weight in weights])
    for weight, piece in zip(weights, whole.split([w.numel() for w in weights]), strict=True):
        weight.data = piece.view_as(weight)
    save(model, None, tmp_path / "model")
    found = load(tmp_path / "model")[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
