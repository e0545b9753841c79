"""Likelihoods of choices against the plain forward pass, and the harness's rule of where a context ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import DataError, ModelError
from langmill.infer.choices import likelihoods, split_ids
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the cat sat on the mat and the dog ran off"] * 3, vocab_size=280)


def model() -> Transformer:
    made = Transformer(ModelConfig(StackConfig(32, 2, 4, 2, 8, 48), Tokens(300, 40), head=Head(300)))
    init_(made, 0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)
    return made.eval()


@given(
    st.lists(st.integers(0, 299), min_size=1, max_size=8),
    st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_likelihoods_are_those_of_the_plain_forward_pass(
    context: list[int], choices: list[list[int]]
) -> None:
    network = model()
    for choice, found in zip(choices, likelihoods(network, context, choices), strict=True):
        whole = torch.tensor([context + choice])
        logs = torch.log_softmax(network(whole)[0, len(context) - 1 : -1], dim=-1)
        expected = logs.gather(1, torch.tensor(choice)[:, None]).sum()
        assert found.log == pytest.approx(expected.item(), abs=1e-4)
        assert found.tokens == len(choice)
        assert found.greedy == bool((logs.argmax(-1) == torch.tensor(choice)).all())


def test_white_space_before_a_choice_belongs_to_it() -> None:
    context, choice = split_ids(TOKENIZER, "the cat ", "sat")
    assert TOKENIZER.decode(choice) == " sat"
    assert context == TOKENIZER.prompt_ids("the cat")
    with pytest.raises(DataError, match="gives no token"):
        split_ids(TOKENIZER, "the cat", "")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="exceeds the model's 40"):
        likelihoods(model(), [1] * 39, [[1, 2, 3]])
    with pytest.raises(DataError, match="at least one token"):
        likelihoods(model(), [], [[1]])
