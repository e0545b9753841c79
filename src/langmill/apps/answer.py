"""`langmill answer`: where a text answers a question, with the model's certainty and that of "no answer"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from langmill.apps.classify import limit_taught
from langmill.apps.texts import Read, Result, Row, each
from langmill.common.errors import DataError, ModelError
from langmill.common.metrics import Report
from langmill.common.settings import AnswerSettings
from langmill.families.folder import Model
from langmill.infer.read import token_scores
from langmill.infer.ready import ready
from langmill.model.config import ModelConfig
from langmill.text.answer import NEVER, ContextWindow, best_answers, encode_question
from langmill.text.tasks import Limit
from langmill.text.tokenizer import Tokenizer

CONTEXT = ("context", "text")


def run(settings: AnswerSettings, *, quiet: bool = False, as_json: bool = False) -> Report:
    """Results: {"question", "answer", "start", "end", "score", "no_answer_score", "best"}; the text is the context.

    The question is the settings', or each row's "question"; a row's "context", or else its "text", is the context.
    `best` lists --n-best answers. An empty answer says that the text holds none.
    """
    model, tokenizer = ready(settings.model, settings.dtype, settings.device, settings.threads)
    read = reader(settings, model, tokenizer)
    return each(settings, read, quiet=quiet, as_json=as_json, fields=CONTEXT)


def reader(settings: AnswerSettings, model: Model, tokenizer: Tokenizer) -> Read:
    """What answers a batch."""
    check(model, settings.model)
    limit = limit_taught(model, settings)

    def read(batch: Sequence[Row], counted: Counter[str]) -> Iterator[Result]:
        asked = [(row.where, _question(row, settings), row.text) for row in batch]
        how = {"n_best": settings.n_best, "max_length": settings.max_answer, "threshold": settings.threshold}
        for row, best in zip(batch, found(model, tokenizer, asked, limit, counted, **how), strict=True):
            yield row.beside(best)

    return read


def found(
    model: Model,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[str, str, str]],
    limit: Limit,
    counted: Counter[str],
    threshold: float | None = None,
    **how: Any,
) -> Iterator[dict[str, Any]]:
    """{"question"} and what `best_answers` gives for each (where, question, context); `how` goes to it. threshold: None
    for the model's own. DataError names the row whose question or context cannot be read."""
    windows: list[list[ContextWindow]] = []
    for number, (where, question, context) in enumerate(asked):
        try:
            windows.append(encode_question(tokenizer, question, context, limit, counted, number))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    if threshold is None:
        head = model.config.head if isinstance(model.config, ModelConfig) else None
        own_threshold = head.threshold if head is not None else 0.0
        threshold = NEVER if own_threshold is None else own_threshold
    scores = token_scores(model, [window.encoded for own in windows for window in own])
    for (_, question, context), own in zip(asked, windows, strict=True):
        parts = [next(scores) for _ in own]
        starts, ends = ([score[:, side] for score in parts] for side in (0, 1))
        yield {"question": question, **best_answers(context, own, starts, ends, threshold=threshold, **how)}


def _question(row: Row, settings: AnswerSettings) -> str:
    found = settings.question or row.fields.get("question")
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"{row.where} has no question: give --question, or rows with question and context")
    return found


def check(model: Model, where: str) -> None:
    """ModelError where a model was not taught to answer."""
    head = model.config.head if isinstance(model.config, ModelConfig) else None
    if head is None or head.task != "answer":
        raise ModelError(
            f"{where} was not taught to answer: langmill finetune {where} --task answer --data FILE teaches it"
        )
