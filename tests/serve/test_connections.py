"""Connections: how many, and that slow ones are ended; raw sockets, as a rude client uses them."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from langmill.serve.connections import PIECE, Connection, Pieces

SLOW = 0.3  # seconds for a head, a body, and without anything read


@pytest.fixture
def running(serving: Callable[..., Any], long_folder: str) -> Any:
    return serving(long_folder, max_connections=3, request_seconds=SLOW)


def opened(running: Any, *said: bytes) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    for part in said:
        connection.sendall(part)
    return connection


def rest(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """What comes until the server closes: status and error; status 0 where nothing does."""
    with connection:
        said = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    if not said:
        return 0, {}
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def refused(running: Any, code: str) -> bool:
    return f'langmill_refused_total{{reason="{code}"}} 1.0' in httpx.get(f"{running.url}/metrics").text


def test_more_connections_than_allowed_are_told_so_and_the_others_go_on(running: Any) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    taken = [opened(running, head) for _ in range(3)]
    running.until(lambda: len(running.server.server_state.connections) == 3)
    status, error = rest(opened(running, head + b"\r\n"))
    assert (status, error["code"]) == (503, "too_many_connections") and "--max-connections" in error[
        "message"
    ]
    for connection in taken:
        connection.sendall(b"Connection: close\r\n\r\n")
        assert b"HTTP/1.1 200" in connection.recv(1 << 16)
        connection.close()
    running.until(lambda: not running.server.server_state.connections)
    assert refused(running, "too_many_connections")


@pytest.mark.parametrize(
    "said, status, code",
    [
        (b"", 0, None),  # nothing begun: closed without a word
        (b"GET / HT", 408, "slow_request"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", 408, "slow_request"),
        (b"\x16\x03\x01 no HTTP \r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 17), 400, "invalid_http"),
    ],
)
def test_what_is_no_request_does_not_stay(running: Any, said: bytes, status: int, code: str | None) -> None:
    told, error = rest(opened(running, said))
    assert (told, error.get("code")) == (status, code)
    running.until(lambda: not running.server.server_state.connections)
    assert code is None or refused(running, code)


def test_a_slow_body_is_not_waited_for(running: Any) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    status, error = rest(opened(running, head, b"Content-Length: 99\r\nConnection: close\r\n\r\n{"))
    assert status == 408 and "the body was not there" in error["message"]


def test_a_client_that_reads_nothing_of_its_answer_is_ended(running: Any) -> None:
    ids = running.state.models.all[0].tokenizer.special_ids
    connection = running.ask("/detokenize", {"tokens": [max(ids)] * 400_000})
    running.until(lambda: refused(running, "slow_reader"))
    connection.close()


def test_a_client_that_reads_slowly_is_waited_for(running: Any) -> None:
    rings: list[Callable[[], None]] = []
    loop = SimpleNamespace(call_later=lambda seconds, ring: rings.append(ring))
    server = {"config": running.server.config, "server_state": ServerState(), "app_state": {}}
    left, said = [90, 50, 20, 20], list[str]()
    made: Any = Connection(9, SLOW, said.append, **server, _loop=loop)
    made.transport = SimpleNamespace(
        get_write_buffer_size=lambda: left.pop(0), abort=lambda: said.append("abort")
    )
    made.flow = FlowControl(made.transport)
    made.pause_writing()
    for ring in rings:  # each sets the next one
        ring()
    assert len(rings) == 3 and said == ["slow_reader", "abort"]


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 3 * PIECE + 5])
@pytest.mark.parametrize("more", [False, True])
def test_a_long_body_goes_out_in_pieces(size: int, more: bool) -> None:
    body, sent = random.Random(0).randbytes(size), list[dict[str, Any]]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Pieces(app, None)({}, None, send))  # type: ignore[arg-type]
    head, *parts = sent
    assert head["status"] == 200 and b"".join(part["body"] for part in parts) == body
    assert all(len(part["body"]) <= PIECE and part["more_body"] for part in parts[:-1])
    assert parts[-1]["more_body"] == more and len(parts) == max(1, -(-size // PIECE))
