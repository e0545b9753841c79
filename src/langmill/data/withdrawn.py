"""Token shards that lose documents: the folder is written anew, and a reader meets the old one or the new, whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.files import atomic_folder, write_json
from langmill.data.shards import FORMAT, ROW, VERSION, File, Shards


def withdraw(folder: Path, gone_D: NDArray[np.bool_], prepared: Sequence[str]) -> None:
    """Take the documents D that are marked out of `folder`: tokens, index, ids, counts.

    prepared: the manifests that shards.json names from now on. Token files that lose nothing are linked, not copied;
    one that loses all is gone. Where no document stays the folder is removed, since shards hold at least one.
    """
    shards = Shards.open(folder, verify=False)
    if gone_D.all():
        del shards  # an open map cannot be deleted everywhere
        folder.replace(_old(folder))
        shutil.rmtree(_old(folder))
        return
    with atomic_folder(folder, replace=True) as fresh:
        value = _lessened(shards, gone_D, fresh) | {"prepared": sorted(prepared)}
        write_json(fresh / "shards.json", shards.manifest | value, FORMAT, VERSION)
        ours = {"shards.json", *(entry["name"] for entry in shards.manifest["files"])}
        for file in folder.iterdir():  # the tokenizer
            if file.name not in ours:
                shutil.copy2(file, fresh / file.name)
        del shards


def cleared(root: Path) -> None:
    """Under `root`, end what a killed `withdraw` began: what it left of old shards goes, or is put back."""
    for old in sorted(root.rglob(".*.old")):
        folder = old.with_name(old.name[1 : -len(".old")])
        if (old / "shards.json").is_file() and not folder.exists():
            old.replace(folder)
        elif (old / "shards.json").is_file() or any(old.glob("tokens-*.bin")):
            shutil.rmtree(old)


def _old(folder: Path) -> Path:
    """Where `atomic_folder` puts what it replaces."""
    return folder.with_name(f".{folder.name}.old")


def _lessened(shards: Shards, gone_D: NDArray[np.bool_], fresh: Path) -> dict[str, Any]:
    """Write the files; what is new in shards.json."""
    index, names = File(fresh / "index.bin"), File(fresh / "ids.jsonl")
    before = {entry["name"]: entry for entry in shards.manifest["files"]}
    files, parts = [], []
    first = tokens = documents = size = 0
    with open(shards.folder / "ids.jsonl", "rb") as ids:
        for part in shards.manifest["shards"]:
            stay = first + np.flatnonzero(~gone_D[first : first + part["documents"]])
            first += part["documents"]
            if not len(stay):
                continue
            lengths, starts = shards.lengths(stay), shards.index["id"]
            rows: NDArray[Any] = shards.index[stay]
            widths = starts[stay + 1] - starts[stay]
            rows["start"] = tokens + np.cumsum(lengths) - lengths
            rows["id"] = names.size + np.cumsum(widths) - widths
            index.write(rows.tobytes())
            for run in np.split(stay, np.flatnonzero(np.diff(stay) > 1) + 1):
                ids.seek(int(starts[run[0]]))
                names.write(ids.read(int(starts[run[-1] + 1] - starts[run[0]])))
            whole = len(stay) == part["documents"]
            entry = before[part["name"]]
            files.append(
                _linked(shards, entry, fresh) if whole else _copied(shards, stay, fresh / part["name"])
            )
            count = int(lengths.sum())
            parts.append({"name": part["name"], "documents": len(stay), "tokens": count, "start": tokens})
            tokens, documents = tokens + count, documents + len(stay)
            size += int(rows["bytes"].sum(dtype=np.int64))
    index.write(np.array([(tokens, names.size, 0, 0)], dtype=ROW).tobytes())
    removed = shards.manifest.get("removed", 0) + shards.documents - documents
    counts = {"documents": documents, "tokens": tokens, "bytes": size, "removed": removed}
    return counts | {"shards": parts, "files": [*files, index.close(), names.close()]}


def _linked(shards: Shards, entry: dict[str, Any], fresh: Path) -> dict[str, Any]:
    try:
        os.link(shards.folder / entry["name"], fresh / entry["name"])
    except OSError:  # a file system without links
        shutil.copy2(shards.folder / entry["name"], fresh / entry["name"])
    return entry


def _copied(shards: Shards, stay: NDArray[np.int64], path: Path) -> dict[str, Any]:
    file = File(path)
    for document in stay.tolist():
        file.write(shards.tokens_of(document).tobytes())
    return file.close()
