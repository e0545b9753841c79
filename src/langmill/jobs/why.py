"""`langmill data why`: what became of a document, step by step."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from langmill.common.errors import DataError, UsageError
from langmill.common.files import read_json, run_folder
from langmill.common.metrics import Report
from langmill.data.clean import clean_batches
from langmill.data.units import kept_batches, opened
from langmill.jobs.prepare import VERSION, manifest

_NUMBER = re.compile(r"^(.*)#(\d{1,8})$", re.DOTALL)
_MOST = 10


def told(out: Path, asked: str) -> Report:
    """The report for one id: of a document, of a file (up to ten of its documents), or of a row by its own id.

    UsageError where nothing of that name was ever there.
    """
    value = manifest(out)
    run = run_folder(out)
    plan = read_json(run / "plan.json", "prepare plan", VERSION)
    wanted = full(asked)
    found = list(islice(found_in(run, plan, wanted), _MOST + 1))
    found += [
        {"id": id, "became": "dropped", "why": f"read: {reason}", "text": detail}
        for _, id, reason, _, detail in plan["aside"]
        if id == wanted
    ]
    if not found:
        raise UsageError(
            f"nothing here is called {asked}: ids are like source/file.jsonl#1, see errors.jsonl in "
            f"{run} and the column id of {out / 'clean'}"
        )
    copies = {row["id"]: row for row in _copies(run, [row["id"] for row in found])}
    for row in found:
        copy = copies.get(row["id"])
        if copy and copy["step"] is None and row["became"] == "kept":
            row["why"] = (
                f"since an earlier run kept it; made from the beginning {copy['of']} would stay instead"
            )
        elif copy and row["became"] == "kept":
            told = f": a copy of {copy['of']}, which stays" if copy["of"] is not None else ""
            told += " since an earlier run kept it" if copy.get("anew") else ""
            row |= {"became": "dropped", "why": copy["step"] + told}
    places = _places(out, value, [row["id"] for row in found if row["became"] == "kept"])
    lines = []
    for row in found[:_MOST]:
        lines += _lines(row, value["steps"], places.get(row["id"]))
    if len(found) > _MOST:
        lines.append("… and more: give a whole id")
    return Report(out, {"documents": len(found)}, text="\n".join(lines), extra={"results": found})


def full(id: str) -> str:
    """An id with its number as it is stored: rows.jsonl#12 is rows.jsonl#00000012."""
    match = _NUMBER.match(id)
    return f"{match[1]}#{int(match[2]):08d}" if match else id


def found_in(run: Path, plan: dict[str, Any], wanted: str) -> Iterator[dict[str, Any]]:
    """What units know of an id, a file, or a row's own id: {"id", "became", "why", "text", "unit"}."""
    folders = [run / "units" / key for key in plan["units"]]
    file = wanted.rpartition("#")[0] or wanted
    named = [folder for folder in folders if any(piece[0] == file for piece in opened(folder)["pieces"])]
    for folder in named or folders:
        for row in _rows(folder, wanted, file, bool(named)):
            yield row | {"unit": folder.name}


def _rows(folder: Path, wanted: str, file: str, named: bool) -> Iterator[dict[str, Any]]:
    for row, meta in _called(pq.read_table(folder / "dropped.parquet"), wanted, named):
        yield {"id": row["id"], "became": "dropped", "why": row["dropped"], "text": row["text"], "meta": meta}
    for batch in kept_batches(folder):
        for row, meta in _called(batch, wanted, named):
            yield {"id": row["id"], "became": "kept", "why": "", "text": row["text"][:500], "meta": meta}


def _called(rows: Any, wanted: str, named: bool) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows, with their meta, that have an id or a file's name; not named: that had an id of their own."""
    if named:
        mask = _asked(rows["id"], wanted)
    elif "meta" not in rows.column_names:  # what was dropped, as it was stored once
        return
    else:
        mask = pc.match_substring(rows["meta"], json.dumps(wanted, ensure_ascii=False)[1:-1])
    for row in rows.filter(mask).to_pylist():
        meta = json.loads(row.get("meta") or "{}")
        if named or str(meta.get("id")) == wanted:
            yield row, meta


def _asked(ids: Any, wanted: str) -> Any:
    return pc.or_(pc.equal(ids, wanted), pc.starts_with(ids, wanted + "#"))


def _copies(run: Path, ids: list[str]) -> list[dict[str, Any]]:
    if not (run / "copies.parquet").is_file():
        return []
    table = pq.read_table(run / "copies.parquet")
    return table.filter(pc.is_in(table["id"], pa.array(ids, table["id"].type))).to_pylist()


def _places(out: Path, value: dict[str, Any], ids: list[str]) -> dict[str, str]:
    """File and row of the clean set."""
    found, row, current = {}, 0, ""
    wanted = pa.array(ids, pa.string())
    for file, batch in clean_batches(out, value["parts"], ["id"]) if ids else ():
        row, current = (row if file == current else 0), file
        for index in pc.indices_nonzero(pc.is_in(batch["id"], wanted)).to_pylist():
            found[batch["id"][index].as_py()] = f"{file}, row {row + index}"
        row += len(batch)
    return found


def _lines(row: dict[str, Any], steps: list[str], place: str | None) -> list[str]:
    step = row["why"].partition(": ")[0]
    through = steps if row["became"] == "kept" else steps[: steps.index(step)] if step in steps else []
    lines = [row["id"]]
    lines += [f"  {name}: passed" for name in (["read", *through] if step != "read" else [])]
    lines.append(
        f"  kept: {place}" + (f", {row['why']}" if row["why"] else "")
        if row["became"] == "kept" and place
        else f"  {row['became']}: {row['why']}".rstrip(": ")
    )
    if row.get("meta"):
        lines.append("  known of it: " + ", ".join(f"{name}={value}" for name, value in row["meta"].items()))
    if row["text"]:
        lines.append("  it begins: " + " ".join(row["text"][:200].split()))
    return lines


def check_complete(out: Path) -> None:
    """DataError where a prepared folder's run folder is gone: nothing can be told or forgotten without it."""
    if not (run_folder(out) / "plan.json").is_file():
        raise DataError(f"{run_folder(out)} is gone, which knew what became of each document: prepare again")
