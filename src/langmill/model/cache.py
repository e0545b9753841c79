"""What a decoder remembers of the tokens it has read: keys and values, one contiguous slot a row.

B rows, G key and value heads, S places in a slot, T new tokens, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from langmill.common.errors import ModelError
from langmill.model.config import StackConfig


@dataclass
class LayerCache:
    """One layer's keys and values, each (B, G, S, D), and the cache that knows how full they are. `across`: those of
    what an encoder read, once the layer has looked there."""

    keys_BGSD: Tensor
    values_BGSD: Tensor
    cache: Cache
    across: tuple[Tensor, Tensor] | None = None

    def append(self, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new tokens behind each row's own; return all keys and values up to the longest row."""
        cache, new = self.cache, k_BGTD.shape[2]
        if cache.longest == 0 and new > 1:  # nothing to look back on: skip reading what was just written
            self.keys_BGSD[:, :, :new], self.values_BGSD[:, :, :new] = k_BGTD, v_BGTD
            return k_BGTD, v_BGTD
        if cache.even:
            places = slice(cache.longest, cache.longest + new)
            self.keys_BGSD[:, :, places], self.values_BGSD[:, :, places] = k_BGTD, v_BGTD
        else:
            rows_B1 = torch.arange(len(k_BGTD), device=k_BGTD.device)[:, None]
            places_BT = cache.places(new)
            self.keys_BGSD[rows_B1, :, places_BT] = k_BGTD.transpose(1, 2).to(self.keys_BGSD.dtype)
            self.values_BGSD[rows_B1, :, places_BT] = v_BGTD.transpose(1, 2).to(self.values_BGSD.dtype)
        end = cache.longest + new
        return self.keys_BGSD[:, :, :end], self.values_BGSD[:, :, :end]


class Cache:
    """Slots for `batch` rows of at most `length` tokens.

    Use: the model calls `layer(i).append(k, v)` in every layer and `advance` once at the end. A row may
    be shorter than the others: places beyond its own tokens hold rubbish that no query of it looks at.
    """

    def __init__(
        self, config: StackConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (batch, config.kv_heads, length, config.head_dim)
        self.length = length
        self.longest = 0  # tokens in the fullest row: a Python number, so that no step waits for a device
        self.even = True  # all rows are equally full
        self.seen_BTS: Tensor | None = (
            None  # what the next tokens see, where it is not all that is before them
        )
        self.lengths_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.layers = [
            LayerCache(
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
                self,
            )
            for _ in range(config.layers)
        ]

    def layer(self, index: int) -> LayerCache:
        return self.layers[index]

    def places(self, new: int) -> Tensor:
        """(B, T) the places, which are also the positions, that the next `new` tokens of each row take."""
        return self.lengths_B[:, None] + torch.arange(new, device=self.lengths_B.device)

    def positions(self, new: int) -> Tensor:
        """(B or 1, T) the positions of the next `new` tokens of each row."""
        if not self.even:
            return self.places(new)
        return torch.arange(self.longest, self.longest + new, device=self.lengths_B.device)[None]

    def key_positions(self, new: int) -> Tensor:
        """(1, S) the position of each place up to the longest row's, once it has `new` more tokens."""
        return torch.arange(self.longest + new, device=self.lengths_B.device)[None]

    def reserve(self, new: int) -> None:
        """Refuse `new` more tokens where they do not fit."""
        if self.longest + new > self.length:
            raise ModelError(
                f"{self.longest + new} tokens do not fit in a cache made for {self.length}: "
                "shorten the prompt or ask for fewer new tokens"
            )

    def advance(self, new: int, lengths_B: Tensor | None = None) -> None:
        """Count `new` tokens in every row, or lengths_B of them where rows were padded on the right."""
        if lengths_B is None:
            self.lengths_B = self.lengths_B + new
            self.longest += new
            return
        self.lengths_B = self.lengths_B + lengths_B
        self.longest = int(self.lengths_B.max())
        self.even = bool((self.lengths_B == self.longest).all())

    def cut(self, length: int) -> None:
        """Forget what stands behind the first `length` tokens, which every row must hold."""
        self.lengths_B = torch.full_like(self.lengths_B, length)
        self.longest, self.even = length, True

    def reach(self, new: int) -> int:
        """Positions in use once the longest row has `new` more tokens."""
        return self.longest + new

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order (finished requests)."""
        self.lengths_B = self.lengths_B[rows]
        self.longest = int(self.lengths_B.max()) if len(rows) else 0
        self.even = bool((self.lengths_B == self.longest).all())
        for layer in self.layers:
            layer.keys_BGSD, layer.values_BGSD = layer.keys_BGSD[rows], layer.values_BGSD[rows]
            if layer.across is not None:
                layer.across = (layer.across[0][rows], layer.across[1][rows])


class BeamCache(Cache):
    """The K beams of a sentence in one slot: what they read at a step takes the next K places, in the beams' order.

    seen_BTS: each beam's next token sees the places of its own past, and its own. So nothing is copied where a beam
    goes on from another, and one product serves all beams of a sentence.
    """

    def __init__(
        self,
        config: StackConfig,
        batch: int,
        beams: int,
        steps: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(config, batch, steps * beams, dtype, device)
        self.beams = beams
        self.seen_BTS: Tensor = self._own(batch)

    def _own(self, batch: int) -> Tensor:
        return torch.eye(self.beams, dtype=torch.bool, device=self.lengths_B.device).expand(batch, -1, -1)

    @property
    def step(self) -> int:
        """How many tokens each beam has read: the position of the next."""
        return self.longest // self.beams

    def positions(self, new: int) -> Tensor:
        return torch.full((1, new), self.step, device=self.lengths_B.device)

    def key_positions(self, new: int) -> Tensor:
        return super().key_positions(new) // self.beams

    def reach(self, new: int) -> int:
        return self.step + new // self.beams

    def descend(self, parents_BK: Tensor) -> None:
        """After a pass: beam k of each sentence goes on from beam parents_BK[·, k]."""
        past_BKS = self.seen_BTS.gather(1, parents_BK[:, :, None].expand(-1, -1, self.seen_BTS.shape[2]))
        self.seen_BTS = torch.cat((past_BKS, self._own(len(parents_BK))), dim=2)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.seen_BTS = self.seen_BTS[rows]
