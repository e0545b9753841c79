"""A conversation as clients send it, made what the renderer of text/chat.py takes, and then ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from langmill.serve.begun import Ending, ids_until
from langmill.serve.errors import Refused
from langmill.serve.models import Loaded
from langmill.serve.tools import ToolUse, as_template_wants, prepared
from langmill.serve.writing import LONG, aside, in_turn

BETWEEN = "\n"  # parts of one message's text
RESERVED = frozenset(
    {
        "tokenizer",
        "template",
        "messages",
        "add_generation_prompt",
        "continue_final_message",
        "tools",
        "bos_token",
        "eos_token",
        "pad_token",
        "documents",
    }
)


class Message(BaseModel):
    """A turn. content: text, or a list of parts of type "text". What only OpenAI's own answers hold (refusal,
    annotations) is taken back and not read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


def plain(messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
    """The messages with their parts joined; a developer is the system to a template that does not know developers.
    Refused names a part that is no text, and a result of no call."""
    found, called = [], set[Any]()
    for number, message in enumerate(messages):
        role = message.role
        called.update(call.get("id") for call in message.tool_calls or ())
        if role == "tool" and message.tool_call_id not in called:
            raise Refused(
                f"messages.{number} is the result of {str(message.tool_call_id)[:80]!r}, and no tool_calls before it "
                "has this id",
                param=f"messages.{number}.tool_call_id",
            )
        if role == "developer" and "developer" not in template:
            role = "system"
        turn: dict[str, Any] = {"role": role, "content": _content(message, number)}
        for name in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
            if (value := getattr(message, name)) is not None:
                turn[name] = value
        found.append(turn)
    return found


def _content(message: Message, number: int) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant" and message.tool_calls:
            return ""
        raise Refused(f"message {number} has no content", param=f"messages.{number}.content")
    return BETWEEN.join(
        part_text(part, f"messages.{number}.content.{place}") for place, part in enumerate(message.content)
    )


def part_text(part: Mapping[str, Any], param: str) -> str:
    """The text of a part of a message; Refused, with its place, for one of another type."""
    kind, text = part.get("type"), part.get("text")
    if kind in ("text", "input_text", "output_text") and isinstance(text, str):
        return text
    if kind in ("text", "input_text", "output_text"):
        raise Refused(f"{param} has no text", param=param)
    if isinstance(kind, str):
        raise Refused(f"{param} is of type {kind[:40]}: this model reads text", param=param)
    raise Refused(f'{param} has no type: a part is {{"type": "text", "text": "…"}}', param=param)


def prompt_of(
    loaded: Loaded,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    ending: Ending = "answer",
) -> list[int]:
    """The ids of a conversation, up to where the answer begins or goes on; control tokens spelt in it stay text.
    DataError names the message that the template refuses."""
    given = dict(variables or {})
    if taken := sorted(RESERVED.intersection(given)):
        raise Refused(
            f"chat_template_kwargs cannot set {taken[0]}: it follows from the request",
            param="chat_template_kwargs",
        )
    return ids_until(loaded.tokenizer, messages, tools, given, ending)


async def understood(
    loaded: Loaded,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    choice: Any = None,
    parallel: bool = True,
    variables: Mapping[str, Any] | None = None,
    ending: Ending = "answer",
) -> tuple[list[int], ToolUse | None]:
    """The ids of a conversation, in which the model is shown the tools it may call, and how its answer is read for
    calls; None where there are none. Raises as `prompt_of` and `tools.prepared`."""
    use = None
    if tools:
        use = await in_turn(loaded, LONG, lambda: prepared(loaded, tools, choice, parallel))
    if ending == "begun" and use is not None and use.constraint is not None:
        raise Refused(
            "tool_choice forces a call, and the last message is an answer that is begun: leave one of them out",
            param="tool_choice",
        )

    def ids() -> list[int]:
        shown = as_template_wants(loaded, messages, use)
        return prompt_of(loaded, shown, None if use is None else use.tools, variables, ending)

    return await aside(loaded, size_of(messages, tools, variables), ids), use


def size_of(messages: Sequence[Mapping[str, Any]], *beside: Any) -> int:
    """Characters, about, of a conversation and of what its template reads beside it."""
    rest = [value for message in messages for name, value in message.items() if name != "content"]
    return sum(len(str(message.get("content") or "")) for message in messages) + len(str([rest, beside]))
