"""The GGUF container, written: header, metadata, where each tensor lies, the tensors. gguf_file.py reads it."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import MissingExtra
from langmill.families.gguf_file import ARRAY, STRING

VERSION, ALIGNMENT = 3, 32
_UINT32, _INT32, _FLOAT32, _BOOL = 4, 5, 6, 7


@dataclass(frozen=True)
class Slot:
    """What the header says of one tensor: its name, its shape (outermost first) and the name of its ggml type."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def size(self) -> int:
        """Bytes of its data."""
        _, block, width = _known(self.kind)
        return int(np.prod(self.shape, dtype=np.int64)) // block * width


def write(
    path: Path, metadata: Mapping[str, Any], slots: Sequence[Slot], data: Iterable[NDArray[Any]]
) -> None:
    """Write a file whole or not at all. data: the bytes of each of `slots`, in order, taken one at a time.

    metadata: truth values, whole numbers (uint32), floats (float32), strings, and lists of whole numbers (int32),
    floats or strings. MissingExtra without `gguf`, which knows the types.
    """
    head = [struct.pack("<4sIQQ", b"GGUF", VERSION, len(slots), len(metadata))]
    head += [_string(key) + _value(value) for key, value in metadata.items()]
    start = 0
    for slot in slots:
        shape = struct.pack(f"<I{len(slot.shape)}Q", len(slot.shape), *slot.shape[::-1])
        head.append(_string(slot.name) + shape + struct.pack("<IQ", _known(slot.kind)[0], start))
        start += slot.size + _missing(slot.size)
    with _whole(path) as file:
        file.write(b"".join(head))
        file.write(bytes(_missing(file.tell())))
        for slot, values in zip(slots, data, strict=True):
            if values.nbytes != slot.size:
                raise ValueError(f"{slot.name} has {values.nbytes} bytes, and {slot.size} are announced")
            file.write(np.ascontiguousarray(values).data)
            file.write(bytes(_missing(slot.size)))


def _known(kind: str) -> tuple[int, int, int]:
    """The number of a ggml type, and the numbers and bytes of one of its blocks."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise MissingExtra("gguf", "gguf") from error
    block, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(GGMLQuantizationType[kind]), int(block), int(width)


def _missing(size: int) -> int:
    """How many bytes follow so that the next thing is aligned."""
    return -size % ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """The type and the bytes of one entry."""
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + _string(value)
    first = value[0] if value else ""
    if isinstance(first, str):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    kind, code = (_INT32, "i") if isinstance(first, int) else (_FLOAT32, "f")
    return struct.pack(f"<IIQ{len(value)}{code}", ARRAY, kind, len(value), *value)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that becomes `path`, flushed to the disk, when the block ends well, and else goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    try:
        with open(fresh, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
