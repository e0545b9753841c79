"""Vocabularies: the same text gives the same file, from a sample spread over all of it."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib

import pytest

from langmill.common.errors import DataError, UsageError
from langmill.text.tokenizer import Tokenizer
from langmill.text.training import FIM, MASK, SENTINEL, SPECIALS, affordable, sample, train_backend, vocab_for

TEXTS = [f"The {word} of {other} is known, says the {word}. 你好，世界。\n" for word in
         ("history", "theory", "number", "meaning", "weather") for other in ("water", "nations", "music")]  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_training_is_the_same_in_every_process(kind: str) -> None:
    code = (
        "from langmill.text.training import train_backend; import zlib; "
        f"print(zlib.crc32(train_backend({TEXTS!r}, 600, {kind!r}, 1 << 20).to_str().encode()))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = {subprocess.check_output([sys.executable, "-c", code], env=env) for _ in range(2)}
    here = zlib.crc32(train_backend(TEXTS, 600, kind, 1 << 20).to_str().encode())
    assert {int(line) for line in found} == {here}


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_a_vocabulary_learns_words_and_fills_what_the_text_allows(kind: str) -> None:
    tokenizer = Tokenizer.train(TEXTS, 620, kind)
    assert 260 < tokenizer.vocab_size <= 620
    assert Tokenizer.train(TEXTS, 50_000, kind).vocab_size < 5000  # a small text fills no more
    text = "the theory of music says the weather is known"
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_the_sample_is_bounded_even_and_without_repeats() -> None:
    texts = [f"{i:05d}" * 20 for i in range(2000)]
    kept, total = sample(iter(texts), 20_000)
    assert total == 200_000 and 19_900 <= sum(map(len, kept)) <= 20_000 and set(kept) < set(texts)
    places = [texts.index(text) for text in kept]
    assert min(places) < 100 and max(places) > 1900 and 40 < sum(place < 500 for place in places) < 60
    assert sample(texts[::-1], 20_000)[0] == kept
    assert sample(["a", "b", "a"], 100)[0] in (["a", "b"], ["b", "a"])
    long, _ = sample(["x" * 300_000], 1000)  # a document larger than the sample gives a piece of itself
    assert len(long) == 1 and len(long[0]) <= 1 << 16


def test_the_words_that_the_trainer_holds_are_bounded() -> None:
    repeated, distinct = (
        ["the same words again. "] * 50,
        [f"{'abcdefghij'[i % 10] * 30}{chr(0x4E00 + i)}" for i in range(99)],
    )
    assert affordable(repeated, 30) == repeated  # 5 distinct words
    assert affordable(distinct, 33 * 20) == distinct[:20]
    assert affordable([], 10) == [] and affordable(distinct[:1], 10) == distinct[:1]


def test_the_size_follows_the_text_and_bad_requests_are_refused() -> None:
    assert [vocab_for(size) for size in (1, 10**6, 3 * 10**6, 3 * 10**7, 10**8, 10**12)] == [
        1024, 2048, 4096, 8192, 16384, 32768]  # fmt: skip
    assert train_backend(TEXTS, None, "bpe", 1 << 20).get_vocab_size() <= 1024
    with pytest.raises(DataError, match="no text to train"):
        train_backend(["", ""], 600, "bpe", 1000)
    with pytest.raises(UsageError, match="at least 516 entries, not 400"):
        train_backend(TEXTS, 400, "wordpiece", 1000)
    with pytest.raises(UsageError, match='no tokenizer kind "morse"'):
        train_backend(TEXTS, 600, "morse", 1000)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_control_tokens_beside_the_usual_ones(kind: str) -> None:
    more = (MASK, *(SENTINEL.format(number) for number in range(3)), *FIM, "<|pad|>")
    tokenizer = Tokenizer.train(TEXTS, 620, kind, specials=more)
    assert [tokenizer.token(number) for number in range(11)] == [*SPECIALS, *more[:-1]]
    assert tokenizer.mask_id == 4 and tokenizer.sentinel_ids == (5, 6, 7)
    text = "".join(more)
    assert not tokenizer.special_ids & set(tokenizer.encode(text)) and len(tokenizer.special_ids) == 11
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_with_specials(text) == [4, 5, 6, 7, 8, 9, 10, 1]
    plain = Tokenizer.train(TEXTS, 620, kind)
    assert plain.mask_id is None and plain.sentinel_ids == () and len(plain.special_ids) == 4
    with pytest.raises(UsageError, match='"history" cannot be a control token'):
        Tokenizer.train(TEXTS, 620, kind, specials=("history",))
