"""Pairs of like texts for a fine-tuning run: a text learns to be nearest to its own among all others.

Figures: accuracy (anchors whose own positive is the nearest of all held-out positives that are other texts than the
anchor), mrr (mean of 1 / its rank), and at each of `tasks.dims` accuracy_D with vectors cut to D numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from langmill.apps.sentence import Recipe, recipe
from langmill.common.errors import DataError, UsageError
from langmill.common.progress import track
from langmill.common.settings import FinetuneSettings
from langmill.data.items import Contrasted
from langmill.data.pipeline import Ledger
from langmill.data.rows import Text
from langmill.data.tasks import GroupRow, read_groups
from langmill.evaluate.nearest import search
from langmill.infer.read import embeddings
from langmill.jobs.evaluate_vectors import told_apart
from langmill.jobs.results import path_shown
from langmill.jobs.work import Scored, Work, limit_of
from langmill.model.config import Pool
from langmill.model.transformer import Transformer
from langmill.text.frames import Encoded
from langmill.text.tasks import Limit, encode_texts
from langmill.text.tokenizer import Tokenizer
from langmill.train import tasks as objectives


def prepare(
    settings: FinetuneSettings, model: Transformer, tokenizer: Tokenizer, ledger: Ledger, quiet: bool
) -> Work:
    """Rows to groups of an anchor, its positive and as many negatives as the row with the fewest has.

    Rows with a text twice are left out; an anchor that is its own positive stays where there is dropout to tell them
    apart (SimCSE, Gao et al. 2021, arXiv:2104.08821), and is counted.
    """
    t, counted = settings.tasks, Counter[str]()
    made, limit = _recipe(settings, model)
    with track("reading", unit="pairs", quiet=quiet) as progress:

        def make(row: GroupRow) -> tuple[GroupRow, list[Encoded]]:
            progress.advance(1)
            if row.anchor == row.positive and settings.train.dropout:
                counted["anchors equal to their positive"] += 1
            else:
                told_apart(row)
            texts = [made.given(text) for text in (row.anchor, row.positive, *row.negatives)]
            return row, encode_texts(tokenizer, texts, limit, counted)

        read = list(read_groups(settings.data, ledger, make))
    size = min(len(documents) for _, documents in read)
    counted["negatives left out"] += sum(len(documents) - size for _, documents in read)
    groups = [
        [Text(row.where, document.ids, document.types) for document in documents[:size]]
        for row, documents in read
    ]
    source = Contrasted.of(groups, tokenizer.fill_id)
    train, held = source.split(settings.holdout)
    dims = tuple((dim, 1.0) for dim in (*t.dims, model.config.main.dim)) if t.dims else ()
    if wide := [dim for dim in t.dims if not 1 <= dim < model.config.main.dim]:
        raise DataError(f"tasks.dims: {wide[0]} is not below the model's width, {model.config.main.dim}")
    pairs = [read[number][1][:2] for number in held.tolist()]
    return Work(
        model=model,
        source=source,
        train=train,
        held=held,
        objective=partial(objectives.contrastive, scale=t.scale, dims=dims, pool=made.pool),
        score=partial(_score, pairs, made.pool, t.dims),
        best="mrr",
        higher=True,
        ledger=ledger,
        counted=counted,
        what="pairs",
        use=[
            (
                "Make vectors:",
                f"langmill embed {path_shown(settings.out)} --file texts.txt --out vectors.npy",
            ),
            ("Search:", f'langmill similar {path_shown(settings.out)} "What?" --file texts.txt'),
        ],
        facts={
            "vectors": {"pool": made.pool, "width": made.width, "length": limit.length, "lower": made.lower}
        },
    )


def _recipe(settings: FinetuneSettings, model: Transformer) -> tuple[Recipe, Limit]:
    """How texts become vectors, and what becomes of long ones: as the base's do by sentence-transformers, but for what
    the settings say. The model that comes out is kept with it."""
    limit = limit_of(settings, model)
    if limit.policy == "window":
        raise DataError("a text becomes one vector: tasks.long_texts=window is not for embed, truncate is")
    made = recipe(settings.model, model, settings.tasks.pool)
    if made.after and settings.tasks.pool == "auto":
        raise UsageError(
            f"the vectors of {settings.model} pass a layer behind the pooling, which is not trained here: choose "
            f"--pool {made.pool} for vectors without it"
        )
    if made.length is not None and settings.tasks.length is None:
        limit = replace(limit, length=min(limit.length, made.length))
    return replace(made, width=model.config.main.dim, after=(), prompt=""), limit


def _score(
    pairs: Sequence[Sequence[Encoded]], pool: Pool, dims: Sequence[int], model: Transformer, whole: bool
) -> Scored:
    flat = [document for pair in pairs for document in pair]
    x_N2D = np.stack(list(embeddings(model, flat, pool, normalise=False))).reshape(len(pairs), 2, -1)
    place: dict[tuple[int, ...], int] = {}  # of each positive among those that differ
    right = [place.setdefault(tuple(positive.ids), len(place)) for _, positive in pairs]
    selves = [place.get(tuple(anchor.ids)) for anchor, _ in pairs]
    without = [None if at == own else at for at, own in zip(selves, right, strict=True)]
    first = np.unique(right, return_index=True)[1]

    def ranked(dim: int | None) -> dict[str, float]:
        cut_N2D = x_N2D[..., :dim]
        unit_N2D = cut_N2D / np.maximum(np.linalg.norm(cut_N2D, axis=-1, keepdims=True), 1e-12)
        found = search(unit_N2D[:, 0], unit_N2D[first, 1], [[own] for own in right], without)
        ranks = np.array([one.ranks[0] for one in found])
        return {"accuracy": float((ranks == 1).mean()), "mrr": float((1 / ranks).mean())}

    return Scored(ranked(None) | {f"accuracy_{dim}": ranked(dim)["accuracy"] for dim in dims})
