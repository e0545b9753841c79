"""Calls are read the same however the text is cut, nothing is lost, and what only looks like a call stays text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.serve.tool_reader import Piece, Reader

NAMES = ("weather", "send_mail")
ARGUMENTS = {"city": 'Zürich "}{" \\ 北京', "days": [1, {"a": None}]}


def read(parts: Sequence[str], **more: Any) -> tuple[str, list[tuple[str, Any]]]:
    """The text, and (name, arguments) of each call; ids come once, and arguments behind their name."""
    reader, text = Reader(NAMES, **more), ""
    calls: list[list[str]] = []
    pieces: list[Piece] = [piece for part in parts for piece in reader.push(part)] + reader.end()
    for piece in pieces:
        if piece.index is None:
            text += piece.text
            continue
        if piece.name is not None:
            assert piece.index == len(calls) and piece.id is not None and piece.id.startswith("call_")
            calls.append([piece.name, ""])
        calls[piece.index][1] += piece.arguments
    return text, [(name, json.loads(arguments)) for name, arguments in calls]


def call(name: str = "weather", key: str = "arguments", arguments: Any = None) -> str:
    return json.dumps({"name": name, key: ARGUMENTS if arguments is None else arguments}, ensure_ascii=False)


FORMS = {
    "hermes": (f"Well.<tool_call>\n{call()}\n</tool_call>\n<tool_call>{call('send_mail')}</tool_call>", "Well.", 2),
    "then text": (f"<tool_call>{call()}</tool_call>\nDone.", "Done.", 1),
    "mistral": (f"[TOOL_CALLS] [{call()}, {call('send_mail')}]", "", 2),
    "llama": (call(key="parameters"), "", 1),
    "llama, several": (f"{call(key='parameters')}; {call('send_mail', 'parameters')}", "", 2),
    "python tag": (f"<|python_tag|>{call(key='parameters')}", "", 1),
    "list": (f"[{call()}, {call('send_mail')}]", "", 2),
    "fenced": (f"```json\n{call()}\n```", "", 1),
    "other order": ('{"arguments": {"a": 1}, "name": "weather"}', "", 1),
    "as a string": (json.dumps({"name": "weather", "arguments": json.dumps(ARGUMENTS)}), "", 1),
    "never closed": (f"<tool_call>\n{call()}", "", 1),
    "with an id": (f"[TOOL_CALLS] [{call()[:-1]}, \"id\": \"a}}1\"}}]", "", 1),
}  # fmt: skip
TEXTS = (
    "plain text, with { braces } and <tool",
    "<tool_call>not JSON</tool_call> and on",
    f"<tool_call>{call('unknown')}</tool_call>",
    '{"answer": 42, "name": "weather"',
    '{"name": 7, "arguments": {}}',
    "```python\nprint({})\n```",
    "[1, 2, 3]",
    f"I would write {call()} but do not.",
    "<tool_call>",
    " \n ",
    "",
)


@given(st.sampled_from(sorted(FORMS)), st.data())
def test_every_form_is_read_the_same_however_it_is_cut(form: str, data: st.DataObject) -> None:
    source, text, count = FORMS[form]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(source)), max_size=12)))
    parts = [source[a:b] for a, b in zip([0, *cuts], [*cuts, len(source)], strict=True)]
    said, calls = read(parts)
    assert (said, len(calls)) == (text, count)
    assert calls == read(list(source))[1] == read([source])[1]
    assert calls[0][0] == "weather" and calls[0][1] in (ARGUMENTS, {"a": 1})


@pytest.mark.parametrize("source", TEXTS)
def test_what_only_looks_like_a_call_is_given_back_whole(source: str) -> None:
    for parts in ([source], list(source)):
        said, calls = read(parts)
        assert (said, calls) == (source, [])


@given(st.text(alphabet='<>/_{}[]"`:,nametool_cjsn \n', max_size=60))
def test_no_text_is_lost(source: str) -> None:
    said, calls = read(list(source))
    assert (said, calls) == (source, [])
    assert read([source]) == (said, calls)


def test_arguments_stream_as_they_come_and_one_call_can_be_the_most() -> None:
    reader = Reader(NAMES)
    start = reader.push('<tool_call>{"name": "weather", "arguments": {"city": "Zü')
    assert [(piece.name, piece.arguments) for piece in start] == [("weather", '{"city": "Zü')]
    assert [piece.arguments for piece in reader.push('rich"')] == ['rich"']
    two = f"<tool_call>{call()}</tool_call><tool_call>{call('send_mail')}</tool_call>"
    said, calls = read([two], most=1)
    assert [name for name, _ in calls] == ["weather"] and said == two[two.index("</tool_call>") + 12 :]


def test_openings_that_are_control_tokens_come_as_ids() -> None:
    reader = Reader(NAMES, marks={7: "[TOOL_CALLS]"})
    pieces = [*reader.push("", [7]), *reader.push(f" [{call()}]", [1, 2]), *reader.end()]
    assert [piece.name for piece in pieces] == ["weather"] and json.loads(pieces[0].arguments) == ARGUMENTS
