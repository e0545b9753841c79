"""The engine under random load for minutes: no leak, no hang, one end for each request, the right tokens.

    scripts/bench engine_soak [--minutes 10] [--slots 8] [--threads 1]

Clients come and go at random over a service with a tiny random model: chats that grow and share a system prompt, texts
to make vectors of, stop texts, priorities, requests that are too long, streams that are left half way, and a loop that
is closed over its streams. Of the greedy answers one in ten is written again by `generate_ids` alone and compared.
Prints one JSON object: what was asked and how it ended, the memory after a warm-up of a fifth of the time and at the
end. It exits 1 where a request hangs, has no end or two, differs from itself alone, or memory grew by more than 32 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from langmill.common.errors import LangmillError
from langmill.infer.engine import Engine
from langmill.infer.generate import generate_ids
from langmill.infer.request import Request
from langmill.infer.runner import TorchEmbedder, TorchRunner
from langmill.infer.sampling import Sampling
from langmill.infer.service import Service
from langmill.model.config import Head, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

LENGTH, CLIENTS, PATIENCE = 256, 24, 120.0  # PATIENCE: seconds without any event after which a request hangs
GROWTH = 32 << 20


def memory() -> int:
    """Bytes of main memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


class Soak:
    """Clients of one service, and what became of what they asked."""

    def __init__(self, slots: int, seed: int):
        self.tokenizer = Tokenizer.train(["Clients come and go at random, 来来去去."] * 3, vocab_size=300)
        stack = StackConfig(dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=96)
        self.model = Transformer(ModelConfig(stack, Tokens(300, LENGTH), head=Head(300)))
        init_(self.model, 0)
        with torch.no_grad():  # a wide spread, so that no two scores are nearly equal
            for parameter in self.model.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)
        self.model.eval()
        self.random, self.counts = random.Random(seed), Counter[str]()
        self.system = self.random.choices(range(5, 295), k=40)
        self.service = Service(
            Engine(
                TorchRunner(self.model, slots, LENGTH),
                self.tokenizer,
                embedder=TorchEmbedder(self.model),
                pass_tokens=64,
                queue_tokens=4 * LENGTH,
            )
        )

    def request(self, past: list[int]) -> Request:
        """One at random; past: the ids of a chat so far."""
        draw = self.random
        size = LENGTH + 1 if draw.random() < 0.01 else draw.choice((1, 3, 10, 60))
        ids = [*past, *draw.choices(range(5, 295), k=size)]
        if draw.random() < 0.1:
            return Request(ids, kind="embed")
        way = Sampling(
            max_new_tokens=draw.choice((1, 5, 20, 80)),
            temperature=draw.choice((0.0, 0.0, 1.0)),
            top_p=draw.choice((1.0, 0.9)),
            repetition_penalty=draw.choice((1.0, 1.0, 1.2)),
            seed=draw.randrange(9),
            stop=draw.choice(((), ("an", "来"))),
        )
        logprobs = 3 if draw.random() < 0.1 else None
        return Request(ids, way, priority=draw.choice((0, 0, 0, 1)), logprobs=logprobs)

    async def ask(self, one: Request) -> list[int]:
        """Its tokens; how it ended is counted."""
        self.counts["asked"] += 1
        leaves = self.random.randrange(1, 9) if self.random.random() < 0.15 else None
        ids: list[int] = []
        ends, events = [], self.service.generate(one)
        try:
            while not ends and leaves != 0:
                event = await asyncio.wait_for(anext(events), PATIENCE)
                ids += event.ids
                ends += [event.finish] if event.finish else []
                leaves = None if leaves is None else leaves - 1
            if ends and await anext(events, None) is not None:
                self.counts["wrong: told of after its end"] += 1
        except LangmillError as error:
            ends = [type(error).__name__]
        except (TimeoutError, StopAsyncIteration) as error:
            ends = [f"wrong: {type(error).__name__}"]
        finally:
            await events.aclose()
        self.counts[ends[0] if ends else "left"] += 1
        if (
            ends
            and ends[0] in ("stop", "length")
            and not one.sampling.temperature
            and self.random.random() < 0.1
        ):
            self.compare(one, ids)
        return ids

    def compare(self, one: Request, ids: list[int]) -> None:
        """With what is written alone; a stop text may have ended it before that."""
        if one.kind == "write":
            steps = generate_ids(self.model, [one.prompt], one.sampling, self.tokenizer.stop_ids)
            alone = [token.id for step in steps for token in step]
            same = ids == alone[: len(ids)] and (one.sampling.stop or len(ids) == len(alone))
            self.counts["compared" if same else "wrong: differs from itself alone"] += 1

    async def client(self, until: float) -> None:
        past: list[int] = []
        while time.monotonic() < until:
            if len(past) > LENGTH - 80 or self.random.random() < 0.2:
                past = list(self.system) if self.random.random() < 0.7 else []
            one = self.request(past)
            ids = await self.ask(one)
            if one.kind == "write" and len(one.prompt) < LENGTH:
                past = [*one.prompt, *ids]
            if self.random.random() < 0.3:
                await asyncio.sleep(self.random.random() * 0.05)

    async def abandon(self) -> None:
        """Leave streams without a word: the loop that runs this is closed over them."""
        for _ in range(3):
            await anext(self.service.generate(Request([9, 9], Sampling(max_new_tokens=80))))

    async def load(self, until: float) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self.client(until))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began, soak = time.monotonic(), Soak(options.slots, options.seed)
    rounds, held = 20, []
    for number in range(1, rounds + 1):  # each in a loop of its own
        asyncio.run(soak.load(began + number * options.minutes * 60 / rounds))
        asyncio.run(soak.abandon())
        held.append(memory())
    asyncio.run(soak.service.close())
    left = {name: count for name, count in soak.service.accounting().items() if count}
    warm = held[rounds // 5 - 1]
    wrong = {name: count for name, count in soak.counts.items() if name.startswith("wrong")}
    fine = not left and not wrong and held[-1] - warm <= GROWTH
    print(json.dumps({
        "benchmark": "engine_soak", "minutes": options.minutes, "ok": fine,
        "clients": dict(sorted(soak.counts.items())),
        "engine": dict(sorted(soak.service.counts().items())), "left": left, "wrong": wrong,
        "memory_mb": {"warm": warm >> 20, "end": held[-1] >> 20, "most": max(held) >> 20},
        "torch": torch.__version__,
    }))  # fmt: skip
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
