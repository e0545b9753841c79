"""The step over batches: the same as text by text, rows in order, counts in meta, nothing of the finds in reports."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import UsageError
from langmill.privacy.key import Key
from langmill.privacy.patterns import Find, edition, find, tables
from langmill.privacy.redact import Redact, Tally, redact

KEY = Key(b"a key of many bytes")
MAIL, CARD, QUIET = (
    "write to joe@example.com",
    "4111 1111 1111 1111 or ٠١٠٠١٢٣٤٥٦٧",
    "nothing to see, 12 times",
)
SNIPPETS = (
    "joe@example.com", "4111111111111111", " call ", "(212) 555-0100", "１３８００１３８０００", "电话", "::",
    "fe80::1", "8.8.8.8", "00-1A-2B-3C-4D-5E", "AB123456C", "GB82WEST12345698765432", "ABCPE1234F",
    "key=abcDEF1234567890xyzQ", ".",
    "https://a:b@c.example/d", "-----BEGIN PRIVATE KEY-----", " order ", "\n", "é", "漢", " ", "12", "+49 30 123456",
    "hf_" + "aB3" * 12, "eyJ",
)  # fmt: skip


def batch(*texts: str, meta: str = "{}", dropped: dict[int, str] | None = None) -> Any:
    return pa.table(
        {
            "id": [str(number) for number in range(len(texts))],
            "text": pa.array(texts, pa.large_string()),
            "source": ["a" if number % 2 else "b" for number in range(len(texts))],
            "meta": pa.array([meta] * len(texts), pa.string()),
            "dropped": pa.array([(dropped or {}).get(n) for n in range(len(texts))], pa.string()),
        }
    )


def test_a_batch_is_redacted_in_place() -> None:
    given = batch(MAIL, QUIET, MAIL, CARD, meta='{"url":"u"}', dropped={2: "rules: too short"})
    made = Redact()(given)
    assert made["text"].to_pylist() == [
        "write to ***@*******.***",
        QUIET,
        MAIL,
        "**** **** **** **** or ***********",
    ]
    assert made["meta"].to_pylist()[0] == '{"url":"u","redacted":{"email":1}}'
    assert made["meta"].to_pylist()[1:3] == ['{"url":"u"}'] * 2
    assert made.schema == given.schema and made["id"] == given["id"] and made["dropped"] == given["dropped"]
    assert Redact()(batch()).num_rows == 0
    again = Redact()(batch("b@example.org", meta=made["meta"].to_pylist()[0]))
    assert json.loads(again["meta"].to_pylist()[0])["redacted"] == {"email": 2}


def test_titles_are_redacted_and_what_names_a_document_stays() -> None:
    meta = {
        "id": "<1@x.org>",
        "url": "https://x.org/20240102030405",
        "title": f"{MAIL}, 你好",
        "language": "en",
    }
    made = Redact("label")(batch(QUIET, MAIL, meta=json.dumps(meta, ensure_ascii=False)))
    first, second = (json.loads(one) for one in made["meta"].to_pylist())
    assert first == meta | {"title": "write to [EMAIL], 你好", "redacted": {"email": 1}}
    assert second["redacted"] == {"email": 2} and '"language":"en"' in made["meta"].to_pylist()[0]
    assert Redact()(batch(MAIL, meta=json.dumps(meta), dropped={0: "no"}))["meta"].to_pylist() == [
        json.dumps(meta)
    ]


@given(st.lists(st.lists(st.sampled_from(SNIPPETS), max_size=8).map("".join), max_size=6))
def test_columns_and_single_texts_agree(texts: list[str]) -> None:
    """Gates that Arrow asks of a column are open wherever the patterns would find something."""
    assert Redact("label")(batch(*texts))["text"].to_pylist() == [redact(text, "label") for text in texts]


@pytest.mark.parametrize("gate", [name for name in tables().gates if name not in ("at", "begin")])
@given(data=st.data())
def test_gates_are_open_where_windows_are(gate: str, data: st.DataObject) -> None:
    text = data.draw(st.lists(st.sampled_from(SNIPPETS), max_size=8).map("".join))
    found = find(text, [gate])
    ask = pa.compute.match_substring_regex(pa.array([text]), tables().gates[gate].ask)[0].as_py()
    assert ask or not found or not text.isascii()


def test_types_names_and_repr() -> None:
    assert redact(f"{MAIL}, {CARD}", types=["email"]) == f"write to ***@*******.***, {CARD}"
    step = Redact("pseudonym", key=KEY)
    assert "many bytes" not in repr(step) and KEY.id in repr(step) and edition() in repr(step)
    again = pickle.loads(pickle.dumps(step))  # noqa: S301
    assert again == step and again(batch(MAIL)) == step(batch(MAIL))
    with pytest.raises(UsageError, match="no type 'emial': did you mean email"):
        Redact(types=("emial",))
    with pytest.raises(UsageError, match="no policy 'hide'"):
        Redact("hide")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="need a key"):
        Redact("pseudonym")


def test_names_join_what_patterns_find() -> None:
    def names(texts: Any) -> list[list[Find]]:
        return [[Find(0, 8, "person")] if text.startswith("Joe") else [] for text in texts]

    step = Redact("label", names=names)
    assert step.text("Joe Bloe joe@example.com")[0] == "[PERSON] [EMAIL]"
    made = step(batch("Joe Bloe", "joe@example.com", "x"))
    assert made["text"].to_pylist() == ["[PERSON]", "[EMAIL]", "x"]
    assert Redact("label", ("email",), names=names).text("Joe Bloe")[0] == "Joe Bloe"


def test_authors_of_a_thread_are_persons_where_they_speak() -> None:
    text = "Zoë: hi Bo, write to joe@example.com\nBo Li: bye: Zoë\nRobo Li: no\nBo Li: René: never"
    meta = json.dumps({"thread": "t", "messages": 3, "authors": ["Bo Li", "RenÃ©", "Zoë"]})
    given = batch(text, text, text, meta=meta, dropped={2: "no"})
    made = Redact("label")(given)
    said = "[PERSON]: hi Bo, write to [EMAIL]\n[PERSON]: bye: Zoë\nRobo Li: no\n[PERSON]: [PERSON]: never"
    assert made["text"].to_pylist() == [said, said, text] and made.schema == given.schema
    assert json.loads(made["meta"].to_pylist()[0]) == {
        "thread": "t", "messages": 3, "redacted": {"email": 1, "person": 4},
    }  # fmt: skip
    assert made["meta"].to_pylist()[2] == meta  # what was dropped is as it was
    one, two = Redact("pseudonym", key=KEY)(batch("Zoë: a\nBo Li: b\nZoë: c", "Zoë: d", meta=meta))[
        "text"
    ].to_pylist()
    assert (
        one.split(": ")[0]
        == one.split("\n")[2].split(": ")[0]
        == two.split(": ")[0]
        != one.split("\n")[1].split(": ")[0]
    )
    mails = Redact(types=("email",))(given)
    assert "Zoë: hi" in mails["text"][0].as_py() and "authors" not in mails["meta"][0].as_py()


def test_what_stands_before_counts_as_context_and_is_not_touched() -> None:
    text, finds = Redact("label").text("4155550123", "phone: ")
    assert text == "[PHONE]" and finds == [Find(0, 10, "phone", True)]
    assert Redact("label").text("4155550123", "total: ")[0] == "4155550123"


def test_a_tally_holds_counts_and_masks_alone() -> None:
    tally = Tally()
    tally.take("a.txt", MAIL, find(MAIL))
    tally.take_batch(Redact()(batch(MAIL, CARD)))
    assert {source: dict(own) for source, own in tally.counts.items()} == {
        "a.txt": {"email": 1},
        "b": {"email": 1},
        "a": {"card": 1, "phone": 1},
    }
    assert tally.samples == {"email": ["***@*******.***"]}
    assert tally.lines()[0].split() == ["2", "email", "***@*******.***"] and "joe" not in repr(tally)
