"""Where the ids of a conversation end: before a new answer, or inside of its last message, which then goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from langmill.serve.errors import Refused
from langmill.text.chat import chat_ids, rendered
from langmill.text.tokenizer import Tokenizer

Ending = Literal["answer", "closed", "begun"]  # a new answer begins; nothing does; the last message goes on


def ending_of(
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
) -> Ending:
    """vLLM's two fields in one. Refused where they contradict each other, or the last message cannot go on."""
    if continue_final_message and add_generation_prompt:
        raise Refused(
            "continue_final_message goes on from the last message, and add_generation_prompt begins a new one: "
            "give one of them",
            param="continue_final_message",
        )
    if continue_final_message and messages[-1].get("tool_calls"):
        raise Refused("the last message holds calls of functions: only a text can go on", param="messages")
    if continue_final_message:
        return "begun"
    return "closed" if add_generation_prompt is False else "answer"


def ids_until(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
    ending: Ending,
) -> list[int]:
    """The ids of a conversation. Raises as `chat_ids`."""
    if ending == "begun":
        return _begun(tokenizer, messages, tools, variables)
    return chat_ids(tokenizer, messages, ending == "answer", tools, **variables)


def _begun(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> list[int]:
    """The ids up to the end of the last message's text, white space and all: a mark behind it, which is nowhere else,
    shows where the template goes on by itself."""
    *before, last = messages
    mark = _unused([tokenizer.chat_template, messages, tools, variables])
    marked = [*before, {**last, "content": f"{last['content']}{mark}"}]
    made = rendered(tokenizer, marked, False, tools, variables)
    end = made.text.rfind(mark)
    if end < 0:
        raise Refused(
            "the model's chat template does not write the last message's text as it stands, so nothing can go on there",
            param="messages",
        )
    return replace(made, text=made.text[:end]).encode(tokenizer)[0]


def _unused(texts: Any) -> str:
    """A character of private use that is in none of the texts."""
    everything = json.dumps(texts, ensure_ascii=False, default=str)
    free = next((letter for letter in map(chr, range(0xF0000, 0xFFFFE)) if letter not in everything), None)
    if free is None:
        raise Refused("the messages hold every character of private use, so that the end cannot be marked")
    return free
