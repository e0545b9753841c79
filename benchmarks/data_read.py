"""Reading: how often the language of a text is told rightly, and pages to text beside plain trafilatura.

    python benchmarks/data_read.py language [--documents 2000] [--file ROWS.jsonl]
    python benchmarks/data_read.py html [--documents 2000] [--rounds 5] [--pages FOLDER]

`language` asks the step of `data prepare` about descriptions of Debian's packages in nine languages and English (assets
ddtp-languages, ddtp; or rows of text and language), which were written for nobody's test. `html` reads pages on two
processes, as `data prepare` does, and with trafilatura alone in one, in turns; both must give the same text. The pages
are a folder of .html, else kernel pages (asset linux-doc-6.1) put between menus and footers. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from html import escape
from pathlib import Path
from time import perf_counter
from typing import Any

from _figures import HUBLESS, read_rows, spread
from _texts import ASSETS, table, texts

from langmill.common.prepare_settings import InputSettings, PrepareSettings
from langmill.data.sources import files, units
from langmill.data.tidy import Language
from langmill.data.units import Recipe, kept_batches
from langmill.jobs.workers import work

LENGTHS = (0, 50, 100, 200, 400)
PLAIN = """
import json, sys, time
began = time.perf_counter()
import trafilatura
from pathlib import Path
files = sorted(Path(sys.argv[1]).glob("*.html"))
found = {}
for file in files:
    text = trafilatura.extract(file.read_text("utf-8"), include_comments=False, include_tables=True)
    if text:
        found[file.name] = text
seconds = time.perf_counter() - began
Path(sys.argv[2]).write_text(json.dumps(found), "utf-8")
print(seconds)
"""


def language(given: argparse.Namespace) -> dict[str, Any]:
    """Shares of texts whose language was told rightly: in all, by language, by length in characters; and what was said
    instead."""
    by_language: dict[str, list[str]] = {}
    for row in read_rows(given.file or ASSETS / "ddtp-languages" / "descriptions.jsonl"):
        by_language.setdefault(row["language"], []).append(row["text"])
    if given.file is None:
        by_language["en"] = texts("ddtp/descriptions.jsonl")
    right: dict[str, Counter[str]] = {"languages": Counter(), "lengths": Counter()}
    asked: dict[str, Counter[str]] = {"languages": Counter(), "lengths": Counter()}
    wrong: Counter[str] = Counter()
    for name, rows in sorted(by_language.items()):
        rows = list(dict.fromkeys(rows))
        rows = rows[:: max(1, len(rows) // given.documents)][: given.documents]
        metas = Language()(table(rows))["meta"].to_pylist()
        for row, meta in zip(rows, metas, strict=True):
            said = json.loads(meta)["language"]
            length = str(max(least for least in LENGTHS if len(row) >= least))
            for kind, key in (("languages", name), ("lengths", length)):
                asked[kind][key] += 1
                right[kind][key] += said == name
            if said != name:
                wrong[f"{name} as {said}"] += 1
    shares = {
        kind: {
            key: round(right[kind][key] / count, 4)
            for key, count in sorted(counts.items(), key=lambda one: (len(one[0]), one[0]))
        }
        for kind, counts in asked.items()
    }
    total = asked["languages"].total()
    return {"texts": total, "accuracy": round(right["languages"].total() / total, 4), **shares} | {
        "wrong": dict(wrong.most_common(10))
    }


def pages(folder: Path, count: int) -> None:
    """Kernel pages between what pages have around their text."""
    menu = "".join(f'<li><a href="/{i}">Section {i}</a></li>' for i in range(40))
    rows = texts("linux-doc-6.1/english.jsonl")
    for number in range(count):
        row = rows[number % len(rows)]
        body = "".join(f"<p>{escape(part)}</p>\n" for part in row.split("\n\n"))
        (folder / f"{number:06}.html").write_text(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Page {number}</title></head><body>'
            f"<nav><ul>{menu}</ul></nav><header><h1>Page {number}</h1></header><main><article>{body}</article></main>"
            f'<aside><ul>{menu}</ul></aside><footer>Number {number}. All rights reserved.</footer></body></html>',
            encoding="utf-8",
        )  # fmt: skip


def ours(folder: Path, store: Path, workers: int) -> tuple[float, dict[str, str]]:
    """Seconds, and texts by the name of their page, of units without any step."""
    read = InputSettings(unit_files=500)
    settings = PrepareSettings(source=[str(folder)], out=store, workers=workers)
    recipe = Recipe(read, ())
    began = perf_counter()
    todo = list(units(files([str(folder)], False, lambda *_: None), read, "", lambda *_: None))
    failed = work(todo, recipe, store, settings, quiet=True)
    seconds = perf_counter() - began
    if failed:
        raise SystemExit(f"not read: {failed[0].reason}")
    found = {}
    for unit in todo:
        for batch in kept_batches(store / unit.key, ["id", "text"]):
            names = (id.partition("#")[0].rpartition("/")[2] for id in batch["id"].to_pylist())
            found.update(zip(names, batch["text"].to_pylist(), strict=True))
    return seconds, found


def html(given: argparse.Namespace) -> dict[str, Any]:
    """Pages a second of both sides, in turn."""
    said: dict[str, list[float]] = {"ours/s": [], "trafilatura/s": [], "ratio": []}
    with tempfile.TemporaryDirectory(prefix="langmill-html-") as place:
        folder = given.pages or Path(place, "pages")
        if given.pages is None:
            folder.mkdir()
            pages(folder, given.documents)
        count = len(list(folder.glob("*.html")))
        for number in range(given.rounds):
            seconds, mine = ours(folder, Path(place, f"units-{number}"), 2)
            command = [sys.executable, "-c", PLAIN, str(folder), f"{place}/plain.json"]
            plain = float(
                subprocess.run(command, check=True, capture_output=True, text=True, env=HUBLESS).stdout
            )
            theirs = json.loads(Path(place, "plain.json").read_text(encoding="utf-8"))
            alike = sum(mine.get(name) == text for name, text in theirs.items())
            for name, value in zip(said, (count / seconds, count / plain, plain / seconds), strict=True):
                said[name].append(value)
    both = {
        "pages": count,
        "with text": {"ours": len(mine), "trafilatura": len(theirs)},
        "the same text": alike,
    }
    return {name: spread(values, 2) for name, values in said.items()} | both


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["language", "html"])
    parser.add_argument("--documents", type=int, default=2000, help="of each language, or pages")
    parser.add_argument("--file", type=Path, help="language: rows of text and language")
    parser.add_argument("--pages", type=Path, help="html: a folder of .html files in UTF-8")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    run = {"language": language, "html": html}[given.what]
    print(json.dumps(run(given), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
