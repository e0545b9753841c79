"""`langmill data forget`: documents leave a prepared folder for good, and stay away when it is prepared again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from langmill.common.errors import LangmillError, UsageError
from langmill.common.files import Lock, claimed, read_json, run_folder, run_lock, sha256
from langmill.common.metrics import Report
from langmill.common.settings import ForgetSettings
from langmill.data.clean import OVER_ALL
from langmill.data.forgotten import in_shards, key_of, known_as, load, purge, save, shard_known_as
from langmill.data.shards import Shards
from langmill.data.units import READ, kept_batches
from langmill.data.withdrawn import cleared, withdraw
from langmill.jobs.prepare import VERSION, compose, manifest, settings_of
from langmill.jobs.prepare_steps import shape
from langmill.jobs.prepared import LINEAGE, MANIFEST, SHARDS, named_in
from langmill.jobs.report import shown
from langmill.jobs.why import check_complete, found_in, full
from langmill.text.document import text_hash

MODEL_RUN = "and its .run folder"
_SHOWN = 20  # ids that a preview prints


def run(settings: ForgetSettings, *, quiet: bool = False) -> Report:
    """Remove documents from the clean set, the units, what the report shows and the shards made of it; name the models
    that saw them.

    What was removed is recorded by keyed hashes of id and text. UsageError where nothing is named, or nothing found,
    or shards are in use.
    """
    out = settings.folder
    _check(settings)
    with claimed(out, resume=True, resumable=True) as folder:
        _, now, known, key = _chosen(settings, folder)
        plan, value = read_json(folder / "plan.json", "prepare plan", VERSION), manifest(out)
        made = settings_of(out, value)
        hashes = set(known["hashes"]) | now
        save(folder, hashes, now)
        removed = sum(purge(folder / "units" / unit, hashes, key, shape(made)) for unit in plan["units"])
        saw = _saw(folder, now)
        compose(made, folder, [step for step in value["steps"] if step not in OVER_ALL], quiet, empty=True)
        roots = settings.models or [out.absolute().parent]
        touched, others = _reshard(out, roots, saw, hashes, key)
        save(folder, hashes, set())
    lines = [f"{out}: {shown(removed)} documents removed; they stay away when it is prepared again"]
    lines += [f"{shown(count)} removed from the shards {where}" for where, count in touched.items()]
    return _report(settings, removed, lines, saw, touched, others)


def preview(settings: ForgetSettings, *, quiet: bool = False) -> Report:
    """What `run` would remove, which shards it would change and which models saw it; nothing is changed. Errors as
    those of `run`."""
    out = settings.folder
    _check(settings)
    with run_lock(out):  # so that no run changes meanwhile what is read
        folder = run_folder(out)
        ids, now, known, key = _chosen(settings, folder)
        saw = _saw(folder, now)
        roots = settings.models or [out.absolute().parent]
        touched, others = _reshard(out, roots, saw, set(known["hashes"]) | now, key, dry=True)
    lines = [
        f"{out}: {shown(len(ids))} documents would be removed, and stay away when it is prepared again; so far none is"
    ]
    lines += [f"  {id}" for id in sorted(ids)[:_SHOWN]]
    lines += [f"  and {shown(len(ids) - _SHOWN)} more (--json names all)"] if len(ids) > _SHOWN else []
    lines += (
        [f"a removal that did not end is ended first: {shown(len(known['begun']))} hashes"]
        if known["begun"]
        else []
    )
    lines += [f"{shown(count)} would be removed from the shards {where}" for where, count in touched.items()]
    report = _report(settings, len(ids), lines, saw, touched, others)
    return replace(report, extra={"dry_run": True, "ids": sorted(ids), **report.extra})


def _check(settings: ForgetSettings) -> None:
    manifest(settings.folder)
    check_complete(settings.folder)
    if not all(wanted.strip() for wanted in settings.match):
        raise UsageError("an empty --match is in every text: nothing was removed")


def _chosen(settings: ForgetSettings, folder: Path) -> tuple[set[str], set[str], dict[str, Any], bytes]:
    """(ids of the documents that are meant, hashes of their ids and texts, what was forgotten before, the run's key).

    UsageError where nothing is named, or nothing found.
    """
    out, plan = settings.folder, read_json(folder / "plan.json", "prepare plan", VERSION)
    key, known = key_of(folder), load(folder)
    if not settings.id and not settings.match and not known["begun"]:
        raise UsageError("say what to forget: --id ID or --match TEXT")
    ids, texts = _named(settings, folder, plan)
    if not ids and not known["begun"]:
        told = f"nothing in {out} is called or holds that: nothing was removed"
        if settings.match and settings_of(out, manifest(out)).redact.policy != "none":
            told += " (personal details were replaced before: match what stands around them)"
        raise UsageError(told)
    now = {known_as(key, name) for name in (*ids, *texts)}
    now |= {shard_known_as(key, text_hash(text)) for text in texts} | set(known["begun"])
    return ids, now | _texts(folder, now), known, key


def _report(
    settings: ForgetSettings,
    removed: int,
    lines: list[str],
    saw: list[str],
    touched: dict[str, int],
    others: list[str],
) -> Report:
    """The report, with the models that saw what goes."""
    out = settings.folder
    roots = settings.models or [out.absolute().parent]
    models = sorted({where for root in roots for where in _trained(root, saw)})
    lines += [f"made with them, remove or make again: {model} ({MODEL_RUN})" for model in models]
    lines += [f"shards that were not made from {out}, and hold the same text: {where}" for where in others]
    lines.append("their sources still hold them: remove them there too")
    return Report(
        out,
        {"removed": removed, "models": len(models), "shards": len(touched)},
        text="\n".join(lines),
        extra={"models": models, "shards": touched, "others": others, "versions": saw},
    )


def _reshard(
    out: Path, roots: Sequence[Path], saw: Sequence[str], hashes: set[str], key: bytes, dry: bool = False
) -> tuple[dict[str, int], list[str]]:
    """Take documents out of the shards that were made from `out`: how many of which. And other shards that hold some.
    dry: count alone.

    UsageError where a run is writing shards: the removal stays begun, and the same command ends it.
    """
    touched, others, version = {}, [], sha256(out / MANIFEST)
    for root in () if dry else roots:
        cleared(root)
    for file in sorted({file.absolute() for root in roots for file in root.rglob(SHARDS)}):
        folder, named = file.parent, set(named_in(file))
        try:
            with nullcontext() if dry else _held(folder):
                gone_D = in_shards(Shards.open(folder, verify=False).hashes, hashes, key)
                if gone_D.any() and named & set(saw):
                    if not dry:
                        withdraw(folder, gone_D, [*(named - set(saw)), version])
                    touched[folder.as_posix()] = int(gone_D.sum())
                elif gone_D.any():
                    others.append(folder.as_posix())
        except LangmillError as error:
            if not named & set(saw):
                others.append(f"{folder.as_posix()} (perhaps: {error})")
                continue
            raise UsageError(
                f"{folder} keeps what was to go: {error}; then end this with langmill data forget {out}"
            ) from None
    return touched, others


def _held(shards: Path) -> AbstractContextManager[object]:
    """The lock of the run that made shards: of `data shards`, or of the training whose run folder they lie in."""
    run = shards.parent if shards.parent.suffix == ".run" else run_folder(shards)
    return Lock(run / "lock") if run.is_dir() else nullcontext()


def _named(settings: ForgetSettings, run: Path, plan: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Ids and whole texts of the documents that are meant."""
    ids: set[str] = set()
    texts: set[str] = set()
    for asked in settings.id:
        ids |= {row["id"] for row in found_in(run, plan, full(asked))}
    batches = [run / "units" / key for key in plan["units"]]
    for folder in batches if settings.match else ():  # what is still shown of others
        for row in pq.read_table(folder / "dropped.parquet", columns=["id", "dropped", "text"]).to_pylist():
            text = row["text"] or ""
            if row["dropped"].startswith(f"{READ}: "):  # before it stands what is wrong with it
                text = text.partition(": ")[2]
            ids |= {row["id"]} if any(wanted in text for wanted in settings.match) else set()
    for batch in (b for folder in batches for b in kept_batches(folder, ["id", "text"])):
        for wanted in settings.match:
            ids |= set(batch["id"].filter(pc.match_substring(batch["text"], wanted)).to_pylist())
        texts |= set(
            batch["text"].filter(pc.is_in(batch["id"], pa.array(sorted(ids), pa.string()))).to_pylist()
        )
    same = pa.array(sorted(texts), pa.large_string())
    for batch in (
        b for folder in batches for b in kept_batches(folder, ["id", "text"])
    ):  # copies under other ids
        ids |= set(batch["id"].filter(pc.is_in(batch["text"], same)).to_pylist())
    return ids, texts


def _texts(run: Path, ids: set[str]) -> set[str]:
    """What shards know the texts of documents by, in each version that had other texts of them than the units have."""
    found: set[str] = set()
    wanted = pa.array(sorted(ids), pa.string())
    for file in sorted((run / "versions").glob("*.parquet")):
        table = pq.read_table(file)
        found |= set(table["text"].filter(pc.is_in(table["id"], wanted)).to_pylist())
    return found


def _saw(run: Path, hashes: Iterable[str]) -> list[str]:
    """Hashes of the manifests whose clean sets held one of the documents, known as `hashes`."""
    wanted = np.array([int(hash[:16], 16) for hash in hashes], np.uint64)
    found = []
    for file in sorted((run / "versions").glob("*.npy")):
        held = np.load(file, mmap_mode="r", allow_pickle=False)
        if np.isin(wanted, held).any():
            found.append(file.stem)
    return found


def _trained(root: Path, versions: Sequence[str]) -> Iterator[str]:
    """Folders under `root` whose lineage.json names one of the clean sets."""
    for file in root.rglob(LINEAGE) if versions else ():
        if set(named_in(file)) & set(versions):
            yield file.parent.as_posix()
