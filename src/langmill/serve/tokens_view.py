"""/api/conversations/…/tokens: how sure the model was of each token that it wrote, and what else it weighed."""

from __future__ import annotations

from math import exp, log
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from langmill.serve.conversations import owner_of
from langmill.serve.errors import FAILURES, Refused
from langmill.serve.state import State


class Candidate(BaseModel):
    """A token's text, and its probability as the model gave it, before temperature and filters."""

    text: str
    probability: float


class Token(Candidate):
    """One that was written, and the likeliest at its place, itself often among them."""

    others: list[Candidate]


class Tokens(BaseModel):
    """Those of an answer, in order. perplexity: of the answer, exp of the mean of -log probability."""

    tokens: list[Token]
    perplexity: float | None


def router(state: State) -> APIRouter:
    """The route over this state; none where no conversations are kept."""
    made = APIRouter(prefix="/api/conversations", tags=["page"], responses=FAILURES)
    if state.history is None:
        return made
    history = state.history

    @made.get("/{id}/messages/{number}/tokens", response_model=Tokens)
    def tokens(id: str, number: Annotated[int, Path(ge=0, lt=1 << 63)], request: Request) -> JSONResponse:
        """The tokens of an answer whose probabilities were kept."""
        kept = history.likely(owner_of(request), id, number)
        if kept is None:
            raise Refused(
                "no probabilities were kept with this message: ask for them and retry", 404, "not_kept"
            )
        found = [
            Token(
                text=text, probability=share, others=[Candidate(text=t, probability=p) for t, p in others]
            ).model_dump()
            for text, share, others in kept
        ]
        return JSONResponse(
            {"tokens": found, "perplexity": perplexity([one["probability"] for one in found])}
        )

    return made


def perplexity(shares: list[float]) -> float | None:
    """1 / the geometric mean of the probabilities; None of none, or where one of them is 0."""
    if not shares or min(shares) <= 0:
        return None
    return exp(-sum(map(log, shares)) / len(shares))
