"""`langmill classify`: the label of each text, with the model's certainty; and zero-shot, by labels given in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from langmill.apps.texts import Read, Result, Row, each
from langmill.common.errors import ModelError
from langmill.common.metrics import Report
from langmill.common.settings import ClassifySettings, ReadSettings
from langmill.families.folder import Model
from langmill.infer.read import document_scores
from langmill.infer.ready import ready
from langmill.model.config import ModelConfig
from langmill.text.classify import Labels, class_result, class_scores
from langmill.text.tasks import READS, Limit, Text, encode_texts
from langmill.text.tokenizer import Tokenizer

OVERLAP = 64  # tokens of two windows, where neither the settings nor the model say how many


def run(settings: ClassifySettings, *, quiet: bool = False, as_json: bool = False) -> Report:
    """Results: {"text", "label", "score", "scores"} in the rows' order, other fields of a row kept beside them.

    A model with several labels a text gives a list of them; one that says numbers gives "score" alone. `labels` in the
    settings asks zero-shot: see apps/zero_shot.py.
    """
    model, tokenizer = ready(settings.model, settings.dtype, settings.device, settings.threads)
    return each(settings, reader(settings, model, tokenizer), quiet=quiet, as_json=as_json)


def reader(settings: ClassifySettings, model: Model, tokenizer: Tokenizer) -> Read:
    """What classifies a batch, as the model was taught or by the labels of the settings."""
    if settings.labels:
        from langmill.apps.zero_shot import chooser

        return chooser(settings, model, tokenizer)
    labels = labels_of(model, settings.model)
    limit = limit_taught(model, settings)

    def read(batch: Sequence[Row], counted: Counter[str]) -> Iterator[Result]:
        texts: list[Text] = [pair_of(row) for row in batch]
        documents = encode_texts(tokenizer, texts, limit, counted, names=[row.where for row in batch])
        logits = list(document_scores(model, documents))
        numbers, scores_KC = class_scores(logits, [document.number for document in documents], labels.task)
        for number, scores_C in zip(numbers, scores_KC, strict=True):
            row = batch[number]
            yield {"text": row.text, **row.beside(class_result(scores_C, labels, settings.threshold))}

    return read


def labels_of(model: Model, where: str) -> Labels:
    """The labels that a model was taught; ModelError where it was not."""
    head = model.config.head if isinstance(model.config, ModelConfig) else None
    if head is None or head.task not in ("classify", "multilabel", "regress"):
        raise ModelError(
            f"{where} was not taught to classify: langmill finetune {where} --task classify --data FILE teaches it, "
            "and --labels A --labels B chooses zero-shot"
        )
    return Labels(head.labels, head.task)


def pair_of(row: Row) -> Text:
    """The row's text, or both where it has a "text_pair"."""
    second = row.fields.get("text_pair")
    return row.text if not isinstance(second, str) else (row.text, second)


def limit_of(settings: ReadSettings, model: Model) -> Limit:
    """What the model reads at once, and what becomes of a longer text."""
    return Limit(min(model.config.length, READS), settings.long_texts, settings.overlap)


def limit_taught(model: Model, settings: ReadSettings | None = None) -> Limit:
    """The same for a task: as the model was taught, or in windows where it does not say, but for what is given in the
    settings. A figure of the model, and a use of it, then mean what they meant when it was taught."""
    head = model.config.head if isinstance(model.config, ModelConfig) else None
    if head is None or head.limit is None:
        limit = Limit(min(model.config.length, READS), "window", OVERLAP)
    else:
        limit = replace(head.limit, length=min(model.config.length, head.limit.length))
    given = {} if settings is None else settings.model_dump(include=settings.model_fields_set)
    return replace(
        limit, policy=given.get("long_texts", limit.policy), overlap=given.get("overlap", limit.overlap)
    )
