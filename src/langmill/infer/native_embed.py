"""Vectors of texts in 8 bits, by native.cpp: the texts of a pass stand end to end, and no place is read that is empty.

K texts, N tokens of a pass, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from langmill.families.folder import Model
from langmill.infer.native import LANES, NativeRunner, refusal
from langmill.infer.read import checked, fitting
from langmill.model.config import Pool
from langmill.model.layers import ROUNDED, Int8Linear, LoRA
from langmill.model.replace import replace
from langmill.text.frames import Frame

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
PASS_TOKENS = 1024  # what is between two layers stays near the core; more gains nothing


def eight_bits(model: Model) -> list[str]:
    """Round every plain linear layer to 8 bits, in place, a step for each output; the names of those.

    Adapters are merged first. Embeddings and norms stay as they are, and so do layers that are rounded already.
    """

    def want(name: str, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear | LoRA) and not name.endswith(".base")

    def make(_: str, layer: nn.Module) -> nn.Module:
        assert isinstance(layer, nn.Linear | LoRA)
        return Int8Linear.of(layer)

    return replace(model, want, make)


def is_rounded(model: Model) -> bool:
    """Whether the model has layers in 8 or 4 bits."""
    return any(isinstance(layer, ROUNDED) for layer in model.modules())


def why_not(model: Model, frame: Frame | None = None) -> str | None:
    """Why texts cannot be read by native.cpp, for people to read; None where they can. frame: what stands around them.

    ModelError where the model reads no single texts at all.
    """
    main = checked(model, pools=None).main
    if main.like.device.type != "cpu":
        return f"the model is on {main.like.device.type}, and it runs on a CPU"
    if frame and main.types is not None and any(map(any, (*frame.single.types, frame.single.text_types))):
        return "it reads texts of the first type alone, and this tokenizer gives another"
    return refusal(model)


class NativeEmbedder:
    """An `Embedder` (see runner.py) over native.cpp, for models with rounded layers and float ones alike.

    A text's vector does not depend on the texts beside it, nor on the threads, to the last bit. pool, normalise: as in
    `read.embeddings`. length: of the longest text, at most the model's, None for that. tokens: of a pass, at most,
    unless a text alone is longer; there is memory for the greater of the two. threads: None for torch's
    number. release: the model's matrices are taken from it, as `NativeRunner` does. ValueError where `why_not` has a
    reason.
    """

    def __init__(
        self,
        model: Model,
        pool: Pool = "mean",
        normalise: bool = True,
        tokens: int = PASS_TOKENS,
        length: int | None = None,
        threads: int | None = None,
        release: bool = False,
    ) -> None:
        network = checked(model, pools=None)
        if reason := why_not(model):
            raise ValueError(reason)
        self.length = min(length or network.config.length, network.config.length)
        self.vocab = network.config.vocab
        self.pool, self.normalise = pool, normalise
        self._causal, self._dim = network.config.main.causal, network.config.main.dim
        self._room = _whole(max(tokens, self.length))
        self._tokens = tokens
        self._runner = NativeRunner(network, 1, self._room, self._room, threads, release=release)

    def embed(self, texts: Sequence[Ids]) -> Floats:
        """(K, D), one a text. ModelError where a text has no token or more than the model reads."""
        fitting([len(text) for text in texts], self.length)
        vectors_KD = np.empty((len(texts), self._dim), np.float32)
        for first, end in self._passes(texts):
            vectors_KD[first:end] = self._read(texts[first:end])
        if self.normalise:
            vectors_KD /= np.maximum(np.linalg.norm(vectors_KD, axis=1, keepdims=True), 1e-12)
        return vectors_KD

    def _passes(self, texts: Sequence[Ids]) -> Iterator[tuple[int, int]]:
        """(first, end) of the texts of each pass."""
        first = size = 0
        for number, text in enumerate(texts):
            if number > first and size + _whole(len(text)) > self._tokens:
                yield first, number
                first, size = number, 0
            size += _whole(len(text))
        if texts:
            yield first, len(texts)

    def _read(self, texts: Sequence[Ids]) -> Floats:
        """(K, D): the texts' states, pooled. Each begins at a whole block of places, so that no sum is another's."""
        sizes_K = np.array([len(text) for text in texts])
        starts_K = np.cumsum([0, *(_whole(size) for size in sizes_K[:-1])])
        ends_K = np.cumsum(sizes_K)
        starts_N = np.repeat(starts_K, sizes_K)
        places_N = starts_N + np.arange(ends_K[-1]) - np.repeat(ends_K - sizes_K, sizes_K)
        limits_N = places_N + 1 if self._causal else np.repeat(starts_K + sizes_K, sizes_K)
        ids_N = np.concatenate(texts)
        states_ND = self._runner.states(ids_N, np.zeros_like(ids_N), places_N, limits_N, starts_N).numpy()
        states_ND = states_ND[:, : self._dim]
        if self.pool == "first":
            return states_ND[ends_K - sizes_K]
        if self.pool == "last":
            return states_ND[ends_K - 1]
        return np.stack([part_TD.mean(axis=0) for part_TD in np.split(states_ND, ends_K[:-1])])


def _whole(size: int) -> int:
    """So many places in whole blocks."""
    return -(-int(size) // LANES) * LANES
