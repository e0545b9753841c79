"""Labels that a model was never taught: by a decoder's likelihood of them, or by an encoder's similarity to them.

A decoder sees the template with the text, after examples where there are some, and scores each label in its place.
Labels that are likely anyway would win too often, so that what the template gives them without a text is taken away
(Holtzman et al. 2021, arXiv:2104.08315, eq. 3; contextual calibration, Zhao et al. 2021, arXiv:2102.09690). An encoder
compares the text's vector with those of the labels (Reimers & Gurevych 2019, arXiv:1908.10084).

N texts, C labels.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from langmill.apps.texts import Read, Result, Row, within
from langmill.common.errors import DataError, UsageError
from langmill.common.settings import ClassifySettings, EmbedSettings
from langmill.evaluate.choices import answered
from langmill.families.folder import Model
from langmill.infer.choices import Question, longest, question_ids
from langmill.infer.past import Past
from langmill.model.transformer import Transformer
from langmill.text.classify import Floats, Labels, class_result, softmax
from langmill.text.tokenizer import Tokenizer

SHARPNESS = 20.0  # of cosines, as sentence encoders were trained with
BETWEEN = "\n\n"  # examples
REPLACED = "examples that were themselves asked and replaced"


def chooser(settings: ClassifySettings, model: Model, tokenizer: Tokenizer) -> Read:
    """What `classify` does with a batch of rows: {"text", "label", "score", "scores"} of each."""
    if len(set(settings.labels)) < 2:
        raise UsageError("zero-shot needs two labels or more: --labels A --labels B")
    if not all(name.strip() for name in settings.labels):
        raise UsageError("one of --labels is empty: each is a word or a description of what a text may be")
    names = Labels(tuple(dict.fromkeys(settings.labels)))
    if isinstance(model, Transformer) and not model.config.writes:
        return _by_similarity(settings, model, tokenizer, names)
    return _Likelihood(settings, model, tokenizer, names)


def _by_similarity(settings: ClassifySettings, model: Model, tokenizer: Tokenizer, names: Labels) -> Read:
    from langmill.apps.embed import Reader

    if settings.examples is not None:
        raise UsageError("--examples are for decoders: an encoder compares a text with the labels alone")
    if idle := sorted({"template", "shots"} & settings.model_fields_set):
        raise UsageError(f"--{idle[0]} is for decoders: an encoder compares a text with the labels alone")
    given = settings.model_fields_set & set(EmbedSettings.model_fields)
    asked = EmbedSettings(**{name: value for name, value in dict(settings).items() if name in given})
    reader = Reader.over(model, tokenizer, asked)
    labels_CD = np.stack(list(reader.vectors([Row(f"label {n}", n, {}) for n in names.names], Counter())))

    def choose(batch: Sequence[Row], counted: Counter[str]) -> Iterator[Result]:
        for row, vector in zip(batch, reader.vectors(batch, counted), strict=True):
            scores_C = softmax((SHARPNESS * labels_CD @ vector).astype(np.float64))
            yield {"text": row.text, **row.beside(class_result(scores_C, names, settings.threshold))}

    return choose


class _Likelihood:
    """How a decoder chooses. What the template gives without a text is asked once for each set of examples."""

    def __init__(self, settings: ClassifySettings, model: Model, tokenizer: Tokenizer, names: Labels):
        self.head, label, after = settings.template.rpartition("{label}")
        if not label or "{label}" in self.head or "{text}" not in self.head or after.strip():
            raise UsageError(
                f"a template holds {{text}} and ends with {{label}}; this one is {settings.template!r}"
            )
        self.settings, self.model, self.tokenizer, self.names = settings, model, tokenizer, names
        self.told = Counter[str]()  # of the examples, with the first batch
        self.most, self.few = longest(model), _few(settings, self.told)
        self.usual, self.past = self.few.before((), Counter()), Past()
        self.priors: dict[str, Floats] = {}

    def __call__(self, batch: Sequence[Row], counted: Counter[str]) -> Iterator[Result]:
        counted.update(self.told)
        self.told.clear()
        befores = [self.few.before({row.text.strip()}, counted) for row in batch]
        scores_NC = np.zeros((len(batch), len(self.names.names)))
        for before in dict.fromkeys(befores):
            places = [i for i, own in enumerate(befores) if own == before]
            with within([batch[i] for i in places]):
                if self.settings.calibrate and before not in self.priors:
                    self.priors[before] = self._logs(before, [""], Counter())
                logs_NC = self._logs(before, [batch[i].text for i in places], counted)
            scores_NC[places] = softmax(logs_NC - self.priors.get(before, 0.0))
        for row, scores_C in zip(batch, scores_NC, strict=True):
            found = class_result(scores_C, self.names, self.settings.threshold)
            yield {"text": row.text, **row.beside(found)}

    def _logs(self, before: str, texts: Sequence[str], counted: Counter[str]) -> Floats:
        """(N, C) log-probabilities. The usual examples are read once for all batches."""
        asked = [self._fitted(before, text, counted) for text in texts]
        found = answered(self.model, asked, past=self.past if before and before == self.usual else None)
        return np.array([[one.log for one in own] for own in found])

    def _fitted(self, before: str, text: str, counted: Counter[str]) -> Question:
        """A prompt with every label. Of a text that is too long the end is left out and counted, or it is refused."""
        asked = self._asked(before, text)
        if not (excess := self._excess(asked)):
            return asked
        if self.settings.long_texts == "error":
            raise DataError(
                f"a prompt with its label is {excess} tokens longer than the model's {self.most}: choose truncate"
            )
        ids = self.tokenizer.encode(text)
        counted["texts cut at their end"] += 1
        while excess and ids:
            ids = ids[:-excess]
            asked = self._asked(before, self.tokenizer.decode(ids))
            excess = self._excess(asked)
        if excess:
            raise UsageError(
                f"template, examples and label are {excess} tokens longer than the model's {self.most} without a text: "
                "shorten them, or take fewer --shots"
            )
        return asked

    def _asked(self, before: str, text: str) -> Question:
        return question_ids(self.tokenizer, before + self.head.replace("{text}", text), self.names.names)

    def _excess(self, asked: Question) -> int:
        reach = len(asked[0]) + max(map(len, asked[1])) - 1
        return 0 if self.most is None else max(0, reach - self.most)


@dataclass(frozen=True)
class Example:
    """What may be shown before others are asked: what it would itself be asked as, how it looks with its answer, and
    its kind, such as a label."""

    asked: str
    shown: str
    kind: str = ""


class Shots:
    """`count` examples before what is asked (few-shot; Brown et al. 2020), drawn and mixed by the seed, as many of each
    kind as of the others. None is itself asked: the next one drawn of its kind is shown instead.

    DataError names the source that holds too few.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        count: int,
        seed: int,
        source: Path | None,
        kinds: Sequence[str] = ("",),
    ):
        order = random.Random(seed)
        self._source = source
        self._drawn = {kind: [one for one in examples if one.kind == kind] for kind in kinds}
        for own in self._drawn.values():
            order.shuffle(own)
        rounds = [order.sample(kinds, len(kinds)) for _ in range(0, count, len(kinds))]
        self._places = [kind for one in rounds for kind in one][:count]
        order.shuffle(self._places)
        self._usual = self._taken(())

    def taken(self, asked: Container[str]) -> list[Example]:
        """The examples to show, in their order, where these are asked."""
        return self._taken(asked) if self._own(asked) else self._usual

    def before(self, asked: Container[str], counted: Counter[str]) -> str:
        """What they look like; how many were replaced is counted."""
        if own := self._own(asked):
            counted[REPLACED] += own
        return "".join(one.shown + BETWEEN for one in self.taken(asked))

    def _own(self, asked: Container[str]) -> int:
        return sum(one.asked in asked for one in self._usual)

    def _taken(self, asked: Container[str]) -> list[Example]:
        left = {kind: [one for one in own if one.asked not in asked] for kind, own in self._drawn.items()}
        for kind, own in left.items():
            if len(own) < (needed := self._places.count(kind)):
                named = f" of the label {kind!r}" if kind else ""
                raise DataError(
                    f"{self._source} has {len(own)} rows{named} that are not themselves asked: {needed} are needed"
                )
        following = {kind: iter(own) for kind, own in left.items()}
        return [next(following[kind]) for kind in self._places]


def shots(settings: ClassifySettings) -> str:
    """The examples before a text that is none of them."""
    return _few(settings, Counter()).before((), Counter())


def _few(settings: ClassifySettings, counted: Counter[str]) -> Shots:
    """The examples of the settings; without a file of them, none. Those with other labels are left out and counted."""
    path, found, others = settings.examples, list[Example](), Counter[str]()
    if path is None:
        return Shots((), 0, settings.seed, path)
    head, _, after = settings.template.rpartition("{label}")
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line) if line.strip() else None
            if row is None:
                continue
            label, text = row["label"], row["text"]
            name = label if isinstance(label, str) else json.dumps(label)
            if name not in settings.labels:
                others[name] += 1
            else:
                shown = head.replace("{text}", text) + name + after
                found.append(Example(text.strip(), shown, name))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError(f"{path}, line {number} is no row with text and label") from None
    if others:
        named = ", ".join(sorted(others)[:10]) + ", …" * (len(others) > 10)
        counted[f"examples left out, with other labels than those asked: {named}"] += others.total()
    return Shots(found, settings.shots, settings.seed, path, list(dict.fromkeys(settings.labels)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as reason:
        raise DataError(f"{path} is not UTF-8 (byte {reason.start + 1}): convert it first") from None
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"{path} is no file: --examples takes JSONL rows with text and label") from None
