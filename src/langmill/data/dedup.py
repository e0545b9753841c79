"""Which texts are copies of which: exact ones by a hash, near ones by MinHash, verified, in connected components.

It works on the signatures that `minhash.sign` wrote for each part of a corpus, one band of keys at a time. Memory:
about 150 bytes for each text, and what is compared at a time; n-grams stay on the disk. Time grows with the number of
texts; where many share keys without being similar (one form, filled in differently) each of them is compared with
LEADERS others at most for each band. N texts of all parts, numbered one part after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import DataError
from langmill.data.characters import Ints
from langmill.data.minhash import KEYS, ROW, ROWS, SHINGLES, opened

Keep = Literal["longest", "first"]
LEADERS = 256  # texts of a group with which all others of it are compared, at most, for one band
_AT_ONCE = 1 << 21  # n-grams compared at a time


@dataclass(frozen=True, slots=True)
class Duplicates:
    """(N,) the text that stays for each one that goes, -1 where it stays itself; `compared` pairs of texts, of which
    `similar` were near duplicates; `left`: texts that were left in groups of one key after LEADERS comparisons each,
    summed over bands: near duplicates among them may have been missed.

    Where texts of an earlier run stay: `anew_N` is what a run from the beginning would keep in the place of each text,
    -1 for those that it would keep themselves."""

    exact_N: Ints
    near_N: Ints
    compared: int
    similar: int
    left: int = 0
    anew_N: Ints | None = None


class Parts:
    """The signatures of all parts of a corpus, in order."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        rows = [np.array(opened(folder, ROWS)) for folder in self.folders]
        self.firsts = np.cumsum([0, *map(len, rows)])
        self.rows_N: NDArray[Any] = np.concatenate([np.zeros(0, ROW), *rows])
        self.counts_N = np.concatenate([np.zeros(0, int), *(np.diff(own["end"], prepend=0) for own in rows)])
        bands = {len(opened(folder, KEYS)) for folder in self.folders}
        if len(bands) > 1:
            raise DataError(
                f"these parts were signed with different numbers of bands ({', '.join(map(str, sorted(bands)))}): "
                "sign all of them with the same settings"
            )
        self._held: dict[int, NDArray[np.uint32]] = {}
        self.bands = bands.pop() if bands else 0

    def keys(self, band: int) -> NDArray[np.uint64]:
        """(N,) of one band, read from the disk. What was held of the n-grams is let go."""
        self._held.clear()
        return np.concatenate([np.array(opened(folder, KEYS)[band]) for folder in self.folders])

    def shingles(self, texts: Ints) -> tuple[NDArray[np.uint32], Ints]:
        """The n-grams of some texts (sorted numbers), one text after the other, and how many each has."""
        pieces, sizes = [], []
        part_of = np.searchsorted(self.firsts, texts, "right") - 1
        for part in np.unique(part_of).tolist():
            ends = self.rows_N["end"][self.firsts[part] : self.firsts[part + 1]]
            own = texts[part_of == part] - self.firsts[part]
            starts = np.where(own > 0, ends[own - 1], 0)
            lengths = ends[own] - starts
            if part not in self._held:
                self._held[part] = opened(self.folders[part], SHINGLES)
            pieces.append(np.asarray(self._held[part])[_ranges(starts, lengths)])
            sizes.append(lengths)
        return np.concatenate(pieces), np.concatenate(sizes)


def find(
    folders: Sequence[Path], ids: Any, *, threshold: float | None = 0.8, keep: Keep = "longest",
    earlier_N: NDArray[np.bool_] | None = None,
) -> Duplicates:  # fmt: skip
    """What goes and what stays for it. `ids`: an Arrow array of the N texts' ids, which break ties.

    Texts are near duplicates where the Jaccard similarity of their n-grams is at least `threshold` (None: exact ones
    alone), and so are those that a chain of near duplicates joins. Of each group the `keep` one stays: the longest,
    or the one whose id is first; with `earlier_N` all those stay that an earlier run kept, however alike they are by
    now, and only where there is none another one. DataError where ids and parts do not agree.
    """
    parts = Parts(folders)
    total = len(parts.rows_N)
    if len(ids) != total:
        raise DataError(f"{len(ids)} ids were given for {total} texts with signatures")
    none = np.full(total, -1)
    if not total:
        return Duplicates(none, none, 0, 0)
    earlier_N = np.zeros(total, np.bool_) if earlier_N is None else earlier_N
    same_N = _same(parts.rows_N["hash"], parts.rows_N["more"])

    def kept(group_N: Ints, earlier_N: NDArray[np.bool_]) -> Ints:
        lengths_N = parts.rows_N["length"] if keep == "longest" else np.zeros(total, np.int64)
        return _kept(group_N, lengths_N, ids, earlier_N)

    exact_N, near_N, parent_N = kept(same_N, earlier_N), none, np.arange(total)
    counts = np.zeros(3, np.int64)
    if threshold is not None:
        for band in range(parts.bands):
            counts += _join_band(parts, band, exact_N < 0, parent_N, threshold)
        near_N = kept(_roots(parent_N, np.arange(total)), earlier_N)
        through = np.flatnonzero(exact_N >= 0)  # what stays for an exact copy may itself go for a near one
        through = through[near_N[exact_N[through]] >= 0]
        exact_N[through] = near_N[exact_N[through]]
    anew_N = None
    if earlier_N.any():
        _join(parent_N, np.arange(total), same_N)
        anew_N = kept(_roots(parent_N, np.arange(total)), np.zeros(total, np.bool_))
    compared, similar, left = counts.tolist()
    return Duplicates(exact_N, near_N, compared, similar, left, anew_N)


def jaccard(parts: Parts, left: Ints, right: Ints) -> NDArray[np.float64]:
    """The similarity of each pair of texts: n-grams in both over those in either."""
    found = np.zeros(len(left))
    sizes = parts.counts_N[left] + parts.counts_N[right]
    done = np.cumsum(sizes)
    start = 0
    while start < len(left):
        end = max(
            start + 1, int(np.searchsorted(done, (done[start - 1] if start else 0) + _AT_ONCE, "right"))
        )
        both = []
        for side in (left[start:end], right[start:end]):
            texts, which = np.unique(side, return_inverse=True)
            shingles, lengths = parts.shingles(texts)
            firsts = np.cumsum(lengths) - lengths
            own = shingles[_ranges(firsts[which], lengths[which])].astype(np.uint64)
            both.append(
                own | (np.repeat(np.arange(end - start), lengths[which]).astype(np.uint64) << np.uint64(32))
            )
        keys = np.sort(np.concatenate(both))
        twice = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)
        shared = np.bincount(twice.astype(np.int64), minlength=end - start)
        found[start:end] = shared / np.maximum(sizes[start:end] - shared, 1)
        start = end
    return found


def _join_band(
    parts: Parts, band: int, asked_N: NDArray[np.bool_], parent_N: Ints, threshold: float
) -> tuple[int, int, int]:
    """Joins near duplicates among texts with equal keys: pairs compared, pairs that were similar, texts left.

    Each text of a group is compared with the group's first; those that are not joined to it make the next group. So
    every two texts of a group are compared, or joined by what both are similar to, unless LEADERS rounds were not
    enough.
    """
    keys = parts.keys(band)
    texts = np.flatnonzero(asked_N & (keys != 0))
    texts = texts[_shared(keys[texts])]
    texts = texts[np.lexsort((texts, keys[texts]))]
    keys = keys[texts]
    compared = similar = 0
    for _ in range(LEADERS):
        new = np.concatenate(([True], keys[1:] != keys[:-1], [True]))[: len(keys) + 1]
        grouped = ~(new[1:] & new[: len(keys)])
        texts, keys = texts[grouped], keys[grouped]
        if not len(texts):
            break
        first = np.concatenate(([True], keys[1:] != keys[:-1]))
        leader = texts[np.maximum.accumulate(np.where(first, np.arange(len(texts)), 0))]
        apart = np.flatnonzero(_roots(parent_N, leader) != _roots(parent_N, texts))
        a, b = parts.counts_N[leader[apart]], parts.counts_N[texts[apart]]
        apart = apart[
            np.minimum(a, b) >= threshold * np.maximum(a, b)
        ]  # no more than the smaller has is shared
        near = apart[jaccard(parts, leader[apart], texts[apart]) >= threshold]
        compared, similar = compared + len(apart), similar + len(near)
        _join(parent_N, leader[near], texts[near])
        rest = _roots(parent_N, leader) != _roots(parent_N, texts)
        texts, keys = texts[rest], keys[rest]
    return compared, similar, len(texts)


def _roots(parent_N: Ints, texts: Ints) -> Ints:
    """The representative of each text's group."""
    found = parent_N[texts]
    while True:
        above = parent_N[found]
        if np.array_equal(above, found):
            parent_N[texts] = found  # shorter ways for the next who ask
            return found
        found = above


def _join(parent_N: Ints, left: Ints, right: Ints) -> None:
    """Makes one group of the groups of both sides of each pair: the least number represents it."""
    while len(left):
        a, b = _roots(parent_N, left), _roots(parent_N, right)
        apart = a != b
        left, right, a, b = left[apart], right[apart], a[apart], b[apart]
        np.minimum.at(parent_N, np.maximum(a, b), np.minimum(a, b))


def _same(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> Ints:
    """(N,) a number for each group of equal pairs of hashes: the least of its texts."""
    group = np.arange(len(first))
    texts = _shared(first)
    order = texts[np.lexsort((texts, second[texts], first[texts]))]
    if len(order):
        a, b = first[order], second[order]
        new = np.concatenate(([True], (a[1:] != a[:-1]) | (b[1:] != b[:-1])))
        group[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    return group


def _shared(keys: NDArray[np.uint64]) -> Ints:
    """Where the keys stand that are there more than once, and a few others: so few that they can be put in order."""
    if not len(keys):
        return np.zeros(0, np.int64)
    # The place instead of the low bits: sorting values is many times faster than sorting places by values.
    bits = np.uint64(len(keys).bit_length())
    packed = np.sort((keys >> bits << bits) | np.arange(len(keys), dtype=np.uint64))
    same = (packed[1:] >> bits) == (packed[:-1] >> bits)
    chosen = np.concatenate((same, [False])) | np.concatenate(([False], same))
    return (packed[chosen] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def _kept(group_N: Ints, sizes_N: Ints, ids: Any, earlier_N: NDArray[np.bool_]) -> Ints:
    """(N,) the text of its group that stays for each one that goes, -1 for those that stay: the earlier ones, or else
    the largest, or of several the one whose id is first."""
    kept = np.full(len(group_N), -1)
    several = np.flatnonzero(np.bincount(group_N, minlength=len(group_N))[group_N] > 1)
    if not len(several):
        return kept
    names = ids.take(several).to_pylist()
    group, size, late = group_N[several], sizes_N[several], ~earlier_N[several]
    order = sorted(range(len(several)), key=lambda i: (group[i], late[i], -size[i], names[i]))
    ordered = several[order]
    groups = group_N[ordered]
    first = np.concatenate(([True], groups[1:] != groups[:-1]))
    best = ordered[np.maximum.accumulate(np.where(first, np.arange(len(ordered)), 0))]
    kept[ordered] = np.where((best == ordered) | earlier_N[ordered], -1, best)
    return kept


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """All numbers of ranges, one range after the other."""
    total = np.cumsum(lengths)
    offsets = np.repeat(starts - (total - lengths), lengths)
    return np.arange(len(offsets)) + offsets
