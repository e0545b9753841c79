"""What a prepared folder holds, for people: report.html, and datasheet.md after Gebru et al. (2021, arXiv:1803.09010).

Samples of texts have personal details masked.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from langmill.common.files import atomic_write
from langmill.data.clean import REASONS, clean_batches, total
from langmill.data.units import READ, Flow, Flows, flows_of
from langmill.jobs.charts import Bar
from langmill.jobs.report import (
    Html,
    Page,
    Tile,
    bytes_shown,
    count_shown,
    folded,
    join,
    render,
    shown,
    table,
    text,
)
from langmill.jobs.report import settings as settings_table
from langmill.privacy.redact import redact

COPIED = "copies.parquet"  # of a run folder: what was left out when all units were there
EACH = 3  # samples of each reason, and of what was kept
_LONG = 300  # characters of a sample


def write(out: Path, value: Mapping[str, Any], run: Path, folders: Sequence[Path]) -> None:
    """report.html and datasheet.md into `out`, which holds the clean set that `value`, its manifest, describes.

    run, folders: its run folder and units, for samples of what was dropped; none: without.
    """
    sources = {source: flows_of(mine) for source, mine in value["flows"].items()}
    atomic_write(out / "report.html", page(out, value, sources, run, folders))
    atomic_write(out / "datasheet.md", datasheet(value, sources))


def page(
    out: Path, value: Mapping[str, Any], sources: Mapping[str, Flows], run: Path, folders: Sequence[Path]
) -> str:
    """The whole page."""
    flows, counts, statistics = total(sources), value["counts"], value["statistics"]
    read = flows[READ].came
    share = counts["documents"] / max(1, read.documents)
    tiles = (
        Tile("documents", count_shown(counts["documents"]), f"{share:.0%} of {shown(read.documents)} found"),
        Tile("text", bytes_shown(counts["bytes"]), f"in {len(value['parts'])} files"),
        Tile(
            "sources",
            shown(len(sources)),
            f"{shown(sum(s['files'] for s in value['sources'].values()))} files",
        ),
        Tile("languages", shown(len(statistics["languages"])), ", ".join(list(statistics["languages"])[:3])),
    )
    notices = []
    if value["failed"]:
        notices.append(f"{value['failed']} units could not be read to their end and are missing: run again.")
    languages = [Bar(name, count) for name, count in list(statistics["languages"].items())[:12]]
    lengths = [Bar(_span(int(power)), count) for power, count in statistics["lengths"].items()]
    sections = [
        (
            "What became of the documents",
            join(diagram(flows), _ledger(flows), _copies(value.get("copies", {}))),
        ),
        ("By source", _by_source(sources)),
        ("Mixture", _mixture(value, sources)),
        ("Languages", _bars("Documents by language", languages)),
        ("Lengths", _bars("Documents by length, in characters", lengths)),
        ("Personal data", _personal(statistics["redacted"])),
        ("What was kept", _samples(_kept(out, value))),
        ("What was left out", join(*(folded(*one) for one in (*_dropped(folders), *_copied(run, folders))))),
        ("Settings", settings_table(value["settings"])),
    ]
    summary = f"{shown(counts['documents'])} clean documents from {', '.join(value['named'])}."
    return render(Page("Prepared text", "langmill data prepare", summary, tiles, notices, sections))


def _span(power: int) -> str:
    return f"{count_shown(2**power)} to {count_shown(2 ** (power + 1))}"


def diagram(flows: Flows) -> Html:
    """Bars from step to step, as wide as the share of the documents that is left, and what leaves at each."""
    found = flows[READ].came.documents or 1
    width, row, left = 720, 44, 170
    space = width - left - 190
    parts = []
    for i, (step, flow) in enumerate(flows.items()):
        y, came, kept = i * row, flow.came.documents, flow.kept.documents
        wide, stays = came / found * space, kept / found * space
        parts.append(
            f'<text class="name" x="{left - 10}" y="{y + 21}" text-anchor="end">{escape(step)}</text>'
        )
        parts.append(
            f'<rect class="bar s1" x="{left}" y="{y + 4}" width="{max(1, wide):.1f}" height="26" opacity=".35"/>'
        )
        parts.append(f'<rect class="bar s0" x="{left}" y="{y + 4}" width="{max(1, stays):.1f}" height="26"/>')
        gone = f", {shown(came - kept)} left out" if came > kept else ""
        parts.append(f'<text class="value" x="{left + wide + 8:.1f}" y="{y + 21}">{shown(kept)}{gone}</text>')
    told = "; ".join(
        f"{step}: {flow.kept.documents} of {flow.came.documents} kept" for step, flow in flows.items()
    )
    height = row * len(flows)
    return Html(
        f'<figure><figcaption>Documents from step to step</figcaption><svg class="chart" role="img" viewBox="0 0 '
        f'{width} {height}" aria-label="{escape(told)}"><desc>{escape(told)}</desc>{"".join(parts)}</svg></figure>'
    )


def _ledger(flows: Flows) -> Html:
    rows: list[tuple[object, ...]] = []
    for step, flow in flows.items():
        rows.append((step, "came", *flow.came.as_list()))
        rows += [("", f"left out: {why}", *amount.as_list()) for why, amount in sorted(flow.dropped.items())]
        less = flow.kept.characters - flow.out.characters
        if step != READ and flow.changed and less > 0:
            rows.append(("", "cut from those kept", "", flow.kept.bytes - flow.out.bytes, less))
        rows.append(("", f"kept, {shown(flow.changed)} of them changed", *flow.out.as_list()))
    head = ("step", "", "documents", "bytes", "characters")
    told = "Every document is counted at every step: came = left out + kept. What is read comes in bytes of its file"
    return table(told, head, rows, 3)


def _copies(counts: Mapping[str, int]) -> Html:
    if not counts.get("compared"):
        return text("No two documents were so much alike that they had to be compared.")
    pairs, alike, left = (shown(counts[name]) for name in ("compared", "similar", "left"))
    told = f"To find near copies {pairs} pairs were compared; {alike} were alike."
    if counts["left"]:
        told += (
            f" {left} times a document was left without being compared with all that share a key with it, since "
            "these were too many: near copies among them may have been missed."
        )
    return text(" ".join([told, *earlier_told(counts)]))


def earlier_told(counts: Mapping[str, int]) -> list[str]:
    """How the clean set differs from one made from the beginning, since what an earlier run kept stays."""
    if not counts.get("earlier") and not counts.get("anew"):
        return []
    return [
        f"{shown(counts['earlier'])} documents that an earlier run kept; made from the beginning (--force), the clean "
        f"set would hold {shown(counts['anew'])} of their copies instead."
    ]


def _by_source(sources: Mapping[str, Flows]) -> Html:
    rows = []
    for source, flows in sources.items():
        last: Flow = next(reversed(flows.values()))
        came = flows[READ].came
        rows.append((source, came.documents, came.bytes, last.out.documents, last.out.bytes))
    return table(
        "Documents and bytes by source", ("source", "found", "bytes", "kept", "bytes of text"), rows, 4
    )


def _mixture(value: Mapping[str, Any], sources: Mapping[str, Flows]) -> Html:
    times = value.get("mixture", {})
    if not times:
        return text("Each document is there once.")
    given = (one.rpartition("=") for one in value["settings"]["mixture"]["weights"])
    weights = {name: float(weight) for name, _, weight in given}
    size = {name: next(reversed(flows.values())).out.bytes for name, flows in sources.items()}
    whole, wanted = max(1, sum(size.values())), sum(weights.values())
    rows = [(n, f"{weights[n] / wanted:.1%}", f"{size[n] / whole:.1%}", f"{times[n]:.2f}") for n in times]
    title = "Shares of the bytes, and how many times each source is there"
    return table(title, ("source", "wanted", "reached", "times"), rows, 3)


def _bars(title: str, bars: Sequence[Bar]) -> Html:
    rows = [(bar.name, int(bar.value)) for bar in bars]
    most = max((bar.value for bar in bars), default=1)
    parts = []
    for i, bar in enumerate(bars):
        y, wide = i * 28, max(1.0, bar.value / most * 420)
        parts.append(f'<text class="name" x="170" y="{y + 18}" text-anchor="end">{escape(bar.name)}</text>')
        parts.append(f'<rect class="bar s0" x="180" y="{y + 4}" width="{wide:.1f}" height="20"/>')
        parts.append(f'<text class="value" x="{190 + wide:.1f}" y="{y + 18}">{int(bar.value):,}</text>')
    told = "; ".join(f"{name} {count}" for name, count in rows)
    return Html(
        f'<figure><figcaption>{escape(title)}</figcaption><svg class="chart" role="img" viewBox="0 0 720 '
        f'{28 * max(1, len(bars))}" aria-label="{escape(told)}"><desc>{escape(told)}</desc>'
        f"{''.join(parts)}</svg></figure>"
    )


def _personal(redacted: Mapping[str, Mapping[str, int]]) -> Html:
    rows = [(source, type, count) for source, mine in redacted.items() for type, count in mine.items()]
    if not rows:
        return text("Nothing was replaced.")
    return table("What was replaced in the documents kept", ("source", "type", "found"), rows, 1)


def _samples(rows: Sequence[tuple[str, str]]) -> Html:
    shown_ = "".join(
        f'<p class="by">{escape(id)}</p><div class="sample s0" dir="auto">{escape(masked(body))}</div>'
        for id, body in rows
    )
    return Html(shown_) if rows else text("Nothing.")


def masked(body: str) -> str:
    """The start of a text, with the personal details that patterns find masked: what was dropped early was not."""
    return redact(body)[:_LONG] + ("…" if len(body) > _LONG else "")


def _kept(out: Path, value: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = (
        row
        for _, batch in clean_batches(out, value["parts"], ["id", "text"])
        for row in zip(
            batch["id"].to_pylist(),
            pc.utf8_slice_codeunits(batch["text"], 0, _LONG + 1).to_pylist(),
            strict=True,
        )
    )
    return heapq.nsmallest(EACH, rows, key=lambda row: _lot(row[0]))


def _lot(id: str) -> bytes:
    """An even choice that is the same each time."""
    return hashlib.blake2b(id.encode("utf-8"), digest_size=8).digest()


def _dropped(folders: Sequence[Path]) -> Iterator[tuple[str, Html]]:
    """For every reason its name with the number of documents, and samples."""
    best: dict[str, list[tuple[bytes, str, str]]] = {}
    counts: dict[str, int] = {}
    for folder in folders:
        for row in pq.read_table(folder / "dropped.parquet", columns=["id", "dropped", "text"]).to_pylist():
            counts[row["dropped"]] = counts.get(row["dropped"], 0) + 1
            mine = best.setdefault(row["dropped"], [])
            mine.append((_lot(row["id"]), row["id"], row["text"] or ""))
            if len(mine) > 100:
                best[row["dropped"]] = heapq.nsmallest(EACH, mine)
    for reason in sorted(best):
        rows = [(id, body) for _, id, body in heapq.nsmallest(EACH, best[reason])]
        yield f"{reason} ({counts[reason]:,})", _samples(rows)


def _copied(run: Path, folders: Sequence[Path]) -> Iterator[tuple[str, Html]]:
    """The same of what was left out when all units were there: of copies, with the text that stays."""
    if not folders or not (run / COPIED).is_file():
        return
    gone = pq.read_table(run / COPIED)
    gone = gone.filter(pc.is_valid(gone["step"]))  # the others stay
    for step in sorted(pc.unique(gone["step"]).to_pylist()):
        own = gone.filter(pc.equal(gone["step"], step))
        some = own.take(sorted({i * (len(own) - 1) // (EACH - 1) for i in range(EACH)})).to_pylist()
        bodies = _bodies(folders, {id for row in some for id in (row["id"], row["of"]) if id})
        rows = []
        for row in some:
            rows.append((row["id"], bodies.get(row["id"], "")))
            if row["of"]:
                rows.append((f"stays for it: {row['of']}", bodies.get(row["of"], "")))
        told = f"{step}: {REASONS[step]}" if step in REASONS else step
        yield f"{told} ({len(own):,})", _samples(rows)


def _bodies(folders: Sequence[Path], ids: Collection[str]) -> dict[str, str]:
    """How the texts of some documents begin, by id."""
    wanted, found = pa.array(sorted(ids), pa.string()), dict[str, str]()
    for folder in folders:
        with pq.ParquetFile(folder / "kept.parquet") as file:
            for group in range(file.num_row_groups):
                here = pc.is_in(file.read_row_group(group, ["id"])["id"], wanted)
                if pc.any(here).as_py():
                    rows = file.read_row_group(group, ["id", "text"]).filter(here)
                    heads = pc.utf8_slice_codeunits(rows["text"], 0, _LONG + 1).to_pylist()
                    found |= zip(rows["id"].to_pylist(), heads, strict=True)
    return found


def datasheet(value: Mapping[str, Any], sources: Mapping[str, Flows]) -> str:
    """Answers that the numbers give, and the questions that only a person can answer."""
    flows, counts, statistics = total(sources), value["counts"], value["statistics"]
    read = flows[READ].came
    ask = "*To be answered by whoever publishes this.*"
    languages = ", ".join(f"{name} {count:,}" for name, count in list(statistics["languages"].items())[:20])
    gone = "\n".join(
        f"- {step}: {why}: {amount.documents:,} documents"
        for step, flow in flows.items()
        for why, amount in sorted(flow.dropped.items())
    )
    made = "\n".join(
        f"- {name}: {about['files']:,} files, {about['bytes']:,} bytes (hash {about['hash']})"
        for name, about in value["sources"].items()
    )
    return f"""# Datasheet

After Gebru et al., "Datasheets for Datasets" (2021). Written by `langmill data prepare`; what it cannot know is marked.

## Motivation

For what purpose, by whom, paid by whom: {ask}

## Composition

- Instances: {counts["documents"]:,} documents of text, {counts["bytes"]:,} bytes, each with its source and what was
  known of it (address, date, licence, language).
- Languages, as detected: {languages or "not told"}.
- It is what is left of {read.documents:,} documents that were found. Is that a sample of something larger? {ask}
- Does it hold personal data, or what may offend? {ask}

## Collection

{made}

How and when were they collected, and did the people concerned know? {ask}

## Preprocessing, cleaning, labelling

Steps, in order: {", ".join(value["steps"])}. Their settings stand in manifest.json. Left out:

{gone or "- nothing"}

## Uses

What was it used for, what should it not be used for? {ask}

## Distribution

Licences of the sources: {ask} Licences that pages stated stand in the column meta.

## Maintenance

Who maintains it? {ask} Documents are removed with `langmill data forget`; the removal reaches the models whose
lineage names this set.
"""
