"""Blocks: attention, MLP and their norms.

Shapes: B batch, T tokens, S tokens that an encoder read, D width, H query heads, G key and value heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from langmill.model.attend import Seen, attend
from langmill.model.cache import LayerCache
from langmill.model.config import StackConfig
from langmill.model.positions import rotate
from langmill.model.sparing import gated, narrowed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
Angles = tuple[Tensor, Tensor] | None


def table(rows: int, width: int) -> nn.Embedding:
    """An embedding. Its own initialisation, where nothing is there to be filled, would make torch import its compiler:
    a second, before any weight is read."""
    empty = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=empty if empty.is_meta else None)


def norm_of(c: StackConfig) -> nn.Module:
    return nn.RMSNorm(c.dim, eps=c.norm_eps) if c.norm == "rms" else nn.LayerNorm(c.dim, eps=c.norm_eps)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values (Vaswani et al. 2017, section 3.2.2)."""

    attend = staticmethod(attend)

    def __init__(self, c: StackConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.scale = c.heads, c.kv_heads, c.head_dim, c.scale
        self.q = nn.Linear(c.dim, c.heads * c.head_dim, bias="q" in c.bias)
        self.k = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias="k" in c.bias)
        self.v = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias="v" in c.bias)
        self.o = nn.Linear(c.heads * c.head_dim, c.dim, bias="o" in c.bias)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None

    def forward(self, x_BTD: Tensor, angles: Angles, seen: Seen, cache: LayerCache | None) -> Tensor:
        """Among the tokens of x themselves, and those that the cache holds."""
        q_BHTD = self._split(self.q(x_BTD), self.heads, self.q_norm)
        k_BGTD = self._split(self.k(x_BTD), self.kv_heads, self.k_norm)
        v_BGTD = self._split(self.v(x_BTD), self.kv_heads, None)
        if angles is not None:
            q_BHTD, k_BGTD = rotate(q_BHTD, *angles), rotate(k_BGTD, *angles)
        if cache is not None:
            k_BGTD, v_BGTD = cache.append(k_BGTD, v_BGTD)
        return self._mixed(q_BHTD, k_BGTD, v_BGTD, seen)

    def across(self, x_BTD: Tensor, memory_BSD: Tensor, seen: Seen, cache: LayerCache | None) -> Tensor:
        """From the tokens of x to an encoder's; a cache keeps the keys and values of those."""
        q_BHTD = self._split(self.q(x_BTD), self.heads, self.q_norm)
        if cache is not None and cache.across is not None:
            return self._mixed(q_BHTD, *cache.across, seen)
        k_BGSD = self._split(self.k(memory_BSD), self.kv_heads, self.k_norm)
        v_BGSD = self._split(self.v(memory_BSD), self.kv_heads, None)
        if cache is not None:
            cache.across = (k_BGSD, v_BGSD)
        return self._mixed(q_BHTD, k_BGSD, v_BGSD, seen)

    def _mixed(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, seen: Seen) -> Tensor:
        mixed_BHTD = self.attend(q_BHTD, k_BGSD, v_BGSD, seen, self.scale)
        return self.o(mixed_BHTD.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
        x_BTHD = x.unflatten(-1, (heads, self.head_dim))
        return (x_BTHD if norm is None else norm(x_BTHD)).transpose(1, 2)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), or down(act(up(x))) without a gate."""

    def __init__(self, c: StackConfig):
        super().__init__()
        bias = "mlp" in c.bias
        self.activation = ACTIVATIONS[c.activation]
        self.gate = nn.Linear(c.dim, c.hidden, bias=bias) if c.gated else None
        self.up = nn.Linear(c.dim, c.hidden, bias=bias)
        self.down = nn.Linear(c.hidden, c.dim, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = narrowed(x_BTD)
        up = self.up(x_BTD)
        inner = self.activation(up) if self.gate is None else gated(self.activation, self.gate(x_BTD), up)
        return self.down(inner)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), or the norms behind the sums; between them, where there is an
    encoder, the same with attention to what it read."""

    def __init__(self, c: StackConfig):
        super().__init__()
        self.post, self.dropout = c.norm_order == "post", 0.0
        self.attention_norm, self.attention = norm_of(c), Attention(c)
        self.cross_norm = norm_of(c) if c.cross else None
        self.cross = Attention(c) if c.cross else None
        self.mlp_norm, self.mlp = norm_of(c), MLP(c)

    def forward(
        self,
        x_BTD: Tensor,
        angles: Angles,
        seen: Seen,
        cache: LayerCache | None,
        memory_BSD: Tensor | None = None,
        seen_across: Seen | None = None,
    ) -> Tensor:
        x_BTD = self._add(x_BTD, self.attention_norm, lambda x: self.attention(x, angles, seen, cache))
        if self.cross is not None and self.cross_norm is not None:
            assert memory_BSD is not None and seen_across is not None
            across = self.cross.across
            x_BTD = self._add(x_BTD, self.cross_norm, lambda x: across(x, memory_BSD, seen_across, cache))
        return self._add(x_BTD, self.mlp_norm, self.mlp)

    def _add(self, x_BTD: Tensor, norm: nn.Module, layer: Callable[[Tensor], Tensor]) -> Tensor:
        new_BTD = layer(x_BTD if self.post else norm(x_BTD))
        if self.dropout:
            new_BTD = F.dropout(new_BTD, self.dropout, self.training)
        added: Tensor = norm(x_BTD + new_BTD) if self.post else x_BTD + new_BTD
        return added
