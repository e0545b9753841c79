"""A request for a chat, understood: what the forms of OpenAI and Anthropic have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from langmill.infer.request import Constraint
from langmill.serve.errors import Refused
from langmill.serve.models import Loaded
from langmill.serve.tool_reader import Piece, Reader
from langmill.serve.tools import ToolUse
from langmill.serve.writing import Usage, Wanted


@dataclass(frozen=True)
class Job:
    """What to write, how it is read for calls, what stands around every answer, and what is counted.

    cut: more tokens were asked for than fit behind the prompt, which Anthropic's form allows.
    """

    loaded: Loaded
    wanted: Wanted
    use: ToolUse | None
    head: dict[str, Any]
    usage: Usage
    cut: bool = False

    def reader(self) -> Reader | None:
        """A new one for each answer; None where nothing may be called."""
        return None if self.use is None else self.use.reader()


def pieces_of(reader: Reader | None, text: str, ids: Sequence[int], last: bool) -> list[Piece]:
    """What became certain with this text and these ids; last: nothing follows."""
    if reader is None:
        return [Piece(text)] if text else []
    return [*reader.push(text, ids), *(reader.end() if last else ())]


def constrained(
    use: ToolUse | None, format: Callable[[], Constraint] | None, where: str, param: str
) -> Callable[[], Constraint] | None:
    """What holds an answer to a call or to a format. Refused where both do; where: the format's place."""
    if use is None or use.constraint is None:
        return format
    if format is not None:
        raise Refused(f"tool_choice forces a call and {where} another text: give one of them", param=param)
    return use.constraint
