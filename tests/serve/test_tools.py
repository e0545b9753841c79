"""Tools are shown by the template, or in its stead; forced calls are valid; calls in a conversation are shown again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from langmill.serve.errors import Refused
from langmill.serve.formats import schema_of
from langmill.serve.models import Loaded
from langmill.serve.tools import as_template_wants, closed, form_of, grammar_of, prepared
from langmill.serve.turns import size_of

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "北京"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "mail"}}
USER = {"role": "user", "content": "Weather?"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Paris", "days": 1}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
HEAD = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
)
QWEN = (
    HEAD + '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endfor %}"
)
LLAMA = (
    HEAD + '{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}", "parameters": '
    "{{ c.function.arguments | tojson }}}{% endfor %}{% endfor %}"
)
TEXTUAL = (
    HEAD + '{% for c in m.tool_calls or [] %}[TOOL_CALLS] [{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments + '' }}}]{% endfor %}{% endfor %}"
)


def test_a_template_tells_the_form_of_its_calls() -> None:
    qwen, llama, textual, none = map(form_of, (QWEN, LLAMA, TEXTUAL, "{{ messages[0].content }}"))
    assert (qwen.opening, qwen.key, qwen.as_object, qwen.shows_tools) == (
        "<tool_call>",
        "arguments",
        True,
        True,
    )
    assert (llama.opening, llama.key) == ("", "parameters")
    assert (textual.opening, textual.as_object) == ("[TOOL_CALLS]", False)
    assert not none.shows_tools and not none.shows_calls
    assert grammar_of(qwen, [TOOL], True).startswith("start: one (") and "tool_call" not in grammar_of(
        llama, [TOOL], True
    )


def test_a_forced_call_is_valid_by_its_schema(client: openai.OpenAI) -> None:
    """A model of random weights writes it, one that no text teaches anything."""
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        for seed in range(3):
            answer = client.chat.completions.create(
                model="long", messages=[USER], tools=[TOOL], tool_choice=choice, max_tokens=200, seed=seed,
                parallel_tool_calls=False,
            )  # type: ignore[call-overload]  # fmt: skip
            [call] = answer.choices[0].message.tool_calls
            given = json.loads(call.function.arguments)
            assert (
                call.function.name == "weather"
                and given["city"] in ("Paris", "北京")
                and 1 <= given["days"] <= 9
            )
            assert (
                answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
            )


def test_a_forced_call_has_no_argument_that_is_not_named() -> None:
    named = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert closed(named) == {**named, "additionalProperties": False}
    for said in ({}, {"type": "object"}, {**named, "additionalProperties": True}, {**named, "allOf": [{}]}):
        assert closed(said) == said


def test_a_streamed_call_is_the_whole_one(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "long", "messages": [USER, CALLED, RESULT], "tools": [TOOL, OTHER], "max_tokens": 200, "seed": 4,
        "tool_choice": {"type": "function", "function": {"name": "weather"}}, "parallel_tool_calls": False,
    }  # fmt: skip
    [call] = client.chat.completions.create(**asked).choices[0].message.tool_calls
    name, arguments, finish, parts = "", "", None, 0
    for chunk in client.chat.completions.create(**asked, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or ():
            name, arguments, parts = (
                name + (piece.function.name or ""),
                arguments + piece.function.arguments,
                parts + 1,
            )
        finish = chunk.choices[0].finish_reason or finish
    assert (name, arguments, finish) == ("weather", call.function.arguments, "tool_calls") and parts > 2


def test_what_is_wrong_with_tools_is_named(client: openai.OpenAI) -> None:
    broken: list[tuple[dict[str, Any], str]] = [
        ({"tools": [{"type": "browser"}]}, "others are not run here"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "letters, digits"),
        ({"tools": [TOOL, TOOL]}, "two tools are called weather"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}},
            "not among the tools",
        ),
        ({"tools": [TOOL], "tool_choice": "often"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]}, "parameters"),
        (
            {"messages": [{**CALLED, "tool_calls": [{"function": {"name": "w", "arguments": "{"}}]}]},
            "no JSON object",
        ),
    ]
    for more, said in broken:
        with pytest.raises(openai.BadRequestError, match=said):
            client.chat.completions.create(**{"model": "tiny", "messages": [USER], "max_tokens": 1, **more})


def test_a_template_without_tools_gets_them_as_text(running: Any) -> None:
    loaded: Loaded = running.state.models.named("tiny")
    use = prepared(loaded, [TOOL], "auto", True)
    assert use is not None and use.tools is None and use.constraint is None
    assert prepared(loaded, [TOOL], "none", True) is prepared(loaded, None, None, True) is None
    system = {"role": "system", "content": "Be brief."}
    shown = as_template_wants(loaded, [system, USER, {**CALLED, "content": ""}, RESULT], use)
    assert [turn["role"] for turn in shown] == ["system", "user", "assistant", "user"]
    assert shown[0]["content"].startswith("Be brief.") and '"weather"' in shown[0]["content"]
    assert shown[2]["content"].startswith("<tool_call>") and "rain" in shown[3]["content"]


def test_formats_are_named_when_they_are_none(tmp_path: Path) -> None:
    assert schema_of({"type": "text"}) is None
    assert schema_of({"type": "json_object"}) == ({"type": "object"}, "response_format")
    schema = {"type": "null"}
    place = "response_format.json_schema.schema"
    assert schema_of({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}) == (
        schema,
        place,
    )
    flat = {"type": "json_schema", "name": "a", "schema": schema}
    assert schema_of(flat, "text.format") == (schema, "text.format.schema")
    for wrong in ({}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_object", "schema": {}},
                  {"type": "json_schema", "json_schema": {"schema": 3}}, {"type": "json_schema", "json_schema": 3},
                  {"type": "json_schema", "json_schema": {"name": "a"}}, flat,
                  {"type": "json_schema", "json_schema": {"name": "a", "sch": {}}}):  # fmt: skip
        with pytest.raises(Refused, match="response_format"):
            schema_of(wrong)


def test_calls_and_tools_count_for_whether_a_conversation_is_long() -> None:
    long = {"city": "a" * 5000}
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": json.dumps(long)}}
    assert size_of([USER, {"role": "assistant", "content": "", "tool_calls": [call]}]) > 5000
    assert size_of([USER], [{**TOOL, "description": "a" * 5000}], None) > 5000 > size_of([USER], None, {}) > 8
