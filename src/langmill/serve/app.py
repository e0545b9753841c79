"""The web application: its routes, and what stands before them. Everything it works with is in its `State`."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from langmill import __version__
from langmill.serve import (
    catalogue,
    chat,
    completions,
    connections,
    conversations,
    embeddings,
    errors,
    headers,
    health,
    hosts,
    keys,
    limits,
    logs,
    messages,
    metrics,
    page,
    rerank,
    responses,
    tasks,
    tokens,
    tokens_view,
)
from langmill.serve.state import State

LOG = logging.getLogger("langmill.serve")


class Caught:
    """Turns what a route raises without meaning to into an answer, and its traceback into a line of the log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:  # the time to drain is over
            if started or scope["type"] != "http":
                raise
            await errors.response(errors.stopping(), scope)(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http":
                raise
            if errors.refusal_of(error).status >= 500:
                LOG.error("%s failed", scope["path"], exc_info=error)
            if started:
                raise
            await errors.response(error, scope)(scope, receive, send)


def create_app(state: State) -> FastAPI:
    """The application over this state."""
    # Whatever the environment says: refused bodies, with their texts, would be told too. What is too old ignores it.
    silent: Any = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)
    app = FastAPI(
        title="Langmill", version=__version__, description="Models of one's own, by OpenAI's routes.",
        docs_url=None, redoc_url=None,  # these pages would come from other hosts
        telemetry=silent,
    )  # fmt: skip
    errors.handlers(app, state.metrics.refused)
    writing = (catalogue, chat, completions, messages, responses, tokens)
    for routes in (*writing, embeddings, rerank, tasks, health, metrics, conversations, tokens_view, page):
        app.include_router(routes.router(state))
    app.add_middleware(Caught)
    for door in (
        limits.Told,
        keys.Authorise,
        limits.Bodies,
        hosts.Hosts,
        headers.Headers,
        logs.Logs,
        connections.Pieces,
    ):  # the last is outermost
        app.add_middleware(door, state=state)
    return app
