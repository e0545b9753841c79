"""The server beside llama.cpp's: 16 clients that stream, the same client for both; its own cost; its start. As JSON.

    scripts/bench serve [--only clients overhead start] [--requests 300] [--rounds 3] [--threads 2] [--url URL]
                        [--peers PYTHON] [--work FOLDER]

SmolLM2 (asset `smollm2`) in 4 and 8 bits by `langmill serve`, and as Q4_0 and Q8_0 by the server in the xllamacpp
wheel, 16 slots each, in turns. Prompts are 16 to 256 random ids, 64 tokens are written to each; a client asks anew as
soon as its answer ends. overhead: a token's time through HTTP over that of the engine alone, for one client and for 16.
start: from the command to the first token, over `import torch` with the server's own imports. --url: only drive a
server that is there, with --name its model. PYTHON belongs to an environment with xllamacpp; the first use makes one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from _engine import NO_STOP, ROOT, Bench
from _figures import HUBLESS, spread
from engine import served

from langmill.infer.request import Request
from langmill.infer.sampling import Sampling

PEER = ROOT / "benchmarks" / "peers" / "llama_server.py"
OURS, THEIRS = ("int4", "int8"), ("Q4_0", "Q8_0")
CLIENTS, NEW, CONTEXT = 16, 64, 512
EVENT = b"data: {"
IMPORTS = "import torch, fastapi, uvicorn, prometheus_client, pydantic, tokenizers, jinja2, safetensors"


class Stream(asyncio.Protocol):
    """One streamed answer by a bare HTTP/1.1 client that does as little as can be: seconds to its first event and in
    all, and how many events."""

    def __init__(self, host: str, port: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        self.asked = f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data
        self.first, self.events, self.seen = 0.0, 0, b""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.began = time.perf_counter()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.write(self.asked)

    def data_received(self, data: bytes) -> None:
        text = self.seen + data
        count = text.count(EVENT)
        self.seen = text[max(0, len(text) - len(EVENT) + 1) :]  # an event's beginning may be cut in two
        if count:
            self.first = self.first or time.perf_counter() - self.began
            self.events += count
        elif not self.events:
            self.seen = text

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(None)


def drive(url: str, name: str, prompts: Sequence[Sequence[int]], clients: int) -> dict[str, Any]:
    """All prompts by so many clients."""
    match = re.fullmatch(r"http://([\w.]+):(\d+)", url)
    assert match is not None, url
    host, port = match[1], int(match[2])

    async def client(left: list[Sequence[int]], first: list[float]) -> None:
        while left:
            body = {"model": name, "prompt": left.pop(), "max_tokens": NEW, "temperature": 0, "stream": True}
            body["ignore_eos"] = True
            made = partial(Stream, host, port, body)
            _, answer = await asyncio.get_running_loop().create_connection(made, host, port)
            await answer.ended
            if not answer.events:  # there are fewer than tokens where a character has several
                raise SystemExit(f"nothing came: {answer.seen.decode(errors='replace')}")
            first.append(answer.first)

    async def all_of_them() -> dict[str, Any]:
        left, first, began = list(prompts)[::-1], list[float](), time.perf_counter()
        await asyncio.gather(*(client(left, first) for _ in range(clients)))
        seconds = time.perf_counter() - began
        return {"rate": NEW * len(prompts) / seconds, "late": float(np.percentile(first, 95))}

    return asyncio.run(all_of_them())


@contextmanager
def ours(given: argparse.Namespace, model: Path) -> Iterator[str]:
    """`langmill serve`, as a user starts it; its address."""
    command = [
        sys.executable, "-m", "langmill", "serve", model, "--port", 0, "--slots", CLIENTS, "--context", CONTEXT,
        "--threads", given.threads, "--history", "off",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*map(str, command)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=HUBLESS
    )
    assert process.stderr is not None
    try:
        yield address(process.stderr, r"answers at (http://\S+)/v1")
    finally:
        process.terminate()
        process.wait()


@contextmanager
def theirs(given: argparse.Namespace, file: Path) -> Iterator[str]:
    """llama.cpp's server; its address."""
    if not given.peers.exists():
        subprocess.run([sys.executable, "-m", "venv", given.peers.parent.parent], check=True)
        subprocess.run([given.peers, "-m", "pip", "install", "-q", "xllamacpp"], check=True)
    command = [
        given.peers,
        PEER,
        file,
        "--slots",
        CLIENTS,
        "--context",
        CLIENTS * CONTEXT,
        "--threads",
        given.threads,
    ]
    process = subprocess.Popen(
        [*map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        yield address(process.stdout, r"(http://\S+)")
    finally:
        process.stdin.close()
        process.wait()


def address(lines: IO[str], pattern: str) -> str:
    """What a process says it listens at; the rest of what it says is read and dropped."""
    for line in lines:
        if match := re.search(pattern, line):
            threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
            return match[1].replace("0.0.0.0", "127.0.0.1").rstrip("/")
    raise SystemExit("the server ended before it listened")


def prompts_of(count: int, seed: int = 0) -> list[list[int]]:
    """As `scripts/bench engine` has them: none begins as another."""
    draw = random.Random(seed)
    sizes = [round(16 * 16 ** draw.random()) for _ in range(count)]
    return [[draw.randrange(1000, 40000) for _ in range(size)] for size in sizes]


def clients(given: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Total tokens a second and the 95th percentile of the time to the first token, by server."""
    prompts = prompts_of(given.requests)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*OURS, *THEIRS)}
    for _ in range(given.rounds):
        for name in found:
            start = (
                ours(given, bench.work / name) if name in OURS else theirs(given, bench.work / f"{name}.gguf")
            )
            with start as url:
                drive(url, name, prompts[:CLIENTS], CLIENTS)  # warm
                found[name].append(drive(url, name, prompts, CLIENTS))
            print(name, {key: round(value, 3) for key, value in found[name][-1].items()}, file=sys.stderr)
    rates = {name: [one["rate"] for one in values] for name, values in found.items()}
    late = {name: [one["late"] for one in values] for name, values in found.items()}
    best = max(THEIRS, key=lambda name: statistics.median(rates[name]))
    return {
        "requests": len(prompts),
        "tokens_per_second": {name: spread(values, 1) for name, values in rates.items()},
        "p95_first_token_seconds": {name: spread(values, 3) for name, values in late.items()},
        "best_peer": best,
        "rate_over_best_peer": {name: ratio(rates[name], rates[best]) for name in OURS},
        "p95_over_best_peer": {name: ratio(late[name], late[best]) for name in OURS},
    }


def overhead(given: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """A token's time through the server over the engine's own, with the same prompts in turns."""
    over: dict[str, list[float]] = {}
    for name in OURS:
        engine = bench.engine(name, CLIENTS)
        with ours(given, bench.work / name) as url:
            for many, count in ((1, 12), (CLIENTS, min(given.requests, 96))):
                alone = partial(served, engine, new=NEW) if many > 1 else partial(one_by_one, engine)
                for number in range(given.rounds + 1):  # the first warms both up
                    prompts = prompts_of(count, number)  # none that the prefix cache knows
                    rate = NEW * count / alone(prompts)["seconds"]
                    through = drive(url, name, prompts, many)["rate"]
                    print(name, many, round(rate, 1), round(through, 1), file=sys.stderr)
                    if number:
                        over.setdefault(f"{name}, {many}", []).append(rate / through - 1)
    return {"time_over_engine": {name: spread(values, 3) for name, values in over.items()}}


def one_by_one(engine: Any, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The engine alone, one request after the other."""
    began = time.perf_counter()
    for prompt in prompts:
        engine.submit(Request(prompt, Sampling(max_new_tokens=NEW), stop_ids=NO_STOP))
        while not engine.idle:
            engine.step()
    return {"seconds": time.perf_counter() - began}


def start(given: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Seconds from the command to the first token, and of the imports."""
    found: dict[str, list[float]] = {name: [] for name in (*OURS, "import torch", "imports")}
    for _ in range(given.rounds):
        for name in OURS:
            began = time.perf_counter()
            with ours(given, bench.work / name) as url:
                drive(url, name, prompts_of(1), 1)
                found[name].append(time.perf_counter() - began)
        for name, code in (("import torch", "import torch"), ("imports", IMPORTS)):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            found[name].append(time.perf_counter() - began)
    over = {name: ratio(found[name], found["imports"]) for name in OURS}
    return {"seconds": {name: spread(values, 2) for name, values in found.items()}, "over_imports": over}


def ratio(mine: list[float], other: list[float]) -> dict[str, float]:
    """Round by round."""
    return spread([a / b for a, b in zip(mine, other, strict=True)], 3)


PARTS: dict[str, Callable[[argparse.Namespace, Bench], dict[str, Any]]] = {
    "clients": clients, "overhead": overhead, "start": start,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--url")
    parser.add_argument("--name", default="default")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers-server" / "bin" / "python")
    parser.add_argument("--work", type=Path, help="keep the models and files here")
    given = parser.parse_args()
    if given.url:
        print(json.dumps(drive(given.url.rstrip("/"), given.name, prompts_of(given.requests), CLIENTS)))
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        bench = Bench(given, given.work or Path(temporary))
        print(json.dumps({name: PARTS[name](given, bench) for name in given.only}))


if __name__ == "__main__":
    main()
