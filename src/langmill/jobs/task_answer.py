"""Questions with contexts for a fine-tuning run: the model learns where an answer begins and ends.

Figures: exact_match and f1 by SQuAD's rule (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1), the best over the
answers of a question, and answer_threshold: how much likelier "no answer" must be to be said, for the best f1 on what
is held out. Most windows of a long text hold no answer, and a model learns to say so first of all: at 0 it may never
speak. Where every question has an answer it is infinite, which is kept as null and shown as "never".
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from langmill.adapt.heads import with_head
from langmill.common.progress import track
from langmill.common.settings import FinetuneSettings
from langmill.data.items import Spanned
from langmill.data.pipeline import Ledger
from langmill.data.rows import Text
from langmill.data.tasks import QuestionRow, read_questions
from langmill.infer.read import token_scores
from langmill.jobs.report import Sample, samples, text
from langmill.jobs.report import join as joined
from langmill.jobs.results import path_shown
from langmill.jobs.work import Scored, Work, limit_of
from langmill.model.transformer import Transformer
from langmill.text.answer import (
    ContextWindow,
    answer_targets,
    best_answers,
    best_threshold,
    encode_question,
    exact_match,
    f1,
)
from langmill.text.tokenizer import Tokenizer
from langmill.train import tasks as objectives


def prepare(
    settings: FinetuneSettings, model: Transformer, tokenizer: Tokenizer, ledger: Ledger, quiet: bool
) -> Work:
    """Rows to items: the windows of a context are several; all questions about one context are on one side."""
    counted, limit = Counter[str](), limit_of(settings, model, "window")
    with track("reading", unit="questions", quiet=quiet) as progress:

        def make(row: QuestionRow) -> tuple[QuestionRow, list[ContextWindow]]:
            progress.advance(1)
            return row, encode_question(tokenizer, row.question, row.context, limit, counted)

        read = list(read_questions(settings.data, ledger, make))
    windows = [(number, window) for number, (_, own) in enumerate(read) for window in own]
    items = [
        Text(read[number][0].where, window.encoded.ids, window.encoded.types, key=read[number][0].context)
        for number, window in windows
    ]
    places = [place for row, own in read for place in answer_targets(own, row.spans, counted)]
    allowed = [window.allowed for _, window in windows]
    source = Spanned.of(items, places, tokenizer.fill_id, allowed)
    train, held = source.split(settings.holdout)
    counted["questions with several answers, of which each window learns the first that it holds"] += sum(
        len(set(row.spans)) > 1 for row, _ in read
    )
    counted["windows without the answer"] += sum(
        places[item] == (0, 0) and read[windows[item][0]][0].span is not None for item in train.tolist()
    )
    rows = [row for row, _ in read]
    heldout = _Held(rows, [windows[item] for item in held.tolist()], settings.samples)
    return Work(
        model=with_head(model, "answer", (), settings.seed),
        source=source,
        train=train,
        held=held,
        objective=objectives.span,
        score=heldout.score,
        best="f1",
        higher=True,
        ledger=ledger,
        counted=counted,
        what="questions",
        settle=settled,
        owners=np.array([number for number, _ in windows]),
        limit=limit,
        use=[("Ask:", f'langmill answer {path_shown(settings.out)} --question "Who?" "A text"')],
    )


class _Held:
    """The held-out questions, and how a model does on them."""

    def __init__(self, rows: list[QuestionRow], windows: list[tuple[int, ContextWindow]], shown: int):
        self.rows, self.windows, self.shown = rows, windows, shown
        self.can_be_empty = any(row.span is None for row in rows)  # of all rows: in use anything may be asked

    def score(self, model: Transformer, whole: bool) -> Scored:
        """Figures of the best spans over each question's windows, under the threshold that does best."""
        own = defaultdict(list)
        outputs = token_scores(model, (window.encoded for _, window in self.windows))
        for (number, window), output in zip(self.windows, outputs, strict=True):
            own[number].append((window, output))
        marks: list[list[tuple[float, float]]] = []
        margins: list[float] = []
        asked: list[tuple[QuestionRow, str]] = []
        for number, parts in own.items():
            row = self.rows[number]
            found = best_answers(
                row.context,
                [window for window, _ in parts],
                [output[:, 0] for _, output in parts],
                [output[:, 1] for _, output in parts],
                no_answer=False,
            )
            marks.append(
                [(exact_match(text, row.answers), f1(text, row.answers)) for text in (found["answer"], "")]
            )
            margins.append(_margin(found))
            asked.append((row, found["answer"]))
        margin_K, mark_KSM = (
            np.array(margins),
            np.array(marks, np.float64),
        )  # M: exact match and f1; S: span or none
        threshold = best_threshold(margin_K, *mark_KSM[:, :, 1].T) if self.can_be_empty else math.inf
        none_K = margin_K > threshold
        exact, overlap = np.where(none_K[:, None], mark_KSM[:, 1], mark_KSM[:, 0]).mean(axis=0).tolist()
        figures = {"exact_match": exact, "f1": overlap, "answer_threshold": threshold}
        if not whole:
            return Scored(figures)
        words = text(f"{len(marks)} held-out questions; here are the first.", note=True)
        items = [
            Sample(who, "", said or "(no answer)", colour)
            for (row, span), none in list(zip(asked, none_K.tolist(), strict=True))[: self.shown]
            for who, said, colour in (
                ("asked", row.question, "s3"),
                ("the model", "" if none else span, "s0"),
                ("the data", " / ".join(row.answers), "s2"),
            )
        ]
        return Scored(figures, [("Answers", joined(words, samples(items)))])


def _margin(found: dict[str, Any]) -> float:
    """By how much "no answer" beats the best span: the difference of their scores."""
    span, none = (found["best"] or [{"score": 0.0}])[0]["score"], found["no_answer_score"]
    with np.errstate(divide="ignore"):
        return float(np.log(none) - np.log(span))


def settled(model: Transformer, figures: Mapping[str, float]) -> None:
    """Write into the model's own settings what was found on the questions held out."""
    config = model.config
    assert config.head is not None
    found = figures["answer_threshold"]
    threshold = found if math.isfinite(found) else None
    model.config = replace(config, head=replace(config.head, threshold=threshold))
