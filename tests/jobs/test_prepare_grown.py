"""`langmill data prepare` again over sources that grew: the new work alone, and what was kept stays."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from langmill.common.settings import ForgetSettings, PrepareSettings, WhySettings
from langmill.jobs import forget, prepare

WORDS = "garden house apple tree river stone winter letter music window bread candle forest summer shoe road".split()


def sentence(seed: int) -> str:
    draw = random.Random(seed)
    return (
        f"Number {seed}: " + " ".join(draw.choice(WORDS) + str(draw.randrange(50)) for _ in range(60)) + "."
    )


def rows(file: Path, *texts: str) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A table of 120 rows, and ten texts."""
    (tmp_path / "raw" / "texts").mkdir(parents=True)
    rows(tmp_path / "raw" / "rows.jsonl", *map(sentence, range(120)))
    for i in range(10):
        (tmp_path / "raw" / "texts" / f"{i}.txt").write_text(sentence(1000 + i), encoding="utf-8")
    return tmp_path / "raw"


def settings(raw: Path, out: Path, **more: Any) -> PrepareSettings:
    small: dict[str, Any] = {"read": {"unit_bytes": 4096}, "language": {"detect": False}, "workers": 1}
    return PrepareSettings(source=[str(raw)], out=out, **(small | more))


def made(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def ids(out: Path) -> list[str]:
    return [i for file in sorted((out / "clean").iterdir()) for i in pq.read_table(file)["id"].to_pylist()]


def test_grown_sources_cost_the_new_work_alone(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare.run(settings(raw, out), quiet=True)
    again = prepare.run(settings(raw, out), quiet=True).extra["units"]
    assert again["reused"] == again["total"] > 3
    with open(raw / "rows.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": sentence(5000)}) + "\n")
    grown = prepare.run(settings(raw, out), quiet=True)
    assert (
        grown.extra["units"]["total"] - grown.extra["units"]["reused"] <= 2
        and grown.counts["documents"] == 131
    )
    fresh = tmp_path / "fresh" / "out"
    prepare.run(settings(raw, fresh), quiet=True)
    assert made(fresh) == made(out)


def test_what_was_kept_stays_when_sources_grow_and_the_difference_is_told(raw: Path, tmp_path: Path) -> None:
    out, fresh, added = tmp_path / "out", tmp_path / "fresh" / "out", raw / "added.jsonl"
    bridge = sentence(0).split()
    kept = [" ".join([*bridge[:-3], "one two three."]), " ".join(["one two three", *bridge[3:]])]
    rows(raw / "bridged.jsonl", *kept)
    rows(raw / "rows.jsonl", sentence(7))
    asked = {"duplicates": {"near": 0.85}}
    first = prepare.run(settings(raw, out, **asked), quiet=True)
    assert first.counts["documents"] == 13 and "earlier" not in first.text
    before = ids(out)
    # A longer copy of one, what joins two that were too different, one that is new.
    rows(added, sentence(7) + " Indeed so.", sentence(0), sentence(5000))
    grown = prepare.run(settings(raw, out, **asked), quiet=True)
    assert ids(out) == sorted([*before, "raw/added.jsonl#00000003"])
    told = (
        "3 documents that an earlier run kept; made from the beginning (--force), the clean set would hold 2"
    )
    assert told in grown.text and told in (out / "report.html").read_text(encoding="utf-8")
    why = prepare.why(WhySettings(folder=out, id="raw/added.jsonl#1")).extra["results"][0]["why"]
    assert why.endswith("a copy of raw/rows.jsonl#00000001, which stays since an earlier run kept it")
    assert prepare.run(settings(raw, out, **asked), quiet=True).extra["units"]["reused"]
    as_grown = made(out)
    out.rename(
        out.with_name(".out.old")
    )  # as a run leaves it that is killed while it puts the new in its place
    prepare.run(settings(raw, out, **asked), quiet=True)
    assert made(out) == as_grown
    prepare.run(settings(raw, fresh, **asked), quiet=True)
    assert {"raw/added.jsonl#00000001", "raw/added.jsonl#00000002"} < set(ids(fresh))
    rows(added, sentence(1004))
    (raw / "texts" / "3.txt").write_text(sentence(1004), encoding="utf-8")  # what changed is no keeper
    assert (
        "raw/texts/3.txt#00000001" not in (prepare.run(settings(raw, out, **asked), quiet=True), ids(out))[1]
    )
    prepare.run(settings(raw, out, force=True, **asked), quiet=True)
    prepare.run(settings(raw, fresh, force=True, **asked), quiet=True)
    assert made(out) == made(fresh)


def test_rows_that_moved_stay_too_and_what_stays_is_told(raw: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "out", raw / "rows.jsonl"
    chain = sentence(0).split()
    near = [
        " ".join(chain),
        " ".join([*chain[:-3], "one two three."]),
        " ".join(["one two three", *chain[3:]]),
    ]
    rows(table, near[1], near[2], sentence(2))
    asked = {"duplicates": {"near": 0.85}}
    assert prepare.run(settings(raw, out, **asked), quiet=True).counts["documents"] == 13
    rows(table, near[0], near[1], near[2], sentence(2))  # each of the old ones has another number now
    grown = prepare.run(settings(raw, out, **asked), quiet=True)
    assert "2 documents that an earlier run kept" in grown.text and grown.counts["documents"] == 13
    assert "raw/rows.jsonl#00000001" not in ids(out)
    told = prepare.why(WhySettings(folder=out, id="raw/rows.jsonl#3"))
    assert (
        "since an earlier run kept it; made from the beginning raw/rows.jsonl#00000001 would stay"
        in told.text
    )


@pytest.mark.parametrize("duplicates", [{"near": None, "exact": False}, {}])
def test_what_is_forgotten_before_there_is_a_keeper_goes(raw: Path, tmp_path: Path, duplicates: Any) -> None:
    out = tmp_path / "out"
    prepare.run(settings(raw, out, duplicates=duplicates), quiet=True)
    for file in (tmp_path / "out.run" / "keepers").iterdir():
        pq.write_table(pq.read_table(file)[:0], file)  # as a first run leaves it that could not read a unit
    forget.run(ForgetSettings(folder=out, id=["raw/texts/3.txt"]), quiet=True)
    assert len(ids(out)) == 129 and not any("texts/3.txt" in id for id in ids(out))
