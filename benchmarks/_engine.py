"""The models and files of the benches of the engine, and the processes of its peers."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets
from _figures import HUBLESS, spread

from langmill.common.configure import configure
from langmill.common.settings import CompressSettings, ExportSettings
from langmill.families.folder import load, save
from langmill.infer.engine import Engine
from langmill.infer.native import NativeRunner
from langmill.infer.request import Request
from langmill.infer.sampling import Sampling
from langmill.jobs import compress, export

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / "benchmarks" / "peers" / "llama_engine.py"
FILES = ("Q4_0", "Q4_1", "Q8_0")
OURS = {"int4": "Q4_0", "int8": "Q8_0", "float32": None}
LENGTH = 1024
TEXT = (
    "The mill stands where the river turns, and has ground the village's corn for four hundred years. Its wheel was of "
    "oak until a flood took it in the spring of 1882; the iron one that followed still runs. In dry summers the miller "
    "opened the upper pond at dawn and closed it at dusk, and wrote both hours in a book that is kept in the school. "
)
NO_STOP: frozenset[int] = frozenset()


class Bench:
    """The models and files, and the peer's process."""

    def __init__(self, given: argparse.Namespace, work: Path):
        self.given, self.work = given, work
        source = next(assets.fetch("smollm2").rglob("*.gguf"))
        for bits in (4, 8):
            if not (work / f"int{bits}").exists():
                words = [f"bits={bits}", "method=nearest", "portable=false"]
                compress.run(
                    configure(CompressSettings, None, words, model=str(source), out=work / f"int{bits}"),
                    quiet=True,
                )
        for kind in FILES:
            if not (work / f"{kind}.gguf").exists():
                export.run(
                    ExportSettings(model=str(source), out=work / f"{kind}.gguf", type=kind), quiet=True
                )
        self.models: dict[str, Any] = {
            name: load(source if name == "float32" else work / name)[0].eval() for name in OURS
        }
        self.tokenizer: Any = load(source)[1]
        self.ask: Callable[..., dict[str, Any]] = _no_peer

    def engine(self, name: str, slots: int = 1, **more: Any) -> Engine:
        """An empty engine over one of our models."""
        runner = NativeRunner(self.models[name], slots, LENGTH, threads=self.given.threads)
        return Engine(runner, self.tokenizer, **more)

    def ids(self, count: int, shift: int = 0) -> list[int]:
        """A prompt of so many tokens."""
        all_ids = self.tokenizer.encode(TEXT * (2 + (count + shift) // 64))
        return all_ids[shift : shift + count]


def _no_peer(**_: Any) -> dict[str, Any]:
    raise SystemExit("the peer is not started")


@contextmanager
def peer(given: argparse.Namespace) -> Iterator[Callable[..., dict[str, Any]]]:
    """What asks llama.cpp's process."""
    if not given.peers.exists():
        print("building llama.cpp into an environment of its own", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", given.peers.parent.parent], check=True)
        native = {**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"}
        words = ["install", "-q", "--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36", "numpy"]
        subprocess.run([given.peers, "-m", "pip", *words], check=True, env=native)
    process = subprocess.Popen(
        [*map(str, (given.peers, PEER, "--threads", given.threads))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=HUBLESS,
    )  # fmt: skip
    asked, told = process.stdin, process.stdout
    assert asked is not None and told is not None

    def ask(**job: Any) -> dict[str, Any]:
        print(json.dumps(job, default=str), file=asked, flush=True)
        found: dict[str, Any] = json.loads(told.readline() or "{}")
        if not found:
            raise SystemExit("llama.cpp ended before it answered: its message stands above")
        return found

    try:
        yield ask
    finally:
        asked.close()
        process.wait()


def written(engine: Engine, ids: Sequence[int], new: int, **more: Any) -> dict[str, Any]:
    """One request's tokens, the seconds to its first one, and those of the others."""
    began = time.perf_counter()
    engine.submit(Request(ids, Sampling(max_new_tokens=new), stop_ids=NO_STOP, **more))
    found, first = list[int](), 0.0
    while not engine.idle:
        for event in engine.step():
            if event.reason:
                raise SystemExit(event.reason)
            first = first or time.perf_counter() - began
            found += event.ids
    return {"ids": found, "first": first, "seconds": time.perf_counter() - began - first}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """The spread of the ratios, round by round."""
    return spread([a / b for a, b in zip(over, under, strict=True)], 3)


def theirs(threads: int, folder: Path, bench: Bench) -> Callable[[Sequence[int], int], dict[str, Any]]:
    """Greedy tokens of transformers, in float32."""
    import transformers

    if not (folder / "hf").exists():
        save(bench.models["float32"], bench.tokenizer, folder / "hf")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()

    @torch.inference_mode()
    def run(ids: Sequence[int], new: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        began = time.perf_counter()
        out = model(torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1)
        found = [int(out.logits[0, -1].argmax())]
        first = time.perf_counter() - began
        while len(found) < new:
            out = model(torch.tensor([found[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            found.append(int(out.logits[0, -1].argmax()))
        return {"ids": found, "first": first, "seconds": time.perf_counter() - began - first}

    return run
