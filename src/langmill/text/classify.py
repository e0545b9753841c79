"""Classification: labels by their numbers, and what a model's scores say of a text.

The texts are encoded by `tasks.encode_texts`. Of a text in several windows the scores are the mean over the windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from langmill.common.errors import DataError

Floats = NDArray[np.float64]
Label = str | tuple[str, ...] | float
TASKS = ("classify", "multilabel", "regress", "tag")


@dataclass(frozen=True)
class Labels:
    """The names of C classes by their numbers.

    task: "classify", one class holds; "multilabel", any number do; "regress", a number is said, and C is 1; "tag", one
    class for each word.
    """

    names: tuple[str, ...]
    task: str = "classify"

    @classmethod
    def of(cls, labels: Iterable[Label], task: str | None = None) -> Labels:
        """Those that occur, whole numbers by their size and others by their spelling.

        Where `task` is None, labels that are tuples make it "multilabel". DataError where fewer than two names occur.
        """
        if task == "regress":
            return cls(("value",), task)
        given = list(labels)
        several = any(isinstance(label, tuple) for label in given)
        names = {str(name) for label in given for name in (label if isinstance(label, tuple) else (label,))}
        if len(names) < 2:
            only = f'the one label "{next(iter(names))}"' if names else "no label at all"
            raise DataError(f"the data hold {only}: there is nothing to tell apart")
        return cls(tuple(sorted(names, key=_order)), task or ("multilabel" if several else "classify"))

    @cached_property
    def index(self) -> dict[str, int]:
        """Numbers by name."""
        return {name: number for number, name in enumerate(self.names)}

    def number(self, name: str) -> int:
        """The number of a class; DataError names one that is unknown."""
        found = self.index.get(name)
        if found is None:
            known = ", ".join(self.names[:20]) + (", …" if len(self.names) > 20 else "")
            raise DataError(f'the label "{name}" is not among the {len(self.names)} known: {known}')
        return found

    def target(self, label: Label) -> int | float | list[int]:
        """What is learnt of a label: its number; a list of C 0s and 1s for "multilabel"; for "regress" the value."""
        if self.task == "regress":
            return float(label)  # type: ignore[arg-type]  # parsed as a number
        names = label if isinstance(label, tuple) else (str(label),)
        numbers = [self.number(name) for name in names]
        if self.task == "multilabel":
            return [int(number in numbers) for number in range(len(self.names))]
        if len(numbers) != 1:
            raise DataError(f"there are {len(numbers)} labels, and the model gives one")
        return numbers[0]


def _order(name: str) -> tuple[bool, int, str]:
    """Whole numbers first, by size."""
    whole = name.removeprefix("-").isdecimal() and len(name) < 20
    return not whole, int(name) if whole else 0, name


def class_weights(numbers: Sequence[int] | NDArray[Any], classes: int) -> NDArray[np.float32]:
    """(C,) weights with which every class counts the same: examples / (C x examples of the class), 0 for one without
    any (scikit-learn's "balanced")."""
    counts = np.bincount(np.asarray(numbers, np.int64), minlength=classes)
    weights = np.zeros(classes)
    np.divide(counts.sum() / classes, counts, out=weights, where=counts > 0)
    return weights.astype(np.float32)


def class_scores(logits_WC: ArrayLike, numbers: Sequence[int], task: str) -> tuple[list[int], Floats]:
    """(N numbers of texts, in order; their scores (N, C)) from a model's output for W windows, `numbers` theirs.

    Scores are softmax over the classes, for "multilabel" the sigmoid of each, for "regress" the value as it is.
    """
    logits = np.asarray(logits_WC, np.float64)
    match task:
        case "regress":
            scores = logits
        case "multilabel":
            scores = 0.5 * (1 + np.tanh(logits / 2))
        case _:
            scores = softmax(logits)
    texts, inverse, counts = np.unique(np.asarray(numbers), return_inverse=True, return_counts=True)
    total = np.zeros((len(texts), logits.shape[-1]))
    np.add.at(total, inverse, scores)
    return texts.tolist(), total / counts[:, None]


def softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def class_result(scores_C: ArrayLike, labels: Labels, threshold: float = 0.5) -> dict[str, Any]:
    """{"label", "score", "scores"}: the best class, its score and those of all by name, best first.

    For "multilabel" `label` lists the classes of at least `threshold`, best first, and `score` is the lowest of theirs
    (0 without any); for "regress" there is {"score"} alone.
    """
    scores = np.asarray(scores_C, np.float64)
    if labels.task == "regress":
        return {"score": float(scores[0])}
    order = np.argsort(-scores, kind="stable").tolist()
    by_name = {labels.names[number]: float(scores[number]) for number in order}
    if labels.task == "multilabel":
        held = [name for name, score in by_name.items() if score >= threshold]
        return {"label": held, "score": by_name[held[-1]] if held else 0.0, "scores": by_name}
    best = labels.names[order[0]]
    return {"label": best, "score": by_name[best], "scores": by_name}
