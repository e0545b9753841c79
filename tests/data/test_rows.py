"""Items of tasks in rows: each once an epoch, whole, with what belongs to it; exact resume; no leak in a split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import CheckpointError, DataError, UsageError
from langmill.data.corrupt import BlankInfilling, Denoising, FillInMiddle, Masking, SpanCorruption, flags
from langmill.data.fresh import Denoised, Infilled, Masked
from langmill.data.items import Contrasted, Labelled, Spanned, Tagged, Translated, linked
from langmill.data.rows import TaskBatch, TaskRows, Text, Texts, tokens_of
from langmill.data.shards import Shards, write_shards
from langmill.text.document import Document
from langmill.text.tokenizer import Tokenizer

PAD, START = 99, 98
CLS, SEP, MASK = 95, 96, 97
SPECIAL = flags(range(60, 100), 400)
Source = Any


def texts(count: int = 30, low: int = 3, high: int = 12, seed: int = 0) -> list[Text]:
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        ids = [number, *random.integers(0, 60, random.integers(low, high) - 1).tolist()]
        found.append(Text(f"file:{number}", ids, [0] * (len(ids) - 1) + [1]))
    return found


def sources() -> dict[str, Source]:
    plain = texts()
    sizes = [len(text.ids) for text in plain]
    groups = [[one, *more] for one, *more in zip(plain, texts(seed=1), texts(seed=2), strict=True)]
    store = Texts.of([*plain, *(Text("long", range(55)) for _ in range(3))], PAD)
    ends = {"store": store, "length": 24, "front": (CLS,), "back": (SEP,), "pad_id": PAD}
    return {
        "labels": Labelled.of(plain, np.arange(30) % 3, PAD),
        "several": Labelled.of(plain, np.arange(60).reshape(30, 2) % 3 - 1, PAD),
        "values": Labelled.of(plain, np.arange(30) / 4, PAD),
        "tags": Tagged.of(plain, [np.arange(size) for size in sizes], PAD),
        "spans": Spanned.of(plain, [(1, size - 1) for size in sizes], PAD, [[True] * size for size in sizes]),
        "two sides": Translated.of(plain, [text.ids for text in texts(seed=1)], START, PAD),
        "groups": Contrasted.of(groups, PAD),
        "masked": Masked(how=Masking(MASK, SPECIAL), **ends),
        "infilled": Infilled(how=FillInMiddle(90, 91, 92), **ends),
        "blanks": Infilled(how=BlankInfilling((90, 91, 92), 93, SPECIAL), **{**ends, "back": ()}),
        "corrupted": Denoised(
            how=SpanCorruption((90, 91, 92), SPECIAL, anywhere=True), start_id=START, **ends
        ),
        "denoised": Denoised(how=Denoising(MASK, SPECIAL), start_id=START, ratio=(5, 4), **ends),
    }


SOURCES = sources()
LENGTH = {"groups": 40}
names = pytest.mark.parametrize("name", SOURCES)


def rows(name: str, size: int = 2, seed: int = 3, count: int = 30) -> TaskRows:
    return TaskRows(SOURCES[name], np.arange(count), LENGTH.get(name, 24), size, seed)


def arrays(batch: TaskBatch) -> dict[str, np.ndarray]:
    found = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: array for name, array in found.items() if isinstance(array, np.ndarray)}


def same(one: TaskBatch, other: TaskBatch) -> bool:
    mine, theirs = arrays(one), arrays(other)
    equal = all(np.array_equal(mine[n].astype(float), theirs[n].astype(float), equal_nan=True) for n in mine)
    return mine.keys() == theirs.keys() and equal


def documents(batch: TaskBatch) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """(row, place, item, which tokens of the row) of each document."""
    for row, numbers in enumerate(batch.numbers_BP.tolist()):
        for place, number in enumerate(number for number in numbers if number >= 0):
            yield row, place, number, batch.documents_BT[row] == place + 1


def held(batch: TaskBatch) -> list[int]:
    return batch.numbers_BP[batch.numbers_BP >= 0].tolist()


@names
def test_an_epoch_holds_every_item_once_whatever_the_batch(name: str) -> None:
    for size in (1, 2, 7):
        batches = list(rows(name, size).once())
        assert sorted(number for batch in batches for number in held(batch)) == list(range(30))
        for batch in batches:
            assert set(batch.sources) == set(held(batch))
            assert len(batch.tokens_BT) == size and batch.tokens_BT.shape == batch.targets_BT.shape
            check_places(batch.documents_BT, batch.positions_BT)
            if batch.encoder_documents_BS is not None and batch.encoder_positions_BS is not None:
                check_places(batch.encoder_documents_BS, batch.encoder_positions_BS)
                assert (batch.encoder_documents_BS.max(axis=1) == batch.documents_BT.max(axis=1)).all()
        shapes = [{n: array.shape for n, array in arrays(batch).items()} for batch in batches]
        assert all(shape == shapes[0] for shape in shapes)


def check_places(documents_BT: np.ndarray, positions_BT: np.ndarray) -> None:
    for row, places in zip(documents_BT, positions_BT, strict=True):
        filled = row[row > 0]
        assert (row[len(filled) :] == 0).all() and set(np.diff(filled).tolist()) <= {0, 1}
        for number in set(filled.tolist()):
            assert places[row == number].tolist() == list(range(int((row == number).sum())))


@names
def test_rows_go_on_where_they_were(name: str) -> None:
    stream = rows(name)
    for _ in range(5):
        next(stream)
    place, after = stream.state(), [next(stream) for _ in range(8)]
    again = rows(name)
    again.restore(place)
    assert all(same(one, next(again)) for one in after)
    assert not same(after[0], next(rows(name, seed=4)))
    with pytest.raises(CheckpointError):
        rows(name, count=29).restore(place)


@pytest.mark.parametrize("name", ["masked", "infilled", "blanks", "corrupted", "denoised"])
def test_damage_differs_by_epoch_and_not_by_batch(name: str) -> None:
    def seen(size: int) -> dict[int, list[bytes]]:
        found: dict[int, list[bytes]] = {number: [] for number in range(30)}
        stream = rows(name, size)
        while min(map(len, found.values())) < 3:
            batch = next(stream)
            for row, place, number, mine in documents(batch):
                data = batch.tokens_BT[row][mine].tobytes() + batch.targets_BT[row][mine].tobytes()
                if batch.encoder_tokens_BS is not None and batch.encoder_documents_BS is not None:
                    theirs = batch.encoder_documents_BS[row] == place + 1
                    data += batch.encoder_tokens_BS[row][theirs].tobytes()
                found[number].append(data)
        return {number: made[:3] for number, made in found.items()}

    one = seen(1)
    assert one == seen(4) == seen(64)  # a batch of 64 rows holds several epochs
    assert sum(len(set(made)) > 1 for made in one.values()) > 20


@given(st.integers(5, 60), st.integers(0, 2**40))
def test_long_texts_are_cut_into_stretches_that_fill_rows(length: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    store = Texts.of(
        [Text(str(i), random.integers(0, 60, n)) for i, n in enumerate((1, 7, 8, 9, 100, 200, 57))], PAD
    )
    source = Masked(store, Masking(MASK, SPECIAL), length, (CLS,), (SEP,), PAD)
    parts: dict[int, list[list[int]]] = {}
    for batch in TaskRows(source, np.arange(7), length, 3, seed).once():
        for row, _, number, mine in documents(batch):
            tokens, targets = batch.tokens_BT[row][mine], batch.targets_BT[row][mine]
            whole = np.where(targets >= 0, targets, tokens).tolist()
            assert whole[0] == CLS and whole[-1] == SEP and (targets >= 0).any()
            parts.setdefault(number, []).append(whole[1:-1])
    for number in range(7):
        ids = store.tokens_of(number).tolist()
        wanted = [ids[at : at + length - 2] for at in range(0, len(ids), length - 2)]
        assert sorted(parts[number]) == sorted(wanted)


@given(st.integers(6, 40), st.sampled_from([(1, 1), (9, 2), (2, 3)]), st.booleans())
def test_both_sides_hold_the_longest_stretches_that_fit(
    length: int, ratio: tuple[int, int], bart: bool
) -> None:
    store = Texts.of([Text(str(n), np.arange(n) % 60) for n in (1, 2, 30, 200, 401)], PAD)
    sentinels = tuple(range(100, 200))
    how: Any = Denoising(MASK, SPECIAL) if bart else SpanCorruption(sentinels, SPECIAL)
    source = Denoised(store, how, length, (), (SEP,), PAD, START, ratio)
    assert source.taken(np.array([source.size]))[0] <= length < source.taken(np.array([source.size + 1]))[0]
    counts, written = [0] * 5, 0
    for batch in TaskRows(source, np.arange(5), length, 2, 0).once():
        assert batch.encoder_tokens_BS is not None
        assert batch.encoder_tokens_BS.shape == (2, length * ratio[0] // ratio[1])
        ids = (
            batch.targets_BT if bart else np.concatenate((batch.encoder_tokens_BS, batch.targets_BT), axis=1)
        )
        written += int(((ids >= 0) & (ids < 60)).sum())
        for _, _, number, _ in documents(batch):
            counts[number] += 1
    assert written == 1 + 2 + 30 + 200 + 401
    assert counts == [-(-n // source.size) for n in (1, 2, 30, 200, 401)]


def test_a_written_text_does_not_begin_with_its_end() -> None:
    store = Texts.of([Text("one", range(1, 9))], PAD)
    end = 95
    source = Denoised(store, Denoising(MASK, SPECIAL), 24, (end,), (end,), PAD, START)
    [batch] = list(TaskRows(source, np.arange(1), 24, 1, 0).once())
    assert batch.encoder_tokens_BS is not None
    read = batch.encoder_tokens_BS[0][batch.encoder_tokens_BS[0] != PAD]
    assert read[0] == read[-1] == end
    assert batch.targets_BT[0][batch.targets_BT[0] >= 0].tolist() == [*range(1, 9), end]


@pytest.mark.parametrize(
    "how",
    [
        Masking(257, flags([256, 257], 400)),
        FillInMiddle(300, 301, 302),
        BlankInfilling(tuple(range(300, 350)), 299, flags([256], 400)),
        SpanCorruption(tuple(range(300, 350)), flags([256], 400)),
        Denoising(257, flags([256], 400)),
    ],
)
def test_shards_are_a_store(how: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["ab"], 260)
    documents = [
        Document(str(i), "abcdefgh"[i % 8] * size, "s") for i, size in enumerate((1, 5, 40, 300, 90, 33))
    ]
    shards: Shards = write_shards(documents, tokenizer, tmp_path / "s")
    ends = {"length": 48, "front": (258,), "back": (259,), "pad_id": 256, "how": how, "store": shards}
    kind: Callable[..., Source] = {Masking: Masked, FillInMiddle: Infilled, BlankInfilling: Infilled}.get(
        type(how), Denoised
    )
    source = kind(**ends, **({"start_id": 259} if kind is Denoised else {}))
    batches = list(TaskRows(source, np.arange(6), 48, 2, 0).once())
    assert {number for batch in batches for number in held(batch)} == set(range(6))
    assert (np.concatenate([batch.targets_BT for batch in batches]) >= 0).sum() > 20
    assert source.name(3) == "3" and SOURCES["masked"].name(3) == "file:3"


@pytest.mark.parametrize("name", ["labels", "several", "values", "tags", "spans"])
def test_each_kind_of_label_stands_at_its_text(name: str) -> None:
    plain, seen = texts(), 0
    for batch in rows(name).once():
        assert batch.types_BT is not None
        for row, place, number, mine in documents(batch):
            seen += 1
            size, given = int(mine.sum()), arrays(batch)
            assert batch.tokens_BT[row][mine].tolist() == list(plain[number].ids)
            assert batch.types_BT[row][mine].tolist() == [0] * (size - 1) + [1]
            if name == "labels":
                assert given["labels_BP"][row, place] == number % 3
            elif name == "several":
                assert given["labels_BPC"][row, place].tolist() == [
                    2 * number % 3 - 1,
                    (2 * number + 1) % 3 - 1,
                ]
            elif name == "values":
                assert given["values_BP"][row, place] == number / 4
            elif name == "tags":
                assert batch.targets_BT[row][mine].tolist() == list(range(size))
            else:
                assert given["starts_BP"][row, place] == 1 and given["ends_BP"][row, place] == size - 1
                assert given["allowed_BT"][row][mine].all()
        for array in (batch.labels_BP, batch.labels_BPC, batch.starts_BP, batch.ends_BP):
            assert array is None or (array[batch.numbers_BP < 0] == -1).all()
        assert batch.values_BP is None or np.isnan(batch.values_BP[batch.numbers_BP < 0]).all()
    assert seen == 30


def test_a_decoder_begins_with_its_start_and_learns_every_id() -> None:
    read, written = texts(), texts(seed=1)
    source = Translated.of(read, [text.ids for text in written], START, PAD, ratio=(3, 2))
    for batch in TaskRows(source, np.arange(30), 16, 2, 0).once():
        assert batch.encoder_tokens_BS is not None and batch.encoder_documents_BS is not None
        assert batch.encoder_tokens_BS.shape == (2, 24)
        assert tokens_of(batch) == (batch.documents_BT > 0).sum() + (batch.encoder_documents_BS > 0).sum()
        for row, place, number, mine in documents(batch):
            theirs = batch.encoder_documents_BS[row] == place + 1
            assert batch.encoder_tokens_BS[row][theirs].tolist() == list(read[number].ids)
            assert batch.targets_BT[row][mine].tolist() == list(written[number].ids)
            assert batch.tokens_BT[row][mine].tolist() == [START, *list(written[number].ids)[:-1]]
        assert ((batch.targets_BT == -100) == (batch.documents_BT == 0)).all()


def test_groups_stand_whole_and_equal_texts_are_known() -> None:
    twice = Text("b", [1, 2])
    source = Contrasted.of(
        [[Text("a", [5]), twice], [Text("c", [6]), twice], [twice, Text("d", [7, 8])]], PAD
    )
    assert source.contents.tolist() == [[0, 1], [2, 1], [1, 3]]
    (batch,) = TaskRows(source, np.arange(3), 12, 1, 0).once()
    assert batch.pairs_BP is not None and batch.contents_BPG is not None
    for place, number in enumerate(batch.pairs_BP[0, :3].tolist()):
        for member in (0, 1):
            mine = batch.tokens_BT[0][batch.documents_BT[0] == 2 * place + member + 1].tolist()
            assert mine == source.texts.tokens_of(2 * number + member).tolist()
        assert batch.contents_BPG[0, place].tolist() == source.contents[number].tolist()


def test_what_belongs_together_stays_on_one_side() -> None:
    plain = [Text(str(i), [i % 10, 1]) for i in range(40)]
    training, kept = Labelled.of(plain, np.arange(40) % 2, PAD).split(0.3)
    assert len(kept) and not set(training % 10) & set(kept % 10)
    keyed = [Text(str(i), [i], key=f"passage {i % 4}") for i in range(40)]
    training, kept = Spanned.of(keyed, [(0, 0)] * 40, PAD).split(0.3)
    assert len(kept) == 10 and not set(training % 4) & set(kept % 4)
    pairs = Translated.of(
        [Text(str(i), [i // 2, 1]) for i in range(40)], [[(i + 1) // 2 % 9, 2] for i in range(40)], START, PAD
    )
    assert len(pairs.split(0.2)[0]) == 40 or not len(pairs.split(0.2)[1])  # all hang together
    assert linked([b"a", b"b", b"c", b"d"], [b"x", b"x", b"d", b"y"]) == [b"a", b"a", b"c", b"c"]
    groups = Contrasted.of([[Text(str(i), [i % 6]), Text("p", [50 + i])] for i in range(30)], PAD)
    training, kept = groups.split(0.3)
    assert len(kept) and not set(training % 6) & set(kept % 6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Texts.of([], PAD), "no example"),
        (lambda: Texts.of([Text("here", [])], PAD), "here is empty"),
        (lambda: Texts.of([Text("here", [1, 2], [0])], PAD), "here has 2 tokens and types for 1"),
        (lambda: Labelled.of(texts(), [1, 2], PAD), r"30 texts and labels of shape \(2,\)"),
        (lambda: Labelled.of(texts(2), [1.0, float("nan")], PAD), "file:1 has the value nan"),
        (lambda: Tagged.of(texts(1, 3, 4), [[1]], PAD), "file:0 has 3 tokens and 1 tags"),
        (lambda: Tagged.of(texts(1, 3, 4), [], PAD), "1 texts, and tags for 0"),
        (lambda: Spanned.of(texts(1, 3, 4), [(1, 3)], PAD), "file:0 has an answer from token 1 to 3"),
        (lambda: Spanned.of(texts(1, 3, 4), [(1, 2)], PAD, [[True, True, False]]), "none can be there"),
        (lambda: Spanned.of(texts(1, 3, 4), [], PAD), "1 texts and 0 answers"),
        (lambda: Translated.of(texts(2), [[1]], START, PAD), "2 texts, and 1 that are written"),
        (lambda: Translated.of(texts(1), [[]], START, PAD), "file:0 is empty"),
        (lambda: Contrasted.of([texts(2), texts(3)], PAD), "file:0 has 3 texts"),
        (lambda: TaskRows(SOURCES["labels"], np.arange(30), 8, 1, 0), r"file:\d+ takes 11 places, and a row has 8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        make()


def test_a_row_too_short_for_its_markers_is_told() -> None:
    source = Masked(Texts.of(texts(), PAD), Masking(MASK, SPECIAL), 2, (CLS,), (SEP,), PAD)
    with pytest.raises(UsageError, match="a row of 2 tokens has no room"):
        TaskRows(source, np.arange(30), 2, 1, 0)


def test_a_changed_task_is_no_resume() -> None:
    ends = {"store": Texts.of(texts(), PAD), "length": 24, "front": (CLS,), "back": (SEP,), "pad_id": PAD}
    one, other = (Masked(how=Masking(MASK, SPECIAL, rate=rate), **ends) for rate in (0.15, 0.3))
    place = TaskRows(one, np.arange(30), 24, 1, 0).state()
    with pytest.raises(CheckpointError, match="task"):
        TaskRows(other, np.arange(30), 24, 1, 0).restore(place)


def test_the_windows_of_a_long_text_share_its_key() -> None:
    """Thousands of windows of a megabyte each would hold gigabytes."""
    keys = ["a long text" * 9, "another"]
    texts = Texts.of([Text(str(i), [i], key=f"{keys[i % 2]}") for i in range(6)] + [Text("6", [6])], PAD)
    assert len({id(key) for key in texts.keys}) == 3
    assert [key.decode() for key in texts.keys[:2]] == keys
