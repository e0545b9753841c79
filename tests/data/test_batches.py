"""Packing: every token predicted once an epoch, nothing that fits is cut, exact resume, ranks that agree."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import CheckpointError, DataError, UsageError
from langmill.data import batches as module
from langmill.data.batches import Batch, Documents, Packed, pack, shuffled
from langmill.data.shards import Shards, write_shards
from langmill.text.document import Document
from langmill.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["ab"], 260)  # a token a byte
START, END = 258, 259
PAD = TOKENIZER.pad_id


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    rng = random.Random(0)
    sizes = [1, 2, 7, 8, 9, 15, 16, 17, 300] + [rng.choice((3, 5, 12, 40)) for _ in range(200)]
    texts = ["".join(rng.choice("abcdefgh") for _ in range(size)) for size in sizes]
    documents = [Document(str(i), text, "s") for i, text in enumerate(texts)]
    return write_shards(documents, TOKENIZER, tmp_path_factory.mktemp("b") / "s")


def pieces(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """(inputs, targets) of each document in each row; the batch's other arrays are checked on the way."""
    for tokens, targets, numbers, places in zip(
        batch.tokens_BT, batch.targets_BT, batch.documents_BT, batch.positions_BT, strict=True
    ):
        assert ((numbers == 0) == (targets == -100)).all() and (tokens[numbers == 0] == PAD).all()
        filled = numbers[numbers > 0]
        assert (np.diff(filled) >= 0).all() and set(filled) == set(range(1, len(set(filled)) + 1))
        assert len(filled) == len(numbers) or (numbers[len(filled) :] == 0).all()  # padding only at the end
        for number in sorted(set(filled)):
            mine = numbers == number
            assert places[mine].tolist() == list(range(mine.sum()))
            yield tokens[mine].tolist(), targets[mine].tolist()


def packed(shards: Shards, indices: list[int], length: int, rows: int = 1, **more: int) -> Packed:
    return Packed(Documents(shards, START, END, PAD), np.array(indices), length, rows, **({"seed": 3} | more))


def epoch(stream: Packed) -> list[tuple[list[int], list[int]]]:
    found = []
    while True:
        batch = next(stream)
        if stream.epoch:  # with one row in a batch no batch holds two epochs
            return found
        found += pieces(batch)


@given(
    indices=st.lists(st.integers(0, 208), min_size=1, max_size=60, unique=True),
    length=st.integers(1, 40), seed=st.integers(0, 2**63 - 1), block=st.integers(1, 20),
)  # fmt: skip
def test_an_epoch_predicts_every_token_once_and_cuts_nothing_that_fits(
    shards: Shards, indices: list[int], length: int, seed: int, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_DOCUMENTS", block)
        patch.setattr(module, "_BLOCK_ROWS", 0)
        found = epoch(packed(shards, indices, length, seed=seed))
    wanted: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for index in indices:
        sequence = [START, *shards.tokens_of(index).tolist(), END]
        for first in range(0, len(sequence) - 1, length):
            stop = min(first + length, len(sequence) - 1)
            wanted[tuple(sequence[first:stop]), tuple(sequence[first + 1 : stop + 1])] += 1
    assert Counter((tuple(inputs), tuple(targets)) for inputs, targets in found) == wanted


@given(st.integers(0, 30), st.integers(0, 25), st.integers(1, 5), st.integers(0, 2**62))
def test_a_restored_stream_goes_on_as_if_never_stopped(
    shards: Shards, before: int, length: int, rows: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_DOCUMENTS", 40)
        patch.setattr(module, "_BLOCK_ROWS", 0)
        indices = list(range(0, 200, 2))
        whole = packed(shards, indices, length + 4, rows, seed=seed)
        for _ in range(before):
            next(whole)
        state = json.loads(json.dumps(whole.state()))
        again = packed(shards, indices, length + 4, rows, seed=seed)
        again.restore(state)
        for _ in range(60):
            a, b = next(whole), next(again)
            assert a.sources == b.sources and (a.tokens_BT == b.tokens_BT).all()
            assert (a.targets_BT == b.targets_BT).all() and (a.documents_BT == b.documents_BT).all()
        assert whole.state() == again.state() and whole.epoch == again.epoch


def test_ranks_share_one_stream(shards: Shards) -> None:
    indices = list(range(shards.documents))
    alone = packed(shards, indices, 24, rows=6)
    ranks = [packed(shards, indices, 24, rows=2, rank=rank, world=3) for rank in range(3)]
    for _ in range(30):
        batch, parts = next(alone), [next(rank) for rank in ranks]
        assert (np.concatenate([part.tokens_BT for part in parts]) == batch.tokens_BT).all()
        assert (np.concatenate([part.targets_BT for part in parts]) == batch.targets_BT).all()
        assert alone.state() == ranks[0].state() == ranks[2].state()


def test_epochs_and_seeds_differ_and_the_estimates_hold(shards: Shards) -> None:
    indices = list(range(shards.documents))
    stream = packed(shards, indices, 32, rows=4)
    assert stream.tokens_per_epoch == shards.tokens + shards.documents
    assert stream.fill > 0.95
    rows = 0
    firsts = []
    for _ in range(200):
        before = stream.epoch
        batch = next(stream)
        rows += 4 if stream.epoch == 0 else 0
        if stream.epoch != before or not firsts:
            firsts.append(batch.tokens_BT.tolist())
    assert len(firsts) > 2 and len({str(first) for first in firsts}) == len(firsts)
    assert abs(stream.rows_per_epoch - rows) <= 4
    other = packed(shards, indices, 32, rows=4, seed=4)
    assert (next(other).tokens_BT != next(packed(shards, indices, 32, rows=4)).tokens_BT).any()
    assert next(packed(shards, [0], 32, rows=3)).sources == (0,)  # one short document fills every row


@given(st.integers(1, 3000), st.integers(0, 2**100))
def test_the_shuffle_is_a_permutation(size: int, key: int) -> None:
    assert sorted(shuffled(np.arange(size), size, key)) == list(range(size))


def test_the_shuffle_is_even() -> None:
    counts = np.zeros((8, 8), dtype=int)
    for key in range(4000):
        counts[np.arange(8), shuffled(np.arange(8), 8, key)] += 1
    assert counts.min() > 400 and counts.max() < 600  # 500 +- 4.5 standard deviations


@given(st.lists(st.integers(1, 50), max_size=80))
def test_rows_hold_every_item_once_and_never_too_much(lengths: list[int]) -> None:
    rows = pack(np.array(lengths, dtype=np.int64), 50)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[item] for item in row) for row in rows)
    assert not sums or sums[-1] <= 50
    assert len(sums) < 2 or sums[0] + sums[1] > 50  # no two rows would fit into one


def test_refusals(shards: Shards, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document to train on"):
        packed(shards, [], 8)
    with pytest.raises(UsageError, match="rank 2 of 2"):
        packed(shards, [1], 8, rank=2, world=2)
    state = packed(shards, [1, 2], 8).state()
    for other in (packed(shards, [1, 2], 9), packed(shards, [1, 2], 8, seed=9), packed(shards, [1], 8)):
        with pytest.raises(CheckpointError, match="resume with the same data and settings"):
            other.restore(state)
