"""The engine beside llama.cpp built for this CPU, and transformers: SmolLM2, all in turns within one run, as JSON.

    scripts/bench engine [--only stream prefill clients turn lookup structured load] [--rounds 5] [--threads 2]
                         [--peers PYTHON] [--work FOLDER] [--out RESULTS.json]

SmolLM2-135M (asset `smollm2`) is compressed to 8 and 4 bits and exported to GGUF, all from the same weights.

- stream: 128 greedy tokens behind 32: tokens a second but for the first; of ours the share of the memory's speed too;
- prefill: tokens a second until the first token behind 512;
- clients: 16 clients, 300 requests of 16 to 256 tokens, 64 new tokens each: new tokens a second, and the 95th
  percentile of the seconds to a client's first token;
- turn: seconds to the first token of a chat's second turn, over those of computing it afresh;
- lookup: prompt lookup on editing prompts, over greedy, with the same tokens;
- structured: JSON by a schema, over free text of as many tokens;
- load: seconds from the command to the first token, over those of `import torch`.

Only ratios within a run mean anything on a shared machine. PYTHON belongs to an environment with llama-cpp-python built
from its source distribution; the first use makes one in .venv-peers-native (about 5 minutes).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets
from _engine import FILES, LENGTH, NO_STOP, OURS, ROOT, TEXT, Bench, peer, ratio, theirs, written
from _figures import spread

from langmill.infer.constrain import Grammars
from langmill.infer.engine import Engine
from langmill.infer.request import Request
from langmill.infer.sampling import Sampling
from langmill.infer.speculative import PromptLookup
from langmill.text.chat import chat_ids

PARTS = ("stream", "prefill", "clients", "turn", "lookup", "structured", "load")
NEW, CLIENTS, REQUESTS = 128, 16, 300


def told(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Rates, and each of ours over the peer that it is measured by."""
    best = {
        "int4": max(("Q4_0", "Q4_1"), key=lambda name: statistics.median(rates[name])),
        "int8": "Q8_0",
        "float32": "transformers",
    }
    ratios = {f"{name} over {other}": ratio(rates[name], rates[other]) for name, other in best.items()}
    return {"tokens_per_second": {n: spread(v, 1) for n, v in rates.items()}, "ratios": ratios}


def memory_speed(threads: int) -> float:
    """Bytes a second that the threads read at most."""
    torch.set_num_threads(threads)
    block, best = torch.ones(1 << 28), 0.0
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        best = max(best, block.nbytes / (time.perf_counter() - began))
    return best


def token_bytes(bench: Bench, name: str) -> int:
    """Bytes of weights that one token reads: all of them, the embedding being the output layer too."""
    parts = dict(bench.models[name].named_buffers()) | dict(bench.models[name].named_parameters())
    return sum(part.nbytes for part in {part.data_ptr(): part for part in parts.values()}.values())


def single(bench: Bench, size: int, new: int, rate: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """One stream: all of ours and theirs, in turns."""
    engines = {name: bench.engine(name, worth=LENGTH) for name in OURS}
    other = theirs(bench.given.threads, bench.work, bench)
    rates: dict[str, list[float]] = {name: [] for name in (*OURS, *FILES, "transformers")}
    for number in range(bench.given.rounds + 1):  # the first warms up
        ids = bench.ids(size, number)
        for name, values in rates.items():
            if name in engines:
                engines[name].slots.forget()
                found = written(engines[name], ids, new)
            elif name in FILES:
                found = bench.ask(file=bench.work / f"{name}.gguf", do="write", prompt=ids, new=new)
            else:
                found = other(ids, new)
            if number:
                values.append(rate(found))
        print({name: round(values[-1], 1) for name, values in rates.items() if values}, file=sys.stderr)
    return told(rates)


def stream(bench: Bench) -> dict[str, Any]:
    found = single(bench, 32, NEW, lambda run: (len(run["ids"]) - 1) / run["seconds"])
    speed = memory_speed(bench.given.threads)
    shares = {
        name: round(found["tokens_per_second"][name]["median"] * token_bytes(bench, name) / speed, 2)
        for name in OURS
    }
    return {**found, "memory_gb_per_second": round(speed / 1e9, 1), "share_of_memory_speed": shares}


def prefill(bench: Bench) -> dict[str, Any]:
    found = single(bench, 512, 1, lambda run: 512 / run["first"])
    rates = found["tokens_per_second"]
    best = max((*FILES, "transformers"), key=lambda name: rates[name]["median"])
    return {**found, "best_peer": best, "over_best_peer": {
        name: round(rates[name]["median"] / rates[best]["median"], 3) for name in OURS}}  # fmt: skip


def clients(bench: Bench) -> dict[str, Any]:
    """A closed loop: each client asks anew as soon as its answer ends."""
    draw = random.Random(0)
    count = REQUESTS if bench.given.requests is None else bench.given.requests
    sizes = [round(16 * 16 ** draw.random()) for _ in range(count)]
    prompts = [[draw.randrange(1000, 40000) for _ in range(size)] for size in sizes]  # none begins as another
    rates: dict[str, list[float]] = {name: [] for name in ("int4", "int8", "Q4_0", "Q8_0")}
    late: dict[str, list[float]] = {name: [] for name in rates}
    for _ in range(bench.given.rounds if bench.given.rounds < 3 else 3):
        for name in rates:
            if name in OURS:
                found = served(bench.engine(name, CLIENTS), prompts, 64)
            else:
                file = bench.work / f"{name}.gguf"
                found = bench.ask(file=file, do="serve", prompts=prompts, new=64, slots=CLIENTS)
            rates[name].append(64 * count / found["seconds"])
            late[name].append(float(np.percentile(found["first"], 95)))
            print(name, round(rates[name][-1], 1), round(late[name][-1], 3), file=sys.stderr)
    best = max(FILES[0], FILES[2], key=lambda name: statistics.median(rates[name]))
    return {
        "tokens_per_second": {name: spread(values, 1) for name, values in rates.items()},
        "p95_first_token_seconds": {name: spread(values, 3) for name, values in late.items()},
        "best_peer": best,
        "rate_over_best_peer": {name: ratio(rates[name], rates[best]) for name in ("int4", "int8")},
        "p95_over_best_peer": {name: ratio(late[name], late[best]) for name in ("int4", "int8")},
    }


def served(engine: Engine, prompts: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
    """All prompts by 16 clients."""
    left, began = list(prompts)[::-1], time.perf_counter()
    since, first = dict[int, float](), list[float]()

    def ask() -> None:
        if left:
            now = time.perf_counter()
            since[engine.submit(Request(left.pop(), Sampling(max_new_tokens=new), stop_ids=NO_STOP))] = now

    for _ in range(CLIENTS):
        ask()
    while not engine.idle:
        for event in engine.step():
            if event.request in since:
                first.append(time.perf_counter() - since.pop(event.request))
            if event.finish is not None:
                if event.reason:
                    raise SystemExit(event.reason)
                ask()
    return {"seconds": time.perf_counter() - began, "first": first}


def turn(bench: Bench) -> dict[str, Any]:
    """A first turn of 400 tokens and 64 of an answer, a second one of 24."""
    kept, fresh = list[float](), list[float]()
    for number in range(bench.given.rounds):
        engine = bench.engine("int4", 4)
        begun = bench.ids(400, number)
        answer = written(engine, begun, 64)["ids"]
        second = [*begun, *answer, *bench.ids(24, 500 + number)]
        kept.append(written(engine, second, 1)["first"])
        engine.slots.forget()
        fresh.append(written(engine, second, 1)["first"])
    return {
        "seconds": {"kept": spread(kept, 4), "fresh": spread(fresh, 4)},
        "kept over fresh": ratio(kept, fresh),
    }


def lookup(bench: Bench) -> dict[str, Any]:
    """The answer repeats the text with a word changed, as far as the model does what it is told."""
    changes = (("mill", "forge"), ("river", "road"), ("oak", "stone"), ("school", "church"))
    found: dict[str, Any] = {}
    for name in ("int4", "int8"):
        rates: dict[str, list[float]] = {"plain": [], "lookup": []}
        counts = Counter[str]()
        for old, new in changes[: bench.given.rounds]:
            asked = f"Write this text again, with the word {old} replaced by {new}.\n\n{TEXT}"
            ids = chat_ids(bench.tokenizer, [{"role": "user", "content": asked}], add_generation_prompt=True)
            answers = []
            for way, values in rates.items():
                more = {"propose": PromptLookup()} if way == "lookup" else {}
                engine = bench.engine(name, **more)
                written(engine, ids[:8], 2)
                run = written(engine, ids, NEW)
                values.append((len(run["ids"]) - 1) / run["seconds"])
                answers.append(run["ids"])
                counts.update({k: v for k, v in engine.counts.items() if k.startswith("guessed")})
            if answers[0] != answers[1]:
                raise SystemExit(f"{name}: prompt lookup wrote other tokens")
        found[name] = {
            "tokens_per_second": {way: spread(values, 1) for way, values in rates.items()},
            "lookup over plain": ratio(rates["lookup"], rates["plain"]),
            "guesses": dict(counts),
        }
    return found


def structured(bench: Bench) -> dict[str, Any]:
    """An object of text, numbers and a list, against free text of as many tokens."""
    text = {"type": "string", "maxLength": 60}
    fields = {
        "name": text,
        "place": text,
        "year": {"type": "integer"},
        "parts": {"type": "array", "items": text, "minItems": 3},
    }
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    grammars = Grammars(bench.tokenizer, bench.models["int4"].config.vocab)
    found: dict[str, Any] = {}
    for name in ("int4", "int8"):
        free, held = list[float](), list[float]()
        for number in range(bench.given.rounds + 1):  # the first warms up
            ids = bench.ids(120, number)
            engine = bench.engine(name)
            run = written(engine, ids, NEW, constraint=grammars.json_schema(schema))
            plain = written(bench.engine(name), ids, len(run["ids"]))
            if number:
                held.append((len(run["ids"]) - 1) / run["seconds"])
                free.append((len(plain["ids"]) - 1) / plain["seconds"])
        found[name] = {
            "tokens_per_second": {"free": spread(free, 1), "json": spread(held, 1)},
            "json over free": ratio(held, free),
        }
    return found


def load_time(bench: Bench) -> dict[str, Any]:
    """Each in a process of its own, whose files the system has read before."""
    source = next(assets.fetch("smollm2").rglob("*.gguf"))
    ask = [sys.executable, "-m", "langmill", "generate"]
    jobs: dict[str, list[Any]] = {"import torch": [sys.executable, "-c", "import torch; print(1)"]}
    for name, model in (("int4", bench.work / "int4"), ("int8", bench.work / "int8"), ("gguf", source)):
        jobs[name] = [*ask, model, "Once upon a time", "--max-new-tokens", "4"]
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(bench.given.rounds + 1):
        for name, words in jobs.items():
            began = time.perf_counter()
            process = subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert process.stdout is not None
            process.stdout.read(1)
            if number:
                seconds[name].append(time.perf_counter() - began)
            process.communicate()
    torch_first = seconds["import torch"]
    return {
        "seconds": {name: spread(values, 2) for name, values in seconds.items()},
        "over import torch": {
            n: ratio(values, torch_first) for n, values in seconds.items() if n != "import torch"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, help="clients: so many, to see that this file works")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers-native" / "bin" / "python")
    parser.add_argument("--work", type=Path, help="keep the models here")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, peer(given) as ask:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(given, work)
        bench.ask = ask
        found: dict[str, Any] = {"threads": given.threads, "rounds": given.rounds}
        for name in given.only:
            found[name] = RUN[name](bench)
            print(name, json.dumps(found[name]), file=sys.stderr)
            if given.out:
                given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))


RUN: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "stream": stream, "prefill": prefill, "clients": clients, "turn": turn, "lookup": lookup, "structured": structured,
    "load": load_time,
}  # fmt: skip


if __name__ == "__main__":
    main()
