from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from langmill.families.folder import Model
from langmill.infer.generate import generate_ids
from langmill.infer.past import Past
from langmill.infer.sampling import Sampling
from langmill.model.config import Head, LSTMConfig, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Transformer

VOCAB, LENGTH = 300, 96


def made(kind: str) -> Model:
    if kind == "lstm":
        model: Model = LSTM(LSTMConfig(vocab=VOCAB, length=LENGTH, dim=24, hidden=24))
    else:
        window = (6, None) if kind == "window" else None
        stack = StackConfig(dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, window=window)
        model = Transformer(ModelConfig(stack, Tokens(VOCAB, LENGTH), head=Head(VOCAB)))
    init_(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


def written(model: Model, prompt: Sequence[int], past: Past | None = None, new: int = 12) -> list[int]:
    steps = generate_ids(model, [prompt], Sampling(max_new_tokens=new, repetition_penalty=1.2), past=past)
    return [token.id for step in steps for token in step]


@pytest.mark.parametrize("kind", ["full", "window", "lstm"])
def test_a_kept_cache_changes_no_id_and_spares_what_was_read(kind: str) -> None:
    model, past = made(kind), Past()
    first = list(range(5, 17))
    answer = written(model, first)
    longer = [*first, *answer, 40, 41, 42]
    for prompt, reused in (
        (first, 0),
        (longer, len(first) + len(answer) - 1),  # the last token written was never fed back
        (longer, len(longer) - 1),  # one must be read
        ([*first, 50], len(first)),
        ([9, *first], 0),
        ([9], 0),
    ):
        assert written(model, prompt, past) == written(model, prompt)
        assert past.reused == (0 if kind == "lstm" else reused)


def test_an_answer_that_was_cut_off_leaves_the_cache_usable() -> None:
    model, past = made("full"), Past()
    prompt = list(range(5, 17))
    steps = generate_ids(model, [prompt], Sampling(max_new_tokens=12), past=past)
    begun = [next(steps)[0].id for _ in range(4)]

    def broken(*given: object, **more: object) -> torch.Tensor:
        raise KeyboardInterrupt

    norm = model.decoder.norm  # type: ignore[union-attr]
    handle = norm.register_forward_pre_hook(broken)  # keys and values are written by then
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    handle.remove()
    longer = [*prompt, *begun, 60, 61]
    assert written(model, longer, past) == written(model, longer)
    assert past.reused == len(prompt) + 3
