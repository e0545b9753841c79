"""Reading: what an encoder (or any model, read once) says of texts, without a place wasted on padding.

Documents stand end to end in one row, and attention stays inside each; so a pass costs what its tokens cost, however
unequal the texts are. K documents, T tokens of one, D width, C scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from langmill.common.errors import ModelError
from langmill.families.folder import Model
from langmill.model.config import Pool
from langmill.model.pool import pooled
from langmill.model.transformer import Transformer
from langmill.text.frames import Encoded

Floats = NDArray[np.float32]
PASS_TOKENS = (
    2048  # in one pass: more gains nothing on a CPU, and the attention mask of a GPU grows with its square
)
T = TypeVar("T")


def document_scores(model: Model, documents: Iterable[Encoded]) -> Iterator[Floats]:
    """(C,) raw scores of each document, in order: a head that pools."""
    network = checked(model, pools=True)

    def scores(h_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        return network.logits(network.pooled(h_BTD, documents_BT))

    for logits_KC, _ in _read(network, documents, scores):
        yield from logits_KC


def token_scores(model: Model, documents: Iterable[Encoded]) -> Iterator[Floats]:
    """(T, C) raw scores of each document's tokens, in order: a head that does not pool."""
    network = checked(model, pools=False)
    for logits_BTC, sizes in _read(network, documents, lambda h_BTD, _: network.logits(h_BTD)):
        yield from np.split(logits_BTC[0], np.cumsum(sizes)[:-1])


def embeddings(
    model: Model, documents: Iterable[Encoded], pool: Pool = "mean", normalise: bool = True
) -> Iterator[Floats]:
    """(D,) of each document, in order: its tokens' last states as `pool` says, of length 1 where `normalise`."""
    network = checked(model, pools=None)

    def vectors(h_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        x_KD = pooled(h_BTD, documents_BT, pool).float()
        return F.normalize(x_KD, dim=-1) if normalise else x_KD

    for x_KD, _ in _read(network, documents, vectors):
        yield from x_KD


def passes(documents: Iterable[Encoded], tokens: int = PASS_TOKENS) -> Iterator[list[Encoded]]:
    """Documents in order, as many at once as have at most `tokens` together, one at least."""
    group: list[Encoded] = []
    size = 0
    for document in documents:
        if group and size + len(document.ids) > tokens:
            yield group
            group, size = [], 0
        group.append(document)
        size += len(document.ids)
    if group:
        yield group


def packed(
    model: Transformer, documents: Iterable[Encoded]
) -> Iterator[tuple[list[Encoded], dict[str, Any]]]:
    """The documents of each pass, and what `model.hidden` takes of them: one row, in which they stand end to end.

    ModelError where a text has no token, or more than the model reads.
    """
    place, typed = model.main.like.device, model.main.types is not None
    for group in passes(documents):
        sizes = [len(document.ids) for document in group]
        fitting(sizes, model.config.length)
        numbers = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
        given: dict[str, Any] = {
            "tokens_BT": torch.tensor([[id for document in group for id in document.ids]], device=place),
            "documents_BT": torch.from_numpy(numbers)[None].to(place),
        }
        if typed:
            kinds = [kind for document in group for kind in document.types]
            given["types_BT"] = torch.tensor([kinds], device=place)
        yield group, given


def _read(
    model: Transformer, documents: Iterable[Encoded], make: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[tuple[Floats, list[int]]]:
    """`make` of the states and document numbers of each pass, and the documents' sizes."""
    for group, given in packed(model, documents):
        with torch.inference_mode():
            made = make(model.hidden(**given), given["documents_BT"])
        yield made.float().cpu().numpy(), [len(document.ids) for document in group]


def fitting(sizes: Sequence[int], most: int) -> None:
    """ModelError where a text has no token, or more than the model reads."""
    if not all(0 < size <= most for size in sizes):
        raise ModelError(
            f"a text has {max(sizes)} tokens, special ones included, and the model reads 1 to {most}"
        )


def checked(model: Model, pools: bool | None) -> Transformer:
    """The model, if it is a Transformer that reads texts by itself and whose head pools or not as is needed."""
    whole = isinstance(model, Transformer) and pools and model.config.rereads
    if not isinstance(model, Transformer) or (len(model.config.stacks) > 1 and not whole):
        raise ModelError("this model cannot score texts: an encoder or a decoder alone is needed")
    head = model.config.head
    if pools is not None and (head is None or (head.pool is not None) != pools):
        what = "whole texts" if pools else "single tokens"
        raise ModelError(
            f"this model gives no scores of {what}: teach it with langmill finetune --task first"
        )
    return model
