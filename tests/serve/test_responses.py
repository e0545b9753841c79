"""/v1/responses by OpenAI's own client: the texts of the chat route, streamed and not; calls, formats, errors."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response

CITIES = {"type": "object", "properties": {"city": {"enum": ["Oslo", "北京"]}}, "required": ["city"]}
TOOLS: list[Any] = [{"type": "function", "name": "weather", "description": "Now.", "parameters": CITIES}]
HOW: dict[str, Any] = {"model": "long", "max_output_tokens": 24, "temperature": 0, "input": "The quick fox"}


def test_texts_are_those_of_the_chat_route(client: openai.OpenAI) -> None:
    answer = client.responses.create(instructions="Be brief.", **HOW)
    turns: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick fox"}]
    wanted = client.chat.completions.create(model="long", max_tokens=24, temperature=0, messages=turns)
    assert answer.output_text == wanted.choices[0].message.content and answer.store is False
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.total_tokens == wanted.usage.total_tokens
    Response.model_validate(answer.to_dict())  # the client itself checks nothing of what it reads
    parts: Any = [{"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]}, turns[1]]
    kinds, text, numbers = [], "", []
    with client.responses.stream(**{**HOW, "input": parts}) as stream:
        for event in stream:
            kinds.append(event.type)
            numbers.append(event.sequence_number)
            text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == answer.output_text and numbers[0] == 0 and numbers == sorted(numbers)
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip


def test_calls_results_and_formats(client: openai.OpenAI) -> None:
    how = {**HOW, "tools": TOOLS, "max_output_tokens": 200, "parallel_tool_calls": False}
    choice: Any = {"type": "function", "name": "weather"}
    answer = client.responses.create(tool_choice=choice, **how)
    (call,) = answer.output
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Oslo", "北京")
    assert answer.status == "completed"
    with client.responses.stream(tool_choice=choice, **how) as stream:
        assert "response.function_call_arguments.done" in [event.type for event in stream]
        assert stream.get_final_response().output[0].arguments == call.arguments
    turns = [
        {"role": "user", "content": "The quick fox"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "-3 °C"},
    ]
    after = client.responses.create(**{**how, "input": turns, "max_output_tokens": 9, "tool_choice": "none"})
    assert after.output[0].type == "message"
    schema: Any = {"format": {"type": "json_schema", "name": "place", "schema": CITIES, "strict": True}}
    formed = client.responses.create(text=schema, **HOW | {"max_output_tokens": 100})
    assert json.loads(formed.output_text)["city"] in ("Oslo", "北京")


@pytest.mark.parametrize(
    "given, message, param",
    [
        ({"store": True}, "nothing is kept here, so store cannot be served", "store"),
        ({"previous_response_id": "resp_1"}, "nothing is kept here", "previous_response_id"),
        ({"max_output_tokens": 9000}, "context is 8192 tokens", "max_output_tokens"),
        ({"input": [{"type": "reasoning"}]}, "input.0 is of type reasoning", "input.0"),
        ({"input": [{"role": "king", "content": "a"}]}, "input.0.role is user, assistant", "input.0.role"),
        (
            {"input": [{"role": "user", "content": "a", "colour": 1}]},
            "has no field 'colour'",
            "input.0.colour",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": ["c"], "output": "x"}]},
            "input.0 is the output of .*, and no call before it",
            "input.0.call_id",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "x"}]},
            "input.0.arguments is no JSON object",
            "input.0.arguments",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0 is of type web_search: only functions", "tools.0"),
        ({"tool_choice": "required"}, "tool_choice needs tools", "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "is 'xml'", "text.format.type"),
        ({"text": {"format": "x"}}, "text.format is no object", "text.format"),
        ({"text": {"format": {"type": "json_schema"}}}, "schema is missing", "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"type": "foo"}}}},
            "text.format.schema: .*Invalid type: foo",
            "text.format.schema",
        ),
        ({"text": {"colour": "low"}}, "text has no field 'colour'", "text.colour"),
        ({"model": "plain"}, "plain does not chat", None),
    ],
)
def test_what_cannot_be_done_is_refused(
    client: openai.OpenAI, given: dict[str, Any], message: str, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.responses.create(**{**HOW, **given})
    assert error.value.param == param
