"""The LSTM language model, the baseline that a Transformer has to beat, behind the Transformer's own calls.

Embedding → LSTM layers → softmax over the vocabulary (Zaremba et al. 2014, arXiv:1409.2329, without dropout).
B batch, T tokens, N documents, L layers, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, unpack_sequence

from langmill.model.attend import stretches
from langmill.model.blocks import table
from langmill.model.config import LSTMConfig


class StateCache:
    """What an LSTM remembers: its two states, each (L, B, D), and how many tokens each row has read."""

    def __init__(self, config: LSTMConfig, batch: int, dtype: torch.dtype, device: torch.device):
        shape = (config.layers, batch, config.hidden)
        self.states = (
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
        self.lengths_B = torch.zeros(batch, dtype=torch.long, device=device)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.states = (self.states[0][:, rows], self.states[1][:, rows])
        self.lengths_B = self.lengths_B[rows]


class LSTM(nn.Module):
    """Tokens in, one score a vocabulary entry and position out, by recurrence instead of attention."""

    def __init__(self, config: LSTMConfig):
        super().__init__()
        self.config = config
        self.tokens = table(config.vocab, config.dim)
        self.lstm = nn.LSTM(config.dim, config.hidden, config.layers, batch_first=True)
        self.head = None if config.tied else nn.Linear(config.hidden, config.vocab, bias=False)
        self.checkpointing = False  # accepted and without effect: the recurrence keeps little

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: StateCache | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """Scores (B, T, V); the arguments are those of `Transformer.hidden`."""
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
        cache: StateCache | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """States of the last layer (B, T, D); each document of a packed row starts from nothing.

        positions_BT is accepted, since batches carry it, and not needed: a recurrence knows its place.
        """
        x_BTD = self.tokens(tokens_BT)
        if documents_BT is not None:
            return self._by_document(x_BTD, documents_BT)
        if cache is None:
            return self.lstm(x_BTD)[0]
        if lengths_B is None:
            h_BTD, cache.states = self.lstm(x_BTD, cache.states)
            cache.lengths_B = cache.lengths_B + tokens_BT.shape[1]
            return h_BTD
        packed = pack_padded_sequence(x_BTD, lengths_B.cpu(), batch_first=True, enforce_sorted=False)
        out, cache.states = self.lstm(packed, cache.states)
        cache.lengths_B = cache.lengths_B + lengths_B
        return pad_packed_sequence(out, batch_first=True, total_length=tokens_BT.shape[1])[0]

    def _by_document(self, x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        """Cut the rows into their documents, run those side by side, and put the states back."""
        rows, length = documents_BT.shape
        documents = x_BTD.flatten(0, 1).split(list(stretches(documents_BT)))
        states, _ = self.lstm(pack_sequence(documents, enforce_sorted=False))
        return torch.cat(unpack_sequence(states)).view(rows, length, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, (..., V), of states (..., D)."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, D)."""
        return self.tokens.weight if self.head is None else self.head.weight

    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> StateCache:
        """Empty states for `batch` rows; `length` is not needed, a recurrence has no limit."""
        weight = self.tokens.weight
        return StateCache(self.config, batch, dtype or weight.dtype, device or weight.device)
