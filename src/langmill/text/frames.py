"""What stands around one text or two before a model reads them: [CLS] a [SEP], <s> a </s></s> b </s>, a </s>.

It is what the tokenizer.json's post-processor adds, found by asking it once. Where that adds nothing, the tokenizer's
bos (if it adds one) stands before and its end of text behind each text; and two texts that the file would join with
nothing between them are parted by the end of text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as Backend

from langmill.common.errors import ModelError

if TYPE_CHECKING:
    from langmill.text.tokenizer import Tokenizer

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document as a model reads it.

    ids, types: the tokens and their segments (0 or 1). first, second: where the texts stand in `ids`, the second one
    empty where there is but one. number: the text among those encoded together, of which this may be one window.
    """

    ids: list[int]
    types: list[int]
    first: range
    second: range
    number: int = 0


@dataclass(frozen=True, slots=True)
class Around:
    """Special ids before, between and after the texts with their types, and the type of each text."""

    ids: tuple[Ids, ...]
    types: tuple[Ids, ...]
    text_types: Ids

    def put(self, texts: Sequence[Sequence[int]], number: int) -> Encoded:
        """The texts with it around them."""
        ids, types, places = list(self.ids[0]), list(self.types[0]), []
        for text, kind, after, after_types in zip(
            texts, self.text_types, self.ids[1:], self.types[1:], strict=True
        ):
            places.append(range(len(ids), len(ids) + len(text)))
            ids += [*text, *after]
            types += [kind] * len(text) + list(after_types)
        first, *second = places
        return Encoded(ids, types, first, second[0] if second else range(0), number)

    @property
    def room(self) -> int:
        """How many ids it adds."""
        return sum(map(len, self.ids))


@dataclass(frozen=True, slots=True)
class Frame:
    """What a tokenizer puts around one text and around two; `stated`: its file says so."""

    single: Around
    pair: Around
    stated: bool = True

    def one(self, ids: Sequence[int], number: int = 0) -> Encoded:
        """One text, given as ids without specials."""
        return self.single.put([ids], number)

    def two(self, first: Sequence[int], second: Sequence[int], number: int = 0) -> Encoded:
        """Two texts."""
        return self.pair.put([first, second], number)

    def room(self, pair: bool = False) -> int:
        """How many ids it adds to one text, or to two."""
        return self.pair.room if pair else self.single.room


def frame_of(tokenizer: Tokenizer) -> Frame:
    """The frame of a tokenizer; ModelError where its post-processor is damaged or puts the second text first."""
    processor = json.loads(tokenizer.to_json()).get("post_processor")
    single, pair = _asked(processor, 1), _asked(processor, 2)
    if not single.room and not pair.room:
        return _plain(tokenizer)
    if not pair.ids[1]:
        ids, types = (
            (pair.ids[0], (tokenizer.boundary_id,), pair.ids[2]),
            (pair.types[0], (0,), pair.types[2]),
        )
        pair = replace(pair, ids=ids, types=types)
    return Frame(single, pair)


def _plain(tokenizer: Tokenizer) -> Frame:
    bos = (tokenizer.bos_id,) if tokenizer.specials.add_bos and tokenizer.bos_id is not None else ()
    end = (tokenizer.boundary_id if tokenizer.eos_id is None else tokenizer.eos_id,)
    zeros = (0,) * len(bos)
    return Frame(
        Around((bos, end), (zeros, (0,)), (0,)),
        Around((bos, end, end), (zeros, (0,), (1,)), (0, 1)),
        stated=False,
    )


def _asked(processor: Any, texts: int) -> Around:
    """What a post-processor does to one text or two of one token each, which a vocabulary of that token alone gives."""
    vocabulary = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    probe = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder"))
    probe |= {"version": "1.0", "added_tokens": [], "model": vocabulary, "post_processor": processor}
    try:
        found = Backend.from_str(json.dumps(probe)).encode("a", "a" if texts == 2 else None)
    except BaseException as error:  # where the file has holes the library panics, with what is no Exception
        if isinstance(error, Exception) or "Panic" in type(error).__name__:
            raise ModelError(f"the tokenizer's post-processor is damaged: {error}") from None
        raise
    cuts = [place for place, text in enumerate(found.sequence_ids) if text is not None]
    if [found.sequence_ids[place] for place in cuts] != list(range(texts)):
        raise ModelError("the tokenizer's post-processor leaves a text out, or puts the second one first")
    edges = zip([0, *(cut + 1 for cut in cuts)], [*cuts, len(found.ids)], strict=True)
    runs = [slice(*edge) for edge in edges]
    return Around(
        tuple(tuple(found.ids[run]) for run in runs),
        tuple(tuple(found.type_ids[run]) for run in runs),
        tuple(found.type_ids[cut] for cut in cuts),
    )
