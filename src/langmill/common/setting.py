"""What every group of settings is made of: the base class, counts with units, and settings of several commands."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgbt]i?)?b?", re.IGNORECASE)


def parse_count(text: str) -> int:
    """Read "10M", "1.5B", "64MiB" or "4096" as a number; ValueError where it is none."""
    match = _COUNT.fullmatch(text.strip().replace("_", ""))
    unit = (match[2] or "").lower() if match else ""
    if not match or unit not in _UNITS | _BINARY:
        raise ValueError(f"'{text}' is not a count: write 4096, 64M (64 million) or 64MiB (64 x 2^20)")
    return round(float(match[1]) * (_UNITS | _BINARY)[unit])


def _count(value: Any) -> Any:
    return parse_count(value) if isinstance(value, str) else value


Count = Annotated[int, BeforeValidator(_count)]

# Settings of several commands, said once.
Seed = Annotated[int, Field(ge=0, lt=2**63, description="fixes every random choice")]
Device = Annotated[str, Field(description="cpu, cuda, cuda:1 or mps; auto: a GPU where there is one")]
Threads = Annotated[int | None, Field(ge=1, description="CPU threads; none: one for each physical core")]
UseDtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Field(
        description="number type; auto: the file's own on a GPU; on a CPU float32, where matrices in Q4_0, Q4_1 and "
        "Q4_K of a .gguf file stay in 4 bits (not GPT-2's, nor under an adapter)"
    ),
]
VocabularySize = Annotated[
    Count | None,
    Field(ge=260, le=1_000_000, description="entries in the vocabulary; none: chosen from the text's size"),
]
SampleBytes = Annotated[Count, Field(ge=1, description="bytes of text to train on, spread over all of it")]


class Settings(BaseModel):
    """Base: unknown keys are errors, values are fixed once made, NaN and infinity are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_by_name=True,
        validate_by_alias=True,
        validate_default=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        defer_build=True,  # a command reads few of all classes
    )
