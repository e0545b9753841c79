"""Answers that the client has begun: the ids that transformers makes, over both forms, and what cannot go on."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.text.test_chat import SPECIALS, TEMPLATES, TOOLS, oracle, tokenizer

import langmill
from langmill.serve.begun import ids_until
from langmill.serve.errors import Refused

USER: dict[str, Any] = {"role": "user", "content": "The quick"}
BEGUN: dict[str, Any] = {"role": "assistant", "content": "Over the lazy"}
GO_ON: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
GREEDY: dict[str, Any] = {"model": "tiny", "max_tokens": 24}
CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ["Sure, the", "春眠 {", "<|im_", "שלום"])
def test_ids_equal_those_of_transformers(name: str, content: str) -> None:
    ours, chat = tokenizer(TEMPLATES[name]), [USER, {**BEGUN, "content": content}]
    theirs = oracle(ours).apply_chat_template
    for tools in (None, TOOLS):
        wanted = theirs(chat, tools=tools, continue_final_message=True, return_dict=False)
        assert ids_until(ours, chat, tools, {}, "begun") == wanted
    closed = theirs(chat, add_generation_prompt=False, return_dict=False)
    assert ids_until(ours, chat, None, {}, "closed") == closed


@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    content=st.lists(st.sampled_from([*SPECIALS, " ", "\n", "a", "🙂", "\U000f0000"]), max_size=4).map(
        "".join
    ),
)
def test_it_goes_on_behind_the_last_letter_and_control_tokens_stay_text(name: str, content: str) -> None:
    ours, chat = tokenizer(TEMPLATES[name]), [USER, {**BEGUN, "content": f"x{content}"}]
    ids = ids_until(ours, chat, None, {}, "begun")
    assert ours.decode(ids, skip_specials=False).endswith(f"x{content}")
    plain = ids_until(ours, [USER, {**BEGUN, "content": "x"}], None, {}, "begun")
    assert [id for id in ids if id in ours.special_ids] == [id for id in plain if id in ours.special_ids]


def test_an_answer_goes_on_by_both_clients(client: openai.OpenAI, url: str, folder: str) -> None:
    model, ours = langmill.load(folder)
    assert ours is not None
    ids = ids_until(ours, [USER, BEGUN], None, {}, "begun")
    wanted = "".join(langmill.generate(model, ours, ids, max_new_tokens=24))
    turns: Any = [USER, BEGUN]
    told = client.chat.completions.create(messages=turns, temperature=0, extra_body=GO_ON, **GREEDY)
    assert told.choices[0].message.content == wanted != "" and told.usage.prompt_tokens == len(ids)
    parts = client.chat.completions.create(
        messages=turns, temperature=0, extra_body=GO_ON, stream=True, **GREEDY
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts) == wanted
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as claude:
        blocks: Any = [USER, {**BEGUN, "content": [{"type": "text", "text": BEGUN["content"]}]}]
        answer = claude.messages.create(messages=blocks, extra_body={"temperature": 0}, **GREEDY)
        assert answer.content[0].text == wanted  # type: ignore[union-attr]
        with claude.messages.stream(messages=turns, extra_body={"temperature": 0}, **GREEDY) as stream:
            assert stream.get_final_text() == wanted
        assert claude.messages.count_tokens(model="tiny", messages=turns).input_tokens == len(ids)
    body = {"model": "tiny", "messages": turns}
    assert httpx.post(f"{url}/tokenize", json={**body, **GO_ON}).json()["tokens"] == ids
    closed = httpx.post(f"{url}/tokenize", json={**body, "add_generation_prompt": False}).json()["tokens"]
    assert (
        closed[: len(ids)] == ids and ours.decode(closed[len(ids) :], skip_specials=False) == "<|im_end|>\n"
    )
    bare = client.chat.completions.create(
        messages=turns, extra_body={"add_generation_prompt": False}, **GREEDY
    )
    assert bare.usage.prompt_tokens == len(closed)


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {**GO_ON, "add_generation_prompt": True},
            "add_generation_prompt begins a new one: give one of them",
        ),
        (
            {**GO_ON, "messages": [USER, {**BEGUN, "tool_calls": [CALL]}]},
            "the last message holds calls of functions",
        ),
        (
            {**GO_ON, "tools": [TOOL], "tool_choice": "required"},
            "an answer that is begun: leave one of them out",
        ),
        ({"chat_template_kwargs": GO_ON}, "chat_template_kwargs cannot set add_generation_prompt"),
    ],
)
def test_what_cannot_go_on_is_refused(client: openai.OpenAI, given: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(
            messages=[USER, BEGUN],  # type: ignore[list-item]
            extra_body=given, **GREEDY,
        )  # fmt: skip


def test_a_template_that_hides_the_text_is_named() -> None:
    ours = tokenizer("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(Refused, match="does not write the last message's text as it stands"):
        ids_until(ours, [USER, BEGUN], None, {}, "begun")
