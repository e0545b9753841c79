"""`response_format`, and vLLM's `structured_outputs` and `guided_…`, as constraints: what an answer may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from langmill.common.errors import UsageError
from langmill.infer.request import Constraint
from langmill.serve.errors import Refused
from langmill.serve.models import Loaded

KINDS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}  # of Grammars
CHAT, RESPONSES = "response_format", "text.format"  # where a request has its format
TYPES = "text, json_object or json_schema"


def constraint_of(
    loaded: Loaded, format: Mapping[str, Any] | None, extra: Mapping[str, Any], where: str = CHAT
) -> Callable[[], Constraint] | None:
    """What makes a constraint for each answer; None where anything may be written.

    extra: at most one field of vLLM's, by its name, which ends in one of KINDS. where: the format's place, CHAT or
    RESPONSES. Refused for a format that is none, and for a schema, pattern or grammar that cannot be held to;
    MissingExtra without llguidance. A first schema takes up to a second.
    """
    for name, value in extra.items():
        kind = KINDS[name.replace(".", "_").rpartition("_")[2]]
        return _made(partial(getattr(loaded.grammars(), kind), value), name)
    found = None if format is None else schema_of(format, where)
    return None if found is None else _made(partial(loaded.grammars().json_schema, found[0]), found[1])


def schema_of(format: Mapping[str, Any], where: str = CHAT) -> tuple[dict[str, Any], str] | None:
    """The schema of a format, and its place; None for text. Refused, with the field, where it is not one of TYPES."""
    kind = format.get("type")
    if kind in ("text", "json_object"):
        only(format, {"type"}, where)
        return None if kind == "text" else ({"type": "object"}, where)
    if kind != "json_schema":
        raise Refused(f"{where}.type is {str(kind)[:40]!r}: it is {TYPES}", param=f"{where}.type")
    if where == CHAT:  # one level deeper than in /v1/responses
        only(format, {"type", "json_schema"}, where)
        where = f"{where}.json_schema"
        format = format.get("json_schema") or {}
        if not isinstance(format, Mapping):
            raise Refused(f"{where} is no object", param=where)
    only(
        format, {"name", "description", "schema", "strict", *({"type"} if where == RESPONSES else ())}, where
    )
    schema, place = format.get("schema"), f"{where}.schema"
    if not isinstance(schema, dict):
        raise Refused(f"{place} is {'missing' if schema is None else 'no object'}", param=place)
    return schema, place


def only(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """Refused, with its name, where there is a field that is not known."""
    if more := sorted(set(given) - known):
        raise Refused(
            f"{where} has no field '{more[0][:80]}'", 400, "unknown_field", f"{where}.{more[0][:80]}"
        )


def _made(make: Callable[[], Constraint], param: str) -> Callable[[], Constraint]:
    try:
        make()  # what is wrong with it shows before anything is written
    except (TypeError, UsageError) as error:
        raise Refused(f"{param}: {error}", param=param) from None
    return make
