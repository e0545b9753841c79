"""A tiny model in a folder, with a chat template or without, as the applications load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from langmill.families import folder as folders
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.specials import Specials
from langmill.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Make = Callable[..., str]


def save(folder: Path, template: str | None = None, length: int = 64) -> str:
    """Write a model of random weights, spread so wide that no two scores are nearly equal."""
    text = ["The quick brown fox jumps over the lazy dog, every day and every night. 春眠不觉晓。"] * 3
    tokenizer = Tokenizer.train(text, vocab_size=300)
    if template:
        known = Specials(
            bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=tokenizer.pad_id, chat_template=template
        )
        tokenizer = Tokenizer(tokenizer._backend, known)
    stack = StackConfig(dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48)
    model = Transformer(
        ModelConfig(stack, Tokens(tokenizer.vocab_size, length), head=Head(tokenizer.vocab_size))
    )
    init_(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    folders.save(model, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="session")
def make() -> Make:
    """`make(folder, template, length)` writes the model and returns its folder's name."""
    return save


@pytest.fixture(scope="session")
def template() -> str:
    """ChatML, which takes any roles in any order."""
    return TEMPLATE
