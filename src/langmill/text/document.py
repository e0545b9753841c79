"""The one record that all data passes through."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from.

    `id` is unique within a run (file, then row or byte offset); `text` holds no lone surrogates;
    `source` is the top-level file or folder that the user named, by which counts are kept.
    """

    id: str
    text: str
    source: str
    meta: dict[str, Any] = field(default_factory=dict)


def text_hash(text: str | bytes) -> int:
    """64-bit BLAKE2b of the text's UTF-8 bytes: equal for equal texts, everywhere and always.

    It decides which documents are held out, so equal texts never stand on both sides.
    """
    data = text.encode("utf-8") if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
