"""Which versions of a clean set something was made of, known by the SHA-256 of their manifests.

They go from a prepared folder into shards.json and lineage.json, so that `data forget` finds what saw a document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from langmill.common.files import sha256

MANIFEST, SHARDS, LINEAGE = "manifest.json", "shards.json", "lineage.json"


def prepared(given: Sequence[str | Path], parent: str | Path | None = None) -> list[str]:
    """Of paths: prepared folders, their clean/ and files in it, shards made of them. parent: a model that saw some."""
    found: set[str] = set()
    for path in (Path(place).absolute() for place in given):
        near = [place / MANIFEST for place in (path, *list(path.parents)[:2])]
        found |= {sha256(file) for file in near if file.is_file()}
        found |= set(named_in(path / SHARDS))
    if parent is not None:
        found |= set(named_in(Path(parent) / LINEAGE))
    return sorted(found)


def named_in(file: Path) -> list[str]:
    """The versions that a shards.json or a lineage.json names; none where it is not there or not ours."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in _lists(value) if isinstance(name, str)]


def _lists(value: Any) -> Iterator[Any]:
    for place in (value, value.get("data") if isinstance(value, dict) else None):
        if isinstance(place, dict) and isinstance(place.get("prepared"), list):
            yield from place["prepared"]
