"""Going on from a prompt: `generate` by an engine, the others by a plain loop over the model itself.

The loop needs no engine and packs no weights, so that it serves where a model is looked at rather than used: in
training, calibration and evaluation. It is what the engine is tested against.

Legend: B rows still going on, T tokens of the longest prompt, V vocabulary, D width.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from langmill.common.errors import ModelError, SettingsError, UsageError
from langmill.families.folder import Model
from langmill.infer.engine import Engine
from langmill.infer.running import borrowed, written
from langmill.infer.sampling import Sampling, sample, streams
from langmill.infer.text import Writer
from langmill.model.config import ModelConfig
from langmill.text.tokenizer import Tokenizer

Finish = Literal["stop", "length"]


class Token(NamedTuple):
    """One generated token: the prompt it goes on from, its id and, on the row's last token, why it ended.

    finish: "stop" after a stop id or stop text; "length" after max_new_tokens or the model's last position.
    """

    row: int
    id: int
    finish: Finish | None


class Piece(NamedTuple):
    """A `Token` and the text that became certain with it, often empty."""

    row: int
    id: int
    finish: Finish | None
    text: str


@torch.inference_mode()
def generate_ids(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int] = frozenset(),
    ended: Callable[[int, int], bool] | None = None,
) -> Iterator[list[Token]]:
    """Go on from every prompt at once; each step yields one `Token` a row that is still going on.

    Rows that end leave the batch. A row's tokens do not depend on the others in the batch (in float32;
    narrower types may round differently). `ended(row, id)` is asked after each token that is no stop id:
    True ends the row. `sampling.stop` is text and read by `generate_pieces`, not here.
    Memory: the whole cache is made at the start, for the longest prompt plus max_new_tokens.
    Raises ModelError for a prompt that is empty, longer than the model's positions, or of foreign ids.
    """
    limits = room(model, prompts, sampling.max_new_tokens)
    device = next(model.parameters()).device
    rows = list(range(len(prompts)))
    if not rows:
        return
    numbers = streams(sampling.seed, prompts)
    tokens_BT = pad_sequence(
        [torch.tensor(prompt, dtype=torch.long) for prompt in prompts], batch_first=True
    ).to(device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    # Any: each model takes the cache that it makes. The last token of a row is never fed back, hence the - 1.
    needed = max(len(p) + n - 1 for p, n in zip(prompts, limits, strict=True))
    cache: Any = model.new_cache(len(rows), needed)
    seen_BV = _seen(tokens_BT, lengths_B, model.config.vocab) if sampling.repetition_penalty != 1 else None
    counts_BV = torch.zeros(len(rows), model.config.vocab, device=device) if sampling.counts else None
    h_BD = _prefill(model, tokens_BT, lengths_B, cache)
    written = 0
    while rows:
        ids_B = sample(model.logits(h_BD), sampling, seen_BV, [numbers[row] for row in rows], counts_BV)
        written += 1
        step: list[Token] = []
        for row, token in zip(rows, ids_B.tolist(), strict=True):
            stop = token in stop_ids or (ended is not None and ended(row, token))
            step.append(Token(row, token, "stop" if stop else "length" if written == limits[row] else None))
        yield step
        if seen_BV is not None:
            seen_BV.scatter_(1, ids_B[:, None], True)
        if counts_BV is not None:
            counts_BV[torch.arange(len(rows), device=device), ids_B] += 1
        going = [place for place, token in enumerate(step) if token.finish is None]
        if len(going) < len(rows):
            rows = [rows[place] for place in going]
            if not rows:
                return
            kept = torch.tensor(going, device=device)
            ids_B = ids_B[kept]
            seen_BV = None if seen_BV is None else seen_BV[kept]
            counts_BV = None if counts_BV is None else counts_BV[kept]
            cache.select(kept)
        h_BD = model.hidden(ids_B[:, None], cache=cache)[:, 0]


def room(model: Model, prompts: Sequence[Sequence[int]], wanted: int) -> list[int]:
    """How many of the `wanted` tokens each row may write before the model's last position.

    A recurrence has none. Raises ModelError as `generate_ids` does, with the prompt's number in `prompts`.
    """
    found = []
    limit = model.config.length if isinstance(model.config, ModelConfig) else None
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ModelError(f"prompt {index + 1} has no tokens: start it with the tokenizer's start token")
        if limit is not None and len(prompt) > limit:
            raise ModelError(
                f"prompt {index + 1} has {len(prompt)} tokens and the model has {limit} positions: shorten the prompt"
            )
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab:
            raise ModelError(
                f"prompt {index + 1} holds the ids {min(prompt)} to {max(prompt)} and the model knows "
                f"{model.config.vocab} tokens: the tokenizer belongs to another model"
            )
        found.append(wanted if limit is None else min(wanted, limit - len(prompt) + 1))
    return found


def _prefill(model: Model, tokens_BT: Tensor, lengths_B: Tensor, cache: Any) -> Tensor:
    """Read the prompts, padded on the right, into the cache; (B, D) the states of their last tokens."""
    even = bool((lengths_B == tokens_BT.shape[1]).all())
    h_BTD = model.hidden(tokens_BT, cache=cache, lengths_B=None if even else lengths_B)
    return h_BTD[torch.arange(len(tokens_BT), device=tokens_BT.device), lengths_B - 1]


def _seen(tokens_BT: Tensor, lengths_B: Tensor, vocabulary: int) -> Tensor:
    """(B, V) True at each row's own ids; padding repeats the row's first token and so marks nothing new."""
    padding_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) >= lengths_B[:, None]
    own_BT = torch.where(padding_BT, tokens_BT[:, :1], tokens_BT)
    return torch.zeros(len(tokens_BT), vocabulary, dtype=torch.bool, device=tokens_BT.device).scatter_(
        1, own_BT, True
    )


def generate_pieces(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> Iterator[list[Piece]]:
    """`generate_ids` with each row's text: whole characters only, never a stop text or a stop id's text."""
    writers = [Writer(tokenizer, sampling.stop) for _ in prompts]

    def ended(row: int, token: int) -> bool:
        return writers[row].ended(token)

    for step in generate_ids(model, prompts, sampling, tokenizer.stop_ids, ended):
        yield [Piece(*token, writers[token.row].take(token.finish is not None)) for token in step]


def generate(
    model: Model, tokenizer: Tokenizer | None, prompt: str | Sequence[int], **sampling: Any
) -> Iterator[str]:
    """Go on from one prompt; yields text as it becomes certain, at least a character at a time.

    `prompt` is text, or ids such as `text.chat.chat_ids` gives; the other arguments are the fields of
    `Sampling`. The arguments are checked at once, before the first piece is asked for. On a CPU the weights are
    copied once, packed, and kept as long as the model lives and they do not change.
    """
    if tokenizer is None:
        raise UsageError("this model came without a tokenizer: generate_ids goes on from token ids")
    known = [field.name for field in fields(Sampling)]
    for name in sampling:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            raise SettingsError(f"generate knows no setting '{name}': did you mean '{near}'?")
    ids = tokenizer.prompt_ids(prompt) if isinstance(prompt, str) else prompt
    chosen = Sampling(**sampling)
    room(model, [ids], chosen.max_new_tokens)
    return _streamed(model, tokenizer, ids, chosen)


def _streamed(model: Model, tokenizer: Tokenizer, ids: Sequence[int], sampling: Sampling) -> Iterator[str]:
    with borrowed(model, len(ids) + sampling.max_new_tokens - 1) as runner:
        with closing(written(Engine(runner, tokenizer, queue_tokens=len(ids)), [ids], sampling)) as steps:
            for text in (event.text for events in steps for event in events):
                if text:
                    yield text
