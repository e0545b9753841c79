"""`langmill tag`: the spans of a text that a model was taught to find: names, places, whatever its labels are."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from langmill.apps.classify import limit_taught
from langmill.apps.texts import Read, Result, Row, each
from langmill.common.errors import ModelError
from langmill.common.metrics import Report
from langmill.common.settings import TagSettings
from langmill.families.folder import Model
from langmill.infer.read import token_scores
from langmill.infer.ready import ready
from langmill.model.config import ModelConfig
from langmill.text.classify import Floats, Labels
from langmill.text.tag import Words, encode_words, entities, word_scores
from langmill.text.tasks import Limit
from langmill.text.tokenizer import Tokenizer


def run(settings: TagSettings, *, quiet: bool = False, as_json: bool = False) -> Report:
    """Results: {"text", "entities": [{"label", "score", "text", "start", "end"}]}, start and end in characters."""
    model, tokenizer = ready(settings.model, settings.dtype, settings.device, settings.threads)
    return each(settings, reader(settings, model, tokenizer), quiet=quiet, as_json=as_json)


def reader(settings: TagSettings, model: Model, tokenizer: Tokenizer) -> Read:
    """What tags a batch."""
    labels, limit = labels_of(model, settings.model), limit_taught(model, settings)

    def read(batch: Sequence[Row], counted: Counter[str]) -> Iterator[Result]:
        texts = [Words.split(row.text) for row in batch]
        scores = scored(model, tokenizer, texts, limit, counted, [row.where for row in batch])
        for row, words, scores_NC in zip(batch, texts, scores, strict=True):
            yield {"text": row.text, **row.beside({"entities": entities(words, scores_NC, labels)})}

    return read


def scored(
    model: Model,
    tokenizer: Tokenizer,
    texts: Sequence[Words],
    limit: Limit,
    counted: Counter[str],
    names: Sequence[str],
) -> Iterator[Floats]:
    """(N, C) scores of each text's words, in order, none for an "empty text", which is counted; `names` are said in
    errors. `counted` as in `encode_words`."""
    full = [number for number, words in enumerate(texts) if len(words)]
    counted["empty texts"] += len(texts) - len(full)  # which hold no entity
    windows = encode_words(
        tokenizer, [texts[number] for number in full], limit, counted, names=[names[n] for n in full]
    )
    own = defaultdict(list)
    for window, score in zip(windows, token_scores(model, [w.encoded for w in windows]), strict=True):
        own[full[window.encoded.number]].append((window, score))
    for number, words in enumerate(texts):
        parts = own[number]
        yield (
            word_scores(len(words), [w for w, _ in parts], [s for _, s in parts])
            if parts
            else np.zeros((0, 1))
        )


def labels_of(model: Model, where: str) -> Labels:
    """The tags that a model was taught; ModelError where it was not."""
    head = model.config.head if isinstance(model.config, ModelConfig) else None
    if head is None or head.task != "tag":
        raise ModelError(
            f"{where} was not taught to tag: langmill finetune {where} --task tag --data FILE teaches it"
        )
    return Labels(head.labels, "tag")
