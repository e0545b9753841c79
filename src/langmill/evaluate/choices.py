"""Multiple choice by a decoder's likelihood: many questions in one pass, and which choice that gives.

Figures as in EleutherAI's lm-evaluation-harness: `acc` takes the choice of the highest log-probability, `acc_norm` that
of the highest log-probability a character. B questions, n choices, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from langmill.common.errors import DataError, ModelError
from langmill.families.folder import Model
from langmill.infer.choices import Likelihood, split_ids
from langmill.model.config import ModelConfig
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

Ids = Sequence[int]
Question = tuple[Ids, Sequence[Ids]]  # a context and the ways to go on from it
PLACES = 1 << 14  # that a cache holds at once: every choice has its own copy of the context's keys and values


def question(tokenizer: Tokenizer, context: str, choices: Sequence[str], most: int | None) -> Question:
    """A context and its choices as ids; of one with more than `most` tokens the beginning is left out.

    ModelError where a choice alone is longer than that.
    """
    parts = [split_ids(tokenizer, context, choice) for choice in choices]
    before, going = parts[0][0], [own for _, own in parts]
    room = len(before) if most is None else most + 1 - max(map(len, going))
    if room < 1:
        raise ModelError(f"a choice of {max(map(len, going))} tokens exceeds the model's {most}")
    return before[-room:], going


def answered(
    model: Model, questions: Sequence[Question], rows: int = 8, on_rows: Callable[[int], object] | None = None
) -> list[list[Likelihood]]:
    """The likelihoods of each question's choices, at most `rows` questions in one pass, the longest first.

    No figure depends on `rows` (in float32, to rounding).
    """
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i][0]))
    found: list[list[Likelihood]] = [[] for _ in questions]
    while order:
        group = order[: _fitting([questions[i] for i in order[:rows]])]
        order = order[len(group) :]
        for i, own in zip(group, together(model, [questions[i] for i in group]), strict=True):
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


@torch.inference_mode()
def together(model: Model, questions: Sequence[Question]) -> list[list[Likelihood]]:
    """Likelihoods of several questions' choices: one pass over the contexts, one over all the choices.

    ModelError where the model does not write, DataError for an empty context or choice.
    """
    _check(model, questions)
    device, longest = model.head_weight.device, max(len(own) for _, going in questions for own in going)
    contexts = [torch.tensor(list(context), device=device) for context, _ in questions]
    lengths_B = torch.tensor([len(context) for context, _ in questions], device=device)
    tokens_BT = pad_sequence(contexts, batch_first=True)
    cache: Any = model.new_cache(len(questions), tokens_BT.shape[1] + longest)
    even = bool((lengths_B == tokens_BT.shape[1]).all())
    h_BTD = model.hidden(tokens_BT, cache=cache, lengths_B=None if even else lengths_B)
    last_BD = h_BTD[torch.arange(len(questions), device=device), lengths_B - 1]
    first_BV = torch.log_softmax(model.logits(last_BD).float(), dim=-1)
    best_B = first_BV.argmax(-1).tolist()
    places = [(b, n) for b, (_, going) in enumerate(questions) for n in range(len(going))]
    logs = {(b, n): float(first_BV[b, questions[b][1][n][0]]) for b, n in places}
    likeliest = {(b, n): best_B[b] == questions[b][1][n][0] for b, n in places}
    if more := [(b, n) for b, n in places if len(questions[b][1][n]) > 1]:
        cache.select(torch.tensor([b for b, _ in more], device=device))
        rows = [torch.tensor(list(questions[b][1][n]), device=device) for b, n in more]
        lengths_n = torch.tensor([len(row) - 1 for row in rows], device=device)
        inputs_nT = pad_sequence([row[:-1] for row in rows], batch_first=True)
        h_nTD = model.hidden(inputs_nT, cache=cache, lengths_B=lengths_n)
        for place, row, h_TD in zip(more, rows, h_nTD, strict=True):
            logs_TV = torch.log_softmax(model.logits(h_TD[: len(row) - 1]).float(), dim=-1)
            logs[place] += float(logs_TV.gather(1, row[1:, None]).double().sum())
            likeliest[place] &= bool((logs_TV.argmax(-1) == row[1:]).all())
    return [
        [Likelihood(logs[b, n], len(own), likeliest[b, n]) for n, own in enumerate(going)]
        for b, (_, going) in enumerate(questions)
    ]


def chosen(logs: Sequence[float], choices: Sequence[str]) -> tuple[int, int]:
    """(the likeliest choice, the likeliest one a character); the first of equals."""
    sums = np.array(logs, np.float64)
    return int(sums.argmax()), int((sums / [max(1, len(choice)) for choice in choices]).argmax())


def longest(model: Model) -> int | None:
    """The positions that a model has; None where it has no end."""
    return model.config.length if isinstance(model.config, ModelConfig) else None


def _check(model: Model, questions: Sequence[Question]) -> None:
    if isinstance(model, Transformer) and not model.config.writes:
        raise ModelError(
            "this model does not write text, so it cannot say how likely a text is: take a decoder"
        )
    most = longest(model)
    for context, going in questions:
        if not context or not going or not all(going):
            raise DataError("a context and choices of at least one token each are needed")
        reach = len(context) + max(map(len, going)) - 1
        if most is not None and reach > most:
            raise ModelError(
                f"a context with its longest choice reaches {reach} tokens, beyond the model's {most}"
            )
