"""Sources and targets with one end each, and documents that come back with every line break."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from langmill.common.errors import DataError
from langmill.text.tasks import Limit, TooLong
from langmill.text.tokenizer import Tokenizer
from langmill.text.translate import Piece, closed, encode_source, encode_target, join_document, split_document

SHAPES = ("bert", "roberta", "t5", "ours")
DOCUMENT = (
    "# Title\r\n\r\nThe quick fox. J. Curie of Paris! Who was born (in Warsaw?) She said “no.” Yes\n\n\n"
    "  玛丽出生在华沙。她在巴黎工作！“好。”今天天气很好，我们去公园玩\n\tولدت ماري في وارسو. من اكتشف الراديوم؟ هي.\n"
)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_end_behind_each_side(shaped: dict[str, Tokenizer], shape: str) -> None:
    tokenizer = shaped[shape]
    for text in ("The quick fox", "玛丽出生", "ولدت ماري"):
        ids, counted = tokenizer.encode(text), Counter[str]()
        source = encode_source(tokenizer, text, Limit(99), counted, 4)
        target = encode_target(tokenizer, text, Limit(99), counted)
        assert source.ids[-1] == target[-1] == tokenizer.eos_id and source.ids.count(tokenizer.eos_id) == (
            2 if shape == "ours" else 1
        )
        assert target[0] != tokenizer.eos_id and [source.ids[i] for i in source.first] == ids
        assert len(source.ids) == len(source.types) and source.number == 4 and not counted
    assert tokenizer.decode(target) == text


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_closed_other_tools_read_what_the_encoder_learnt_on(
    shaped: dict[str, Tokenizer], shape: str, bare: bool
) -> None:
    content = json.loads(shaped[shape].to_json())
    if bare:
        content["post_processor"] = None
    tokenizer = Tokenizer(Backend.from_str(json.dumps(content)), shaped[shape].specials)
    own, text = closed(tokenizer), "The quick fox"
    wanted = encode_source(tokenizer, text, Limit(99), Counter()).ids
    assert Backend.from_str(own.to_json()).encode(text).ids == wanted
    assert encode_source(own, text, Limit(99), Counter()).ids == wanted
    assert own.frame.stated and closed(own) is own and own.encode(text) == tokenizer.encode(text)


def test_long_sides_follow_the_policy(shaped: dict[str, Tokenizer]) -> None:
    for shape in SHAPES:
        tokenizer, counted = shaped[shape], Counter[str]()
        source = encode_source(tokenizer, DOCUMENT, Limit(12, "truncate"), counted)
        target = encode_target(tokenizer, DOCUMENT, Limit(12, "truncate"), counted)
        assert len(source.ids) == 12 and len(target) <= 12 and counted["truncated"] == 2
        assert source.ids[-1] == target[-1] == tokenizer.eos_id
        for policy in ("error", "window"):
            with pytest.raises(TooLong, match="target 3 has .* choose truncate for long texts"):
                encode_target(tokenizer, DOCUMENT, Limit(12, policy), counted, 2)
    with pytest.raises(DataError, match="source 1 is empty"):
        encode_source(tokenizer, "", Limit(12), counted)


@pytest.mark.parametrize("shape", SHAPES)
@given(
    text=st.text("ab .!?\n\r\t，。你؟م\u2028J-", max_size=80) | st.just(DOCUMENT),
    length=st.integers(8, 40),
    sentences=st.booleans(),
)
def test_the_pieces_of_a_document_fit_and_join_to_it(
    shaped: dict[str, Tokenizer], shape: str, text: str, length: int, sentences: bool
) -> None:
    tokenizer = shaped[shape]
    pieces = split_document(tokenizer, text, length, sentences)
    assert join_document(pieces, [piece.text for piece in pieces]) == text
    assert all(piece.text for piece in pieces[:-1]) and not any("\n" in piece.text for piece in pieces)
    for piece in pieces:
        if piece.text and tokenizer.encode(piece.text):
            assert len(encode_source(tokenizer, piece.text, Limit(length), Counter()).ids) <= length


def test_sentences_of_three_scripts(shaped: dict[str, Tokenizer]) -> None:
    pieces = split_document(shaped["ours"], DOCUMENT, 400, sentences=True)
    assert [piece.text for piece in pieces if piece.text] == [
        "# Title", "The quick fox.", "J. Curie of Paris!", "Who was born (in Warsaw?)", "She said “no.”", "Yes",
        "玛丽出生在华沙。", "她在巴黎工作！", "“好。”", "今天天气很好，我们去公园玩",
        "ولدت ماري في وارسو.", "من اكتشف الراديوم؟", "هي.",
    ]  # fmt: skip
    lines = split_document(shaped["ours"], DOCUMENT, 400)
    assert len(lines) == 5 and lines[1].before == "\r\n\r\n" and lines[-1] == Piece("\n", "")


def test_joining_puts_spaces_where_the_language_does() -> None:
    chinese = [Piece("", "你好。"), Piece("", "再见。"), Piece("\n\n  ", "一。")]
    assert join_document(chinese, ["Hello.", "Bye.", "One."]) == "Hello. Bye.\n\n  One."
    english = [Piece("", "Hello."), Piece(" ", "Bye."), Piece("\n", "One."), Piece(" \n", "")]
    assert join_document(english, ["你好。", "再见。", "一。", ""]) == "你好。再见。\n一。 \n"
    assert join_document(english, ["مرحبا.", "وداعا.", "واحد.", ""]) == "مرحبا. وداعا.\nواحد. \n"


def test_a_very_long_line_is_cut_between_words_or_at_last_anywhere(shaped: dict[str, Tokenizer]) -> None:
    tokenizer = shaped["ours"]
    words = "fox " * 20_000
    pieces = split_document(tokenizer, words, 64)
    assert all(set(piece.text.split()) == {"fox"} for piece in pieces if piece.text)
    assert len(pieces) < 1.1 * len(tokenizer.encode(words)) / 62
    solid = "x" * 20_000
    pieces = split_document(tokenizer, solid, 64)
    assert (
        "".join(piece.text for piece in pieces) == solid and len(pieces) < len(tokenizer.encode(solid)) / 30
    )
    with pytest.raises(TooLong, match="no room"):
        split_document(tokenizer, "a", 1)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Dr. Weiß kam am 3. Mai an. Er ging z. B. heim.", ["Dr. Weiß kam am 3. Mai an.", "Er ging z. B. heim."]),
        ("See Fig. 3 by J. S. Bach, etc. and so on. Old.", ["See Fig. 3 by J. S. Bach, etc. and so on.", "Old."]),
        ("„Ja?“ fragte er. Nein!", ["„Ja?“ fragte er.", "Nein!"]),
        ("It was 1990. Then it ended.", ["It was 1990.", "Then it ended."]),
        ("你好。再见！वह गया।", ["你好。", "再见！", "वह गया।"]),
    ],
)  # fmt: skip
def test_sentences_are_not_torn_at_abbreviations(
    text: str, sentences: list[str], shaped: dict[str, Tokenizer]
) -> None:
    pieces = split_document(shaped["ours"], text, 400, sentences=True)
    assert [piece.text for piece in pieces if piece.text] == sentences


def test_a_text_of_small_letters_is_still_cut_at_its_stops(shaped: dict[str, Tokenizer]) -> None:
    text = "i went home and it was late. " * 12
    pieces = split_document(shaped["ours"], text.strip(), 64, sentences=True)
    assert all(piece.text.endswith("late.") for piece in pieces if piece.text) and len(pieces) > 3
