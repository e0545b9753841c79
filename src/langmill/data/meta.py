"""What steps say of a document: one more key in its meta, which is a JSON object as text."""

from __future__ import annotations

import json
from typing import Any


def told(meta: str, key: str, value: Any) -> str:
    """The meta with a key; one that is there is replaced."""
    said = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if f'"{key}"' in meta:
        return json.dumps(json.loads(meta) | {key: value}, ensure_ascii=False)
    return f'{{"{key}":{said}}}' if meta == "{}" else f'{meta[:-1]},"{key}":{said}}}'
