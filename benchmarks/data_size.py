"""`langmill data prepare` on generated rows of several sizes: time that grows as they do, and memory that is bounded.

    python benchmarks/data_size.py [--gigabytes 1 2 4] [--workers 2] [--limit 4]

Writes rows of real lines in new orders (asset ddtp), one in a hundred an edited copy, prepares them with the default
settings in a process of its own, and watches that process and its children: `peak_GB` is the memory they hold together
(RSS, mapped files included), `anonymous_GB` without the files; `cpu_seconds` is the time of processors that they took,
since that on the clock hangs on what else runs. `exponent` is that of `cpu_seconds` by size from the smallest to the
greatest, 1 where it grows as the size does. Everything is deleted at the end. Linux only. Prints one JSON object; exit
code 1 where the peak is above the limit or the exponent above 1.2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _texts import texts
from copies import made

from langmill.common.files import free_bytes

MOST = 1.2


def write(file: Path, gigabytes: float, seed: int) -> int:
    """JSONL rows of so much text; how many."""
    lines = [line for text in texts("ddtp/descriptions.jsonl") for line in text.split("\n") if len(line) > 40]
    count = 0
    with open(file, "w", encoding="utf-8") as out:
        for text in made(round(gigabytes * 1e9), seed, lines):
            count += 1
            out.write(
                json.dumps({"text": text, "url": f"https://{random.Random(count).randrange(99)}.example"})
                + "\n"
            )
    return count


def memory(root: int) -> tuple[int, int]:
    """Bytes that a process and those below it hold (RSS), and those without mapped files."""
    parents: dict[int, int] = {}
    held: dict[int, tuple[int, int]] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            about = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        except OSError:  # it ended
            continue
        pid = int(about["Pid"])
        parents[pid] = int(about["PPid"])
        sizes = [int(about.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "RssAnon")]
        held[pid] = (sizes[0], sizes[1])
    mine = {root}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    found = [held[pid] for pid in mine if pid in held]
    return sum(one for one, _ in found), sum(one for _, one in found)


def prepare(raw: Path, out: Path, workers: int) -> dict[str, Any]:
    """Seconds, peaks and counts of one run."""
    command = [
        sys.executable,
        "-m",
        "langmill",
        "data",
        "prepare",
        str(raw),
        "--out",
        str(out),
        "--json",
        "--quiet",
    ]
    began, peaks, before = time.perf_counter(), [0, 0], os.times()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen([*command, "--workers", str(workers)], stdout=said)
        while process.poll() is None:
            peaks = [max(pair) for pair in zip(peaks, memory(process.pid), strict=True)]
            time.sleep(0.2)
        seconds, after = time.perf_counter() - began, os.times()
        said.seek(0)
        report = json.loads(said.read().splitlines()[-1])
    if process.returncode:
        raise SystemExit(f"it failed: {report}")
    counts = {name: report["counts"][name] for name in ("read", "dropped", "documents")}
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    figures = {
        "seconds": seconds,
        "cpu_seconds": spent,
        "peak_GB": peaks[0] / 1e9,
        "anonymous_GB": peaks[1] / 1e9,
    }
    return {name: round(value, 2) for name, value in figures.items()} | counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 2, 4])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=4, help="GB that all processes may hold together")
    given = parser.parse_args()
    said: dict[str, Any] = {}
    for number, size in enumerate(sorted(given.gigabytes)):
        with tempfile.TemporaryDirectory(prefix="langmill-size-") as folder:
            if free_bytes(Path(folder)) < 4 * size * 1e9:
                raise SystemExit(f"{folder} has no room for {4 * size:g} GB: set TMPDIR to a larger disk")
            raw = Path(folder, "raw.jsonl")
            rows = write(raw, size, number)
            said[f"{size:g} GB"] = prepare(raw, Path(folder, "out"), given.workers) | {"rows": rows}
            print(f"{size:g} GB: {said[f'{size:g} GB']}", file=sys.stderr)
    first, last = (said[f"{size:g} GB"] for size in (min(given.gigabytes), max(given.gigabytes)))
    peak = max(one["peak_GB"] for one in said.values())
    ok = peak < given.limit
    if len(said) > 1:
        growth = math.log(max(given.gigabytes) / min(given.gigabytes))
        exponent = math.log(last["cpu_seconds"] / first["cpu_seconds"]) / growth
        said["exponent"], ok = round(exponent, 2), ok and exponent <= MOST
    print(json.dumps(said | {"ok": ok}, indent=1))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
