"""`langmill data prepare`: many sources, one folder, the same however it was interrupted; each document is told of."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from langmill.cli import run as cli
from langmill.common.errors import DataError, UsageError
from langmill.common.settings import DataSettings, PrepareSettings
from langmill.data.pipeline import Ledger
from langmill.data.readers import read
from langmill.jobs import prepare, workers
from langmill.jobs.prepare_steps import recipe

WORDS = "garden house apple tree river stone winter letter music window bread candle forest summer shoe road".split()
SMALL = {"read": {"unit_bytes": 4096}, "language": {"detect": False}}


def sentence(seed: int, length: int = 60) -> str:
    draw = random.Random(seed)
    return (
        f"Number {seed}: "
        + " ".join(draw.choice(WORDS) + str(draw.randrange(50)) for _ in range(length))
        + "."
    )


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A table of 120 rows with copies among them, ten texts, and some that cannot be read."""
    folder = tmp_path / "raw"
    (folder / "texts").mkdir(parents=True)
    rows = [{"text": sentence(i), "id": f"own-{i}"} for i in range(100)]
    rows += [{"text": sentence(i).upper()} for i in range(10)] + [
        {"text": sentence(i) + " Indeed."} for i in range(10)
    ]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + "{broken\n", encoding="utf-8"
    )
    for i in range(10):
        (folder / "texts" / f"{i}.txt").write_text(sentence(1000 + i), encoding="utf-8")
    (folder / "texts" / "bad.txt").write_bytes(b"\xff\xff")
    (folder / "sheet.xlsx").write_bytes(b"PK")
    return folder


def settings(raw: Path, out: Path, **more: Any) -> PrepareSettings:
    return PrepareSettings(**({"source": [str(raw)], "out": out, "workers": 1, **SMALL} | more))


def made(folder: Path) -> dict[str, str]:
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def ids(out: Path) -> list[str]:
    return [i for file in sorted((out / "clean").iterdir()) for i in pq.read_table(file)["id"].to_pylist()]


def say(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli([*words, "--json", "--quiet"]) in (0, 1, 2)
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_every_document_is_kept_or_counted_and_the_clean_set_is_sorted(raw: Path, tmp_path: Path) -> None:
    report = prepare.run(settings(raw, tmp_path / "out"), quiet=True)
    found = ids(tmp_path / "out")
    assert found == sorted(found) and len(found) == len(set(found)) == 110 == report.counts["documents"]
    assert report.counts["read"] == 133 and report.counts["dropped"] == 23 and report.ok
    value = prepare.manifest(tmp_path / "out")
    flows = value["flows"]["raw"]
    assert {why: n for step in flows.values() for why, (n, *_) in step["dropped"].items()} == {
        "broken JSON": 1, "not UTF-8": 1, "not a known format (.xlsx)": 1, "the same text as another": 10,
        "nearly the same text as another": 10,
    }  # fmt: skip
    for step in flows.values():
        gone = [sum(amounts) for amounts in zip([0, 0, 0], *step["dropped"].values(), strict=True)]
        assert len(gone) == 3 and step["kept"][0] >= step["out"][0]
    told = [
        json.loads(line)["where"] for line in (tmp_path / "out.run" / "errors.jsonl").read_text().splitlines()
    ]
    assert sorted(told) == ["raw/rows.jsonl#00000121", "raw/sheet.xlsx", "raw/texts/bad.txt"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (
        "near_duplicates: nearly the same text as another (10)" in page
        and page.count("stays for it: raw/") == 6  # three samples of exact copies, and of near ones
        and "pairs were compared; 10 were alike." in page
        and "<script" not in page
        and "http" not in page.replace("http-equiv", "")
    )
    assert "133 documents" in (tmp_path / "out" / "datasheet.md").read_text(encoding="utf-8")


def test_what_was_prepared_is_what_training_reads(raw: Path, tmp_path: Path) -> None:
    prepare.run(settings(raw, tmp_path / "out", part_bytes=10_000), quiet=True)
    assert len(list((tmp_path / "out" / "clean").iterdir())) > 2
    documents = list(read([tmp_path / "out" / "clean"], DataSettings(), Ledger()))
    assert (
        sorted(d.text.split(":")[0] for d in documents)[:2] == ["NUMBER 0", "Number 10"]
        or len(documents) == 110
    )


def test_workers_and_one_process_write_the_same(raw: Path, tmp_path: Path) -> None:
    prepare.run(settings(raw, tmp_path / "a" / "out"), quiet=True)
    prepare.run(settings(raw, tmp_path / "b" / "out", workers=2), quiet=True)
    assert made(tmp_path / "a" / "out") == made(tmp_path / "b" / "out")


def test_killed_anywhere_and_run_again_gives_the_same_files(raw: Path, tmp_path: Path) -> None:
    prepare.run(settings(raw, tmp_path / "whole" / "out"), quiet=True)
    out = tmp_path / "killed" / "out"
    line = [
        sys.executable,
        "-m",
        "langmill",
        "data",
        "prepare",
        str(raw),
        "--out",
        str(out),
        "--workers",
        "1",
        "--quiet",
    ]
    process = subprocess.Popen(
        [*line, "read.unit_bytes=4096", "language.detect=false"], start_new_session=True
    )
    while (
        process.poll() is None and len(list((tmp_path / "killed").glob("out.run/units/[!.]*/unit.json"))) < 2
    ):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (out.with_name("out.run") / "units" / ".half.tmp").mkdir(parents=True)
    report = prepare.run(settings(raw, out), quiet=True)
    assert report.extra["units"]["reused"] >= 2
    assert made(out) == made(tmp_path / "whole" / "out")
    assert not list((tmp_path / "killed" / "out.run" / "units").glob(".*"))


def test_other_settings_or_sources_are_not_mixed_in_by_mistake(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare.run(settings(raw, out), quiet=True)
    before = made(out)
    with pytest.raises(UsageError, match=r"other settings \(tidy\).*--resume.*--force"):
        prepare.run(settings(raw, out, tidy={"mojibake": False}), quiet=True)
    with pytest.raises(UsageError, match="other sources"):
        prepare.run(settings(raw / "texts", out), quiet=True)
    assert made(out) == before
    assert prepare.run(settings(raw / "texts", out, resume=True), quiet=True).counts["documents"] == 10
    assert (
        prepare.run(settings(raw, out, force=True), quiet=True).extra["units"]["reused"] == 0
        and made(out) == before
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match="holds something else"):
        prepare.run(settings(raw, tmp_path / "mine", force=True), quiet=True)


def test_a_source_that_fails_is_reported_and_the_others_finish(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = workers.process

    def fails(unit: Any, *rest: Any) -> str:
        if any("texts" in piece.file.id for piece in unit.pieces):
            raise RuntimeError("the disk under it went away")
        return real(unit, *rest)

    monkeypatch.setattr(workers, "process", fails)
    report = prepare.run(settings(raw, tmp_path / "out"), quiet=True)
    assert (
        not report.ok and report.counts["documents"] == 100 and "the disk under it went away" in report.text
    )
    monkeypatch.undo()
    assert prepare.run(settings(raw, tmp_path / "out"), quiet=True).counts["documents"] == 110


def test_a_full_disk_ends_the_run_and_spoils_nothing(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prepare.run(settings(raw, out), quiet=True)
    before = made(out)

    def full(*given: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "units")

    monkeypatch.setattr(workers, "process", full)
    (raw / "texts" / "new.txt").write_text(sentence(7000), encoding="utf-8")
    with pytest.raises(OSError, match="No space left"):
        prepare.run(settings(raw, out), quiet=True)
    assert made(out) == before


def test_nothing_left_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_text('{"other": 1}\n' * 3, encoding="utf-8")
    with pytest.raises(DataError, match='no document is left: 3 x read: no field "text"'):
        prepare.run(settings(tmp_path / "raw.jsonl", tmp_path / "out"), quiet=True)
    assert not (tmp_path / "out").exists()


def test_rules_are_chosen_and_their_thresholds_checked(raw: Path, tmp_path: Path) -> None:
    how = recipe(
        settings(raw, tmp_path, rules={"preset": "web", "thresholds": ["gopher_quality.min_words=5"]}),
        tmp_path,
    )
    assert "gopher_quality" in [step.name for step in how.steps]
    assert how != recipe(settings(raw, tmp_path, rules={"preset": "web"}), tmp_path)
    for wrong in ("gopher_quality.min_word=5", "gopher_quality.min_words=many", "fineweb"):
        with pytest.raises(UsageError, match=r"rules.thresholds"):
            recipe(settings(raw, tmp_path, rules={"preset": "web", "thresholds": [wrong]}), tmp_path)
    (tmp_path / "none.txt").write_text("# none\n", encoding="utf-8")
    for wrong, told in (("words", "holds no word"), ("decontaminate", "holds no text of 8 words")):
        given = f"x={tmp_path / 'none.txt'}" if wrong == "words" else str(tmp_path / "none.txt")
        with pytest.raises(DataError, match=told):  # before any work
            recipe(settings(raw, tmp_path, rules={wrong: [given]}), tmp_path)


def test_personal_details_are_masked_and_counted(raw: Path, tmp_path: Path) -> None:
    rows = [sentence(9000) + " Write to ann@example.com or +44 20 7946 0958.", sentence(9001)]
    (raw / "more.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8"
    )
    out = tmp_path / "out"
    prepare.run(settings(raw, out), quiet=True)
    everything = "".join(pq.read_table(out / "clean")["text"].to_pylist()) + (out / "report.html").read_text(
        "utf-8"
    )
    assert "ann@example.com" not in everything and "7946" not in everything
    assert prepare.manifest(out)["statistics"]["redacted"] == {"raw": {"email": 1, "phone": 1}}
    prepare.run(settings(raw, out, redact={"policy": "none"}, resume=True), quiet=True)
    assert "ann@example.com" in "".join(pq.read_table(out / "clean")["text"].to_pylist())
    with pytest.raises(UsageError, match="pseudonyms need a key"):
        recipe(settings(raw, out, redact={"policy": "pseudonym"}), out)


def test_why_tells_each_fate(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    (raw / "more.jsonl").write_text(json.dumps({"text": "\x00", "id": 7001}), encoding="utf-8")
    prepare.run(settings(raw, Path(out)), quiet=True)

    def fate(id: str) -> dict[str, Any]:
        [row] = say(capsys, "data", "why", out, id)["results"]
        return row

    assert fate("raw/rows.jsonl#50")["became"] == "kept" and fate("own-60")["id"] == "raw/rows.jsonl#00000061"
    copy = fate("raw/rows.jsonl#1")  # the longer copy stays
    assert copy["became"] == "dropped" and "a copy of raw/rows.jsonl#00000111, which stays" in copy["why"]
    assert fate("raw/rows.jsonl#121")["why"] == "read: broken JSON"
    assert fate("7001")["why"] == "tidy: no text is left"  # by an own id, of what was dropped too
    assert fate("raw/texts/bad.txt")["why"] == "read: not UTF-8"
    assert fate("raw/sheet.xlsx")["why"] == "read: not a known format (.xlsx)"
    assert "nothing here is called" in say(capsys, "data", "why", out, "raw/none.txt")["error"]["message"]
    assert cli(["data", "why", out, "raw/texts/3.txt"]) == 0
    assert "kept: clean/part-00000.parquet, row" in capsys.readouterr().out


def test_what_is_forgotten_is_nowhere_and_stays_away(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare.run(settings(raw, out), quiet=True)
    version = prepare.sha256(out / "manifest.json")
    for name, hash in (("saw", version), ("did-not", "0" * 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lineage.json").write_text(
            json.dumps({"data": {"prepared": [hash]}}), encoding="utf-8"
        )
    secret = sentence(1003)[:40]
    done = say(capsys, "data", "forget", str(out), "--match", secret, "--id", "own-70")
    assert done["counts"] == {"removed": 2, "models": 1, "shards": 0}
    assert done["models"] == [(tmp_path / "saw").as_posix()]
    gone = {"raw/rows.jsonl#00000071", "raw/texts/3.txt#00000000"}
    assert not gone & set(ids(out)) and len(ids(out)) == 108
    for file in (*out.rglob("*.parquet"), *tmp_path.glob("out.run/**/*.parquet")):
        for row in pq.read_table(file).to_pylist():
            assert secret not in (row.get("text") or "") and sentence(70)[:40] not in (row.get("text") or "")
    assert all(secret.encode() not in f.read_bytes() for f in tmp_path.glob("out*/**/*") if f.is_file())
    before = made(out)
    again = prepare.run(settings(raw, out), quiet=True)
    assert again.extra["units"]["reused"] == again.extra["units"]["total"] and made(out) == before
    prepare.run(settings(raw, out, force=True), quiet=True)
    assert len(ids(out)) == 108 and not gone & set(ids(out))
    assert (
        "nothing was removed" in say(capsys, "data", "forget", str(out), "--id", "nobody")["error"]["message"]
    )
    blank = say(capsys, "data", "forget", str(out), "--match", " ")
    assert not blank["ok"] and "an empty --match" in blank["error"]["message"]
    again_asked = say(capsys, "data", "forget", str(out), "--match", "no such words at all")
    assert not again_asked["ok"] and "details were replaced before" in again_asked["error"]["message"]
    assert say(capsys, "data", "forget", str(out), "--match", ":")["counts"]["removed"] == 108 + 20 + 1
    assert (
        ids(out) == [] and (out / "manifest.json").is_file()
    )  # the 22 are copies, which the units held, the one is a broken row


def test_report_is_made_again_from_the_folder(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare.run(settings(raw, out), quiet=True)
    before = made(out)
    (out / "report.html").unlink()
    assert say(capsys, "data", "report", str(out))["counts"]["documents"] == 110 and made(out) == before
    assert (
        "no folder that langmill data prepare wrote"
        in say(capsys, "data", "report", str(raw))["error"]["message"]
    )


def test_lines_of_a_site_are_cut_sources_are_mixed_and_a_document_is_forgotten_from_shards_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("web", 60), ("books", 15)):
        (tmp_path / name).mkdir()
        for i in range(count):
            text = f"Read more on our pages\n{sentence(i + 100 * count)}"
            (tmp_path / name / f"{i:02}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "web" / "menu.txt").write_text("Read more on our pages", encoding="utf-8")
    out = tmp_path / "set" / "out"
    more = {"boilerplate": {"cut": True}, "mixture": {"weights": ["web=1", "books=1"], "most": 2}}
    made = settings(tmp_path / "web", out, source=[str(tmp_path / "web"), str(tmp_path / "books")], **more)
    report = prepare.run(made, quiet=True)
    rows = [row for file in sorted((out / "clean").iterdir()) for row in pq.read_table(file).to_pylist()]
    assert not any("Read more" in row["text"] for row in rows) and ids(out) == sorted(ids(out))
    by_source = {name: sum(row["source"] == name for row in rows) for name in ("web", "books")}
    assert by_source["books"] == 30 and 35 <= by_source["web"] < 60
    assert report.counts["dropped"] == 61 - by_source["web"] and report.counts["documents"] == len(rows)
    flows = prepare.manifest(out)["flows"]
    assert flows["web"]["boilerplate"]["dropped"] == {"no text is left": [1, 22, 22]}
    cut = [flows["web"]["boilerplate"][part][2] for part in ("kept", "out")]
    assert cut[0] - cut[1] == 60 * 23 and "cut: 1,725 characters" in (report.text or "")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "cut from those kept" in page and "2.00" in page
    told = say(capsys, "data", "why", str(out), "web/menu.txt")["results"][0]["why"]
    assert told == "boilerplate: no text is left"
    left_out = next(i for i in range(60) if f"web/{i:02}.txt#00000000" not in ids(out))
    told = say(capsys, "data", "why", str(out), f"web/{left_out:02}.txt")["results"][0]["why"]
    assert told == "mixture: more than its source's share"
    assert prepare.run(made, quiet=True).counts == report.counts  # the same settings again
    tokenizer, shards = str(tmp_path / "set" / "t.json"), str(tmp_path / "set" / "shards")
    clean = str(out / "clean")
    assert cli(["tokenizer", "train", clean, "--vocab-size", "300", "--out", tokenizer, "--quiet"]) == 0
    assert cli(["data", "shards", clean, "--tokenizer", tokenizer, "--out", shards, "--quiet"]) == 0
    gone = say(capsys, "data", "forget", str(out), "--id", "books/03.txt")
    assert gone["counts"]["removed"] == 1 and list(gone["shards"].values()) == [2]
    assert not any(i.startswith("books/03") for i in ids(out))
    with pytest.raises(UsageError, match="no weight to books"):
        prepare.run(settings(tmp_path, tmp_path / "o", source=made.source, mixture={"weights": ["web=1"]}))
