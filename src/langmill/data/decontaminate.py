"""A step that drops texts which hold what a model will be tested on: n-grams of words that evaluation files have too.

As for GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C): 13 words in a row, in lower case and without
punctuation; a shorter test counts as a whole, where it has at least 8 words. In scripts without spaces a character is
counted as a word, and 20 in a row are asked for. The whole text is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from langmill.common.errors import DataError, MissingExtra, UsageError
from langmill.data.characters import LONE, Bools, Hashes, Ints, Texts, longer, sums
from langmill.data.judge import SHARE, Verdict, judge
from langmill.data.streams import BROKEN, open_bytes

if TYPE_CHECKING:
    import pyarrow as pa

READ = (".jsonl", ".json", ".txt", ".md", ".parquet")
_AT_ONCE = 1000  # tests read at a time


@dataclass(frozen=True)
class Decontaminate:
    """`against`: files of tests: every string in a row of .jsonl or .parquet or in .json, every line of .txt and .md
    (all but Parquet also .gz, .zst). DataError, on first use, for a file that cannot be read or asks nothing.
    """

    against: tuple[str, ...]
    words: int = 13
    least_words: int = 8  # of a shorter test
    characters: int = 20  # instead of words, in scripts without spaces
    least_characters: int = 13
    name: str = "decontaminate"

    def __post_init__(self) -> None:
        for least, most in ((self.least_words, self.words), (self.least_characters, self.characters)):
            if not 1 <= least <= most:
                raise UsageError(
                    f"{self.name}: the shortest test ({least}) must have 1 to {most} words or characters"
                )

    def __call__(self, batch: pa.Table) -> pa.Table:
        return judge(batch, self.name, self.judge, by_characters=None)

    def read(self) -> Tests:
        """What is looked for; read once in a process."""
        return _tests(self.against, self.words, self.least_words, self.characters, self.least_characters)

    def judge(self, rows: list[str]) -> Verdict:
        """(R,) which rows hold something of the first file, of the second, ..."""
        tests = self.read()
        texts = Texts(rows, fold=True)
        alone = _alone(texts)
        names = [Path(file).name for file in self.against]
        clear = len(set(names)) == len(names)
        files = [
            f"holds tests of {name if clear else file}"
            for name, file in zip(names, self.against, strict=True)
        ]
        reasons = {file: np.zeros(len(rows), bool) for file in files}
        bounds, rows_W = texts.names.bounds, texts.names.rows
        left_W = bounds[1:][rows_W] - np.arange(len(rows_W))
        for n, grams in each_gram(texts, max((n for n, _ in tests), default=0)):
            for by_characters in (False, True):
                wanted, file_of = tests.get(
                    (n, by_characters), (np.zeros(0, np.uint64), np.zeros(0, np.int64))
                )
                if not len(wanted):
                    continue
                place = np.minimum(np.searchsorted(wanted, grams), len(wanted) - 1)
                size = len(grams)
                hit = (
                    (wanted[place] == grams) & (left_W[:size] >= n) & (alone[rows_W[:size]] == by_characters)
                )
                for row, file in zip(rows_W[:size][hit].tolist(), file_of[place[hit]].tolist(), strict=True):
                    reasons[files[file]][row] = True
        return Verdict(reasons)


Tests = dict[tuple[int, bool], tuple[Hashes, Ints]]


@lru_cache(maxsize=2)
def _tests(against: tuple[str, ...], words: int, least: int, characters: int, least_characters: int) -> Tests:
    """By n and whether characters are counted: sorted hashes of n-grams, and the number of the file of each."""
    found: dict[tuple[int, bool], list[tuple[Hashes, int]]] = {}
    for number, file in enumerate(against):
        before = sum(map(len, found.values()))
        for strings in _batches(Path(file)):
            texts = Texts(strings, fold=True)
            alone, counts, bounds = _alone(texts), texts.names.counts, texts.names.bounds
            most = np.where(alone, characters, words)
            sizes = np.where(counts >= np.where(alone, least_characters, least), np.minimum(counts, most), 0)
            for n, grams in each_gram(texts, int(sizes.max(initial=0))):
                for by_characters in (False, True):
                    rows = np.flatnonzero((sizes == n) & (alone == by_characters))
                    if len(rows):
                        own = [grams[bounds[row] : bounds[row + 1] - n + 1] for row in rows.tolist()]
                        found.setdefault((n, by_characters), []).append((np.concatenate(own), number))
        if sum(map(len, found.values())) == before:
            raise DataError(
                f"{file} holds no text of {least} words or {least_characters} characters to look for: give the file "
                "that holds the tests themselves"
            )
    return {key: _sorted(parts) for key, parts in found.items()}


def _sorted(parts: list[tuple[Hashes, int]]) -> tuple[Hashes, Ints]:
    hashes = np.concatenate([part for part, _ in parts])
    files = np.repeat([number for _, number in parts], [len(part) for part, _ in parts])
    hashes, first = np.unique(hashes, return_index=True)
    return hashes, files[first]


def each_gram(texts: Texts, most: int) -> Iterator[tuple[int, Hashes]]:
    """n and the hashes of n-grams, for n = 1 to `most`; those that reach into the next text included."""
    hashes = texts.hashes(texts.names)
    grams = hashes
    for n in range(1, most + 1):
        if n > 1:
            grams = longer(grams, hashes[n - 1 :])
        yield n, grams


def _alone(texts: Texts) -> Bools:
    """(R,) texts whose words are mostly characters of scripts without spaces."""
    flags: NDArray[Any] = texts.flags_N[texts.names.starts]
    lone: Bools = sums((flags & LONE) != 0, texts.names.bounds) > SHARE * texts.names.counts
    return lone


def _batches(file: Path) -> Iterator[list[str]]:
    batch: list[str] = []
    for string in _strings(file):
        batch.append(string)
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _strings(file: Path) -> Iterator[str]:
    """What is looked for in a file. DataError naming the file and line where it cannot be read."""
    name = file.name.lower()
    kind = Path(name.removesuffix(".gz").removesuffix(".zst")).suffix
    if kind not in READ or (kind == ".parquet" and not name.endswith(kind)):
        raise DataError(
            f"tests are read from {', '.join(READ)} (but Parquet also .gz, .zst), and {file} is none"
        )
    try:
        if kind == ".parquet":
            yield from _inside(row for row in _parquet_rows(file))
            return
        with open_bytes(file) as stream:
            if kind == ".json":
                yield from _inside(json.loads(stream.read()))
                return
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    if text:
                        yield from _inside(json.loads(text)) if kind == ".jsonl" else [text]
                except ValueError as error:
                    raise DataError(
                        f"{file}:{number} cannot be read as {kind[1:]} in UTF-8: {error}"
                    ) from None
    except BROKEN as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as {kind[1:]}: {error}") from None


def _parquet_rows(file: Path) -> Iterator[Any]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingExtra("data", "pyarrow") from None
    for batch in ParquetFile(file).iter_batches(_AT_ONCE):
        yield from batch.to_pylist()


def _inside(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for own in value.values():
            yield from _inside(own)
    elif isinstance(value, (list, tuple)) or hasattr(value, "__next__"):
        for own in value:
            yield from _inside(own)
