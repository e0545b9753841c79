"""Log-probabilities of written tokens in OpenAI's two forms: chat's list of tokens with bytes, completions' columns."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

from langmill.infer.request import Likely
from langmill.text.tokenizer import Tokenizer

LEAST = -9999.0  # stands for a token that cannot come, since JSON knows no infinity
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Tokenizer, id: int) -> bytes:
    """What a token adds to a text; of a control token its spelling."""
    token = tokenizer.token(id)
    if token is None:
        return b""
    if id in tokenizer.special_ids:
        return token.encode("utf-8")
    if tokenizer.spelling is not None:
        return tokenizer.spelling.bytes_of(token)
    if match := _BYTE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("\u2581", " ").encode("utf-8")


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """The same as text; bytes that are no whole character as U+FFFD."""
    return token_bytes(tokenizer, id).decode("utf-8", "replace")


def without_end(
    stops: frozenset[int], ids: Sequence[int], likely: Sequence[Likely]
) -> tuple[Sequence[int], Sequence[Likely]]:
    """The tokens that are told: an id that ended the text, one of `stops`, is not part of it."""
    ends = bool(ids) and ids[-1] in stops
    return (ids[:-1], likely[:-1]) if ends else (ids, likely)


def as_chat(tokenizer: Tokenizer, ids: Sequence[int], likely: Sequence[Likely]) -> list[dict[str, Any]]:
    """Chat's `logprobs.content`."""
    return [
        {**_one(tokenizer, id, one.log), "top_logprobs": [_one(tokenizer, *pair) for pair in one.top]}
        for id, one in zip(ids, likely, strict=True)
    ]


class Offsets:
    """Where each token begins in the text, in characters; bytes that are no whole character yet count for none."""

    def __init__(self, start: int = 0) -> None:
        self.at = start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, spelt: bytes) -> int:
        """The place of the token that is spelt so; the next one stands behind it."""
        place = self.at
        self.at += len(self._utf8.decode(spelt))
        return place


def as_completion(
    tokenizer: Tokenizer, ids: Sequence[int], likely: Sequence[Likely | None], offsets: Offsets
) -> dict[str, Any]:
    """Completions' `logprobs`; None of a token that nothing stands before."""
    hidden = tokenizer.special_ids
    return {
        "tokens": [token_text(tokenizer, id) for id in ids],
        "token_logprobs": [None if one is None else _number(one.log) for one in likely],
        "top_logprobs": [
            None
            if one is None
            else {token_text(tokenizer, id): _number(log) for id, log in reversed(one.top)}
            for one in likely
        ],
        "text_offset": [offsets.next(b"" if id in hidden else token_bytes(tokenizer, id)) for id in ids],
    }


def _one(tokenizer: Tokenizer, id: int, log: float) -> dict[str, Any]:
    spelt = token_bytes(tokenizer, id)
    return {"token": spelt.decode("utf-8", "replace"), "logprob": _number(log), "bytes": list(spelt)}


def _number(log: float) -> float:
    return max(log, LEAST)
