"""Functions that a model may call: shown by its chat template, forced where that is asked for, read from its text.

What a model writes a call as is found by letting its template render one. A template that shows no tools gets them in
the system's turn, and results as a user's, in Hermes' form (https://github.com/NousResearch/Hermes-Function-Calling).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from langmill.common.errors import DataError, ModelError
from langmill.infer.constrain import BLANKS
from langmill.infer.request import Constraint
from langmill.serve.errors import Refused
from langmill.serve.models import Loaded
from langmill.serve.tool_reader import OPENINGS, Reader
from langmill.text.chat import render
from langmill.text.tokenizer import Tokenizer

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MOST = 128  # tools of a request
PROBE, KEY = "probe_function", "probe_key"
HERMES = "<tool_call>"
SHOWN = (
    "You may call functions. Their signatures, as JSON:\n{tools}\nFor each call write a JSON object with the "
    "function's name and arguments:\n"
    '<tool_call>\n{{"name": "NAME", "arguments": {{}}}}\n</tool_call>'
)


@dataclass(frozen=True)
class Form:
    """How a model's template writes calls: the opening, the key of the arguments, whether it takes them as an object,
    and whether it shows tools and calls at all."""

    opening: str = HERMES
    key: str = "arguments"
    as_object: bool = True
    shows_tools: bool = False
    shows_calls: bool = False


@dataclass(frozen=True)
class ToolUse:
    """How the tools of a request are shown, forced and read. tools: for the template, None where `told` shows them."""

    tools: Sequence[Mapping[str, Any]] | None
    constraint: Callable[[], Constraint] | None
    names: frozenset[str]
    most: int | None
    marks: Mapping[int, str]
    text: str | None = None

    def reader(self) -> Reader:
        """A new one for each answer."""
        return Reader(self.names, self.most, self.marks)

    def told(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages, with the tools in the system's turn where the template would not show them."""
        if self.text is None:
            return list(messages)
        if messages and messages[0].get("role") == "system":
            first = {**messages[0], "content": f"{messages[0].get('content') or ''}\n\n{self.text}"}
            return [first, *messages[1:]]
        return [{"role": "system", "content": self.text}, *messages]


def prepared(
    loaded: Loaded, tools: Sequence[Mapping[str, Any]] | None, choice: Any, parallel: bool
) -> ToolUse | None:
    """The tools of a request, understood; None where there are none or none may be called (`tool_choice` "none").

    choice: "auto" or None, "none", "required", or {"type": "function", "function": {"name"}}: the last two force a
    call, valid by its parameters' schema. parallel: whether an answer may hold several calls. Refused says what is
    wrong.
    """
    if not tools or choice == "none":
        return None
    known = [_checked(tool, place) for place, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in known]
    if twice := [name for name in names if names.count(name) > 1]:
        raise Refused(f"two tools are called {twice[0]}", param="tools")
    if len(known) > MOST:
        raise Refused(f"there are {len(known)} tools: {MOST} at most", param="tools")
    form = form_of(loaded.tokenizer.chat_template or "")
    forced = _forced(known, choice)
    constraint = (
        None if forced is None else partial(loaded.grammars().grammar, grammar_of(form, forced, parallel))
    )
    if constraint is not None:
        constraint()  # what is wrong with a schema shows before anything is written
    text = None if form.shows_tools else SHOWN.format(tools="\n".join(map(_json, known)))
    marks = marks_of(loaded.tokenizer)
    return ToolUse(
        known if form.shows_tools else None,
        constraint,
        frozenset(names),
        None if parallel else 1,
        marks,
        text,
    )


def _checked(tool: Mapping[str, Any], place: int) -> dict[str, Any]:
    where = f"tools.{place}"
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise Refused(
            f'{where} is not {{"type": "function", "function": {{…}}}}: others are not run here', param=where
        )
    name = function.get("name")
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise Refused(
            f"{where}.function.name has letters, digits, _ . and -, 64 at most",
            param=f"{where}.function.name",
        )
    if more := sorted(set(function) - {"name", "description", "parameters", "strict"}):
        raise Refused(
            f"{where}.function has no field '{more[0][:80]}'", 400, "unknown_field", f"{where}.function"
        )
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise Refused(f"{where}.function.parameters is no schema", param=f"{where}.function.parameters")
    described = {"description": function["description"]} if function.get("description") else {}
    return {"type": "function", "function": {"name": name, **described, "parameters": dict(parameters)}}


def _forced(tools: Sequence[Mapping[str, Any]], choice: Any) -> list[Mapping[str, Any]] | None:
    """The tools of which one must be called; None where none must."""
    if choice in (None, "auto"):
        return None
    if choice == "required":
        return list(tools)
    named = choice.get("function", {}).get("name") if isinstance(choice, Mapping) else None
    if named is None:
        raise Refused(
            'tool_choice is "none", "auto", "required" or {"type": "function", "function": {"name": …}}',
            param="tool_choice",
        )
    chosen = [tool for tool in tools if tool["function"]["name"] == named]
    if not chosen:
        raise Refused(
            f"tool_choice names {str(named)[:80]!r}, which is not among the tools", param="tool_choice"
        )
    return chosen


def grammar_of(form: Form, tools: Sequence[Mapping[str, Any]], parallel: bool) -> str:
    """Lark's notation of one call of these tools, or several, in the model's form; a bare one for forms whose opening
    is a control token."""
    schema = {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    form.key: closed(tool["function"]["parameters"]),
                },
                "required": ["name", form.key],
                "additionalProperties": False,
            }
            for tool in tools
        ],
        "x-guidance": {"whitespace_pattern": BLANKS},
    }
    call = f"call: %json {json.dumps(schema)}"
    if form.opening != HERMES:
        return f"start: call\n{call}"
    more = ' ("\\n" one)*' if parallel else ""
    return f'start: one{more}\none: "<tool_call>\\n" call "\\n</tool_call>"\n{call}'


def closed(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function's parameters without those that it does not name, where the schema says nothing of them: a small model
    makes some up, and the function would fail on them."""
    open_ = set(parameters) - {
        "type",
        "properties",
        "required",
        "description",
        "title",
        "$defs",
        "definitions",
    }
    return (
        parameters
        if open_ or "properties" not in parameters
        else {**parameters, "additionalProperties": False}
    )


def marks_of(tokenizer: Tokenizer) -> dict[int, str]:
    """The openings that are control tokens, whose text an answer does not hold."""
    found = ((tokenizer.vocab.get(opening), opening) for opening in OPENINGS)
    return {id: opening for id, opening in found if id is not None and id in tokenizer.special_ids}


def as_template_wants(
    loaded: Loaded, messages: Sequence[Mapping[str, Any]], use: ToolUse | None = None
) -> list[dict[str, Any]]:
    """Messages whose calls and results the model's template can show: arguments as an object or a text, and as turns of
    text where it knows no calls. Refused where a call is malformed."""
    form = form_of(loaded.tokenizer.chat_template or "")
    shown = [_shown(message, place, form) for place, message in enumerate(messages)]
    return [dict(message) for message in (shown if use is None else use.told(shown))]


def _shown(message: Mapping[str, Any], place: int, form: Form) -> Mapping[str, Any]:
    calls = [
        _call(call, f"messages.{place}.tool_calls.{n}")
        for n, call in enumerate(message.get("tool_calls") or ())
    ]
    if not form.shows_calls and message.get("role") == "tool":
        return {
            "role": "user",
            "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>",
        }
    if not calls:
        return message
    if form.shows_calls:
        given = [
            {
                **call,
                "function": {"name": name, "arguments": arguments if form.as_object else _json(arguments)},
            }
            for call, name, arguments in calls
        ]
        return {**message, "tool_calls": given}
    written = [
        f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>"
        for _, name, arguments in calls
    ]
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {
        **kept,
        "content": "\n".join([*([message["content"]] if message.get("content") else []), *written]),
    }


def _call(call: Any, where: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Refused(f"{where} has no function.name", param=where)
    arguments = function.get("arguments") or "{}"
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, Mapping):
        raise Refused(f"{where}.function.arguments is no JSON object", param=f"{where}.function.arguments")
    return dict(call), function["name"], dict(read)


@cache
def form_of(template: str) -> Form:
    """How a chat template writes calls, from a rendering of one."""
    tool = {
        "type": "function",
        "function": {"name": PROBE, "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
    user = {"role": "user", "content": "u"}
    shows_tools = PROBE in _rendered(template, [user], [tool])
    for as_object in (True, False):
        arguments: Any = {KEY: "v"} if as_object else json.dumps({KEY: "v"})
        call = {"id": "call00000", "type": "function", "function": {"name": PROBE, "arguments": arguments}}
        turns: list[Mapping[str, Any]] = [user, {"role": "assistant", "content": "", "tool_calls": [call]}]
        text = _rendered(template, turns, None)
        at = text.find(PROBE)
        if at >= 0 and f'"{KEY}"' in text:
            opening = max(OPENINGS, key=lambda mark: text.rfind(mark, 0, at))
            if text.rfind(opening, 0, at) < 0:
                opening = ""
            key = "parameters" if '"parameters"' in text[at:] else "arguments"
            return Form(opening, key, as_object, shows_tools, True)
    return Form(shows_tools=shows_tools)


def _rendered(
    template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> str:
    try:
        return render(template, messages, tools)
    except (DataError, ModelError):
        return ""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
