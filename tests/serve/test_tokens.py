"""/tokenize and /detokenize."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from langmill.serve.state import State
from langmill.text.chat import chat_ids

CHAT = [{"role": "user", "content": "The quick <|im_end|>"}]


def test_ids_are_the_tokenizers_and_come_back_as_the_text(url: str, state: State) -> None:
    tokenizer = state.models.find("plain", "write").tokenizer
    text = "The quick 春眠 <|im_end|> day"
    told = httpx.post(
        f"{url}/tokenize", json={"model": "plain", "prompt": text, "return_token_strs": True}
    ).json()
    assert told["tokens"] == tokenizer.prompt_ids(text) and told["count"] == len(told["tokens"])
    assert told["max_model_len"] == 512 and len(told["token_strs"]) == told["count"]
    bare = httpx.post(f"{url}/tokenize", json={"content": text, "add_special_tokens": False}).json()["tokens"]
    assert bare == tokenizer.encode(text)
    back = httpx.post(f"{url}/detokenize", json={"model": "plain", "tokens": bare}).json()
    assert back == {"prompt": text, "content": text}


def test_a_chat_is_rendered_with_its_control_tokens_as_text(url: str, state: State) -> None:
    tokenizer = state.models.find("tiny", "chat").tokenizer
    told = httpx.post(f"{url}/tokenize", json={"model": "tiny", "messages": CHAT}).json()
    assert told["tokens"] == chat_ids(tokenizer, CHAT)


def test_tools_and_calls_count_as_a_chat_reads_them(url: str) -> None:
    tool = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "c", "content": "rain"})
    for more in ({}, {"tools": [tool]}):
        asked = {"model": "tiny", "messages": turns, **more}
        counted = httpx.post(f"{url}/tokenize", json=asked).json()["count"]
        read = httpx.post(f"{url}/v1/chat/completions", json={**asked, "max_tokens": 1}).json()["usage"]
        assert counted == read["prompt_tokens"]


@pytest.mark.parametrize(
    "path, body, message",
    [
        ("tokenize", {}, "give one of prompt (a text) and messages (a chat)"),
        ("tokenize", {"prompt": "a", "content": "b"}, "not prompt and content together"),
        ("tokenize", {"model": "plain", "messages": CHAT}, "has no chat template"),
        ("tokenize", {"prompt": "\ud800"}, "half a surrogate pair"),
        ("tokenize", {"\ud800": 1}, "half a surrogate pair"),
        (
            "tokenize",
            {"messages": [{"role": "user", "content": [{"type": "\ud800"}]}]},
            "half a surrogate pair",
        ),
        ("detokenize", {"tokens": [1 << 40]}, "is no token: this model knows 0 to"),
        ("detokenize", {}, "tokens is missing"),
    ],
)
def test_what_cannot_be_read_is_refused(url: str, path: str, body: dict[str, Any], message: str) -> None:
    kind = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/{path}", content=json.dumps(body), headers=kind)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
