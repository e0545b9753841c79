"""The step of `data prepare` that asks a classifier how good a text is. It stands here because `data` knows no models.

It is made with `langmill finetune MODEL --task classify` from two small sets: texts that are wanted, and others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from langmill.apps.classify import labels_of
from langmill.common.errors import UsageError
from langmill.data.judge import chunks
from langmill.data.meta import told
from langmill.infer.read import document_scores
from langmill.infer.ready import ready
from langmill.text.classify import Labels, class_scores
from langmill.text.tasks import READS, Limit, encode_texts

if TYPE_CHECKING:
    import pyarrow as pa

_CHARACTERS = 8  # for each token that the model reads: no more of a text is encoded


@dataclass(frozen=True)
class Quality:
    """Says the score of `label` as meta's "quality", and drops texts of which it is below `at_least`.

    A text is judged by its beginning, as much as the model reads at once. A model that says numbers needs no label.
    One thread each, so that scores are the same however many processes work. ModelError, on first use, where `folder`
    was not taught to classify; UsageError for a label that it does not have.
    """

    folder: str
    label: str
    at_least: float
    edition: str = ""  # of the model, so that another one in the same folder makes another step
    name: str = "quality"

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        dropped, meta = batch["dropped"].to_pylist(), batch["meta"].to_pylist()
        asked = np.flatnonzero(batch["dropped"].is_null().to_numpy())
        for rows, texts in chunks(batch["text"].combine_chunks(), asked):
            for row, score in zip(rows.tolist(), self.scores(texts).tolist(), strict=True):
                meta[row] = told(meta[row], "quality", round(score, 3))
                if score < self.at_least:
                    dropped[row] = f"{self.name}: below {self.at_least:g}"
        for name, column in (("meta", meta), ("dropped", dropped)):
            batch = batch.set_column(batch.column_names.index(name), name, pa.array(column, pa.string()))
        return batch

    def check(self) -> None:
        """Raise what is wrong with the model before any work."""
        number(_loaded(self.folder, self.edition)[2], self.label)

    def scores(self, texts: list[str]) -> NDArray[np.float64]:
        """(N,) of the label."""
        model, tokenizer, labels, length = _loaded(self.folder, self.edition)
        index = number(labels, self.label)
        heads = [text[: length * _CHARACTERS] for text in texts]
        documents = encode_texts(tokenizer, heads, Limit(length, "truncate"), Counter())
        logits = list(document_scores(model, documents))
        _, scores_NC = class_scores(logits, range(len(texts)), labels.task)
        return scores_NC[:, index]


def number(labels: Labels, label: str) -> int:
    """The column of the label in the model's scores; UsageError where it has none of that name."""
    if labels.task == "regress":
        return 0
    if label not in labels.index:
        raise UsageError(f"quality.label: the model knows {', '.join(labels.names[:20])}, and not '{label}'")
    return labels.index[label]


@lru_cache(maxsize=1)
def _loaded(folder: str, edition: str) -> tuple[Any, Any, Labels, int]:
    model, tokenizer = ready(folder, threads=1)
    return model, tokenizer, labels_of(model, folder), min(model.config.length, READS)
