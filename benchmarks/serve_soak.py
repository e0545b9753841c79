"""The server under minutes of rude load, and killed under it: one end for each request, no leak, nothing kept is lost.

    scripts/bench serve_soak [--minutes 10] [--clients 32] [--slots 8] [--kills 3] [--model FOLDER]

`langmill serve` with a tiny random chat model (or FOLDER), and clients that chat by all four routes and by the page's,
streamed or not, with forced calls and schemas: three in ten of them leave half way, one in ten sends what is malformed,
some read slowly, some send prompts that are far too long. Ten times the load stops: the server must then hold nothing
(/metrics), and its memory is taken. Then it is killed by SIGKILL under load and started again on its file: every
conversation must hold what was acknowledged. Prints one JSON object. It exits 1 where a request has no end, a 5xx or
another status than it should, a slot is not free, memory grew by 5 % after the second stop, or a message is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

import httpx
from _figures import HUBLESS
from _rude import MALFORMED, NAME, USUAL, WINDOW, Talk, asked, save_tiny, text

ROUNDS, WARM = 10, 2
PATIENCE = 120.0  # seconds after which a request hangs
GROWTH = 0.05
FINE = frozenset({200, 429})
ENDS = (
    "data: [DONE]",
    'data: {"type":"message_stop"',
    '"type":"response.completed"',
    '"type":"response.incomplete"',
)
TURNS = 6  # of a conversation
LARGEST = 50  # times 2,000 words: the longest prompts that are made tokens of


class Leaves(Exception):
    """A client that goes before its request is whole."""


class Server:
    """`langmill serve` in a process of its own, at one port through all its starts."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self.words = [
            sys.executable, "-m", "langmill", "serve", given.model or work / NAME, "--name", NAME,
            "--slots", given.slots, "--context", WINDOW, "--threads", given.threads, "--queue-tokens", 8 * WINDOW,
            "--history", work / "history.sqlite", "--log-format", "json",
        ]  # fmt: skip
        self.port, self.errors = 0, list[str]()
        self.start()

    def start(self) -> None:
        """Start it and wait until it listens."""
        words = [*map(str, self.words), "--port", str(self.port)]
        self.process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=HUBLESS
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if match := re.search(r"answers at http://127.0.0.1:(\d+)/v1", line):
                self.port = int(match[1])
                threading.Thread(target=self.listen, args=(self.process.stderr,), daemon=True).start()
                return
            print(line, end="", file=sys.stderr)
        raise SystemExit("the server ended before it listened")

    def listen(self, lines: IO[str]) -> None:
        """Keep what it complains of."""
        for line in lines:
            if line.startswith("  Ctrl-C"):
                break
        for line in lines:
            if '"level": "info"' not in line:
                self.errors.append(line.strip()[:2000])

    def kill(self) -> None:
        """As a crash ends it."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """As Ctrl-C ends it; its exit status."""
        self.process.terminate()
        return self.process.wait(60)

    def memory(self) -> int:
        """Bytes of main memory that it holds."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """Clients of one server, and what became of what they asked."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.random, self.counts = server, random.Random(seed), Counter[str]()
        self.talks, self.down = list[Talk](), False
        # a connection that has been idle for longer may just be closed by the server
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2)
        small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)]
        base = f"http://127.0.0.1:{server.port}"
        self.http = httpx.AsyncClient(base_url=base, timeout=PATIENCE, limits=limits)
        self.slow = httpx.AsyncClient(
            base_url=base, timeout=PATIENCE, transport=httpx.AsyncHTTPTransport(socket_options=small)
        )

    async def client(self, until: float) -> None:
        """Ask, and ask again."""
        talk = Talk("")
        while time.monotonic() < until and not self.down:
            kind, ended = self.random.random(), ""
            self.counts["asked"] += 1
            try:
                async with asyncio.timeout(PATIENCE):
                    if kind < 0.10:
                        ended = await self.malformed()
                    elif kind < 0.14:
                        ended = await self.huge()
                    elif kind < 0.20:
                        ended = await self.slowly()
                    elif kind < 0.40:
                        if not talk.id or len(talk.sent) >= TURNS:
                            talk = await self.begin()
                        ended = await self.say(talk)
                    else:
                        ended = await self.write()
            except TimeoutError:
                ended = "wrong: hangs"
            except httpx.HTTPError as error:
                ended = "cut by the kill" if self.down else f"wrong: {type(error).__name__} {error}"
            self.counts[ended] += 1
            if ended == "429" or self.random.random() < 0.2:
                await asyncio.sleep(self.random.random() * 0.2)

    async def write(self) -> str:
        """An answer by one of the routes; the client may leave half way."""
        path, body = asked(self.random)
        leaves = self.random.random() < 0.3
        if not leaves or body["stream"]:
            return await self.send(path, json.dumps(body).encode(), leave=self.leave() if leaves else None)
        try:
            async with asyncio.timeout(self.random.random() * 0.3):
                return await self.send(path, json.dumps(body).encode())
        except TimeoutError:
            return "left"

    def leave(self) -> int:
        """After how many lines a client goes."""
        return self.random.choice((0, 1, 2, 5, 20))

    async def send(
        self,
        path: str,
        body: bytes | AsyncIterator[bytes],
        expected: frozenset[int] = FINE,
        leave: int | None = None,
    ) -> str:
        """How it ended. leave: lines of a stream after which the client goes."""
        head = {"Content-Type": "application/json"}
        async with self.http.stream("POST", path, content=body, headers=head) as answer:
            if answer.status_code != 200 or "event-stream" not in answer.headers["content-type"]:
                await answer.aread()
                return judged(answer, expected)
            return await self.followed(answer.aiter_lines(), leave)

    async def followed(self, lines: AsyncIterator[str], leave: int | None, pause: float = 0) -> str:
        """How a stream ended."""
        read, end, ended = 0, "", False
        async for line in lines:
            if read == leave:
                return "left"
            read += 1
            if pause and read % 40 == 0:
                await asyncio.sleep(pause)
            if line.startswith(('data: {"error"', "event: error")):
                return f"wrong: an error within a stream: {line[:200]}"
            for found in re.findall(r'"(?:finish_reason|stop_reason|status)":"([a-z_]+)"', line):
                end = end if found == "in_progress" else found
            ended = ended or any(one in line for one in ENDS)
        return f"streamed, {end}" if ended and end else "wrong: a stream without its end"

    async def malformed(self) -> str:
        """What no server should answer, or the half of what it should."""
        if self.random.random() < 0.2:
            whole = json.dumps(USUAL).encode()

            async def half() -> AsyncIterator[bytes]:
                yield whole[: len(whole) // 2]
                await asyncio.sleep(self.random.random() * 0.1)
                raise Leaves

            try:
                head = {"Content-Type": "application/json", "Content-Length": str(len(whole))}
                await self.http.post("/v1/chat/completions", content=half(), headers=head)
            except Leaves:
                return "left within its body"
        body, status = self.random.choice(MALFORMED)
        return await self.send("/v1/chat/completions", body, frozenset({status}))

    async def huge(self, times: int | None = None) -> str:
        """A prompt beyond the context, or beyond any body."""
        times = times or self.random.choice((1, 10, LARGEST, 1000))
        body = json.dumps(
            {**USUAL, "messages": [{"role": "user", "content": text(self.random, 2000) * times}]}
        ).encode()
        return await self.send("/v1/chat/completions", body, frozenset({413 if len(body) > 8 << 20 else 400}))

    async def slowly(self) -> str:
        """A long stream of large events to a client that hardly reads; it may leave too."""
        leave = self.random.choice((None, None, 60))
        body = {
            **USUAL,
            "max_tokens": 300,
            "stream": True,
            "logprobs": True,
            "top_logprobs": 20,
            "ignore_eos": True,
        }
        async with self.slow.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return judged(answer, FINE)
            return await self.followed(answer.aiter_lines(), leave, pause=0.2)

    async def begin(self) -> Talk:
        """A new conversation."""
        answer = await self.http.post("/api/conversations", json={})
        answer.raise_for_status()
        self.talks.append(Talk(answer.json()["id"]))
        return self.talks[-1]

    async def say(self, talk: Talk) -> str:
        """A message of a conversation; what is acknowledged is noted."""
        leave = self.leave() if self.random.random() < 0.3 else None
        said = f"{len(talk.sent)} {text(self.random, 8)}"
        body = {
            "model": NAME,
            "content": said,
            "parent": talk.last,
            "max_tokens": self.random.choice((5, 40)),
        }
        talk.sent.append(said)
        async with self.http.stream("POST", f"/api/conversations/{talk.id}/messages", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return judged(answer, FINE)
            read = 0
            async for line in answer.aiter_lines():
                if read == leave:
                    return "left"
                read += 1
                event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if "error" in event:
                    return f"wrong: an error within an answer: {line[:200]}"
                for message in (event.get("user"), event.get("done")):
                    if message is not None:
                        talk.acknowledged[message["number"]] = (message["role"], message["content"])
                if "done" in event:
                    talk.last = event["done"]["number"]
                    return "streamed, kept"
        return "wrong: an answer without its end"

    async def load(self, clients: int, seconds: float) -> None:
        """All clients for so long."""
        until = time.monotonic() + seconds
        await asyncio.gather(*(self.client(until) for _ in range(clients)))

    async def held(self) -> dict[str, float]:
        """What the server still holds when nobody asks, after a while of patience."""
        for _ in range(300):
            told = (await self.http.get("/metrics")).text
            found = {
                name: float(value)
                for name, value in re.findall(r"^langmill_engine_(\w+)\{[^}]*\} (\S+)$", told, re.M)
                if name != "events_total" and float(value)
            }
            if not found:
                break
            await asyncio.sleep(0.1)
        return found

    async def counted(self) -> dict[str, int]:
        """What the server says of all that it did."""
        told = (await self.http.get("/metrics")).text
        pattern = r'^langmill_(choices|refused)_total\{.*?(?:finish|reason)="(\w+)"[^}]*\} (\S+)$'
        return {f"{kind} {name}": int(float(value)) for kind, name, value in re.findall(pattern, told, re.M)}

    async def killed(self, clients: int) -> Counter[str]:
        """Kill the server under load, start it again, and compare every conversation with what was acknowledged."""
        running = asyncio.create_task(self.load(clients, 3600))
        await asyncio.sleep(2 + self.random.random() * 4)
        self.down = True
        self.server.kill()
        await running
        await asyncio.to_thread(self.server.start)
        self.down, found = False, Counter[str]()
        for talk in self.talks:
            answer = await self.http.get(f"/api/conversations/{talk.id}")
            kept = answer.json()["messages"] if answer.status_code == 200 else []
            wrong = (
                talk.differs(kept)
                if answer.status_code == 200
                else f"a conversation answers {answer.status_code}"
            )
            found["conversations"] += 1
            found["messages"] += len(talk.acknowledged)
            if wrong is not None:
                found[f"wrong: {wrong}"] += 1
        return found


def judged(answer: httpx.Response, expected: frozenset[int]) -> str:
    """How a request ended that was answered whole, or refused."""
    status, told = answer.status_code, answer.text[:200]
    if status not in expected:
        return f"wrong: {status}, not {' or '.join(map(str, sorted(expected)))}: {told}"
    try:
        found = answer.json()
        if status != 200:
            return str(status) if found["error"]["message"] else "wrong: an error without words"
        if "choices" not in found:
            return f"whole, {found.get('stop_reason') or found['status']}"
        for choice in found["choices"]:
            for call in choice.get("message", {}).get("tool_calls") or ():
                json.loads(call["function"]["arguments"])
        return f"whole, {found['choices'][0]['finish_reason']}"
    except (ValueError, LookupError, TypeError) as error:
        return f"wrong: no answer in its form ({error}): {told}"


async def soak(given: argparse.Namespace, server: Server) -> dict[str, Any]:
    """The rounds of load, then the kills; the result."""
    one, held, memory = Soak(server, given.seed), Counter[str](), list[int]()
    async with one.http, one.slow:
        for _ in range(
            2
        ):  # the most memory that can be asked for at once: what malloc keeps of it is no growth
            one.counts.update(await asyncio.gather(*(one.huge(LARGEST) for _ in range(given.clients))))
        for number in range(ROUNDS):
            await one.load(given.clients, given.minutes * 60 / ROUNDS)
            held.update((await one.held()).keys())
            memory.append(server.memory())
            print(f"round {number + 1}: {memory[-1] >> 20} MB, {one.counts['asked']} asked", file=sys.stderr)
        told, kept = await one.counted(), Counter[str]()
        for _ in range(given.kills):
            kept = await one.killed(given.clients) | kept
        held.update((await one.held()).keys())
    growth = memory[-1] / memory[WARM - 1] - 1
    wrong = {name: count for name, count in (one.counts | kept).items() if name.startswith("wrong")}
    status = server.stop()
    return {
        "benchmark": "serve_soak", "minutes": given.minutes, "kills": given.kills,
        "ok": not wrong and not held and not server.errors and growth < GROWTH and status == 0,
        "clients": dict(sorted(one.counts.items())), "server": told, "wrong": wrong, "not_free": dict(held),
        "kept": dict(kept), "complaints": len(server.errors), "first_complaints": server.errors[:3],
        "exit_status": status, "growth": round(growth, 4),
        "memory_mb": {"warm": memory[WARM - 1] >> 20, "end": memory[-1] >> 20, "most": max(memory) >> 20},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--model", type=Path, help="serve this chat model in place of a tiny one")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if given.model is None:
            save_tiny(Path(work) / NAME)
        server = Server(given, Path(work))
        try:
            found = asyncio.run(soak(given, server))
        finally:
            server.kill()
    print(json.dumps(found, ensure_ascii=False))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
