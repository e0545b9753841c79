"""Words and their tags: nothing of a text is lost, every word counts once, and what tags spell."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import DataError
from langmill.text.classify import Labels
from langmill.text.tag import (
    IGNORED,
    Words,
    as_read,
    best_tags,
    encode_words,
    entities,
    repaired,
    spans_of,
    tag_targets,
    tags_of,
    word_scores,
)  # fmt: skip
from langmill.text.tasks import Limit, TooLong
from langmill.text.tokenizer import Tokenizer

LABELS = Labels(("B-LOC", "B-PER", "I-LOC", "I-PER", "O"), "tag")
SENTENCES = (
    ("Marie Curie was born in Warsaw.", "Marie Curie was born in Warsaw ."),
    ("玛丽在 Paris工作。", "玛 丽 在 Paris 工 作 。"),
    ("ولدت ماري كُوري، في وارسو؟", "ولدت ماري كُوري ، في وارسو ؟"),
    ("don't pay $3.50 👩‍👩‍👧!", "don ' t pay $ 3 . 50 👩‍👩‍👧 !"),
    ("می‌خواهم ไทย", "می‌خواهم ไ ท ย"),
)  # fmt: skip


@pytest.mark.parametrize(("text", "words"), SENTENCES)
def test_words_of_running_text(text: str, words: str) -> None:
    assert [text[a:b] for a, b in Words.split(text).spans] == words.split(" ")


@given(st.text() | st.text("ab .،你好مر\u0301😀\n"))
def test_only_white_space_lies_between_words(text: str) -> None:
    words, at = Words.split(text), 0
    for start, end in words.spans:
        assert at <= start < end and (not text[at:start] or text[at:start].isspace())
        at = end
    assert not text[at:] or text[at:].isspace()


@given(st.lists(st.sampled_from(["a", "fox", "你", "好", "。", ".", "ماري", "،"]), min_size=1, max_size=9))
def test_given_words_make_a_text_that_holds_them(words: list[str]) -> None:
    joined = Words.joined(words)
    assert [joined.text[a:b] for a, b in joined.spans] == words
    assert Words.split(joined.text).spans == joined.spans


@pytest.mark.parametrize("shape", ["bert", "t5"])
def test_words_are_encoded_as_transformers_encodes_them(shaped: dict[str, Tokenizer], shape: str) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=shaped[shape]._backend)
    words = ["The", "quick", "fox", "of", "Paris", "玛", "丽", "ولدت"]
    wanted = theirs(words, is_split_into_words=True)
    (window,) = encode_words(shaped[shape], [Words.joined(words)], Limit(99), Counter())
    assert window.encoded.ids == wanted.input_ids and window.words == tuple(range(8))
    ids = wanted.word_ids()
    assert window.places == tuple(ids.index(word) for word in range(8))


def test_byte_level_words_carry_the_space_before_them(shaped: dict[str, Tokenizer]) -> None:
    for shape in ("roberta", "ours"):
        tokenizer, text = shaped[shape], "The quick brown fox, 你好 Marie"
        (window,) = encode_words(tokenizer, [Words.split(text)], Limit(99), Counter())
        assert tokenizer.decode([window.encoded.ids[i] for i in window.encoded.first]) == text


@given(
    words=st.lists(st.sampled_from(["fox", "quickbrown", "你", "Warsaw", "\x00"]), min_size=1, max_size=30),
    length=st.integers(5, 14),
    overlap=st.integers(0, 9),
)
def test_every_word_counts_once_and_scores_come_back(
    shaped: dict[str, Tokenizer], words: list[str], length: int, overlap: int
) -> None:
    bert, counted = shaped["bert"], Counter[str]()
    text = Words.joined(words)
    windows = encode_words(bert, [text], Limit(length, "window", overlap), counted)
    assert all(len(window.encoded.ids) <= length for window in windows)
    held = [word for window in windows for word in window.words]
    kept = [number for number, word in enumerate(words) if bert.encode(word)]
    assert sorted(held) == kept and counted["without tokens"] == len(words) - len(kept)
    tags = [LABELS.names[number % 5] for number in range(len(words))]
    targets = [tag_targets(window, tags, LABELS) for window in windows]
    assert sum(target != IGNORED for row in targets for target in row) == len(held)
    logits = [np.eye(5)[np.maximum(row, 0)] * 9 for row in targets]  # a model that has learnt them
    found = best_tags(word_scores(len(words), windows, logits), LABELS)
    assert found == [tag if number in kept else "O" for number, tag in enumerate(tags)]


def test_a_word_counts_where_it_is_furthest_from_an_edge(shaped: dict[str, Tokenizer]) -> None:
    text = Words.joined(["a"] * 10)
    windows = encode_words(shaped["bert"], [text], Limit(8, "window", 2), Counter())
    assert [window.words for window in windows] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    assert [len(window.encoded.first) for window in windows] == [6, 6]


def test_long_texts_follow_the_policy(shaped: dict[str, Tokenizer]) -> None:
    bert, text = shaped["bert"], Words.joined(["fox"] * 9)
    size, counted = len(bert.encode("fox")), Counter[str]()
    (cut,) = encode_words(bert, [text], Limit(4 * size + 2, "truncate"), counted, first=3)
    assert cut.words == (0, 1, 2, 3) and cut.encoded.number == 3
    assert counted == {"truncated": 1, "tokens cut off": 5 * size, "without tokens": 0}
    assert best_tags(word_scores(9, [cut], [np.zeros((len(cut.encoded.ids), 5))]), LABELS)[4:] == ["O"] * 5
    with pytest.raises(TooLong, match="text 1 has"):
        encode_words(bert, [text], Limit(5), Counter())
    with pytest.raises(TooLong, match="b.txt, line 9 has"):
        encode_words(bert, [text], Limit(5), Counter(), names=["b.txt, line 9"])
    with pytest.raises(DataError, match="no word"):
        encode_words(bert, [Words.split(" ")], Limit(5), Counter())
    roberta = shaped["roberta"]
    many, counted = roberta.encode("quickbrownfox" * 3), Counter()
    (one,) = encode_words(roberta, [Words.joined(["quickbrownfox" * 3])], Limit(5, "window"), counted)
    assert len(one.encoded.ids) == 5 and counted["tokens cut off"] == len(many) - 3 and one.words == (0,)


def test_what_tags_spell_and_how_they_are_repaired() -> None:
    spell = lambda tags: spans_of(tags.split())  # noqa: E731
    assert spell("B-P I-P O B-L B-L I-L") == [(0, 2, "P"), (3, 4, "L"), (4, 6, "L")]
    assert spell("I-P I-P O I-L I-P") == [(0, 2, "P"), (3, 4, "L"), (4, 5, "P")]
    assert spell("B-P E-P S-L U-P B-L L-L I-L") == [
        (0, 2, "P"), (2, 3, "L"), (3, 4, "P"), (4, 6, "L"), (6, 7, "L")]  # fmt: skip
    assert spell("NOUN VERB NOUN O") == [(0, 1, "NOUN"), (1, 2, "VERB"), (2, 3, "NOUN")]
    assert repaired("I-P I-P O B-L I-P E-P".split()) == "B-P I-P O B-L B-P E-P".split()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["Ada", "U.S.", "O'Brien", "北京", "—"]),
            st.sampled_from(["O", "B-P", "I-P", "E-P", "S-P", "U-L", "L-L", "I-L"]),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_given_words_are_learnt_as_running_text_gives_them(pairs: list[tuple[str, str]]) -> None:
    words = Words.joined([word for word, _ in pairs])
    tags = repaired([tag for _, tag in pairs])
    read, spread, cut = as_read(words, tags)
    assert read.text == words.text and read.spans == Words.split(words.text).spans
    assert cut == sum(word not in ("Ada", "—") for word, _ in pairs)
    where = lambda own, found: [  # noqa: E731
        (own.spans[a][0], own.spans[b - 1][1], name) for a, b, name in spans_of(found)
    ]
    assert where(read, spread) == where(words, tags)


def test_parts_of_a_word_get_its_tag() -> None:
    given = Words.joined(["U.S.", "U.S.", "don't", "o.k"])
    assert as_read(given, ["S-L", "B-L", "VERB", "U-X"])[1] == (
        "B-L I-L I-L E-L B-L I-L I-L I-L VERB VERB VERB B-X I-X L-X".split()
    )


@given(st.lists(st.sampled_from(["O", "B-P", "I-P", "B-L", "I-L"]), max_size=12))
def test_repaired_tags_spell_the_same_and_are_legal(tags: list[str]) -> None:
    right = repaired(tags)
    assert spans_of(right) == spans_of(tags) and repaired(right) == right
    for before, now in zip(["O", *right], right, strict=False):
        assert not now.startswith("I-") or before[1:] == now[1:]


def test_entities_of_a_text_and_back() -> None:
    for text, spans in (
        ("Marie Curie was born in Warsaw.", [(0, 11, "PER"), (24, 30, "LOC")]),
        ("玛丽在华沙。", [(0, 2, "PER"), (3, 5, "LOC")]),
        ("ولدت ماري كوري في وارسو.", [(5, 14, "PER"), (18, 23, "LOC")]),
    ):
        words = Words.split(text)
        tags, widened = tags_of(words, spans)
        scores = np.full((len(words), 5), 0.1)
        scores[range(len(words)), [LABELS.number(tag) for tag in tags]] = 0.6
        found = entities(words, scores, LABELS)
        assert not widened and [(e["start"], e["end"], e["label"]) for e in found] == spans
        assert all(
            text[e["start"] : e["end"]] == e["text"] and e["score"] == pytest.approx(0.6) for e in found
        )


def test_spans_that_do_not_fit() -> None:
    words = Words.split("New York City")
    assert tags_of(words, [(0, 6, "LOC")]) == (["B-LOC", "I-LOC", "O"], 1)
    for spans, says in (
        ([(0, 14, "X")], "not within the text's 13"),
        ([(3, 3, "X")], "not within"),
        ([(3, 4, "X")], "holds no word"),
        ([(0, 8, "X"), (5, 9, "Y")], "shares a word"),
    ):
        with pytest.raises(DataError, match=says):
            tags_of(words, spans)
