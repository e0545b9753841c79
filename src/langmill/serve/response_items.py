"""What /v1/responses is given, made what chats are given: items to messages, flat tools and formats to nested ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langmill.serve.errors import Refused
from langmill.serve.formats import RESPONSES, only
from langmill.serve.turns import BETWEEN, part_text

ROLES = ("user", "assistant", "system", "developer")
# What an item may hold; id, status and phase are of OpenAI's own answers.
FIELDS = {
    "message": {"type", "role", "content", "id", "status", "phase"},
    "function_call": {"type", "call_id", "name", "arguments", "id", "status"},
    "function_call_output": {"type", "call_id", "output", "id", "status"},
}


def messages_of(given: str | Sequence[Mapping[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """The messages of a text or of items; the instructions first. Refused names an item that is none, and an output of
    no call."""
    found: list[dict[str, Any]] = (
        [] if instructions is None else [{"role": "system", "content": instructions}]
    )
    if isinstance(given, str):
        return [*found, {"role": "user", "content": given}]
    called: list[str] = []
    for number, item in enumerate(given):
        where, kind = f"input.{number}", item.get("type", "message")
        if not isinstance(kind, str) or kind not in FIELDS:
            raise Refused(f"{where} is of type {str(kind)[:40]}, which has no place here", param=where)
        _known(item, FIELDS[kind], where)
        if kind == "message":
            found.append(_message(item, where))
        elif kind == "function_call":
            call = _call(item, where)
            called.append(call["id"])
            if found and found[-1]["role"] == "assistant":
                found[-1].setdefault("tool_calls", []).append(call)
            else:
                found.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            if item.get("call_id") not in called:
                raise Refused(
                    f"{where} is the output of {str(item.get('call_id'))[:80]!r}, and no call before it has this id",
                    param=f"{where}.call_id",
                )
            content = _content(item.get("output"), f"{where}.output")
            found.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
    return found


def _known(item: Mapping[str, Any], fields: set[str], where: str) -> None:
    """Refuse a field that would not be read. None says nothing, and clients send it."""
    if more := sorted({name for name in item if item[name] is not None} - fields):
        raise Refused(
            f"{where} has no field '{more[0][:80]}'", 400, "unknown_field", f"{where}.{more[0][:80]}"
        )


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in ("call_id", "name", "arguments"):
        if not isinstance(item.get(name), str):
            raise Refused(
                f"{where}.{name} is {'no text' if name in item else 'missing'}", param=f"{where}.{name}"
            )
    try:
        read = json.loads(item["arguments"] or "{}")
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise Refused(f"{where}.arguments is no JSON object", param=f"{where}.arguments")
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    if item.get("role") not in ROLES:
        raise Refused(f"{where}.role is {', '.join(ROLES[:-1])} or {ROLES[-1]}", param=f"{where}.role")
    role = "system" if item["role"] == "developer" else item["role"]
    return {"role": role, "content": _content(item.get("content"), f"{where}.content")}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise Refused(f"{where} is no text and no list of parts", param=where)
    return BETWEEN.join(part_text(part, f"{where}.{place}") for place, part in enumerate(content))


def tools_of(tools: Sequence[Mapping[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], Any]:
    """Tools and the choice among them, as chats have them."""
    found = []
    for number, tool in enumerate(tools):
        where = f"tools.{number}"
        if tool.get("type") != "function":
            raise Refused(
                f"{where} is of type {str(tool.get('type'))[:40]}: only functions are called", param=where
            )
        found.append(
            {"type": "function", "function": {name: v for name, v in tool.items() if name != "type"}}
        )
    if not tools and choice not in (None, "none", "auto"):
        raise Refused("tool_choice needs tools to choose from", param="tool_choice")
    if isinstance(choice, Mapping):
        return found, {"type": "function", "function": {"name": choice.get("name")}}
    return found, choice


def format_of(text: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """`text.format`; Refused where it is none, or `text` has another field."""
    only(text or {}, {"format"}, "text")
    given = (text or {}).get("format")
    if given is not None and not isinstance(given, Mapping):
        raise Refused(f"{RESPONSES} is no object", param=RESPONSES)
    return given
