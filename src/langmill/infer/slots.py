"""Which tokens stand in which slot of a runner, and what a new prompt can share with them.

A slot that nobody uses keeps its tokens until it is needed: what one request read spares another its reading. What an
adapter read is good for this adapter alone.

S slots, L places of each, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Taken(NamedTuple):
    """A slot for a new prompt. kept: its first tokens that need not be read. source: the slot to copy those from,
    unless they are in place (None)."""

    slot: int
    kept: int
    source: int | None


class Slots:
    """tokens_SL: the tokens of each slot; known_S: how many; held_S: how many of those the model has read, and so the
    runner's cache holds; taken_S: whether a request uses it; adapters_S: the adapter that reads it, 0 for the model."""

    def __init__(self, count: int, length: int):
        self.tokens_SL = np.zeros((count, length), np.int64)
        self.known_S, self.held_S, self.adapters_S, self._used_S = (
            np.zeros(count, np.int64) for _ in range(4)
        )
        self.taken_S, self._private_S = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        self._clock = 0

    @property
    def free(self) -> bool:
        """Whether there is a slot that nobody uses."""
        return not bool(self.taken_S.all())

    def common(self, ids_T: Ids, adapter: int = 0) -> Ids:
        """(S,) how many tokens at their beginning each slot of this adapter and the ids have in common, those not yet
        read included."""
        if not len(ids_T):
            return np.zeros_like(self.known_S)
        same_ST = self.tokens_SL[:, : len(ids_T)] == ids_T
        first_S = np.where(same_ST.all(1), len(ids_T), same_ST.argmin(1))
        return np.minimum(first_S, self.known_S) * (~self._private_S & (self.adapters_S == adapter))

    def take(self, ids_T: Ids, worth: int, private: bool = False, adapter: int = 0) -> Taken:
        """The best free slot for the ids; the last of them is never kept, since its scores are needed.

        The least recently used slot is given, and what a better one knows copied there, if that is at least `worth`
        tokens more; but a free better one is used in place where less is forgotten so. private: what is read depends
        on more than the ids, and is shared with nobody.
        """
        shared_S = np.minimum(self.common(ids_T[:-1], adapter), self.held_S) * (not private)
        slot = oldest = int(np.where(self.taken_S, np.iinfo(np.int64).max, self._used_S).argmin())
        best = int(np.lexsort((self._used_S, self.taken_S, -shared_S))[0])
        source, forgotten_S = None, self.held_S - shared_S
        if shared_S[best] - shared_S[oldest] >= worth:
            if not self.taken_S[best] and forgotten_S[best] < forgotten_S[oldest]:
                slot = best
            else:
                source = best
        kept = int(shared_S[slot if source is None else source])
        for touched in (slot, *(() if source is None else (source,))):
            self._touch(touched)
        self.tokens_SL[slot, : len(ids_T)] = ids_T
        self.known_S[slot], self.held_S[slot] = len(ids_T), kept
        self.taken_S[slot], self._private_S[slot], self.adapters_S[slot] = True, private, adapter
        return Taken(slot, kept, source)

    def append(self, slot: int, id: int) -> None:
        """One more token, not yet read."""
        self.tokens_SL[slot, self.known_S[slot]] = id
        self.known_S[slot] += 1

    def release(self, slot: int, keep: bool) -> None:
        """Nobody uses it any more. keep: what was read is good for others."""
        self.taken_S[slot] = False
        if not keep or self._private_S[slot]:
            self.held_S[slot] = 0
        self._private_S[slot] = False
        self.known_S[slot] = self.held_S[slot]
        if self.held_S[slot]:
            self._touch(slot)
        else:
            self._used_S[slot] = 0  # nothing to lose: the first to be given

    def forget(self) -> None:
        """Nothing that any slot holds is good any more."""
        self.known_S[:] = self.held_S[:] = self._used_S[:] = 0

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used_S[slot] = self._clock
