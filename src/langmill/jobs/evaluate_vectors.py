"""What `langmill evaluate` makes of a model that gives vectors: cosines against people's scores, and searching.

    sts     pearson, spearman of the cosines of two texts with their scores (STS benchmark: Cer et al. 2017)
    embed   accuracy@1, mrr@10, ndcg@10: each anchor looks for its positives among all positives and negatives of the
            rows; triplet_accuracy: the share of negatives that are farther from their anchor than its positive

Vectors are those of `langmill embed`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from langmill.apps.embed import Reader
from langmill.apps.texts import Row
from langmill.common.errors import DataError
from langmill.common.settings import EmbedSettings, EvaluateSettings
from langmill.data.chats import Unusable
from langmill.data.pipeline import Ledger
from langmill.data.tasks import GroupRow, ScoredRow, read_groups, read_scored
from langmill.evaluate import nearest
from langmill.evaluate.compare import Ints
from langmill.evaluate.labels import numbers
from langmill.families.folder import Model
from langmill.jobs.evaluate_rows import OnRows, batches
from langmill.jobs.evaluate_tasks import Outcome
from langmill.text.tokenizer import Tokenizer

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Query:
    """An anchor of one row or several, what it should find, and its (positive, negative)s."""

    where: str
    text: str
    right: tuple[str, ...]
    triplets: tuple[tuple[str, str], ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """All that has to be read."""
        return self.text, *self.right, *(negative for _, negative in self.triplets)


def scored(settings: EvaluateSettings, ledger: Ledger) -> list[ScoredRow]:
    """Two texts and a score each; DataError where all scores are the same."""
    rows = list(read_scored(settings.on, ledger, lambda row: row))
    if len({row.score for row in rows}) < 2:
        raise DataError(
            f"every row of {', '.join(settings.on)} has the score {rows[0].score:g}: nothing can go with it"
        )
    return rows


def told_apart(row: GroupRow) -> GroupRow:
    """The row; Unusable where its positive is its anchor, or a negative one of both: that is neither to learn nor to
    find."""
    if len({row.anchor, row.positive, *row.negatives}) < 2 + len(set(row.negatives)):
        raise Unusable("a text twice in one row", row.anchor[:200])
    return row


def queries(settings: EvaluateSettings, ledger: Ledger, joined: Counter[str]) -> list[Query]:
    """Rows with one anchor as one query, `joined` says how many. DataError where there is nothing wrong to find."""

    by_anchor: dict[str, list[GroupRow]] = {}
    for row in read_groups(settings.on, ledger, told_apart):
        by_anchor.setdefault(row.anchor, []).append(row)
        if len(by_anchor[row.anchor]) > 1:
            joined["rows joined to one with the same anchor"] += 1
    found = [
        Query(
            own[0].where,
            anchor,
            tuple(dict.fromkeys(row.positive for row in own)),
            tuple((row.positive, negative) for row in own for negative in row.negatives),
        )
        for anchor, own in by_anchor.items()
    ]
    known = set(_candidates(found))
    if not any(known.difference(query.right, (query.text,)) for query in found):
        raise DataError(
            f"{', '.join(settings.on)} holds no text that would be wrong to find: give more pairs, or negatives"
        )
    return found


def _candidates(rows: Sequence[Query]) -> list[str]:
    """All positives and negatives, each once."""
    return list(dict.fromkeys(text for query in rows for text in query.texts[1:]))


def sts(
    settings: EvaluateSettings, model: Model, tokenizer: Tokenizer, rows: Sequence[ScoredRow], on: OnRows
) -> Outcome:
    """Whether texts that people found alike are near to each other."""
    read = _Vectors.of(
        settings, model, tokenizer, [(row.where, (row.text_a, row.text_b)) for row in rows], on
    )
    a_ND, b_ND = read.some([row.text_a for row in rows]), read.some([row.text_b for row in rows])
    cosines, truth = (a_ND * b_ND).sum(1), np.array([row.score for row in rows])
    results = [
        {
            "where": row.where,
            "text_a": row.text_a,
            "text_b": row.text_b,
            "score": row.score,
            "cosine": float(one),
        }
        for row, one in zip(rows, cosines, strict=True)
    ]

    def figures(k: Ints) -> dict[str, float]:
        found = numbers(truth[k], cosines[k])
        return {name: found[name] for name in ("pearson", "spearman")}

    return Outcome(figures, results, counted=read.counted, about=read.about)


def search(
    settings: EvaluateSettings, model: Model, tokenizer: Tokenizer, rows: Sequence[Query], on: OnRows
) -> Outcome:
    """What each anchor finds, its own text left out."""
    read = _Vectors.of(settings, model, tokenizer, [(query.where, query.texts) for query in rows], on)
    known = _candidates(rows)
    place = {text: number for number, text in enumerate(known)}
    right = [[place[text] for text in query.right] for query in rows]
    anchors, without = read.some([query.text for query in rows]), [place.get(query.text) for query in rows]
    found = list(nearest.search(anchors, read.some(known), right, without))
    told = np.array([list(one.figures.values()) for one in found])
    triplets_Q2 = np.array([_nearer(read, query) for query in rows])
    results: list[dict[str, Any]] = []
    for query, one, (nearer, asked) in zip(rows, found, triplets_Q2.tolist(), strict=True):
        result: dict[str, Any] = {"where": query.where, "anchor": query.text, "positives": list(query.right)}
        result |= {"nearest": known[one.nearest], "ranks": list(one.ranks), **one.figures}
        results.append(result | ({"triplets": asked, "triplets_right": nearer} if asked else {}))
    read.counted["texts to choose from"] = len(known)

    def figures(k: Ints) -> dict[str, float]:
        means = dict(zip(found[0].figures, told[k].mean(0).tolist(), strict=True))
        nearer, asked = triplets_Q2[k].sum(0).tolist()
        return means | ({"triplet_accuracy": nearer / asked} if asked else {})

    return Outcome(figures, results, counted=read.counted, about=read.about)


def _nearer(read: _Vectors, query: Query) -> tuple[int, int]:
    """(negatives that are farther than their positive, all of them)."""
    if not query.triplets:
        return 0, 0
    positives_ND, negatives_ND = (read.some(list(side)) for side in zip(*query.triplets, strict=True))
    (anchor_D,) = read.some([query.text])
    return int((positives_ND @ anchor_D > negatives_ND @ anchor_D).sum()), len(query.triplets)


@dataclass(frozen=True)
class _Vectors:
    """Every text, read once: its place in `vectors_ND`."""

    place: dict[str, int]
    vectors_ND: Floats
    counted: Counter[str]
    about: dict[str, str]

    @classmethod
    def of(
        cls, settings: EvaluateSettings, model: Model, tokenizer: Tokenizer,
        rows: Sequence[tuple[str, Sequence[str]]], on: OnRows,
    ) -> _Vectors:  # fmt: skip
        """Of (where, texts) of each row."""
        reader = Reader.over(model, tokenizer, EmbedSettings(model=settings.model))
        counted, asked, ends = Counter[str](), dict[str, Row](), list[int]()
        for where, texts in rows:
            for text in texts:
                asked.setdefault(text, Row(where, text, {}))
            ends.append(len(asked))
        every, vectors = list(asked.values()), list[Floats]()
        for part in batches(len(every), settings.micro_batch_size):
            before = bisect_right(ends, len(vectors))
            vectors += reader.vectors(every[part], counted)
            on(bisect_right(ends, len(vectors)) - before)
        place = {text: number for number, text in enumerate(asked)}
        return cls(place, np.stack(vectors), counted, {"pooling": reader.made.pool})

    def some(self, texts: Sequence[str]) -> Floats:
        """(len(texts), D)."""
        return self.vectors_ND[[self.place[text] for text in texts]]
