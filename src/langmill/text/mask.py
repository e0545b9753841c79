"""Masks in a text: each stands for one token that a model is to guess, and is written [MASK] or as the model spells it.

Masked language models: Devlin et al. 2018 (arXiv:1810.04805), section 3.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import regex

from langmill.common.errors import DataError, ModelError
from langmill.text.frames import Encoded
from langmill.text.tag import UNSPACED
from langmill.text.tasks import TooLong
from langmill.text.tokenizer import Tokenizer

_CLOSE = regex.compile(f"[{UNSPACED}]")
SPELT = "[MASK]"  # for every model; RoBERTa's own is <mask>


class Masks:
    """Texts with masks as ids, and with something in the masks' places. ModelError for a tokenizer without a mask."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.mask_id is None:
            raise ModelError(
                "its tokenizer names no mask token, so it cannot be asked what a mask stands for"
            )
        self._tokenizer, self.id = tokenizer, tokenizer.mask_id
        self.own = tokenizer.token(self.id) or SPELT
        self._mark = re.compile("|".join(map(re.escape, {self.own, SPELT})))
        content = json.loads(tokenizer.to_json())
        added: dict[str, Any] = next((one for one in content["added_tokens"] if one["id"] == self.id), {})
        self._strips = bool(added.get("lstrip")), bool(added.get("rstrip"))
        self._continues = content["model"].get("continuing_subword_prefix") or ""

    def parts(self, text: str) -> list[str]:
        """What stands before, between and after the masks: one part alone where there is no mask."""
        return self._mark.split(text)

    def encode(self, text: str, length: int, what: str) -> Encoded:
        """The document of a text, `id` in each mask's place; nothing else in it becomes a control token.

        DataError where the text has no mask, TooLong where it has more than `length` tokens; both begin with `what`.
        """
        parts = self.parts(text)
        if len(parts) == 1:
            both = f"{SPELT} or {self.own}" if self.own != SPELT else SPELT
            raise DataError(f"{what} has no mask: write {both} where a word is to be guessed")
        left, right = self._strips  # white space that belongs to the mask, and so to the word that it hides
        bare = [part.rstrip() if left else part for part in parts[:-1]] + parts[-1:]
        bare = bare[:1] + [part.lstrip() if right else part for part in bare[1:]]
        ids: list[int] = []
        for number, own in enumerate(self._tokenizer.encode_batch(bare)):
            ids += [self.id] * (number > 0) + own
        encoded = self._tokenizer.frame.one(ids)
        if len(encoded.ids) > length:
            raise TooLong(
                f"{what} has {len(encoded.ids)} tokens with the special ones, and the model reads {length}: shorten it"
            )
        return encoded

    def filled(self, text: str, ids: Sequence[int]) -> str:
        """The text with a token in each mask's place. A token that goes on with a word, as "##ing" does, is joined to
        what stands before the mask; of two spaces, the text's and the token's own, one stays."""
        first, *rest = self.parts(text)
        made = first
        for id, after in zip(ids, rest, strict=True):
            shown, spelled = (
                self._tokenizer.decode([id], skip_specials=False),
                self._tokenizer.token(id) or "",
            )
            goes_on = bool(self._continues) and spelled.startswith(self._continues)
            spaced = shown[:1].isspace() or spelled.startswith(
                "▁"
            )  # a lone SentencePiece token is shown without
            if goes_on or (self._strips[0] and not spaced):
                made = made.rstrip(" ") + shown.removeprefix(self._continues)
            else:
                # in WordPiece a token without "##" begins a word
                apart = spaced or bool(self._continues and _letters(made[-1:], shown[:1]))
                between = " " if apart and made and not made[-1].isspace() else ""
                made += between + (shown.lstrip(" ") if spaced else shown)
            made += after
        return made


def _letters(*neighbours: str) -> bool:
    """Whether both are letters or digits of scripts with spaces between words."""
    return all(one.isalnum() and not _CLOSE.match(one) for one in neighbours)
