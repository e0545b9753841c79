"""How requests say how to write: the fields that chats and completions share, OpenAI's and some of vLLM's."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from langmill.infer.sampling import Sampling
from langmill.serve.errors import Refused
from langmill.serve.formats import KINDS
from langmill.serve.models import Loaded
from langmill.serve.schema import Asked
from langmill.serve.state import State

Stops = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[str], Field(max_length=1024)]  # 50,000 take a quarter of a minute to read
MOST_STOPS = 16
MOST_LIKELY = 20  # alternatives to a token that are told, at most


class StreamOptions(BaseModel):
    """include_usage: one more event at the end tells the tokens of the whole request."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class StructuredOutputs(BaseModel):
    """vLLM's form of what may be written: one of a schema, a pattern, a list of texts, a grammar."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None


class Writing(Asked):
    """How to write. A field that is null is as if it were left out; a seed left out draws anew each time."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, le=1 << 24)
    min_tokens: int | None = Field(None, ge=0, le=1 << 24)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stops | Annotated[list[Stops], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None


def sampling_of(asked: Writing, limit: int, loaded: Loaded) -> Sampling:
    """How tokens are chosen, of which at most `limit` are written."""
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    return Sampling(
        max_new_tokens=limit,
        temperature=_or(asked.temperature, 1.0),
        top_k=max(_or(asked.top_k, 0), 0),
        top_p=_or(asked.top_p, 1.0),
        min_p=_or(asked.min_p, 0.0),
        repetition_penalty=_or(asked.repetition_penalty, 1.0),
        presence_penalty=_or(asked.presence_penalty, 0.0),
        frequency_penalty=_or(asked.frequency_penalty, 0.0),
        logit_bias=_biases(asked.logit_bias or {}, loaded.model.config.vocab),
        seed=drawn() if asked.seed is None else asked.seed % (1 << 63),
        stop=stop,
    )


def drawn() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(63)


def choices_of(asked: Writing, state: State) -> int:
    """How many answers to write to each prompt."""
    n, most = asked.n or 1, state.settings.max_choices
    if n > most:
        raise Refused(f"n is {n}: at most {most} answers are written at once", param="n")
    return n


def stops_of(asked: Writing, loaded: Loaded) -> frozenset[int] | None:
    """The ids that end an answer; None for the tokenizer's own."""
    if not asked.stop_token_ids and not asked.ignore_eos:
        return None
    return frozenset(asked.stop_token_ids or ()) | (
        frozenset() if asked.ignore_eos else loaded.tokenizer.stop_ids
    )


def guided(asked: Writing) -> dict[str, Any]:
    """vLLM's fields for what may be written, those that are there, by their names."""
    given = asked.model_dump(include={f"guided_{kind}" for kind in KINDS})
    new = asked.structured_outputs
    if new is not None:
        told = new.model_dump(by_alias=True)
        given |= {f"structured_outputs.{kind}": value for kind, value in told.items()}
        if not any(value is not None for value in told.values()):
            raise Refused(f"structured_outputs says none of {', '.join(told)}", param="structured_outputs")
    return {name: value for name, value in given.items() if value is not None}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _biases(given: dict[str, float], vocab: int) -> dict[int, float]:
    found = {}
    for name, by in given.items():
        if not (name.isascii() and name.isdecimal() and int(name[:10]) < vocab and len(name) <= 10):
            raise Refused(
                f"logit_bias names '{name[:40]}': its names are ids of tokens, 0 to {vocab - 1} for this model",
                param="logit_bias",
            )
        found[int(name)] = by
    return found
