"""How benchmarks state what they measured, and hand rows to commands."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HUBLESS = {**os.environ, "HF_HUB_OFFLINE": "1"}  # the environment of a peer's process


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Least, median and greatest of what was measured, rounded."""
    chosen = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, digits) for name, value in chosen.items()}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON, a row a line."""
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def said(command: Iterable[object]) -> dict[str, Any]:
    """The JSON object that a peer's process prints as its last line; it asks no hub."""
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, check=True, text=True, env=HUBLESS)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
