"""Attention itself and what each token may look at.

B batch, H query heads, G key and value heads, T queries, S keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from langmill.model import short
from langmill.model.cache import Cache
from langmill.model.config import StackConfig
from langmill.model.packed import Packed, attend_packed, starts, suits


@dataclass(frozen=True)
class Seen:
    """What queries look at. mask: (B or 1, 1 or H, T, S), True where a query may look, or numbers added to the scores;
    None for everything, or with `causal` for all that is not later. cuts: instead of a mask, the lengths of stretches
    of the flattened queries and keys that see each other alone, in order. packed: the same for a GPU."""

    mask: Tensor | None = None
    causal: bool = False
    cuts: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    packed: Packed | None = None


def attend(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, seen: Seen, scale: float | None) -> Tensor:
    """softmax(q kᵀ · scale) v, shape (B, H, T, D) (Vaswani et al. 2017, eq. 1). scale None is 1/sqrt(D)."""
    if seen.packed is not None:
        return attend_packed(q_BHTD, k_BGSD, v_BGSD, seen.packed, scale)
    grouped = q_BHTD.shape[1] != k_BGSD.shape[1]
    if seen.cuts is None:
        causal = seen.causal and q_BHTD.shape[2] > 1
        if seen.mask is None and short.suits(q_BHTD, k_BGSD):
            return short.attend_short(q_BHTD, k_BGSD, v_BGSD, causal, scale or q_BHTD.shape[-1] ** -0.5)
        if grouped and seen.mask is not None and seen.mask.shape[1] == 1 and _next_on_gpu(q_BHTD):
            q_BGRD = q_BHTD.reshape(len(k_BGSD), k_BGSD.shape[1], -1, q_BHTD.shape[3])
            return attend(q_BGRD, k_BGSD, v_BGSD, seen, scale).reshape(q_BHTD.shape)
        return F.scaled_dot_product_attention(
            q_BHTD, k_BGSD, v_BGSD, attn_mask=seen.mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    rows, (queries, keys), alone = len(q_BHTD), seen.cuts, Seen(causal=seen.causal)
    if short.tiny(q_BHTD, k_BGSD, len(queries)):  # in float32, of which autocast would know nothing
        with torch.autocast(q_BHTD.device.type, enabled=False):
            wide = attend(q_BHTD.float(), k_BGSD.float(), v_BGSD.float(), seen, scale)
        return wide.to(q_BHTD.dtype)
    sides = ((q_BHTD, queries), (k_BGSD, keys), (v_BGSD, keys))
    parts = [_flat(x).split(list(cuts), dim=2) for x, cuts in sides]
    mixed = []
    for q, k, v in zip(*parts, strict=True):
        mixed.append(attend(q, k, v, alone, scale) if k.shape[2] else torch.zeros_like(q))
    return torch.cat(mixed, dim=2).unflatten(2, (rows, -1)).squeeze(0).transpose(0, 1)


def _next_on_gpu(q_BHTD: Tensor) -> bool:
    """Whether these are the queries of one token a row, on a GPU. With a mask torch has no kernel there for grouped
    heads, and would repeat all keys and values; the heads of a group see the same, as rows of one head do."""
    return q_BHTD.shape[2] == 1 and q_BHTD.device.type != "cpu"


def _flat(x_BHTD: Tensor) -> Tensor:
    """(1, H, B·T, D)."""
    return x_BHTD.transpose(0, 1).flatten(1, 2).unsqueeze(0)


class Masks:
    """What the layers of one pass see, made once for each window that they have."""

    def __init__(
        self,
        c: StackConfig,
        documents_BT: Tensor | None,
        cache: Cache | None,
        x_BTD: Tensor,
        bias: Callable[[Tensor], Tensor] | None,
    ):
        new, device = x_BTD.shape[1], x_BTD.device
        self.causal, self.documents_BT, self.cache, self.bias = c.causal, documents_BT, cache, bias
        self.new, self.past, self.dtype = new, 0 if cache is None else cache.longest, x_BTD.dtype
        if cache is not None:
            self.queries, self.keys = cache.positions(new), cache.key_positions(new)
        else:
            self.queries = self.keys = torch.arange(new, device=device)[None]
        self.apart = documents_BT is not None and device.type == "cpu" and not torch.compiler.is_compiling()
        self.starts_K1: Tensor | None = None
        if documents_BT is not None and bias is None and suits(x_BTD, c.head_dim):
            self.starts_K1 = starts(documents_BT).int()
        self._made: dict[int | None, Seen] = {}

    def among(self, window: int | None) -> Seen:
        """Among the tokens themselves and those in the cache."""
        if window not in self._made:
            self._made[window] = self._among(window)
        return self._made[window]

    def _among(self, window: int | None) -> Seen:
        cache, past, new = self.cache, self.past, self.new
        wide = window is None or window >= past + new
        if cache is not None and cache.seen_BTS is not None:
            return self._seen(cache.seen_BTS.unsqueeze(1))
        if self.starts_K1 is not None:
            return Seen(packed=Packed(self.starts_K1, new, self.causal, None if wide else window))
        if self.bias is None and wide:
            if self.documents_BT is None and not past:
                return Seen(causal=self.causal)
            if self.documents_BT is None and new == 1 and cache is not None and cache.even:
                return Seen()
            if self.apart and self.documents_BT is not None:
                runs = stretches(self.documents_BT)
                return Seen(causal=self.causal, cuts=(runs, runs))
        return self._seen(visible(self.queries, self.keys, self.causal, window, self.documents_BT))

    def _seen(self, mask: Tensor) -> Seen:
        if self.bias is None:
            return Seen(mask)
        bias = self.bias(self.keys[:, None, :] - self.queries[:, :, None]).to(self.dtype)
        return Seen(bias.masked_fill(~mask, -torch.inf))

    def across(self, documents_BS: Tensor | None) -> Seen:
        """From these tokens to an encoder's: document n sees document n; without documents all that is no padding."""
        if documents_BS is None:
            return Seen()
        if self.documents_BT is None:
            return Seen(None if bool((documents_BS > 0).all()) else (documents_BS > 0)[:, None, None, :])
        if self.apart and (cuts := paired(self.documents_BT, documents_BS)) is not None:
            return Seen(cuts=cuts)
        mask = self.documents_BT[:, :, None] == documents_BS[:, None, :]
        return Seen(mask.unsqueeze(1))


def visible(
    queries_BT: Tensor,
    keys_BS: Tensor,
    causal: bool,
    window: int | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """(B, 1, T, S), True where a key's place is not after the query's (if causal), within `window` places and,
    where documents are given (then keys are the queries' own row), in the same document."""
    distance_BTS = queries_BT[:, :, None] - keys_BS[:, None, :]
    mask_BTS = distance_BTS >= 0 if causal else torch.ones_like(distance_BTS, dtype=torch.bool)
    if window is not None:
        mask_BTS = mask_BTS & (distance_BTS < window)
    if documents_BT is not None:
        mask_BTS = mask_BTS & (documents_BT[:, :, None] == documents_BT[:, None, :])
    return mask_BTS.unsqueeze(1)


def stretches(documents_BT: Tensor) -> tuple[int, ...]:
    """The lengths of the runs of equal document numbers, row after row; none crosses from a row into the next."""
    return tuple(starts(documents_BT).diff().tolist())


def paired(documents_BT: Tensor, documents_BS: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Stretches of queries and of keys with the same documents in the same order, padding last in each row; None where
    they do not pair up."""
    cuts: list[tuple[int, ...]] = []
    most = int(max(documents_BT.max(), documents_BS.max()))
    for documents in (documents_BT, documents_BS):
        moved = torch.where(documents == 0, most + 1, documents).long()
        if bool((moved[:, 1:] < moved[:, :-1]).any()):
            return None
        counts = torch.zeros(len(moved), most + 2, dtype=torch.long).scatter_add_(
            1, moved, torch.ones_like(moved)
        )
        cuts.append(tuple(counts[:, 1:].flatten().tolist()))
    kept = [(q, k) for q, k in zip(*cuts, strict=True) if q or k]
    return tuple(q for q, _ in kept), tuple(k for _, k in kept)


def document_positions(documents_BT: Tensor) -> Tensor:
    """(B, T) positions that restart at 0 wherever the document number changes along a row."""
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    starts_BT = torch.zeros_like(documents_BT, dtype=torch.long)
    starts_BT[:, 1:] = torch.where(documents_BT[:, 1:] != documents_BT[:, :-1], places_T[1:], 0)
    return places_T - starts_BT.cummax(dim=1).values
