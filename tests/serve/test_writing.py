"""Streams of events: their beginning, silence, errors before and midway, and who is let go when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from langmill.common.errors import QueueFull
from langmill.infer.sampling import Sampling
from langmill.serve import writing
from langmill.serve.errors import Refused
from langmill.serve.state import State
from langmill.serve.writing import Events, Wanted, attended, json_line, room, whole, write

SCOPE: dict[str, Any] = {"type": "http", "path": "/v1/chat/completions", "state": {}}


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


def sent(events: Events, receive: Any = never) -> list[dict[str, Any]]:
    """What a response sends."""
    messages: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(asyncio.wait_for(events(SCOPE, receive, send), 60))
    return messages


def body(messages: list[dict[str, Any]]) -> str:
    return b"".join(message.get("body", b"") for message in messages).decode()


async def lines(*parts: Any) -> AsyncGenerator[bytes, None]:
    for part in parts:
        if isinstance(part, Exception):
            raise part
        if isinstance(part, float):
            await asyncio.sleep(part)
        else:
            yield json_line({"text": part})


def test_events_are_sent_one_by_one_with_headers_that_keep_them_moving() -> None:
    messages = sent(Events(lines("a", "春眠")))
    headers = dict(messages[0]["headers"])
    assert (
        headers[b"content-type"].startswith(b"text/event-stream") and headers[b"x-accel-buffering"] == b"no"
    )
    assert b"content-length" not in headers
    assert [message.get("more_body") for message in messages] == [None, True, True, False]
    assert body(messages) == 'data: {"text":"a"}\n\ndata: {"text":"春眠"}\n\n'
    assert json_line({"a": 1}, "ping") == b'event: ping\ndata: {"a":1}\n\n'


def test_an_error_before_the_first_event_is_one_with_its_status() -> None:
    with pytest.raises(QueueFull):
        sent(Events(lines(QueueFull("later"))))


def test_an_error_midway_is_the_last_event() -> None:
    messages = sent(Events(lines("a", Refused("the engine failed", 500))))
    first, last = body(messages).strip().split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["message"], error["type"]) == ("the engine failed", "server_error") and "a" in first
    named = sent(Events(lines("a", ValueError("secret")), failed=lambda body: json_line(body, "error")))
    assert "event: error\n" in body(named) and "secret" not in body(named)
    assert messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


def test_silence_is_broken_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "QUIET_SECONDS", 0.02)
    told = body(sent(Events(lines(0.3, "a"))))
    assert told.startswith(": still here\n\n: still here\n\n") and told.endswith('data: {"text":"a"}\n\n')


def test_a_client_that_goes_closes_the_stream() -> None:
    closed = []

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b": \n\n"
                await asyncio.sleep(0.001)
        finally:
            closed.append(True)

    async def gone() -> dict[str, Any]:
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    sent(Events(endless()), gone)
    assert closed == [True]


def test_work_whose_client_goes_is_cancelled() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    class Request:
        async def receive(self) -> dict[str, Any]:
            return {"type": "http.disconnect"}

    with pytest.raises(Refused, match="the client has gone"):
        asyncio.run(attended(Request(), work()))  # type: ignore[arg-type]
    assert ended == [True]


def test_leaving_the_iteration_cancels_all_choices(running: Any) -> None:
    loaded = running.state.models.named("long")
    before = loaded.engine.counts().get("cancelled", 0)

    async def leave() -> None:
        wanted = Wanted([1, 2], Sampling(4000, 1.0), n=4, stop_ids=frozenset())
        events = write(running.state, loaded, wanted, None)
        await anext(events)
        await events.aclose()

    asyncio.run(leave())
    running.until(lambda: running.busy() == 0)
    assert loaded.engine.counts()["cancelled"] == before + 4


def test_whole_gathers_what_the_events_say(state: State) -> None:
    loaded = state.models.named("tiny")
    wanted = [Wanted([5, 6, 7], Sampling(6, seed=1), 2, 1), Wanted([9], Sampling(4))]
    choices, usage = asyncio.run(whole(state, loaded, wanted, None))
    assert [len(choice.ids) for choice in choices] == [6, 6, 4]
    assert len(choices[0].likely) == 6 and not choices[2].likely
    assert (usage.prompt, usage.written) == (4, 16) and usage.as_dict()["total_tokens"] == 20


def test_what_is_asked_for_must_fit_behind_the_prompt(state: State) -> None:
    loaded = state.models.named("tiny")
    assert room(loaded, [1] * 512, None) == 1 and room(loaded, [1] * 500, 13) == 13
    for size, asked in ((513, None), (500, 14)):
        with pytest.raises(Refused, match=f"512 tokens and the prompt has {size}") as error:
            room(loaded, [1] * size, asked)
        assert error.value.code == "context_length_exceeded"
    with pytest.raises(Refused, match="no tokens"):
        room(loaded, [], None)
