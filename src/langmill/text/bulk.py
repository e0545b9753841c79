"""Encode many texts at once: gigatoken where it gives the same ids, else Hugging Face's encoder.

gigatoken is optional (extra: data) and knows the usual byte-level BPE and SentencePiece tokenizers only.
So it must prove itself: it is built from the tokenizer's own file and compared with the reference on the
first texts of each run; where it is missing, cannot be built or differs, `note` says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import DataError

if TYPE_CHECKING:
    from langmill.text.tokenizer import Tokenizer

Ids = NDArray[np.uint32]
Offsets = NDArray[np.int64]

_PROBE = 1 << 20  # bytes of real text on which the two encoders are compared
_SLICE = 1 << 20  # bytes for one call of the reference
# What breaks encoders: specials as text, runs of every kind, marks, controls, all planes of Unicode.
_HARD = (
    "<|endoftext|><|im_start|>user\n</s><s>[CLS] [SEP]<unk>",
    "  a\tb\r\n\r\n \n c  \x00\x04\x1f\x85\u2028 \u3000 1234567890 3.14 don't DON'T e\u0301\u0301 \u0301",
    "你好，世界。مرحبا بالعالم שלום हिन्दी में 한국어 ไทย \U0001f600\U0001f469\u200d\U0001f467 \ufffd\U0010ffff",
    "=" * 70 + " " * 70 + "a" * 70,
    "",
)


class BulkEncoder:
    """The bulk encoder of one tokenizer; `name` and `note` say which it is and why."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._unproven = _PROBE
        self._fast, self.note = _gigatoken(tokenizer)
        if self._fast is not None:
            self._compare([text.encode("utf-8") for text in _HARD])

    @property
    def name(self) -> str:
        return "tokenizers" if self._fast is None else "gigatoken"

    def encode(self, texts: list[bytes]) -> tuple[Ids, Offsets]:
        """The ids of UTF-8 texts, end to end, and the n + 1 offsets between them (ids[o[i]:o[i + 1]]).

        The ids of each text are those of `tokenizer.encode`: no specials added, none taken from the text.
        DataError where a text is not UTF-8.
        """
        if self._fast is not None and self._unproven > 0:
            probe = next(_slices(texts, self._unproven), [])
            self._unproven -= sum(map(len, probe))
            self._compare(probe)
        if self._fast is None:
            return self._slow(texts)
        return _flat(self._fast.encode_batch(texts)) if texts else _rows([])

    def _slow(self, texts: list[bytes]) -> tuple[Ids, Offsets]:
        """The reference, a slice at a time: it takes about 400 bytes of memory for each token."""
        rows: list[Ids] = []
        try:
            for part in _slices(texts, _SLICE):
                encoded = self._tokenizer.encode_batch([text.decode("utf-8") for text in part])
                rows += [np.array(ids, dtype=np.uint32) for ids in encoded]
        except UnicodeDecodeError as error:
            raise DataError(f"a text is not UTF-8: {error}") from None
        return _rows(rows)

    def _compare(self, texts: list[bytes]) -> None:
        (ids, offsets), (fast, bounds) = self._slow(texts), _flat(self._fast.encode_batch(texts))
        if not (np.array_equal(ids, fast) and np.array_equal(offsets, bounds)):
            self._fast = None
            self.note = "gigatoken gives other ids for this tokenizer: using tokenizers, which is slower"


def _gigatoken(tokenizer: Tokenizer) -> tuple[Any, str]:
    try:
        import gigatoken
    except ImportError:
        install = 'pip install "langmill[data]"'
        return None, f"gigatoken is not installed ({install}): using tokenizers, which is slower"
    content = json.loads(tokenizer.to_json())
    content["added_tokens"] = [added for added in content["added_tokens"] if not added["special"]]
    try:
        return gigatoken.Tokenizer.from_json(json.dumps(content)), "gigatoken, checked against tokenizers"
    except Exception as error:  # whatever it cannot read, the reference can
        reason = str(error).partition("\n")[0]
        return None, f"gigatoken cannot read this tokenizer ({reason}): using tokenizers, which is slower"


def _flat(rows: Any) -> tuple[Ids, Offsets]:
    """The two arrays inside the awkward array that gigatoken gives."""
    offsets = np.asarray(rows.layout.offsets.data, dtype=np.int64)
    ids = np.asarray(rows.layout.content.data, dtype=np.uint32)
    return ids[offsets[0] : offsets[-1]], offsets - offsets[0]


def _rows(rows: list[Ids]) -> tuple[Ids, Offsets]:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.concatenate([np.zeros(0, dtype=np.uint32), *rows]), offsets


def _slices(texts: list[bytes], size: int) -> Iterator[list[bytes]]:
    """Consecutive stretches of `texts`, each closed by the text that brings it to `size` bytes."""
    part: list[bytes] = []
    held = 0
    for text in texts:
        part.append(text)
        held += len(text)
        if held >= size:
            yield part
            part, held = [], 0
    if part:
        yield part
