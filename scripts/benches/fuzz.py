"""Mutate GGUF files, safetensors folders and chat templates: each must load, or fail with a clear error, in bounds.

    scripts/bench fuzz [--minutes 10] [--only gguf|safetensors|template] [--seed 0]

A case that raises anything but an error of Langmill's own, takes longer than ten seconds, or wants more than 8 GB, is
kept under fuzz-found/ and printed; exit code 1. Unix only. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from langmill.common.errors import LangmillError
from langmill.common.settings import ModelSettings
from langmill.families.folder import load, save
from langmill.families.gguf import load_gguf
from langmill.jobs.pretrain import fresh
from langmill.jobs.size import config_for
from langmill.text.chat import render
from langmill.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent
SECONDS, BYTES = 10, 8 << 30
NUMBERS = (0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
WORDS = ("{% for m in messages %}", "{% endfor %}", "{{ messages }}", "{{ 'a' * 10**9 }}", "{% set ns.x = ns %}",
         "| join", "{{ messages.__class__ }}", "range(10**9)", "{% if", "%}", "}}", "{{", "namespace()", "| tojson",
         "[::-1]", "* 99999", "loop.index0", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")  # fmt: skip
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "a"},
]
Case = tuple[bytes, Callable[[], object]]


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Bytes flipped, numbers replaced, stretches cut, doubled or moved."""
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        at = min(len(found) - 1, int(len(found) * dice.random() ** 2))  # headers lie at the front
        match dice.randrange(6):
            case 0:
                found[at] ^= 1 << dice.randrange(8)
            case 1:
                found[at : at + 8] = dice.choice(NUMBERS).to_bytes(8, "little")
            case 2:
                found[at : at + 4] = (dice.choice(NUMBERS) & 0xFFFFFFFF).to_bytes(4, "little")
            case 3:
                del found[at : at + dice.choice((1, 7, 300, 10**9))]
            case 4:
                found[at:at] = found[at : at + dice.randrange(1, 64)]
            case _:
                other = dice.randrange(len(found))
                found[at : at + 16] = found[other : other + 16]
        found = found or bytearray(b"\0")
    return bytes(found)


def gguf(scratch: Path) -> Callable[[random.Random], Case]:
    """A tiny llama as the tests write it."""
    sys.path.insert(0, str(ROOT / "tests" / "families"))
    import gguf as package
    import test_gguf as written

    path = scratch / "whole.gguf"
    kind = package.GGMLQuantizationType.Q8_0
    written.write(path, "llama", written.reference({**written.SMALL, "model_type": "llama"}), kind)
    whole, file = path.read_bytes(), scratch / "case.gguf"

    def case(dice: random.Random) -> Case:
        data = mutated(whole, dice)
        file.write_bytes(data)
        return data, lambda: load_gguf(file)

    return case


def safetensors(scratch: Path) -> Callable[[random.Random], Case]:
    """A tiny model folder of ours, one of whose files is changed."""
    tokenizer = Tokenizer.train(["the history of water is known 你好"] * 9, 300)
    folder = scratch / "model"
    save(fresh(config_for(ModelSettings(size="100k"), tokenizer.vocab_size, 64), 0), tokenizer, folder)
    names = (
        "model.safetensors",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    whole = {name: (folder / name).read_bytes() for name in names}

    def case(dice: random.Random) -> Case:
        for name, data in whole.items():
            (folder / name).write_bytes(data)
        name = dice.choice(names)
        data = mutated(whole[name], dice)
        (folder / name).write_bytes(data)
        return name.encode() + b"\n" + data, lambda: load(folder)

    return case


def template(scratch: Path) -> Callable[[random.Random], Case]:
    """The templates that TRL ships, with pieces of Jinja thrown in, cut out and moved."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from assets import fetch

    known = [file.read_text(encoding="utf-8") for file in sorted(fetch("trl-templates").glob("*.jinja"))]

    def case(dice: random.Random) -> Case:
        text = dice.choice(known)
        for _ in range(dice.randrange(1, 6)):
            at, end = sorted((dice.randrange(len(text) + 1), dice.randrange(len(text) + 1)))
            put = dice.choice((dice.choice(WORDS), "", text[at:end], dice.choice(known)[:200]))
            text = text[:at] + put + text[at if dice.random() < 0.7 else end :]
        return text.encode("utf-8"), lambda: render(text, CHAT, add_generation_prompt=True)

    return case


def too_long(*arguments: Any) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def run(make: Callable[[random.Random], Case], minutes: float, seed: int, keep: Path) -> dict[str, Any]:
    """Cases until the time is over: how many loaded, how many were refused, and what else happened."""
    dice, counts, found = random.Random(seed), Counter[str](), []
    ends, slowest = time.monotonic() + 60 * minutes, 0.0
    while time.monotonic() < ends:
        data, attempt = make(dice)
        counts["cases"] += 1
        began = time.process_time()
        signal.alarm(SECONDS)
        try:
            attempt()
            counts["loaded"] += 1
        except LangmillError:
            counts["refused"] += 1
        except BaseException as error:  # a library in Rust panics with what is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            found.append(f"{type(error).__name__}: {str(error)[:200]}")
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{len(found)}-{type(error).__name__}").write_bytes(data)
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.process_time() - began)
    return {**counts, "slowest_seconds": round(slowest, 2), "other": len(found), "examples": found[:5]}


def main() -> int:
    targets = {"gguf": gguf, "safetensors": safetensors, "template": template}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", choices=targets)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, too_long)
    results = {}
    for name in [given.only] if given.only else targets:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            keep = Path("fuzz-found") / name
            results[name] = run(targets[name](Path(scratch)), given.minutes, given.seed, keep)
            print(name, results[name], file=sys.stderr)
    good = not any(result["other"] for result in results.values())
    print(json.dumps({"bench": "fuzz", "ok": good, **results}))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
