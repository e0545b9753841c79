"""/v1/responses: OpenAI's newer form of a conversation, whole and streamed. Nothing is kept between requests."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from langmill.infer.sampling import Sampling
from langmill.serve.constraints import made
from langmill.serve.errors import FAILURES, STREAMED, Refused
from langmill.serve.formats import RESPONSES
from langmill.serve.job import Job, constrained, pieces_of
from langmill.serve.response_items import format_of, messages_of, tools_of
from langmill.serve.sampling_fields import drawn
from langmill.serve.schema import Asked
from langmill.serve.state import State
from langmill.serve.tool_reader import Piece
from langmill.serve.turns import understood
from langmill.serve.writing import (
    Events,
    Wanted,
    attended,
    count,
    json_line,
    key_of,
    note,
    room,
    usage_of,
    write,
)

Objects = list[dict[str, Any]]


class ResponseAsked(Asked):
    """The conversation, as a text or as items, and how to answer it."""

    model: str
    input: str | Annotated[Objects, Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=1 << 24)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    text: dict[str, Any] | None = None
    tools: Objects | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    store: bool | None = None  # type: ignore[assignment]
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None


class Said(BaseModel):
    """The answer: `output` holds messages and function calls."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    model: str
    output: Objects
    store: Literal[False]
    usage: dict[str, Any]


@dataclass
class Answer:
    """What is written so far, and the events that tell of it. open: whether the last item goes on."""

    output: Objects = field(default_factory=list)
    open: bool = False

    def take(self, piece: Piece) -> list[tuple[str, dict[str, Any]]]:
        """Add a piece of text or of a call."""
        kind = "message" if piece.index is None else "function_call"
        told = []
        if not self.open or self.output[-1]["type"] != kind or piece.name is not None:
            told = [*self.close(), *self._begin(kind, piece)]
        item, place = self.output[-1], len(self.output) - 1
        where = {"item_id": item["id"], "output_index": place}
        if kind == "function_call":
            item["arguments"] += piece.arguments
            return [*told, ("response.function_call_arguments.delta", {**where, "delta": piece.arguments})]
        item["content"][0]["text"] += piece.text
        delta = {**where, "content_index": 0, "delta": piece.text, "logprobs": []}
        return [*told, ("response.output_text.delta", delta)]

    def _begin(self, kind: str, piece: Piece) -> list[tuple[str, dict[str, Any]]]:
        self.open, place = True, len(self.output)
        if kind == "function_call":
            item = {
                "id": f"fc_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", "call_id": piece.id,
                "name": piece.name, "arguments": "",
            }  # fmt: skip
            self.output.append(item)
            return [("response.output_item.added", {"output_index": place, "item": dict(item)})]
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"id": f"msg_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", "role": "assistant"}
        self.output.append({**item, "content": [part]})
        where = {"item_id": item["id"], "output_index": place, "content_index": 0}
        return [
            ("response.output_item.added", {"output_index": place, "item": {**item, "content": []}}),
            ("response.content_part.added", {**where, "part": dict(part)}),
        ]

    def close(self, status: str = "completed") -> list[tuple[str, dict[str, Any]]]:
        """End the last item."""
        if not self.open:
            return []
        self.open, item, place = False, self.output[-1], len(self.output) - 1
        item["status"] = status
        done = ("response.output_item.done", {"output_index": place, "item": item})
        where = {"item_id": item["id"], "output_index": place}
        if item["type"] == "function_call":
            told = {**where, "arguments": item["arguments"], "name": item["name"]}
            return [("response.function_call_arguments.done", told), done]
        (part,) = item["content"]
        where = {**where, "content_index": 0}
        return [
            ("response.output_text.done", {**where, "text": part["text"], "logprobs": []}),
            ("response.content_part.done", {**where, "part": part}),
            done,
        ]


def router(state: State) -> APIRouter:
    """The route over this state."""
    routes = APIRouter(tags=["writing"], responses=FAILURES)

    @routes.post("/v1/responses", response_model=Said, responses=STREAMED)
    async def respond(asked: ResponseAsked, request: Request) -> Response:
        """Answer a conversation in the form of OpenAI's Responses."""
        job = await _job(state, asked)
        note(request, job.usage)
        told = _told(state, job, key_of(request))
        if asked.stream:
            return Events(_lines(told), failed=_failed)
        return JSONResponse(await attended(request, _last(told)))

    return routes


async def _job(state: State, asked: ResponseAsked) -> Job:
    loaded = state.models.find(asked.model, "chat")
    if asked.store or asked.previous_response_id is not None:
        param = "store" if asked.store else "previous_response_id"
        raise Refused(
            f"nothing is kept here, so {param} cannot be served: send the whole conversation", param=param
        )
    tools, choice = tools_of(asked.tools or [], asked.tool_choice)
    ids, use = await understood(
        loaded,
        messages_of(asked.input, asked.instructions),
        tools,
        choice,
        asked.parallel_tool_calls is not False,
    )
    limit = room(loaded, ids, asked.max_output_tokens, "max_output_tokens")
    format = await made(loaded, format_of(asked.text), where=RESPONSES)
    constraint = constrained(use, format, RESPONSES, "text")
    temperature, top_p = _or(asked.temperature, 1.0), _or(asked.top_p, 1.0)
    sampling = Sampling(max_new_tokens=limit, temperature=temperature, top_p=top_p, seed=drawn())
    wanted = Wanted(ids, sampling, constraint=constraint)
    head = {
        "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), "error": None,
        "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens, "model": loaded.name,
        "parallel_tool_calls": asked.parallel_tool_calls is not False, "previous_response_id": None, "store": False,
        "temperature": temperature, "top_p": top_p, "text": asked.text or {"format": {"type": "text"}},
        "tool_choice": asked.tool_choice or "auto", "tools": asked.tools or [], "truncation": "disabled",
        "metadata": asked.metadata or {}, "user": asked.user,
    }  # fmt: skip
    return Job(loaded, wanted, use, head, usage_of([wanted]))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


async def _told(state: State, job: Job, key: str | None) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    """The events of an answer, from response.created to its end."""
    reader, answer, finish, begun = job.reader(), Answer(), "stop", False
    async with aclosing(write(state, job.loaded, job.wanted, key)) as events:
        async for number, event in events:
            if not begun:
                begun = True
                for name in ("response.created", "response.in_progress"):
                    yield name, {"response": _response(job, Answer(), "in_progress", None)}
            count(job.usage, number, event, [job.wanted])
            for piece in pieces_of(reader, event.text, event.ids, event.finish is not None):
                for told in answer.take(piece):
                    yield told
            finish = event.finish or finish
    status = "incomplete" if finish == "length" else "completed"
    for told in answer.close(status):
        yield told
    details = {"reason": "max_output_tokens"} if status == "incomplete" else None
    yield f"response.{status}", {"response": _response(job, answer, status, details)}


def _response(job: Job, answer: Answer, status: str, details: Mapping[str, str] | None) -> dict[str, Any]:
    usage = {
        "input_tokens": job.usage.prompt,
        "input_tokens_details": {"cached_tokens": job.usage.cached, "cache_write_tokens": 0},
        "output_tokens": job.usage.written, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": job.usage.prompt + job.usage.written,
    }  # fmt: skip
    ended = None if status == "in_progress" else usage
    return {
        **job.head,
        "status": status,
        "incomplete_details": details,
        "output": answer.output,
        "usage": ended,
    }


async def _lines(told: AsyncGenerator[tuple[str, dict[str, Any]], None]) -> AsyncGenerator[bytes, None]:
    number = 0
    async with aclosing(told) as events:
        async for name, fields in events:
            yield json_line({"type": name, **fields, "sequence_number": number}, name)
            number += 1


async def _last(told: AsyncGenerator[tuple[str, dict[str, Any]], None]) -> dict[str, Any]:
    response: dict[str, Any] = {}
    async with aclosing(told) as events:
        async for _, fields in events:
            response = fields.get("response", response)
    return response


def _failed(body: dict[str, Any]) -> bytes:
    error = body["error"]
    told = {"code": error["code"] or error["type"], "message": error["message"], "param": error["param"]}
    return json_line({"type": "error", **told, "sequence_number": 0}, "error")
