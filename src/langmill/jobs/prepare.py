"""`langmill data prepare`: sources to clean documents in units of work, each finished as a whole.

OUT/       clean/part-00000.parquet …, manifest.json (counts, settings, hashes), report.html, datasheet.md
OUT.run/   units/KEY/…, plan.json, copies.parquet, errors.jsonl, versions/, keepers/: private, since it holds what was
           dropped

Stopped at any moment, the same command goes on from the units that are whole and ends with the same files; run again
over sources that grew, it does the new work alone, and what it kept stays in the place of its copies.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from langmill.common.errors import DataError, MissingExtra, UsageError
from langmill.common.files import (
    atomic_folder,
    atomic_write,
    claimed,
    read_json,
    recover,
    run_folder,
    sha256,
    write_json,
)
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.common.settings import PreparedSettings, PrepareSettings, WhySettings
from langmill.jobs.report import bytes_shown, shown

try:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from langmill.data import boilerplate, clean
    from langmill.data.forgotten import key_of, known_as, load, shard_known_as
    from langmill.data.last import last
    from langmill.data.mixture import weights_of
    from langmill.data.sources import Unit, files, roots, units
    from langmill.data.units import READ, Amount, Flow, Recipe, done, flows_of
except ImportError:
    raise MissingExtra("data", "pyarrow") from None
from langmill.jobs import prepare_report
from langmill.jobs.prepare_steps import recipe, shape
from langmill.jobs.workers import Failed, work
from langmill.text.document import text_hash

MANIFEST, VERSION = "manifest.json", 1
KEEPERS = "keepers"  # in the run folder: what the version that OUT holds kept of texts that are alike
_LINES = 10_000  # of errors.jsonl
_REASONS = 20  # that are told at the end
# Settings that make no other documents.
_ALIKE: Any = {"source", "out", "workers", "engine", "address", "resume", "force"}


@dataclass(frozen=True)
class Aside:
    """What was found among the sources and is no file to read."""

    source: str
    id: str
    reason: str
    bytes: int
    detail: str


def run(settings: PrepareSettings, *, quiet: bool = False) -> Report:
    """Prepare; see the top of the file. The report is not `ok` where a unit could not be read to its end.

    UsageError for a source that is not there and an OUT of other sources or settings (--resume, --force); DataError
    where no document is left.
    """
    from langmill.data.formats import check_fields

    check_fields(settings.read)
    named = roots(settings.source)
    _check_out(settings, [root.name for root in named])
    weights_of(settings.mixture.weights, [root.name for root in named])
    with claimed(settings.out, resume=True, resumable=True) as folder:
        made = recipe(settings, folder)
        if settings.force:
            for name in ("units", KEEPERS):
                shutil.rmtree(folder / name, ignore_errors=True)
        if load(folder)["begun"]:
            raise UsageError(
                f"documents were being removed from {settings.out}: end that first with langmill data forget"
            )
        aside: list[Aside] = []
        found = files(settings.source, settings.read.follow_links, lambda *given: aside.append(Aside(*given)))
        with track("looking at sources", sum(file.size for file in found), "B", quiet) as progress:
            planned = []
            for unit in units(
                found, settings.read, made.fingerprint(), lambda *given: aside.append(Aside(*given))
            ):
                planned.append(unit)
                progress.advance(unit.size)
        todo = [unit for unit in planned if not done(folder / "units", unit)]
        failed = work(todo, made, folder / "units", settings, quiet)
        lost = {one.unit.key for one in failed}
        whole = [unit for unit in planned if unit.key not in lost]
        return finish(
            settings, folder, made, whole, aside, failed, len(whole) - len(todo) + len(failed), quiet
        )


def _check_out(settings: PrepareSettings, names: Sequence[str]) -> None:
    out = settings.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, and this writes a folder: choose another --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise UsageError(f"{out} holds something else: choose another --out")
    before = manifest(out)
    if settings.force or settings.resume:
        return
    then = _settings(settings_of(out, before))  # with the defaults of what was no setting yet
    differ = [name for name, value in _settings(settings).items() if then[name] != value]
    if differ or sorted(before["named"]) != sorted(names):
        what = f"settings ({', '.join(differ)})" if differ else f"sources ({', '.join(before['named'])})"
        raise UsageError(
            f"{out} was made with other {what}: --resume makes it again and reuses what fits, --force does all anew"
        )


def _settings(settings: PrepareSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude=_ALIKE)


def finish(
    settings: PrepareSettings, run: Path, made: Recipe, whole: Sequence[Unit], aside: Sequence[Aside],
    failed: Sequence[Failed], reused: int, quiet: bool,
) -> Report:  # fmt: skip
    """From the units to OUT: without copies, counted, described."""
    named = roots(settings.source)
    plan: dict[str, Any] = {
        "units": [unit.key for unit in whole],
        "named": [root.name for root in named],
        "sources": _sources(whole, {root.name: root.revision for root in named if root.revision}),
        "aside": [[a.source, a.id, a.reason, a.bytes, a.detail] for a in aside],
        "failed": [[f.unit.source, f.named, f.reason] for f in failed],
        "settings": _settings(settings),
    }
    write_json(run / "plan.json", plan, "prepare plan", VERSION)
    counts = compose(settings, run, [step.name for step in made.steps], quiet)
    _tidy_up(run, set(plan["units"]))
    return _said(settings, counts, plan, reused, len(whole), quiet)


def compose(
    settings: PrepareSettings, run: Path, unit_steps: Sequence[str], quiet: bool, empty: bool = False
) -> dict[str, Any]:
    """Write OUT from the units that plan.json names; the manifest is returned. unit_steps: the names of what was done
    to each unit. empty: OUT may hold no document."""
    plan = read_json(run / "plan.json", "prepare plan", VERSION)
    folders = [run / "units" / key for key in plan["units"]]
    sources = clean.flows(folders)
    for source, _, reason, size, _ in plan["aside"]:
        mine = sources.setdefault(source, {READ: Flow()})
        mine[READ].dropped.setdefault(reason, Amount()).add(Amount(1, size, 0))
    earlier = _earlier(settings, run)
    with track("finding copies", quiet=quiet) as progress:
        found = clean.copies(folders, settings.duplicates, earlier)
        progress.advance(sum(map(len, found.codes)))
    steps = (clean.EXACT, clean.NEAR) if shape(settings) else ()
    asked = settings.boilerplate.cut or settings.mixture.weights
    with track("counting over all", quiet=quiet or not asked):
        whole = last(lambda: clean.staying(folders, found.codes), settings, plan["named"], run)
    with atomic_folder(settings.out, replace=True) as fresh:
        parts, statistics, late = clean.write(
            folders, found.codes, steps, whole, fresh / "clean", settings.part_bytes, sources
        )
        clean.check(sources, parts)
        if not parts and not empty:
            reasons = [f"{a.documents} x {step}: {why}" for step, why, a in _dropped(sources)]
            reasons += [f"{id} could not be read to its end: {why}" for _, id, why in plan["failed"][:3]]
            raise DataError(
                "no document is left: " + ("; ".join(reasons) or "the sources hold no file to read")
            )
        value = {
            "named": plan["named"],
            "sources": plan["sources"],
            "settings": plan["settings"],
            "steps": [*unit_steps, *steps, *(step.name for step in whole.steps)],
            "failed": len(plan["failed"]),
            "counts": {name: sum(part[name] for part in parts) for name in ("documents", "bytes")},
            "parts": parts,
            "copies": found.counts,
            "mixture": dict(whole.mixture.times) if whole.mixture else {},
            "flows": {
                s: {step: f.as_dict() for step, f in mine.items()} for s, mine in sorted(sources.items())
            },
            "statistics": statistics.as_dict(),
        }
        write_json(fresh / MANIFEST, value, "prepared text", VERSION)
        _store(pa.concat_tables([found.table, late]), run / prepare_report.COPIED)
        _errors(run, plan, folders)
        _remember(run, fresh, parts, bool(whole.steps))
        # Where units are missing, what stays for their texts is not settled: a run that has all decides.
        keepers = found.keepers if not plan["failed"] else earlier or clean.KEEPERS.empty_table()
        stays = run / KEEPERS / f"{sha256(fresh / MANIFEST)}.parquet"
        _store(keepers, stays)
        prepare_report.write(fresh, value, run, folders)
    for file in stays.parent.iterdir():
        if file != stays:
            file.unlink()
    return value


def _earlier(settings: PrepareSettings, run: Path) -> pa.Table | None:
    """What stays since the run that wrote OUT kept it, with the settings of this one; None where there is none."""
    recover(settings.out)
    if not (settings.out / MANIFEST).is_file():
        return None
    stays = run / KEEPERS / f"{sha256(settings.out / MANIFEST)}.parquet"
    if manifest(settings.out)["settings"] != _settings(settings) or not stays.is_file():
        return None
    kept, gone, key = pq.read_table(stays), set(load(run)["hashes"]), key_of(run)
    stay = pa.array([known_as(key, id) not in gone for id in kept["id"].to_pylist()], pa.bool_())
    return kept.filter(stay)


def _store(table: pa.Table, file: Path) -> None:
    """Write a table so that a reader, or a crash, meets the old one or the new, whole."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    atomic_write(file, sink.getvalue().to_pybytes())


def manifest(out: Path) -> dict[str, Any]:
    """manifest.json of a prepared folder; UsageError where it is none."""
    if not (out / MANIFEST).is_file():
        raise UsageError(f"{out} is no folder that langmill data prepare wrote: it holds no {MANIFEST}")
    return read_json(out / MANIFEST, "prepared text", VERSION)


def _sources(whole: Sequence[Unit], revisions: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Files, bytes and a hash of the contents, by source; the commit of one of the hub."""
    found: dict[str, dict[str, Any]] = {}
    for unit in whole:
        mine = found.setdefault(unit.source, {"files": 0, "bytes": 0, "hash": ""})
        mine["files"] += len({piece.file.id for piece in unit.pieces if piece.start == 0})
        mine["bytes"] += unit.size
        text = mine["hash"] + "".join(piece.file.id + piece.hash for piece in unit.pieces)
        mine["hash"] = hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()
    for name, revision in revisions.items():
        found.setdefault(name, {"files": 0, "bytes": 0, "hash": ""})["revision"] = revision
    return found


def _dropped(sources: clean.Sources) -> Iterator[tuple[str, str, Amount]]:
    for step, flow in clean.total(sources).items():
        for reason, amount in flow.dropped.items():
            yield step, reason, amount


def _errors(run: Path, plan: Mapping[str, Any], folders: Sequence[Path]) -> None:
    """errors.jsonl: what could not be read, and why."""
    lines = [
        {"where": id, "reason": reason, "bytes": size, "detail": detail}
        for _, id, reason, size, detail in plan["aside"]
    ] + [{"where": id, "reason": "not read to its end", "detail": why} for _, id, why in plan["failed"]]
    for folder in folders:
        if len(lines) >= _LINES:
            break
        for row in pq.read_table(folder / "dropped.parquet").to_pylist():
            if row["dropped"].startswith(f"{READ}: "):
                reason = row["dropped"].removeprefix(f"{READ}: ")
                lines.append(
                    {"where": row["id"], "reason": reason, "bytes": row["bytes"], "detail": row["text"]}
                )
    atomic_write(run / "errors.jsonl", "".join(json.dumps(line) + "\n" for line in lines[:_LINES]))


def _remember(run: Path, out: Path, parts: Sequence[Mapping[str, Any]], changed: bool) -> None:
    """Which documents this version of the clean set holds, by hashes: `forget` asks which models saw one. changed: its
    texts are not those of the units, and are remembered too."""
    key, version = key_of(run), run / "versions" / sha256(out / MANIFEST)
    ids = [known_as(key, i) for _, b in clean.clean_batches(out, parts, ["id"]) for i in b["id"].to_pylist()]
    version.parent.mkdir(exist_ok=True)
    hashes = np.array(sorted(int(i[:16], 16) for i in ids), np.uint64)
    np.save(version.with_suffix(".npy"), hashes, allow_pickle=False)
    if changed:
        batches = clean.clean_batches(out, parts, ["text"])
        texts = [shard_known_as(key, text_hash(t)) for _, b in batches for t in b["text"].to_pylist()]
        pq.write_table(pa.table({"id": ids, "text": texts}), version.with_suffix(".parquet"))


def _tidy_up(run: Path, keys: set[str]) -> None:
    """Units of other settings, and what killed runs left."""
    for folder in (run / "units").iterdir():
        if folder.name not in keys:
            shutil.rmtree(folder, ignore_errors=True)


def _said(
    settings: PrepareSettings,
    value: Mapping[str, Any],
    plan: Mapping[str, Any],
    reused: int,
    total: int,
    quiet: bool,
) -> Report:
    flows = clean.total({s: flows_of(mine) for s, mine in value["flows"].items()})
    read = flows[READ].came
    gone = sum(a.documents for flow in flows.values() for a in flow.dropped.values())
    counts = {**value["counts"], "read": read.documents, "dropped": gone}
    lines = [
        f"{settings.out}: {shown(counts['documents'])} documents, {bytes_shown(counts['bytes'])} of text, from "
        f"{shown(read.documents)} that were found"
        + (f" ({reused} of {total} units of work were done already)" if reused else "")
    ]
    dropped = sorted(
        ((a.documents, f"{step}: {why}") for step, f in flows.items() for why, a in f.dropped.items()),
        reverse=True,
    )
    lines += [f"left out: {shown(count)} x {why}" for count, why in dropped[:_REASONS]]
    if more := dropped[_REASONS:]:
        lines.append(f"left out: {shown(sum(count for count, _ in more))} more for {len(more)} other reasons")
    lines += [f"stays: {told}" for told in prepare_report.earlier_told(value["copies"])]
    lines += [
        f"cut: {shown(f.kept.characters - f.out.characters)} characters of lines that sites share, out of "
        f"{shown(f.changed)} documents"
        for f in (flows.get(boilerplate.NAME),)
        if f is not None and f.changed
    ]
    lines += [
        f"{source} is there {times:.2f} times" for source, times in sorted(value.get("mixture", {}).items())
    ]
    lines += [f"not read to its end, left out whole: {id}: {why}" for _, id, why in plan["failed"][:20]]
    lines += [
        f"what was left out and why: {run_folder(settings.out)}/errors.jsonl, langmill data why {settings.out} ID",
        f"report: {settings.out / 'report.html'}",
        f"next: langmill pretrain {settings.out / 'clean'} --out MODEL",
    ]
    extra = {"flows": value["flows"], "failed": plan["failed"], "units": {"total": total, "reused": reused}}
    return Report(settings.out, counts, text="\n".join(lines), extra=extra, ok=not plan["failed"])


def settings_of(out: Path, value: Mapping[str, Any]) -> PrepareSettings:
    """The settings that made a prepared folder."""
    return PrepareSettings(source=value["named"] or ["?"], out=out, **value["settings"])


def report(settings: PreparedSettings, *, quiet: bool = False) -> Report:
    """`langmill data report`: report.html and datasheet.md again, from the manifest and what the run folder holds."""
    out = settings.folder
    value = manifest(out)
    run = run_folder(out)
    folders = []
    if (run / "plan.json").is_file():
        plan = read_json(run / "plan.json", "prepare plan", VERSION)
        folders = [run / "units" / key for key in plan["units"] if (run / "units" / key).is_dir()]
    prepare_report.write(out, value, run, folders)
    return Report(out, dict(value["counts"]), text=f"{out / 'report.html'}\n{out / 'datasheet.md'}")


def why(settings: WhySettings, *, quiet: bool = False) -> Report:
    """`langmill data why`; see `jobs.why`."""
    from langmill.jobs.why import told

    return told(settings.folder, settings.id)
