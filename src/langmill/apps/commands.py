"""A conversation, its commands and its file.

Every step makes a new `Chat` of an old one, or raises and changes nothing. Turns stand in pairs, a user's and the
answer to it, behind at most one system message.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from langmill.common.errors import DataError, UsageError
from langmill.common.files import atomic_write
from langmill.infer.sampling import Sampling

Message = dict[str, Any]
Check = Callable[[Sequence[Message]], object]
LARGEST_FILE = 64 << 20  # bytes of a conversation to load


@dataclass(frozen=True)
class Chat:
    """What was said so far and how the model goes on; retries: how often the last answer was asked for again."""

    messages: tuple[Message, ...]
    sampling: Sampling
    retries: int = 0

    @property
    def system(self) -> tuple[Message, ...]:
        """The system message, or nothing."""
        return self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else ()

    @property
    def turns(self) -> tuple[Message, ...]:
        return self.messages[len(self.system) :]

    def asked(self, text: str) -> Chat:
        """The chat with one more turn of the user."""
        return replace(self, messages=(*self.messages, {"role": "user", "content": text}), retries=0)

    def answered(self, text: str) -> Chat:
        return replace(self, messages=(*self.messages, {"role": "assistant", "content": text}))


class Step(NamedTuple):
    """What a command did: the chat after it, a line to say, and whether the model answers or the program leaves."""

    chat: Chat
    said: str = ""
    then: Literal["read", "answer", "leave"] = "read"


class Command(NamedTuple):
    """`/name argument`; an argument in brackets may be left out, an empty one is refused."""

    name: str
    argument: str
    help: str
    do: Callable[[Chat, str, Check], Step]


def obey(line: str, chat: Chat, check: Check) -> Step:
    """Do what a line such as "/save talk.jsonl" says; `check` raises where the model's template refuses messages.

    Raises UsageError for a command that does not exist or lacks its argument, and DataError or ModelError for what
    cannot be done; the chat is as it was then.
    """
    name, argument = (*line[1:].split(None, 1), "", "")[:2]
    found = {command.name: command for command in COMMANDS}
    command = found.get(name.lower())
    if command is None:
        near = difflib.get_close_matches(name.lower(), found, 1, 0)[0] if name else "help"
        raise UsageError(
            f"there is no command /{name}: did you mean /{near}? (/help lists them; a message that begins with / "
            'goes between lines of """)'
        )
    argument = argument.strip()
    if argument and not command.argument:
        raise UsageError(f"/{command.name} stands alone, without '{argument}'")
    if not argument and command.argument and not command.argument.startswith("["):
        raise UsageError(f"/{command.name} needs {command.argument}: {command.help}")
    return command.do(chat, argument, check)


def _help(chat: Chat, argument: str, check: Check) -> Step:
    rows = [(f"/{row.name} {row.argument}".rstrip(), row.help) for row in COMMANDS]
    rows += [
        ("ctrl-D", "leave"),
        ("ctrl-C", "stop the answer"),
        ("... \\", "a backslash at the end: the message goes on in the next line"),
        ('"""', "between two such lines: a message of several lines, taken as it is"),
    ]
    return Step(chat, "\n".join(f"{left:18} {right}" for left, right in rows))


def _system(chat: Chat, text: str, check: Check) -> Step:
    if not text:
        said = "the system message is taken away" if chat.system else "there is no system message"
        return Step(replace(chat, messages=chat.turns), said)
    system = {"role": "system", "content": text}
    check((system, *(chat.turns or ({"role": "user", "content": text},))))
    return Step(replace(chat, messages=(system, *chat.turns)), "the system message is set")


def _retry(chat: Chat, argument: str, check: Check) -> Step:
    if not chat.turns:
        raise UsageError("there is no answer to try again")
    same = "temperature is 0, so the answer stays the same: try /temperature 0.7"
    kept = replace(chat, messages=chat.messages[:-1], retries=chat.retries + 1)
    return Step(kept, "" if chat.sampling.temperature else same, "answer")


def _undo(chat: Chat, argument: str, check: Check) -> Step:
    if not chat.turns:
        raise UsageError("there is nothing to take back")
    asked = " ".join(str(chat.messages[-2]["content"]).split())
    shown = asked if len(asked) <= 60 else f"{asked[:59]}…"
    return Step(replace(chat, messages=chat.messages[:-2], retries=0), f"taken back: {shown}")


def _temperature(chat: Chat, text: str, check: Check) -> Step:
    if text:
        try:
            chosen = float(text)
        except ValueError:
            raise UsageError(f"'{text}' is no temperature: a number such as 0 or 0.7 is") from None
        chat = replace(chat, sampling=replace(chat.sampling, temperature=chosen))
    return Step(chat, f"the temperature is {chat.sampling.temperature:g}")


def _clear(chat: Chat, argument: str, check: Check) -> Step:
    kept = "; the system message stays" if chat.system else ""
    return Step(replace(chat, messages=chat.system, retries=0), f"the conversation is forgotten{kept}")


def _save(chat: Chat, name: str, check: Check) -> Step:
    """One row {"messages"} that `langmill finetune --data` reads. Only a file of that kind is ever replaced."""
    if not chat.turns:
        raise UsageError("there is nothing to save yet")
    path = _named(name)
    try:
        if path.exists():
            read_messages(path)
        atomic_write(path, json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n")
    except DataError as error:
        raise DataError(f"{error}: it is not replaced, choose another name") from None
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None
    return Step(chat, f"saved to {path}: {_counted(chat)}")


def _load(chat: Chat, name: str, check: Check) -> Step:
    path = _named(name)
    messages = read_messages(path)
    check(messages)
    loaded = Chat(messages, chat.sampling)
    return Step(loaded, f"loaded from {path}: {_counted(loaded)}")


def _named(name: str) -> Path:
    """The file of that name; one that is new ends in .jsonl unless it ends otherwise."""
    path = Path(name).expanduser()
    return path if path.suffix or path.exists() else path.with_name(f"{path.name}.jsonl")


def _counted(chat: Chat) -> str:
    turns = len(chat.turns) // 2
    return f"{turns} turn{'s' * (turns != 1)}{' and a system message' if chat.system else ''}"


def _leave(chat: Chat, argument: str, check: Check) -> Step:
    return Step(chat, "", "leave")


COMMANDS = (
    Command("help", "", "this list", _help),
    Command("system", "[TEXT]", "set the system message; without TEXT: take it away", _system),
    Command("retry", "", "answer the last message again", _retry),
    Command("undo", "", "take back the last message and its answer", _undo),
    Command("save", "FILE", "write the conversation as a row that finetune --data reads", _save),
    Command("load", "FILE", "go on with a conversation that was saved, in place of this one", _load),
    Command("temperature", "[X]", "0: always the likeliest token; 1: as the model says; without X: show", _temperature),
    Command("clear", "", "forget the conversation, not the system message", _clear),
    Command("exit", "", "leave", _leave),
    Command("quit", "", "leave", _leave),
)  # fmt: skip


def read_messages(path: Path) -> tuple[Message, ...]:
    """The conversation of a file with one row {"messages": [...]}; DataError says what is wrong with it."""
    try:
        if not path.is_file():
            raise DataError(f"{path} is no file")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise DataError(f"{path} has {size} bytes; a conversation of at most {LARGEST_FILE} is read")
        text = path.read_bytes().decode("utf-8-sig")
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # half a surrogate pair shows here
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not one row of JSON: {error}") from None
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list):
        raise DataError(f'{path} is not a row {{"messages": [...]}}')
    if row.get("tools"):
        raise DataError(f"{path} has tools, which a chat in the terminal cannot run")
    begins = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    for number, message in enumerate(messages):
        expected = "system" if begins and not number else ("user", "assistant")[(number - begins) % 2]
        if wrong := _wrong(message, expected):
            raise DataError(f"{path}: message {number} {wrong}")
    if len(messages) - begins < 2 or (len(messages) - begins) % 2:
        raise DataError(f"{path}: it does not end with an answer")
    return tuple({key: item for key, item in message.items() if item is not None} for message in messages)


def _wrong(message: Any, expected: str) -> str:
    """What is wrong with a message that `expected` should say; nothing where it is well."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return "is not an object with a role and a content"
    if message["role"] != expected:
        return f"is of role {message['role']!r}, and here {expected!r} should speak"
    if message.get("tool_calls"):
        return "calls tools, which a chat in the terminal cannot run"
    if not isinstance(message.get("content"), str) or not message["content"]:
        return "has no text as its content"
    return ""
