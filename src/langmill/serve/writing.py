"""The one road from a route to the engine: choices as they are written, or whole, and their way out as events.

A client that goes away frees its slots at once, in both forms.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from langmill.infer.request import Constraint, Event, Finish, Likely
from langmill.infer.request import Request as Asked
from langmill.infer.sampling import Sampling
from langmill.serve.errors import Refused, content, refusal_of, stopping
from langmill.serve.models import Loaded
from langmill.serve.state import State

T = TypeVar("T")
Written = AsyncGenerator[tuple[int, Event], None]
ENDLESS = 1024  # tokens that a model without a last position writes where nothing is said
QUIET_SECONDS = 10.0  # after which a silent stream says that it is alive
LONG = 2048  # characters of a prompt that are made ids of in a few milliseconds
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Wanted:
    """What to write: `n` answers to a prompt. The rest is as `infer.request.Request` has it; `constraint` makes one for
    each answer. mute: only the prompt is read; the engine writes one token at least, which then nobody is told of."""

    prompt: Sequence[int]
    sampling: Sampling
    n: int = 1
    logprobs: int | None = None
    constraint: Callable[[], Constraint] | None = None
    stop_ids: frozenset[int] | None = None
    priority: int = 0
    scored: bool = False
    mute: bool = False


@dataclass
class Choice:
    """One answer: finish is "stop" or "length", reason why its text does not meet its constraint, prompt what a scored
    one is told of its prompt."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    likely: list[Likely] = field(default_factory=list)
    finish: Finish = "stop"
    reason: str | None = None
    prompt: list[Likely] = field(default_factory=list)


@dataclass
class Usage:
    """Tokens read, of these known from before, and written."""

    prompt: int = 0
    cached: int = 0
    written: int = 0

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def room(loaded: Loaded, prompt: Sequence[int], asked: int | None, param: str = "max_tokens") -> int:
    """How many tokens to write: those that were asked for, or as many as fit. Refused, with the numbers, where they do
    not fit behind the prompt."""
    window, size = loaded.window, len(prompt)
    if not size:
        raise Refused("the prompt has no tokens: give it some text", param="prompt")
    if size > window or (asked is not None and size + asked - 1 > window):
        more = "" if asked is None or size > window else f", and {asked} were asked for beyond it ({param})"
        raise Refused(
            f"this model's context is {window} tokens and the prompt has {size}{more}: shorten the prompt"
            + (" or ask for fewer" if more else ""),
            code="context_length_exceeded",
            param=param if more else None,
        )
    if asked is not None:
        return asked
    endless = not hasattr(loaded.model.config, "main")
    return min(window - size + 1, ENDLESS) if endless else window - size + 1


async def write(state: State, loaded: Loaded, wanted: Sequence[Wanted] | Wanted, key: str | None) -> Written:
    """(choice, event) of all choices as they come, each ending with a `finish` of "stop" or "length".

    Of several prompts the choices are numbered on: choice i of prompt p is p·n + i. key: the name of the client's key,
    for its limits. Leaving the iteration cancels what goes on. Refused where a prompt does not fit the model, a limit
    is reached, or the engine fails.
    """
    prompts = [wanted] if isinstance(wanted, Wanted) else wanted
    for one in prompts:
        room(loaded, one.prompt, one.sampling.max_new_tokens)
    state.limits.check(key, sum(len(one.prompt) * one.n for one in prompts))
    requests = [
        Asked(
            one.prompt, one.sampling, stop_ids=one.stop_ids, priority=one.priority, logprobs=one.logprobs,
            choice=choice, scored=one.scored, constraint=None if one.constraint is None else one.constraint(),
            adapter=loaded.adapter,
        )
        for one in prompts
        for choice in range(one.n)
    ]  # fmt: skip
    began = time.perf_counter()
    last, told = [began] * len(requests), [False] * len(requests)
    counts = [0] * len(requests)
    streams = [loaded.engine.generate(one) for one in requests]
    try:
        with loaded.open():
            async with aclosing(merged(streams)) as events:
                async for choice, event in events:
                    if prompts[choice // prompts[0].n].mute:
                        _silence(event)
                    now = time.perf_counter()
                    if event.ids:
                        note = state.metrics.between if told[choice] else state.metrics.first
                        note(loaded.name, now - last[choice])
                        last[choice], told[choice] = now, True
                        counts[choice] += len(event.ids)
                    if event.finish is not None:
                        size = len(requests[choice].prompt)
                        state.metrics.ended(loaded.name, event.finish, size, event.cached, counts[choice])
                    if event.finish == "cancelled":
                        raise stopping()
                    if event.finish == "error":
                        raise Refused(event.reason or "the model failed", 500)
                    yield choice, event
    finally:
        state.limits.spend(key, sum(counts))


def _silence(event: Event) -> None:
    event.ids, event.likely, event.text = [], [], ""
    if event.finish == "stop":
        event.finish = "length"


async def whole(
    state: State,
    loaded: Loaded,
    wanted: Sequence[Wanted] | Wanted,
    key: str | None,
    usage: Usage | None = None,
) -> tuple[list[Choice], Usage]:
    """All of `write` gathered; `usage`, where it is given, counts on the way."""
    prompts = [wanted] if isinstance(wanted, Wanted) else wanted
    choices = [Choice() for one in prompts for _ in range(one.n)]
    usage = usage or usage_of(prompts)
    async with aclosing(write(state, loaded, wanted, key)) as events:
        async for number, event in events:
            choice = choices[number]
            choice.text += event.text
            choice.ids += event.ids
            choice.likely += event.likely
            choice.prompt += event.prompt
            if event.finish is not None:
                choice.finish, choice.reason = event.finish, event.reason
            count(usage, number, event, prompts)
    return choices, usage


def usage_of(prompts: Sequence[Wanted]) -> Usage:
    """What is known before anything is written."""
    return Usage(sum(len(one.prompt) for one in prompts))


def count(usage: Usage, number: int, event: Event, prompts: Sequence[Wanted]) -> None:
    """Add an event to what is counted; a prompt's cached tokens count once, by its first choice."""
    usage.written += len(event.ids)
    if event.finish is not None and number % prompts[0].n == 0:
        usage.cached += event.cached


def key_of(request: Request) -> str | None:
    """The name of the client's key; None where the server asks for none."""
    name: str | None = request.scope.get("state", {}).get("key")
    return name


def note(request: Request, usage: Usage) -> Usage:
    """Let the log's line of this request tell these tokens, as they are counted."""
    request.scope.setdefault("state", {})["usage"] = usage
    return usage


async def aside(loaded: Loaded, size: int, work: Callable[[], T]) -> T:
    """The result of `work` on a text of so many characters: a long one in a thread, so that nobody waits for it, and
    one at a time for each model, since its pieces take a hundred times its bytes."""
    return work() if size <= LONG else await in_turn(loaded, size, work)


async def in_turn(loaded: Loaded, size: int, work: Callable[[], T]) -> T:
    """The result of `work` on so many characters in a thread, one at a time for each model. QueueFull where too much
    waits."""
    async with loaded.reading.turn(size):
        return await to_its_end(work)


async def to_its_end(work: Callable[[], T]) -> T:
    """The result of `work` in a thread, which is waited for even where the client has left: a thread cannot be stopped,
    and until it ends what it works on is not free."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    finally:
        await asyncio.wait([running])


async def merged(streams: Sequence[AsyncGenerator[Event, None]]) -> Written:
    """The events of all streams as they come, with their stream's number."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for event in only:
                yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    queue.put_nowait((number, event))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            number, found = await queue.get()
            if isinstance(found, Exception):
                raise found
            left -= found.finish is not None
            yield number, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def attended(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled once the client is gone. The body must have been read."""
    return await _until_gone(request.receive, work)


async def _until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    done, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise Refused("the client has gone", 499, "client_gone")  # nobody reads this
        return done.result()
    finally:
        for task in (done, gone):
            task.cancel()
        await asyncio.gather(done, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def json_line(data: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event with a JSON object; name: its type, where it has one."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class Events(Response):
    """An answer of server-sent events (WHATWG HTML, section 9.2).

    lines: whole events as bytes, from a generator that is closed when the answer ends or the client goes. What it
    raises before its first event is an error with its own status; after it an event that holds the error, and the end.
    A stream that is silent for QUIET_SECONDS says so in a comment, so that nothing between takes it for dead. failed:
    the event for an error, from its body; OpenAI's form is `data: {"error": …}`, Anthropic's an event named "error".
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        lines: AsyncGenerator[bytes, None],
        failed: Callable[[dict[str, Any]], bytes] = json_line,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.lines, self.failed = lines, failed
        self.status_code, self.background, self.started = 200, None, False
        self.heard = 0.0
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _until_gone(receive, self._send(scope, send))
        except Refused as error:
            if error.status != 499:
                raise
        except asyncio.CancelledError:  # the time to drain is over
            if not self.started:
                raise
            await self._put(send, self.failed(content(stopping(), scope)))
            await self._put(send, b"", last=True)

    async def _send(self, scope: Scope, send: Send) -> None:
        beat = asyncio.create_task(self._beat(send))
        try:
            async with aclosing(self.lines) as lines:
                async for line in lines:
                    await self._put(send, line)
        except Exception as error:
            if not self.started:
                raise
            await self._put(send, self.failed(content(refusal_of(error), scope)))
        finally:
            beat.cancel()
        await self._put(send, b"", last=True)

    async def _put(self, send: Send, part: bytes, last: bool = False) -> None:
        self.heard = time.monotonic()
        if not self.started:
            self.started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": part, "more_body": not last})

    async def _beat(self, send: Send) -> None:
        self.heard = time.monotonic()
        while True:
            wait = self.heard + QUIET_SECONDS - time.monotonic()
            if wait <= 0:
                await self._put(send, b": still here\n\n")
            await asyncio.sleep(max(wait, QUIET_SECONDS / 10))
