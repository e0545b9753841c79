"""Bulk encoding gives the reference's ids, or says that it fell back to the reference."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import DataError
from langmill.text import bulk
from langmill.text.tokenizer import Tokenizer

TEXTS = [
    "The weather isn't bad, 1234 times.\n\n",
    "你好，世界。",
    "مرحبا بالعالم",
    "",
    "<|endoftext|> <|im_end|>",
]
BPE = Tokenizer.train(TEXTS * 3, 400)


def rows(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    ids, offsets = tokenizer.bulk.encode([text.encode("utf-8") for text in texts])
    assert ids.dtype == np.uint32 and offsets.dtype == np.int64 and len(offsets) == len(texts) + 1
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


@given(st.lists(st.text() | st.text("a s'S<|endoftext|>你😀\r\n\u0301\x001"), max_size=6))
def test_the_fast_encoder_gives_the_same_ids(texts: list[str]) -> None:
    assert BPE.bulk.name == "gigatoken"
    assert rows(BPE, texts) == [BPE.encode(text) for text in texts]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_kind_that_it_cannot_read_falls_back_and_says_so(kind: str) -> None:
    tokenizer = Tokenizer.train(TEXTS, 600, kind)
    assert rows(tokenizer, TEXTS) == tokenizer.encode_batch(TEXTS)
    assert tokenizer.bulk.name == "tokenizers" and "cannot read this tokenizer" in tokenizer.bulk.note


def test_without_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = Tokenizer.train(TEXTS, 400)
    assert rows(tokenizer, TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.bulk.name == "tokenizers" and 'pip install "langmill[data]"' in tokenizer.bulk.note


def test_an_encoder_that_differs_on_the_first_texts_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = bulk._flat

    def wrong(encoded: Any) -> Any:
        ids, offsets = flat(encoded)
        return (ids + (len(offsets) == 2), offsets)  # right on the fixed probes, wrong on the real text

    monkeypatch.setattr(bulk, "_flat", wrong)
    tokenizer = Tokenizer.train(TEXTS, 400)
    assert tokenizer.bulk.name == "gigatoken"
    assert rows(tokenizer, ["hello"]) == [tokenizer.encode("hello")]
    assert tokenizer.bulk.name == "tokenizers" and "gives other ids" in tokenizer.bulk.note


def test_bytes_that_are_no_text_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="not UTF-8"):
        Tokenizer.train(TEXTS, 600, "unigram").bulk.encode([b"\xff"])
