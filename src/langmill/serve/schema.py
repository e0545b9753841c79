"""What requests may say: every field is read, is known to change nothing, or is refused by name."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Asked(BaseModel):
    """Base of all request bodies: a field that is not known is an error with a suggestion, and types are not guessed.
    One that is null says nothing, so that it may have any name: clients send those that their users left out.

    Its own fields are those that clients send and that change nothing: nothing is stored, billed or cached by them.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    store: Literal[False] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        names = {info.alias or name for name, info in cls.model_fields.items()}
        given = {field: what for field, what in value.items() if what is not None or field in names}
        for field in given:
            if field not in names:
                near = difflib.get_close_matches(str(field), names, 1, 0.7)
                hint = f": did you mean '{near[0]}'?" if near else ""
                raise PydanticCustomError(
                    "unknown_field",
                    "there is no field '{field}' here{hint}",
                    {"field": str(field), "hint": hint},
                )
        return given
