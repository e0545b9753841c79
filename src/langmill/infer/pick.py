"""The next token of each request from its logits: penalty, constraint, then greedy or drawn.

B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from langmill.infer.request import Constraint, Likely, Live
from langmill.infer.sampling import adjust, allowed, choose, penalise


class Pick(NamedTuple):
    """The next id, or the reason why there is none."""

    id: int
    problem: str | None
    likely: Likely | None


@torch.inference_mode()
def pick(lives: Sequence[Live], logits_BV: Tensor) -> list[Pick]:
    """One `Pick` a request; logits_BV may be changed. What one request's logits or constraint do to it does not touch
    the others."""
    # before anything below changes them
    logs = {
        row: logits_BV[row].log_softmax(-1)
        for row, live in enumerate(lives)
        if live.request.logprobs is not None
    }
    _penalise(lives, logits_BV)
    problems = _constrain(lives, logits_BV)
    ids, finite = choose(
        logits_BV, [live.request.sampling for live in lives], [live.numbers for live in lives]
    )
    picks = []
    for row, live in enumerate(lives):
        if live.request.constraint is not None and finite[row] and row not in problems:
            try:
                ids[row] = _steered(live, live.request.constraint, ids[row])
            except Exception as error:
                problems[row] = _failed(error)
        problem = problems.get(row)
        if problem is None and not finite[row]:
            problem = (
                "the model's logits are not finite numbers (NaN or infinite): its weights are damaged or overflow in "
                "this number type; try float32"
            )
        told = logs.get(row) if problem is None else None
        likely = None if told is None else _likely(told, ids[row], live.request.logprobs or 0)
        picks.append(Pick(ids[row], problem, likely))
    return picks


def tell(live: Live, start: int, logits_WV: Tensor) -> None:
    """Note how likely the prompt's tokens behind the places from `start` on were; those that are known stay."""
    prompt = live.prompt
    for place in range(max(start, len(live.told)), min(start + len(logits_WV), len(prompt) - 1)):
        logs_V = logits_WV[place - start].log_softmax(-1)
        live.told.append(_likely(logs_V, int(prompt[place + 1]), live.request.logprobs or 0))


def _penalise(lives: Sequence[Live], logits_BV: Tensor) -> None:
    penalised = [(row, live) for row, live in enumerate(lives) if live.seen_V is not None]
    if penalised:
        rows = [row for row, _ in penalised]
        seen_BV = torch.stack([live.seen_V for _, live in penalised if live.seen_V is not None])
        by_B = torch.tensor([live.request.sampling.repetition_penalty for _, live in penalised])
        logits_BV[rows] = penalise(logits_BV[rows], seen_BV, by_B[:, None])
    for row, live in enumerate(lives):
        if live.counts_V is not None or live.request.sampling.biases:
            logits_BV[row] = adjust(logits_BV[row], live.counts_V, live.request.sampling)


def _constrain(lives: Sequence[Live], logits_BV: Tensor) -> dict[int, str]:
    """Forbid what constraints do not allow; the rows that cannot go on, with the reason."""
    problems, vocab = {}, logits_BV.shape[1]
    for row, live in enumerate(lives):
        constraint = live.request.constraint
        if constraint is None:
            continue
        scores_V = logits_BV[row].numpy()
        try:
            if not live.request.sampling.temperature and _fits(live, constraint, int(scores_V.argmax())):
                continue  # what is likeliest of all is so of what the mask leaves
            mask = constraint.mask()
            allowed_V = np.ones(vocab, np.bool_) if mask is None else allowed(mask, vocab).numpy()
            allowed_V[[id for id in live.stop_ids if id < vocab]] = constraint.whole
        except Exception as error:  # it was given with the request: whatever it does ends that request alone
            problems[row] = _failed(error)
            continue
        if not allowed_V.any():
            problems[row] = "the request's constraint allows no token here"
        most_V = (allowed_V.astype(np.float32) - np.float32(0.5)) * np.float32(np.inf)
        np.fmin(scores_V, most_V, out=scores_V)  # -inf for NaN too, where it is forbidden
    return problems


def _fits(live: Live, constraint: Constraint, id: int) -> bool:
    return constraint.whole if id in live.stop_ids else constraint.allows(id)


def _steered(live: Live, constraint: Constraint, id: int) -> int:
    return id if id in live.stop_ids else constraint.steer(id, live.limit - len(live.written))


def _failed(error: Exception) -> str:
    return f"the request's constraint failed: {type(error).__name__}: {error}"


def _likely(logs_V: Tensor, id: int, count: int) -> Likely:
    best = logs_V.topk(min(count, len(logs_V)))
    return Likely(float(logs_V[id]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
