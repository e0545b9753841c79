"""SentencePiece's model files (Kudo and Richardson 2018), as tokenizers of the unigram kind (Kudo 2018).

Such a file is a protocol buffer: the pieces with their scores, and how a text is prepared. `read` takes it apart,
`unigram` makes the same cuts with the library that all our tokenizers run on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from langmill.common.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM = 1
MOST = 64 << 20  # bytes of a file; the largest vocabularies, of 250,000 pieces, have 5 MB
SPACE = "\u2581"
LETTER = 10.0  # SentencePiece's penalty, below the rarest piece, of a character that no piece stands for
PROBE = "".join(map(chr, (*range(1, 0x250), *range(0x3000, 0x3100), *range(0xFF00, 0xFFF0))))
HIDDEN = "\U0010fffe"  # behind a piece that no text is to be cut into; no character of any text


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a file says: scores are logarithms of shares, `types` as above; `charsmap` replaces characters, None leaves
    them; with `spelt` what no piece stands for is spelt in bytes."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    charsmap: bytes | None
    spelt: bool


def read(file: Path) -> Pieces:
    """A file's pieces. ModelError where it is none, is damaged, or asks for what is not done here."""
    if (size := file.stat().st_size) > MOST:
        raise ModelError(f"{file} has {size:,} bytes; at most {MOST:,} are read of a list of pieces")
    try:
        return _read(file.read_bytes())
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is no SentencePiece model that can be read: {error}") from None


def _read(data: bytes) -> Pieces:
    pieces, scores, types = [], [], []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(_bytes(value)))
            pieces.append(_bytes(piece.get(1, b"")).decode("utf-8"))
            [score] = np.frombuffer(_bytes(piece.get(2, bytes(4))), "<f4")
            scores.append(float(str(score)))  # few digits: more of them change when they are written
            types.append(int(piece.get(3, NORMAL)))
        elif field == 2:
            trainer = dict(_fields(_bytes(value)))
        elif field == 3:
            normalizer = dict(_fields(_bytes(value)))
    if NORMAL not in types or not np.isfinite(scores).all():
        raise ValueError("it holds no pieces, or one without a score")
    if len(set(pieces)) < len(pieces):
        raise ValueError("a piece stands in it twice")
    if trainer.get(3, UNIGRAM) != UNIGRAM:
        raise ValueError("its pieces are not of the unigram kind")
    if trainer.get(24, 0) or not all(normalizer.get(field, 1) for field in (3, 4, 5)):
        raise ValueError(
            "its texts do not begin with a space, keep double spaces or mark spaces in another way"
        )
    charsmap = _bytes(normalizer.get(2, b"")) or None
    if charsmap is not None:
        try:
            normalizers.Precompiled(charsmap).normalize_str(PROBE)
        except BaseException as error:  # the library raises plain Exception, and panics with what is none
            if isinstance(error, Exception) or "Panic" in type(error).__name__:
                raise ValueError(f"its table of characters is damaged: {error}") from None
            raise
    return Pieces(pieces, scores, types, charsmap, bool(trainer.get(35, 0)))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message of protocol buffers: numbers as they are, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"at byte {at} is no field")
        if at + size > len(data):
            raise ValueError(f"it ends before {at + size:,} bytes")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at] if at < len(data) else -1
        if byte < 0:
            raise ValueError(f"it ends at byte {at:,}")
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError(f"at byte {at:,} is no number")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"{value} stands where a text is due")
    return value


def unigram(
    own: Pieces, vocab: Sequence[str], special: Collection[str | None], unknown: str | None
) -> Backend:
    """A tokenizer whose ids are places in `vocab`, and which cuts texts as these pieces do.

    special: entries that a text may be cut into although they are not among the pieces. All others that are not, such
    as another language's, are read and written, but no text is cut into them, except that a character which no piece
    stands for is its own entry where the vocabulary has one, as transformers' MarianTokenizer has it. (A run of such
    characters is one unknown token there.) A piece that the vocabulary lacks is not used: SentencePiece would give the
    unknown token, and here smaller pieces stand for it. Characters are replaced with their marks as one, so that a
    letter with a rare mark may come out otherwise than there.
    """
    kinds = dict(zip(own.pieces, own.types, strict=True))
    scores = {
        piece: score for piece, score in zip(own.pieces, own.scores, strict=True) if kinds[piece] == NORMAL
    }
    least, most = min(scores.values()), max(scores.values())
    for piece, kind in kinds.items():
        if kind == USER_DEFINED:  # it is not to be cut: so much better than any pieces of it
            scores[piece] = len(piece.encode()) * most - 0.1
    entries = []
    for piece in vocab:
        letter = piece not in kinds and len(piece) == 1
        shown = letter or piece in scores or piece in special or kinds.get(piece) == BYTE
        score = scores.get(piece, least if piece in special else least - LETTER)
        entries.append((piece if shown else piece + HIDDEN, score))
    place = vocab.index(unknown) if unknown in vocab else None
    backend = Backend(models.Unigram(entries, place, byte_fallback=own.spelt))
    spaces = normalizers.Replace(Regex(f"[ {SPACE}]+"), " ")
    ends = normalizers.Replace(Regex("^ | $"), "")
    mapped = [] if own.charsmap is None else [normalizers.Precompiled(own.charsmap)]
    backend.normalizer = normalizers.Sequence([*mapped, spaces, ends])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=False)
    spaced = decoders.Metaspace(SPACE, prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.Replace(HIDDEN, ""), decoders.ByteFallback(), spaced])
    return backend
