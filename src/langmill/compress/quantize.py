"""Bring a model to 8 or 4 bits, in place: which layers, in what order, and how far each is from what it was.

Layers of the blocks are rounded by GPTQ where there is text to calibrate by, block by block, each on what the blocks
before it give now that they are rounded. Embedding and output layer, and all layers where there is no text, are rounded
to the nearest. O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from langmill.common.errors import ModelError
from langmill.compress.gptq import DAMPING, Hessian, gptq
from langmill.compress.rounding import LARGEST, Rounding, made, nearest, steps_for, values
from langmill.model.config import LSTMConfig
from langmill.model.layers import GROUP, ROUNDED, LoRA
from langmill.model.transformer import Stack, Transformer

Inputs = Mapping[str, Any]  # one pass: "tokens_BT", and the other arguments of `Transformer.hidden`
EMBEDDING, HEAD = "tokens", "head"
_DIGITS = 4  # of an embedding's steps, where its values are to be exact in float16


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer: `roundings` by name; `left` are layers that stay, with the reason."""

    roundings: Mapping[str, Rounding]
    left: Mapping[str, str]


@dataclass(frozen=True)
class Changed:
    """A layer that was rounded. Errors are lengths as shares of the original's: of the weights, and of the outputs on
    the calibration text (None: not measured). bytes: of codes, steps and minima; before, as the model held them."""

    name: str
    method: Literal["gptq", "nearest"]
    bits: int
    shape: tuple[int, int]
    weight_error: float
    output_error: float | None
    bytes_before: int
    bytes: int


def plan(
    model: nn.Module, bits: int, head_bits: int = 8, symmetric: bool = True, portable: bool = True
) -> Plan:
    """The layers to round: every linear one of the blocks, the embedding, and an output layer over the vocabulary.

    bits, head_bits: 8 or 4; head_bits 16: embedding and output layer stay. portable: an embedding in 8 bits gets steps
    whose products are exact in float16. ModelError where the model is a recurrence, adapted, or rounded already.
    """
    config = getattr(model, "config", None)
    if isinstance(config, LSTMConfig) or not isinstance(model, Transformer):
        raise ModelError("an LSTM is not rounded: its weights are one operator's; take a Transformer")
    for name, layer in model.named_modules():
        if isinstance(layer, ROUNDED):
            raise ModelError(f"this model is rounded already ({name}): take the model that it was made of")
        if isinstance(layer, LoRA):
            raise ModelError("this model has an adapter: `langmill merge` makes one model of both first")
    roundings, left = {}, {}
    for name, layer in model.named_modules():
        rounding = Rounding(bits, symmetric or bits == 8, 8 if symmetric or bits == 8 else 7)
        if not (isinstance(layer, nn.Linear) and ".blocks." in name):
            if head_bits == 16 or not _vocabulary(model, name):
                continue
            digits = _DIGITS if name == EMBEDDING and head_bits == 8 and portable else 8
            rounding = Rounding(head_bits, digits=digits)
        if reason := _unfit(layer, name):
            left[name] = reason
        else:
            roundings[name] = rounding
    return Plan(roundings, left)


def _vocabulary(model: Transformer, name: str) -> bool:
    """Whether a layer is the embedding, or an output layer of its own over the vocabulary."""
    head = model.config.head
    return name == EMBEDDING or (name == HEAD and head is not None and head.task == "text")


def _unfit(layer: Any, name: str) -> str:
    weight_OI: Tensor = layer.weight.detach()
    if not torch.isfinite(weight_OI).all():
        raise ModelError(f"{name} holds weights that are not finite: the model is damaged")
    if weight_OI.shape[1] % GROUP:
        return f"{weight_OI.shape[1]} inputs are not a multiple of {GROUP}"
    return "weights beyond float16's largest" if float(weight_OI.abs().max()) > LARGEST else ""


@torch.no_grad()
def quantise(
    model: Transformer,
    wanted: Plan,
    batches: Sequence[Inputs] = (),
    damping: float = DAMPING,
    on_layer: Callable[[Changed], object] | None = None,
) -> list[Changed]:
    """Round the layers of a plan, in place; how each changed, in the order of the work.

    batches: passes over calibration text for GPTQ; none: everything to the nearest. Memory: the states of all batches,
    and one block's Hessians. Time: three passes for each block beside the rounding itself.
    """
    done: list[Changed] = []

    def note(changed: Changed) -> None:
        done.append(changed)
        if on_layer is not None:
            on_layer(changed)

    if batches:
        for side in ("encoder", "decoder"):
            stack: Any = getattr(model, side)
            if isinstance(stack, Stack):
                _calibrated(model, stack, side, wanted, batches, damping, note)
    for name, rounding in wanted.roundings.items():
        if not isinstance(layer := model.get_submodule(name), ROUNDED):
            note(_nearest(model, name, layer, rounding))
    return done


def _nearest(model: nn.Module, name: str, layer: Any, rounding: Rounding) -> Changed:
    weight_OI = layer.weight.detach()
    steps = steps_for(weight_OI, rounding)
    numbers_OI = nearest(weight_OI, steps, rounding)
    error = _share(values(numbers_OI, steps) - weight_OI, weight_OI)
    fresh = made(layer, numbers_OI, steps, rounding)
    _put(model, name, fresh)
    return _changed(name, "nearest", rounding, layer, fresh, error, None)


@dataclass
class _Call:
    """What a block is called with: the states, and everything else as it was recorded."""

    x: Tensor
    rest: list[tuple[Any, ...]]  # by block


def _calibrated(
    model: Transformer,
    stack: Stack,
    side: str,
    wanted: Plan,
    batches: Sequence[Inputs],
    damping: float,
    note: Callable[[Changed], None],
) -> None:
    """Round the blocks of a stack one after the other."""
    calls = [_recorded(model, stack, batch) for batch in batches]
    for number, block in enumerate(stack.blocks):
        prefix = f"{side}.blocks.{number}."
        names = [name for name in wanted.roundings if name.startswith(prefix)]
        sums = _hessians(block, [name.removeprefix(prefix) for name in names], number, calls)
        fresh = {}
        for name in names:
            rounding, hessian = wanted.roundings[name], sums[name.removeprefix(prefix)]
            layer: Any = model.get_submodule(name)
            weight_OI = layer.weight.detach().float()
            numbers_OI, steps = gptq(weight_OI, hessian, rounding, damping)
            rounded_OI = values(numbers_OI, steps)
            error, length = hessian.energy(rounded_OI - weight_OI), hessian.energy(weight_OI)
            output_error = math.sqrt(error / length) if length > 0 else 0.0
            fresh[name] = made(layer, numbers_OI, steps, rounding)
            note(
                _changed(
                    name,
                    "gptq",
                    rounding,
                    layer,
                    fresh[name],
                    _share(rounded_OI - weight_OI, weight_OI),
                    output_error,
                )
            )
            layer.weight = nn.Parameter(rounded_OI.to(layer.weight.dtype), requires_grad=False)
        for call in calls:  # with the rounded weights as floats, which is faster
            call.x = block(call.x, *call.rest[number])
        for name, layer in fresh.items():
            _put(model, name, layer)


def _recorded(model: Transformer, stack: Stack, batch: Inputs) -> _Call:
    """What the stack's blocks are called with in a pass of the model as it is now."""
    first: list[Tensor] = []
    rest: list[tuple[Any, ...]] = []

    def record(block: nn.Module, given: tuple[Any, ...]) -> None:
        if not first:
            first.append(given[0])
        rest.append(given[1:])

    hooks = [block.register_forward_pre_hook(record) for block in stack.blocks]
    try:
        model.hidden(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return _Call(first[0], rest)


def _hessians(
    block: nn.Module, names: Sequence[str], number: int, calls: Sequence[_Call]
) -> dict[str, Hessian]:
    """The Hessian of each layer's inputs; layers that are given the same tensor share one."""
    sums: dict[str, Hessian] = {}
    owners: dict[
        int, tuple[str, Tensor]
    ] = {}  # in a pass, by the tensor that came in, which is held: its id is its own
    shared: dict[str, str] = {}

    def count(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, given: tuple[Any, ...]) -> None:
            x: Tensor = given[0]
            if name not in sums:
                shared[name] = owners.setdefault(id(x), (name, x))[0]
                sums[name] = sums.get(shared[name]) or Hessian(x.shape[-1], x.device)
            if shared[name] == name:
                sums[name].add(x)

        return hook

    hooks = [block.get_submodule(name).register_forward_pre_hook(count(name)) for name in names]
    try:
        for call in calls:
            block(call.x, *call.rest[number])
            owners.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _share(error: Tensor, whole: Tensor) -> float:
    length = float(whole.norm())
    return float(error.norm()) / length if length > 0 else 0.0


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer.train(model.training))


def _changed(
    name: str,
    method: Literal["gptq", "nearest"],
    rounding: Rounding,
    layer: Any,
    fresh: nn.Module,
    weight_error: float,
    output_error: float | None,
) -> Changed:
    size = sum(part.nbytes for part in fresh.buffers())
    shape = (int(layer.weight.shape[0]), int(layer.weight.shape[1]))
    return Changed(name, method, rounding.bits, shape, weight_error, output_error, layer.weight.nbytes, size)
