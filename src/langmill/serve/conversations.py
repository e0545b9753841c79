"""/api/conversations: what the page keeps on the server, and how it asks for answers.

A user's message is kept before anything is written; the answer when it ends, or as far as it came.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from langmill.infer.request import Event
from langmill.serve.errors import FAILURES, Refused
from langmill.serve.history import Conversation, History, Message
from langmill.serve.likely import token_text, without_end
from langmill.serve.line import Line
from langmill.serve.markdown import Blocks, render
from langmill.serve.models import Loaded
from langmill.serve.sampling_fields import Writing, sampling_of
from langmill.serve.schema import Asked
from langmill.serve.state import State
from langmill.serve.turns import prompt_of, size_of
from langmill.serve.writing import (
    Events,
    Usage,
    Wanted,
    aside,
    count,
    json_line,
    key_of,
    note,
    room,
    to_its_end,
    usage_of,
    write,
)

PAGE = 100  # conversations that a list tells at once
SEARCHES = 16  # that wait for their turn
OTHERS = 5  # likeliest tokens that are kept with each one that was written
FORMAT = {"format": "langmill-conversation", "version": 1}


class TitleAsked(Asked):
    """What a conversation is called."""

    title: str = Field("", max_length=200)


class HowAsked(Asked):
    """How to answer: the model, its system message, how tokens are chosen, and whether their probabilities are kept."""

    model: str
    system: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    max_tokens: int | None = Field(None, ge=1, le=1 << 24)
    seed: int | None = Field(None, ge=0, lt=1 << 53)
    likely: bool = True

    def settings(self) -> dict[str, Any]:
        """As they are kept with a message."""
        names = (
            "system", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class MessageAsked(HowAsked):
    """What the user says. parent: the answer that it follows, null for a first message."""

    content: str = Field(min_length=1)
    parent: int | None = None


@dataclass
class Answering:
    """An answer on its way."""

    history: History
    owner: str
    id: str
    loaded: Loaded
    wanted: Wanted
    answer: Message  # what is known of it before it is written
    usage: Usage
    text: str = ""
    likely: list[Any] = field(default_factory=list)
    blocks: Blocks = field(default_factory=Blocks)

    def take(self, event: Event) -> dict[str, Any]:
        """Add an event; what it changes in the page."""
        count(self.usage, 0, event, [self.wanted])
        self.text += event.text
        if self.wanted.logprobs is not None:
            ends = without_end(self.loaded.tokenizer.stop_ids, event.ids, event.likely)
            self.likely += [
                [
                    self._text(id),
                    _share(one.log),
                    [[self._text(other), _share(log)] for other, log in one.top],
                ]
                for id, one in zip(*ends, strict=True)
            ]
        html = self.blocks.push(event.text)
        return {"html": html, "rest": self.blocks.rest} if html else {"text": event.text}

    def keep(self, finish: str, seconds: float) -> Message | None:
        """Keep what was written; None where there is nothing to keep, or the conversation is gone."""
        if not self.text and finish not in ("stop", "length"):
            return None
        answer = replace(
            self.answer,
            content=self.text,
            finish=finish,
            tokens=self.usage.written,
            seconds=round(seconds, 3),
        )
        with contextlib.suppress(Refused):
            return self.history.add(self.owner, self.id, answer, self.likely or None)
        return None

    def _text(self, id: int) -> str:
        return token_text(self.loaded.tokenizer, id)


def router(state: State) -> APIRouter:
    """The routes over this state; none where no conversations are kept."""
    made = APIRouter(prefix="/api/conversations", tags=["page"], responses=FAILURES)
    if state.history is None:
        return made
    history = state.history
    _add_keeping(made, history)

    @made.post("/{id}/messages")
    async def say(id: str, asked: MessageAsked, request: Request) -> Response:
        """Keep a user's message and answer it, as events: {user}, {text} or {html, rest} as it is written, {done}."""
        owner = owner_of(request)
        before = await asyncio.to_thread(history.path, owner, id, asked.parent)
        user = Message("user", asked.content, asked.parent, asked.model, asked.settings())
        answering = await _prepared(state, history, owner, id, [*before, user], asked)
        user = await asyncio.to_thread(history.add, owner, id, user)
        answering.answer = replace(answering.answer, parent=user.number)
        note(request, answering.usage)
        return Events(_answered(state, answering, key_of(request), {"user": shown(user)}))

    @made.post("/{id}/messages/{number}/retry")
    async def retry(id: str, number: int, asked: HowAsked, request: Request) -> Response:
        """Answer a user's message again, or write another answer beside this one, as events."""
        owner = owner_of(request)
        turns = await asyncio.to_thread(history.path, owner, id, number)
        turns = turns[:-1] if turns[-1].role == "assistant" else turns
        answering = await _prepared(state, history, owner, id, turns, asked)
        note(request, answering.usage)
        return Events(_answered(state, answering, key_of(request), {"user": shown(turns[-1])}))

    return made


def _add_keeping(made: APIRouter, history: History) -> None:
    """The routes that only read and change what is kept; as plain functions they run in threads."""
    searches = Line(SEARCHES, "searches")  # each reads everything: together they would take all threads

    @made.get("")
    async def listed(
        request: Request, search: str = "", offset: Annotated[int, Query(ge=0, lt=1 << 63)] = 0
    ) -> JSONResponse:
        """The client's conversations, the last changed first; `lasting`: whether they outlive the server."""
        look = partial(history.all, owner_of(request), search.strip(), offset, PAGE)
        async with searches.turn(1) if search.strip() else contextlib.nullcontext():
            found, more = await to_its_end(look)
        lasting = history.file is not None
        return JSONResponse({"data": [one.as_dict() for one in found], "more": more, "lasting": lasting})

    @made.post("", status_code=201)
    def make(asked: TitleAsked, request: Request) -> JSONResponse:
        """A new conversation."""
        return JSONResponse(history.make(owner_of(request), asked.title.strip()).as_dict(), 201)

    @made.get("/{id}")
    def tree(id: str, request: Request) -> JSONResponse:
        """A conversation with all its messages, answers with their HTML."""
        owner = owner_of(request)
        found, messages = history.find(owner, id), history.messages(owner, id)
        return JSONResponse({**found.as_dict(), "messages": [shown(one) for one in messages]})

    @made.patch("/{id}")
    def rename(id: str, asked: TitleAsked, request: Request) -> JSONResponse:
        """Give it another title."""
        if not asked.title.strip():
            raise Refused("title is empty: give it a name", param="title")
        return JSONResponse(history.rename(owner_of(request), id, asked.title.strip()).as_dict())

    @made.delete("/{id}", status_code=204)
    def delete(id: str, request: Request) -> Response:
        """Remove it for good."""
        history.delete(owner_of(request), id)
        return Response(status_code=204)

    @made.get("/{id}/export")
    def export(
        id: str, request: Request, form: Literal["json", "markdown"] = "json", leaf: int | None = None
    ) -> Response:
        """As a file: the whole tree as JSON, or the branch up to `leaf` (none: the newest message) as Markdown."""
        owner = owner_of(request)
        found, messages = history.find(owner, id), history.messages(owner, id)
        head = {
            "Content-Disposition": f'attachment; filename="conversation-{id}.{form[:4].replace("mark", "md")}"'
        }
        if form == "json":
            told = {**FORMAT, **found.as_dict(), "messages": [one.as_dict() for one in messages]}
            return JSONResponse(told, headers=head)
        last = leaf if leaf is not None or not messages else messages[-1].number
        text = as_markdown(found, history.path(owner, id, last))
        return Response(text, headers=head, media_type="text/markdown")


def owner_of(request: Request) -> str:
    """Whose conversations a request may see."""
    return key_of(request) or ""


def shown(message: Message) -> dict[str, Any]:
    """A message as the page shows it: an answer with its HTML."""
    told = message.as_dict()
    return told if message.role == "user" else {**told, "html": render(message.content)}


def as_markdown(conversation: Conversation, path: Sequence[Message]) -> str:
    """One branch, to be read."""
    parts = [f"# {conversation.title or 'Conversation'}"]
    system = path[-1].settings.get("system") if path else None
    if system:
        parts.append(f"**System**\n\n{system}")
    for one in path:
        parts.append(f"**{'User' if one.role == 'user' else one.model or 'Assistant'}**\n\n{one.content}")
    return "\n\n".join(parts) + "\n"


async def _prepared(
    state: State, history: History, owner: str, id: str, turns: Sequence[Message], asked: HowAsked
) -> Answering:
    """Everything that can be wrong with a request is found here, before anything is kept."""
    loaded = state.models.find(asked.model, "chat")
    messages = [{"role": one.role, "content": one.content} for one in turns]
    if asked.system:
        messages.insert(0, {"role": "system", "content": asked.system})
    ids = await aside(loaded, size_of(messages), lambda: prompt_of(loaded, messages))
    limit = room(loaded, ids, asked.max_tokens)
    chosen = asked.settings()
    chosen.setdefault("seed", secrets.randbits(32))  # kept with the answer, so that it can be had again
    fields = {name: value for name, value in chosen.items() if name != "system"}
    sampling = sampling_of(Writing(model=asked.model, **fields), limit, loaded)
    wanted = Wanted(ids, sampling, logprobs=OTHERS if asked.likely else None)
    answer = Message("assistant", "", turns[-1].number, loaded.name, chosen)
    return Answering(history, owner, id, loaded, wanted, answer, usage_of([wanted]))


async def _answered(
    state: State, answering: Answering, key: str | None, first: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    began, finish, kept = time.perf_counter(), "cancelled", None
    try:
        yield json_line(first)
        async with aclosing(write(state, answering.loaded, answering.wanted, key)) as events:
            async for _, event in events:
                yield json_line({**answering.take(event), "tokens": answering.usage.written})
                finish = event.finish or finish
    except Exception:
        finish = "error"
        raise
    finally:  # not in a thread: a client that has gone cancels whatever would be waited for here
        kept = answering.keep(finish, time.perf_counter() - began)
    if kept is None:
        raise Refused("the conversation was deleted while it was answered", 404, "no_such_conversation")
    usage = answering.usage
    context = {"used": usage.prompt + usage.written, "window": answering.loaded.window}
    yield json_line({"done": shown(kept), "context": context})


def _share(log: float) -> float:
    """A probability from its logarithm, as short as it is of use."""
    return float(f"{math.exp(log):.4g}")
