"""/v1/classify, /v1/tag, /v1/answer, /v1/translate: what the commands of these names do, with their results.

One request at a time runs on a model, in a thread and batch by batch, so that a client that leaves is noticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from langmill.apps import answer, classify, tag, translate
from langmill.apps.texts import Read, Result, Row, batches
from langmill.common import settings as groups
from langmill.common.configure import configure
from langmill.serve.errors import FAILURES, Refused
from langmill.serve.models import Loaded
from langmill.serve.schema import Asked
from langmill.serve.state import State
from langmill.serve.writing import Usage, aside, attended, key_of, note, to_its_end

T = TypeVar("T")
Texts = str | Annotated[list[str], Field(min_length=1, max_length=2048)]
BATCH = 16  # texts between two looks at whether the client is still there
# What is read before the first batch, when no client's leaving is noticed: labels, and characters of each.
LABELS, LABEL, TEMPLATE = 1024, 1024, 1 << 14


class Task(Asked):
    """Texts to read. long_texts: of those longer than the model reads: refuse, keep the beginning, or overlapping
    windows. A field that is left out is as the command has it."""

    model: str
    input: Texts
    long_texts: Literal["error", "truncate", "window"] | None = None
    overlap: int | None = None


class ClassifyAsked(Task):
    """text_pair: second texts, for models of pairs. labels: zero-shot, by a model that was not taught them."""

    text_pair: Texts | None = None
    threshold: float | None = None
    labels: Annotated[list[Annotated[str, Field(max_length=LABEL)]], Field(max_length=LABELS)] | None = None
    template: str | None = Field(None, max_length=TEMPLATE)
    calibrate: bool | None = None


class TagAsked(Task):
    """The spans of texts."""


class AnswerAsked(Task):
    """question: one for all texts, or one for each."""

    question: Texts
    n_best: int | None = Field(None, ge=1, le=100)
    max_answer: int | None = None
    threshold: float | None = None


class TranslateAsked(Task):
    """How to search: see `langmill translate --help`."""

    beams: int | None = Field(None, ge=1, le=32)
    n_best: int | None = Field(None, ge=1, le=32)
    length_penalty: float | None = None
    max_new_tokens: int | None = Field(None, ge=1, le=4096)


class Results(BaseModel):
    """data: a result for each text, in order, with its index, as the command gives it. counts: what became of texts
    that were too long."""

    object: Literal["list"]
    model: str
    data: list[dict[str, Any]]
    counts: dict[str, int]
    usage: dict[str, int]


Make = Callable[[Any, Any, Any], Read]


def router(state: State) -> APIRouter:
    """The routes over this state."""
    made = APIRouter(tags=["reading"], responses=FAILURES)

    @made.post("/v1/classify", response_model=Results)
    async def classes(asked: ClassifyAsked, request: Request) -> JSONResponse:
        """The label of each text, with the model's certainty."""
        loaded = state.models.find(asked.model, "choose" if asked.labels else "classify")
        fields = _each(asked.text_pair, asked.input, "text_pair")
        return await _answered(
            state, request, loaded, asked, groups.ClassifySettings, classify.reader, fields
        )

    @made.post("/v1/tag", response_model=Results)
    async def tags(asked: TagAsked, request: Request) -> JSONResponse:
        """The spans of each text that the model was taught to find."""
        loaded = state.models.find(asked.model, "tag")
        return await _answered(state, request, loaded, asked, groups.TagSettings, tag.reader, {})

    @made.post("/v1/answer", response_model=Results)
    async def answers(asked: AnswerAsked, request: Request) -> JSONResponse:
        """Where each text answers a question."""
        loaded = state.models.find(asked.model, "answer")
        fields = _each(asked.question, asked.input, "question")
        return await _answered(state, request, loaded, asked, groups.AnswerSettings, answer.reader, fields)

    @made.post("/v1/translate", response_model=Results)
    async def translations(asked: TranslateAsked, request: Request) -> JSONResponse:
        """Each text in the model's other language."""
        loaded = state.models.find(asked.model, "translate")
        return await _answered(state, request, loaded, asked, groups.TranslateSettings, translate.reader, {})

    return made


def _each(given: Any, texts: Any, name: str) -> dict[str, list[str]]:
    """What belongs to each text: one for all, or one each."""
    count = 1 if isinstance(texts, str) else len(texts)
    found = [] if given is None else [given] * count if isinstance(given, str) else given
    if given is not None and len(found) != count:
        raise Refused(
            f"{name} has {len(found)} texts and input has {count}: one for each, or one for all", param=name
        )
    return {name: found} if found else {}


async def _answered(
    state: State, request: Request, loaded: Loaded, asked: Task, cls: type[groups.ReadSettings], make: Make,
    fields: dict[str, list[str]],
) -> JSONResponse:  # fmt: skip
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    given = {
        n: v for n, v in asked.model_dump(exclude={"model", "question"}).items() if n in cls.model_fields
    }
    settings = configure(cls, None, [], model=loaded.folder, **given)
    rows = [
        Row(f"input {number + 1}", text, {name: own[number] for name, own in fields.items()})
        for number, text in enumerate(texts)
    ]
    tokens = await _tokens(loaded, [text for own in (texts, *fields.values()) for text in own])
    note(request, Usage(prompt=tokens))
    state.limits.check(key_of(request), tokens)
    results, counted = await attended(
        request, read(loaded, lambda: make(settings, loaded.model, loaded.tokenizer), rows, tokens)
    )
    state.metrics.ended(loaded.name, "stop", tokens, 0, 0)
    data = [{"index": index, **result} for index, result in enumerate(results)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse(
        {"object": "list", "model": loaded.name, "data": data, "counts": dict(counted), "usage": usage}
    )


async def _tokens(loaded: Loaded, texts: Sequence[str]) -> int:
    """How many tokens are to be read, questions and second texts too; what stands there often is encoded once."""
    often = Counter(texts)
    encoded = await aside(loaded, sum(map(len, often)), lambda: loaded.tokenizer.encode_batch(list(often)))
    return sum(len(ids) * times for ids, times in zip(encoded, often.values(), strict=True))


async def read(
    loaded: Loaded, make: Callable[[], Read], rows: Sequence[Row], tokens: int
) -> tuple[list[Result], Counter[str]]:
    """The result of each row, and what is to be told of them, once the model is free. QueueFull where so many tokens
    may not wait for that, Refused where the server is stopping."""
    counted: Counter[str] = Counter()
    found: list[Result] = []
    with loaded.open():
        async with loaded.line.turn(tokens):
            reads = await to_its_end(make)
            for batch in batches(iter(rows), BATCH):
                found += await to_its_end(partial(_list, reads, batch, counted))
    return found, counted


def _list(reads: Read, batch: Sequence[Row], counted: Counter[str]) -> list[Result]:
    return list(reads(batch, counted))
