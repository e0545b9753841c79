"""/v1/chat/completions: a model answers a conversation, through the one renderer of text/chat.py."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from langmill.infer.request import Likely
from langmill.serve.at_least import at_least
from langmill.serve.begun import ending_of
from langmill.serve.constraints import constraint_of
from langmill.serve.errors import FAILURES, STREAMED, Refused
from langmill.serve.job import Job, constrained, pieces_of
from langmill.serve.likely import as_chat, without_end
from langmill.serve.sampling_fields import MOST_LIKELY, Writing, choices_of, sampling_of, stops_of
from langmill.serve.state import State
from langmill.serve.tool_reader import Piece
from langmill.serve.turns import Message, plain, understood
from langmill.serve.writing import (
    DONE,
    Choice,
    Events,
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


class ChatAsked(Writing):
    """The conversation, and how to answer it."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 24)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LIKELY)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[Literal["text"]] | None = None


class Function(BaseModel):
    """What the model wants called; the arguments are JSON, as it wrote them."""

    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"]
    function: Function


class Answered(BaseModel):
    """What the model says: text, or calls of functions."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call] | None = None


class Answer(BaseModel):
    """One answer; `incomplete` says why it does not meet what its constraint asked for."""

    index: int
    message: Answered
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    incomplete: str | None = None


class ChatCompletion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Answer]
    usage: dict[str, Any]
    system_fingerprint: str


def router(state: State) -> APIRouter:
    """The route over this state."""
    made = APIRouter(tags=["writing"], responses=FAILURES)

    @made.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
    async def chat(asked: ChatAsked, request: Request) -> Response:
        """Answer a conversation, `n` times."""
        job = await _job(state, asked)
        note(request, job.usage)
        if asked.stream:
            return Events(_stream(state, job, asked, key_of(request)))
        work = whole(state, job.loaded, job.wanted, key_of(request), job.usage)
        choices, usage = await attended(request, work)
        answers = [_answer(job, number, choice) for number, choice in enumerate(choices)]
        head = {**job.head, "object": "chat.completion"}
        return JSONResponse({**head, "choices": answers, "usage": usage.as_dict()})

    return made


async def _job(state: State, asked: ChatAsked) -> Job:
    loaded, n = state.models.find(asked.model, "chat"), choices_of(asked, state)
    _check(asked)
    turns = plain(asked.messages, loaded.tokenizer.chat_template or "")
    ids, use = await understood(
        loaded, turns, asked.tools, asked.tool_choice, asked.parallel_tool_calls is not False,
        asked.chat_template_kwargs, ending_of(turns, asked.add_generation_prompt, asked.continue_final_message),
    )  # fmt: skip
    constraint = constrained(use, await constraint_of(loaded, asked), "response_format", "tool_choice")
    by_old_name = asked.max_completion_tokens is None
    name = "max_tokens" if by_old_name else "max_completion_tokens"
    limit = room(loaded, ids, asked.max_tokens if by_old_name else asked.max_completion_tokens, name)
    constraint = at_least(asked, limit, constraint)
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    wanted = Wanted(ids, sampling_of(asked, limit, loaded), n, logprobs, constraint, stops_of(asked, loaded))
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion.chunk", "created": int(time.time()),
        "model": loaded.name, "system_fingerprint": loaded.fingerprint,
    }  # fmt: skip
    return Job(loaded, wanted, use, head, usage_of([wanted]))


def _check(asked: ChatAsked) -> None:
    """What fields say to each other."""
    both = (asked.max_tokens, asked.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise Refused(
            "max_tokens and max_completion_tokens are two names of one limit: give one of them",
            param="max_tokens",
        )
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refused("top_logprobs needs logprobs: true", param="top_logprobs")
    if asked.stream_options is not None and not asked.stream:
        raise Refused("stream_options is for stream: true", param="stream_options")
    if asked.tools is None and asked.tool_choice not in (None, "none", "auto"):
        raise Refused("tool_choice needs tools to choose from", param="tool_choice")


def _answer(job: Job, number: int, choice: Choice) -> dict[str, Any]:
    text, calls = joined(pieces_of(job.reader(), choice.text, choice.ids, last=True))
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    finish: str = choice.finish
    if calls:
        message |= {"content": text or None, "tool_calls": calls}
        finish = "tool_calls" if finish == "stop" else finish
    made = {
        "index": number,
        "message": message,
        "logprobs": _logprobs(job, choice.ids, choice.likely),
        "finish_reason": finish,
    }
    return made if choice.reason is None else {**made, "incomplete": choice.reason}


def joined(pieces: Sequence[Piece]) -> tuple[str, list[dict[str, Any]]]:
    """The text of pieces, and the calls that they make up."""
    text, calls = "", list[dict[str, Any]]()
    for piece in pieces:
        if piece.index is None:
            text += piece.text
            continue
        if piece.index == len(calls):
            calls.append(
                {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
            )
        calls[piece.index]["function"]["arguments"] += piece.arguments
    return text, calls


def _logprobs(job: Job, ids: Sequence[int], likely: Sequence[Likely]) -> dict[str, Any] | None:
    if job.wanted.logprobs is None:
        return None
    own = job.wanted.stop_ids
    told = without_end(job.loaded.tokenizer.stop_ids if own is None else own, ids, likely)
    return {"content": as_chat(job.loaded.tokenizer, *told), "refusal": None}


async def _stream(state: State, job: Job, asked: ChatAsked, key: str | None) -> AsyncGenerator[bytes, None]:
    options, head = asked.stream_options, job.head
    more = {"usage": None} if options is not None and options.include_usage else {}
    readers = [job.reader() for _ in range(job.wanted.n)]
    called, begun = set[int](), set[int]()
    async with aclosing(write(state, job.loaded, job.wanted, key)) as events:
        async for number, event in events:
            count(job.usage, number, event, [job.wanted])
            pieces = pieces_of(readers[number], event.text, event.ids, event.finish is not None)
            deltas = [_delta(piece) for piece in pieces]
            if any("tool_calls" in delta for delta in deltas):
                called.add(number)
            if number not in begun:
                begun.add(number)
                deltas = [{"role": "assistant", "content": ""}, *deltas]
            logs = _logprobs(job, event.ids, event.likely)
            if logs is not None and logs["content"] and not deltas:
                deltas = [{}]
            for place, delta in enumerate(deltas):
                last = place == len(deltas) - 1
                one = {
                    "index": number,
                    "delta": delta,
                    "logprobs": logs if last else None,
                    "finish_reason": None,
                }
                yield json_line({**head, "choices": [one], **more})
            if event.finish is not None:
                finish = "tool_calls" if number in called and event.finish == "stop" else event.finish
                one = {"index": number, "delta": {}, "logprobs": None, "finish_reason": finish}
                if event.reason is not None:
                    one["incomplete"] = event.reason
                yield json_line({**head, "choices": [one], **more})
    if more:
        yield json_line({**head, "choices": [], "usage": job.usage.as_dict()})
    yield DONE


def _delta(piece: Piece) -> dict[str, Any]:
    if piece.index is None:
        return {"content": piece.text}
    call: dict[str, Any] = {"index": piece.index, "function": {"arguments": piece.arguments}}
    if piece.name is not None:
        call |= {"id": piece.id, "type": "function"}
        call["function"]["name"] = piece.name
    return {"tool_calls": [call]}
