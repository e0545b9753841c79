"""Likelihoods of choices against the plain forward pass, and the harness's rule of where a context ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import DataError, ModelError
from langmill.families.folder import Model
from langmill.infer.choices import LEAST, Question, beginning, likelihoods, question_ids, together
from langmill.infer.past import Past
from langmill.model.config import Head, LSTMConfig, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.recurrent import LSTM
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


@pytest.mark.parametrize("kind", ["full", "window", "lstm"])
def test_what_contexts_begin_with_is_read_once_and_changes_no_likelihood(kind: str) -> None:
    length = 96
    if kind == "lstm":
        network: Model = LSTM(LSTMConfig(vocab=300, length=length, dim=24, hidden=24))
    else:
        stack = StackConfig(32, 2, 4, 2, 8, 48, window=(6, None) if kind == "window" else None)
        network = Transformer(ModelConfig(stack, Tokens(300, length), head=Head(300)))
    init_(network, 0)
    for weight in network.parameters():
        weight.data.mul_(4 if weight.dim() > 1 else 1)
    network.eval()
    before = [7 * i % 300 for i in range(60)]
    asked: list[list[Question]] = [
        [([*before, 1, 2, 3], [[4], [5, 6, 7]]), ([*before, 8], [[9, 9], [1]])],
        [([*before[:50], 299, 3], [[4, 1], [5]]), ([*before, *range(30)], [[9], [1, 2]])],
        [([*before, 1, 2], [[4]]), ([*before, 200], [[9, 9, 1, 4]]), (before, [[5]])],
    ]
    past, seen = Past(), list[int]()
    network.tokens.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    spared, alone = [], []
    for questions in asked:
        shared = beginning([context for context, _ in questions], past.ids)
        spared += together(network, questions, past, shared)
        assert past.ids == ([] if kind == "lstm" else before[: 60 if questions is asked[0] else 50])
    read = sum(seen)
    for questions in asked:
        alone += [likelihoods(network, context, going) for context, going in questions]
    for own, other in zip(spared, alone, strict=True):
        assert [one.log for one in own] == pytest.approx([one.log for one in other], abs=1e-4)
        assert [one.greedy for one in own] == [one.greedy for one in other]
    if kind != "lstm":  # whose state cannot be cut: all is read
        assert read < 60 + 3 * 45 < sum(seen) - read


def test_the_beginning_leaves_an_id_to_read_and_must_be_worth_a_pass() -> None:
    long = list(range(LEAST))
    assert beginning([[*long, 1], [*long, 2]]) == beginning([[*long, 1]]) == LEAST
    assert beginning([long, [*long, 2]]) == beginning([[*long, 1], [1, 2]]) == beginning([[1]]) == 0
    assert beginning([[*long, 5, 6, 7], [*long, 5, 6]], [*long, 5]) == LEAST + 1
    assert beginning([[*long, 5, 6]], long) == LEAST and beginning([[*long, 5, 6]], long[:9]) == 0


def test_white_space_before_a_choice_belongs_to_it() -> None:
    context, (choice, _) = question_ids(TOKENIZER, "the cat ", ["sat", "ran off"])
    assert TOKENIZER.decode(choice) == " sat"
    assert context == TOKENIZER.prompt_ids("the cat")
    with pytest.raises(DataError, match="gives no token"):
        question_ids(TOKENIZER, "the cat", [" sat", ""])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="exceeds the model's 40"):
        likelihoods(model(), [1] * 39, [[1, 2, 3]])
    with pytest.raises(DataError, match="at least one token"):
        likelihoods(model(), [], [[1]])
