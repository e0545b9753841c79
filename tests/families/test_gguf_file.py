"""The GGUF container: every type decodes as the `gguf` package decodes it; hostile files end in one sentence."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from langmill.common.errors import ModelError  # noqa: E402
from langmill.families.gguf import load_gguf  # noqa: E402
from langmill.families.gguf_file import read  # noqa: E402

Types = gguf.GGMLQuantizationType


def dequantised(kind: Any, raw: np.ndarray) -> np.ndarray | None:
    try:
        with np.errstate(all="ignore"):
            return gguf.quants.dequantize(raw, kind)  # type: ignore[no-any-return]
    except NotImplementedError:
        return None


@pytest.mark.parametrize("kind", list(Types), ids=lambda kind: kind.name)
def test_every_type_decodes_as_the_package_does(kind: Any, tmp_path: Path) -> None:
    block, width = gguf.GGML_QUANT_SIZES[kind]
    values = np.random.default_rng(0).standard_normal(
        (70, 40 * block), dtype=np.float32
    )  # more than one slice
    try:
        raw = gguf.quants.quantize(values, kind).view(np.uint8).reshape(70, -1)
        close = kind not in (Types.TQ1_0, Types.TQ2_0, Types.MXFP4, Types.NVFP4)
    except NotImplementedError:  # read only: any bytes will do
        raw, close = np.random.default_rng(1).integers(0, 256, (70, 40 * width), dtype=np.uint8), False
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", np.ascontiguousarray(raw), raw_dtype=kind)
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
    file, expected = read(tmp_path / "x.gguf"), dequantised(kind, raw)
    if expected is None:
        with pytest.raises(ModelError, match=f"tensor x has type {kind.name}"):
            file.dequantize("x")
        return
    with np.errstate(all="ignore"):
        found = file.dequantize("x")
    assert found.shape == (70, 40 * block) and found.flags.writeable and found.flags.owndata
    assert np.array_equal(found, expected, equal_nan=True)
    assert not close or np.abs(found - values).max() < 0.6


# Hostile files


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, dims: Sequence[int] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", dim) for dim in dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def raw(*parts: bytes, tensors: int = 0, entries: int = 0, version: int = 3, data: int = 64) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts)
    return head + bytes(-len(head) % 32) + bytes(data)


HOSTILE = {
    "empty": (b"", "the header needs 24 bytes"),
    "other": (b"PK\3\4" + bytes(99), "begins with"),
    "version 1": (raw(version=1), "its version is 1"),
    "big-endian": (raw(version=3 << 24), "big-endian"),
    "2^60 tensors": (raw(tensors=1 << 60), "announces 1152921504606846976 tensors"),
    "2^60 entries": (raw(entries=1 << 60), "announces 1152921504606846976 metadata entries"),
    "long key": (raw(struct.pack("<Q", 1 << 62), entries=1), "key 0 of the metadata is 4611686018427387904 bytes long"),
    "long string": (raw(entry("a", 8, struct.pack("<Q", 1 << 50)), entries=1), "a needs 1125899906842624 bytes"),
    "long array": (raw(entry("a", 9, struct.pack("<IQ", 4, 1 << 61)), entries=1), "a needs"),
    "long list": (raw(entry("a", 9, struct.pack("<IQ", 8, 1 << 40)), entries=1), "a announces 1099511627776 strings"),
    "list cut off": (raw(entry("a", 9, struct.pack("<IQQ", 8, 5, 99)), entries=1), "a[0] needs 99 bytes"),
    "nested array": (raw(entry("a", 9, struct.pack("<IQ", 9, 1)), entries=1), "a is an array of type 9"),
    "unknown kind": (raw(entry("a", 99, b""), entries=1), "a has the unknown type 99"),
    "key twice": (raw(entry("a", 0, b"1"), entry("a", 0, b"1"), entries=2), "the metadata key 'a' occurs twice"),
    "not UTF-8": (raw(entry("a", 8, struct.pack("<Q", 2) + b"\xff\xfe"), entries=1), "a is not UTF-8"),
    "alignment 0": (raw(entry("general.alignment", 4, bytes(4)), entries=1), "general.alignment is 0"),
    "alignment 48": (raw(entry("general.alignment", 4, struct.pack("<I", 48)), entries=1), "general.alignment is 48"),
    "no dimension": (raw(info("t", ()), tensors=1), "tensor t has 0 dimensions"),
    "2^32 dimensions": (raw(text("t") + struct.pack("<I", 2**32 - 1) + bytes(40), tensors=1), "4294967295 dimensions"),
    "zero dimension": (raw(info("t", (0,)), tensors=1), "tensor t has shape (0,)"),
    "huge dimensions": (raw(info("t", (1 << 40, 1 << 40)), tensors=1), "tensor t ends at byte"),
    "withdrawn type": (raw(info("t", kind=4), tensors=1), "tensor t has type 4"),
    "partial block": (raw(info("t", (33,), kind=2), tensors=1), "needs rows of a multiple of 32"),
    "offset beyond": (raw(info("t", offset=1 << 60), tensors=1), "(cut off?)"),
    "unaligned": (raw(info("t", offset=8), tensors=1), "not a multiple of the alignment 32"),
    "tensor twice": (raw(info("t"), info("t", offset=32), tensors=2), "tensor t occurs twice"),
    "overlap": (raw(info("t", (16,)), info("u", offset=32), tensors=2), "u at byte 128 overlaps tensor t"),
    "data cut off": (raw(info("t"), tensors=1, data=8), "tensor t ends at byte"),
    "no architecture": (raw(), "general.architecture is None; supported are llama, qwen2, qwen3, gpt2"),
    "a list of them": (
        raw(entry("general.architecture", 9, struct.pack("<IQ", 8, 1) + text("llama")), entries=1),
        "general.architecture is a list of 1",
    ),
    "another one": (raw(entry("general.architecture", 8, text("mamba")), entries=1), "'mamba'; supported are llama"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_sentence(name: str, tmp_path: Path) -> None:
    content, words = HOSTILE[name]
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_gguf(tmp_path / "bad.gguf")
    assert words in str(caught.value) and "bad.gguf" in str(caught.value)
