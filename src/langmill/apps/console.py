"""Where a conversation takes place: a terminal or pipes, and messages of one line or several."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from langmill.common.errors import DataError

ASK, MORE, BLOCK = "you> ", "...> ", '"""'
# What moves a terminal's cursor, or worse, is shown and not obeyed.
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)}
_VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), "\N{REPLACEMENT CHARACTER}")


@dataclass(frozen=True)
class Console:
    """Where a conversation takes place.

    read: asks with a prompt for one line, without its end; EOFError where there is none any more. show: takes the
    answers' text. note: takes a line for the person. stoppable: Ctrl-C stops an answer, and not the program.
    """

    read: Callable[[str], str]
    show: Callable[[str], object]
    note: Callable[[str], object]
    stoppable: bool


def read_message(console: Console) -> tuple[str, bool]:
    """The next message, and whether it is a command; empty lines are none.

    A backslash at the end of a line joins the next to it; lines between two of triple quotes are taken as they are.
    The end of the input also ends a message that is not finished.
    """
    while not (line := console.read(ASK)).strip():
        pass
    if line.startswith("/"):
        return line, True
    lines: list[str] = []
    block = line.strip() == BLOCK
    with contextlib.suppress(EOFError):
        if block:
            while (line := console.read(MORE)).strip() != BLOCK:
                lines.append(line)
        else:
            while line.endswith("\\"):
                lines.append(line[:-1])
                line = console.read(MORE)
            lines.append(line)
    text = "\n".join(lines)
    if not text.strip():
        raise DataError("the message is empty")
    return text, False


def open_console(quiet: bool) -> Console:
    """This process's terminal, with the line editing of `readline` where there is one, or its pipes."""
    typed, seen, noted = sys.stdin.isatty(), sys.stdout.isatty(), sys.stderr.isatty()

    def show(text: str) -> None:
        sys.stdout.write(text.translate(_VISIBLE) if seen else text)
        sys.stdout.flush()

    def note(text: str) -> None:
        print(text.translate(_VISIBLE) if noted else text, file=sys.stderr, flush=True)

    if typed and seen:
        with contextlib.suppress(ImportError):  # Windows has none
            importlib.import_module("readline")
        return Console(lambda prompt: _typed("" if quiet else prompt), show, note, True)
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    return Console(lambda prompt: _piped(stream, "" if quiet else prompt, typed), show, note, typed)


def _typed(prompt: str) -> str:
    try:
        line = input(prompt)
    except EOFError:
        print(file=sys.stderr)
        raise
    except UnicodeDecodeError:
        raise DataError("this line is not UTF-8") from None
    return _clean(line)


def _piped(stream: IO[Any], prompt: str, typed: bool) -> str:
    """The next line of a stream of bytes or text; the prompt, and a line that nobody saw, on standard error."""
    if typed:
        print(prompt, end="", file=sys.stderr, flush=True)
    line = stream.readline()
    if not line:
        raise EOFError
    try:
        text = line if isinstance(line, str) else line.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise DataError(f"a line is not UTF-8 (byte {reason.start}): it is left out") from None
    text = _clean(text.rstrip("\r\n").removeprefix("\ufeff"))
    if prompt and not typed:
        print(prompt + text, file=sys.stderr, flush=True)
    return text


def _clean(line: str) -> str:
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("this line is not UTF-8") from None
    return line
