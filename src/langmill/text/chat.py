"""Messages to text and to ids through a model's chat template: the one renderer for every use.

What a user wrote never becomes a control token. `chat_ids` marks, before the template runs, every place
in the messages where a control token is spelt or could arise by joining or cutting, with a character that
occurs nowhere else; afterwards unmarked control tokens are the template's own, and the marks are taken out.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

from langmill.common.errors import DataError, ModelError
from langmill.text.sandbox import BUDGET, ENDS, MAX_SOURCE, STARTS, Exhausted, Refused, Sandbox, pieces
from langmill.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
MAX_OUTPUT = 1 << 26  # characters
MAX_DEPTH = 64
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names in use; templates read the first
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "model"})
_PROSE = frozenset({"content", "text", *_REASONING})  # keys whose strings are free text


def render(
    template: str,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    bos_token: str = "",
    eos_token: str = "",
    **variables: Any,
) -> str:
    """The text that a chat template (Jinja, as transformers runs it) makes of messages.

    messages: mappings with "role" and what the template reads ("content", "tool_calls", ...); a None value
    counts as absent. variables: further names that the template may read.
    Raises DataError naming the message that is malformed or that the template refuses; ModelError where the
    template is broken, reaches for Python's insides or does not end.
    """
    compiled = _compile(template)[0]
    chat, touched = _watched([_plain(m, f"message {i}") for i, m in enumerate(_checked(messages))])
    given = {name: _plain(value, name) for name, value in {"tools": tools, **variables}.items()}
    given |= {"add_generation_prompt": add_generation_prompt, "bos_token": bos_token, "eos_token": eos_token}
    size = sum(len(text) for text in _strings([chat, given]))
    parts, length = [], 0
    try:
        for part in pieces(compiled, {"documents": None, **given, "messages": chat}, BUDGET + 64 * size):
            parts.append(part)
            length += len(part)
            if length > MAX_OUTPUT:
                raise Exhausted(f"the chat template makes more than {MAX_OUTPUT} characters")
    except Refused as error:
        raise DataError(f"the chat template refuses {_last(touched)}: {error}") from None
    except SecurityError as error:
        raise ModelError(f"the chat template reaches for what it must not: {error}") from None
    except (Exhausted, OverflowError, RecursionError, MemoryError) as error:
        raise ModelError(f"the chat template was stopped: {error or type(error).__name__}") from None
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise DataError(
            f"the chat template fails on {_last(touched)}: {error or type(error).__name__}"
        ) from None
    return "".join(parts)


def chat_ids(
    tokenizer: Tokenizer,
    messages: Messages,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> list[int]:
    """The ids of messages through the tokenizer's chat template, ready for the model (no bos is added to it).

    Control tokens come from the template alone: one that is spelt inside a message, a tool or a variable is
    encoded as the text it is. Raises as `render`, and ModelError where the model has no chat template.
    """
    return rendered(tokenizer, messages, add_generation_prompt, tools, variables).encode(tokenizer)[0]


@dataclass(frozen=True)
class Rendering:
    """What a template made of messages: its text, in which `marks` stand for what they are mapped to.

    `starts` and `ends`, two of the marks, stand where the template says that the model's own writing starts and ends.
    """

    text: str
    specials: tuple[str, ...]
    marks: Mapping[str, str]
    starts: str
    ends: str

    def plain(self, text: str) -> str:
        """A part of the text with the marks replaced by what they stand for."""
        meaning = {form: plain for mark, plain in self.marks.items() for form in (mark, _as_json(mark))}
        return re.sub(any_of(meaning), lambda found: meaning[found[0]], text)

    def encode(
        self, tokenizer: Tokenizer, edges: Sequence[int] = ()
    ) -> tuple[list[int], list[Span], list[int]]:
        """The ids, the stretch of plain text that each stands for, and where `edges` of `text` lie in plain text.

        Whole control tokens become their ids, everything else is text, the marks taken out.
        """
        special = f"({any_of(self.specials)})"
        parts = re.split(special, self.text)
        parts = [part if i % 2 else self.plain(part) for i, part in enumerate(parts)]
        joined = "".join(parts)
        moved = [len(self.plain(self.text[:edge])) for edge in edges]
        if re.split(special, joined) == parts:  # no user spelt a control token: the usual case
            return *tokenizer.encode_with_offsets(joined, specials=True), moved
        ids: list[int] = []
        places: list[Span] = []
        at = 0
        for index, part in enumerate(parts):
            more, inside = tokenizer.encode_with_offsets(part, specials=index % 2 == 1)
            ids += more
            places += [(at + start, at + end) for start, end in inside]
            at += len(part)
        return ids, places, moved


def rendered(
    tokenizer: Tokenizer,
    messages: Messages,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
    marks: Mapping[str, str] | None = None,
) -> Rendering:
    """Run the tokenizer's template on messages in which every control token of the users is cut by a mark.

    marks: those of another rendering, so that the texts can be compared. Raises as `chat_ids`.
    """
    template = tokenizer.chat_template
    if template is None:
        raise ModelError(
            "this model has no chat template: give it plain text, or a model that was tuned for chats"
        )
    specials = tuple(sorted(token for id in tokenizer.special_ids if (token := tokenizer.token(id))))
    user = [_plain(m, f"message {i}") for i, m in enumerate(_checked(messages))]
    given = {name: _plain(value, name) for name, value in {"tools": tools, **variables}.items()}
    marks = marks or _marks(specials, [template, *specials, *_strings([user, given])])
    starts, ends = list(marks)[1:3]
    guard = _guard(specials, template, tuple(marks.items()))
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    tokens = {name: tokenizer.token(id) or "" for name, id in names.items() if id is not None}
    more: dict[str, Any] = {**tokens, **{name: guard(value, name) for name, value in given.items()}}
    more |= {STARTS: starts, ENDS: ends}
    text = render(
        template,
        [{key: guard(value, key) for key, value in message.items()} for message in user],
        add_generation_prompt=add_generation_prompt,
        **more,
    )
    return Rendering(text, specials, marks, starts, ends)


@functools.lru_cache(maxsize=16)
def _guard(
    specials: tuple[str, ...], template: str, marks: tuple[tuple[str, str], ...]
) -> Callable[[Any, str], Any]:
    """A function that marks users' strings, by the key they stand under, wherever a control token could arise.

    Every character that begins a control token is cut off from what follows, unless a fixed string of the
    template begins there, which the template may look for (as it splits at "</think>"). Free text that
    begins or ends like the inside of one is set off, for templates that write directly beside it; so is a
    role that the template does not name, for those that write "<|" + role + "|>".
    """
    if not specials:
        return lambda value, key: value
    mark = marks[0][0]
    stands = {plain: mark for mark, plain in marks if plain}
    fixed = {
        text.lower() for text in _compile(template)[1] if not re.search(any_of(specials), text, re.IGNORECASE)
    }
    begins = {token[0] for token in specials}
    kept = {text for text in fixed if len(text) > 1 and text[0] in {letter.lower() for letter in begins}}
    places = re.compile(
        f"(?=(?P<whole>{any_of(specials)})|(?P<kept>{any_of(kept)})|){any_of(begins)}", re.IGNORECASE
    )
    tails = {token[cut:] for token in specials for cut in range(1, len(token))}
    heads = {token[:cut] for token in specials for cut in range(1, len(token))}
    longest = max(map(len, specials))

    def place(match: re.Match[str]) -> str:
        found = match[0]
        return found if match["kept"] else stands.get(found, found) + mark

    def text(value: str, key: str) -> str:
        cut, core = places.sub(place, value), value.strip()
        before = after = key == "role" and value not in _ROLES and value.lower() not in fixed
        if key in _PROSE and core:
            inside = len(core) < longest and any(core in token for token in specials)
            before = inside or any(core[:n] in tails for n in range(1, longest))
            after = any(core[-n:] in heads for n in range(1, longest))
        first, end = len(cut) - len(cut.lstrip()), len(cut.rstrip())  # inside of what a template may trim
        return cut[:first] + mark * before + cut[first:end] + mark * after + cut[end:] if core else cut

    def guard(value: Any, key: str) -> Any:
        if isinstance(value, str):
            return text(value, key)
        if isinstance(value, dict):
            return {text(name, ""): guard(item, name) for name, item in value.items()}
        return [guard(item, key) for item in value] if isinstance(value, list) else value

    return guard


def _marks(specials: Iterable[str], texts: Iterable[str]) -> dict[str, str]:
    """Characters that no text holds, raw or as JSON spells them, and what each stands for.

    The first stands for nothing, the next two for where the model's writing starts and ends; one more for each control
    token of a single character, which cannot be cut.
    """
    plain = ["", "", "", *(token for token in specials if len(token) == 1)]
    everything = "\n".join(texts)
    used, lower = set(everything), everything.lower() if "\\u" in everything.lower() else ""
    private = map(chr, chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)))
    free = (letter for letter in private if letter not in used and _as_json(letter) not in lower)
    marks = dict(zip(free, plain, strict=False))
    if len(marks) < len(plain):
        raise DataError("the messages hold every character of private use, so none is left to mark them with")
    return marks


def _as_json(letter: str) -> str:
    return json.dumps(letter)[1:-1]


def any_of(texts: Iterable[str]) -> str:
    """A pattern for any of the texts, the longest first; one that never matches where there are none."""
    return (
        "(?:" + ("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)") + ")"
    )


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> tuple[Template, frozenset[str]]:
    """The compiled template and the fixed strings of its expressions."""
    if len(template) > MAX_SOURCE:
        raise ModelError(f"the chat template has {len(template)} characters; at most {MAX_SOURCE} are read")
    sandbox = Sandbox()
    try:
        return sandbox.from_string(template), sandbox.literals(template)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template is not valid Jinja, line {error.lineno}: {error.message}"
        ) from None
    except (RecursionError, MemoryError, SyntaxError, TemplateError, ValueError, TypeError) as error:
        raise ModelError(f"the chat template cannot be compiled: {error or type(error).__name__}") from None


def _checked(messages: Messages) -> Iterator[dict[str, Any]]:
    """Messages in the shape that templates expect: no None, and reasoning under its usual names."""
    if isinstance(messages, Mapping | str) or not messages:
        raise DataError("a chat is a list of at least one message, each with a role and a content")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(
                f"message {index} is {type(message).__name__}, not a mapping with a role and a content"
            )
        chosen = {key: value for key, value in message.items() if value is not None}
        if not isinstance(chosen.get("role"), str):
            raise DataError(f"message {index} has no role; it needs one such as user or assistant")
        if not isinstance(chosen.get("content", ""), str | list | tuple):
            kind = type(chosen["content"]).__name__
            raise DataError(f"the content of message {index} is {kind}, not text or a list of parts")
        reasoning = next((chosen[key] for key in _REASONING if key in chosen), None)
        yield (
            chosen if reasoning is None else {"thinking": reasoning, **chosen, "reasoning_content": reasoning}
        )


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of JSON's types alone, so that a template meets no other object's methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > MAX_DEPTH:
        raise DataError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise DataError(f"{where} has a key that is not text")
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    raise DataError(
        f"{where} holds a {type(value).__name__}; text, numbers, lists and mappings are understood"
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


class _Message(dict[str, Any]):
    """A message that notes when the template reads it, so that an error can name it."""

    def __init__(self, content: Mapping[str, Any], index: int, touched: list[int]) -> None:
        super().__init__(content)
        self._index, self._touched = index, touched

    def __getitem__(self, key: str) -> Any:
        self._touched[:] = [self._index]
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]


def _watched(messages: Sequence[Mapping[str, Any]]) -> tuple[list[_Message], list[int]]:
    touched: list[int] = []
    return [_Message(message, index, touched) for index, message in enumerate(messages)], touched


def _last(touched: Sequence[int]) -> str:
    return f"message {touched[0]}" if touched else "the messages"
