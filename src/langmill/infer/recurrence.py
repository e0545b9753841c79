"""A recurrence behind the engine: each slot has one state, and the tokens that led to it.

N tokens of a pass, B rows of one call, T tokens of the longest, W tokens whose scores are wanted, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from langmill.model.recurrent import LSTM

Ids = NDArray[np.int64]


class RecurrentRunner:
    """A `Runner` over an LSTM, on its device; see runner.py.

    A state stands for all tokens before it and cannot be cut. So where a slot goes on from an earlier place than its
    state's, this reads the tokens before that place again: the cost of sharing beginnings is that of reading them.
    """

    def __init__(self, model: LSTM, slots: int, length: int):
        self.model, self.slots, self.length, self.vocab = model, slots, length, model.config.vocab
        self._states = model.new_cache(slots, length).states  # each (layers, slots, D)
        self._ids: list[list[int]] = [[] for _ in range(slots)]
        self._read = [0] * slots  # tokens that a slot's state has read

    @torch.inference_mode()
    def run(self, tokens_N: Ids, slots_N: Ids, places_N: Ids, wanted_W: Ids) -> Tensor:
        firsts = np.flatnonzero(np.diff(slots_N, prepend=-1)).tolist()
        ends = [*firsts[1:], len(slots_N)]
        slots = slots_N[firsts].tolist()
        rows, device = [], self._states[0].device
        for slot, first, end in zip(slots, firsts, ends, strict=True):
            ids, place = self._ids[slot], int(places_N[first])
            ids[place:] = tokens_N[first:end].tolist()
            if self._read[slot] > place:
                self._clear(slot)
            rows.append(torch.tensor(ids[self._read[slot] :], device=device))
        sizes = [len(row) for row in rows]
        lengths_B = None if len(set(sizes)) == 1 else torch.tensor(sizes)
        cache = self.model.new_cache(0, 0)
        cache.states = (self._states[0][:, slots], self._states[1][:, slots])
        for slot in slots:  # what is cut off here leaves no half-read state behind
            self._clear(slot)
        h_BTD = self.model.hidden(pad_sequence(rows, batch_first=True), cache=cache, lengths_B=lengths_B)
        for part, read in zip(self._states, cache.states, strict=True):
            part[:, slots] = read
        for slot in slots:
            self._read[slot] = len(self._ids[slot])
        of_W = np.searchsorted(firsts, wanted_W, side="right") - 1
        at_W = [sizes[row] - ends[row] + place for row, place in zip(of_W, wanted_W, strict=True)]
        return self.model.logits(h_BTD[of_W, at_W]).float().cpu()

    def copy(self, source: int, target: int, length: int) -> None:
        self._clear(target)
        self._ids[target] = self._ids[source][:length]
        if self._read[source] <= length:
            for part in self._states:
                part[:, target] = part[:, source]
            self._read[target] = self._read[source]

    def _clear(self, slot: int) -> None:
        self._read[slot] = 0
        for part in self._states:
            part[:, slot] = 0
