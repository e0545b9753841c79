"""Where the time of one token goes, part by part, in float32, 8 and 4 bits, as JSON: milliseconds a token.

    scripts/bench token_time [--new 128] [--rounds 3] [--threads 2] [--work FOLDER]

SmolLM2 (asset `smollm2`) goes on greedily from 32 tokens, alone and 16 at once. Parts: of the C++ pass, by the clock of
its first thread (the library is built once more with -DTIMED), embedding with norms and rounding; products with
weights; rotary positions and writing the cache; attention; the output layer; waiting for the other threads. Then
choosing the token, and the rest of the engine, which is Python. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _engine import NO_STOP, OURS, Bench

from langmill.infer import engine as engines
from langmill.infer import native, native_build
from langmill.infer.request import Request
from langmill.infer.sampling import Sampling

PARTS = ("norms", "products", "rotary and cache", "attention", "output layer", "waiting")


class Timed:
    """A function and the seconds that went into it."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.seconds = function, 0.0

    def __call__(self, *given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return self.function(*given, **named)
        finally:
            self.seconds += time.perf_counter() - began


def split(bench: Bench, name: str, clients: int, new: int) -> dict[str, float]:
    """Milliseconds a token, by part."""
    engine = bench.engine(name, clients)
    runner: Any = engine.runner
    runner.run, engines.pick = run, picking = Timed(runner.run), Timed(engines.pick)  # type: ignore[attr-defined]
    spent = (ctypes.c_double * len(PARTS))()
    try:
        for number in range(clients):
            engine.submit(Request(bench.ids(32, number), Sampling(max_new_tokens=new), stop_ids=NO_STOP))
        engine.step()  # reads the prompts
        native._bound().model_times(runner._handle, spent)
        before, ran, picked = [*spent], run.seconds, picking.seconds
        tokens, began = 0, time.perf_counter()
        while not engine.idle:
            tokens += sum(len(event.ids) for event in engine.step())
        whole = time.perf_counter() - began
        native._bound().model_times(runner._handle, spent)
    finally:
        engines.pick = picking.function  # type: ignore[attr-defined]
    found = {part: after - first for part, after, first in zip(PARTS, spent, before, strict=True)}
    inside, ran, picked = sum(found.values()), run.seconds - ran, picking.seconds - picked
    found |= {
        "call into the pass": ran - inside,
        "choosing": picked,
        "Python": whole - ran - picked,
        "all": whole,
    }
    return {part: 1000 * seconds / tokens for part, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep the models here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    library = native_build.library("-DTIMED")
    library.model_times.restype, library.model_times.argtypes = None, [ctypes.c_void_p] * 2
    native.library = lambda: library  # type: ignore[assignment, attr-defined]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(given, work)
        found: dict[str, Any] = {"threads": given.threads}
        for name in OURS:
            for clients in (1, 16):
                rounds = [split(bench, name, clients, given.new) for _ in range(given.rounds + 1)][1:]
                medians = {part: round(statistics.median(r[part] for r in rounds), 3) for part in rounds[0]}
                found[f"{name}, {clients} at once"] = medians
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
