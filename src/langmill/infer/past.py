"""What a model has read of a growing row, so that the next prompt is read from where it differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langmill.families.folder import Model
from langmill.model.cache import Cache


class Past:
    """The cache of one row of one model, kept from one prompt to the next.

    ids: what the cache holds for certain, even where reading was cut off. reused: how many ids of the latest prompt
    need not be read again. A model whose cache cannot be cut (a recurrence) reads every prompt anew.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.reused = 0
        self._cache: Any = None

    def open(self, model: Model, prompt: Sequence[int], length: int) -> Any:
        """A cache for `length` tokens that holds the first `reused` ids of the prompt: never all, one must be read."""
        pairs = enumerate(zip(self.ids, prompt, strict=False))
        shared = next((at for at, (a, b) in pairs if a != b), min(len(self.ids), len(prompt)))
        self.reused = min(shared, len(prompt) - 1) if isinstance(self._cache, Cache) else 0
        self.ids = list(prompt[: self.reused])
        if not isinstance(self._cache, Cache):
            self._cache = model.new_cache(1, length)
        elif self._cache.length < length:
            self._cache = _grown(model, self._cache, self.reused, length)
        if isinstance(self._cache, Cache):
            self._cache.cut(self.reused)
        return self._cache

    def read(self, ids: Sequence[int]) -> None:
        """Note that the cache holds these ids too."""
        self.ids += ids


def _grown(model: Model, old: Cache, kept: int, length: int) -> Any:
    """A larger cache with the first `kept` tokens of the old; at least twice as large, so that few copies are made."""
    larger: Any = model.new_cache(1, max(length, min(2 * old.length, model.config.length)))
    for here, there in zip(old.layers, larger.layers, strict=True):
        there.keys_BGSD[:, :, :kept] = here.keys_BGSD[:, :, :kept]
        there.values_BGSD[:, :, :kept] = here.values_BGSD[:, :, :kept]
    return larger
