"""What a model writes, read as it comes: text, and calls of functions in the forms that models write them in.

`<tool_call>{…}</tool_call>` (Hermes, Qwen, SmolLM2), `[TOOL_CALLS][{…}, …]` (Mistral), `<|python_tag|>{…}` and a bare
`{"name": …, "parameters": …}` at the start (Llama), and one in a ```json fence there. What only looked like a call is
text again, so that nothing is lost; white space before and behind a call is.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

OPENINGS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
BARE = ("{", "[", "```")  # calls where an answer starts with them
MARKS = (*OPENINGS, *BARE)
CLOSINGS = {"<tool_call>": "</tool_call>", "[TOOL_CALLS]": "]", "[": "]", "```": "```"}
BEFORE = r"(?:json)?\s*\[?\s*"  # between an opening and its first call
HEAD = re.compile(
    r'\s*\[?\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
LONGEST = 1 << 16  # characters that are held back, at most, to see whether they are a call


@dataclass(frozen=True)
class Piece:
    """Text (`index` None), or a part of call `index`: its id and name first, then its arguments, a JSON text."""

    text: str = ""
    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class Scan:
    """How deep a JSON text is at a place: objects and lists that are open, and whether a string is."""

    depth: int = 0
    string: bool = False
    escaped: bool = False

    def end(self, text: str, start: int = 0) -> int | None:
        """Behind the character that closes what was opened first; None where it is not there yet."""
        for at in range(start, len(text)):
            character = text[at]
            if self.string:
                if self.escaped:
                    self.escaped = False
                elif character == "\\":
                    self.escaped = True
                elif character == '"':
                    self.string = False
            elif character == '"':
                self.string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    return at + 1
        return None


class Reader:
    """One answer's text in, pieces out.

    names: the functions there are; another name makes no call. most: calls that are read; what follows them is text.
    marks: ids of openings that a tokenizer gives no text for.
    """

    def __init__(
        self, names: Collection[str], most: int | None = None, marks: Mapping[int, str] | None = None
    ) -> None:
        self.names, self.most, self.marks = frozenset(names), most, dict(marks or {})
        self.held, self.opened, self.calls = "", "", 0
        self.state, self.fresh, self.blank = "text", True, False
        self.scan = Scan()

    def push(self, text: str, ids: Sequence[int] = ()) -> list[Piece]:
        """What became certain with this text and these ids."""
        self.held += "".join(self.marks[id] for id in ids if id in self.marks) + text
        return _merged(self._read(False))

    def end(self) -> list[Piece]:
        """The rest, where nothing follows."""
        return _merged(self._read(True))

    def _read(self, last: bool) -> Iterator[Piece]:
        while True:
            before = self.state, len(self.held)
            yield from getattr(self, f"_{self.state}")(last)
            if (self.state, len(self.held)) == before:
                return

    def _text(self, last: bool) -> Iterator[Piece]:
        if self.blank:
            self.held = self.held.lstrip()
            self.blank = not self.held
        if self.most is None or self.calls < self.most:
            found = [(at, opening) for opening in OPENINGS if (at := self.held.find(opening)) >= 0]
            start = self.held.lstrip()
            if self.fresh and not last and any(mark.startswith(start) and mark != start for mark in MARKS):
                return  # an opening that is not whole yet
            if self.fresh:
                found += [(len(self.held) - len(start), mark) for mark in BARE if start.startswith(mark)]
            if found:
                at, opening = min(found, key=lambda one: (one[0], -len(one[1])))
                before = self.held[:at]
                yield from self._said(before if before.strip() else "")
                self.opened = "" if opening == "{" else opening
                self.held = self.held[at + len(self.opened) :]
                self.state = "call"
                return
        keep = 0 if last else max(_overlap(self.held, opening) for opening in OPENINGS)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        yield from self._said(shown)

    def _said(self, text: str) -> Iterator[Piece]:
        if text:
            self.fresh = self.fresh and not text.strip()
            yield Piece(text)

    def _call(self, last: bool) -> Iterator[Piece]:
        head = HEAD.match(self.held)
        if head is not None and (name := _string(head[1])) in self.names:
            yield self._begun(name)
            self.held, self.scan, self.state = self.held[head.end() :], Scan(), "value"
            return
        start = re.match(BEFORE, self.held)
        at = 0 if start is None else start.end()
        end = Scan().end(self.held, at) if self.held[at : at + 1] == "{" else None
        if end is not None and (read := self._whole(self.held[at:end])) is not None:
            name, arguments = read
            piece = self._begun(name)
            yield Piece("", piece.index, piece.id, name, arguments)
            self.held, self.state = self.held[end:], "after"
            return
        begun = self.held[at : at + 1] in ("", "{") or "json".startswith(self.held)
        if last or end is not None or not begun or len(self.held) > LONGEST:  # it was text
            size = len(self.held) if end is None and last else max(at, end or 0)
            text, self.held = self.opened + self.held[:size], self.held[size:]
            self.state, self.fresh = "text", False
            yield Piece(text)

    def _begun(self, name: str) -> Piece:
        self.calls, self.fresh = self.calls + 1, False
        return Piece("", self.calls - 1, f"call_{secrets.token_hex(12)}", name)

    def _whole(self, text: str) -> tuple[str, str] | None:
        """Name and arguments of a call whose parts stand in another order, or whose arguments are a string."""
        try:
            read = json.loads(text)
        except (ValueError, RecursionError):
            return None
        inner = read.get("function") if isinstance(read.get("function"), dict) else read
        name = inner.get("name")
        arguments = inner.get("arguments", inner.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not (isinstance(name, str) and name in self.names and isinstance(arguments, dict)):
            return None
        return name, json.dumps(arguments, ensure_ascii=False)

    def _value(self, last: bool) -> Iterator[Piece]:
        end = self.scan.end(self.held)
        size = len(self.held) if end is None else end
        if size:
            yield Piece("", self.calls - 1, arguments=self.held[:size])
        self.held = self.held[size:]
        if end is not None:
            self.state, self.scan = "close", Scan(depth=1)

    def _close(self, last: bool) -> Iterator[Piece]:
        """What stands between the arguments and the end of their object."""
        end = self.scan.end(self.held)
        self.held = "" if end is None else self.held[end:]
        if end is not None:
            self.state = "after"
        yield from ()

    def _after(self, last: bool) -> Iterator[Piece]:
        """Behind a call: its closing, another one, or text."""
        self.held = self.held.lstrip()
        closing = CLOSINGS.get(self.opened, "")
        begun = closing.startswith(self.held) and self.held != closing
        if not last and (not self.held or begun):
            return
        more = self.most is None or self.calls < self.most
        if closing and self.held.startswith(closing):
            self.held, self.opened, self.state, self.blank = self.held[len(closing) :], "", "text", True
        elif more and self.held[:1] in (",", ";") and self.opened != "<tool_call>":
            self.held, self.state = self.held[1:], "call"
        elif more and self.held[:1] == "{" and self.opened != "<tool_call>":
            self.state = "call"
        else:
            self.state, self.blank, self.opened = "text", True, ""
        yield from ()


def _string(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def _overlap(text: str, opening: str) -> int:
    """Length of the longest end of the text that the opening begins with."""
    return next((n for n in range(min(len(opening) - 1, len(text)), 0, -1) if text.endswith(opening[:n])), 0)


def _merged(pieces: Iterator[Piece]) -> list[Piece]:
    """Neighbours of one kind as one."""
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].index == piece.index and piece.name is None:
            one = found.pop()
            piece = Piece(one.text + piece.text, one.index, one.id, one.name, one.arguments + piece.arguments)
        found.append(piece)
    return found
