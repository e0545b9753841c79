"""/v1/rerank: texts in the order in which they fit a question, by the cosine of their vectors; Cohere's, Jina's and
vLLM's fields, and their other addresses."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from langmill.serve.embeddings import MOST_TEXTS, ids_of, vectors_of
from langmill.serve.errors import FAILURES, Refused
from langmill.serve.models import Loaded
from langmill.serve.schema import Asked
from langmill.serve.state import State
from langmill.serve.writing import Usage, aside, attended, key_of, note

DIGITS = 6  # of a score: the last ones depend on what stands beside a text in the pass


class RerankAsked(Asked):
    """A question and the texts to be put in order. top_n: only so many of them, the best; none: all.

    return_documents: with their texts, unless it is false. Where a model was trained with a word in front of questions
    or texts ("query: "), both stand here with it.
    """

    model: str
    query: str
    documents: Annotated[list[str | dict[str, str]], Field(min_length=1, max_length=MOST_TEXTS - 1)]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = None


class Ranked(BaseModel):
    """index: the text's place in the request. relevance_score: a cosine, -1 to 1."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class Reranked(BaseModel):
    """The texts, the best first; those that fit equally well in the order of the request."""

    id: str
    model: str
    results: list[Ranked]
    usage: dict[str, int]


def router(state: State) -> APIRouter:
    """The routes over this state."""
    made = APIRouter(tags=["reading"], responses=FAILURES)

    @made.post("/rerank", response_model=Reranked)
    @made.post("/v2/rerank", response_model=Reranked)
    @made.post("/v1/rerank", response_model=Reranked)
    async def rerank(asked: RerankAsked, request: Request) -> JSONResponse:
        """Put texts in the order in which they fit a question."""
        loaded = state.models.find(asked.model, "embed")
        texts = [_text(one, place) for place, one in enumerate(asked.documents)]
        size = len(asked.query) + sum(map(len, texts))
        ids = await aside(loaded, size, lambda: _ids(loaded, asked.query, texts))
        tokens = sum(map(len, ids))
        note(request, Usage(prompt=tokens))
        state.limits.check(key_of(request), tokens)
        query, *others = await attended(request, vectors_of(loaded, ids))
        state.metrics.ended(loaded.name, "stop", tokens, 0, 0)
        scores = np.clip(np.stack(others) @ query, -1, 1).round(DIGITS)
        best = np.argsort(-scores, kind="stable")[: asked.top_n]
        results: list[dict[str, Any]] = [
            {"index": at, "relevance_score": round(float(scores[at]), DIGITS)} for at in best.tolist()
        ]
        if asked.return_documents is not False:
            results = [{**one, "document": {"text": texts[one["index"]]}} for one in results]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        number = f"rerank-{uuid.uuid4().hex}"
        return JSONResponse({"id": number, "model": loaded.name, "results": results, "usage": usage})

    return made


def _text(given: str | dict[str, str], place: int) -> str:
    if isinstance(given, str):
        return given
    if set(given) != {"text"}:
        raise Refused(
            f'documents.{place} is a text, or {{"text": …}} and nothing beside it', param=f"documents.{place}"
        )
    return given["text"]


def _ids(loaded: Loaded, query: str, texts: Sequence[str]) -> list[list[int]]:
    """Of the question and of each text."""
    return [*ids_of(loaded, [query], "query"), *ids_of(loaded, texts, "documents")]
