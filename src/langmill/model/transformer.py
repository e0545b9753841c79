"""The Transformer: the only implementation in this project, shaped by `ModelConfig`, never subclassed.

Shapes: B batch, T tokens, D width, H query heads, G key and value heads, V vocabulary.
Four seams let techniques change it from outside: the function `Attention.attend`, layers swapped by
`model/replace.py`, the cache object, and `torch.func` over the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from langmill.common.errors import ModelError
from langmill.model.attend import attend, causal_mask, document_positions
from langmill.model.cache import Cache, LayerCache
from langmill.model.config import Learned, ModelConfig, Rope, StackConfig
from langmill.model.positions import rotary, rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
Angles = tuple[Tensor, Tensor] | None


def _norm(c: StackConfig) -> nn.Module:
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

    def forward(self, x_BTD: Tensor, angles: Angles, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        q_BHTD = self._split(self.q(x_BTD), self.heads, self.q_norm)
        k_BGTD = self._split(self.k(x_BTD), self.kv_heads, self.k_norm)
        v_BGTD = self._split(self.v(x_BTD), self.kv_heads, None)
        if angles is not None:
            q_BHTD, k_BGTD = rotate(q_BHTD, *angles), rotate(k_BGTD, *angles)
        if cache is not None:
            k_BGTD, v_BGTD = cache.append(k_BGTD, v_BGTD)
        mixed_BHTD = self.attend(q_BHTD, k_BGTD, v_BGTD, mask, self.scale)
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
        up = self.up(x_BTD)
        inner = self.activation(up) if self.gate is None else self.activation(self.gate(x_BTD)) * up
        return self.down(inner)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: StackConfig):
        super().__init__()
        self.attention_norm, self.attention = _norm(c), Attention(c)
        self.mlp_norm, self.mlp = _norm(c), MLP(c)

    def forward(self, x_BTD: Tensor, angles: Angles, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), angles, mask, cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Stack(nn.Module):
    """Blocks and a last norm."""

    def __init__(self, c: StackConfig):
        super().__init__()
        self.config = c
        self.checkpointing = False  # recompute each block in the backward pass instead of keeping it
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = _norm(c)

    def forward(
        self, x_BTD: Tensor, positions: Tensor, documents: Tensor | None, cache: Cache | None
    ) -> Tensor:
        c = self.config
        angles = rotary(positions, c.position, c.head_dim) if isinstance(c.position, Rope) else None
        if angles is not None:
            angles = (angles[0].to(x_BTD.dtype), angles[1].to(x_BTD.dtype))
        masks = self._masks(x_BTD, documents, cache)
        for index, block in enumerate(self.blocks):
            mask = masks[c.window[index] if c.window else None]
            layer = None if cache is None else cache.layer(index)
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, angles, mask, layer, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, angles, mask, layer)
        return self.norm(x_BTD)

    def _masks(
        self, x_BTD: Tensor, documents: Tensor | None, cache: Cache | None
    ) -> dict[int | None, Tensor | None]:
        """One mask for each different window of the stack; None where plain causal attention will do."""
        new, device = x_BTD.shape[1], x_BTD.device
        past = 0 if cache is None else cache.longest
        plain = documents is None and (past == 0 or (new == 1 and cache is not None and cache.even))
        if cache is not None and past > 0:
            queries, keys = cache.places(new), torch.arange(past + new, device=device)[None]
        else:
            queries = keys = torch.arange(new, device=device)[None]
        masks: dict[int | None, Tensor | None] = {}
        for window in set(self.config.window or (None,)):
            if plain and (window is None or window >= past + new):
                masks[window] = None
            else:
                masks[window] = causal_mask(queries, keys, window, documents)
        return masks


class Transformer(nn.Module):
    """A language model: tokens in, one score a vocabulary entry and position out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        c, tokens = config.decoder, config.decoder_input
        self.tokens = nn.Embedding(tokens.vocab, c.dim)
        self.positions = nn.Embedding(tokens.length, c.dim) if isinstance(c.position, Learned) else None
        self.decoder = Stack(c)
        self.head = None if config.head.tied else nn.Linear(c.dim, config.head.outputs, bias=False)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """Scores (B, T, V) for the token after each of tokens_BT; the arguments are those of `hidden`."""
        return self.logits(
            self.hidden(
                tokens_BT,
                positions_BT=positions_BT,
                documents_BT=documents_BT,
                cache=cache,
                lengths_B=lengths_B,
            )
        )

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states (B, T, D), normalised, ready for `logits`.

        positions_BT: int64, by default 0, 1, 2, … (restarting in each document, going on after a cache).
        documents_BT: the number of the document that each token belongs to; attention stays inside it.
        cache: from `new_cache`; then tokens_BT continue what it holds. lengths_B: real tokens of each row
        where the rows are padded on the right. Raises ModelError where learned positions run out.
        """
        new = tokens_BT.shape[1]
        if cache is not None:
            if documents_BT is not None:
                raise ModelError("documents_BT and a cache cannot be combined: a cached row is one document")
            cache.reserve(new)
        if positions_BT is None:
            positions_BT = self._places(tokens_BT, documents_BT, cache)
        x_BTD = self.tokens(tokens_BT).to(
            self.decoder.norm.weight.dtype
        )  # a frozen embedding may be narrower
        if self.positions is not None:
            reach = new if cache is None else cache.longest + new
            if reach > self.config.length and documents_BT is None:
                raise ModelError(f"{reach} tokens exceed the {self.config.length} positions of this model")
            x_BTD = x_BTD + self.positions(positions_BT)
        x_BTD = self.decoder(x_BTD, positions_BT, documents_BT, cache)
        if cache is not None:
            cache.advance(new, lengths_B)
        return x_BTD

    def _places(self, tokens_BT: Tensor, documents_BT: Tensor | None, cache: Cache | None) -> Tensor:
        if documents_BT is not None:
            return document_positions(documents_BT)
        if cache is not None and not cache.even:
            return cache.places(tokens_BT.shape[1])
        past = 0 if cache is None else cache.longest
        return torch.arange(past, past + tokens_BT.shape[1], device=tokens_BT.device)[None]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, (..., V), of hidden states (..., D)."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype))

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, D): the embedding's own where the head is tied."""
        return self.tokens.weight if self.head is None else self.head.weight

    @property
    def checkpointing(self) -> bool:
        """Recompute activations in the backward pass: about a third more compute, far less memory."""
        return self.decoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.decoder.checkpointing = on

    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens, in the model's own type and place."""
        weight: Any = self.decoder.norm.weight  # a frozen embedding may be narrower than the rest
        return Cache(self.config.decoder, batch, length, dtype or weight.dtype, device or weight.device)
