"""`min_tokens`: no end before, whatever else holds; and `max_tokens` 0, which scores a prompt."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch

import langmill
from langmill.serve.state import State

GREEDY: dict[str, Any] = {"model": "plain", "prompt": "The quick", "temperature": 0}


def end_of(state: State) -> dict[str, int]:
    """A bias that makes the model end at once, where it may."""
    return {str(next(iter(state.models.find("plain", "write").tokenizer.stop_ids))): 100}


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_end_comes_before(client: openai.OpenAI, state: State, temperature: float) -> None:
    how = {**GREEDY, "max_tokens": 24, "temperature": temperature, "logit_bias": end_of(state)}
    for fewest, written in ((None, 1), (0, 1), (1, 2), (9, 10), (24, 24)):
        got = client.completions.create(extra_body={"min_tokens": fewest}, n=2, **how)
        assert got.usage.completion_tokens == 2 * written
        assert {choice.finish_reason for choice in got.choices} == {"length" if written == 24 else "stop"}
        assert all("incomplete" not in (choice.model_extra or {}) for choice in got.choices)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], logit_bias=end_of(state), temperature=0,
        max_completion_tokens=24, extra_body={"min_tokens": 7},
    )  # fmt: skip
    assert chat.usage.completion_tokens == 8


def test_other_ends_and_formats_hold_too(client: openai.OpenAI, state: State) -> None:
    free = client.completions.create(max_tokens=24, extra_body={"ignore_eos": True}, **GREEDY).choices[0].text
    long = {"min_tokens": 20, "ignore_eos": True}
    ended = client.completions.create(stop=free[3:6], max_tokens=24, extra_body=long, **GREEDY).choices[0]
    assert (
        ended.text == free[: free.index(free[3:6])] and "needs more tokens" in ended.model_extra["incomplete"]
    )
    stops = {
        "stop_token_ids": [state.models.find("plain", "write").tokenizer.encode(free)[0]],
        "min_tokens": 9,
    }
    assert client.completions.create(max_tokens=24, extra_body=stops, **GREEDY).usage.completion_tokens >= 9
    for choices, text in ((["fox", "fox jumps"], "fox jumps"), (["fox"], "fox")):
        got = client.completions.create(
            max_tokens=24, logit_bias=end_of(state), extra_body={"guided_choice": choices, "min_tokens": 20}, **GREEDY
        )  # fmt: skip
        assert (got.choices[0].text, got.choices[0].finish_reason) == (text, "stop")


def test_a_prompt_is_scored_and_nothing_is_written(client: openai.OpenAI, plain_folder: str) -> None:
    model, ours = langmill.load(plain_folder)
    assert ours is not None
    rows = [ours.encode(text) for text in ("The quick brown fox. 春眠", "day")]
    how: dict[str, Any] = {**GREEDY, "prompt": rows, "echo": True, "logprobs": 1, "max_tokens": 0}
    whole = client.completions.create(**how)
    *parts, last = client.completions.create(stream=True, stream_options={"include_usage": True}, **how)
    for row, choice in zip(rows, whole.choices, strict=True):
        with torch.inference_mode():
            logs = model(torch.tensor([row]))[0].log_softmax(-1)
        wanted = [float(logs[place, id]) for place, id in enumerate(row[1:])]
        (part,) = (part.choices[0] for part in parts if part.choices[0].index == choice.index)
        for one in (choice, part):
            assert one.text == ours.decode(row) and one.finish_reason == "length"
            assert one.logprobs.token_logprobs == [None, *(pytest.approx(log, abs=1e-3) for log in wanted)]
    for usage in (whole.usage, last.usage):
        assert (usage.completion_tokens, usage.prompt_tokens) == (0, sum(map(len, rows)))
    bare = client.completions.create(**how | {"logprobs": None, "prompt": "day"}).choices[0]
    assert (bare.text, bare.logprobs) == ("day", None)


def test_the_end_is_told_among_the_tokens(client: openai.OpenAI, state: State) -> None:
    """lm-evaluation-harness asks for one token, which may be the end, and cuts the last entry off."""
    ids = state.models.find("plain", "write").tokenizer.encode("The quick brown fox")
    how: dict[str, Any] = {**GREEDY, "prompt": ids, "echo": True, "logprobs": 1}
    scored = client.completions.create(max_tokens=0, **how).choices[0].logprobs
    for bias in ({}, end_of(state)):
        cut = client.completions.create(max_tokens=1, logit_bias=bias, **how).choices[0].logprobs
        assert cut.token_logprobs[:-1] == scored.token_logprobs and cut.tokens[:-1] == scored.tokens


@pytest.mark.parametrize(
    "given, message",
    [
        ({"min_tokens": 25}, "min_tokens is 25, and at most 24 tokens are written"),
        ({"max_tokens": 0}, "tells nothing without echo"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens is 1, and at most 0 tokens"),
        ({"max_tokens": -1}, "max_tokens should be greater than or equal to 0"),
        ({"min_tokens": -1}, "min_tokens should be greater than or equal to 0"),
    ],
)
def test_what_contradicts_itself_is_refused(
    client: openai.OpenAI, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**GREEDY, max_tokens=24, extra_body=given)
