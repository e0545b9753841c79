"""Rows of conversations: every form is read, and what does not hang together is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from langmill.common.errors import DataError
from langmill.data.chats import Chat, Completion, parse, read_chats
from langmill.data.pipeline import Ledger

ASKED, ANSWER = {"role": "user", "content": "Hi مرحبا"}, {"role": "assistant", "content": "你好"}
TOOLS = [{"type": "function", "function": {"name": "look"}}]


def call(*ids: str | None) -> dict[str, Any]:
    calls = [{"id": id, "function": {"name": "look", "arguments": {}}} for id in ids]
    return {"role": "assistant", "tool_calls": calls}


def result(id: str | None = None, role: str = "tool") -> dict[str, Any]:
    return {"role": role, "content": "42", **({} if id is None else {"tool_call_id": id})}


def roles(row: dict[str, Any]) -> list[str]:
    found = parse("here", row)
    assert isinstance(found, Chat)
    return [message["role"] for message in found.messages]


def test_every_form_of_a_conversation_is_read() -> None:
    assert parse("here", {"messages": [ASKED, {**ANSWER, "name": None}]}) == Chat("here", [ASKED, ANSWER])
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert parse("here", {"messages": [ASKED, ANSWER], "tools": tools}) == Chat(
            "here", [ASKED, ANSWER], TOOLS
        )
    turns = [{"from": "human", "value": ASKED["content"]}, {"from": "gpt", "value": ANSWER["content"]}]
    system = {"role": "system", "content": "S"}
    assert parse("here", {"conversations": turns}) == Chat("here", [ASKED, ANSWER])
    beside = {"conversations": turns, "system": "S", "tools": "[]"}
    assert parse("here", beside) == Chat("here", [system, ASKED, ANSWER])
    assert parse("here", {"conversations": [ASKED, ANSWER]}) == Chat("here", [ASKED, ANSWER])
    alpaca = {"instruction": "A", "input": "B", "output": "C", "system": "S", "history": [["Q", "R"]]}
    found = parse("here", alpaca)
    assert isinstance(found, Chat)
    assert [message["content"] for message in found.messages] == ["S", "Q", "R", "A\n\nB", "C"]
    assert parse("here", {"prompt": "a", "completion": "b"}) == Completion("here", "a", "b")
    last = parse("here", {"prompt": [ASKED, ANSWER, ASKED], "completion": [ANSWER]})
    assert isinstance(last, Chat) and last.first == 3


def test_tool_calls_and_their_results() -> None:
    called = [ASKED, call("a", "b"), result("b"), result("a"), ANSWER]
    assert roles({"messages": called}) == ["user", "assistant", "tool", "tool", "assistant"]
    assert roles({"messages": [ASKED, call(None), result(), ANSWER]})
    assert roles(
        {"messages": [ASKED, ANSWER, result(role="function"), ANSWER]}
    )  # a call that is written as text
    assert roles({"messages": [ASKED, call("a")]})  # to learn to call is enough


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (7, "not int"),
        ({"text": "x"}, "this one has text"),
        ({"chosen": "x"}, "for --task prefer"),
        ({"messages": []}, "at least one turn"),
        ({"messages": "x"}, "not a list"),
        ({"messages": ["x"]}, "message 0 is not an object"),
        ({"messages": [ASKED, {"role": "Assistant", "content": "x"}]}, "message 1 is of role 'Assistant'; known are"),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, r"message 1 \(assistant\) has no content"),
        ({"messages": [ASKED, {"role": "assistant", "content": " \n"}]}, r"message 1 \(assistant\) is empty"),
        ({"messages": [{"role": "user", "content": []}, ANSWER]}, r"message 0 \(user\) is empty"),
        ({"messages": [ASKED]}, "no assistant turn"),
        ({"messages": [ANSWER, ASKED]}, "before anybody asked"),
        ({"messages": [ASKED, {"role": "system", "content": "x"}, ANSWER]}, "after the conversation began"),
        ({"messages": [result(), ASKED, ANSWER]}, "message 0 is a tool's result that no tool call asked for"),
        ({"messages": [ASKED, result(), ANSWER]}, "message 1 is a tool's result that no tool call asked for"),
        ({"messages": [ASKED, call("a"), ANSWER]}, r"message 2 follows tool calls that got no result \(a\)"),
        ({"messages": [ASKED, call("a", "b"), result("a"), ANSWER]}, r"got no result \(b\)"),
        ({"messages": [ASKED, call("a"), result("c"), ANSWER]}, "'c', which nobody made"),
        ({"messages": [ASKED, {**ANSWER, "tool_calls": "x"}]}, "tool_calls of message 1 is not a list"),
        ({"messages": [{**ASKED, "tool_calls": [{}]}, ANSWER]}, r"message 0 \(user\) calls tools"),
        ({"messages": [ASKED, ANSWER], "tools": ["x"]}, "tools is not a list of descriptions"),
        ({"messages": [ASKED, ANSWER], "tools": "x"}, "tools is text that is not JSON"),
        ({"messages": [ASKED, {**ANSWER, "weight": 0}]}, "message 1 has weight 0: to have turns read only"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "turn 0 is from 'alien'"),
        ({"conversations": [{"from": "human"}]}, "turn 0 is not an object with from and value"),
        ({"instruction": 7, "output": "x"}, "instruction is int"),
        ({"instruction": "x", "input": 7, "output": "x"}, "input is int"),
        ({"instruction": "x", "output": "x", "history": ["x"]}, "history is not a list of pairs"),
        ({"prompt": "x", "completion": ""}, "completion is empty"),
        ({"prompt": "x", "completion": [ANSWER]}, "both text, or both lists"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_named(row: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        parse("here", row)


def test_files_as_editors_leave_them_are_read_and_broken_rows_are_counted(tmp_path: Path) -> None:
    row = json.dumps({"messages": [ASKED, ANSWER]}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n\r\n{row}\r\n".encode())
    huge, deep = '{"messages": ' + "9" * 5000 + "}", '{"messages": ' + "[" * 99_999 + "]" * 99_999 + "}"
    lines = [b"\xff\xfd", huge.encode(), deep.encode(), b'{"messages": "\\ud800"}', b"{", row.encode()]
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "c.json").write_text(f"[{row}, 7]", "utf-8-sig")
    (tmp_path / "mine.run").mkdir()
    ledger = Ledger(tmp_path / "mine.run" / "errors.jsonl")  # which is written now: it is no input
    found = list(read_chats([tmp_path], ledger, lambda made: made.id.rpartition("/")[2]))
    assert found == ["a.jsonl:1", "a.jsonl:3", "b.jsonl:6", "c.json:1"]
    counted = {reason: count.documents for reason, count in ledger.dropped().items()}
    assert counted == {"not UTF-8": 1, "broken JSON": 4, "not a usable conversation": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_file_in_another_encoding_is_named_once(name: str, encoding: str, tmp_path: Path) -> None:
    text = "\n".join([json.dumps({"messages": [ASKED, ANSWER]})] * (1 if name.endswith("json") else 3))
    (tmp_path / name).write_bytes(text.encode(encoding))
    ledger = Ledger()
    assert not list(read_chats([tmp_path], ledger, lambda made: made))
    assert {reason: count.documents for reason, count in ledger.dropped().items()} == {"not UTF-8": 1}
    (example,) = ledger.examples["not UTF-8"]
    assert example.startswith((tmp_path / name).as_posix()) and "UTF-16" in example and "UTF-8" in example
