"""What is compared of texts: a hash of the whole text, its word 5-grams, and keys that near duplicates share.

MinHash with bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, section 3.4): of two texts whose sets of
n-grams have the Jaccard similarity s, at least one key is equal with probability 1 - (1 - s**rows)**bands: with the
defaults 0.992 at 0.8, 0.21 at 0.5. The n-grams themselves are kept too (32 bits each), so that candidates are
verified exactly. A word is a run of letters, digits and marks in lower case; a character of a script without spaces
is one of its own.

R rows, S n-grams.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import UsageError
from langmill.data.characters import Hashes, Ints, Texts, longer
from langmill.data.judge import chunks

KEYS, SHINGLES, ROWS = "keys.npy", "shingles.npy", "rows.npy"
ROW = np.dtype([("hash", "<u8"), ("more", "<u8"), ("length", "<i8"), ("end", "<i8")])
_BLOCK = 1 << 15  # n-grams at a time: they and their products stay in the processor's nearest cache


@dataclass(frozen=True)
class Shape:
    """`n` words to a gram, `bands` keys of `rows` minima each; `seed` of the hash functions."""

    n: int = 5
    bands: int = 16
    rows: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n", "bands", "rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"near duplicates need {name} of at least 1, not {getattr(self, name)}")

    def caught(self, similarity: float) -> float:
        """The probability that two texts of this similarity are compared."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)


@dataclass(frozen=True, slots=True)
class Signatures:
    """(R,) `rows`: hash of the whole text, its length in characters, and where its n-grams end in `shingles_S`, which
    are sorted and different within a text; `keys_BR`: one a band."""

    rows_R: NDArray[Any]
    shingles_S: NDArray[np.uint32]
    keys_BR: Hashes

    def write(self, folder: Path) -> None:
        """Three files of numpy's in a folder that is there."""
        for name, array in ((ROWS, self.rows_R), (SHINGLES, self.shingles_S), (KEYS, self.keys_BR)):
            np.save(folder / name, array, allow_pickle=False)


def opened(folder: Path, name: str) -> NDArray[Any]:
    """One of ROWS, KEYS and SHINGLES as `write` left it; it stays on the disk until it is looked at."""
    found: NDArray[Any] = np.load(folder / name, "r", allow_pickle=False)
    return found


def sign(texts: Any, shape: Shape) -> Signatures:
    """The signatures of an Arrow array of texts. About 5 bytes for each 6 of text, and 32 + 8 * bands for each row."""
    found = [_sign(rows, shape) for _, rows in chunks(texts, np.arange(len(texts)))]
    if not found:
        found = [_sign([], shape)]
    rows = np.concatenate([part.rows_R for part in found])
    sizes = np.cumsum([0, *(len(part.shingles_S) for part in found)])
    rows["end"] += np.repeat(sizes[:-1], [len(part.rows_R) for part in found])
    shingles = np.concatenate([part.shingles_S for part in found])
    return Signatures(rows, shingles, np.concatenate([part.keys_BR for part in found], 1))


def _sign(texts: list[str], shape: Shape) -> Signatures:
    shingles, ends = shingle_sets(texts, shape.n)
    rows = np.zeros(len(texts), ROW)
    hashes = b"".join(map(_digest, texts))
    rows["hash"], rows["more"] = np.frombuffer(hashes, "<u8").reshape(-1, 2).T
    rows["length"] = np.fromiter(map(len, texts), np.int64, len(texts))
    rows["end"] = ends
    return Signatures(rows, shingles, band_keys(shingles, ends, shape))


def _digest(text: str) -> bytes:
    """Of the text in lower case with single spaces."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()


def shingle_sets(texts: list[str], n: int) -> tuple[NDArray[np.uint32], Ints]:
    """(S,) sorted different n-grams of each text, one text after the other, and (R,) where each ends. A text of fewer
    than n words has one gram of all of them."""
    read = Texts(texts, fold=True)
    words = read.names
    hashes = read.hashes(words)
    left = words.bounds[1:][words.rows] - np.arange(len(hashes))
    found = hashes
    for k in range(1, n):
        more = longer(found, hashes[k:])
        # A row that is shorter than n keeps what its words have given so far.
        short = np.minimum(words.counts[words.rows[: len(found)]], n) <= k
        found = np.where(
            short[: len(found)], found, np.append(more, np.zeros(len(found) - len(more), np.uint64))
        )
    first = np.zeros(len(hashes), bool)
    first[words.bounds[:-1][words.counts > 0]] = True
    chosen = (left >= n) | (first & (words.counts[words.rows] < n))
    keys = found[chosen] * np.uint64(0x9FB21C651E98DF25)
    keys = (words.rows[chosen].astype(np.uint64) << np.uint64(32)) | (keys >> np.uint64(32))
    keys.sort()
    keys = keys[np.concatenate(([True], keys[1:] != keys[:-1]))] if len(keys) else keys
    ends = np.searchsorted(keys, np.arange(1, len(texts) + 1, dtype=np.uint64) << np.uint64(32))
    return keys.astype(np.uint32), ends


def band_keys(shingles_S: NDArray[np.uint32], ends_R: Ints, shape: Shape) -> Hashes:
    """(bands, R) a hash of the least values of `rows` permutations x -> a * x + b (mod 2**32) of each text's n-grams;
    0 for a text without a word."""
    random = np.random.default_rng(shape.seed)
    total = shape.bands * shape.rows
    factors = random.integers(0, 1 << 32, total, np.uint32) | np.uint32(1)
    offsets = random.integers(0, 1 << 32, total, np.uint32)
    weights = random.integers(0, 1 << 63, total, np.uint64) * np.uint64(2) + np.uint64(1)
    keys_BR = np.zeros((shape.bands, len(ends_R)), np.uint64)
    starts_R = np.concatenate(([0], ends_R[:-1])) if len(ends_R) else ends_R
    filled = np.flatnonzero(ends_R > starts_R)
    start = 0
    while start < len(filled):
        limit = starts_R[filled[start]] + _BLOCK
        end = max(start + 1, int(np.searchsorted(ends_R[filled], limit, "right")))
        rows = filled[start:end]
        block = shingles_S[starts_R[rows[0]] : ends_R[rows[-1]]]
        places = starts_R[rows] - starts_R[rows[0]]
        values = np.empty_like(block)
        for k in range(total):
            np.multiply(block, factors[k], out=values)
            np.add(values, offsets[k], out=values)
            least = np.minimum.reduceat(values, places)
            keys_BR[k // shape.rows, rows] += (least.astype(np.uint64) + np.uint64(1)) * weights[k]
        start = end
    keys_BR ^= keys_BR >> np.uint64(31)
    return keys_BR
