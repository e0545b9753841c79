"""/v1/embeddings: a vector for each text, as `langmill embed` makes it, through the engine's queue."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from langmill.infer.request import Request as Wanted
from langmill.serve.errors import FAILURES, Refused, stopping
from langmill.serve.models import Loaded
from langmill.serve.schema import Asked
from langmill.serve.state import State
from langmill.serve.writing import Usage, aside, attended, key_of, merged, note

Ids = Annotated[list[int], Field(min_length=1)]
Floats = NDArray[np.float32]
MOST_TEXTS = 2048
GROUP_TOKENS = 1 << 14  # of one request that wait at once, so that it leaves room for others


class EmbeddingsAsked(Asked):
    """Texts, or ids that are read as they are, special ones included. dimensions: the first so many numbers of each
    vector, brought to length 1 again, for models that were trained for it (Matryoshka)."""

    model: str
    input: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=MOST_TEXTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)


class Vector(BaseModel):
    """embedding: numbers, or these as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Vectors(BaseModel):
    """A vector for each input, in their order."""

    object: Literal["list"]
    data: list[Vector]
    model: str
    usage: dict[str, int]


def router(state: State) -> APIRouter:
    """The route over this state."""
    made = APIRouter(tags=["reading"], responses=FAILURES)

    @made.post("/v1/embeddings", response_model=Vectors)
    async def embed(asked: EmbeddingsAsked, request: Request) -> JSONResponse:
        """A vector of length 1 for each text."""
        loaded = state.models.find(asked.model, "embed")
        texts = _inputs(asked.input)
        size = sum(len(text) for text in texts if isinstance(text, str))
        ids = await aside(loaded, size, lambda: ids_of(loaded, texts))
        tokens = sum(map(len, ids))
        note(request, Usage(prompt=tokens))
        state.limits.check(key_of(request), tokens)
        vectors = await attended(request, vectors_of(loaded, ids, asked.dimensions))
        state.metrics.ended(loaded.name, "stop", tokens, 0, 0)
        packed = asked.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(vector) if packed else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": loaded.name, "usage": usage})

    return made


def _inputs(given: Any) -> list[str | list[int]]:
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def ids_of(loaded: Loaded, texts: Sequence[str | list[int]], field: str = "input") -> list[list[int]]:
    """What the model reads of each text; Refused, with both numbers, for one that is too long. field: where they
    stand in the request."""
    frame, vocab = loaded.tokenizer.frame, loaded.model.config.vocab
    given = loaded.made.given if loaded.made else str
    words = iter(loaded.tokenizer.encode_batch([given(text) for text in texts if isinstance(text, str)]))
    found = []
    for number, text in enumerate(texts):
        ids = frame.one(next(words), number).ids if isinstance(text, str) else text
        what = field if len(texts) == 1 else f"{field} {number}"
        if not text or not ids:
            raise Refused(f"{what} is empty: give it some text", param=field)
        if len(ids) > loaded.window:
            raise Refused(
                f"this model reads {loaded.window} tokens and {what} has {len(ids)}, special ones included: shorten it "
                "or cut it into parts",
                code="context_length_exceeded",
                param=field,
            )
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise Refused(f"{what} holds ids of no token: this model knows 0 to {vocab - 1}", param=field)
        found.append(ids)
    return found


async def vectors_of(
    loaded: Loaded, ids: Sequence[Sequence[int]], dimensions: int | None = None
) -> list[Floats]:
    """The vectors of texts, in order. Refused where there are fewer numbers than `dimensions`, or the model fails."""
    width = loaded.made.width if loaded.made else 0
    if dimensions is not None and dimensions > width:
        raise Refused(f"dimensions is {dimensions}: this model's vectors have {width}", param="dimensions")
    found: list[Floats] = []
    for group in _groups(ids):
        part: list[Floats | None] = [None] * len(group)
        streams = [loaded.engine.generate(Wanted(one, kind="embed")) for one in group]
        with loaded.open():
            async with aclosing(merged(streams)) as events:
                async for number, event in events:
                    if event.finish == "cancelled":
                        raise stopping()
                    if event.finish != "stop":
                        raise Refused(event.reason or "the model failed", 500)
                    part[number] = event.vector
        found += [_cut(vector, dimensions) for vector in part if vector is not None]
    return found


def _groups(ids: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """The texts in order, as many together as have GROUP_TOKENS, one at least."""
    groups: list[list[Sequence[int]]] = [[]]
    size = 0
    for one in ids:
        if groups[-1] and size + len(one) > GROUP_TOKENS:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += len(one)
    return groups


def _cut(vector: Floats, dimensions: int | None) -> Floats:
    if dimensions is None or dimensions == len(vector):
        return vector
    length = float(np.linalg.norm(vector[:dimensions]))
    return (vector[:dimensions] / (length or 1.0)).astype(np.float32)


def _base64(vector: Floats) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
