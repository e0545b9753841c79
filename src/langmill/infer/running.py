"""Which runner a model gets, an engine over it, and prompts gone on from by it: what commands write with."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from langmill.common.errors import ModelError, SettingsError
from langmill.families.folder import Model
from langmill.infer.engine import Engine
from langmill.infer.native import NativeRunner, refusal
from langmill.infer.recurrence import RecurrentRunner
from langmill.infer.request import Constraint, Event, Request
from langmill.infer.runner import Runner, TorchRunner
from langmill.infer.sampling import Sampling
from langmill.infer.scheduler import Propose
from langmill.model.attend import attend
from langmill.model.config import ModelConfig
from langmill.model.layers import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear, LoRA
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

SLOTS = 32  # prompts that are gone on from side by side, at most
CACHE_BYTES = 1 << 30  # of keys and values on a CPU, unless one prompt alone needs more
ENDLESS = 1 << 20  # places of a conversation with a recurrence, which has no last position
LEAVES = (nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm, nn.ModuleList)
ROUNDED = (Int8Linear, Int4Linear, Int8Embedding, Int4Embedding)


def why_torch(model: Model) -> str | None:
    """Why a model runs by torch's operators rather than by native.cpp, for people to read; None where it does not."""
    if not isinstance(model, Transformer):
        return refusal(model)
    if not model.config.writes:
        return "the model does not write text"
    like = model.main.like
    if like.device.type != "cpu":
        return "only a CPU runs it"
    if like.dtype != torch.float32:
        return f"{str(like.dtype).removeprefix('torch.')} was asked for, and it computes in float32"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return "the model has hooks, which it would not call"
        if getattr(module, "attend", attend) is not attend:
            return "the model's attention is not the usual one"
        if type(module) not in (*LEAVES, *ROUNDED, LoRA) and not any(True for _ in module.children()):
            return f"it knows no layer {type(module).__name__}"
    return refusal(model)


def runner_for(
    model: Model,
    slots: int,
    length: int,
    *,
    tokens: int = 512,
    kv_bits: int = 32,
    threads: int | None = None,
    release: bool = False,
) -> Runner:
    """The fastest runner that can run the model, with `slots` rows of `length` places, at most the model's positions.

    tokens: of one pass, at most. kv_bits: of keys and values, 32 (as the weights) or 8. threads: of the C++ pass,
    None for torch's number. release: the model is the runner's alone, and nothing else reads its weights any more:
    where they are copied there is no second copy. SettingsError where only another runner can do what is asked.
    """
    length = min(length, model.config.length) if isinstance(model.config, ModelConfig) else length
    reason = why_torch(model)
    if reason is None and isinstance(model, Transformer):
        return NativeRunner(model, slots, length, tokens, threads, kv_bits, release)
    if kv_bits != 32:
        raise SettingsError(f"kv_bits is {kv_bits}, which takes the C++ pass, and {reason}: leave it out")
    if isinstance(model, LSTM):
        return RecurrentRunner(model, slots, length)
    return TorchRunner(model, slots, length)


def engine_for(
    model: Model,
    tokenizer: Tokenizer | None,
    *,
    slots: int,
    length: int | None = None,
    propose: Propose | None = None,
    tokens: int = 512,
    kv_bits: int = 32,
    threads: int | None = None,
    release: bool = False,
    queue_tokens: int = 1 << 18,
) -> Engine:
    """An engine over `runner_for`; length None: `places`. See `Engine` for propose and queue_tokens."""
    length = places(model, None, slots, kv_bits) if length is None else length
    runner = runner_for(
        model, slots, length, tokens=tokens, kv_bits=kv_bits, threads=threads, release=release
    )
    return Engine(runner, tokenizer, pass_tokens=tokens, queue_tokens=queue_tokens, propose=propose)


def row_bytes(config: ModelConfig, kv_bits: int = 32) -> int:
    """Bytes of the keys and values of one token."""
    c = config.main
    return 2 * c.layers * c.kv_heads * (c.head_dim * kv_bits // 8 + (4 if kv_bits == 8 else 0))


def cache_bytes(model: Model) -> int:
    """Bytes that keys and values may take: CACHE_BYTES, or half of what a GPU has free where that is more."""
    device = model.main.like.device if isinstance(model, Transformer) else torch.device("cpu")
    return max(CACHE_BYTES, torch.cuda.mem_get_info(device)[0] // 2) if device.type == "cuda" else CACHE_BYTES


def places(model: Model, wanted: int | None = None, slots: int = 1, kv_bits: int = 32) -> int:
    """Places of each of `slots` long conversations: as wanted, or the model's positions as far as `cache_bytes` go.

    A recurrence has no last position. SettingsError where more are wanted than the model has positions for.
    """
    config = model.config
    if not isinstance(config, ModelConfig):
        return ENDLESS if wanted is None else wanted
    if wanted is None:
        return max(1, min(config.length, cache_bytes(model) // (slots * row_bytes(config, kv_bits))))
    if wanted > config.length:
        raise SettingsError(f"context is {wanted}, and the model has {config.length} positions")
    return wanted


def side_by_side(model: Model, prompts: int, length: int, kv_bits: int = 32) -> int:
    """How many prompts of so many places are gone on from at once."""
    most = min(prompts, SLOTS)
    if not isinstance(model.config, ModelConfig):
        return most
    return max(1, min(most, cache_bytes(model) // (row_bytes(model.config, kv_bits) * length)))


def written(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    constraint: Callable[[], Constraint] | None = None,
) -> Generator[list[Event], None, None]:
    """Go on from every prompt; what each pass did, `request` of an event being the prompt's place in the list.

    Equal prompts draw apart. `constraint` makes one for each prompt. An end of the iteration cancels what goes on.
    ModelError with the reason where a request ends with an error.
    """
    seen, rows = Counter[tuple[int, ...]](), dict[int, int]()
    waiting: set[int] = set()  # for their first token
    try:
        for row, ids in enumerate(prompts):
            key = tuple(ids)
            made = None if constraint is None else constraint()
            number = engine.submit(Request(ids, sampling, choice=seen[key], constraint=made))
            rows[number] = row
            waiting.add(number)
            seen[key] += 1
        while rows:
            events = engine.step()
            for event in events:
                number, event.request = event.request, rows[event.request]
                waiting.discard(number)
                if event.finish is not None:
                    del rows[number]
                if event.finish == "error":
                    where = f"prompt {event.request + 1}: " if len(prompts) > 1 else ""
                    raise ModelError(f"{where}{event.reason}")
            yield events
    finally:
        # what is cut off while a prompt is read or copied leaves its slot in doubt
        if waiting:
            engine.abort("cancelled")
        for number in list(rows):
            engine.cancel(number)
        while not engine.idle:
            engine.step()


def writer(
    model: Model, tokenizer: Tokenizer, slots: int, length: int
) -> Callable[..., Generator[list[Event], None, None]]:
    """`written` by an engine of its own, with `slots` rows of `length` places."""
    # the caller has all prompts already, so that a bound on what waits would protect nothing
    return partial(
        written, engine_for(model, tokenizer, slots=slots, length=length, queue_tokens=sys.maxsize)
    )


@contextmanager
def borrowed(model: Model, length: int) -> Iterator[Runner]:
    """A runner with one slot of at least `length` places, kept for the next one who asks with this model.

    It is made anew where the weights are no longer what they were, which costs a look at all of them, and goes when
    the model does. Where nothing is copied there is nothing to keep.
    """
    if why_torch(model) is not None:
        yield runner_for(model, 1, length)
        return
    state = _state(model)
    runner, before = _kept().pop(model, (None, None))  # so that no other has it meanwhile
    if runner is None or before != state or runner.length < min(length, model.config.length):
        runner = runner_for(model, 1, max(length, places(model)))
    try:
        yield runner
    finally:
        _kept()[model] = (runner, state)


def _state(model: nn.Module) -> tuple[Any, ...]:
    """What differs once a weight does. Sums tell more than torch's count of changes, which fused optimisers pass by."""
    return torch.get_num_threads(), *map(_sum, (*model.parameters(), *model.buffers()))


def _sum(part: Tensor) -> tuple[int, int, int]:
    """Where a tensor is, and of its bytes the sums of whole words and of the rest."""
    bytes_ = part.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    whole = len(bytes_) // 8 * 8
    return part.data_ptr(), int(bytes_[:whole].view(np.uint64).sum()), int(bytes_[whole:].sum())


@cache
def _kept() -> WeakKeyDictionary[Model, tuple[Runner, tuple[Any, ...]]]:
    """Runners by their models."""
    return WeakKeyDictionary()
