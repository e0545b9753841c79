"""/v1/messages by Anthropic's own client: the same texts as OpenAI's route, streamed and not; calls, counts, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

CITIES = {"type": "object", "properties": {"city": {"enum": ["Oslo", "北京"]}}, "required": ["city"]}
TOOLS: list[Any] = [{"name": "weather", "description": "Now.", "input_schema": CITIES}]
USER: dict[str, Any] = {"role": "user", "content": "The quick fox"}
GREEDY = {"temperature": 0}  # the client has no name for it any more
HOW: dict[str, Any] = {"model": "long", "max_tokens": 24, "messages": [USER], "extra_body": GREEDY}


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def test_texts_are_those_of_the_other_route(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    answer = claude.messages.create(system=system, metadata={"user_id": "me"}, **HOW)
    wanted = client.chat.completions.create(
        model="long",
        max_tokens=24,
        temperature=0,
        messages=[{"role": "system", "content": "Be brief."}, USER],
    )
    (block,) = answer.content
    assert block.text == wanted.choices[0].message.content and answer.stop_reason == "max_tokens"
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == wanted.usage.prompt_tokens
    assert usage.output_tokens == wanted.usage.completion_tokens == 24
    with claude.messages.stream(system=system, **HOW) as stream:
        assert "".join(stream.text_stream) == block.text
        last = stream.get_final_message()
    assert (
        last.content[0].text == block.text
        and last.stop_reason == "max_tokens"
        and last.usage.output_tokens == 24
    )
    count = claude.messages.count_tokens(model="long", system=system, messages=[USER])
    assert count.input_tokens == wanted.usage.prompt_tokens


def test_the_end_of_the_window_is_named(claude: anthropic.Anthropic) -> None:
    how = {**HOW, "model": "tiny", "max_tokens": 4096, "extra_body": {**GREEDY, "top_k": 1}}
    answer = claude.messages.create(**how)
    assert answer.stop_reason in ("model_context_window_exceeded", "end_turn")
    used = answer.usage.input_tokens + answer.usage.cache_read_input_tokens + answer.usage.output_tokens
    assert (used == 513) == (answer.stop_reason == "model_context_window_exceeded")


def test_the_stop_sequence_is_named(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(**HOW).content[0].text
    stop = next(part for at in range(len(whole)) if whole.index(part := whole[at : at + 3]) > 1)
    answer = claude.messages.create(stop_sequences=["never", stop], **HOW)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].text == whole[: whole.index(stop)]


def test_calls_and_their_results(claude: anthropic.Anthropic) -> None:
    how = {**HOW, "tools": TOOLS, "max_tokens": 200}
    choice: Any = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    answer = claude.messages.create(tool_choice=choice, **how)
    (call,) = answer.content
    assert (
        call.type == "tool_use"
        and call.input["city"] in ("Oslo", "北京")
        and answer.stop_reason == "tool_use"
    )
    with claude.messages.stream(tool_choice=choice, **how) as stream:
        kinds = [event.type for event in stream]
        last = stream.get_final_message()
    assert last.content[0].input == call.input and last.stop_reason == "tool_use"
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and "input_json" in kinds
    turns = [
        USER,
        {"role": "assistant", "content": [call.model_dump(exclude_none=True)]},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": call.id,
                    "content": [{"type": "text", "text": "-3 °C"}],
                },
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    after = claude.messages.create(
        **{**how, "messages": turns, "max_tokens": 9, "tool_choice": {"type": "none"}}
    )
    read = after.usage.input_tokens + (after.usage.cache_read_input_tokens or 0)
    assert after.content[0].type == "text" and read > answer.usage.output_tokens


NO_CALL: dict[str, Any] = {
    "role": "user",
    "content": [{"type": "tool_result", "tool_use_id": ["t1"], "content": "x"}],
}


def said(*blocks: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [USER, {"role": role, "content": list(blocks)}]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": [USER] * 2000}, "context is 8192 tokens and the prompt has"),
    ({"extra_body": {"temperature": 2}}, "temperature should be less than or equal to 1"),
    ({"extra_body": {"top_kk": 1}}, "there is no field 'top_kk' here: did you mean 'top_k'"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "of type image"),
    ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
    ({"tool_choice": {"type": "any"}, "tools": []}, "tool_choice needs tools"),
    ({"tool_choice": {"type": "auto", "foo": 1}, "tools": TOOLS}, "tool_choice has no field 'foo'"),
    (said(), "messages.1.content is empty"),
    (said({"type": "text", "text": "a", "colour": 1}), "messages.1.content.0 has no field 'colour'"),
    ({"messages": [USER, NO_CALL]}, "messages.1.content.0 is the result of .*, and no tool_use before it"),
    (said({"type": "tool_use", "id": "t"}, role="assistant"), "messages.1.content.0.name is missing"),
    (
        said({"type": "tool_use", "id": "t", "name": "weather", "input": {}}, role="assistant"),
        "the last message holds calls of functions",
    ),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0 is of type bash_20250124"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking is not supported"),
]


@pytest.mark.parametrize("given, message", REFUSED, ids=[str(row[0])[:30] for row in REFUSED])
def test_what_cannot_be_done_is_refused_in_anthropics_form(
    claude: anthropic.Anthropic, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=message) as error:
        claude.messages.create(**{**HOW, **given})
    body: Any = error.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error" and body["request_id"]


def test_an_unknown_model_is_not_found(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'claude' here"):
        claude.messages.create(**HOW | {"model": "claude"})
