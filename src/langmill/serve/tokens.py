"""/tokenize and /detokenize: what a text is to a model, and back; vLLM's fields, and llama.cpp's `content`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from langmill.serve.begun import ending_of
from langmill.serve.errors import FAILURES, Refused
from langmill.serve.likely import token_text
from langmill.serve.models import Loaded
from langmill.serve.schema import Asked
from langmill.serve.state import State
from langmill.serve.turns import Message, plain, understood
from langmill.serve.writing import aside, key_of


class TokenizeAsked(Asked):
    """A text (`prompt`, or `content`), or the messages of a chat. model: None for the first one.

    add_special_tokens: with what the model puts in front of a text. return_token_strs: how each token is spelt.
    """

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeAsked(Asked):
    """Ids whose text is wanted."""

    model: str | None = None
    tokens: list[int]


class Tokenized(BaseModel):
    """`max_model_len`: the model's context."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None


class Detokenized(BaseModel):
    prompt: str
    content: str


def router(state: State) -> APIRouter:
    """The routes over this state."""
    made = APIRouter(tags=["tokens"], responses=FAILURES)

    @made.post("/tokenize", response_model=Tokenized)
    async def tokenize(asked: TokenizeAsked, request: Request) -> JSONResponse:
        """The ids of a text or a chat."""
        loaded = _model(state, asked.model)
        state.limits.check(key_of(request), 0)
        ids = await _ids(state, loaded, asked)
        spelt = (
            await aside(loaded, len(ids), lambda: _spelt(loaded, ids)) if asked.return_token_strs else None
        )
        told = {"tokens": ids, "count": len(ids), "max_model_len": loaded.window, "token_strs": spelt}
        return JSONResponse(told)

    @made.post("/detokenize", response_model=Detokenized)
    async def detokenize(asked: DetokenizeAsked, request: Request) -> JSONResponse:
        """The text of ids, control tokens included."""
        loaded = _model(state, asked.model)
        state.limits.check(key_of(request), 0)
        known = loaded.model.config.vocab
        if bad := [id for id in asked.tokens if not 0 <= id < known]:
            raise Refused(f"{bad[0]} is no token: this model knows 0 to {known - 1}", param="tokens")
        size = len(asked.tokens)
        text = await aside(loaded, size, lambda: loaded.tokenizer.decode(asked.tokens, skip_specials=False))
        return JSONResponse({"prompt": text, "content": text})

    return made


def _spelt(loaded: Loaded, ids: Sequence[int]) -> list[str]:
    return [token_text(loaded.tokenizer, id) for id in ids]


def _model(state: State, name: str | None) -> Loaded:
    return state.models.all[0] if name is None else state.models.named(name)


async def _ids(state: State, loaded: Loaded, asked: TokenizeAsked) -> list[int]:
    given = [name for name in ("prompt", "content", "messages") if getattr(asked, name) is not None]
    if len(given) != 1:
        raise Refused(
            "give one of prompt (a text) and messages (a chat)"
            + (f", not {' and '.join(given)} together" if given else "")
        )
    if asked.messages is not None:
        state.models.find(loaded.name, "chat")
        messages = plain(asked.messages, loaded.tokenizer.chat_template or "")
        ending = ending_of(messages, asked.add_generation_prompt, asked.continue_final_message)
        ids, _ = await understood(
            loaded, messages, asked.tools, variables=asked.chat_template_kwargs, ending=ending
        )
        return ids
    text = asked.prompt if asked.prompt is not None else asked.content or ""
    encode = loaded.tokenizer.prompt_ids if asked.add_special_tokens else loaded.tokenizer.encode
    return await aside(loaded, len(text), lambda: encode(text))
