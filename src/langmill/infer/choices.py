"""How likely a decoder finds each way to go on: the base of multiple choice, zero- and few-shot (Brown et al. 2020).

B questions, n choices, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from langmill.common.errors import DataError, ModelError
from langmill.families.folder import Model
from langmill.infer.past import Past
from langmill.model.cache import Cache
from langmill.model.config import ModelConfig
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

Ids = Sequence[int]
Question = tuple[Ids, Sequence[Ids]]  # a context and the ways to go on from it
LEAST = 32  # ids that contexts share: fewer are read with each of them, since a pass of their own costs more


@dataclass(frozen=True)
class Likelihood:
    """Of one choice: its summed log-probability in nats, its tokens, and whether each was the likeliest one."""

    log: float
    tokens: int
    greedy: bool


def question_ids(tokenizer: Tokenizer, context: str, choices: Sequence[str]) -> Question:
    """(ids of a context, those of each way to go on from it), cut where the tokens of both together are.

    White space at the context's end belongs to the choices, since words are spelt with the space before them. The
    context gets bos where the tokenizer adds it, and the id that starts a document where it would be empty. DataError
    names a choice without a token of its own.
    """
    kept = context.rstrip()
    space = context[len(kept) :]
    before, *wholes = tokenizer.encode_batch([kept, *(kept + space + choice for choice in choices)])
    going = [whole[len(before) :] for whole in wholes]
    if empty := [choice for choice, own in zip(choices, going, strict=True) if not own]:
        raise DataError(f"the choice {space + empty[0]!r} gives no token of its own")
    start = [tokenizer.bos_id] if tokenizer.specials.add_bos and tokenizer.bos_id is not None else []
    return [*start, *before] or [tokenizer.start_id], going


def beginning(contexts: Sequence[Ids], known: Ids = ()) -> int:
    """How many ids all contexts, and `known` ones where there are any, begin with: never all of a context, since one
    must be read; 0 where they are fewer than LEAST."""
    rows = [list(context)[:-1] for context in contexts] + ([list(known)] if known else [])
    first, last = min(rows), max(rows)  # in order, so that what these two share is what all of them share
    pairs = enumerate(zip(first, last, strict=False))
    count = next((at for at, (a, b) in pairs if a != b), min(len(first), len(last)))
    return count if count >= LEAST else 0


def likelihoods(model: Model, context: Sequence[int], choices: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Of each choice after one context: `together` for a single question."""
    return together(model, [(context, choices)])[0]


@torch.inference_mode()
def together(
    model: Model, questions: Sequence[Question], past: Past | None = None, shared: int = 0
) -> list[list[Likelihood]]:
    """Likelihoods of several questions' choices: one pass over the contexts, one over all the choices.

    The first `shared` ids of every context are the same (see `beginning`): `past` reads them once and keeps them.
    ModelError where the model does not write, DataError for an empty context or choice.
    """
    _check(model, questions)
    device, longest = (
        next(model.parameters()).device,
        max(len(own) for _, going in questions for own in going),
    )
    most = max(len(context) for context, _ in questions)
    cache, kept = _opened(model, [context for context, _ in questions], most + longest, past, shared)
    contexts = [torch.tensor(list(context[kept:]), device=device) for context, _ in questions]
    lengths_B = torch.tensor([len(context) for context in contexts], device=device)
    tokens_BT = pad_sequence(contexts, batch_first=True)
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


def _opened(
    model: Model, contexts: Sequence[Ids], length: int, past: Past | None, shared: int
) -> tuple[Any, int]:
    """(a cache of `length` places for each context, how many ids of each it holds): `shared` of them, or none where the
    model's cache is no list of places."""
    cache: Any = model.new_cache(len(contexts), length)
    if past is None or not shared or not isinstance(cache, Cache):
        return cache, 0
    ids = list(contexts[0][: shared + 1])
    one = past.open(model, ids, shared + 1)
    if unread := ids[past.reused : shared]:
        model.hidden(torch.tensor([unread], device=cache.lengths_B.device), cache=one)
        past.read(unread)
    for here, there in zip(one.layers, cache.layers, strict=True):
        there.keys_BGSD[:, :, :shared] = here.keys_BGSD[:, :, :shared]
        there.values_BGSD[:, :, :shared] = here.values_BGSD[:, :, :shared]
    cache.cut(shared)
    return cache, shared


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
                f"a context of {len(context)} tokens with its longest choice exceeds the model's {most}"
            )
