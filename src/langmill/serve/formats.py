"""`response_format`, and vLLM's `guided_…` fields, as constraints: what an answer may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from langmill.infer.request import Constraint
from langmill.serve.errors import Refused
from langmill.serve.models import Loaded

GUIDED = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
TYPES = "text, json_object or json_schema"


def constraint_of(
    loaded: Loaded, response_format: Mapping[str, Any] | None, extra: Mapping[str, Any]
) -> Callable[[], Constraint] | None:
    """What makes a constraint for each answer; None where anything may be written.

    extra: at most one of GUIDED. Refused for a format that is none; UsageError for a schema, pattern or grammar that
    cannot be held to; MissingExtra without llguidance. A first schema takes up to a second.
    """
    for name, value in extra.items():
        return _made(partial(getattr(loaded.grammars(), GUIDED[name]), value), name)
    schema = schema_of(response_format)
    return (
        None if schema is None else _made(partial(loaded.grammars().json_schema, schema), "response_format")
    )


def schema_of(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The schema of a format; None for text. Refused, with the field, where it is not one of TYPES."""
    if response_format is None:
        return None
    kind = response_format.get("type")
    if kind == "text":
        _only(response_format, {"type"}, "response_format")
        return None
    if kind == "json_object":
        _only(response_format, {"type"}, "response_format")
        return {"type": "object"}
    if kind != "json_schema":
        raise Refused(
            f"response_format.type is {str(kind)[:40]!r}: it is {TYPES}", param="response_format.type"
        )
    _only(response_format, {"type", "json_schema"}, "response_format")
    named = response_format.get("json_schema")
    if not isinstance(named, Mapping):
        raise Refused("response_format.json_schema is missing", param="response_format.json_schema")
    _only(named, {"name", "description", "schema", "strict"}, "response_format.json_schema")
    schema = named.get("schema", {"type": "object"})
    if not isinstance(schema, dict):
        raise Refused(
            "response_format.json_schema.schema is no object", param="response_format.json_schema.schema"
        )
    return schema


def _only(given: Mapping[str, Any], known: set[str], where: str) -> None:
    if more := sorted(set(given) - known):
        raise Refused(
            f"{where} has no field '{more[0][:80]}'", 400, "unknown_field", f"{where}.{more[0][:80]}"
        )


def _made(make: Callable[[], Constraint], param: str) -> Callable[[], Constraint]:
    try:
        make()  # what is wrong with it shows before anything is written
    except TypeError as error:
        raise Refused(f"{param} cannot be used: {error}", param=param) from None
    return make
