"""How much of each source there is in the clean set: documents left out of some, and others there more than once."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from langmill.common.errors import UsageError
from langmill.data.characters import Ints

NAME, REASON = "mixture", "more than its source's share"


def weights_of(given: Sequence[str], named: Sequence[str]) -> dict[str, float]:
    """`mixture.weights` by source. UsageError for what is no weight, names no source, or leaves one out."""
    found: dict[str, float] = {}
    for one in given:
        name, equals, text = one.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = -1
        if not equals or not 0 < weight < float("inf"):
            raise UsageError(f"mixture.weights '{one}' is not SOURCE=WEIGHT with a weight above 0")
        if name not in named:
            near = difflib.get_close_matches(name, named, 1)
            hint = f"did you mean {near[0]}?" if near else f"the sources are {', '.join(named)}"
            raise UsageError(f"mixture.weights: there is no source '{name}': {hint}")
        found[name] = weight
    if found and (left := [name for name in named if name not in found]):
        raise UsageError(f"mixture.weights gives no weight to {', '.join(left)}: give one to each source")
    return found


def repeats(sizes: Mapping[str, int], weights: Mapping[str, float], most: float) -> dict[str, float]:
    """How many times each source is in the set, so that its bytes have the share of its weight, and that the whole is
    about as long as all sources together. None is there more than `most` times: what it falls short the others have.
    """
    found: dict[str, float] = {}
    open_ = {name for name, size in sizes.items() if size}
    left = float(sum(sizes.values()))
    while open_:
        total = sum(weights[name] for name in open_)
        wanted = {name: left * weights[name] / total / sizes[name] for name in open_}
        capped = {name for name, times in wanted.items() if times > most}
        for name in capped or open_:
            found[name] = min(most, wanted[name])
            left -= found[name] * sizes[name]
        open_ -= capped or open_
    return {name: found.get(name, 1.0) for name in sizes}


@dataclass(frozen=True)
class Mixture:
    """Drops documents of sources that are there less than once; `repeat` adds copies of the others.

    times: (source, how many times). Which documents it meets is drawn by a hash of their ids.
    """

    times: tuple[tuple[str, float], ...]
    name: str = NAME

    def __call__(self, batch: pa.Table) -> pa.Table:
        gone = pc.and_(pc.is_null(batch["dropped"]), pa.array(self._copies(batch) == 0))
        dropped = pc.if_else(gone, pa.scalar(f"{self.name}: {REASON}"), batch["dropped"])
        return batch.set_column(batch.column_names.index("dropped"), "dropped", dropped)

    def repeat(self, batch: pa.Table) -> pa.Table:
        """The rows, each as often as it should be there; the id of a second one ends in ~2."""
        copies = self._copies(batch)
        rows = np.repeat(np.arange(len(batch)), copies)
        number = np.arange(len(rows)) - np.repeat(np.cumsum(copies) - copies, copies)
        more = pc.if_else(
            pa.array(number > 0),
            pc.binary_join_element_wise("~", pc.cast(pa.array(number + 1), pa.string()), ""),
            pa.scalar(""),
        )
        batch = batch.take(pa.array(rows))
        ids = pc.binary_join_element_wise(batch["id"], more, "")
        return batch.set_column(batch.column_names.index("id"), "id", ids)

    def _copies(self, batch: pa.Table) -> Ints:
        times = dict(self.times)
        found = [
            int(times.get(source, 1.0) + _lot(id))
            for source, id in zip(batch["source"].to_pylist(), batch["id"].to_pylist(), strict=True)
        ]
        return np.array(found, np.int64)


def _lot(id: str) -> float:
    """At least 0, below 1: the same each time."""
    digest = hashlib.blake2b(id.encode("utf-8"), digest_size=8, person=b"mixture").digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
