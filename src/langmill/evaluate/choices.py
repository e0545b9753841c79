"""Multiple choice by a decoder's likelihood: many questions in one pass, and which choice that gives.

Figures as in EleutherAI's lm-evaluation-harness: `acc` takes the choice of the highest log-probability, `acc_norm` that
of the highest log-probability a character.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from langmill.common.errors import ModelError
from langmill.families.folder import Model
from langmill.infer.choices import Likelihood, Question, beginning, question_ids, together
from langmill.infer.past import Past
from langmill.text.tokenizer import Tokenizer

PLACES = 1 << 14  # that a cache holds at once: every choice has its own copy of the context's keys and values


def question(tokenizer: Tokenizer, context: str, choices: Sequence[str], most: int | None) -> Question:
    """A context and its choices as ids; of one with more than `most` tokens the beginning is left out.

    ModelError where a choice alone is longer than that.
    """
    before, going = question_ids(tokenizer, context, choices)
    room = len(before) if most is None else most + 1 - max(map(len, going))
    if room < 1:
        raise ModelError(f"a choice of {max(map(len, going))} tokens exceeds the model's {most}")
    return before[-room:], going


def answered(
    model: Model,
    questions: Sequence[Question],
    rows: int = 8,
    on_rows: Callable[[int], object] | None = None,
    past: Past | None = None,
) -> list[list[Likelihood]]:
    """The likelihoods of each question's choices, at most `rows` questions in one pass, the longest first.

    What all contexts begin with, such as few-shot examples, is read once; `past` keeps it for calls to come, whose
    contexts should begin likewise. No figure depends on `rows` or `past` (in float32, to rounding).
    """
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i][0]))
    found: list[list[Likelihood]] = [[] for _ in questions]
    spared = len(questions) > 1 or (past is not None and bool(questions))
    past = Past() if past is None else past
    shared = beginning([context for context, _ in questions], past.ids) if spared else 0
    while order:
        group = order[: _fitting([questions[i] for i in order[:rows]])]
        order = order[len(group) :]
        asked = [questions[i] for i in group]
        for i, own in zip(group, together(model, asked, past, shared), strict=True):
            found[i] = own
        if on_rows is not None:
            on_rows(len(group))
    return found


def _fitting(questions: Sequence[Question]) -> int:
    """How many of the first questions, one at least, have at most PLACES places with all their choices."""
    longest, choices = len(questions[0][0]), 0
    for count, (_, going) in enumerate(questions):
        choices += len(going)
        if count and choices * (longest + max(map(len, going), default=0)) > PLACES:
            return count
    return len(questions)


def chosen(logs: Sequence[float], choices: Sequence[str]) -> tuple[int, int]:
    """(the likeliest choice, the likeliest one a character); the first of equals."""
    sums = np.array(logs, np.float64)
    return int(sums.argmax()), int((sums / [max(1, len(choice)) for choice in choices]).argmax())
