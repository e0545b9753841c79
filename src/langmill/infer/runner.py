"""The model behind the engine: it knows slots and tokens, and nothing of requests.

N tokens of a pass, R parts of it (one slot's tokens each), W tokens whose scores are wanted, V vocabulary; B rows of
one call, T tokens of the longest, S places, G key and value heads, D width; K texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from langmill.common.errors import ModelError
from langmill.families.folder import Model
from langmill.infer.graphs import Graphs, recordable
from langmill.infer.read import embeddings
from langmill.model.cache import Cache, LayerCache
from langmill.model.config import ModelConfig, Pool, Rope, StackConfig
from langmill.model.transformer import Memory, Transformer
from langmill.text.frames import Encoded

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Across = list[tuple[Tensor, Tensor]]  # each layer's keys and values (1, G, S, D) of a source


class Runner(Protocol):
    """slots: rows of the cache. length: places of each, so the longest prompt. vocab: ids that there are."""

    slots: int
    length: int
    vocab: int

    def run(self, tokens_N: Ids, slots_N: Ids, places_N: Ids, wanted_W: Ids) -> Tensor:
        """One pass: logits (W, V), float32 on the CPU, for the caller to change.

        A token is its id, its slot and its place there, which is its position; it sees its own slot's places up to its
        own. Tokens of one slot stand together, in order, and go on behind what that slot holds, or write it again from
        some place on; where they gave NaN or this raised, from the beginning. wanted_W: indexes into N, rising.
        """

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` places of a slot into another."""


@runtime_checkable
class SourceRunner(Runner, Protocol):
    """A runner whose model reads a source before it writes. source: the longest one; 0: this model reads none."""

    source: int

    def encode(self, slot: int, ids: Ids) -> None:
        """Read the source of what the slot is to hold, before any of its tokens."""


class Embedder(Protocol):
    """What makes vectors of texts. length: the longest text, in tokens."""

    length: int
    vocab: int

    def embed(self, texts: Sequence[Ids]) -> Floats:
        """(K, D), one a text."""


class TorchRunner:
    """A `SourceRunner` over a decoder or encoder-decoder of ours, on its device. In float32 a slot's scores do not
    depend on the others in a pass. ModelError for a model that does not write."""

    def __init__(self, model: Model, slots: int, length: int):
        if not isinstance(model, Transformer) or not _writes(model.config):
            raise ModelError(
                "the engine needs a Transformer that writes text: a decoder or one with an encoder"
            )
        c, like = model.config.main, model.main.like
        self.model, self.device, self.dtype, self.dim = model, like.device, like.dtype, c.dim
        self.slots, self.length, self.vocab = slots, min(length, _window(model.config)), model.config.vocab
        self.source = 0 if model.config.encoder_input is None else model.config.encoder_input.length
        self._cache = SlotCache(c, slots, self.length, like.dtype, like.device)
        self._graphs = Graphs(model, self._cache) if recordable(model) else None
        self._sources: dict[int, Across] = {}
        self._across: tuple[list[int], Memory] | None = None  # what the layers look across to, and whose
        self._sick: set[int] = set()  # slots that hold what is no number

    @torch.inference_mode()
    def run(self, tokens_N: Ids, slots_N: Ids, places_N: Ids, wanted_W: Ids) -> Tensor:
        firsts_R = np.flatnonzero(np.diff(slots_N, prepend=-1))
        sizes_R = np.diff(firsts_R, append=len(slots_N))
        owners_W = np.searchsorted(firsts_R, wanted_W, side="right") - 1
        self._heal(slots_N[firsts_R[places_N[firsts_R] == 0]])
        states_WD = torch.empty(len(wanted_W), self.dim, dtype=self.dtype, device=self.device)
        finite_R = torch.empty(len(firsts_R), dtype=torch.bool, device=self.device)
        for rows_B in _alike(sizes_R):
            firsts_B, sizes_B = firsts_R[rows_B], sizes_R[rows_B]
            inside_BT = np.arange(sizes_B.max()) < sizes_B[:, None]
            tokens_BT = np.zeros(inside_BT.shape, np.int64)
            tokens_BT[inside_BT] = tokens_N[(firsts_B[:, None] + np.arange(sizes_B.max()))[inside_BT]]
            h_BTD = self._read(tokens_BT, slots_N[firsts_B], places_N[firsts_B], sizes_B)
            padding_BT = torch.from_numpy(~inside_BT).to(self.device)
            finite_R[rows_B] = (h_BTD.isfinite().all(2) | padding_BT).all(1)
            here = np.flatnonzero(np.isin(owners_W, rows_B))
            of_B = np.searchsorted(rows_B, owners_W[here])
            states_WD[here] = h_BTD[of_B, wanted_W[here] - firsts_B[of_B]]
        self._check(slots_N[firsts_R[~finite_R.cpu().numpy()]], slots_N[wanted_W])
        return self.model.logits(states_WD).float().cpu()

    def copy(self, source: int, target: int, length: int) -> None:
        self._heal(np.array([target]))
        self._cache.copy(source, target, length)

    @torch.inference_mode()
    def encode(self, slot: int, ids: Ids) -> None:
        memory = self.model.encode(torch.from_numpy(ids)[None].to(self.device))
        # reading any token makes each layer's keys and values of the source, which a cache keeps
        cache = self.model.new_cache(1, 1)
        self.model.hidden(torch.zeros(1, 1, dtype=torch.long, device=self.device), memory=memory, cache=cache)
        self._across = None
        self._sources[slot] = [layer.across for layer in cache.layers if layer.across is not None]

    def _read(self, tokens_BT: Ids, slots_B: Ids, places_B: Ids, sizes_B: Ids) -> Tensor:
        """States (B, T, D) of rows of like length, padded on the right."""
        if self._graphs is not None and tokens_BT.shape[1] == 1:
            return self._graphs.read(tokens_BT[:, 0], slots_B, places_B)[:, None]
        self._cache.open(slots_B, places_B, sizes_B)
        memory = self._memory(slots_B.tolist()) if self.source else None
        return self.model.hidden(
            torch.from_numpy(tokens_BT).to(self.device), memory=memory, cache=self._cache
        )

    def _memory(self, slots: list[int]) -> Memory:
        """What the rows look across to: the layers get their keys and values, brought to one length."""
        if self._across is not None and self._across[0] == slots:
            return self._across[1]
        rows = [self._sources[slot] for slot in slots]
        sizes = [row[0][0].shape[2] for row in rows]
        for layer, sources in zip(self._cache.layers, zip(*rows, strict=True), strict=True):
            keys, values = zip(*sources, strict=True)
            layer.across = (_padded(keys, max(sizes)), _padded(values, max(sizes)))
        places_S = torch.arange(max(sizes), device=self.device)
        documents_BS = (places_S < torch.tensor(sizes, device=self.device)[:, None]).int()
        # the states themselves are not looked at again
        self._across = (slots, Memory(places_S.new_empty(0), documents_BS))
        return self._across[1]

    def _check(self, sick: Ids, told: Ids) -> None:
        """Note slots whose states are no numbers. ModelError for one that has no wanted scores to show it."""
        self._sick.update(sick.tolist())
        if not np.isin(sick, told).all():
            raise ModelError("the model's states are not finite numbers (NaN or infinite)")

    def _heal(self, slots: Ids) -> None:
        """Zero times what is no number is none either, so masked places must hold numbers: clear sick slots."""
        for slot in self._sick.intersection(slots.tolist()):
            self._cache.clear(slot)
            self._sick.remove(slot)


class SlotCache(Cache):
    """A cache of which each call reads and writes some slots, each from a place of its own (`open`).

    Padding may reach beyond a slot's end: one more place takes it.
    """

    def __init__(self, c: StackConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device):
        super().__init__(c, slots, length + 1, dtype, device)
        self.layers = [SlotLayer(layer.keys_BGSD, layer.values_BGSD, self) for layer in self.layers]

    def open(self, slots_B: Ids, places_B: Ids, sizes_B: Ids) -> None:
        """The next call's rows: these slots, `sizes_B` tokens of each from these places on."""
        device, ends_B = self.lengths_B.device, places_B + sizes_B
        self.longest, self.end = int(places_B.max()), int(ends_B.max())
        self.even = bool((places_B == places_B[0]).all())
        places_BT = torch.from_numpy(places_B[:, None] + np.arange(sizes_B.max())).to(device)
        self.places_BT = places_BT.clamp(max=self.length - 1)
        self.positions_BT = places_BT.clamp(max=self.length - 2)
        rows_B = torch.from_numpy(slots_B).to(device)
        side_by_side = bool((np.diff(slots_B) == 1).all())  # then a view serves, and nothing is gathered
        self.rows_B1 = rows_B[:, None]
        self.rows = slice(slots_B[0], slots_B[-1] + 1) if side_by_side else rows_B

    def positions(self, new: int) -> Tensor:
        return self.positions_BT

    def key_positions(self, new: int) -> Tensor:
        return torch.arange(self.end, device=self.lengths_B.device)[None]

    def reach(self, new: int) -> int:
        return self.end

    def reserve(self, new: int) -> None:
        """The engine gives no more than fits, but for padding."""

    def advance(self, new: int, lengths_B: Tensor | None = None) -> None:
        """The engine knows what slots hold."""

    def copy(self, source: int, target: int, length: int) -> None:
        for layer in self.layers:
            for held in (layer.keys_BGSD, layer.values_BGSD):
                held[target, :, :length] = held[source, :, :length]

    def clear(self, slot: int) -> None:
        for layer in self.layers:
            layer.keys_BGSD[slot] = layer.values_BGSD[slot] = 0


class SlotLayer(LayerCache):
    """One layer of a `SlotCache`."""

    cache: SlotCache

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens of the call's rows; all keys and values of these rows up to the longest."""
        cache = self.cache
        self.keys_BGSD[cache.rows_B1, :, cache.places_BT] = k_BGTD.transpose(1, 2)
        self.values_BGSD[cache.rows_B1, :, cache.places_BT] = v_BGTD.transpose(1, 2)
        if cache.longest == 0 and k_BGTD.shape[2] > 1:
            return k_BGTD, v_BGTD
        return self.keys_BGSD[cache.rows, :, : cache.end], self.values_BGSD[cache.rows, :, : cache.end]


class TorchEmbedder:
    """An `Embedder` over an encoder or decoder of ours: see `read.embeddings`."""

    def __init__(self, model: Model, pool: Pool = "mean", normalise: bool = True):
        self.model, self.pool, self.normalise = model, pool, normalise
        self.length, self.vocab = model.config.length, model.config.vocab

    def embed(self, texts: Sequence[Ids]) -> Floats:
        documents = [
            Encoded(ids.tolist(), [0] * len(ids), range(len(ids)), range(0), number)
            for number, ids in enumerate(texts)
        ]
        return np.stack(list(embeddings(self.model, documents, self.pool, self.normalise)))


def _alike(sizes_R: Ids) -> Iterator[Ids]:
    """The rows by their number of tokens, rounded up to a power of two: so less than half of a call is padding."""
    sizes_R = np.ceil(np.log2(sizes_R))
    for size in np.unique(sizes_R):
        yield np.flatnonzero(sizes_R == size)


def _padded(parts: Sequence[Tensor], longest: int) -> Tensor:
    """(B, G, S, D) of parts (1, G, ·, D)."""
    return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts])


def _writes(config: ModelConfig) -> bool:
    return config.decoder is not None and config.head is not None and config.head.task == "text"


def _window(config: ModelConfig) -> int:
    """Positions that scores of a slot depend on alone: `dynamic` frequencies change with the longest row of a call."""
    position = config.main.position
    if isinstance(position, Rope) and position.scaling is not None and position.scaling.kind == "dynamic":
        return min(config.length, position.scaling.original_length)
    return config.length
