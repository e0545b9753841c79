"""What a model reads while it is rounded."""

from __future__ import annotations

import pytest
import torch

from langmill.compress import calibrate
from langmill.model.config import Head, Learned, ModelConfig, Sinusoidal, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

TEXTS = [f"Sentence number {i} of the text. 第{i}句。" * (1 + i % 5) for i in range(12)]
PAIRS = [(text, text[::-1]) for text in TEXTS]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=320)


def model(tokenizer: Tokenizer, kind: str) -> Transformer:
    vocab = tokenizer.vocab_size
    plain = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16, "hidden": 64}
    reads = StackConfig(**plain, position=Sinusoidal(), causal=False)  # type: ignore[arg-type]
    if kind == "decoder":
        config = ModelConfig(StackConfig(**plain), Tokens(vocab, 48), head=Head(vocab))  # type: ignore[arg-type]
    elif kind == "encoder":
        learned = StackConfig(**plain, position=Learned(), causal=False)  # type: ignore[arg-type]
        config = ModelConfig(encoder=learned, encoder_input=Tokens(vocab, 48, types=2), head=Head(vocab))
    else:
        writes = StackConfig(**plain, position=Sinusoidal(), cross=True)  # type: ignore[arg-type]
        start = Tokens(vocab, 48, start=tokenizer.boundary_id)
        config = ModelConfig(writes, start, reads, Tokens(vocab, 48), Head(vocab))
    made = Transformer(config)
    init_(made, 0)
    return made.eval()


def test_a_decoder_reads_the_texts_end_to_end_in_whole_windows(tokenizer: Tokenizer) -> None:
    network = model(tokenizer, "decoder")
    batches = calibrate.passes(network, tokenizer, PAIRS, samples=9, length=16)
    assert [tuple(batch["tokens_BT"].shape) for batch in batches] == [(8, 16), (1, 16)]
    ids = [id for text in TEXTS for id in (tokenizer.start_id, *tokenizer.encode(text))]
    assert torch.cat([batch["tokens_BT"] for batch in batches]).flatten().tolist() == ids[: 9 * 16]
    (short,) = calibrate.passes(network, tokenizer, [("Hi", "Hi")], samples=9, length=16)
    assert short["tokens_BT"].tolist() == [[tokenizer.start_id, *tokenizer.encode("Hi")]]
    assert calibrate.passes(network, tokenizer, [], samples=9, length=16) == []


def test_an_encoder_reads_whole_texts_that_do_not_see_each_other(tokenizer: Tokenizer) -> None:
    network = model(tokenizer, "encoder")
    batches = calibrate.passes(network, tokenizer, PAIRS, samples=99, length=40)
    assert len(batches) > 1 and all(batch["tokens_BT"].shape[1] <= 40 for batch in batches)
    states = torch.cat([network.hidden(**batch)[0] for batch in batches])
    alone = []
    for text in TEXTS:
        one = tokenizer.frame.one(tokenizer.encode(text)[: 40 - tokenizer.frame.room()])
        alone.append(network.hidden(torch.tensor([one.ids]), types_BT=torch.tensor([one.types]))[0])
    torch.testing.assert_close(states, torch.cat(alone), rtol=1e-4, atol=1e-5)
    few = calibrate.passes(network, tokenizer, PAIRS, samples=1, length=40)
    assert len(few) < len(batches)


def test_a_decoder_behind_an_encoder_writes_its_side(tokenizer: Tokenizer) -> None:
    network = model(tokenizer, "both")
    batches = calibrate.passes(network, tokenizer, PAIRS[:3], samples=99, length=200)
    (batch,) = batches
    assert (batch["documents_BT"].unique().tolist(), batch["encoder_documents"].max().item()) == (
        [1, 2, 3],
        3,
    )
    states, alone = network.hidden(**batch)[0], []
    for source, target in PAIRS[:3]:
        read, written = (tokenizer.frame.one(tokenizer.encode(text)).ids for text in (source, target))
        shifted = torch.tensor([[network.config.input.start, *written[:-1]]])
        alone.append(network.hidden(shifted, encoder_tokens=torch.tensor([read]))[0])
    torch.testing.assert_close(states, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_decoder_writes_its_own_text_the_same_each_time(tokenizer: Tokenizer) -> None:
    network = model(tokenizer, "decoder")
    one, two, other = (
        torch.cat([batch["tokens_BT"] for batch in calibrate.written(network, tokenizer, 10, 20, seed)])
        for seed in (1, 1, 2)
    )
    assert one.shape == (10, 20) and torch.equal(one, two) and not torch.equal(one, other)
    assert (one[:, 0] == tokenizer.start_id).all() and len(set(map(tuple, one.tolist()))) == 10
