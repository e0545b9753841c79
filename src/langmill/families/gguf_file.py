"""The GGUF container: header, metadata and tensors of one file, versions 2 and 3, little-endian.

A model file comes from a stranger, so nothing in it is believed: every count, length, dimension and
offset is held against the bytes that are there before anything is allocated or read.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import MissingExtra, ModelError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Far above any real file, low enough that a hostile one cannot fill the memory with small objects.
MAX_ENTRIES, MAX_TENSORS, MAX_STRINGS, MAX_NAME = 1 << 14, 1 << 17, 1 << 22, 1 << 10
SLICE = 1 << 18  # elements decoded at once: the working arrays stay in the processor's cache
SMALLEST_ENTRY, SMALLEST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` outermost first, `kind` its ggml type, `start` and `size` in bytes of the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class File:
    """A parsed file. metadata: numbers, strings, lists of strings or numpy arrays, by key."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: NDArray[np.uint8]

    def type_name(self, name: str) -> str:
        """How ggml calls the type of a tensor: Q4_K, F16 and so on."""
        known: str = _types()[0](self.tensors[name].kind).name
        return known

    def dequantize(self, name: str) -> NDArray[np.float32]:
        """One tensor as float32 in memory of its own; ModelError where the `gguf` package cannot decode its type."""
        from gguf.quants import dequantize

        info, (types, sizes) = self.tensors[name], _types()
        kind, (block, width) = types(info.kind), sizes[info.kind]
        raw, out = self.data[info.start : info.start + info.size], np.empty(info.shape, np.float32)
        flat, count = out.reshape(-1), max(1, SLICE // block)
        try:
            for index in range(0, len(raw) // width, count):
                part = raw[index * width : (index + count) * width]
                flat[index * block : (index + count) * block] = dequantize(part[None], kind)[0]
        except NotImplementedError as error:
            raise ModelError(
                f"{self.path}: tensor {name} has type {kind.name}, which cannot be decoded"
            ) from error
        return out


def read(path: Path) -> File:
    """Parse a file's header; its tensors stay on disk, memory-mapped.

    Raises ModelError naming the file, the field and what is wrong with it; MissingExtra without `gguf`.
    """
    sizes = _types()[1]
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    cursor = _Cursor(memoryview(mapped), path)
    tensor_count, entry_count = _header(cursor)
    metadata: dict[str, Any] = {}
    for index in range(entry_count):
        key = cursor.string(f"key {index} of the metadata", MAX_NAME)
        if key in metadata:
            raise cursor.error(f"the metadata key {key!r} occurs twice")
        metadata[key] = _value(cursor, key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.error(
            f"general.alignment is {alignment!r}; a power of two from 8 to {1 << 20} is needed"
        )
    infos = [_tensor(cursor, index, sizes, alignment) for index in range(tensor_count)]
    tensors = _place(cursor, infos, alignment)
    return File(path, metadata, tensors, np.frombuffer(mapped, np.uint8))


def rounded(path: Path) -> list[str]:
    """The types of a file's matrices that are not floats, the usual one first."""
    file = read(path)
    kinds = Counter(file.type_name(name) for name, info in file.tensors.items() if len(info.shape) > 1)
    return [kind for kind, _ in kinds.most_common() if kind not in ("F64", "F32", "F16", "BF16")]


def scalar(metadata: Mapping[str, Any], key: str, where: Path, default: Any = None) -> Any:
    """A number, truth value or string of the metadata; ModelError naming the key where it is a list."""
    value = metadata.get(key, default)
    if isinstance(value, list | np.ndarray):
        raise ModelError(f"{where}: {key} is a list of {len(value)}; one value is needed")
    return value


class _Cursor:
    """A position in the bytes that never passes their end."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def error(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: not a usable GGUF file: {what}")

    def left(self) -> int:
        return len(self.data) - self.at

    def need(self, count: int, what: str) -> None:
        if count > self.left():
            raise self.error(
                f"{what} needs {count} bytes at {self.at}, but {self.left()} are left (cut off?)"
            )

    def number(self, code: str, what: str) -> Any:
        width = struct.calcsize("<" + code)
        self.need(width, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += width
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        length: int = self.number("Q", f"the length of {what}")
        if limit is not None and length > limit:
            raise self.error(f"{what} is {length} bytes long; at most {limit} are allowed")
        self.need(length, what)
        raw = bytes(self.data[self.at : self.at + length])
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 ({error.reason} at byte {error.start})") from error

    def strings(self, count: int, key: str) -> list[str]:
        """Many strings quickly: a vocabulary and its merges have hundreds of thousands."""
        found, length_at, data, end = [], struct.Struct("<Q").unpack_from, self.data, len(self.data)
        for index in range(count):
            start = self.at + 8
            stop = start + length_at(data, self.at)[0] if start <= end else end + 1
            try:
                if stop > end:
                    raise ValueError
                found.append(str(data[start:stop], "utf-8"))
            except ValueError:  # go there slowly for the error's words
                self.string(f"{key}[{index}]")
            self.at = stop
        return found


def _types() -> tuple[Callable[[int], Any], dict[int, tuple[int, int]]]:
    """The type numbers of the `gguf` package, and by number the elements and bytes of a block."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise MissingExtra("gguf", "gguf") from error
    return GGMLQuantizationType, {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}


def _header(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of metadata entries."""
    cursor.need(24, "the header")
    if (magic := bytes(cursor.data[:4])) != b"GGUF":
        raise cursor.error(f"it begins with {magic!r}, not with b'GGUF'")
    cursor.at = 4
    version: int = cursor.number("I", "the version")
    if version not in (2, 3):
        if version & 0xFFFF == 0:
            raise cursor.error("it is big-endian; convert it to little-endian with gguf-convert-endian")
        raise cursor.error(f"its version is {version}; 2 and 3 are supported (1 must be converted again)")
    tensors: int = cursor.number("Q", "the number of tensors")
    entries: int = cursor.number("Q", "the number of metadata entries")
    for count, smallest, limit, what in (
        (entries, SMALLEST_ENTRY, MAX_ENTRIES, "metadata entries"),
        (tensors, SMALLEST_TENSOR, MAX_TENSORS, "tensors"),
    ):
        if count > min(limit, cursor.left() // smallest):
            raise cursor.error(f"it announces {count} {what}; its {len(cursor.data)} bytes cannot hold them")
    return tensors, entries


def _value(cursor: _Cursor, key: str) -> Any:
    kind: int = cursor.number("I", f"the type of {key}")
    if kind in SCALARS:
        return cursor.number(SCALARS[kind], key)
    if kind == STRING:
        return cursor.string(key)
    if kind != ARRAY:
        raise cursor.error(f"{key} has the unknown type {kind}")
    kind = cursor.number("I", f"the element type of {key}")
    count: int = cursor.number("Q", f"the length of {key}")
    if kind == STRING:
        if count > min(MAX_STRINGS, cursor.left() // 8):
            raise cursor.error(
                f"{key} announces {count} strings; {cursor.left()} bytes are left (limit {MAX_STRINGS})"
            )
        return cursor.strings(count, key)
    if kind not in SCALARS:
        raise cursor.error(f"{key} is an array of type {kind}; arrays of numbers or strings are supported")
    dtype = np.dtype("<" + SCALARS[kind]) if kind != 7 else np.dtype(np.uint8)
    cursor.need(count * dtype.itemsize, key)
    values = np.frombuffer(cursor.data, dtype, count, cursor.at).copy()
    cursor.at += values.nbytes
    return values


def _tensor(cursor: _Cursor, index: int, sizes: dict[int, tuple[int, int]], alignment: int) -> TensorInfo:
    """One tensor as the header describes it; `start` still counts from the data section's beginning."""
    name = cursor.string(f"the name of tensor {index}", MAX_NAME)
    rank: int = cursor.number("I", f"the rank of tensor {name}")
    if not 1 <= rank <= 4:
        raise cursor.error(f"tensor {name} has {rank} dimensions; 1 to 4 are allowed")
    shape = tuple(cursor.number("Q", f"the shape of tensor {name}") for _ in range(rank))
    kind: int = cursor.number("I", f"the type of tensor {name}")
    start: int = cursor.number("Q", f"the offset of tensor {name}")
    if kind not in sizes:
        raise cursor.error(
            f"tensor {name} has type {kind}, which is unknown or was withdrawn; convert the model again"
        )
    block, width = sizes[kind]
    if not all(shape) or shape[0] % block:
        raise cursor.error(
            f"tensor {name} has shape {shape[::-1]}; its type needs rows of a multiple of {block}"
        )
    count = 1
    for dim in shape:
        count *= dim
    if start % alignment:
        raise cursor.error(
            f"tensor {name} starts at {start}, which is not a multiple of the alignment {alignment}"
        )
    return TensorInfo(name, shape[::-1], kind, start, count // block * width)


def _place(cursor: _Cursor, infos: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """The tensors by name, after a look that they lie inside the file and apart from each other."""
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    end, before = base, "the header"
    for info in sorted(infos, key=lambda info: info.start):
        placed = TensorInfo(info.name, info.shape, info.kind, base + info.start, info.size)
        if info.name in tensors:
            raise cursor.error(f"tensor {info.name} occurs twice")
        if placed.start < end:
            raise cursor.error(
                f"tensor {info.name} at byte {placed.start} overlaps {before}, which ends at {end}"
            )
        end, before = placed.start + placed.size, f"tensor {info.name}"
        if end > len(cursor.data):
            raise cursor.error(f"{before} ends at byte {end}, but the file has {len(cursor.data)} (cut off?)")
        tensors[info.name] = placed
    return tensors
