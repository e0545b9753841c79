"""What /v1/messages is given, made what chats are given: blocks to messages, Anthropic's tools to OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from langmill.serve.errors import Refused

Blocks = list[dict[str, Any]]
WORDS = {str: "text", dict: "object"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# What a block may hold. citations and caller are of Anthropic's own answers; is_error says what the content says too.
FIELDS = {
    "text": {"type", "text", "cache_control", "citations"},
    "tool_use": {"type", "id", "name", "input", "cache_control", "caller"},
    "tool_result": {"type", "tool_use_id", "content", "is_error", "cache_control"},
}


class Turn(BaseModel):
    """A user's or the assistant's turn: text, or blocks of type text, tool_use and tool_result."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["user", "assistant"]
    content: str | Blocks


def turns_of(messages: Sequence[Turn], system: str | Blocks | None) -> list[dict[str, Any]]:
    """The conversation as OpenAI's form has it: the system's turn first, results of tools as turns of their own.
    Refused names a block that is none, and a result of no call."""
    found: list[dict[str, Any]] = []
    called: list[str] = []
    if system:
        found.append({"role": "system", "content": _text(system, "system")})
    for number, turn in enumerate(messages):
        where = f"messages.{number}.content"
        if isinstance(turn.content, str):
            found.append({"role": turn.role, "content": turn.content})
        elif not turn.content:
            raise Refused(f"{where} is empty: give it a block", param=where)
        elif turn.role == "user":
            found += _users(turn.content, where, called)
        else:
            found.append(_assistants(turn.content, where))
            called.extend(call["id"] for call in found[-1].get("tool_calls", ()))
    return found


def _users(blocks: Blocks, where: str, called: list[str]) -> list[dict[str, Any]]:
    results, texts = [], []
    for place, block in enumerate(blocks):
        if block.get("type") != "tool_result":
            texts.append(_part(block, f"{where}.{place}"))
            continue
        _known(block, f"{where}.{place}")
        if (number := block.get("tool_use_id")) not in called:
            raise Refused(
                f"{where}.{place} is the result of {str(number)[:80]!r}, and no tool_use before it has this id",
                param=f"{where}.{place}.tool_use_id",
            )
        content = block.get("content")
        text = "" if content is None else _text(content, f"{where}.{place}.content")
        results.append({"role": "tool", "tool_call_id": number, "content": text})
    return [*results, *([{"role": "user", "content": "\n".join(texts)}] if texts else [])]


def _assistants(blocks: Blocks, where: str) -> dict[str, Any]:
    calls, texts = [], []
    for place, block in enumerate(blocks):
        if block.get("type") == "tool_use":
            calls.append(_call(block, f"{where}.{place}"))
        else:
            texts.append(_part(block, f"{where}.{place}"))
    return {"role": "assistant", "content": "\n".join(texts), **({"tool_calls": calls} if calls else {})}


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    _known(block, where)
    for name, kind in (("id", str), ("name", str), ("input", dict)):
        if not isinstance(block.get(name), kind):
            raise Refused(
                f"{where}.{name} is {'missing' if name not in block else f'no {WORDS[kind]}'}",
                param=f"{where}.{name}",
            )
    function = {"name": block["name"], "arguments": block["input"]}
    return {"id": block["id"], "type": "function", "function": function}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(f"{where} is no text and no list of blocks", param=where)
    return "\n".join(_part(block, f"{where}.{place}") for place, block in enumerate(content))


def _part(block: Any, where: str) -> str:
    text = block.get("text") if isinstance(block, Mapping) else None
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text" and isinstance(text, str):
        _known(block, where)
        return text
    if isinstance(kind, str) and kind != "text":
        raise Refused(
            f"{where} is of type {kind[:40]}, which has no place here: this model reads text", param=where
        )
    raise Refused(f'{where} is no block such as {{"type": "text", "text": "…"}}', param=where)


def _known(block: Mapping[str, Any], where: str) -> None:
    """Refuse a field that would not be read. None says nothing, and clients send it."""
    if more := sorted({name for name in block if block[name] is not None} - FIELDS[block["type"]]):
        raise Refused(
            f"{where} has no field '{more[0][:80]}'", 400, "unknown_field", f"{where}.{more[0][:80]}"
        )


def tools_of(
    tools: Sequence[Mapping[str, Any]] | None, choice: Mapping[str, Any] | None
) -> tuple[list[dict[str, Any]], Any, bool]:
    """Tools, the choice among them, and whether an answer may hold several calls, as chats have them."""
    choice = choice or {"type": "auto"}
    kind = choice.get("type")
    if kind not in (*CHOICES, "tool"):
        raise Refused("tool_choice.type is auto, any, tool or none", param="tool_choice.type")
    if more := sorted(set(choice) - {"type", "name", "disable_parallel_tool_use"}):
        raise Refused(f"tool_choice has no field '{more[0][:80]}'", 400, "unknown_field", "tool_choice")
    if not tools and kind in ("any", "tool"):
        raise Refused("tool_choice needs tools to choose from", param="tool_choice")
    named = {"type": "function", "function": {"name": choice.get("name")}}
    found = [_tool(tool, number) for number, tool in enumerate(tools or ())]
    return found, CHOICES.get(str(kind), named), not choice.get("disable_parallel_tool_use")


def _tool(tool: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    where = f"tools.{number}"
    if tool.get("type") not in (None, "custom"):
        raise Refused(f"{where} is of type {str(tool['type'])[:40]}: only custom ones", param=where)
    known = {"type", "name", "description", "input_schema", "cache_control", "strict"}
    if more := sorted(set(tool) - known):
        raise Refused(f"{where} has no field '{more[0][:80]}'", 400, "unknown_field", where)
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    return {"type": "function", "function": {**function, "description": tool.get("description")}}
