"""Units: every record is read or set aside with its reason, every step is counted, and what is stored is whole."""

from __future__ import annotations

import gzip
import json
import mailbox
import os
from dataclasses import dataclass
from email.message import EmailMessage
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import DataError, UsageError
from langmill.common.prepare_settings import InputSettings
from langmill.data.formats import check_fields
from langmill.data.sources import files, units
from langmill.data.threads import Post, threads
from langmill.data.tidy import Language, Tidy
from langmill.data.units import BATCH, READ, Recipe, Step, flows_of, kept_batches, opened, process

PROSE = "The garden behind the house was full of old apple trees, and nobody had cut them. "


def batch(*texts: str) -> pa.Table:
    rows = [
        {"id": f"a#{i:08d}", "text": t, "source": "a", "meta": "{}", "dropped": None}
        for i, t in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, BATCH)


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
    return path


def prepared(
    tmp_path: Path, *steps: Step, **settings: Any
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """(kept rows by id, reasons by id, flows) of tmp_path/raw; the ledger adds up."""
    read = InputSettings(**{"seconds": 5.0} | settings)
    recipe = Recipe(read, steps or (Tidy(),))
    kept, gone, total = {}, {}, {}
    found = files([str(tmp_path / "raw")], False, lambda *given: None)
    for unit in units(found, read, recipe.fingerprint(), lambda *given: None):
        assert process(unit, recipe, tmp_path / "units") == ""
        folder = tmp_path / "units" / unit.key
        kept |= {row["id"]: row for b in kept_batches(folder) for row in b.to_pylist()}
        dropped = pq.read_table(folder / "dropped.parquet").to_pylist()
        gone |= {row["id"]: row["dropped"] for row in dropped}
        flows = flows_of(opened(folder)["flows"])
        before = None
        for flow in flows.values():
            assert before is None or flow.came.as_list() == before
            before = flow.out.as_list()
        assert before == [
            sum(len(b) for b in kept_batches(folder)),
            sum(len(row["text"].encode()) for b in kept_batches(folder) for row in b.to_pylist()),
            sum(len(row["text"]) for b in kept_batches(folder) for row in b.to_pylist()),
        ]
        assert sum(a.documents for f in flows.values() for a in f.dropped.values()) == len(dropped)
        total |= flows
    return kept, gone, total


def texts(kept: dict[str, Any]) -> dict[str, str]:
    return {id: row["text"] for id, row in kept.items()}


def test_rows_of_every_table_format_are_read_with_what_is_known_of_them(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    row = {"text": PROSE, "url": "https://example.org", "secret": 1}
    put(raw / "a.jsonl", json.dumps(row) + "\n")
    put(raw / "b.jsonl.zst", zstandard.compress(json.dumps(row).encode()))
    put(raw / "c.csv", f'url,text\nhttps://example.org,"{PROSE}"\n')
    put(raw / "d.tsv.gz", gzip.compress(f"text\turl\n{PROSE}\thttps://example.org\n".encode()))
    put(raw / "e.json", json.dumps([row]))
    pq.write_table(pa.Table.from_pylist([row]), raw / "f.parquet")
    put(raw / "g.md", PROSE)
    kept, gone, _ = prepared(tmp_path)
    assert gone == {} and [id.partition("#")[0][4:] for id in kept] == [p.name for p in sorted(raw.iterdir())]
    assert {row["text"] for row in kept.values()} == {PROSE}
    assert [json.loads(row["meta"]) for row in kept.values()] == [{"url": "https://example.org"}] * 6 + [{}]


def test_bad_rows_are_set_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    rows = [
        '{"text": "good"}', '{"text": 5}', '{"text": null}', "[1]", '{"other": "x"}', '{"text": "\\ud800"}', "{",
        "\0\0", '{"text": " "}', '{"text": "a\\u0000b"}', "[" * 100_000, '{"text": "last"}',
    ]  # fmt: skip
    put(tmp_path / "raw" / "a.jsonl", "\n".join(rows).encode() + b'\n{"text": "\xff"}')
    kept, gone, _ = prepared(tmp_path)
    assert list(texts(kept).values()) == ["good", "ab", "last"]
    assert [int(id[-8:]) for id in gone] == [2, 3, 4, 5, 6, 7, 8, 9, 11, 13]
    assert all(reason.startswith("read: ") for reason in gone.values())


def test_damaged_and_endless_files_are_set_aside(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    whole = gzip.compress(b"".join(b'{"text": "row %d"}\n' % i for i in range(5000)))
    put(raw / "cut.jsonl.gz", whole[:-200])
    put(raw / "bomb.txt.zst", zstandard.compress(bytes(1100 << 20)))
    put(raw / "noise.parquet", b"PAR1" + bytes(100))
    put(raw / "noise.txt", b"\xff\xfe\xff" * 100)
    put(raw / "empty.jsonl", b"")
    put(raw / "good.txt", PROSE)
    kept, gone, _ = prepared(tmp_path)
    reasons = {id.partition("#")[0][4:]: reason.removeprefix("read: ") for id, reason in gone.items()}
    assert reasons == {
        "cut.jsonl.gz": "file is damaged from here on", "bomb.txt.zst": "compressed beyond belief",
        "noise.parquet": "file is damaged from here on", "noise.txt": "not UTF-8",
    }  # fmt: skip
    assert "raw/good.txt#00000000" in kept and "raw/cut.jsonl.gz#00000001" in kept and len(kept) > 1000


def test_pages_mail_and_archives_are_read(tmp_path: Path) -> None:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    raw = tmp_path / "raw"
    head = "<title>T</title><meta name=robots content=noindex>"
    page = f"<html>{head}<body><article><p>{PROSE * 4}</p></article></body></html>".encode()
    put(raw / "a.html", page)
    out = BytesIO()
    writer = WARCWriter(out, gzip=True)
    for kind, status, body in (("text/html; charset=utf-8", "200 OK", page), ("image/png", "200 OK", b"png"),
                               ("text/html", "404 Gone", page), ("text/plain", "200 OK", PROSE.encode())):  # fmt: skip
        asks = [("Content-Type", kind), ("X-Robots-Tag", "noai")]
        headers = StatusAndHeaders(status, asks, protocol="HTTP/1.1")
        record = writer.create_warc_record(
            "http://x.org/p", "response", payload=BytesIO(body), http_headers=headers
        )
        writer.write_record(record)
    put(raw / "b.warc.gz", out.getvalue())
    put(raw / "cut.warc.gz", out.getvalue()[:-40])
    plain = zstandard.ZstdCompressor().compress(gzip.decompress(out.getvalue()))
    put(raw / "b2.warc.zst", plain)
    put(raw / "cut2.warc.zst", plain[:-40])
    box = mailbox.mbox(raw / "c.mbox")
    for number in range(3):
        message = EmailMessage()
        message["Subject"] = f"Letter {number}"
        message.set_content(f"From here on, {PROSE}")
        box.add(message)
    box.flush()
    kept, gone, _ = prepared(tmp_path)
    assert PROSE.strip() in texts(kept)["raw/a.html#00000000"]
    meta = json.loads(kept["raw/b.warc.gz#00000001"]["meta"])
    assert meta["url"] == "http://x.org/p" and meta["robots"] == "noindex, noai"
    assert texts(kept)["raw/b.warc.gz#00000004"] == texts(kept)["raw/b2.warc.zst#00000004"] == PROSE
    assert any(id.startswith("raw/cut2.warc.zst") and "damaged" in why for id, why in gone.items())
    assert [texts(kept)[f"raw/c.mbox#{i + 1:08d}"].rstrip() for i in range(3)] == [
        f"Letter {i}\n\nFrom here on, {PROSE}".rstrip() for i in range(3)
    ]
    assert gone["raw/b.warc.gz#00000002"] == "read: not a page or text"
    assert gone["raw/b.warc.gz#00000003"] == "read: page was not there (HTTP status)"
    assert any(
        id.startswith("raw/cut.warc.gz") and ("cut short" in why or "damaged" in why)
        for id, why in gone.items()
    )


def test_posts_become_threads_in_order_of_time(tmp_path: Path) -> None:
    rows = [
        {"n": 3, "re": 2, "who": "c", "at": 30, "body": {"said": "third"}},
        {"n": 1, "re": None, "who": "a", "at": 9, "body": {"said": "first"}},
        {"n": 2, "re": 1, "who": "b", "at": 10, "body": {"said": "second"}},
        {"n": 9, "re": 8, "who": "x", "at": 1, "body": {"said": "loop"}},
        {"n": 8, "re": 9, "who": "y", "at": 2, "body": {"said": "loop"}},
        {"n": 7, "re": 8, "who": "z", "at": 3, "body": {"said": "leads to it"}},
        {"who": "w", "at": 4, "body": {"said": "alone"}},
    ]
    put(tmp_path / "raw" / "a.jsonl", "\n".join(map(json.dumps, rows)))
    fields = ["id=n", "parent=re", "author=who", "time=at"]
    kept, _, _ = prepared(tmp_path, text_field="body.said", fields=fields)
    assert list(texts(kept).values()) == [
        "a: first\nb: second\nc: third",
        "x: loop\ny: loop\nz: leads to it",
        "w: alone",
    ]
    assert json.loads(next(iter(kept.values()))["meta"])["authors"] == ["a", "b", "c"]
    with pytest.raises(UsageError, match="read.fields"):
        check_fields(InputSettings(fields=["nobody=x"]))


def test_the_name_of_an_author_stands_on_one_line_as_tidy_leaves_it() -> None:
    (told,) = threads([Post(0, "hello", 5, author=" Rene\u0301\n\x00 Du\xadpont\u2028")])
    assert told[1] == "René Dupont: hello" and told[3]["authors"] == ["René Dupont"]
    assert Tidy()(batch(told[1]))["text"].to_pylist() == [told[1]]


@given(
    st.lists(st.tuples(st.sampled_from("abcdefghi") | st.none(), st.sampled_from("abcdefghi") | st.none()))
)
def test_every_post_stands_in_one_thread(links: list[tuple[str | None, str | None]]) -> None:
    posts = [Post(i, f"t{i}", 2, id, None, parent) for i, (id, parent) in enumerate(links)]
    found = [line for _, text, _, _ in threads(posts) for line in text.split("\n")]
    assert sorted(found) == sorted(post.text for post in posts)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("cafÃ© dâ€™or", "café d’or"), ("cafe\u0301", "café"), ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("x\x00y\x07z\ufeff\xad", "xyz"), ("“quotes” – ok ﬁ", "“quotes” – ok ﬁ"), ("می‌خواهم 👩‍👧", "می‌خواهم 👩‍👧"),
        ("Ｆｕｌｌ　你好", "Ｆｕｌｌ　你好"), ("tab\tstays\n", "tab\tstays\n"),
    ],
)  # fmt: skip
def test_tidy_repairs_what_is_broken_and_nothing_else(before: str, after: str) -> None:
    done = Tidy()(batch(before))
    assert done["text"].to_pylist() == [after] and done["dropped"].to_pylist() == [None]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_tidy_twice_is_tidy_once(given_texts: list[str]) -> None:
    once = Tidy(mojibake=False)(batch(*given_texts))
    assert Tidy(mojibake=False)(once)["text"].equals(once["text"])
    assert [d is not None for d in once["dropped"].to_pylist()] == [
        not t.strip() for t in once["text"].to_pylist()
    ] or any(t and not t.isprintable() for t in once["text"].to_pylist())


def test_languages_are_told_and_kept() -> None:
    given_texts = (
        PROSE * 2,
        "Der Garten hinter dem Haus war voller alter Apfelbäume.",
        "花园里种满了老苹果树，没有人修剪它们。",
    )
    done = Language(("en", "zh"))(batch(*given_texts))
    told = [json.loads(meta)["language"] for meta in done["meta"].to_pylist()]
    assert told == ["en", "de", "zh"]
    assert done["dropped"].to_pylist() == [None, "language: de is not among those kept", None]


@dataclass(frozen=True)
class Halve:
    name: str = "halve"

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch.slice(0, len(batch) // 2)


def test_a_step_that_loses_rows_is_found_out(tmp_path: Path) -> None:
    put(tmp_path / "raw" / "a.jsonl", '{"text": "a"}\n{"text": "b"}')
    with pytest.raises(DataError, match="halve lost or moved rows"):
        prepared(tmp_path, Halve())
    assert not any((tmp_path / "units").iterdir())  # nothing half-made is left


def test_a_file_that_changes_while_it_is_read_fails_its_unit_alone(tmp_path: Path) -> None:
    path = put(tmp_path / "raw" / "a.txt", PROSE)
    read = InputSettings()
    [unit] = units(files([str(path)], False, print), read, "", print)
    put(path, PROSE * 2)
    with pytest.raises(DataError, match="changed while it was read"):
        process(unit, Recipe(read, (Tidy(),)), tmp_path / "units")
    path.unlink()
    with pytest.raises(DataError, match="went away"):
        process(unit, Recipe(read, (Tidy(),)), tmp_path / "units")
    assert READ not in [p.name for p in (tmp_path / "units").iterdir()]


def test_names_that_are_no_unicode_and_texts_too_long_cost_no_other_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "raw" / "good.txt", PROSE)
    (tmp_path / "raw" / os.fsdecode(b"na\xffme.txt")).write_text(f"{PROSE} And so on.", encoding="utf-8")
    rows = [{"text": "long " * 50}, {"text": PROSE + "After it.", "url": float("inf")}]
    put(tmp_path / "raw" / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("langmill.data.units.LONGEST", 200)
    kept, gone, _ = prepared(tmp_path)
    assert sorted(kept) == ["raw/good.txt#00000000", "raw/na\\xffme.txt#00000000", "raw/rows.jsonl#00000002"]
    assert gone == {"raw/rows.jsonl#00000001": "read: text longer than 200 characters"}
    assert json.loads(kept["raw/rows.jsonl#00000002"]["meta"]) == {"url": "Infinity"}
