"""Questions and contexts: windows that cover the context, spans that come back, scores by run_squad's rule."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import DataError
from langmill.text.answer import (
    NOWHERE,
    ContextWindow,
    answer_places,
    answer_targets,
    best_answers,
    best_threshold,
    encode_question,
    exact_match,
    f1,
    normalised,
)
from langmill.text.tasks import Limit, TooLong
from langmill.text.tokenizer import Tokenizer

CONTEXTS = (
    "The quick brown fox jumps over the lazy dog, says Marie Curie of Paris. Who was born in Warsaw?",
    "玛丽·居里出生在华沙。她在巴黎工作，发现了镭。今天天气很好，我们去公园玩。",
    "ولدت ماري كوري في وارسو، وعملت في باريس. من اكتشف الراديوم؟ هي.",
)
SHAPES = ("bert", "roberta", "t5", "ours")


def pointed(windows: list[ContextWindow], places: list[tuple[int, int]]) -> tuple[list[np.ndarray], ...]:
    """The scores of a model that has learnt these places."""
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for window, place in zip(windows, places, strict=True):
        for side in range(2):
            scores = np.zeros(len(window.encoded.ids))
            scores[place[side]] = 9
            found[side].append(scores)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@given(
    context=st.sampled_from(CONTEXTS),
    length=st.integers(24, 60),
    overlap=st.integers(0, 20),
    ends=st.tuples(st.integers(0, 200), st.integers(1, 4)),
)
def test_windows_cover_the_context_and_a_span_comes_back(
    shaped: dict[str, Tokenizer], shape: str, context: str, length: int, overlap: int, ends: tuple[int, int]
) -> None:
    tokenizer = shaped[shape]
    ids, offsets = tokenizer.encode_with_offsets(context)
    windows = encode_question(tokenizer, "Who?", context, Limit(length, "window", overlap), Counter(), 3)
    seen: dict[int, int] = {}
    for window in windows:
        assert len(window.encoded.ids) <= length and window.encoded.number == 3
        for place, token in enumerate(window.encoded.second):
            seen[window.from_token + place] = window.encoded.ids[token]
            assert window.offsets[place] == offsets[window.from_token + place]
        assert sum(window.allowed) == 1 + len(window.encoded.second) and window.allowed[0]
    assert [seen[place] for place in range(len(ids))] == ids
    first = ends[0] % len(ids)
    last = min(first + ends[1], len(ids)) - 1
    start, end = offsets[first][0], offsets[last][1]
    while start < end and context[start].isspace():
        start += 1
    while start < end and context[end - 1].isspace():
        end -= 1
    if start == end:
        return
    counted: Counter[str] = Counter()
    places = answer_targets(windows, [(start, end)], counted)
    result = best_answers(context, windows, *pointed(windows, places))
    if counted[NOWHERE]:  # it is longer than what two windows share
        assert result["answer"] == "" and result["start"] is None and result["no_answer_score"] > 0.9
        return
    best = result["best"][0]
    assert best["start"] <= start and end <= best["end"]
    assert best["answer"] == context[best["start"] : best["end"]]
    if not shared(offsets):
        assert (best["start"], best["end"]) == (start, end)


def test_each_window_learns_the_first_answer_that_it_holds(shaped: dict[str, Tokenizer]) -> None:
    tokenizer, context = shaped["bert"], "the lazy dog of paris " * 6
    windows = encode_question(tokenizer, "who", context, Limit(24, "window", 4), Counter())
    last, first = context.rindex("dog"), context.index("paris")
    counted: Counter[str] = Counter()
    places = answer_targets(windows, [(last, last + 3), (first, first + 5)], counted)
    assert len(windows) > 1 and places[0] != (0, 0) != places[-1] and not counted[NOWHERE]
    for window, (a, b), answer in ((windows[0], places[0], "paris"), (windows[-1], places[-1], "dog")):
        spans = [window.offsets[place - window.encoded.second.start] for place in (a, b)]
        assert context[spans[0][0] : spans[1][1]] == answer
    assert answer_targets(windows, [], counted) == [(0, 0)] * len(windows) and not counted[NOWHERE]
    answer_targets(windows, [(0, len(context) - 1)], counted)
    assert counted[NOWHERE] == 1


def shared(offsets: list[tuple[int, int]]) -> bool:
    """Whether a character is in more than one token, as in byte-level vocabularies: there spans may be wider."""
    return any(before[1] > after[0] for before, after in itertools.pairwise(offsets))


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_and_targets_are_those_of_transformers(shaped: dict[str, Tokenizer], shape: str) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = shaped[shape]
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend)
    for context, answer in zip(CONTEXTS, ("lazy dog", "巴黎", "باريس"), strict=True):
        options = {"truncation": "only_second", "max_length": 30, "stride": 8}
        wanted = theirs(
            "Who?", context, return_overflowing_tokens=True, return_offsets_mapping=True, **options
        )
        ours = encode_question(tokenizer, "Who?", context, Limit(30, "window", 8), Counter())
        assert [window.encoded.ids for window in ours] == wanted.input_ids
        start = context.index(answer)
        for number, window in enumerate(ours):
            of_text, offsets = wanted.sequence_ids(number), wanted.offset_mapping[number]
            inside = [i for i, text in enumerate(of_text) if text == 1]
            first, last = answer_places(window, start, start + len(answer))
            whole = offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= start + len(answer)
            assert ((first, last) != (0, 0)) == whole
            if whole:
                assert offsets[first][0] <= start < offsets[first][1]
                assert offsets[last][0] < start + len(answer) <= offsets[last][1]
    theirs.backend_tokenizer.no_truncation()


def test_the_best_spans_are_those_of_an_exhaustive_search(shaped: dict[str, Tokenizer]) -> None:
    context, random = CONTEXTS[0], np.random.default_rng(0)
    windows = encode_question(shaped["bert"], "Who?", context, Limit(30, "window", 8), Counter())
    starts, ends = ([random.normal(size=len(w.encoded.ids)) for w in windows] for _ in range(2))
    wanted: dict[tuple[int, int], float] = {}
    for window, start, end in zip(windows, starts, ends, strict=True):
        for a, b in itertools.combinations_with_replacement(range(len(window.offsets)), 2):
            if b - a < 5:
                place = (window.offsets[a][0], window.offsets[b][1])
                score = start[window.encoded.second[a]] + end[window.encoded.second[b]]
                wanted[place] = max(score, wanted.get(place, -99))
    ranked = sorted(wanted, key=lambda place: -wanted[place])[:20]
    null = min(start[0] + end[0] for start, end in zip(starts, ends, strict=True))
    result = best_answers(context, windows, starts, ends, n_best=7, max_length=5)
    assert [(span["start"], span["end"]) for span in result["best"]] == ranked[:7]
    powers = np.exp([*(wanted[place] for place in ranked), null])
    assert np.allclose(
        [*(s["score"] for s in result["best"]), result["no_answer_score"]],
        [*(powers / powers.sum())[:7], powers[-1] / powers.sum()],
    )
    for margin, answered in ((1e-6, True), (-1e-6, False)):
        threshold = null - wanted[ranked[0]] + margin
        result = best_answers(context, windows, starts, ends, max_length=5, threshold=threshold)
        assert (result["answer"] != "") == answered
    forced = best_answers(context, windows, starts, ends, max_length=5, threshold=-99, no_answer=False)
    assert forced["answer"] == context[ranked[0][0] : ranked[0][1]]


def test_what_leaves_no_room_is_refused(shaped: dict[str, Tokenizer]) -> None:
    bert = shaped["bert"]
    with pytest.raises(TooLong, match="the context of question 1 has"):
        encode_question(bert, "Who?", CONTEXTS[0], Limit(20), Counter())
    with pytest.raises(TooLong, match="leave no room for a context"):
        encode_question(bert, CONTEXTS[0], "a", Limit(20, "window"), Counter())
    with pytest.raises(DataError, match="gives no token"):
        encode_question(bert, "Who?", " ", Limit(20), Counter())
    counted: Counter[str] = Counter()
    (cut,) = encode_question(bert, "Who?", CONTEXTS[1], Limit(20, "truncate"), counted)
    assert len(cut.encoded.ids) == 20 and counted["truncated"] == 1
    assert answer_places(cut, len(CONTEXTS[1]) - 2, len(CONTEXTS[1])) == (0, 0)


def test_exact_match_and_overlap() -> None:
    assert normalised("The  U.S.'s “an” Apple—pie, $5!") == "uss applepie 5"
    assert normalised("Ｔｈｅ 巴黎。") == "巴黎" and normalised("«باريس»؟") == "باريس"
    assert exact_match("the Cat.", ["dog", "cat"]) == 1 and exact_match("cats", ["cat"]) == 0
    assert exact_match("", []) == f1("", []) == 1 and exact_match("x", []) == f1("x", []) == 0
    assert f1("the big red cat", ["red cat sat"]) == pytest.approx(2 / 3)  # 2 shared of 3 and 3
    assert f1("red red", ["red"]) == pytest.approx(2 / 3)
    assert f1("在巴黎", ["巴黎"]) == pytest.approx(4 / 5)  # by character
    assert f1("the", ["a"]) == 1 and f1("the", ["cat"]) == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from([-np.inf, -3.0, -0.5, 0.0, 2.0, np.inf]), st.integers(0, 4), st.integers(0, 1)
        ),
        min_size=1,
        max_size=8,
    )
)
def test_no_threshold_does_better_than_the_best(questions: list[tuple[float, int, int]]) -> None:
    margins, said, empty = (list(values) for values in zip(*questions, strict=True))

    def mean(at: float) -> float:
        return float(np.mean([e if m > at else s for m, s, e in zip(margins, said, empty, strict=True)]))

    found = best_threshold(margins, said, empty)
    assert mean(found) == max(mean(at) for at in (-9, -3, -2, -0.5, -0.2, 0, 1, 2, 9))
    assert found == 0 or mean(found) > mean(0)
