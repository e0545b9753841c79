"""Damage to texts: how much, where, and that what was there can be put back."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import UsageError
from langmill.data.corrupt import (
    BlankInfilling,
    Denoising,
    FillInMiddle,
    Masking,
    SpanCorruption,
    Words,
    flags,
    noise_mask,
    shuffled_sentences,
    span_counts,
)
from langmill.text.tokenizer import Tokenizer

VOCAB, MASK, END = 1200, 1, 2
SENTINELS = tuple(range(1100, 1200))
SPECIAL = flags([0, MASK, END, *SENTINELS], VOCAB)
ids = st.lists(st.integers(3, 1000) | st.sampled_from([0, END]), min_size=1, max_size=200).map(
    lambda x: np.array(x, np.int64)
)
seeds = st.integers(0, 2**32)


def spans_of(written: np.ndarray) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for id in written.tolist():
        if id in SENTINELS:
            found[id] = []
        else:
            found[list(found)[-1]].append(id)
    return found


@given(ids, seeds)
def test_masking_hides_some_plain_tokens_and_nothing_else(text: np.ndarray, seed: int) -> None:
    masking = Masking(MASK, SPECIAL)
    inputs, targets = masking(text, np.random.default_rng(seed))
    hidden, plain = targets != -100, ~SPECIAL[text]
    assert (inputs[~hidden] == text[~hidden]).all() and (targets[hidden] == text[hidden]).all()
    assert not (hidden & ~plain).any() and bool(hidden.any()) == bool(plain.any())
    share = 0.15 * plain.sum()
    assert min(1, plain.sum()) <= hidden.sum() <= max(1, np.ceil(share + 1e-9))
    assert (~SPECIAL[inputs[hidden]] | (inputs[hidden] == MASK)).all()
    again = masking(text, np.random.default_rng(seed))
    assert (again[0] == inputs).all() and (again[1] == targets).all()


@pytest.mark.parametrize("whole", [False, True])
def test_masking_hides_fifteen_percent_eighty_ten_ten(whole: bool) -> None:
    random = np.random.default_rng(0)
    begins = random.random(VOCAB) < 0.4
    masking = Masking(MASK, SPECIAL, Words(begins, np.zeros(VOCAB, np.bool_)) if whole else None)
    text = random.integers(3, 1000, 40_000)
    parts = [masking(piece, random) for piece in np.split(text, 400)]
    inputs, targets = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    hidden = targets != -100
    assert abs(hidden.mean() - 0.15) < 0.004
    same, mask = inputs[hidden] == targets[hidden], inputs[hidden] == MASK
    assert abs(mask.mean() - 0.8) < 0.02 and abs(same.mean() - 0.1) < 0.015
    if whole:
        starts = begins[text] | (np.arange(40_000) % 100 == 0)
        word = np.cumsum(starts)
        assert set(word[hidden]).isdisjoint(word[~hidden])


def test_words_begin_where_each_kind_of_vocabulary_says() -> None:
    def parted(tokens: list[str], more: list[str]) -> str:
        known = dict.fromkeys([*tokens, *more])
        numbers = {token: number for number, token in enumerate(known)}
        text = np.array([numbers[token] for token in tokens])
        starts = Words.of(list(known)).starts(text, np.zeros(len(text), np.bool_))
        return "".join("|" * bool(start) + token for start, token in zip(starts, tokens, strict=True))

    wordpiece = ["un", "##able", ",", "to", "中", "国", "##人", "a", "##b"]
    assert parted(wordpiece, ["##x"]) == "|un##able|,|to|中|国|##人|a##b"
    byte = ["un", "able", ",", "Ġto", "ĠgÃ¶", "the", "ä¸Ń", "åĽ", "½", "a", "Ċ", "x"]
    assert parted(byte, ["Ġx"]) == "|unable|,|Ġto|ĠgÃ¶the|ä¸Ń|åĽ½a|Ċ|x"
    pieces = ["▁un", "able", ".", "▁to", "中", "国", "<0xE5>", "<0x9B>", "<0xBD>", "かな"]
    assert parted(pieces, ["▁x"]) == "|▁unable|.|▁to|中|国|<0xE5><0x9B><0xBD>|かな"
    assert parted(["a", "b", " ", "c"], []) == "|ab| |c"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_words_of_our_own_vocabularies(kind: str) -> None:
    texts = ["the cat sat, the cats sat on 中国人民 السلام عليكم"] * 3
    tokenizer = Tokenizer.train(texts, 560, kind)
    words = Words.of([tokenizer.token(id) for id in range(tokenizer.vocab_size)])
    text = np.array(tokenizer.encode("the cats 中国 السلام"))
    starts = words.starts(text, np.zeros(len(text), np.bool_))
    bounds = [*np.flatnonzero(starts).tolist(), len(text)]
    found = [tokenizer.decode(text[a:b].tolist()) for a, b in pairwise(bounds)]
    assert [part.strip() for part in found if part.strip()] == ["the", "cats", "中", "国", "السلام"]


@given(st.integers(2, 2000), seeds, st.sampled_from([(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.5, 1.0)]))
def test_noise_has_the_numbers_of_t5(length: int, seed: int, shape: tuple[float, float]) -> None:
    density, mean = shape
    tokens, spans = span_counts(length, density, mean)
    assert tokens == min(max(int(np.round(length * density)), 1), length - 1)
    assert spans == min(max(int(np.round(tokens / mean)), 1), length - tokens)
    mask = noise_mask(length, tokens, spans, np.random.default_rng(seed))
    assert len(mask) == length and mask.sum() == tokens and not mask[0] and mask[-1]
    assert (mask & ~np.concatenate(([False], mask[:-1]))).sum() == spans


def test_noise_is_distributed_as_in_t5() -> None:
    """Its segmentation: the first of each part is marked in a shuffled row of as many marks as there are parts."""
    random = np.random.default_rng(0)

    def reference() -> tuple[bool, ...]:
        def segments(items: int, parts: int) -> np.ndarray:
            marks = (np.arange(items - 1) < parts - 1).astype(int)
            random.shuffle(marks)
            return np.bincount(np.cumsum(np.concatenate(([0], marks))), minlength=parts)

        sizes = np.stack((segments(7, 3), segments(5, 3)), axis=1).reshape(-1)
        return tuple((np.repeat(np.arange(6), sizes) % 2 == 1).tolist())

    theirs = Counter(reference() for _ in range(18_000))
    ours = Counter(tuple(noise_mask(12, 5, 3, random).tolist()) for _ in range(18_000))
    assert len(theirs) == len(ours) == 15 * 6
    assert max(abs(ours[mask] - 200) for mask in theirs) < 75  # 5 standard deviations


@given(ids, seeds, st.booleans())
def test_span_corruption_can_be_put_back(text: np.ndarray, seed: int, anywhere: bool) -> None:
    how = SpanCorruption(SENTINELS, SPECIAL, anywhere=anywhere)
    read, written = how(text, np.random.default_rng(seed))
    bounds = how.reach(np.array([len(text)]))
    assert (len(read), len(written)) == (bounds[0][0], bounds[1][0])
    spans = spans_of(written)
    assert all(spans.values()) and [id for id in read.tolist() if id in SENTINELS] == list(spans)
    back = [id for part in read.tolist() for id in spans.get(part, [part])]
    plain = ~SPECIAL[text]
    if plain.all():
        assert back == text.tolist()
    assert sorted(back) == sorted(text.tolist())
    if plain.sum() >= 0.25 * len(text) + 2:  # specials count as text only where there is little else
        assert [id for id in back if not SPECIAL[id]] == text[plain].tolist()
        assert [id for id in read.tolist() if id in (0, END)] == text[~plain].tolist()


def test_too_few_sentinels_are_told() -> None:
    for how in (SpanCorruption(SENTINELS[:3], SPECIAL), BlankInfilling(SENTINELS[:3], END, SPECIAL)):
        with pytest.raises(UsageError, match="100 tokens have 5 spans taken out, and there are 3 sentinels"):
            how(np.arange(3, 103), np.random.default_rng(0))


@given(ids, seeds)
def test_denoising_replaces_three_tenths_by_single_masks(text: np.ndarray, seed: int) -> None:
    read, written = Denoising(MASK, SPECIAL)(text, np.random.default_rng(seed))
    assert (written == text).all() and len(read) <= len(text)
    kept = read[read != MASK]
    assert len(text) - len(kept) == round(0.3 * (~SPECIAL[text]).sum())
    assert [id for id in kept.tolist() if SPECIAL[id]] == text[SPECIAL[text]].tolist()
    rest = iter(text.tolist())
    assert all(id in rest for id in kept.tolist())  # in their order
    neighbours = read[~SPECIAL[read] | (read == MASK)] == MASK
    assert not (neighbours[1:] & neighbours[:-1]).any()


def test_denoising_has_spans_of_three_and_masks_where_nothing_was() -> None:
    random, text = np.random.default_rng(0), np.arange(3, 1003)
    sizes: list[int] = []
    for _ in range(30):
        read = Denoising(MASK, SPECIAL)(text, random)[0]
        places = np.flatnonzero(read == MASK)
        before = np.array([2, *read, 1003])
        sizes += (before[places + 2] - before[places] - 1).tolist()
    shares = np.bincount(sizes, minlength=4)[:4] / len(sizes)
    np.testing.assert_allclose(shares, [0.0498, 0.149, 0.224, 0.224], atol=0.03)  # of Poisson(3)


def test_sentences_are_shuffled_whole() -> None:
    text = np.array([5, 6, 9, 7, 9, 8, 8])
    found = {tuple(shuffled_sentences(text, np.array([3, 5]), np.random.default_rng(i))) for i in range(60)}
    assert len(found) == 6 and (7, 9, 8, 8, 5, 6, 9) in found
    read, written = Denoising(MASK, SPECIAL, flags([9], VOCAB), rate=0.0)(text, np.random.default_rng(0))
    assert tuple(read) in found and tuple(read) != tuple(text) == tuple(written)


@given(ids, seeds, st.sampled_from([0.0, 1.0]))
def test_fill_in_the_middle_can_be_put_back(text: np.ndarray, seed: int, spm: float) -> None:
    pre, suf, mid = 1100, 1101, 1102
    how = FillInMiddle(pre, suf, mid, rate=1.0, spm=spm)
    found, trained = how(text, np.random.default_rng(seed))
    assert len(found) == len(trained) == how.reach(np.array([len(text)]))[0] and trained.all()
    out = found.tolist()
    p, s, m = out.index(pre), out.index(suf), out.index(mid)
    if spm:
        assert (p, s) == (0, 1) and out[m + 1 :] + out[2:m] == text.tolist()
    else:
        assert p == 0 and out[1:s] + out[m + 1 :] + out[s + 1 : m] == text.tolist()
    plain, _ = FillInMiddle(pre, suf, mid, rate=0.0)(text, np.random.default_rng(seed))
    assert (plain == text).all()


@given(ids, seeds)
def test_blanks_are_filled_behind_the_text(text: np.ndarray, seed: int) -> None:
    how = BlankInfilling(SENTINELS, 1050, SPECIAL)
    found, trained = how(text, np.random.default_rng(seed))
    assert len(found) == how.reach(np.array([len(text)]))[0]
    spans = span_counts(len(text), 0.15, 3.0)[1]
    ends = np.flatnonzero(found == 1050)
    first = int(np.flatnonzero(trained)[0]) - 1  # the sentinel of the first span
    read, written = found[:first], found[first:]
    assert len(ends) == spans and found[-1] == 1050 and not trained[: first + 1].any()
    sentinels = np.isin(written, SENTINELS)
    assert (trained[first:] == ~sentinels).all()
    spans_found = spans_of(written[written != 1050])
    back = [id for part in read.tolist() for id in spans_found.get(part, [part])]
    assert sorted(back) == sorted(text.tolist()) and len(spans_found) == spans
    if not SPECIAL[text].any():
        assert back == text.tolist()


def test_blanks_come_in_random_order() -> None:
    how, text = BlankInfilling(SENTINELS, 1050, SPECIAL), np.arange(3, 63)
    orders = set()
    for seed in range(40):
        found, trained = how(text, np.random.default_rng(seed))
        behind = found[np.flatnonzero(trained)[0] - 1 :]
        orders.add(tuple(behind[behind >= 1100].tolist()))
    assert len(orders) == 6  # three blanks


def test_an_empty_text_stays_empty() -> None:
    nothing, random = np.zeros(0, np.int64), np.random.default_rng(0)
    hows: list[Any] = [
        Masking(MASK, SPECIAL), SpanCorruption(SENTINELS, SPECIAL), SpanCorruption(SENTINELS, SPECIAL, anywhere=True),
        Denoising(MASK, SPECIAL, flags([9], VOCAB)), BlankInfilling(SENTINELS, END, SPECIAL),
    ]  # fmt: skip
    for how in hows:
        assert [len(part) for part in how(nothing, random)] == [0, 0]
