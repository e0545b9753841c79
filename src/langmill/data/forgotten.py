"""Documents that must not come back: known by keyed hashes of their ids and texts alone, never by what they say."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow.parquet import ParquetFile, ParquetWriter

from langmill.common.files import atomic_folder, atomic_write, read_json, write_json
from langmill.data.minhash import Shape
from langmill.data.units import KEPT, VERSION, Amount, amount, kept_batches, opened, signed

FILE, NAME, REASON = "forgotten.json", "forget", "removed on request"


@dataclass(frozen=True)
class Forget:
    """The step that drops what the run folder was told to forget, by id or text. It comes last, and of what other steps
    dropped it takes the text."""

    run: Path
    name: str = NAME

    def __call__(self, batch: pa.Table) -> pa.Table:
        hashes = set(load(self.run)["hashes"])
        if not hashes:
            return batch
        gone = pa.array(~_stay(batch, hashes, key_of(self.run)))
        dropped = pc.if_else(
            gone, pc.coalesce(batch["dropped"], pa.scalar(f"{NAME}: {REASON}")), batch["dropped"]
        )
        batch = batch.set_column(batch.column_names.index("dropped"), "dropped", dropped)
        return _blank(batch, gone)


def _blank(rows: pa.Table, gone: pa.Array) -> pa.Table:
    """The rows, without text and meta where `gone`."""
    for place, name in enumerate(rows.column_names):
        if name in ("text", "meta"):
            nothing = pa.scalar("{}" if name == "meta" else "", rows.schema.field(place).type)
            rows = rows.set_column(place, name, pc.if_else(gone, nothing, rows[name]))
    return rows


def known_as(key: bytes, text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8"), key=key, digest_size=16).hexdigest()


def shard_known_as(key: bytes, hash: int) -> str:
    """As `known_as`, of a text of which shards hold the hash alone (`text_hash`)."""
    return known_as(key, f"text hash {hash}")


def load(run: Path) -> dict[str, Any]:
    """`hashes` of what was forgotten; `begun`: those of them whose removal began and did not end."""
    if not (run / FILE).exists():
        return {"hashes": [], "begun": []}
    value = read_json(run / FILE, "forgotten", 2)
    if value["version"] == 1:  # `begun` was a truth value
        value["begun"] = value["hashes"] if value["begun"] else []
    return value


def save(run: Path, hashes: set[str], begun: set[str]) -> None:
    write_json(run / FILE, {"hashes": sorted(hashes), "begun": sorted(begun)}, "forgotten", 2)


def in_shards(hashes_D: NDArray[np.uint64], hashes: set[str], key: bytes) -> NDArray[np.bool_]:
    """Which documents of shards, by the hashes of their texts, were forgotten."""
    return np.fromiter((shard_known_as(key, int(h)) in hashes for h in hashes_D), bool, len(hashes_D))


def key_of(run: Path) -> bytes:
    """The run folder's own key, made when it is first asked for; only its owner may read it."""
    file = run / "key"
    if not file.exists():
        atomic_write(file, secrets.token_bytes(32))
        file.chmod(0o600)
    return file.read_bytes()


def purge(folder: Path, hashes: set[str], key: bytes, shape: Shape | None) -> int:
    """Take documents out of a unit: texts, signatures, what was shown of dropped ones; how many they were."""
    kept = list(kept_batches(folder))
    stay = [_stay(batch, hashes, key) for batch in kept]
    with ParquetFile(folder / "dropped.parquet") as file:
        dropped = file.read()
    left = np.array([known_as(key, i) not in hashes for i in dropped["id"].to_pylist()], bool)
    blank = pc.and_(pc.equal(dropped["text"], ""), pc.equal(dropped["meta"], "{}"))
    left |= np.array(blank.to_pylist(), bool)  # what was forgotten before counts no more
    gone = sum(int((~mask).sum()) for mask in stay) + int((~left).sum())
    if not gone:
        return 0
    unit = opened(folder)
    with atomic_folder(folder, replace=True) as fresh:
        with ParquetWriter(fresh / "kept.parquet", KEPT, compression="zstd") as writer:
            for batch, mask in zip(kept, stay, strict=True):
                writer.write_table(batch.filter(pa.array(mask)))
                _recount(unit["flows"][NAME], amount(batch["text"].filter(pa.array(~mask))))
        with ParquetWriter(fresh / "dropped.parquet", dropped.schema, compression="zstd") as writer:
            writer.write_table(_blank(dropped, pa.array(~left)))
        signed(fresh, shape)
        write_json(
            fresh / "unit.json", {k: unit[k] for k in ("source", "pieces", "flows")}, "prepared unit", VERSION
        )
    return gone


def _stay(batch: pa.Table, hashes: set[str], key: bytes) -> NDArray[np.bool_]:
    rows = zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)
    return np.array(
        [known_as(key, i) not in hashes and known_as(key, t) not in hashes for i, t in rows], bool
    )


def _recount(flow: dict[str, Any], gone: Amount) -> None:
    """Count documents that had come through the last step as dropped by it."""
    if gone.documents:
        lost = flow["dropped"].setdefault(REASON, [0, 0, 0])
        for i, size in enumerate(gone.as_list()):
            lost[i] += size
            flow["kept"][i] -= size
            flow["out"][i] -= size
