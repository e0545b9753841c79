"""Text from ids that come one at a time: the same text that the whole decodes to, and no character in pieces."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from langmill.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a byte-level vocabulary's tokens spell bytes."""

    replaced: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, decoder: Mapping[str, Any]) -> Self | None:
        """From a tokenizer.json's decoder; None where it is not byte-level."""
        *before, last = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        if not last or last.get("type") != "ByteLevel":
            return None
        if any(step["type"] != "Replace" or "String" not in step["pattern"] for step in before):
            return None
        return cls(tuple((step["pattern"]["String"], step["content"]) for step in before))

    def bytes_of(self, token: str) -> bytes:
        """What a token stands for."""
        for old, new in self.replaced:
            token = token.replace(old, new)
        try:
            return bytes(_BYTES[letter] for letter in token)
        except KeyError:  # an added token that is not spelt in the byte alphabet
            return token.encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, the rest follow from U+0100."""
    same = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in same]
    return {chr(b): b for b in same} | {chr(0x100 + i): b for i, b in enumerate(rest)}


_BYTES: Mapping[str, int] = _byte_alphabet()


class TextStream:
    """Text from ids that come one at a time. The pieces and `flush` join to `decode` of all the ids.

    Byte-level vocabularies are decoded exactly. Others are decoded in a window that starts one piece back,
    so that spacing comes out right; bytes that turn out not to be UTF-8 may there differ in the number of
    U+FFFD. A piece never ends inside a character, and nothing invalid is held for more than `HELD` tokens.
    """

    HELD = 8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._read = 0  # ids before this have been given out

    def push(self, id: int) -> str:
        """The text that this id completes; empty while a character is incomplete."""
        spelling, token = self._tokenizer.spelling, self._tokenizer.token(id)
        if id in self._tokenizer.special_ids or token is None:
            return ""
        if spelling:
            return self._utf8.decode(spelling.bytes_of(token))
        self._ids.append(id)
        text = self._new()
        if text.endswith("\ufffd") and len(self._ids) - self._read <= self.HELD:
            return ""
        return self._give(text)

    def flush(self) -> str:
        """What is still held; the stream is then as new."""
        if self._tokenizer.spelling:
            return self._utf8.decode(b"", final=True)
        text = self._give(self._new())
        self._ids, self._read = [], 0
        return text

    def _new(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._read])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
        return text
