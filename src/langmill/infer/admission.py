"""Whether an engine's model can do what a request asks, before it waits for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from langmill.common.errors import ModelError, UsageError
from langmill.infer.request import Live, Request
from langmill.infer.runner import Embedder, Runner, SourceRunner
from langmill.infer.sampling import streams
from langmill.infer.text import Writer
from langmill.text.tokenizer import Tokenizer


def admitted(
    number: int,
    request: Request,
    runner: Runner | None,
    embedder: Embedder | None,
    tokenizer: Tokenizer | None,
) -> Live:
    """The request ready to wait. ModelError where the model cannot do it, UsageError where its parts do not fit."""
    sampling, prompt = request.sampling, np.asarray(request.prompt, np.int64)
    if request.kind == "embed":
        if embedder is None:
            raise ModelError("this engine makes no vectors: no model for them was given to it")
        _check_ids("text", request.prompt, embedder.length, embedder.vocab)
        return Live(number, request, prompt)
    if runner is None:
        raise ModelError("this engine writes nothing: its model makes vectors only")
    _check_ids("prompt", request.prompt, runner.length, runner.vocab)
    longest = runner.source if isinstance(runner, SourceRunner) else 0
    if (request.source is not None) != (longest > 0):
        raise ModelError(
            "this model reads before it writes: give a source" if longest else "this model reads no source"
        )
    if request.source is not None:
        _check_ids("source", request.source, longest, runner.vocab)
    if tokenizer is None and (sampling.stop or request.stop_ids is None):
        raise UsageError("this engine has no tokenizer: say which ids stop, and give no stop texts")
    if request.logprobs is not None and not 0 <= request.logprobs <= runner.vocab:
        raise UsageError(f"logprobs is {request.logprobs}: it must be from 0 to {runner.vocab}")
    stops = request.stop_ids
    if stops is None and tokenizer is not None:
        stops = tokenizer.stop_ids
    seen_V = None
    if sampling.repetition_penalty != 1:
        seen_V = torch.zeros(runner.vocab, dtype=torch.bool)
        seen_V[torch.from_numpy(prompt)] = True
    if (biased := max(dict(sampling.biases), default=0)) >= runner.vocab:
        raise UsageError(f"logit_bias names the id {biased}, and the model knows {runner.vocab} tokens")
    return Live(
        number,
        request,
        prompt,
        limit=min(sampling.max_new_tokens, runner.length - len(prompt) + 1),
        stop_ids=stops or frozenset(),
        numbers=streams(sampling.seed, [request.prompt] * (request.choice + 1))[-1],
        writer=None if tokenizer is None else Writer(tokenizer, sampling.stop),
        seen_V=seen_V,
        counts_V=torch.zeros(runner.vocab) if sampling.counts else None,
        encoded=request.source is None,
    )


def _check_ids(what: str, ids: Sequence[int], longest: int, vocab: int) -> None:
    if not len(ids):
        raise ModelError(f"the {what} has no tokens: start it with the tokenizer's start token")
    if len(ids) > longest:
        raise ModelError(
            f"the {what} has {len(ids)} tokens and there is room for {longest}: shorten it, or make room for more"
        )
    if not 0 <= min(ids) <= max(ids) < vocab:
        raise ModelError(
            f"the {what} holds the ids {min(ids)} to {max(ids)} and the model knows {vocab} tokens: the tokenizer "
            "belongs to another model"
        )
