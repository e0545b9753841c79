from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from langmill.families.folder import Model
from langmill.infer.past import Past
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


def read(model: Model, prompt: Sequence[int], past: Past | None = None) -> Tensor:
    """Scores behind a prompt, of which no more is read than `past` lacks."""
    cache: Any = model.new_cache(1, len(prompt)) if past is None else past.open(model, prompt, len(prompt))
    new = list(prompt[past.reused if past else 0 :])
    h_BTD = model.hidden(torch.tensor([new]), cache=cache)
    if past:
        past.read(new)
    return model.logits(h_BTD[0, -1])


@pytest.mark.parametrize("kind", ["full", "window", "lstm"])
@torch.inference_mode()
def test_a_kept_cache_changes_no_score_and_spares_what_was_read(kind: str) -> None:
    model, past = made(kind), Past()
    first = list(range(5, 17))
    longer = [*first, 40, 41, 42]
    for prompt, reused in (
        (first, 0),
        (longer, len(first)),
        (longer, len(longer) - 1),  # one must be read
        ([*first, 50], len(first)),
        ([9, *first], 0),
        ([9], 0),
        (list(range(60)), 0),  # longer than the cache so far
    ):
        torch.testing.assert_close(read(model, prompt, past), read(model, prompt))
        assert past.reused == (0 if kind == "lstm" else reused)


@torch.inference_mode()
def test_reading_that_was_cut_off_leaves_the_cache_usable() -> None:
    model, past = made("full"), Past()
    prompt = list(range(5, 17))
    read(model, prompt, past)

    def broken(*given: object, **more: object) -> torch.Tensor:
        raise KeyboardInterrupt

    norm = model.decoder.norm  # type: ignore[union-attr]
    handle = norm.register_forward_pre_hook(broken)  # keys and values are written by then
    with pytest.raises(KeyboardInterrupt):
        read(model, [*prompt, 60, 61], past)
    handle.remove()
    longer = [*prompt, 70, 71, 72]
    torch.testing.assert_close(read(model, longer, past), read(model, longer))
    assert past.reused == len(prompt)
