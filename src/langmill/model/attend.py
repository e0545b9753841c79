"""Attention itself and the masks it takes.

B batch, H query heads, G key and value heads, T queries, S keys, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_B1TS: Tensor | None, scale: float | None
) -> Tensor:
    """softmax(q kᵀ · scale) v, shape (B, H, T, D) (Vaswani et al. 2017, eq. 1).

    mask_B1TS is True where a query may look. None means plain causal where there are as many keys as
    queries, and everything where a single query looks back over a cache. scale None is 1/sqrt(D).
    """
    causal = mask_B1TS is None and q_BHTD.shape[2] > 1
    grouped = q_BHTD.shape[1] != k_BGSD.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTD, k_BGSD, v_BGSD, attn_mask=mask_B1TS, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def causal_mask(
    queries_BT: Tensor, keys_BS: Tensor, window: int | None = None, documents_BT: Tensor | None = None
) -> Tensor:
    """(B, 1, T, S), True where a key's place is not after the query's, within `window` places and,
    where documents are given (then keys are the queries' own row), in the same document."""
    distance_BTS = queries_BT[:, :, None] - keys_BS[:, None, :]
    mask_BTS = distance_BTS >= 0
    if window is not None:
        mask_BTS = mask_BTS & (distance_BTS < window)
    if documents_BT is not None:
        mask_BTS = mask_BTS & (documents_BT[:, :, None] == documents_BT[:, None, :])
    return mask_BTS.unsqueeze(1)


def document_positions(documents_BT: Tensor) -> Tensor:
    """(B, T) positions that restart at 0 wherever the document number changes along a row."""
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    starts_BT = torch.zeros_like(documents_BT, dtype=torch.long)
    starts_BT[:, 1:] = torch.where(documents_BT[:, 1:] != documents_BT[:, :-1], places_T[1:], 0)
    return places_T - starts_BT.cummax(dim=1).values
