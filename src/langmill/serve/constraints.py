"""What a request may write, from its fields: made in a thread and one at a time, since a schema may take seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from langmill.infer.request import Constraint
from langmill.serve import formats
from langmill.serve.errors import Refused
from langmill.serve.models import Loaded
from langmill.serve.sampling_fields import Writing, guided
from langmill.serve.writing import in_turn


async def constraint_of(loaded: Loaded, asked: Writing) -> Callable[[], Constraint] | None:
    """What makes a constraint for each answer; None where anything may be written. Refused, UsageError and MissingExtra
    as `formats.constraint_of` raises them."""
    extra = guided(asked)
    if len(extra) + (asked.response_format is not None) > 1:
        names = [*(["response_format"] if asked.response_format is not None else []), *extra]
        raise Refused(f"{' and '.join(names)} exclude each other: give one of them", param=names[-1])
    return await made(loaded, asked.response_format, extra)


async def made(
    loaded: Loaded,
    format: Mapping[str, Any] | None,
    extra: Mapping[str, Any] = MappingProxyType({}),
    where: str = formats.CHAT,
) -> Callable[[], Constraint] | None:
    """`formats.constraint_of` in a thread."""
    if format in (None, {"type": "text"}) and not extra:
        return None
    size = len(str(format)) + sum(len(str(value)) for value in extra.values())
    return await in_turn(loaded, size, lambda: formats.constraint_of(loaded, format, extra, where))
