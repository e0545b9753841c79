"""The clean set: what all units kept, without copies, in order of ids, in files of some size."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow.parquet import ParquetWriter

from langmill.common.errors import DataError
from langmill.common.files import sha256
from langmill.common.prepare_settings import DuplicateSettings
from langmill.data import boilerplate, mixture
from langmill.data.dedup import find
from langmill.data.last import Last
from langmill.data.minhash import ROWS
from langmill.data.minhash import opened as signed_rows
from langmill.data.units import KEPT, READ, Amount, Flow, Flows, amount, flows_of, kept_batches, opened

EXACT, NEAR = "exact_duplicates", "near_duplicates"
OVER_ALL = (EXACT, NEAR, boilerplate.NAME, mixture.NAME)  # steps that no unit holds
REASONS = {EXACT: "the same text as another", NEAR: "nearly the same text as another"}
# anew: whether a run from the beginning would keep it, and what stays for it is of an earlier run. No step: it stays
# itself since an earlier run kept it, where one from the beginning would keep `of`.
COPIES = pa.schema(
    [("id", pa.large_string()), ("step", pa.string()), ("of", pa.large_string()), ("anew", pa.bool_())]
)
KEEPERS = pa.schema([("id", pa.large_string()), ("hash", pa.uint64())])
_LANGUAGE = r'"language":"(?P<language>[\w-]+)"'

Sources = dict[str, Flows]  # by source, then by step


@dataclass
class Statistics:
    """Of the clean set: documents by language, and by length (key n: 2**n characters and more, below 2**(n + 1))."""

    languages: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    redacted: dict[str, Counter[str]] = field(default_factory=dict)  # by source: personal details, by type

    def take(self, batch: pa.Table) -> None:
        said = pc.struct_field(pc.extract_regex(batch["meta"], pattern=_LANGUAGE), "language")
        for language in pc.value_counts(pc.fill_null(said, "not told")).to_pylist():
            self.languages[language["values"]] += language["counts"]
        told = batch.filter(pc.match_substring(batch["meta"], '"redacted":'))
        for source, meta in zip(told["source"].to_pylist(), told["meta"].to_pylist(), strict=True):
            self.redacted.setdefault(source, Counter()).update(json.loads(meta)["redacted"])
        sizes = pc.utf8_length(batch["text"]).to_numpy()
        for power, count in zip(
            *np.unique(np.log2(np.maximum(sizes, 1)).astype(int), return_counts=True), strict=True
        ):
            self.lengths[int(power)] += int(count)

    def as_dict(self) -> dict[str, Any]:
        return {
            "languages": dict(sorted(self.languages.items(), key=lambda item: (-item[1], item[0]))),
            "lengths": {str(power): count for power, count in sorted(self.lengths.items())},
            "redacted": {
                source: dict(sorted(mine.items())) for source, mine in sorted(self.redacted.items())
            },
        }


@dataclass(frozen=True)
class Copies:
    """table: what goes, and what stays although a run from the beginning would leave it out, as COPIES. codes: for each
    unit 0: stays, 1: exact, 2: near copy. counts: pairs `compared` and `similar`, texts `left` without being compared
    with all (see dedup.Duplicates); where an earlier run's texts stay, `earlier` ones that a run from the beginning
    would leave out, and `anew` those that it would keep. keepers: what stays, as KEEPERS."""

    table: pa.Table
    codes: list[NDArray[np.int8]]
    counts: dict[str, int]
    keepers: pa.Table


def copies(folders: Sequence[Path], settings: DuplicateSettings, earlier: pa.Table | None) -> Copies:
    """Which texts go since others like them stay. earlier: the keepers of an earlier run, which stay."""
    sizes = [sum(len(batch) for batch in kept_batches(folder, ["id"])) for folder in folders]
    codes = np.zeros(sum(sizes), np.int8)
    table, keepers, counts = COPIES.empty_table(), KEEPERS.empty_table(), dict[str, int]()
    if settings.exact or settings.near is not None:
        chunks = [c for f in folders for b in kept_batches(f, ["id"]) for c in b["id"].chunks]
        ids = pa.chunked_array(chunks, pa.string()).cast(
            pa.large_string()
        )  # all of them: more than 2 GiB perhaps
        ids = ids.combine_chunks() if ids.num_chunks else pa.array([], pa.large_string())
        hash_N = np.concatenate([np.zeros(0, np.uint64), *(signed_rows(f, ROWS)["hash"] for f in folders)])
        earlier_N = None if earlier is None else _there(ids, hash_N, earlier)
        found = find(folders, ids, threshold=settings.near, keep=settings.keep, earlier_N=earlier_N)
        of = np.where(found.exact_N >= 0, found.exact_N, found.near_N)
        codes[found.near_N >= 0] = 2
        codes[found.exact_N >= 0] = 1 if settings.exact else 2
        anew_N = found.anew_N if found.anew_N is not None else np.where(codes, of, -1)
        stays_N = codes == 0
        counts = {
            "compared": found.compared, "similar": found.similar, "left": found.left,
            "earlier": int((stays_N & (anew_N >= 0)).sum()), "anew": int((~stays_N & (anew_N < 0)).sum()),
        }  # fmt: skip
        told = np.flatnonzero(~stays_N | (anew_N >= 0))
        steps = pa.array([(None, EXACT, NEAR)[code] for code in codes[told]], pa.string())
        for_it = ids.take(pa.array(np.where(stays_N, anew_N, of)[told]))
        columns = [ids.take(pa.array(told)), steps, for_it, pa.array(~stays_N[told] & (anew_N[told] < 0))]
        table = pa.table(columns, COPIES.names).cast(COPIES)
        keepers = pa.table([ids.filter(pa.array(stays_N)), pa.array(hash_N[stays_N])], KEEPERS)
    ends = np.cumsum(sizes)
    parts = [codes[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return Copies(table, parts, counts, keepers)


def _there(ids: Any, hash_N: NDArray[np.uint64], earlier: pa.Table) -> NDArray[np.bool_]:
    """(N,) which texts are among the earlier ones: those of the same id and, where that is another's by now since rows
    or files moved, the first of the same text."""
    if not len(earlier):
        return np.zeros(len(ids), np.bool_)
    places = pc.index_in(ids, earlier["id"].combine_chunks())
    there, at = places.is_valid().to_numpy(False), pc.fill_null(places, 0).to_numpy(False)
    hashes = earlier["hash"].to_numpy()
    found: NDArray[np.bool_] = there & (hashes[at] == hash_N)
    moved = np.flatnonzero(np.isin(hash_N, np.setdiff1d(hashes, hash_N[found])))
    found[moved[np.unique(hash_N[moved], return_index=True)[1]]] = True
    return found


def flows(folders: Sequence[Path]) -> Sources:
    """What the units' steps did, summed by source."""
    total: Sources = {}
    for folder in folders:
        unit = opened(folder)
        mine = total.setdefault(unit["source"], {})
        for step, flow in flows_of(unit["flows"]).items():
            mine.setdefault(step, Flow()).add(flow)
    return total


class Writer:
    """Files part-00000.parquet, part-00001.parquet … of about `most` bytes of text each."""

    def __init__(self, folder: Path, most: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.most = folder, most
        self.parts: list[dict[str, Any]] = []
        self._writer: ParquetWriter | None = None
        self._size = Amount()

    def write(self, batch: pa.Table) -> None:
        if self._writer is None:
            name = f"part-{len(self.parts):05}.parquet"
            self._writer = ParquetWriter(self.folder / name, KEPT, compression="zstd")
            self._size = Amount()
        self._writer.write_table(batch)
        self._size.add(amount(batch["text"]))
        if self._size.bytes >= self.most:
            self.close()

    def close(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        file = self.folder / f"part-{len(self.parts):05}.parquet"
        about = {"documents": self._size.documents, "bytes": self._size.bytes, "sha256": sha256(file)}
        self.parts.append({"file": f"clean/{file.name}", **about})


def staying(folders: Sequence[Path], codes: Sequence[NDArray[np.int8]]) -> Iterator[pa.Table]:
    """The documents of all units that are no copies."""
    for folder, own in zip(folders, codes, strict=True):
        start = 0
        for batch in kept_batches(folder):
            yield batch.filter(pa.array(own[start : start + len(batch)] == 0))
            start += len(batch)


def write(
    folders: Sequence[Path], codes: Sequence[NDArray[np.int8]], steps: Sequence[str], last: Last, out: Path, most: int,
    sources: Sources,
) -> tuple[list[dict[str, Any]], Statistics, pa.Table]:  # fmt: skip
    """Write the clean set into `out` and count in `sources` what each of `steps` (of code 1, 2, …) and of the last ones
    drops; files, statistics, and what the last ones dropped, as the table of `copies` has it."""
    writer, statistics = Writer(out, most), Statistics()
    left_out = [COPIES.empty_table()]
    for folder, own in zip(folders, codes, strict=True):
        mine = sources[opened(folder)["source"]]
        start = 0
        for batch in kept_batches(folder):
            code = own[start : start + len(batch)]
            start += len(batch)
            for number, step in enumerate(steps, 1):
                flow = mine.setdefault(step, Flow())
                stays = amount(batch["text"].filter(pa.array((code == 0) | (code > number))))
                flow.kept.add(stays)
                flow.out.add(stays)
                if (code == number).any():
                    gone = amount(batch["text"].filter(pa.array(code == number)))
                    flow.dropped.setdefault(REASONS[step], Amount()).add(gone)
            stays = batch.filter(pa.array(code == 0)) if code.any() else batch
            if last.steps:
                stays, dropped = last(stays, mine)
                left_out.append(dropped.rename_columns(["id", "step"]))
            if len(stays):
                writer.write(stays)
                statistics.take(stays)
    writer.close()
    return writer.parts, statistics, pa.concat_tables(left_out, promote_options="permissive").cast(COPIES)


def check(sources: Mapping[str, Flows], parts: Sequence[Mapping[str, Any]]) -> None:
    """DataError naming source and step unless what left each step came to the next, and the rest is in the parts."""
    kept = Amount()
    for source, mine in sources.items():
        before: Flow | None = None
        for step, flow in mine.items():
            if before is not None and flow.came.as_list() != before.out.as_list():
                raise DataError(
                    f"the ledger of {source} does not add up: {before.out.as_list()} documents, bytes and characters "
                    f"came to the step {step}, and it kept or dropped {flow.came.as_list()}"
                )
            before = flow
        if before is not None:
            kept.add(before.out)
    there = [sum(part[name] for part in parts) for name in ("documents", "bytes")]
    if there != kept.as_list()[:2]:
        raise DataError(
            f"the ledger does not add up: {kept.as_list()[:2]} were kept, and {there} are in the clean set"
        )


def clean_batches(
    out: Path, parts: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> Iterator[tuple[str, pa.Table]]:
    """(file, rows) of a clean set, row group by row group."""
    from pyarrow.parquet import ParquetFile

    for part in parts:
        with ParquetFile(out / part["file"]) as file:
            for group in range(file.num_row_groups):
                yield part["file"], file.read_row_group(group, columns=list(columns))


def total(sources: Mapping[str, Flows]) -> Flows:
    """All sources together, by step."""
    found: Flows = {READ: Flow()}
    for mine in sources.values():
        for step, flow in mine.items():
            found.setdefault(step, Flow()).add(flow)
    return found
