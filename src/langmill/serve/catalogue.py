"""/v1/models: what is served here, in one form that OpenAI's clients and Anthropic's both read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from langmill.serve.errors import FAILURES
from langmill.serve.models import Loaded
from langmill.serve.state import State


class Card(BaseModel):
    """A model: `does` says what, `max_model_len` the tokens of its context; parent: the model that it is an adapter
    of."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["langmill"]
    type: Literal["model"]
    display_name: str
    created_at: str
    does: list[str]
    max_model_len: int
    parent: str | None = None


class Cards(BaseModel):
    object: Literal["list"]
    data: list[Card]
    has_more: Literal[False]
    first_id: str
    last_id: str


def router(state: State) -> APIRouter:
    """The routes over this state."""
    made = APIRouter(tags=["models"], responses=FAILURES)

    @made.get("/v1/models", response_model=Cards)
    async def models() -> JSONResponse:
        """All models that are served, the first one first."""
        data = [card(one) for one in state.models.names()]
        ends = {"has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
        return JSONResponse({"object": "list", "data": data, **ends})

    @made.get("/v1/models/{name:path}", response_model=Card)
    async def model(name: str) -> JSONResponse:
        """One model."""
        return JSONResponse(card(state.models.named(name)))

    return made


def card(loaded: Loaded) -> dict[str, Any]:
    """A model as a `Card`."""
    return {
        "id": loaded.name, "object": "model", "created": loaded.created, "owned_by": "langmill",
        "does": sorted(loaded.does), "max_model_len": loaded.window, "type": "model", "display_name": loaded.name,
        "created_at": datetime.fromtimestamp(loaded.created, UTC).isoformat(),
        "parent": None if loaded.parent is None else loaded.parent.name,
    }  # fmt: skip
