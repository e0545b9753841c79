"""Translation: a text and its translation as ids, and documents in pieces that a model can read.

A document is cut at line breaks, a line that is too long at the ends of its sentences, then at lesser marks, at spaces,
and at last anywhere. What stands between the pieces is kept and comes back as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import regex
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from langmill.common.errors import DataError
from langmill.text.frames import Encoded
from langmill.text.tasks import Limit, TooLong
from langmill.text.tokenizer import Tokenizer

_CLOSING = r"[\p{Pe}\p{Pf}\"'”’»」』】）]*"
# A full stop ends a sentence before a space; the marks of Chinese, Japanese and the Indic scripts do so anywhere.
_STOP = regex.compile(rf"[.!?…؟۔।]+{_CLOSING}(?=\s)|[。！？｡．।॥။۔]+{_CLOSING}")
# But not behind a letter ("J. Weiß", "z. B."), a title ("Dr. Weiß") or an ordinal ("am 3. Mai"), nor before a small
# letter ("etc. and so on"). A stop too many tears a sentence apart, one too few only makes a longer piece.
_TITLES = "Mr Mrs Ms Dr Prof St Sr Sra Srta Dra Mme Mlle Hr Fr Frl Nr No Nos Vol Fig Abb Tab Bd vs pp Art Abs"
_OPEN = rf"(?<!\b(?:\p{{L}}|\d{{1,2}}|{_TITLES.replace(' ', '|')}))"
_SENTENCE = regex.compile(
    rf"(?:{_OPEN}\.|[!?…؟۔।])[.!?…؟۔]*{_CLOSING}(?=\s+(?!\p{{Ll}})|\s*$)|[。！？｡．।॥။]+{_CLOSING}"
)
_CLAUSE = regex.compile(rf"[,;:،؛](?=\s){_CLOSING}|[，；：、]{_CLOSING}|\s[–—-](?=\s)")
_SPACE = regex.compile(r"(?=\s)(?<!\s)")
_LINE = regex.compile(r"[^\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")
# Scripts, with their marks, that put no space between sentences.
_CLOSE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\u3000-\u303f\uff00-\uffef]")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a document to translate, and the white space before it. The `text` of the last one may be empty, and
    so is its translation."""

    before: str
    text: str


def encode_source(
    tokenizer: Tokenizer, text: str, limit: Limit, counted: Counter[str], number: int = 0
) -> Encoded:
    """What the encoder reads: the text in its frame, with eos behind it. TooLong, or cut under "truncate".

    "window" makes no sense of one text's translation and counts as "error": `split_document` first.
    """
    return _closed(tokenizer, text, limit, counted, number, f"source {number + 1}")


def encode_target(
    tokenizer: Tokenizer, text: str, limit: Limit, counted: Counter[str], number: int = 0
) -> list[int]:
    """What the decoder learns to write, the id that it starts from not included: the text in its frame with eos behind.

    A frame that begins with what ends a text (as where bos is eos) begins without it here: it would be read as the end.
    """
    ids = _closed(tokenizer.target, text, limit, counted, number, f"target {number + 1}").ids
    return ids[1:] if len(ids) > 1 and ids[0] == ids[-1] else ids


def _closed(
    tokenizer: Tokenizer, text: str, limit: Limit, counted: Counter[str], number: int, what: str
) -> Encoded:
    end, room = source_room(tokenizer, limit.length)
    ids = tokenizer.encode(text)
    if not ids:
        raise DataError(f"{what} is empty: it gives no token")
    if len(ids) > room and limit.policy != "truncate":
        raise TooLong(limit.says(len(ids), room, what, "truncate"))
    encoded = tokenizer.frame.one(ids[: limit.cuts(len(ids), room, what, counted)[0][1]], number)
    return Encoded([*encoded.ids, *end], [*encoded.types, *(0 for _ in end)], encoded.first, range(0), number)


def source_room(tokenizer: Tokenizer, length: int) -> tuple[list[int], int]:
    """(what is put behind a framed text, how many tokens of a text fit into a document of `length`): eos stands behind
    every text, once."""
    eos = tokenizer.boundary_id if tokenizer.eos_id is None else tokenizer.eos_id
    end = [] if tokenizer.frame.single.ids[-1][-1:] == (eos,) else [eos]
    return end, length - tokenizer.frame.room() - len(end)


def closed(tokenizer: Tokenizer) -> Tokenizer:
    """The same with eos behind every text in its own frame, so that other tools give the encoder what it learnt on."""
    end, _ = source_room(tokenizer, 0)
    if not end and tokenizer.frame.stated:
        return tokenizer
    before, after = tokenizer.frame.single.ids[0], tokenizer.frame.single.ids[-1]
    named = [[(str(tokenizer.token(id)), id) for id in ids] for ids in (before, [*after, *end])]
    spelt = [" ".join(f"{token}:0" for token, _ in own) for own in named]
    backend = Backend.from_str(tokenizer.to_json())
    single, second = f"{spelt[0]} $A:0 {spelt[1]}".strip(), f"$B:0 {spelt[1]}"
    backend.post_processor = TemplateProcessing(single, f"{single} {second}", named[0] + named[1])
    return Tokenizer(backend, tokenizer.specials)


def split_document(tokenizer: Tokenizer, text: str, length: int, sentences: bool = False) -> list[Piece]:
    """The pieces of a document, each of which `encode_source` fits into `length` tokens; with `sentences` one sentence
    each. `join_document(pieces, [their texts])` is the document again."""
    _, room = source_room(tokenizer, length)
    if room < 1:
        raise TooLong(f"a document of {length} tokens has no room for text beside the special ones")

    pieces, before = [], ""
    for part in _lines(text):
        for found in _cut(tokenizer, part, room, sentences):
            held = found.lstrip()
            before += found[: len(found) - len(held)]
            if held:
                bare = held.rstrip()
                pieces.append(Piece(before, bare))
                before = held[len(bare) :]
    return [*pieces, Piece(before, "")] if before or not pieces else pieces


def join_document(pieces: Sequence[Piece], translations: Sequence[str]) -> str:
    """The translations of the pieces with the document's line breaks, blank lines and spaces between them.

    Within a line a space is added or taken out where one of the two languages puts it between sentences and the other
    does not.
    """
    text, left = "", ""
    for piece, translation in zip(pieces, translations, strict=True):
        before = piece.before
        if left and piece.text and text and translation:
            joint, was = (text[-1], translation[0]), (left[-1], piece.text[0])
            if before == " " and _close(joint) and not _close(was):
                before = ""
            elif not before and _close(was) and not _close(joint):
                before = " "
        text += before + translation
        left = piece.text
    return text


def _close(neighbours: tuple[str, str]) -> bool:
    return all(_CLOSE.match(character) for character in neighbours)


def _lines(text: str) -> Iterator[str]:
    """Lines and what is between them, in turn."""
    at = 0
    for found in _LINE.finditer(text):
        if found.start() > at:
            yield text[at : found.start()]
        yield found[0]
        at = found.end()
    if at < len(text):
        yield text[at:]


def _cut(tokenizer: Tokenizer, line: str, room: int, sentences: bool) -> Iterator[str]:
    """Parts of a line, or of what is between two, that fit and join to it."""
    if not line.strip() or (not sentences and len(tokenizer.encode(line.strip())) <= room):
        yield line
    else:
        yield from _at_marks(tokenizer, line, room, (_SENTENCE, _STOP, _CLAUSE, _SPACE), sentences)


def _at_marks(
    tokenizer: Tokenizer, text: str, room: int, marks: Sequence[regex.Pattern[str]], apart: bool = False
) -> Iterator[str]:
    """The same of a text that is too long, cut at the first of `marks` that does; apart: at every one of these."""
    parts = list(_at(marks[0], text))
    if len(parts) == 1 and len(marks) > 1 and not apart:
        yield from _at_marks(tokenizer, text, room, marks[1:])
        return
    lengths = [len(ids) for ids in tokenizer.encode_batch(parts)]
    joined = parts if apart else _packed(parts, lengths, room)
    for part in joined:
        if len(tokenizer.encode(part.strip())) <= room:
            yield part
        elif len(marks) > 1:
            yield from _at_marks(tokenizer, part, room, marks[1:])
        else:
            yield from _anywhere(tokenizer, part, room)


def _at(mark: regex.Pattern[str], text: str) -> Iterator[str]:
    """The parts of a text, each of which ends with the mark."""
    at = 0
    for found in mark.finditer(text):
        if found.end() > at:
            yield text[at : found.end()]
            at = found.end()
    if at < len(text):
        yield text[at:]


def _packed(parts: Sequence[str], lengths: Sequence[int], room: int) -> Iterator[str]:
    """Neighbours joined for as long as their tokens together fit."""
    held, used = "", 0
    for part, length in zip(parts, lengths, strict=True):
        if held and used + length > room:
            yield held
            held, used = "", 0
        held, used = held + part, used + length
    if held:
        yield held


def _anywhere(tokenizer: Tokenizer, text: str, room: int) -> Iterator[str]:
    """A word that is too long, between characters, by where its tokens end: those of a long stretch at a time."""
    while text:
        stretch, at, token, whole = text[: 64 * room], 0, 0, True
        offsets = tokenizer.encode_with_offsets(stretch)[1]
        while whole and at < len(stretch) and (at == 0 or token + room < len(offsets)):
            size = offsets[token + room - 1][1] - at if token + room < len(offsets) else len(stretch)
            size = max(1, size)
            while size > 1 and len(tokenizer.encode(stretch[at : at + size].strip())) > room:
                size, whole = size - 1 - size // 16, False  # cut here, what follows has other tokens
            yield stretch[at : at + size]
            at, token = at + size, token + room
        text = text[at:]
