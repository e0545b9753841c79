"""Windows, document hashes, and texts that are longer than a model reads."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import UsageError
from langmill.text.document import text_hash
from langmill.text.tasks import Limit, TooLong, encode_texts, overlapping, windows
from langmill.text.tokenizer import Tokenizer

LONG = "the quick brown fox jumps over the lazy dog, 你好世界 مرحبا بالعالم. " * 4


@given(st.lists(st.integers(0, 9), max_size=50), st.integers(1, 12))
def test_every_token_is_predicted_once_from_what_precedes_it(ids: list[int], length: int) -> None:
    cut = windows(ids, length)
    assert [target for _, targets in cut for target in targets] == ids[1:]
    assert [token for inputs, _ in cut for token in inputs] == ids[:-1]
    assert all(len(inputs) == len(targets) <= length for inputs, targets in cut)
    assert all(len(inputs) == length for inputs, _ in cut[:-1])
    assert all(now[0][0] == before[1][-1] for before, now in itertools.pairwise(cut))


def test_windows_of_an_array_and_of_no_length() -> None:
    assert windows(np.array([5], dtype=np.uint16), 4) == []
    with pytest.raises(ValueError, match="at least one prediction"):
        windows([1, 2], 0)


def test_the_hash_of_a_text_never_changes() -> None:
    # Held-out documents depend on it, so a change would leak them into training on a resumed corpus.
    assert (text_hash(""), text_hash("你好")) == (0xB4B2797457A0A6E4, 0xDCCE8C2E765A1C55)
    assert text_hash("你好") == text_hash("你好".encode())


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 30))
def test_overlapping_windows_cover_every_token(count: int, room: int, overlap: int) -> None:
    cuts = overlapping(count, room, overlap)
    assert cuts[0][0] == 0 and cuts[-1][1] == count and all(end - first <= room for first, end in cuts)
    assert all(end - first == room for first, end in cuts[:-1])
    for before, now in itertools.pairwise(cuts):
        assert before[0] < now[0] <= before[1] < now[1] and before[1] - now[0] == min(overlap, room // 2)


@pytest.mark.parametrize("shape", ["bert", "roberta", "t5", "ours"])
def test_windows_and_cuts_are_those_of_transformers(shaped: dict[str, Tokenizer], shape: str) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = shaped[shape]
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend, pad_token=tokenizer.token(0))
    texts = [LONG, "a fox", LONG[5:90]]
    wanted = theirs(
        texts,
        truncation=True,
        max_length=20,
        stride=6,
        return_overflowing_tokens=True,
        add_special_tokens=True,
    )
    counted: Counter[str] = Counter()
    ours = encode_texts(tokenizer, texts, Limit(20, "window", 6), counted, first=5)
    assert [document.ids for document in ours] == wanted.input_ids
    assert [document.number - 5 for document in ours] == wanted.overflow_to_sample_mapping
    assert counted == {"windowed": 2, "windows": len(ours) - 1}
    for pair in (
        (LONG, "a fox"),
        ("a fox", LONG),
        (LONG, LONG[:150]),
        ("a fox", "the dog"),
        (LONG[:40], LONG),
    ):
        for length in (20, 23):
            counted = Counter()
            (one,) = encode_texts(tokenizer, [pair], Limit(length, "truncate"), counted)
            assert one.ids == theirs(*pair, truncation="longest_first", max_length=length).input_ids
            whole = len(theirs(*pair).input_ids)
            assert counted == ({"truncated": 1, "tokens cut off": whole - length} if whole > length else {})
    for side, pair in (("only_second", ("a fox", LONG)), ("only_first", (LONG, "a fox"))):
        wanted = theirs(*pair, truncation=side, max_length=20, stride=6, return_overflowing_tokens=True)
        ours = encode_texts(tokenizer, [pair], Limit(20, "window", 6), Counter())
        assert [document.ids for document in ours] == wanted.input_ids
    theirs.backend_tokenizer.no_truncation()


def test_what_does_not_fit_or_is_nothing_is_refused(shaped: dict[str, Tokenizer]) -> None:
    bert = shaped["bert"]
    with pytest.raises(TooLong, match=r"text 8 has \d+ tokens, and the model reads 18") as error:
        encode_texts(bert, ["a", LONG], Limit(20), Counter(), first=6)
    assert error.value.reason == "longer than the model reads"
    with pytest.raises(TooLong, match="leaves no room"):
        encode_texts(bert, [(LONG, LONG)], Limit(20, "window"), Counter())
    counted = Counter[str]()
    assert encode_texts(bert, ["", "a"], Limit(20), counted)[0].ids == [2, 3] and counted == {
        "empty texts": 1
    }
    with pytest.raises(TooLong, match="b.txt, line 9 has"):
        encode_texts(bert, ["a", LONG], Limit(20), Counter(), names=["b.txt, line 8", "b.txt, line 9"])
    with pytest.raises(UsageError, match='no policy "split"'):
        Limit(20, "split")
    with pytest.raises(UsageError, match="cannot be"):
        Limit(0)
