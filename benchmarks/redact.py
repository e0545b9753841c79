"""Finding personal details and secrets: exact places in rows of eight locales, and speed beside presidio's.

    python benchmarks/redact.py score [--peer PYTHON] [--rows 3600] [--seed 0] [--tagger FOLDER]
    python benchmarks/redact.py teach --tagger FOLDER [--rows 4000]
    python benchmarks/redact.py speed --peer PYTHON [--rounds 5] [--rows 1000]
    python benchmarks/redact.py hostile

PYTHON is one of an environment of its own with presidio-analyzer. `score` takes rows of people.yaml, those that are
held back; presidio is scored on types that it knows, at the least score that serves it best. `teach` makes the tagger
of names and addresses: MiniLM (asset minilm) fine-tuned on the other rows, with other sentences and names. `speed` runs
both in turn, one process each on the same core: these rows, and texts of the assets ddtp and linux-doc-6.1. What
counts is the ratio within a round. `hostile`: seconds for a million characters of what patterns are slow at. Prints
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from _figures import HUBLESS, spread, write_rows
from _people import Span, rows, score
from _texts import ASSETS, clock, table, texts

from langmill.common.configure import configure
from langmill.common.settings import FinetuneSettings
from langmill.jobs import finetune
from langmill.privacy.patterns import find
from langmill.privacy.redact import Redact

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import assets

PEER = Path(__file__).parent / "peers" / "presidio_patterns.py"
THEIRS = {
    "EMAIL_ADDRESS": "email", "PHONE_NUMBER": "phone", "CREDIT_CARD": "card", "IBAN_CODE": "iban", "US_SSN": "us_ssn",
    "UK_NINO": "uk_nino", "UK_NHS": "uk_nhs", "IN_AADHAAR": "in_aadhaar", "IN_PAN": "in_pan", "IP_ADDRESS": "ip",
    "MAC_ADDRESS": "mac", "PERSON": "person", "LOCATION": "address",
}  # fmt: skip
HOSTILE = (
    "1", "1 ", "12 34 ", "1234567890 ", "0171-", "+1", "(0", "1.", "1.1.1.1 ", "a@", "@", "x@a.", "x@a-", ":",
    "::1", "AB12", "AB12 ", "A", "-00", "-----BEGIN RSA PRIVATE KEY-----\n",
    "-----BEGIN PRIVATE KEY-----AAAAAAAAAAAAAAAAAAAA\n", "token", "token_", "token=1", "eyJ-",
    "eyJaaaaaaaaaa.eyJ1", "sk-1", "a://", "a://b:c@", "a://b:", "=", "tel 030 1234567 ", "123-45-6780 ",
    "4111 1111 1111 1111 ", "2024-01-01 12:30 ", "٠", "１３８", "order phone ",
)  # fmt: skip
NAMES = ("person", "address")


def scores(given: argparse.Namespace) -> dict[str, Any]:
    """Ours on the rows held back and on those that were looked at; names and addresses; the peer's."""
    said: dict[str, Any] = {}
    for kind, held in (("held", True), ("seen", False)):
        made = rows(given.rows, held, given.seed)
        said[kind] = score([_spans(row.text) for row in made], made)
    made = rows(given.rows, True, given.seed)
    if given.tagger:
        from langmill.privacy.names import names

        found = names(given.tagger)([row.text for row in made])
        said["names"] = score([[(f.start, f.end, f.type) for f in finds] for finds in found], made, NAMES)
    if given.peer:
        with tempfile.TemporaryDirectory() as folder:
            file, out = Path(folder) / "texts.json", Path(folder) / "out.json"
            file.write_text(json.dumps([row.text for row in made]), encoding="utf-8")
            subprocess.run([given.peer, str(PEER), "finds", str(file), str(out)], check=True, env=HUBLESS)
            theirs = json.loads(out.read_text(encoding="utf-8"))
        types = tuple(type for type in THEIRS.values() if type not in NAMES)
        each = {least: score(_peers(theirs, least), made, types) for least in (0.0, 0.3, 0.4, 0.5, 0.6)}
        best = max(each, key=lambda least: each[least]["all"]["f1"])
        said["presidio"] = {"least score": best} | each[best]
        said["presidio, names"] = score(_peers(theirs, 0.0), made, NAMES)
        said["ours, types that presidio knows"] = score([_spans(row.text) for row in made], made, types)[
            "all"
        ]
    return said


def _spans(text: str) -> list[Span]:
    return [(one.start, one.end, one.type) for one in find(text)]


def _peers(found: list[list[Any]], least: float) -> list[list[Span]]:
    """Those that are sure enough and of a type that we name; of some that overlap, the surest."""
    said = []
    for finds in found:
        taken: list[Span] = []
        for start, end, type, value in sorted(finds, key=lambda one: (-one[3], one[0] - one[1])):
            known = type in THEIRS and value >= least
            if known and not any(start < other[1] and other[0] < end for other in taken):
                taken.append((start, end, THEIRS[type]))
        said.append(taken)
    return said


def teach(given: argparse.Namespace) -> dict[str, Any]:
    """A tagger of persons and addresses, by `langmill finetune --task tag`; its figures on a tenth of its own rows."""
    made = [
        {
            "text": row.text,
            "spans": [
                {"start": start, "end": end, "label": type} for start, end, type in row.spans if type in NAMES
            ],
        }
        for row in rows(given.rows, False, given.seed)
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl", made)
        asked = configure(
            FinetuneSettings, None, ["num_train_epochs=3", "holdout=0.1", "compile=false", "dropout=0.1"],
            model=str(assets.fetch("minilm")), task="tag", data=[f"{folder}/rows.jsonl"], out=Path(given.tagger),
        )  # fmt: skip
        return dict(finetune.run(asked, quiet=False).figures)


def mixed(count: int) -> dict[str, list[str]]:
    """Rows of made-up people, and real texts with next to none."""
    found = {"people": [row.text for row in rows(count, True)]}
    for name, file, wanted in (
        ("descriptions", "ddtp/descriptions.jsonl", count),
        ("kernel", "linux-doc-6.1/english.jsonl", count // 20),
    ):
        if (ASSETS / file).is_file():
            all_ = texts(file)
            found[name] = all_[:: max(1, len(all_) // wanted)][:wanted]
    return found


def speed(given: argparse.Namespace) -> dict[str, Any]:
    """Documents a second of both sides, in turn."""
    every = os.sched_getaffinity(0)
    said: dict[str, Any] = {}
    for name, some in mixed(given.rows).items():
        os.sched_setaffinity(0, {min(every)})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "texts.json"
            file.write_text(json.dumps(some), encoding="utf-8")
            command = [given.peer, str(PEER), "time", str(file)]
            peer = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=HUBLESS
            )
            assert peer.stdin and peer.stdout
            batch, step = table(some), Redact()
            found: dict[str, list[float]] = {"ours/s": [], "presidio/s": [], "ratio": []}
            for number in range(given.rounds + 1):  # the first warms both up
                peer.stdin.write(f"{len(some) if number else min(50, len(some))}\n")
                peer.stdin.flush()
                theirs = json.loads(peer.stdout.readline())["seconds"]
                ours = clock(partial(step, batch))[0]
                if number:
                    found["ours/s"].append(len(some) / ours)
                    found["presidio/s"].append(len(some) / theirs)
                    found["ratio"].append(theirs / ours)
            peer.stdin.close()
            peer.wait()
        os.sched_setaffinity(0, every)
        sizes = {"documents": len(some), "characters": sum(map(len, some))}
        said[name] = {what: spread(values, 1) for what, values in found.items()} | sizes
    return said


def hostile(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the processor for each kind of text, and how many were found."""
    said = {}
    for piece in HOSTILE:
        text = piece * (10**6 // len(piece))
        began = time.process_time()
        found = len(find(text))
        said[piece] = [round(time.process_time() - began, 2), found]
    return {"worst": max(seconds for seconds, _ in said.values()), "seconds, found": said}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["score", "teach", "speed", "hostile"])
    parser.add_argument("--peer", help="the Python that presidio is installed for")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tagger", help="folder of a model that tags persons and addresses")
    given = parser.parse_args()
    given.rows = given.rows or {"score": 3600, "teach": 4000}.get(given.what, 1000)
    if given.what == "speed" and not given.peer:
        parser.error("speed needs --peer")
    if given.what == "teach" and not given.tagger:
        parser.error("teach needs --tagger")
    run = {"score": scores, "teach": teach, "speed": speed, "hostile": hostile}[given.what]
    print(json.dumps(run(given), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
