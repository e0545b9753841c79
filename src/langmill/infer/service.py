"""The engine for asyncio: a thread steps it, and each request is an asynchronous stream of events."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import partial

from langmill.common.errors import LangmillError, UsageError
from langmill.infer.engine import Engine
from langmill.infer.request import Event, Request


@dataclass(eq=False)
class _Stream:
    """Where the events of one request go."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | LangmillError] = field(default_factory=asyncio.Queue)
    number: int | None = None  # once the engine has it


class Service:
    """Owns an engine: once made, only its thread touches that. Several event loops may use it at once."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[int, _Stream] = {}
        self._lock, self._closed, self._last = threading.Lock(), False, False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """The request's events, the last one with a `finish`. Leaving the iteration cancels the request.

        Raises what `Engine.submit` raises, and UsageError once the service is closed.
        """
        stream = _Stream(asyncio.get_running_loop())
        with self._lock:
            if self._closed:
                raise UsageError("the engine is closed: it takes no more requests")
            self._orders.put(partial(self._submit, request, stream))
        ended = False
        try:
            while not ended:
                event = await stream.events.get()
                ended = isinstance(event, LangmillError) or event.finish is not None
                if isinstance(event, LangmillError):
                    raise event
                yield event
        finally:
            if not ended:
                self._orders.put(partial(self._cancel, stream))

    async def close(self, drain: bool = True) -> None:
        """Take no more requests and end: when those that are there have ended, or after cancelling them."""
        with self._lock:
            self._closed = True
            self._orders.put(partial(self._finish, drain))
        await asyncio.to_thread(self._thread.join)

    def accounting(self) -> dict[str, int]:
        """See `Engine.accounting`."""
        return self._engine.accounting()

    def counts(self) -> dict[str, int]:
        """What was done so far: requests by their end, passes, tokens read, reused, written and guessed, ..."""
        return dict(self._engine.counts)

    # What follows runs in the thread.

    def _loop(self) -> None:
        while not (self._last and self._engine.idle):
            if self._engine.idle:
                self._orders.get()()
            while not self._orders.empty():
                self._orders.get()()
            try:
                events = self._engine.step()
            except Exception as error:  # whatever happens, nobody may wait for ever
                events = self._engine.abort(f"the engine failed: {type(error).__name__}: {error}")
            self._tell(events)

    def _submit(self, request: Request, stream: _Stream) -> None:
        try:
            stream.number = self._engine.submit(request)
        except Exception as error:
            known = (
                error
                if isinstance(error, LangmillError)
                else LangmillError(f"{type(error).__name__}: {error}")
            )
            self._put(stream.loop, [(stream, known)])
        else:
            self._streams[stream.number] = stream

    def _cancel(self, stream: _Stream) -> None:
        if stream.number is not None:
            self._engine.cancel(stream.number)

    def _finish(self, drain: bool) -> None:
        self._last = True
        for number in [] if drain else list(self._streams):
            self._engine.cancel(number)

    def _tell(self, events: list[Event]) -> None:
        """Each loop is woken once a step."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Event | LangmillError]]] = {}
        for event in events:
            stream = self._streams[event.request]
            if event.finish is not None:
                del self._streams[event.request]
            by_loop.setdefault(stream.loop, []).append((stream, event))
        for loop, told in by_loop.items():
            self._put(loop, told)

    def _put(
        self, loop: asyncio.AbstractEventLoop, told: list[tuple[_Stream, Event | LangmillError]]
    ) -> None:
        try:
            loop.call_soon_threadsafe(_deliver, told)
        except RuntimeError:  # the loop is closed: nobody listens any more
            for stream, _ in told:
                self._cancel(stream)


def _deliver(told: list[tuple[_Stream, Event | LangmillError]]) -> None:
    for stream, event in told:
        stream.events.put_nowait(event)
