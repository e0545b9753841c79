"""Rows of conversations from files: messages, prompt/completion, Alpaca and ShareGPT, told apart by their fields.

    {"messages": [{"role", "content"}, …], "tools": […]}    {"conversations": [{"from", "value"}, …], "system", "tools"}
    {"prompt": …, "completion": …}                          {"instruction", "input", "output", "system", "history"}

A row that is none of these, or a conversation that does not hang together, is set aside with its reason and counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from langmill.common.errors import DataError, MissingExtra, UsageError
from langmill.data.pipeline import Ledger
from langmill.data.readers import MAX_ROW
from langmill.data.streams import BROKEN, CHUNK, lines, lost, no_text, open_bytes

Message = dict[str, Any]
SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bard": "assistant", "bing": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
ANSWERS = frozenset({"assistant", "model"})
RESULTS = frozenset({"tool", "function", "ipython"})
ROLES = ANSWERS | RESULTS | {"system", "developer", "user"}
LARGEST_JSON = 1 << 30  # bytes of a .json file, which is read whole


@dataclass(frozen=True)
class Chat:
    """A conversation to learn from. Assistant turns from number `first` on are trained, earlier ones are only read."""

    id: str
    messages: list[Message]
    tools: list[Any] | None = None
    first: int = 0


@dataclass(frozen=True)
class Completion:
    """Plain text to learn to go on with: nothing stands around it but the tokenizer's first and last token."""

    id: str
    prompt: str
    completion: str


Row = Chat | Completion
T = TypeVar("T")


class Unusable(DataError):
    """A row that is set aside; `reason` is what the ledger counts it under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_chats(paths: Sequence[str | Path], ledger: Ledger, make: Callable[[Row], T]) -> Iterator[T]:
    """`make` of every conversation of .jsonl (.gz, .zst), .json and .parquet files and folders of them, in order.

    A row that is none, or that `make` refuses with a DataError, is dropped in the ledger. Raises UsageError for a path
    that is missing or of another kind.
    """
    reason = "not a usable conversation"
    yield from read_rows(paths, ledger, lambda where, value: make(parse(where, value)), reason)


def read_rows(
    paths: Sequence[str | Path], ledger: Ledger, make: Callable[[str, Any], T], reason: str
) -> Iterator[T]:
    """`make(place, value)` of every row, as `read_chats`; what it refuses is counted under `reason`, or under that of
    Unusable."""
    for file in _files(paths):
        yield from usable(file, json_rows(file, ledger), ledger, make, reason)


def usable(
    file: Path, rows: Iterable[tuple[int | str, Any, int]], ledger: Ledger, make: Callable[[str, Any], T], reason: str,
    ascii: bool = False,
) -> Iterator[T]:  # fmt: skip
    """`make(place, value)` of the rows of one file, each taken into the ledger, and kept or dropped there. ascii: what
    is dropped may hold what is no Unicode, and is recorded in escapes."""
    source = file.as_posix()
    for place, value, size in rows:
        where = f"{source}:{place}"
        ledger.take(source, size)
        try:
            made = make(where, value)
        except DataError as error:
            shown = json.dumps(value, ensure_ascii=ascii, default=str)[:400]
            ledger.drop(source, where, getattr(error, "reason", reason), size, shown, str(error))
        else:
            ledger.keep(source, size)
            yield made


def parse(where: str, row: Any) -> Row:
    """One row as a conversation; DataError says what is wrong with it."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row is a JSON object with messages, not {type(row).__name__}")
    if "messages" in row:
        messages = [_message(m, i) for i, m in enumerate(_list(row, "messages"))]
        return _checked(Chat(where, messages, _tools(row)))
    if "conversations" in row:
        turns = [_sharegpt(t, i) for i, t in enumerate(_list(row, "conversations"))]
        return _checked(Chat(where, [*_system(row), *turns], _tools(row)))
    if "prompt" in row and "completion" in row:
        return _completion(where, row)
    if "instruction" in row and "output" in row:
        return _checked(Chat(where, _alpaca(row)))
    known = "messages, conversations, prompt and completion, or instruction and output"
    there = ", ".join(map(str, list(row)[:20])) or "nothing"
    more = " (preferences are for --task prefer)" if "chosen" in row else ""
    raise DataError(f"a row has {known}; this one has {there}{more}")


def _completion(where: str, row: Mapping[str, Any]) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise DataError("the completion is empty")
        return Completion(where, prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = [_message(m, i) for i, m in enumerate([*prompt, *completion])]
        return _checked(Chat(where, messages, _tools(row), first=len(prompt)))
    raise DataError("prompt and completion are both text, or both lists of messages")


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    value = row[key]
    if not isinstance(value, list) or not value:
        raise DataError(f"{key} is not a list of at least one turn")
    return value


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"{key} is {type(row[key]).__name__}, not text")
    return str(row[key])


def _system(row: Mapping[str, Any]) -> list[Message]:
    """The system message that stands beside the turns."""
    return [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    """Earlier questions and answers come first, where a row has a history of them."""
    history, extra = row.get("history") or [], _text(row, "input") if row.get("input") else ""
    asked = f"{_text(row, 'instruction')}\n\n{extra}" if extra else _text(row, "instruction")
    if not isinstance(history, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in history):
        raise DataError("history is not a list of pairs, a question and its answer")
    turns = []
    for question, answer in [*history, (asked, _text(row, "output"))]:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*_system(row), *turns]


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a row: a list of descriptions, or that list as JSON."""
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except (ValueError, RecursionError):
            raise DataError("tools is text that is not JSON: it is a list of descriptions") from None
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        return tools
    raise DataError("tools is not a list of descriptions, each a JSON object")


def _message(value: Any, number: int) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise DataError(f"message {number} is not an object with a role and a content")
    message = {str(key): item for key, item in value.items() if item is not None}
    role, calls = message["role"], message.get("tool_calls") or []
    if role not in ROLES:
        raise DataError(f"message {number} is of role {role!r}; known are {', '.join(sorted(ROLES))}")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"tool_calls of message {number} is not a list of calls, each a JSON object")
    if calls and role not in ANSWERS:
        raise DataError(f"message {number} ({role}) calls tools, which only the assistant does")
    if "content" not in message and not calls:
        raise DataError(f"message {number} ({role}) has no content")
    if message.get("weight") == 0:
        raise DataError(f"message {number} has weight 0: to have turns read only, put them into prompt and the others "
                        "into completion")  # fmt: skip
    return message


def _sharegpt(turn: Any, number: int) -> Message:
    if isinstance(turn, Mapping) and "role" in turn and "from" not in turn:
        return _message(turn, number)
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise DataError(f"turn {number} is not an object with from and value")
    role = SHAREGPT.get(str(turn.get("from")).lower())
    if role is None:
        raise DataError(f"turn {number} is from {turn.get('from')!r}; known are {', '.join(SHAREGPT)}")
    return {"role": role, "content": turn["value"]}


def _checked(chat: Chat) -> Chat:
    """Refuse turns that are out of order or empty, tool calls without results, and a chat that teaches nothing."""
    spoken, before = False, ""
    calls: list[Any] = []
    for number, message in enumerate(chat.messages):
        role = message["role"]
        if role in ("system", "developer") and before not in ("", "system", "developer"):
            raise DataError(f"message {number} is a {role} turn after the conversation began")
        if role in ANSWERS and not spoken:
            raise DataError(f"message {number} is an answer before anybody asked")
        if role in RESULTS:
            calls = _answered(calls, message, number, before)
        elif calls:
            raise DataError(f"message {number} follows tool calls that got no result{_ids(calls)}")
        elif not message.get("tool_calls") and _is_empty(message.get("content")):
            raise DataError(f"message {number} ({role}) is empty")
        else:
            calls = list(message.get("tool_calls") or [])
        spoken |= role == "user"
        before = role
    if not any(message["role"] in ANSWERS for message in chat.messages[chat.first :]):
        raise DataError("there is no assistant turn to learn from")
    return chat


def _answered(calls: list[Any], result: Message, number: int, before: str) -> list[Any]:
    """The calls that still want a result after this one. Where ids are missing, any result answers all calls."""
    if not calls and before not in RESULTS | ANSWERS:  # text can be a call too
        raise DataError(f"message {number} is a tool's result that no tool call asked for")
    wanted, found = [call.get("id") for call in calls], result.get("tool_call_id")
    if found is None or None in wanted:
        return []
    if calls and found not in wanted:
        raise DataError(f"message {number} is the result of tool call {found!r}, which nobody made")
    return [call for call in calls if call.get("id") != found]


def _ids(calls: Sequence[Any]) -> str:
    known = [str(call["id"]) for call in calls if call.get("id") is not None]
    return f" ({', '.join(known)})" if known else ""


def _is_empty(content: Any) -> bool:
    return not (content.strip() if isinstance(content, str) else content)


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*") if file.is_file() and _kind(file) and not _ours(file, path)
            )
            if not inside:
                raise UsageError(f"{path} holds no .jsonl, .json or .parquet file")
            yield from inside
        elif not path.exists():
            raise UsageError(f"{path} does not exist: give a file of conversations, or a folder of them")
        elif not _kind(path):
            raise UsageError(f"{path} is not a .jsonl (.gz, .zst), .json or .parquet file")
        else:
            yield path


def _ours(file: Path, folder: Path) -> bool:
    """Whether a file lies in the private folder of a run, which may even be writing it."""
    return any(name.endswith(".run") for name in file.relative_to(folder).parts[:-1])


def _kind(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    plain = [suffix for suffix in suffixes if suffix not in (".gz", ".zst")]
    return plain[-1] if plain and plain[-1] in (".jsonl", ".json", ".parquet") else ""


def json_rows(file: Path, ledger: Ledger) -> Iterator[tuple[int, Any, int]]:
    """(number, value, bytes) of every row; what is no JSON is rejected here."""
    match _kind(file):
        case ".parquet":
            yield from _parquet(file, ledger)
        case ".json":
            yield from _json(file, ledger)
        case _:
            yield from _jsonl(file, ledger)


def _jsonl(file: Path, ledger: Ledger) -> Iterator[tuple[int, Any, int]]:
    source, number = file.as_posix(), 0
    try:
        with open_bytes(file) as stream:
            if detail := no_text(stream.peek()):
                return ledger.reject(source, source, "not UTF-8", file.stat().st_size, detail=detail)
            for number, line, size in lines(stream, MAX_ROW):
                if line is None:
                    ledger.reject(source, f"{source}:{number}", f"row longer than {MAX_ROW >> 20} MiB", size)
                elif not line.isspace():
                    try:
                        value = json.loads(line.decode("utf-8"))
                        json.dumps(value, ensure_ascii=False).encode(
                            "utf-8"
                        )  # half a surrogate pair shows here
                    except (ValueError, RecursionError) as error:
                        shown = line[:400].decode("utf-8", errors="replace")
                        why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "broken JSON"
                        ledger.reject(source, f"{source}:{number}", why, size, shown, str(error))
                    else:
                        yield number, value, size
    except BROKEN as error:
        rest = lost(file, number > 0)
        ledger.reject(
            source, f"{source}:{number + 1}", "file is damaged from here on", rest, detail=str(error)
        )


def _json(file: Path, ledger: Ledger) -> Iterator[tuple[int, Any, int]]:
    source, size, data = file.as_posix(), file.stat().st_size, b""
    if size > LARGEST_JSON:
        raise UsageError(f"{file} has {size} bytes, and a .json file is read whole: write it as .jsonl")
    try:
        data = file.read_bytes()
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        detail = no_text(data[:CHUNK])
        why = "not UTF-8" if detail or isinstance(error, UnicodeDecodeError) else "broken JSON"
        return ledger.reject(source, source, why, size, detail=detail or str(error))
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        yield number, row, len(json.dumps(row))


def _parquet(file: Path, ledger: Ledger) -> Iterator[tuple[int, Any, int]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingExtra("data", "pyarrow") from None
    number, source = 0, file.as_posix()
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256, use_threads=False):
                for row in _values(batch):
                    number += 1
                    if isinstance(row, UnicodeDecodeError):
                        where, size = f"{source}:{number}", len(row.object)
                        ledger.reject(source, where, "not UTF-8", size, detail=str(row))
                    else:
                        yield number, row, len(json.dumps(row, default=str))
    except (pyarrow.ArrowException, *BROKEN) as error:
        rest = lost(file, number > 0)
        ledger.reject(
            source, f"{source}:{number + 1}", "file is damaged from here on", rest, detail=str(error)
        )


def _values(batch: Any) -> Iterator[Any]:
    """The rows of a batch as objects; the error of one whose text is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # before the first one
        for number in range(batch.num_rows):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield error
