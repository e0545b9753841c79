"""Long texts are cut in use as a model was taught, but for what is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from langmill.apps.classify import limit_of, limit_taught
from langmill.common.configure import configure
from langmill.common.errors import ModelError
from langmill.common.settings import ClassifySettings, ReadSettings
from langmill.families.heads import described
from langmill.families.heads import limit_of as limit_kept
from langmill.model.config import Head, Learned, ModelConfig, StackConfig, Tokens
from langmill.model.transformer import Transformer
from langmill.text.tasks import Limit

HEAD = Head(2, False, True, "tanh", pool="first", task="classify", labels=("a", "b"))


def model(limit: Limit | None, length: int = 64) -> Transformer:
    stack = StackConfig(8, 1, 2, 2, 4, 16, position=Learned(), causal=False)
    head = replace(HEAD, limit=limit)
    return Transformer(ModelConfig(encoder=stack, encoder_input=Tokens(9, length), head=head))


def asked(**given: Any) -> ReadSettings:
    return configure(ClassifySettings, None, [], model="m", **given)


def test_what_is_given_wins_over_what_was_taught() -> None:
    taught = model(Limit(24, "truncate", 8))
    assert limit_taught(taught, asked()) == limit_taught(taught) == Limit(24, "truncate", 8)
    assert limit_taught(taught, asked(long_texts="window")) == Limit(24, "window", 8)
    assert limit_taught(taught, asked(long_texts="window", overlap=2)) == Limit(24, "window", 2)
    assert limit_taught(model(Limit(99, "error", 8))) == Limit(64, "error", 8)  # no more than it reads
    assert limit_taught(model(Limit(700, "window", 8), 800)) == Limit(700, "window", 8)


def test_a_model_that_does_not_say_reads_windows_of_what_it_can() -> None:
    for given in ({}, {"long_texts": "truncate"}, {"overlap": 3}):
        assert limit_taught(model(None), asked(**given)) == limit_of(asked(**given), model(None))
    assert limit_taught(model(None, 800)) == Limit(512, "window", 64)


def test_a_limit_comes_back_from_the_configuration() -> None:
    limit = Limit(24, "truncate", 8)
    assert limit_kept(described(replace(HEAD, limit=limit))) == limit
    assert limit_kept(described(replace(HEAD, task="answer", labels=(), limit=limit))) == limit
    assert limit_kept(described(HEAD)) is None and replace(HEAD, limit=limit) == HEAD


@pytest.mark.parametrize(
    "wrong",
    [
        "window",
        {"length": 24},
        {"length": 24, "policy": "cut", "overlap": 1},
        {"length": 24.0, "policy": "window", "overlap": 1},
        {"length": True, "policy": "window", "overlap": 1},
        {"length": 0, "policy": "window", "overlap": 1},
        {"length": 24, "policy": ["window"], "overlap": 1},
    ],
)
def test_a_limit_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(
        ModelError, match=r"config\.json: long_texts is .*, not a length, a policy and an overlap"
    ):
        limit_kept({"long_texts": wrong})
