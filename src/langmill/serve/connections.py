"""Connections: how many stand open, and how long one may keep the server waiting: for a request's head, and for room
to send to.

uvicorn bounds neither: a client that sends a letter now and then, or reads nothing of its answer, would hold its place
for ever. How long a body may take is held in limits.py.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from langmill.serve.errors import Refused, body
from langmill.serve.state import State

PIECE = 1 << 16  # bytes of a body that are sent at once
LINGER_SECONDS = 1.0  # in which a client that is turned away can read why


@dataclass
class Alarm:
    """Calls `ring` so many seconds after it was set, unless it is stopped."""

    loop: asyncio.AbstractEventLoop
    seconds: float
    ring: Callable[[], None]
    _timer: asyncio.TimerHandle | None = None

    def set(self) -> None:
        """From now, where it does not run already."""
        if self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self._rung)

    def stop(self) -> None:
        """It does not ring."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rung(self) -> None:
        self._timer = None
        self.ring()


class Connection(H11Protocol):
    """One connection of uvicorn's. most: that are taken. seconds: for a head, and without progress in sending.

    refused: told the code of what was turned away, to be counted.
    """

    def __init__(self, most: int, seconds: float, refused: Callable[[str], None], **more: Any) -> None:
        super().__init__(**more)
        self.most, self.seconds, self.refused = most, seconds, refused
        self.turned_away, self._unread = False, 0
        self._head = Alarm(self.loop, seconds, self._late)  # runs until a request's head is there
        self._room = Alarm(self.loop, seconds, self._stuck)  # runs while more is sent than is read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, or turn it away where there are enough."""
        super().connection_made(transport)
        if len(self.connections) <= self.most:
            return self._watch()
        self.connections.discard(self)
        said = f"there are {self.most} connections, as many as this server takes (--max-connections): try again later"
        self._turn_away(Refused(said, 503, "too_many_connections", headers={"Retry-After": "1"}))

    def data_received(self, data: bytes) -> None:
        """Read on; of a client that is turned away nothing."""
        if not self.turned_away:
            super().data_received(data)
            self._watch()

    def pause_writing(self) -> None:
        """The client does not read what is sent."""
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._room.set()

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._room.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._head.stop()
        self._room.stop()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server stops: the last answer is the one that goes on."""
        if not self.transport.is_closing():
            super().shutdown()
        self._leave()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._turn_away(Refused("this is no HTTP request", code="invalid_http"))

    def _leave(self) -> None:
        """End a connection that closes: a client that rests does not answer TLS's goodbye, for which asyncio waits 30
        seconds."""
        closing = self.scheme == "https" and self.transport.is_closing()
        if closing and not self.transport.get_write_buffer_size():
            self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _watch(self) -> None:
        """Let the time for a head run while one is waited for."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._head.stop()
        elif not self.transport.is_closing():
            self._head.set()

    def _late(self) -> None:
        if not self.conn.trailing_data[0]:  # nothing was begun: many clients open connections ahead
            return self._gone()
        said = f"the head of the request was not there after {self.seconds:g} seconds"
        self._turn_away(Refused(said, 408, "slow_request"))

    def _stuck(self) -> None:
        before, self._unread = self._unread, self.transport.get_write_buffer_size()
        if self._unread < before:
            return self._room.set()
        self.refused("slow_reader")
        self.transport.abort()

    def _gone(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
            self._leave()

    def _turn_away(self, told: Refused) -> None:
        """Say why and close, but not before the client can have read it."""
        self.turned_away = True
        self._head.stop()
        self.refused(str(told.code))
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer was begun
            return self._gone()
        content = json.dumps(body(str(told), told.type, told.code)).encode()
        headers = {
            "Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close",
            **told.headers,
        }  # fmt: skip
        reason = b"refused"
        for event in (
            h11.Response(status_code=told.status, headers=list(headers.items()), reason=reason),
            h11.Data(data=content),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():  # TLS cannot
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self._gone)


class Pieces:
    """Sends long bodies in pieces. What a client does not read then waits where `Connection` sees it: TLS takes all
    that it is given at once."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def cut(message: Message) -> None:
            body = message.get("body", b"")
            last = max(0, len(body) - 1) // PIECE * PIECE
            for start in range(0, last, PIECE):
                await send({**message, "body": body[start : start + PIECE], "more_body": True})
            await send({**message, "body": body[last:]} if last else message)

        await self.app(scope, receive, cut)


def config_of(app: ASGIApp, state: State) -> uvicorn.Config:
    """What uvicorn is told: connections as above, TLS where there is a certificate, no log and no header of its own."""
    settings = state.settings
    http: Any = partial(Connection, settings.max_connections, settings.request_seconds, state.metrics.refused)
    return uvicorn.Config(
        app,
        http=http,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
    )
