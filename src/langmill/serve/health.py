"""/health: whether the process lives, and whether it takes requests."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from langmill.serve.errors import FAILURES, stopping
from langmill.serve.state import State


class Health(BaseModel):
    status: Literal["ok"]


def router(state: State) -> APIRouter:
    """The routes: a server listens only once its models are loaded, so that an answer says they are."""
    made = APIRouter(tags=["server"], responses=FAILURES)

    @made.get("/health", response_model=Health)
    @made.get("/health/ready", response_model=Health)
    async def ready(request: Request) -> JSONResponse:
        """200 while requests are taken; 503 once the server is stopping."""
        server = getattr(request.app.state, "server", None)
        if server is not None and server.should_exit:
            raise stopping()
        return JSONResponse({"status": "ok"})

    @made.get("/health/live", response_model=Health)
    async def live() -> JSONResponse:
        """200 while the process answers at all."""
        return JSONResponse({"status": "ok"})

    return made
