"""`langmill data forget`: documents leave a prepared folder for good, and stay away when it is prepared again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from langmill.common.errors import UsageError
from langmill.common.files import claimed, read_json
from langmill.common.metrics import Report
from langmill.common.settings import ForgetSettings
from langmill.data.forgotten import key_of, known_as, load, purge, save
from langmill.data.units import kept_batches
from langmill.jobs.prepare import VERSION, compose, manifest, settings_of
from langmill.jobs.prepare_steps import recipe
from langmill.jobs.report import shown
from langmill.jobs.why import check_complete, found_in, full

_FILES = ("lineage.json", "shards.json")


def run(settings: ForgetSettings, *, quiet: bool = False) -> Report:
    """Remove documents from the clean set, the units and what the report shows; name the models that saw them.

    What was removed is recorded by keyed hashes of id and text. UsageError where nothing is named, or nothing found.
    """
    out = settings.folder
    value = manifest(out)
    check_complete(out)
    with claimed(out, resume=True, resumable=True) as folder:
        plan = read_json(folder / "plan.json", "prepare plan", VERSION)
        key, known = key_of(folder), load(folder)
        if not settings.id and not settings.match and not known["begun"]:
            raise UsageError("say what to forget: --id ID or --match TEXT")
        ids, texts = _named(settings, folder, plan)
        if not ids and not known["begun"]:
            raise UsageError(f"nothing in {out} is called or holds that: nothing was removed")
        hashes = set(known["hashes"]) | {known_as(key, name) for name in (*ids, *texts)}
        save(folder, hashes, begun=True)
        made = settings_of(out, value)
        recipe_ = recipe(made, folder)
        removed = sum(purge(folder / "units" / unit, hashes, key, recipe_.shape) for unit in plan["units"])
        saw = _saw(folder, key, ids)
        compose(made, folder, recipe_, quiet, empty=True)
        save(folder, hashes, begun=False)
    roots = settings.models or [out.absolute().parent]
    models = sorted({where for root in roots for where in _trained(root, saw)})
    lines = [f"{out}: {shown(removed)} documents removed; they stay away when it is prepared again"]
    lines += [f"made with them, remove or make again: {model}" for model in models]
    lines.append("their sources still hold them: remove them there too")
    return Report(
        out,
        {"removed": removed, "models": len(models)},
        text="\n".join(lines),
        extra={"models": models, "versions": saw},
    )


def _named(settings: ForgetSettings, run: Path, plan: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Ids and whole texts of the documents that are meant."""
    ids: set[str] = set()
    texts: set[str] = set()
    for asked in settings.id:
        ids |= {row["id"] for row in found_in(run, plan, full(asked))}
    batches = [run / "units" / key for key in plan["units"]]
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


def _saw(run: Path, key: bytes, ids: Sequence[str] | set[str]) -> list[str]:
    """Hashes of the manifests whose clean sets held one of the documents."""
    wanted = np.array([int(known_as(key, name)[:16], 16) for name in ids], np.uint64)
    found = []
    for file in sorted((run / "versions").glob("*.npy")):
        held = np.load(file, mmap_mode="r", allow_pickle=False)
        if np.isin(wanted, held).any():
            found.append(file.stem)
    return found


def _trained(root: Path, versions: Sequence[str]) -> Iterator[str]:
    """Folders under `root` whose lineage.json or shards.json names one of the clean sets."""
    if not versions:
        return
    for name in _FILES:
        for file in root.rglob(name):
            text = file.read_text(encoding="utf-8", errors="replace")
            if file.is_file() and any(version in text for version in versions):
                yield file.parent.as_posix()
