"""Quality rules over whole columns: each against a plain reading of its definition, text by text."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import UsageError
from langmill.data.c4 import C4, JoinLines
from langmill.data.characters import Texts
from langmill.data.cjk_rules import CJK_C4, CJK_FINEWEB, CJK_QUALITY, CJK_REPETITION
from langmill.data.judge import without_spaces
from langmill.data.repetition import GopherRepetition, Grams, lines, paragraphs, repeated_characters
from langmill.data.rules import FineWeb, GopherQuality, ellipses

PROSE = "The tools of this package read what the user wrote and that is all they have to do, with care. "
VARIED = "Nothing here is said twice, so every rule about repeated words leaves such short paragraphs alone."
CHINESE = "这个软件包的工具读取用户写下的内容，这就是它们在这里要做的全部工作，一定要小心。"
text = st.text("ab .\n\r-•…#\u2028漢。é", max_size=60)


def batch(*texts: str, dropped: list[str | None] | None = None) -> Any:
    return pa.table(
        {
            "id": [str(number) for number in range(len(texts))],
            "text": pa.array(texts, pa.large_string()),
            "source": ["here"] * len(texts),
            "meta": ["{}"] * len(texts),
            "dropped": pa.array(dropped or [None] * len(texts), pa.string()),
        }
    )


def said(step: Any, *texts: str) -> list[str | None]:
    """Reasons without the step's name."""
    found = step(batch(*texts)).column("dropped").to_pylist()
    return [reason and reason.removeprefix(f"{step.name}: ") for reason in found]


def words(texts: Texts, row: int = 0) -> list[str]:
    spans = texts.words
    own = slice(spans.bounds[row], spans.bounds[row + 1])
    return [texts.joined[a:b] for a, b in zip(spans.starts[own], spans.ends[own], strict=True)]


@pytest.mark.parametrize(
    "written, wanted",  # as spaCy's English tokenizer has it
    [
        ("Hello, world!", "Hello|,|world|!"),
        ("It's what they don't have: we'll see.", "It|'s|what|they|do|n't|have|:|we|'ll|see|."),
        ("a test-case (see item_one)...", "a|test|-|case|(|see|item_one|)|..."),
        ("read http://foo.bar/baz-qux, e.g. 10% of it", "read|http://foo.bar/baz-qux|,|e.g.|10|%|of|it"),
        ("===== ----- /usr/bin", "=|=|=|=|=|-----|/usr|/|bin"),
        ("wait…what ..then", "wait|…|what|..|then"),
        ("مرحبا بالعالم، هذا نص", "مرحبا|بالعالم|،|هذا|نص"),
    ],
)
def test_words_are_those_of_spacy(written: str, wanted: str) -> None:
    assert words(Texts([written])) == wanted.split("|")


def test_characters_without_spaces_are_words_where_asked() -> None:
    assert words(Texts(["漢字 and かな。"], single=True)) == ["漢", "字", "and", "か", "な", "。"]
    assert words(Texts(["漢字 and かな。"])) == ["漢字", "and", "かな", "。"]


@given(st.lists(text, max_size=5))
def test_rows_do_not_touch_each_other(rows: list[str]) -> None:
    together = Texts(rows)
    hashes = together.hashes(together.words)
    for row, own in enumerate(rows):
        alone = Texts([own])
        assert words(together, row) == words(alone)
        assert (
            hashes[together.words.bounds[row] : together.words.bounds[row + 1]].tolist()
            == alone.hashes(alone.words).tolist()
        )
        assert "".join(words(alone)) == "".join(own.split())
        split = together.split_lines().where(together.split_lines().rows == row)
        assert [together.joined[a:b].strip() for a, b in zip(split.starts, split.ends, strict=True)] == [
            line.strip() for line in own.splitlines()
        ]
        assert together.count(ellipses(together))[row] == own.count("...") + own.count("…")


@given(st.lists(text, min_size=1, max_size=4), st.integers(2, 4))
def test_repetition_is_what_a_plain_count_gives(rows: list[str], n: int) -> None:
    texts = Texts(rows)
    grams = Grams(texts)
    top, covered = grams.top(n), grams.covered(n)
    for row, own in enumerate(rows):
        found = [words(texts, row)[i : i + n] for i in range(len(words(texts, row)) - n + 1)]
        counts = Counter(" ".join(gram) for gram in found)
        likeliest = counts.most_common(1)
        assert top[row] == (len(likeliest[0][0]) * likeliest[0][1] if likeliest else 0)
        seen, free, total = set(), 0, 0
        for place, gram in enumerate(map(tuple, found)):
            if place < free:
                continue
            if gram in seen:
                total, free = total + len("".join(gram)), place + n
            seen.add(gram)
        assert grams.repeated(row, n) == total <= covered[row]
        for spans, pieces in (
            (lines(texts), re.split(r"\n+", own)),
            (paragraphs(texts), re.split(r"\n{2,}", own.strip())),
        ):
            again = [piece for i, piece in enumerate(pieces) if piece in pieces[:i]]
            count, characters = repeated_characters(spans, texts.hashes(spans))
            assert (count[row], characters[row]) == (len(again), len("".join(again)))


def test_gopher_says_why() -> None:
    assert said(
        GopherQuality(),
        PROSE * 3,
        PROSE,
        "",
        "a b c d the of " * 20,
        PROSE * 3 + "# " * 20,
        PROSE * 3 + "... " * 20,
        "- " + (PROSE * 3).replace(" ", "\n- "),
        (PROSE * 3).replace(" ", "...\n", 3),
        PROSE * 3 + "12345 " * 40,
        "Werkzeuge lesen Geschriebenes " * 30,
    ) == [
        None,
        "too few words",
        "too few words",
        "words too short",
        "too many hashes",
        "too many ellipses",
        "mostly bullets",
        "lines end in ellipses",
        "too few words with letters",
        "too few stop words",
    ]
    assert said(GopherQuality(min_words=None, min_stop_words=None), PROSE) == [None]


def test_stop_words_are_asked_of_their_own_language() -> None:
    german = "Werkzeuge lesen Geschriebenes " * 30
    metas = [
        '{"url":"x","language":"de","language_score":0.991}',
        '{"language":"de","language_score":0.310}',
        '{"language":"en","language_score":0.991}',
        '{"language":"und","language_score":0.000}',
        '{"language":"de","language_score":0.991}',
    ]
    rows = batch(german, german, german, german, "kurz")
    rows = rows.set_column(rows.schema.get_field_index("meta"), "meta", pa.array(metas))
    dropped = GopherQuality()(rows).column("dropped").to_pylist()
    few = "gopher_quality: too few stop words"
    assert dropped == [None, few, few, few, "gopher_quality: too few words"]


def test_gopher_repetition_says_why() -> None:
    repeated = said(GopherRepetition(), "", "one line\n" * 4, "word " * 9, PROSE * 3, f"{PROSE}{VARIED}")
    assert repeated == ["empty", "repeated lines", "most frequent 2-gram", "most frequent 4-gram", None]
    assert said(GopherRepetition(top=()), PROSE * 3) == ["repeated 5-grams"]


def test_fineweb_says_why() -> None:
    prose = (PROSE * 3).strip()
    wrapped = "\n".join(f"line {number} that ends nothing at all here" for number in range(9))
    assert said(FineWeb(), prose, " \n ", wrapped, "Yes.\nNo.\nWell.\nPerhaps.", f"{prose}\n{prose}") == [
        None,
        "empty",
        "few lines end a sentence",
        "mostly short lines",
        "repeated lines",
    ]
    assert said(FineWeb(max_short_lines=None), "Yes.\n\nNo.\nIt is.") == ["mostly line breaks"]


def test_c4_keeps_lines_that_end_sentences() -> None:
    kept = "One line is here. It has a second sentence![1]\nAnother line asks you: is it right?\nIt is right, they say."
    more = f"  Menu\n{kept}\n\ttoo short.\nIt needs Javascript to run {{here}}.\nAnd so on...\nWe use cookies here."
    rows = batch(
        more, kept, f"{kept} Lorem ipsum dolor.", f"{kept}\nIf it {{is}} code.", "It is one. It is two."
    )
    found = C4(min_sentences=4)(rows)
    assert (
        found.column("text").to_pylist()
        == [kept.replace("[1]", "")] * 2 + rows.column("text").to_pylist()[2:]
    )
    assert [reason and reason.removeprefix("c4: ") for reason in found.column("dropped").to_pylist()] == [
        None,
        None,
        "lorem ipsum",
        "curly bracket",
        "too few sentences",
    ]
    assert said(C4(), more) == ["too few sentences"]
    hindi = "शहर की समृद्धि इसी बंदरगाह की देन है। सुबह होते ही पहली नावें समुद्र में निकल जाती हैं।"
    assert said(C4(min_sentences=1), hindi, hindi.replace("।", ";")) == [None, "too few sentences"]
    assert said(C4(min_sentences=None, curly_brackets=False, lorem_ipsum=False), "Lorem ipsum {a}.") == [None]
    with pytest.raises(UsageError, match="ASCII"):
        C4(policies=("使用",))


def test_wrapped_lines_are_joined() -> None:
    wrapped = (
        "A paragraph that was wrapped at a margin of sixty\ncharacters goes on here.\n\n"
        " * a list of things that is wide enough\n * two\n"
    )
    found = JoinLines(width=40)(batch(wrapped, "short\nlines"))
    assert found.column("text").to_pylist() == [wrapped.replace("sixty\n", "sixty "), "short\nlines"]


def test_chinese_is_judged_by_characters() -> None:
    long = "".join(f"{CHINESE[:-1]}{a}{b}。" for a, b in ("天地", "玄黄", "宇宙", "洪荒", "日月"))
    assert said(GopherQuality(), long, PROSE) == [None, "too few words"]  # Chinese is left to its own rules
    assert said(CJK_QUALITY, long, CHINESE[:30], PROSE, "石" * 200) == [
        None,
        "too few words",
        None,
        "too few stop words",
    ]
    assert said(CJK_REPETITION, CHINESE * 4, CHINESE) == ["repeated 8-grams", None]
    assert said(CJK_C4, f"{CHINESE}\n菜单\n{CHINESE}\n{CHINESE}", "菜单") == [None, "too few sentences"]
    assert CJK_C4(batch(f"{CHINESE}\n菜单\n{CHINESE}\n{CHINESE}")).column("text").to_pylist() == [
        "\n".join([CHINESE] * 3)
    ]
    assert said(CJK_FINEWEB, long, "首页\n新闻。\n体育。\n财经。") == [None, "mostly short lines"]


def test_rows_that_were_dropped_are_left_as_they_are() -> None:
    rows = batch("", PROSE * 3, "", dropped=["tidy: empty", None, None])
    for step in (GopherQuality(), GopherRepetition(), C4(), FineWeb(), JoinLines(), CJK_QUALITY):
        again = pickle.loads(pickle.dumps(step))  # noqa: S301 - what was written just now
        found = again(rows)
        assert again == step and found.schema == rows.schema
        assert found.column("id") == rows.column("id") and found.column("dropped")[0].as_py() == "tidy: empty"
    assert GopherQuality()(rows.slice(0, 0)).num_rows == 0
    many = [PROSE * 3, PROSE] * 3000  # several chunks
    assert said(GopherQuality(), *many) == [None, "too few words"] * 3000


def test_a_technical_page_is_read_by_characters_where_a_third_of_its_words_are() -> None:
    chinese = "函数 kmem_cache_alloc_node() 在 CONFIG_SLUB_DEBUG=y 时检查 include/linux/slab.h 里的 kmem_cache_create。"
    english = "In a word, 汉字 are the characters of Chinese, and kmem_cache_alloc_node() is a function of the kernel."
    text = pa.array([chinese, english, "Ünïcödé ça được привет", ""], pa.large_string())
    assert without_spaces(text, np.ones(4, bool)).tolist() == [True, False, False, False]
    assert sum("\u4e00" <= c <= "\u9fff" for c in chinese) < len(chinese) / 4
