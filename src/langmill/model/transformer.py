"""The Transformer: the only implementation in this project, shaped by `ModelConfig`, never subclassed.

Shapes: B batch, T tokens, S tokens that an encoder read, D width, H query heads, G key and value heads, V vocabulary,
K documents. Four seams let techniques change it from outside: the function `Attention.attend`, layers swapped by
`model/replace.py`, the cache object, and `torch.func` over the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from langmill.common.errors import ModelError
from langmill.model.attend import Masks, document_positions
from langmill.model.blocks import ACTIVATIONS, Block, norm_of, table
from langmill.model.cache import Cache
from langmill.model.config import Head, Learned, ModelConfig, Relative, Rope, Sinusoidal, StackConfig, Tokens
from langmill.model.layers import ROUNDED
from langmill.model.pool import pooled
from langmill.model.positions import relative_buckets, rotary, sinusoids


@dataclass(frozen=True)
class Memory:
    """What an encoder made of its tokens: states (B, S, D), and the document of each; 0 is padding."""

    states_BSD: Tensor
    documents_BS: Tensor | None


class Stack(nn.Module):
    """From token vectors to states: positions and segments added, blocks, and a last norm where norms come first."""

    def __init__(self, c: StackConfig, tokens: Tokens):
        super().__init__()
        self.config, self.length, self.embedding_scale = c, tokens.length, tokens.scale
        self.dropout = 0.0  # of what is embedded
        self.checkpointing = False  # recompute each block in the backward pass instead of keeping it
        rows = tokens.length + c.position.offset if isinstance(c.position, Learned) else 0
        self.positions = table(rows, c.dim) if rows else None
        self.relative = table(c.position.buckets, c.heads) if isinstance(c.position, Relative) else None
        self.types = table(tokens.types, c.dim) if tokens.types else None
        self.embedding_norm = norm_of(c) if tokens.norm else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = norm_of(c) if c.norm_order == "pre" else None

    @property
    def like(self) -> Tensor:
        """A weight with the states' type and place: a frozen embedding may be narrower than the norms."""
        first: Any = self.blocks[0]
        weight: Tensor = first.mlp_norm.weight
        return weight

    def forward(
        self,
        x_BTD: Tensor,
        positions: Tensor,
        documents: Tensor | None,
        cache: Cache | None = None,
        types: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        c = self.config
        x_BTD = self._placed(x_BTD.to(self.like.dtype), positions, documents, cache, types)
        if self.dropout:
            x_BTD = F.dropout(x_BTD, self.dropout, self.training)
        angles = rotary(positions, c.position, c.head_dim) if isinstance(c.position, Rope) else None
        if angles is not None:
            angles = (angles[0].to(x_BTD.dtype), angles[1].to(x_BTD.dtype))
        masks = Masks(c, documents, cache, x_BTD, self._bias if self.relative is not None else None)
        read, across = None, None
        if memory is not None:
            read = memory.states_BSD
            across = masks.across(memory.documents_BS)
        for index, block in enumerate(self.blocks):
            seen = masks.among(c.window[index] if c.window else None)
            layer = None if cache is None else cache.layer(index)
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, angles, seen, layer, read, across, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, angles, seen, layer, read, across)
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def _placed(
        self,
        x_BTD: Tensor,
        positions: Tensor,
        documents: Tensor | None,
        cache: Cache | None,
        types: Tensor | None,
    ) -> Tensor:
        """Token vectors with all that is added to them. ModelError where learned positions run out."""
        c = self.config
        if self.embedding_scale != 1.0:
            x_BTD = x_BTD * self.embedding_scale
        if self.positions is not None and isinstance(c.position, Learned):
            reach = x_BTD.shape[1] if cache is None else cache.reach(x_BTD.shape[1])
            if reach > self.length and documents is None:
                raise ModelError(f"{reach} tokens exceed the {self.length} positions of this model")
            x_BTD = x_BTD + self.positions(positions + c.position.offset)
        if isinstance(c.position, Sinusoidal):
            x_BTD = x_BTD + sinusoids(positions, c.dim).to(x_BTD.dtype)
        if self.types is not None:
            x_BTD = x_BTD + (self.types.weight[0] if types is None else self.types(types))
        return x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)

    def _bias(self, distance_BTS: Tensor) -> Tensor:
        """What is added to attention's scores at each distance of key from query, (B, H, T, S)."""
        assert self.relative is not None and isinstance(self.config.position, Relative)
        buckets = relative_buckets(distance_BTS, self.config.position, both_ways=not self.config.causal)
        return self.relative(buckets).permute(0, 3, 1, 2)


class Transformer(nn.Module):
    """Tokens in, scores out: of a vocabulary entry for each position, or of whatever else its head names."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        dim, head = config.main.dim, config.head
        self.tokens = table(config.vocab, dim)
        self.encoder = self._stack(config.encoder, config.encoder_input)
        self.decoder = self._stack(config.decoder, config.decoder_input)
        self.head_dense = nn.Linear(dim, dim) if head and head.transform else None
        self.head_norm = norm_of(config.main) if head and head.transform_norm else None
        own = head is not None and not head.tied and head.outputs > 0
        self.head = nn.Linear(dim, head.outputs, bias=head.bias) if head and own else None
        self.output_bias = (
            nn.Parameter(torch.zeros(head.outputs)) if head and head.tied and head.bias else None
        )

    @staticmethod
    def _stack(c: StackConfig | None, tokens: Tokens | None) -> Stack | None:
        return None if c is None or tokens is None else Stack(c, tokens)

    @property
    def main(self) -> Stack:
        """The stack that the head stands on."""
        found = self.decoder if self.decoder is not None else self.encoder
        assert isinstance(found, Stack)
        return found

    def forward(self, tokens_BT: Tensor, **given: Any) -> Tensor:
        """Scores (B, T, V) of what follows each of tokens_BT, or of what the head is for; the arguments are those of
        `hidden`. A head that pools gives (K, V), one row a document. ModelError where there is no head."""
        h_BTD = self.hidden(tokens_BT, **given)
        if self.config.head is None:
            return h_BTD
        if self.config.head.pool is not None:
            return self.logits(self.pooled(h_BTD, given.get("documents_BT")))
        return self.logits(h_BTD)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        types_BT: Tensor | None = None,
        cache: Cache | None = None,
        lengths_B: Tensor | None = None,
        memory: Memory | None = None,
        encoder_tokens: Tensor | None = None,
        encoder_documents: Tensor | None = None,
        encoder_positions: Tensor | None = None,
    ) -> Tensor:
        """The last states (B, T, D) of the decoder, or of the encoder where there is none, ready for `logits`.

        positions_BT: int64, by default 0, 1, 2, … (restarting in each document, going on after a cache).
        documents_BT: the number of the document that each token belongs to, 0 for padding; attention stays inside it.
        types_BT: the segment of each token, 0 by default. cache: from `new_cache`; then tokens_BT continue what it
        holds. lengths_B: real tokens of each row where the rows are padded on the right.
        encoder_tokens (B, S) with the rest of its name, or `memory` that `encode` made of them: what a decoder with
        cross-attention writes about; document n reads document n. Without them a model that scores whole texts reads
        tokens_BT on both sides (see `ModelConfig.rereads`). ModelError where learned positions run out.
        """
        if self.decoder is None:
            return self.encode(tokens_BT, documents_BT, positions_BT, types_BT).states_BSD
        if self.config.rereads and memory is None and encoder_tokens is None:
            encoder_tokens, encoder_documents, encoder_positions = tokens_BT, documents_BT, positions_BT
            places_BT = self._places(tokens_BT, documents_BT, None) if positions_BT is None else positions_BT
            assert self.config.input.start is not None
            tokens_BT = torch.where(places_BT == 0, self.config.input.start, tokens_BT.roll(1, dims=1))
        if memory is None and encoder_tokens is not None:
            memory = self.encode(encoder_tokens, encoder_documents, encoder_positions)
        if (memory is None) == (self.encoder is not None):
            raise ModelError(
                "this model reads before it writes: give encoder_tokens"
                if memory is None
                else "this model has no encoder to read encoder_tokens"
            )
        new = tokens_BT.shape[1]
        if cache is not None:
            if documents_BT is not None:
                raise ModelError("documents_BT and a cache cannot be combined: a cached row is one document")
            cache.reserve(new)
        if positions_BT is None:
            positions_BT = self._places(tokens_BT, documents_BT, cache)
        x_BTD = self.decoder(self.tokens(tokens_BT), positions_BT, documents_BT, cache, types_BT, memory)
        if cache is not None:
            cache.advance(new, lengths_B)
        return x_BTD

    def encode(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        types_BS: Tensor | None = None,
    ) -> Memory:
        """What the encoder makes of tokens; the arguments are those of `hidden`."""
        if self.encoder is None:
            raise ModelError("this model has no encoder")
        if positions_BS is None:
            positions_BS = self._places(tokens_BS, documents_BS, None)
        states = self.encoder(self.tokens(tokens_BS), positions_BS, documents_BS, None, types_BS)
        return Memory(states, documents_BS)

    def _places(self, tokens_BT: Tensor, documents_BT: Tensor | None, cache: Cache | None) -> Tensor:
        if documents_BT is not None:
            return document_positions(documents_BT)
        if cache is not None:
            return cache.positions(tokens_BT.shape[1])
        return torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]

    def pooled(self, h_BTD: Tensor, documents_BT: Tensor | None) -> Tensor:
        """One state a document (K, D), in reading order, as the head pools them; a row is one where none are given."""
        if self.config.head is None or self.config.head.pool is None:
            raise ModelError("this model's head scores positions, not documents")
        return pooled(h_BTD, documents_BT, self.config.head.pool)

    def transform(self, hidden: Tensor) -> Tensor:
        """What the head does to states (..., D) before its matrix: dense layer, activation, norm and scale."""
        head = self._scored()
        if self.head_dense is not None and head.transform is not None:
            hidden = ACTIVATIONS[head.transform](self.head_dense(hidden))
        if self.head_norm is not None:
            hidden = self.head_norm(hidden)
        return hidden if head.scale == 1.0 else hidden * head.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of states (..., D): over the vocabulary, or whatever the head names."""
        hidden = self.transform(hidden)
        if self._scored().outputs == 0:
            return hidden
        bias = self.head_bias
        matrix: Any = self.tokens if self.head is None else self.head
        if isinstance(matrix, ROUNDED):  # its codes go into the product: no weight is made of them
            scores: Tensor = matrix.scores(hidden)
            return scores if bias is None else scores + bias.to(scores.dtype)
        return F.linear(
            hidden, self.head_weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        )

    def _scored(self) -> Head:
        if self.config.head is None:
            raise ModelError("this model has no head: it gives states, no scores")
        return self.config.head

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, D): the embedding's own where the head is tied."""
        return self.tokens.weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """What is added to the scores (V,), if anything."""
        bias: Tensor | None = self.output_bias if self.head is None else self.head.bias
        return bias

    @property
    def checkpointing(self) -> bool:
        """Recompute activations in the backward pass: about a third more compute, far less memory."""
        return self.main.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                stack.checkpointing = on

    @property
    def dropout(self) -> float:
        """The share of what is embedded, and of what each layer adds, that is dropped in training mode (Vaswani et al.
        2017, section 5.4); attention's weights are all kept."""
        return self.main.dropout

    @dropout.setter
    def dropout(self, share: float) -> None:
        for part in self.modules():
            if isinstance(part, Stack | Block):
                part.dropout = share

    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens, in the model's own type and place."""
        weight = self.main.like
        return Cache(self.config.main, batch, length, dtype or weight.dtype, device or weight.device)
