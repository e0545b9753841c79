"""Passes of one token a slot on a GPU, recorded once as CUDA graphs and replayed.

Starting the hundreds of small kernels of such a pass one by one takes longer than they run. A recording is for so many
slots and so many places, both rounded up, so that few are made; numbers go in and states come out by tensors that stay
where they are. Slots that have nothing to read read a token into the spare place behind their last, for nobody.

S slots, P of them recorded, B asked for; D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from langmill.model.cache import Cache, LayerCache
from langmill.model.config import Rope
from langmill.model.transformer import Transformer

Ids = NDArray[np.int64]
PLACES = 256  # of the shortest recording; longer ones double
WARM_UPS = 2  # passes before one is recorded, in which libraries make what they keep


@dataclass(frozen=True)
class Recording:
    """replay() computes h_PD of what tokens_P1 and places_P1 hold."""

    tokens_P1: Tensor
    places_P1: Tensor
    h_PD: Tensor
    replay: Callable[[], None]


def recordable(model: Transformer) -> bool:
    """Whether a pass of the model is the same kernels each time, on a GPU: it looks across to no source, has no hooks,
    and no frequencies that follow the longest row."""
    position = model.config.main.position
    dynamic = (
        isinstance(position, Rope) and position.scaling is not None and position.scaling.kind == "dynamic"
    )
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    return model.main.like.device.type == "cuda" and model.encoder is None and not dynamic and not hooked


class Graphs:
    """The recordings of a model over the keys and values of `cache`, which has one place a slot to spare."""

    def __init__(self, model: Transformer, cache: Cache):
        self.model, self.cache = model, cache
        self.slots = len(cache.lengths_B)
        self._made: dict[tuple[int, int], Recording] = {}
        self._weights = [*model.parameters(), *model.buffers()]
        self._places: list[int] = []  # of the weights in memory
        self._pool: Any = None

    def read(self, tokens_B: Ids, slots_B: Ids, places_B: Ids) -> Tensor:
        """The states (B, D) of one token a slot at its place."""
        places = [weight.data_ptr() for weight in self._weights]
        if places != self._places:  # moved: recordings would read what is no longer there
            self._made, self._places = {}, places
        kept = self._recording(int(slots_B.max()) + 1, int(places_B.max()) + 1)
        wide_P = np.zeros((2, len(kept.tokens_P1)), np.int64)
        wide_P[1] = self.cache.length - 1
        wide_P[:, slots_B] = tokens_B, places_B
        both_P = torch.from_numpy(wide_P)
        kept.tokens_P1.copy_(both_P[0, :, None])
        kept.places_P1.copy_(both_P[1, :, None])
        kept.replay()
        return kept.h_PD[torch.from_numpy(slots_B).to(kept.h_PD.device)]

    def _recording(self, slots: int, places: int) -> Recording:
        rows = min(1 << (slots - 1).bit_length(), self.slots)
        end = min(max(PLACES, 1 << (places - 1).bit_length()), self.cache.length - 1)
        if (rows, end) not in self._made:
            self._made[rows, end] = self._record(rows, end)
        return self._made[rows, end]

    def _record(self, rows: int, end: int) -> Recording:
        device = self.cache.lengths_B.device
        tokens_P1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        places_P1 = torch.full((rows, 1), self.cache.length - 1, device=device)
        cache = _Fixed(self.cache, places_P1, end)

        def pass_() -> Tensor:
            return self.model.hidden(tokens_P1, cache=cache)[:, 0]

        replay, h_PD = self._captured(pass_)
        return Recording(tokens_P1, places_P1, h_PD, replay)

    def _captured(self, pass_: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What repeats the pass, and where its result stands then."""
        side, now = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(now)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                pass_()
        now.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # other threads may use the GPU meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            h_PD = pass_()
        return graph.replay, h_PD


class _Fixed(Cache):
    """The first slots of another cache, read up to one place: all that a recording asks it is decided beforehand."""

    def __init__(self, whole: Cache, places_P1: Tensor, end: int):
        self.length, self.end, self.places_P1 = whole.length, end, places_P1
        self.longest, self.even, self.seen_BTS = end - 1, False, None
        self.lengths_B = whole.lengths_B[: len(places_P1)]
        self.layers = [_FixedLayer(layer.keys_BGSD, layer.values_BGSD, self) for layer in whole.layers]

    def positions(self, new: int) -> Tensor:
        return self.places_P1.clamp(max=self.length - 2)

    def key_positions(self, new: int) -> Tensor:
        return torch.arange(self.end, device=self.places_P1.device)[None]

    def reach(self, new: int) -> int:
        return self.end

    def reserve(self, new: int) -> None:
        """The engine gives no more than fits."""

    def advance(self, new: int, lengths_B: Tensor | None = None) -> None:
        """The engine knows what slots hold."""


class _FixedLayer(LayerCache):
    cache: _Fixed

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        cache, rows = self.cache, len(k_BGTD)
        slots_P1 = torch.arange(rows, device=k_BGTD.device)[:, None]
        self.keys_BGSD[slots_P1, :, cache.places_P1] = k_BGTD.transpose(1, 2)
        self.values_BGSD[slots_P1, :, cache.places_P1] = v_BGTD.transpose(1, 2)
        return self.keys_BGSD[:rows, :, : cache.end], self.values_BGSD[:rows, :, : cache.end]
