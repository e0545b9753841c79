"""/v1/models: what is served here."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from langmill.serve.errors import FAILURES
from langmill.serve.models import Loaded
from langmill.serve.state import State


class Card(BaseModel):
    """A model: `does` says what, `max_model_len` the tokens of its context."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["langmill"]
    does: list[str]
    max_model_len: int


class Cards(BaseModel):
    object: Literal["list"]
    data: list[Card]


def router(state: State) -> APIRouter:
    """The routes over this state."""
    made = APIRouter(tags=["models"], responses=FAILURES)

    @made.get("/v1/models", response_model=Cards)
    async def models() -> JSONResponse:
        """All models that are served, the first one first."""
        return JSONResponse({"object": "list", "data": [card(one) for one in state.models.names()]})

    @made.get("/v1/models/{name:path}", response_model=Card)
    async def model(name: str) -> JSONResponse:
        """One model."""
        return JSONResponse(card(state.models.named(name)))

    return made


def card(loaded: Loaded) -> dict[str, Any]:
    """A model as a `Card`."""
    return {
        "id": loaded.name, "object": "model", "created": loaded.created, "owned_by": "langmill",
        "does": sorted(loaded.does), "max_model_len": loaded.window,
    }  # fmt: skip
