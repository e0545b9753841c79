"""Persons and addresses: a tagger's entities as finds, and what is said where there is none to ask."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from langmill.apps import tag
from langmill.common.errors import MissingExtra, ModelError, UsageError
from langmill.common.settings import TagSettings
from langmill.families import folder as folders
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.privacy.names import LABELS, names
from langmill.privacy.redact import Redact
from langmill.text.tokenizer import Tokenizer

TEXTS = ["Anna Schmidt lives in Berlin.", "", "春眠不觉晓 Anna", "Anna " * 40]
PEOPLE = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")


def saved(folder: Path, labels: tuple[str, ...]) -> str:
    """A tagger of random weights."""
    tokenizer = Tokenizer.train(["Anna Schmidt lives in Berlin. 春眠不觉晓。"] * 3, vocab_size=300)
    stack = StackConfig(dim=32, layers=1, heads=4, kv_heads=2, head_dim=8, hidden=48)
    head = Head(len(labels), tied=False, bias=True, task="tag", labels=labels)
    model = Transformer(ModelConfig(stack, Tokens(tokenizer.vocab_size, 64), head=head))
    init_(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    folders.save(model, tokenizer, folder)
    return str(folder)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[tuple[str, ...]], str]:
    return lambda labels: saved(tmp_path / "model", labels)


def test_finds_are_what_the_tagger_says(make: Callable[[tuple[str, ...]], str]) -> None:
    folder = make(PEOPLE)
    finder = pickle.loads(pickle.dumps(names(folder)))  # noqa: S301
    found = finder(TEXTS)
    said = tag.run(
        TagSettings(model=folder, text=[t for t in TEXTS if t], overlap=8), quiet=True, as_json=True
    )
    expected = [
        [(e["start"], e["end"], LABELS[e["label"]]) for e in r["entities"]] for r in said.extra["results"]
    ]
    assert [[one[:3] for one in finds] for finds, text in zip(found, TEXTS, strict=True) if text] == expected
    assert found[1] == [] and any(found)
    redacted, finds = Redact("label", names=finder).text(TEXTS[0])
    assert redacted.count("[") == len(finds) and finds == found[0]


def test_a_model_that_knows_no_names_is_refused(make: Callable[[tuple[str, ...]], str]) -> None:
    with pytest.raises(ModelError, match="none is among PER"):
        names(make(("B-FOOD", "O")))(["x"])


def test_presidio_needs_a_pipeline_and_its_package() -> None:
    with pytest.raises(UsageError, match="presidio:en_core_web_sm"):
        names("presidio")
    with pytest.raises((MissingExtra, UsageError), match="presidio-analyzer|is not installed"):
        names("presidio:no_such_pipeline")(["x"])
