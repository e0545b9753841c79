"""Values and tables as other tools write and read them: JSON that all can read, and what parts the cells of a table."""

from __future__ import annotations

import base64
import csv
import datetime
import json
import math
from collections.abc import Sequence
from typing import Any


def plain(value: Any) -> Any:
    """The value as JSON can say it: numbers that are none (NaN, infinity) as null, dates and times in ISO 8601, bytes
    in base64, and what else JSON has no word for (decimals, UUIDs, spans of time) as its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def json_line(value: Any) -> str:
    """The value as one line of JSON, with null for a number that is none, which JSON does not know."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(plain(value), ensure_ascii=False)


def delimiter(head: str, wanted: Sequence[str]) -> str:
    """What stands between the names of columns: with it most of those wanted are found, then most of all."""
    found = {mark: next(csv.reader([head], delimiter=mark), []) for mark in ",;\t"}
    return max(found, key=lambda mark: (len(set(wanted) & set(found[mark])), len(found[mark])))
