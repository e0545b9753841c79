"""One state a document from the states of its tokens.

B rows, T tokens, D width, K documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from langmill.model.config import Pool


def pooled(h_BTD: Tensor, documents_BT: Tensor | None, how: Pool) -> Tensor:
    """(K, D): the first token's state, the last one's or the mean of all, for each document in reading order.

    documents_BT: as in `Transformer.hidden`, 0 for padding; None: a row is a document.
    """
    if documents_BT is None:
        return {"first": h_BTD[:, 0], "last": h_BTD[:, -1], "mean": h_BTD.mean(dim=1)}[how]
    real_BT = documents_BT > 0
    begins_BT, ends_BT = real_BT.clone(), real_BT.clone()
    begins_BT[:, 1:] &= documents_BT[:, 1:] != documents_BT[:, :-1]
    ends_BT[:, :-1] &= documents_BT[:, 1:] != documents_BT[:, :-1]
    if how == "first":
        return h_BTD[begins_BT]
    if how == "last":
        return h_BTD[ends_BT]
    number_N = begins_BT.flatten().cumsum(0)[real_BT.flatten()] - 1
    h_ND = h_BTD[real_BT]
    sums_KD = h_ND.new_zeros(int(begins_BT.sum()), h_ND.shape[-1]).index_add(0, number_N, h_ND)
    return sums_KD / torch.bincount(number_N).to(h_ND.dtype)[:, None]
