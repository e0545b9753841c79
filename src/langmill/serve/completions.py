"""/v1/completions: a model goes on from prompts, given as text or as ids."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from langmill.common.errors import ModelError
from langmill.infer.request import Likely
from langmill.model.config import gap_order
from langmill.serve.at_least import at_least
from langmill.serve.constraints import constraint_of
from langmill.serve.errors import FAILURES, STREAMED, Refused
from langmill.serve.likely import Offsets, as_completion
from langmill.serve.models import Loaded
from langmill.serve.sampling_fields import (
    MOST_LIKELY,
    Writing,
    choices_of,
    sampling_of,
    stops_of,
)
from langmill.serve.state import State
from langmill.serve.writing import (
    DONE,
    Choice,
    Events,
    Usage,
    Wanted,
    aside,
    attended,
    count,
    json_line,
    key_of,
    note,
    room,
    usage_of,
    whole,
    write,
)
from langmill.text.infill import gap_ids

Ids = Annotated[list[int], Field(min_length=1)]
MOST_PROMPTS = 1024
WRITTEN = 16  # tokens where nothing is said, as OpenAI has it


class CompletionAsked(Writing):
    """What to go on from, and how. max_tokens 0, with `echo`, tells of the prompt alone."""

    max_tokens: int | None = Field(None, ge=0, le=1 << 24)
    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LIKELY)
    best_of: int | None = None
    suffix: str | None = None


class Columns(BaseModel):
    """Log-probabilities of tokens, in nats, null for a text's first one; `text_offset` is where each begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Text(BaseModel):
    """One answer; `incomplete` says why it does not meet what its constraint asked for."""

    index: int
    text: str
    logprobs: Columns | None
    finish_reason: Literal["stop", "length"] | None
    incomplete: str | None = None


class Completion(BaseModel):
    """The answers to all prompts, in their order."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Text]
    usage: dict[str, Any]
    system_fingerprint: str


@dataclass(frozen=True)
class Job:
    """A request understood. before: what stands in front of each answer, where the prompt is echoed."""

    loaded: Loaded
    wanted: Sequence[Wanted]
    before: Sequence[str]
    head: dict[str, Any]
    usage: Usage


def router(state: State) -> APIRouter:
    """The route over this state."""
    made = APIRouter(tags=["writing"], responses=FAILURES)

    @made.post("/v1/completions", response_model=Completion, responses=STREAMED)
    async def complete(asked: CompletionAsked, request: Request) -> Response:
        """Go on from each prompt, with `n` answers to each."""
        job = await _job(state, asked)
        note(request, job.usage)
        if asked.stream:
            return Events(_stream(state, job, asked, key_of(request)))
        work = whole(state, job.loaded, job.wanted, key_of(request), job.usage)
        choices, usage = await attended(request, work)
        texts = [_whole(job, number, choice) for number, choice in enumerate(choices)]
        return JSONResponse({**job.head, "choices": texts, "usage": usage.as_dict()})

    return made


async def _job(state: State, asked: CompletionAsked) -> Job:
    loaded, n = state.models.find(asked.model, "write"), choices_of(asked, state)
    if asked.suffix and asked.echo:
        raise Refused("echo is for what goes on, not for a gap: leave echo or suffix out", param="suffix")
    if asked.best_of is not None and asked.best_of != n:
        raise Refused("best_of is not supported: ask for n answers and choose among them", param="best_of")
    if asked.stream_options is not None and not asked.stream:
        raise Refused("stream_options is for stream: true", param="stream_options")
    if asked.max_tokens == 0 and not asked.echo:
        raise Refused(
            "max_tokens is 0, which tells nothing without echo: true: give 1 or more", param="max_tokens"
        )
    prompts = await aside(loaded, _size(asked), lambda: _prompts(asked, loaded))
    constraint = await constraint_of(loaded, asked)
    most = WRITTEN if asked.max_tokens is None and constraint is None else 1 << 24
    mute, stops = asked.max_tokens == 0, stops_of(asked, loaded)
    scored, wanted = bool(asked.echo) and asked.logprobs is not None, []
    for ids, _ in prompts:
        limit = min(most, room(loaded, ids, asked.max_tokens))
        held = at_least(asked, limit, None if mute else constraint)
        sampling = sampling_of(asked, max(limit, 1), loaded)
        wanted.append(Wanted(ids, sampling, n, asked.logprobs, held, stops, scored=scored, mute=mute))
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
        "model": loaded.name, "system_fingerprint": loaded.fingerprint,
    }  # fmt: skip
    before = [text if asked.echo else "" for _, text in prompts for _ in range(n)]
    return Job(loaded, wanted, before, head, usage_of(wanted))


def _prompts(asked: CompletionAsked, loaded: Loaded) -> list[tuple[list[int], str]]:
    """The ids and the text of each prompt; with a suffix the ids of the gap between both."""
    given, tokenizer = asked.prompt, loaded.tokenizer
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]  # type: ignore[assignment]
    found = []
    for one in given:
        if isinstance(one, str):
            found.append(
                (_gap(loaded, one, asked.suffix) if asked.suffix else tokenizer.prompt_ids(one), one)
            )
            continue
        if asked.suffix:
            raise Refused("suffix stands behind a text, and the prompt is ids", param="suffix")
        assert isinstance(one, list)
        if not all(0 <= id < loaded.model.config.vocab for id in one):
            raise Refused(
                f"the prompt holds ids of no token: this model knows 0 to {loaded.model.config.vocab - 1}",
                param="prompt",
            )
        shown = asked.echo and len(one) <= loaded.window  # a longer one is refused
        found.append((one, tokenizer.decode(one) if shown else ""))
    return found


def _gap(loaded: Loaded, before: str, after: str) -> list[int]:
    assert loaded.tokenizer is not None
    try:
        return gap_ids(loaded.tokenizer, before, after, gap_order(loaded.model.config))
    except ModelError as error:
        raise Refused(str(error), param="suffix") from None


def _size(asked: CompletionAsked) -> int:
    texts = (
        [asked.prompt] if isinstance(asked.prompt, str) else [x for x in asked.prompt if isinstance(x, str)]
    )
    return sum(len(text) + len(asked.suffix or "") for text in texts)


def _whole(job: Job, number: int, choice: Choice) -> dict[str, Any]:
    columns = _columns(job, number, choice.ids, choice.likely, choice.prompt, Offsets())
    return _text(number, job.before[number] + choice.text, columns, choice.finish, choice.reason)


def _text(
    number: int, text: str, columns: dict[str, Any] | None, finish: str | None, reason: str | None
) -> dict[str, Any]:
    made = {"index": number, "text": text, "logprobs": columns, "finish_reason": finish}
    return made if reason is None else {**made, "incomplete": reason}


async def _stream(
    state: State, job: Job, asked: CompletionAsked, key: str | None
) -> AsyncGenerator[bytes, None]:
    options, head = asked.stream_options, job.head
    more = {"usage": None} if options is not None and options.include_usage else {}
    offsets, begun = [Offsets() for _ in job.before], set[int]()
    async with aclosing(write(state, job.loaded, job.wanted, key)) as events:
        async for number, event in events:
            count(job.usage, number, event, job.wanted)
            first = number not in begun
            begun.add(number)
            if event.text or event.likely or event.finish is not None or first:
                text = (job.before[number] if first else "") + event.text
                prompt = event.prompt if first else None
                columns = _columns(job, number, event.ids, event.likely, prompt, offsets[number])
                one = _text(number, text, columns, event.finish, event.reason)
                yield json_line({**head, "choices": [one], **more})
    if more:
        yield json_line({**head, "choices": [], "usage": job.usage.as_dict()})
    yield DONE


def _columns(
    job: Job, number: int, ids: Sequence[int], likely: Sequence[Likely], prompt: Sequence[Likely] | None,
    offsets: Offsets,
) -> dict[str, Any] | None:  # fmt: skip
    """The log-probabilities of an answer, or of a part of it; behind those of the prompt in front of it, where the
    prompt is echoed and the part is the first one (`prompt` is not None). An id that ended the answer is told too, as
    vLLM does: harnesses that score a prompt cut off as many tokens as they asked for."""
    tokenizer, one = job.loaded.tokenizer, job.wanted[number // job.wanted[0].n]
    if one.logprobs is None:
        return None
    before = prompt if one.scored else None
    if before is None:
        return as_completion(tokenizer, ids, likely, offsets)
    return as_completion(tokenizer, [*one.prompt, *ids], [None, *before, *likely], offsets)
