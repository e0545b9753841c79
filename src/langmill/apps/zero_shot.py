"""Labels that a model was never taught: by a decoder's likelihood of them, or by an encoder's similarity to them.

A decoder sees the template with the text and scores each label in its place. Labels that are likely anyway would win
too often, so that what the template gives them without a text is taken away (Holtzman et al. 2021, arXiv:2104.08315,
eq. 3; contextual calibration, Zhao et al. 2021, arXiv:2102.09690). An encoder compares the text's vector with those of
the labels (Reimers & Gurevych 2019, arXiv:1908.10084).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from langmill.apps.texts import Result, Row
from langmill.common.errors import DataError, UsageError
from langmill.common.settings import ClassifySettings, EmbedSettings
from langmill.families.folder import Model
from langmill.infer.choices import likelihoods, split_ids
from langmill.model.transformer import Transformer
from langmill.text.classify import Labels, class_result, softmax
from langmill.text.tokenizer import Tokenizer

Choose = Callable[[Sequence[Row], "Counter[str]"], Iterator[Result]]
SHARPNESS = 20.0  # of cosines, as sentence encoders were trained with


def chooser(settings: ClassifySettings, model: Model, tokenizer: Tokenizer) -> Choose:
    """What `classify` does with a batch of rows: {"text", "label", "score", "scores"} of each."""
    if len(set(settings.labels)) < 2:
        raise UsageError("zero-shot needs two labels or more: --labels A --labels B")
    names = Labels(tuple(dict.fromkeys(settings.labels)))
    if isinstance(model, Transformer) and not model.config.writes:
        return _by_similarity(settings, model, tokenizer, names)
    return _by_likelihood(settings, model, tokenizer, names)


def _by_similarity(settings: ClassifySettings, model: Model, tokenizer: Tokenizer, names: Labels) -> Choose:
    from langmill.apps.embed import Reader

    known = set(EmbedSettings.model_fields)
    asked = EmbedSettings(**{name: value for name, value in dict(settings).items() if name in known})
    reader = Reader.over(model, tokenizer, asked)
    labels_CD = np.stack(list(reader.vectors([Row(f"label {n}", n, {}) for n in names.names], Counter())))

    def choose(batch: Sequence[Row], counted: Counter[str]) -> Iterator[Result]:
        for row, vector in zip(batch, reader.vectors(batch, counted), strict=True):
            scores_C = softmax((SHARPNESS * labels_CD @ vector).astype(np.float64))
            yield {"text": row.text, **row.fields, **class_result(scores_C, names, settings.threshold)}

    return choose


def _by_likelihood(settings: ClassifySettings, model: Model, tokenizer: Tokenizer, names: Labels) -> Choose:
    template = settings.template
    if (
        template.count("{label}") != 1
        or "{text}" not in template
        or not template.rstrip().endswith("{label}")
    ):
        raise UsageError(f"a template holds {{text}} and ends with {{label}}; this one is {template!r}")
    examples = shots(settings)

    def logs(text: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        context = examples + template.rpartition("{label}")[0].replace("{text}", text)
        parts = [split_ids(tokenizer, context, name) for name in names.names]
        found = likelihoods(model, parts[0][0], [choice for _, choice in parts])
        return np.array([one.log for one in found])

    prior = logs("") if settings.calibrate else np.zeros(len(names.names))

    def choose(batch: Sequence[Row], counted: Counter[str]) -> Iterator[Result]:
        for row in batch:
            scores_C = softmax(logs(row.text) - prior)
            yield {"text": row.text, **row.fields, **class_result(scores_C, names, settings.threshold)}

    return choose


def shots(settings: ClassifySettings) -> str:
    """Examples before the text, as many of each label as of the others, mixed by the seed (Brown et al. 2020)."""
    if settings.examples is None:
        return ""
    rows: dict[str, list[str]] = {name: [] for name in settings.labels}
    try:
        lines = settings.examples.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UsageError(
            f"{settings.examples} is no file: --examples takes JSONL rows with text and label"
        ) from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
            if row is not None and row["label"] in rows:
                rows[row["label"]].append(str(row["text"]))
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{settings.examples}, line {number} is no row with text and label") from None
    each = -(-settings.shots // len(rows))
    if few := [name for name, texts in rows.items() if len(texts) < each]:
        raise DataError(f"{settings.examples} has fewer than {each} texts of the label {few[0]!r}")
    order = random.Random(settings.seed)
    taken = [(text, name) for name, texts in rows.items() for text in order.sample(texts, each)]
    order.shuffle(taken)
    filled = [
        settings.template.replace("{text}", text).replace("{label}", name)
        for text, name in taken[: settings.shots]
    ]
    return "".join(f"{one}\n\n" for one in filled)
