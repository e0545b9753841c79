"""Bytes of files, compressed or not, in bounded memory; damage is met where it stands, not passed over."""

from __future__ import annotations

import codecs
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from langmill.common.errors import MissingExtra

COMPRESSED = (".gz", ".zst")
CHUNK = 1 << 20
FEW_ZEROS = 10  # text holds at most one zero byte in so many
BROKEN = (OSError,)  # what reading a damaged or unreadable file raises


def lost(file: Path, begun: bool) -> int:
    """Bytes to count for a file that cannot be read on: all of it, or 0 where it has begun, since nobody knows how long
    the rest is."""
    return 0 if begun or not file.exists() else file.stat().st_size


def open_bytes(file: Path) -> io.BufferedReader:
    """The file's bytes, decompressed where its name says so; reading raises one of BROKEN at damage."""
    name = file.name.lower()
    if name.endswith(".gz"):
        return io.BufferedReader(_Decompressed(file, lambda: zlib.decompressobj(31), zlib.error), CHUNK)
    if name.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise MissingExtra("data", "zstandard") from None
        new = zstandard.ZstdDecompressor().decompressobj
        return io.BufferedReader(_Decompressed(file, new, zstandard.ZstdError), CHUNK)
    return io.BufferedReader(io.FileIO(file), CHUNK)


def lines(stream: io.BufferedReader, limit: int) -> Iterator[tuple[int, bytes | None, int]]:
    """(number from 1, line, its size); None for a line of more than `limit` bytes, which is passed over."""
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        size = len(line)
        if size <= limit:
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, size
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(CHUNK)
            size += len(line)
        yield number, None, size


def no_text(head: bytes) -> str:
    """Why a file that begins so is not UTF-8 although its bytes may look like it; "" where nothing says so."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it is UTF-16: save it as UTF-8"
    if head.count(0) * FEW_ZEROS > len(head):
        return "many of its bytes are zero: it is UTF-16 without a mark (save it as UTF-8), or no text at all"
    return ""


def first_bad_byte(stream: io.BufferedReader) -> int | None:
    """Where the bytes stop being UTF-8; None where they never do."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    place = pending = 0
    while data := stream.read1(CHUNK):
        try:
            decoder.decode(data)
        except UnicodeDecodeError as error:
            return place - pending + error.start
        place += len(data)
        pending = len(decoder.getstate()[0])
    return place - pending if pending else None


class _Decompressed(io.RawIOBase):
    """A compressed file's frames, end to end.

    The packages' own readers lose what stands just before damage (gzip) or take a file that is cut short
    for whole (zstandard); this one gives every byte there is, then raises.
    """

    _INPUT = 1024  # bytes at a time: one can stand for 32 KiB of output, and memory must stay bounded
    _OUTPUT = 1 << 16

    def __init__(self, file: Path, new_frame: Callable[[], Any], error: type[Exception]) -> None:
        self._file = open(file, "rb")
        self._new_frame, self._error = new_frame, error
        self._frame: Any = None
        self._input = self._output = b""
        self._damage: OSError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while len(self._output) < self._OUTPUT and not self._damage and self._more():
            pass
        if self._damage and not self._output:
            raise self._damage
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size

    def _more(self) -> bool:
        """Decompress a little; False at the end of the file."""
        data = self._input or self._file.read(self._INPUT)
        if not data:
            self._damage = OSError("the compressed file ends in the middle") if self._frame else None
            return False
        if self._frame is None:
            data = data.lstrip(b"\0")  # frames may be padded; none starts with a zero
            if not data:
                self._input = b""
                return True
            self._frame = self._new_frame()
        try:
            self._output += self._frame.decompress(data)
        except self._error as error:
            self._damage = OSError(str(error))
            return False
        self._input = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
