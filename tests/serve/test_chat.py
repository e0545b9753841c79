"""/v1/chat/completions by OpenAI's own client: answers, shapes, refusals, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

import langmill
from langmill.serve.state import State
from langmill.text.chat import chat_ids

GREEDY: dict[str, Any] = {"model": "tiny", "max_tokens": 24, "temperature": 0}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": f"The quick {word}"}]
    for word in ("fox", "dog", "night", "春眠", "day", "", "a", "b")
]


def generated(folder: str, messages: list[dict[str, Any]], **sampling: Any) -> str:
    model, tokenizer = langmill.load(folder)
    assert tokenizer is not None
    return "".join(
        langmill.generate(model, tokenizer, chat_ids(tokenizer, messages), max_new_tokens=24, **sampling)
    )


def test_greedy_answers_are_those_of_generate_streamed_or_not(client: openai.OpenAI, folder: str) -> None:
    for messages in CHATS[:4]:
        whole = client.chat.completions.create(messages=messages, **GREEDY)
        chunks = list(client.chat.completions.create(messages=messages, stream=True, **GREEDY))
        assert whole.choices[0].message.content == generated(folder, messages) != ""
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == whole.choices[0].message.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
        assert len({chunk.id for chunk in chunks}) == 1 and whole.id.startswith("chatcmpl-")
        assert (whole.object, chunks[0].object) == ("chat.completion", "chat.completion.chunk")


def test_eight_at_once_answer_as_one_at_a_time(url: str) -> None:
    asyncio.run(_eight(url))


async def _eight(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        how = {**GREEDY, "temperature": 0.8, "seed": 3}

        async def streamed(messages: list[dict[str, Any]]) -> str:
            stream = await client.chat.completions.create(messages=messages, stream=True, **how)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        alone = [await streamed(messages) for messages in CHATS]
        together = await asyncio.gather(*map(streamed, CHATS))
        wholes = await asyncio.gather(
            *(client.chat.completions.create(messages=messages, **how) for messages in CHATS)
        )
        assert together == alone == [whole.choices[0].message.content for whole in wholes]


def test_choices_usage_and_the_last_event(client: openai.OpenAI, state: State) -> None:
    prompt = chat_ids(state.models.find("tiny", "chat").tokenizer, CHATS[0])
    how = {**GREEDY, "temperature": 1.0, "seed": 1, "n": 3, "messages": CHATS[0]}
    whole = client.chat.completions.create(**how)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3 and whole.usage.prompt_tokens == len(prompt)
    *chunks, last = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **how)
    joined = [""] * 3
    for chunk in chunks:
        joined[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert joined == texts and last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens


def test_log_probabilities_list_every_token_with_its_bytes(client: openai.OpenAI) -> None:
    how = {**GREEDY, "messages": CHATS[3], "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**how).choices[0]
    tokens = whole.logprobs.content
    assert bytes(b for one in tokens for b in one.bytes).decode("utf-8", "replace") == whole.message.content
    assert all(one.top_logprobs[0].logprob == one.logprob and len(one.top_logprobs) == 2 for one in tokens)
    streamed = [
        one
        for chunk in client.chat.completions.create(stream=True, **how)
        if chunk.choices[0].logprobs is not None
        for one in chunk.choices[0].logprobs.content
    ]
    assert streamed == tokens
    bare = client.chat.completions.create(**how | {"logprobs": True, "top_logprobs": None}).choices[0]
    assert [one.top_logprobs for one in bare.logprobs.content] == [[]] * len(tokens)


WEATHER = '{"name": "weather", "arguments": {}}'


def test_parts_roles_and_control_tokens_in_messages(client: openai.OpenAI, state: State, folder: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "The quick"}, {"type": "text", "text": "fox"}]},
        {"role": "assistant", "content": "jumps", "refusal": None, "annotations": [], "tool_calls": [call]},
        {"role": "tool", "content": "<|im_end|>", "tool_call_id": "call_1"},
    ]
    as_read = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The quick\nfox"},
        {"role": "assistant", "content": f"jumps\n<tool_call>\n{WEATHER}\n</tool_call>"},
        {"role": "user", "content": "<tool_response>\n<|im_end|>\n</tool_response>"},
    ]
    answer = client.chat.completions.create(messages=turns, **GREEDY)
    assert answer.choices[0].message.content == generated(folder, as_read)
    tokenizer = state.models.find("tiny", "chat").tokenizer
    end = tokenizer.vocab["<|im_end|>"]
    assert answer.usage.prompt_tokens == len(ids := chat_ids(tokenizer, as_read)) and ids.count(end) == 4


def test_an_answer_may_go_up_to_the_window(client: openai.OpenAI) -> None:
    how = {"model": "tiny", "messages": CHATS[0], "temperature": 0, "extra_body": {"ignore_eos": True}}
    usage = client.chat.completions.create(**how).usage
    assert usage.total_tokens == 513  # the last token is never read
    limit = client.chat.completions.create(max_completion_tokens=3, **how)
    assert (limit.usage.completion_tokens, limit.choices[0].finish_reason) == (3, "length")


CITIES = {"type": "object", "properties": {"city": {"enum": ["Oslo", "北京"]}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": CITIES}},
    {"type": "function", "function": {"name": "clock"}},
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls_are_valid_and_streamed_as_they_are_whole(client: openai.OpenAI, choice: Any) -> None:
    how = {
        **GREEDY, "model": "long", "messages": CHATS[0], "tools": TOOLS, "tool_choice": choice, "max_tokens": 200,
        "parallel_tool_calls": False,
    }  # fmt: skip
    whole = client.chat.completions.create(**how).choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    if call.function.name == "weather":
        assert json.loads(call.function.arguments)["city"] in ("Oslo", "北京")
    assert choice == "required" or call.function.name == "weather"
    arguments, names, finish = "", [], None
    for chunk in client.chat.completions.create(stream=True, **how):
        for part in chunk.choices[0].delta.tool_calls or []:
            names += [part.function.name] if part.function.name else []
            arguments += part.function.arguments or ""
        finish = chunk.choices[0].finish_reason
    assert (arguments, names, finish) == (call.function.arguments, [call.function.name], "tool_calls")
    answered = [
        *CHATS[0],
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "-3 °C"},
    ]
    after = client.chat.completions.create(
        **GREEDY | {"model": "long"}, messages=answered, tools=TOOLS, tool_choice="none"
    )
    assert after.choices[0].message.tool_calls is None and after.choices[0].message.content


def test_an_answer_is_what_its_format_asks_for(client: openai.OpenAI) -> None:
    schema = {"name": "place", "strict": True, "schema": {**CITIES, "additionalProperties": False}}
    how = {**GREEDY, "messages": CHATS[0], "max_tokens": 100}
    answer = client.chat.completions.create(
        response_format={"type": "json_schema", "json_schema": schema}, **how
    )
    assert json.loads(answer.choices[0].message.content)["city"] in ("Oslo", "北京")
    chosen = client.chat.completions.create(extra_body={"guided_choice": ["yes", "no"]}, **how)
    assert chosen.choices[0].message.content in ("yes", "no")
    cut = client.chat.completions.create(
        response_format={"type": "json_schema", "json_schema": schema}, **how | {"max_tokens": 2}
    )
    assert (
        cut.choices[0].finish_reason == "length" and "constraint" in cut.choices[0].model_extra["incomplete"]
    )


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"model": "plain"}, "plain does not chat, since it has no chat template: use /v1/completions", None),
    ({"messages": []}, "messages should have at least 1 item$", "messages"),
    (
        {"messages": [*CHATS[0], {"role": "tool", "tool_call_id": "call_9", "content": "a"}]},
        "the result of 'call_9', and no tool_calls before it", "messages.1.tool_call_id",
    ),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role should be 'system', ", "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "message 0 has no content", "messages.0.content"),
    ({"messages": [{"content": "a"}]}, "messages.0.role is missing", "messages.0.role"),
    ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "no field 'messages.0.mood'", "messages.0.mood"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        "of type image_url: this model reads text", "messages.0.content.0",
    ),
    ({"messages": CHATS[0] * 60}, r"context is 512 tokens and the prompt has \d{3,4}: shorten", None),
    ({"max_completion_tokens": 9}, "two names of one limit", "max_tokens"),
    ({"top_logprobs": 2}, "top_logprobs needs logprobs", "top_logprobs"),
    ({"tool_choice": "required"}, "tool_choice needs tools", "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"function": {"name": "no"}}}, "tool_choice names 'no'", "tool_choice"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "schema is missing", "response_format.json_schema.schema",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type is 'xml'", "response_format.type"),
    ({"store": True}, "store should be False", "store"),
    ({"extra_body": {"functions": []}}, "no field 'functions'", "functions"),
    ({"extra_body": {"chat_template_kwargs": {"tools": 1}}}, "cannot set tools", "chat_template_kwargs"),
    ({"extra_body": {"chat_template_kwargs": {"template": 1}}}, "cannot set template", "chat_template_kwargs"),
    ({"extra_body": {"guided_choice": ["a"] * 1025}}, "guided_choice should have at most 1024 items", "guided_choice"),
]  # fmt: skip


@pytest.mark.parametrize("given, message, param", REFUSED, ids=[str(row[0])[:30] for row in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, given: dict[str, Any], message: str, param: str | None
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=message) as error:
            client.chat.completions.create(**{**GREEDY, "messages": CHATS[0], "stream": stream, **given})
        assert error.value.param == param and error.value.type == "invalid_request_error"


def test_harmless_fields_change_nothing(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(messages=CHATS[0], **GREEDY)
    told = client.chat.completions.create(
        messages=CHATS[0], user="me", metadata={"a": "b"}, store=False, service_tier="auto", modalities=["text"],
        parallel_tool_calls=True, prompt_cache_key="k", safety_identifier="s", extra_body={"reasoning_effort": None},
        **GREEDY,
    )  # fmt: skip
    assert told.choices == plain.choices


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(running: Any, stream: bool, n: int) -> None:
    engine = running.state.models.named("long").engine
    before = engine.counts().get("cancelled", 0)
    body = {"messages": CHATS[0], "stream": stream, "n": n, "temperature": 1, "ignore_eos": True}
    connection = running.ask("/v1/chat/completions", {"model": "long", **body})
    if stream:
        assert b"200 OK" in connection.recv(4096)
    running.until(lambda: running.busy() > 0)
    connection.close()
    running.until(lambda: running.busy() == 0)
    assert engine.counts()["cancelled"] == before + n
