"""How likely a decoder finds each way to go on: the base of multiple choice, zero- and few-shot (Brown et al. 2020).

n choices, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from langmill.common.errors import DataError, ModelError
from langmill.families.folder import Model
from langmill.model.config import ModelConfig
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Likelihood:
    """Of one choice: its summed log-probability in nats, its tokens, and whether each was the likeliest one."""

    log: float
    tokens: int
    greedy: bool


def split_ids(tokenizer: Tokenizer, context: str, choice: str) -> tuple[list[int], list[int]]:
    """(ids of a context, those of what goes on from it), cut where the tokens of both together are.

    White space at the context's end belongs to the choice, since words are spelt with the space before them. The
    context gets bos where the tokenizer adds it, and the id that starts a document where it would be empty.
    """
    kept = context.rstrip()
    choice, context = context[len(kept) :] + choice, kept
    before, whole = tokenizer.encode(context), tokenizer.encode(context + choice)
    if not whole[len(before) :]:
        raise DataError(f"the choice {choice!r} gives no token of its own")
    start = [tokenizer.bos_id] if tokenizer.specials.add_bos and tokenizer.bos_id is not None else []
    return [*start, *before] or [tokenizer.start_id], whole[len(before) :]


@torch.inference_mode()
def likelihoods(model: Model, context: Sequence[int], choices: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Of each choice after the context, which is read once. ModelError where they do not fit into the model."""
    _check(model, len(context), choices)
    device, longest = model.tokens.weight.device, max(map(len, choices))
    cache: Any = model.new_cache(1, len(context) + longest)
    h_1TD = model.hidden(torch.tensor([list(context)], device=device), cache=cache)
    first_V = torch.log_softmax(model.logits(h_1TD[0, -1]).float(), dim=-1)
    logs = [[float(first_V[choice[0]])] for choice in choices]
    best = [int(first_V.argmax()) == choice[0] for choice in choices]
    going = [place for place, choice in enumerate(choices) if len(choice) > 1]
    if going:
        cache.select(torch.zeros(len(going), dtype=torch.long, device=device))
        rows = [torch.tensor(choices[place], device=device) for place in going]
        inputs_nT = pad_sequence([row[:-1] for row in rows], batch_first=True)
        lengths_n = torch.tensor([len(row) - 1 for row in rows], device=device)
        h_nTD = model.hidden(inputs_nT, cache=cache, lengths_B=lengths_n)
        for place, row, h_TD in zip(going, rows, h_nTD, strict=True):
            logs_TV = torch.log_softmax(model.logits(h_TD[: len(row) - 1]).float(), dim=-1)
            logs[place] += logs_TV.gather(1, row[1:, None])[:, 0].tolist()
            best[place] &= bool((logs_TV.argmax(-1) == row[1:]).all())
    return [
        Likelihood(sum(parts), len(choice), greedy)
        for parts, choice, greedy in zip(logs, choices, best, strict=True)
    ]


def _check(model: Model, context: int, choices: Sequence[Sequence[int]]) -> None:
    if isinstance(model, Transformer) and not model.config.writes:
        raise ModelError(
            "this model does not write text, so it cannot say how likely a text is: take a decoder"
        )
    if not context or not choices or not all(choices):
        raise DataError("a context and choices of at least one token each are needed")
    reach = context + max(map(len, choices)) - 1
    if isinstance(model.config, ModelConfig) and reach > model.config.length:
        raise ModelError(
            f"a context of {context} tokens with its longest choice exceeds the model's {model.config.length}"
        )
