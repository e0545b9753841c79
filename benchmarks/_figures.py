"""How benchmarks state what they measured, and hand rows to commands."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Least, median and greatest of what was measured, rounded."""
    chosen = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, digits) for name, value in chosen.items()}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON, a row a line."""
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
