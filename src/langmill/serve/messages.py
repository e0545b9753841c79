"""/v1/messages: Anthropic's form of a conversation, whole and streamed, and /v1/messages/count_tokens.

It is made the messages that OpenAI's form has, and goes the same road.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from langmill.infer.sampling import Sampling
from langmill.serve.begun import ending_of
from langmill.serve.errors import STREAMED, Refused
from langmill.serve.job import Job, pieces_of
from langmill.serve.message_blocks import Blocks, Turn, tools_of, turns_of
from langmill.serve.models import Loaded
from langmill.serve.sampling_fields import drawn
from langmill.serve.schema import Asked
from langmill.serve.state import State
from langmill.serve.tool_reader import Piece
from langmill.serve.tools import ToolUse
from langmill.serve.turns import understood
from langmill.serve.writing import (
    Choice,
    Events,
    Usage,
    Wanted,
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

REASONS = {"stop": "end_turn", "length": "max_tokens"}


class Talk(Asked):
    """What both routes read. Prompts are remembered without being told to, so that cache_control changes nothing."""

    model: str
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: str | Blocks | None = None
    cache_control: dict[str, Any] | None = None
    tools: Blocks | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesAsked(Talk):
    """The conversation, and how to answer it."""

    max_tokens: int = Field(ge=1, le=1 << 24)
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    metadata: dict[str, Any] | None = None  # user_id may be null


class Said(BaseModel):
    """The answer, as blocks of text and of calls."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal[
        "end_turn", "max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use"
    ]
    stop_sequence: str | None
    usage: dict[str, int]


class Trouble(BaseModel):
    """An answer that is an error, in Anthropic's form."""

    type: Literal["error"]
    error: dict[str, str]
    request_id: str | None


class Counted(BaseModel):
    input_tokens: int


def router(state: State) -> APIRouter:
    """The routes over this state."""
    failures: dict[int | str, dict[str, Any]] = {"4XX": {"model": Trouble}, "5XX": {"model": Trouble}}
    made = APIRouter(tags=["writing"], responses=failures)

    @made.post("/v1/messages", response_model=Said, responses=STREAMED)
    async def messages(asked: MessagesAsked, request: Request) -> Response:
        """Answer a conversation in Anthropic's form."""
        job = await _job(state, asked)
        note(request, job.usage)
        if asked.stream:
            lines = _stream(state, job, key_of(request))
            return Events(lines, failed=lambda body: json_line(body, "error"))
        work = whole(state, job.loaded, job.wanted, key_of(request), job.usage)
        (choice,), usage = await attended(request, work)
        blocks = blocks_of(pieces_of(job.reader(), choice.text, choice.ids, last=True))
        called = any(block["type"] == "tool_use" for block in blocks)
        return JSONResponse(
            {**job.head, "content": blocks, **_ended(job, choice, called), "usage": _usage(usage)}
        )

    @made.post("/v1/messages/count_tokens", response_model=Counted)
    async def count_tokens(asked: Talk, request: Request) -> JSONResponse:
        """The tokens of a conversation, as the model reads it."""
        state.limits.check(key_of(request), 0)
        ids, _ = await _understood(state.models.find(asked.model, "chat"), asked)
        return JSONResponse({"input_tokens": len(ids)})

    return made


async def _job(state: State, asked: MessagesAsked) -> Job:
    loaded = state.models.find(asked.model, "chat")
    ids, use = await _understood(loaded, asked)
    fits = room(loaded, ids, None)
    sampling = Sampling(
        max_new_tokens=min(asked.max_tokens, fits),
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=asked.top_p or 1.0,
        top_k=asked.top_k or 0,
        seed=drawn(),
        stop=tuple(asked.stop_sequences or ()),
    )
    wanted = Wanted(ids, sampling, constraint=None if use is None else use.constraint)
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": loaded.name}
    return Job(loaded, wanted, use, head, usage_of([wanted]), asked.max_tokens > fits)


async def _understood(loaded: Loaded, asked: Talk) -> tuple[list[int], ToolUse | None]:
    if asked.thinking is not None and asked.thinking.get("type") != "disabled":
        raise Refused("thinking is not supported: leave it out", param="thinking")
    tools, choice, parallel = tools_of(asked.tools, asked.tool_choice)
    turns = turns_of(asked.messages, asked.system)
    ending = ending_of(turns, None, turns[-1]["role"] == "assistant")
    return await understood(loaded, turns, tools, choice, parallel, ending=ending)


def blocks_of(pieces: Sequence[Piece]) -> Blocks:
    """Pieces as blocks, in their order; a call whose arguments were cut off is given as the text that it is."""
    found: Blocks = []
    for piece in pieces:
        if piece.index is None:
            if not found or found[-1]["type"] != "text":
                found.append({"type": "text", "text": ""})
            found[-1]["text"] += piece.text
        elif piece.name is not None:
            found.append({"type": "tool_use", "id": piece.id, "name": piece.name, "input": piece.arguments})
        else:
            found[-1]["input"] += piece.arguments
    return [_read(block) if block["type"] == "tool_use" else block for block in found]


def _read(block: dict[str, Any]) -> dict[str, Any]:
    try:
        return {**block, "input": json.loads(block["input"] or "{}")}
    except ValueError:
        return {"type": "text", "text": json.dumps({"name": block["name"]}) + block["input"]}


def _ended(job: Job, choice: Choice, called: bool) -> dict[str, Any]:
    """Why the answer ended, and the stop sequence that ended it."""
    stops, tokenizer = job.wanted.sampling.stop, job.loaded.tokenizer
    reason, sequence = REASONS[choice.finish], None
    if choice.finish == "stop" and choice.ids and choice.ids[-1] not in tokenizer.stop_ids:
        text = tokenizer.decode(choice.ids)
        sequence = min(
            (stop for stop in stops if stop in text),
            key=lambda stop: text.find(stop) + len(stop),
            default=None,
        )
    if job.cut and choice.finish == "length":
        reason = "model_context_window_exceeded"
    if sequence is not None:
        reason = "stop_sequence"
    elif called and choice.finish == "stop":
        reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts what was remembered apart from what was read."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.written,
    }


async def _stream(state: State, job: Job, key: str | None) -> AsyncGenerator[bytes, None]:
    reader, choice, open_, called, begun = job.reader(), Choice(), list[str](), False, False
    async with aclosing(write(state, job.loaded, job.wanted, key)) as events:
        async for number, event in events:
            if not begun:
                begun = True
                start = _usage(Usage(job.usage.prompt, event.cached))
                message = {
                    **job.head,
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                    "usage": start,
                }
                yield _line("message_start", message=message)
                yield _line("ping")
            count(job.usage, number, event, [job.wanted])
            choice.ids += event.ids
            for piece in pieces_of(reader, event.text, event.ids, event.finish is not None):
                called = called or piece.index is not None
                for line in _block(piece, open_):
                    yield line
            if event.finish is not None:
                choice.finish = event.finish
    if open_:
        yield _line("content_block_stop", index=len(open_) - 1)
    yield _line("message_delta", delta=_ended(job, choice, called), usage=_usage(job.usage))
    yield _line("message_stop")


def _block(piece: Piece, open_: list[str]) -> list[bytes]:
    """The events of a piece. open_: the kinds of the blocks so far, of which the last one is open."""
    lines = []
    kind = "text" if piece.index is None else "tool_use"
    if not open_ or open_[-1] != kind or piece.name is not None:
        if open_:
            lines.append(_line("content_block_stop", index=len(open_) - 1))
        block = {"type": "text", "text": ""}
        if kind == "tool_use":
            block = {"type": kind, "id": piece.id, "name": piece.name, "input": {}}  # type: ignore[dict-item]
        open_.append(kind)
        lines.append(_line("content_block_start", index=len(open_) - 1, content_block=block))
    delta = (
        {"type": "text_delta", "text": piece.text}
        if kind == "text"
        else {"type": "input_json_delta", "partial_json": piece.arguments}
    )
    return [*lines, _line("content_block_delta", index=len(open_) - 1, delta=delta)]


def _line(name: str, **fields: Any) -> bytes:
    return json_line({"type": name, **fields}, name)
