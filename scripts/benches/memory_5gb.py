"""Peak memory of reading, tokenising and sharding 5 GB: it must stay below 600 MB whatever the input.

    scripts/bench memory_5gb [--gigabytes 5] [--only jsonl|text|line|train]

Generates one input at a time (JSONL rows; a .txt of lines; a .txt of one single line; and the JSONL again
for training a tokenizer), runs the langmill command in a process of its own, and watches that process's
anonymous memory (RssAnon: the page cache and mapped files are not counted). Everything is deleted at the
end. Linux only. Prints one JSON object; exit code 1 where a peak is above the limit.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from langmill.common.files import free_bytes
from langmill.jobs.manual import manual
from langmill.text.tokenizer import Tokenizer

LIMIT = 600 * 10**6


def texts(seed: int) -> Iterator[str]:
    """Endless texts: stretches of CPython's manual with numbers and Chinese among them, no two alike."""
    rng = random.Random(seed)
    words = " ".join(document.text for document in manual().documents).split()
    while True:
        start = rng.randrange(len(words) - 400)
        chosen = words[start : start + rng.randrange(20, 400)]
        yield f"{rng.getrandbits(64):x} {' '.join(chosen)} 第{rng.randrange(10**6)}章，你好。"


def write_jsonl(file: Path, size: int) -> None:
    _write(file, size, lambda text: json.dumps({"text": text}, ensure_ascii=False) + "\n")


def write_text(file: Path, size: int) -> None:
    _write(file, size, lambda text: text + "\n\n")


def write_line(file: Path, size: int) -> None:
    _write(file, size, lambda text: text + " ")


def _write(file: Path, size: int, row: Callable[[str], str]) -> None:
    """A block of 64 MB of text, written again and again with a changed start to each row."""
    source = texts(0)
    block: list[bytes] = []
    held = 0
    while held < min(size, 64 << 20):
        block.append(row(next(source)).encode("utf-8"))
        held += len(block[-1])
    written = turn = 0
    with open(file, "wb") as out:
        while written < size:
            turn += 1
            mark = f"{turn:x}".encode()
            for line in block:
                written += out.write(line[:10] + mark + line[10:])
                if written >= size:
                    return


def watch(command: list[str]) -> tuple[int, float]:
    """(peak of RssAnon in bytes, seconds) of a command, which must end well."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.communicate()[1].decode()[-2000:])
    return peak, time.perf_counter() - start


CASES: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "jsonl": ("rows.jsonl", write_jsonl),
    "text": ("lines.txt", write_text),
    "line": ("line.txt", write_line),
    "train": ("rows.jsonl", write_jsonl),
}


def run(case: str, size: int, scratch: Path) -> dict[str, float | bool]:
    name, write = CASES[case]
    file, tokenizer, out = scratch / name, scratch / "tokenizer", scratch / "out"
    write(file, size)
    command = [sys.executable, "-m", "langmill"]
    if case == "train":
        command += ["tokenizer", "train", str(file), "--out", str(out), "--quiet"]
    else:
        source = texts(1)
        Tokenizer.train([next(source) for _ in range(2000)], 8192).save(tokenizer)
        command += ["data", "shards", str(file), "--tokenizer", str(tokenizer), "--out", str(out), "--quiet"]
    peak, seconds = watch(command)
    return {
        "gigabytes": round(file.stat().st_size / 1e9, 2),
        "peak_megabytes": round(peak / 1e6),
        "megabytes_per_second": round(file.stat().st_size / 1e6 / seconds, 1),
        "ok": peak < LIMIT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=5)
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; none: the temporary folder"
    )
    given = parser.parse_args()
    size = int(given.gigabytes * 1e9)
    results = {}
    for case in [given.only] if given.only else list(CASES):
        with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
            if free_bytes(Path(scratch)) < 2.5 * size:
                raise SystemExit(f"{scratch} has too little room for {given.gigabytes} GB and its shards")
            results[case] = run(case, size, Path(scratch))
            print(case, results[case], file=sys.stderr)
    torch = watch([sys.executable, "-c", "import torch"])[0]
    answer = {
        "bench": "memory",
        "limit_megabytes": LIMIT // 10**6,
        "torch_megabytes": round(torch / 1e6),
    } | results
    print(json.dumps(answer))
    if not all(result["ok"] for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
