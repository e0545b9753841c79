"""Lines that many documents of one site share, such as menus, notices and addresses: counted over all, then cut.

A site is the host of a document's address (meta "url"), or the folder that its file lies in. Lines are counted by
hashes of 64 bits in files on the disk, one share of all hashes at a time, so that memory does not grow with the text.
(CCNet, Wenzek et al. 2020, section 3.1, takes out all paragraphs that stand in the crawl twice; here sites are apart,
and the threshold is a share of the site's documents.)

R rows, L lines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from langmill.common.prepare_settings import BoilerplateSettings
from langmill.data.characters import Bools, Hashes, Ints, Spans, Texts, longer
from langmill.data.judge import Verdict, chunks, judge

NAME = "boilerplate"
_FILES = 256  # of hashes: a share of them is counted at a time
_HELD = 1 << 22  # hashes in memory before they go to the files
_HOST = r'"url": ?"(?:\w+:)?//(?P<host>[^/"?#\\]+)'
_FOLDER = r"^(?P<folder>.*)/[^/]*#\d+$"


class Counts:
    """How many documents hold each line of their site. `folder`: empty, for files that can be removed afterwards."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: list[Hashes] = []
        self._size = 0

    def take(self, batch: pa.Table, least: int) -> None:
        """Count the lines, of `least` bytes and more, of documents (id, text, meta)."""
        sites_R = _sites(batch)
        for rows, texts in chunks(batch["text"].combine_chunks(), np.arange(len(batch))):
            lines, hashes_L = _lines(Texts(texts), sites_R[rows], least)
            rows_L = lines.rows
            order = np.lexsort((hashes_L, rows_L))
            hashes_L, rows_L = hashes_L[order], rows_L[order]
            new = np.ones(len(order), bool)  # a line that a document holds twice counts once
            new[1:] = (hashes_L[1:] != hashes_L[:-1]) | (rows_L[1:] != rows_L[:-1])
            self._hold(hashes_L[new], sites_R[rows][rows_L[new]])
            self._hold(sites_R[rows], sites_R[rows])  # which counts the documents of each site

    def _hold(self, hashes: Hashes, sites: Hashes) -> None:
        self._held.append(np.stack((hashes, sites), 1))
        self._size += len(hashes)
        if self._size >= _HELD:
            self._store()

    def _store(self) -> None:
        if not self._held:
            return
        pairs = np.concatenate(self._held)
        self._held, self._size = [], 0
        place = (pairs[:, 0] >> np.uint64(56)).astype(np.int64)
        order = np.argsort(place, kind="stable")
        ends = np.searchsorted(place[order], np.arange(_FILES + 1))
        for number in np.flatnonzero(np.diff(ends)).tolist():
            with open(self._folder / f"{number:03}", "ab") as file:
                file.write(pairs[order[ends[number] : ends[number + 1]]].tobytes())

    def shared(self, share: float, least: int) -> Hashes:
        """Sorted hashes of lines that stand in `share` of their site's documents, and in `least` of them."""
        self._store()
        found, sizes = [], dict[int, int]()
        for file in sorted(self._folder.iterdir()):
            pairs = np.fromfile(file, np.uint64).reshape(-1, 2)
            hashes, first, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
            often = counts >= least
            hashes, sites, counts = hashes[often], pairs[first[often], 1], counts[often]
            own = hashes == sites
            sizes.update(zip(sites[own].tolist(), counts[own].tolist(), strict=True))
            found.append((hashes[~own], sites[~own], counts[~own]))
        chosen = [
            hashes[counts >= share * np.array([sizes[site] for site in sites.tolist()], np.float64)]
            for hashes, sites, counts in found
        ]
        return np.sort(np.concatenate([np.zeros(0, np.uint64), *chosen]))


def count(batches: Iterable[pa.Table], folder: Path, settings: BoilerplateSettings) -> Boilerplate:
    """The step that cuts what documents of one site share."""
    counts = Counts(folder)
    for batch in batches:
        counts.take(batch, settings.bytes)
    return Boilerplate(counts.shared(settings.share, settings.documents), settings.bytes)


@dataclass(frozen=True, eq=False)
class Boilerplate:
    """Cuts the lines whose hashes are in `shared`, which is sorted. Texts of which nothing is left are dropped."""

    shared: NDArray[np.uint64]
    least: int  # bytes of a line
    name: str = NAME

    def __call__(self, batch: pa.Table) -> pa.Table:
        if not len(self.shared):
            return batch
        asked = batch["dropped"].is_null().to_numpy()
        sites = iter(_sites(batch)[asked].tolist())

        def rule(rows: list[str]) -> Verdict:
            return self.judge(rows, np.fromiter(islice(sites, len(rows)), np.uint64, len(rows)))

        return judge(batch, self.name, rule, by_characters=None)

    def judge(self, rows: list[str], sites_R: Hashes) -> Verdict:
        """(R,) of which rows nothing is left, and the texts of others without the shared lines."""
        texts = Texts(rows)
        whole = texts.lines(texts.find("\n"))
        trimmed, hashes_L = _lines(texts, sites_R, self.least)
        place = np.minimum(np.searchsorted(self.shared, hashes_L), len(self.shared) - 1)
        cut = trimmed.starts[self.shared[place] == hashes_L]
        kept_L = np.ones(len(whole.starts), bool)
        kept_L[np.searchsorted(whole.starts, cut, "right") - 1] = False
        empty_R, changed = np.zeros(len(rows), bool), {}
        for row in np.flatnonzero(texts.count(cut)).tolist():
            own = np.arange(whole.bounds[row], whole.bounds[row + 1])
            changed[row] = _left(texts, whole, own[kept_L[own]])
            empty_R[row] = not changed[row].strip()
        return Verdict({"no text is left": empty_R}, changed)


def _left(texts: Texts, lines: Spans, kept: Ints) -> str:
    pairs = zip(lines.starts[kept].tolist(), lines.ends[kept].tolist(), strict=True)
    return "\n".join(texts.joined[start:end] for start, end in pairs).strip("\n")


def _lines(texts: Texts, sites_R: Hashes, least: int) -> tuple[Spans, Hashes]:
    """Lines of `least` bytes and more without the white space around them, and hashes of each with its site."""
    lines = texts.lines(texts.find("\n"))
    first = np.searchsorted(texts.runs.starts, lines.starts)
    after = np.searchsorted(texts.runs.starts, lines.ends)
    filled: Bools = after > first
    lines = lines.where(filled)
    starts, ends = texts.runs.starts[first[filled]], texts.runs.ends[after[filled] - 1]
    codes = texts.codes_N
    more = np.cumsum(1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000).astype(np.int64))
    lines = Spans(starts, ends, lines.bounds).where(more[ends - 1] - more[starts - 1] >= least)
    return lines, longer(texts.hashes(lines), sites_R[lines.rows])


def _sites(batch: pa.Table) -> Hashes:
    """(R,) a hash of each document's site."""
    host = pc.struct_field(pc.extract_regex(batch["meta"], pattern=_HOST), "host")
    folder = pc.struct_field(pc.extract_regex(batch["id"], pattern=_FOLDER), "folder")
    named = pc.coalesce(pc.utf8_lower(host), pc.binary_join_element_wise("/", folder, ""), batch["id"])
    coded = named.combine_chunks().dictionary_encode()
    known = [
        int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")
        for name in coded.dictionary.to_pylist()
    ]
    found: Hashes = np.array(known, np.uint64)[coded.indices.to_numpy()]
    return found
