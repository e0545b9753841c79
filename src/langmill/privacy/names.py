"""Persons and addresses, which no pattern tells: found by a model that was taught to, or by presidio and spaCy.

Both are optional. A blank spaCy pipeline knows no names, so presidio needs one that is installed. Nothing is
downloaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

from langmill.common.errors import MissingExtra, ModelError, UsageError
from langmill.privacy.patterns import Find, apart

# What taggers call them: CoNLL, OntoNotes, WikiNER, presidio, and our own.
LABELS = {
    "PER": "person", "PERSON": "person", "NAME": "person", "ADDRESS": "address", "ADR": "address", "LOC": "address",
    "LOCATION": "address", "GPE": "address", "STREET": "address",
}  # fmt: skip
_PRESIDIO = "presidio"
_PACKAGES = ("spacy", "presidio_analyzer.nlp_engine", "presidio_analyzer.predefined_recognizers")


@dataclass(frozen=True)
class Tagger:
    """Finds of a model folder made by `langmill finetune --task tag`; loaded on first use.

    threads: of the processor; None: torch's own choice. ModelError where the folder is none, or none of its labels
    names a person or an address.
    """

    folder: str
    threads: int | None = None

    def __call__(self, texts: Sequence[str]) -> list[list[Find]]:
        from langmill.infer.read import token_scores
        from langmill.text.tag import Words, encode_words, entities, word_scores
        from langmill.text.tasks import Limit

        model, tokenizer, labels, length = _loaded(self.folder, self.threads)
        found: list[list[Find]] = [[] for _ in texts]
        split = {number: Words.split(text) for number, text in enumerate(texts)}
        split = {number: words for number, words in split.items() if len(words)}
        windows = encode_words(
            tokenizer, list(split.values()), Limit(length, "window", length // 8), Counter()
        )
        scores = list(token_scores(model, [window.encoded for window in windows]))
        own: dict[int, list[int]] = {}
        for place, window in enumerate(windows):
            own.setdefault(window.encoded.number, []).append(place)
        for order, (number, words) in enumerate(split.items()):
            places = own[order]
            told = word_scores(len(words), [windows[p] for p in places], [scores[p] for p in places])
            found[number] = _finds(entities(words, told, labels))
        return found


def _finds(entities: Sequence[dict[str, Any]]) -> list[Find]:
    known = [(one, LABELS.get(str(one["label"]).upper())) for one in entities]
    return apart(Find(one["start"], one["end"], type) for one, type in known if type)


@lru_cache(maxsize=1)
def _loaded(folder: str, threads: int | None) -> tuple[Any, Any, Any, int]:
    from langmill.infer.ready import ready
    from langmill.model.config import ModelConfig
    from langmill.text.classify import Labels
    from langmill.text.tasks import READS

    model, tokenizer = ready(folder, threads=threads)
    head = model.config.head if isinstance(model.config, ModelConfig) else None
    if head is None or head.task != "tag":
        raise ModelError(
            f"{folder} was not taught to tag: langmill finetune MODEL --task tag --data FILE teaches one"
        )
    if not any(name.rpartition("-")[2].upper() in LABELS for name in head.labels):
        raise ModelError(f"{folder} tags {', '.join(head.labels)}, and none is among {', '.join(LABELS)}")
    return model, tokenizer, Labels(head.labels, "tag"), min(model.config.length, READS)


@dataclass(frozen=True)
class Presidio:
    """Finds of presidio's recogniser of names over an installed spaCy pipeline, such as en_core_web_sm.

    UsageError where the pipeline is not installed or is blank; MissingExtra without presidio.
    """

    pipeline: str

    def __call__(self, texts: Sequence[str]) -> list[list[Find]]:
        recogniser, engine, language = _presidio(self.pipeline)
        found = []
        for text in texts:
            made = engine.process_text(text, language)
            finds = recogniser.analyze(text, ["PERSON", "LOCATION"], made)
            found.append(apart(Find(one.start, one.end, LABELS[one.entity_type]) for one in finds))
        return found


@lru_cache(maxsize=1)
def _presidio(pipeline: str) -> tuple[Any, Any, str]:
    try:
        spacy, engines, recognisers = map(import_module, _PACKAGES)
    except ImportError:
        raise MissingExtra("privacy", "presidio-analyzer") from None
    if not spacy.util.is_package(pipeline):
        raise UsageError(
            f"the spaCy pipeline {pipeline} is not installed: install its package, then say it again"
        )
    loaded = spacy.load(pipeline)
    if "ner" not in loaded.pipe_names:
        raise UsageError(f"the spaCy pipeline {pipeline} finds no names: take one with a component 'ner'")
    engine = engines.SpacyNlpEngine()
    engine.nlp = {loaded.lang: loaded}  # given, so that it looks for none
    return recognisers.SpacyRecognizer(supported_language=loaded.lang), engine, loaded.lang


def names(given: str, threads: int | None = None) -> Tagger | Presidio:
    """What the setting `names` says: presidio:PIPELINE, or a model folder."""
    if given == _PRESIDIO:
        raise UsageError("names: say which spaCy pipeline presidio should use, as presidio:en_core_web_sm")
    if given.startswith(f"{_PRESIDIO}:"):
        return Presidio(given.partition(":")[2])
    return Tagger(given, threads)
