"""Windows and document hashes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.text.document import text_hash
from langmill.text.tasks import windows


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
