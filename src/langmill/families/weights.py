"""Tensors between another tool's names and ours: one table of rules, read in both directions.

Loading and saving are two short loops over the same rules, so import and export cannot disagree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from langmill.common.errors import ModelError

MOST_LAYERS = 1 << 14  # far above any model; layers are made one by one, so a wrong number costs time


@dataclass(frozen=True)
class Rule:
    """One foreign tensor and the tensors of ours that it holds.

    Several of ours lie in it one after another along the output dimension (a fused q, k, v).
    transposed: it is stored (inputs, outputs), as GPT-2's Conv1D does. row: a vector stored as (1, N).
    zero: it is all zeros where the file has none.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    row: bool = False
    zero: bool = False


def rule(theirs: str, *ours: str, transposed: bool = False) -> Rule:
    return Rule(theirs, ours, transposed)


def linear(theirs: str, ours: str, bias: bool = True) -> list[tuple[str, ...]]:
    """The names of a layer's weight and bias, under both prefixes."""
    return [(f"{theirs}.{part}", f"{ours}.{part}") for part in (("weight", "bias") if bias else ("weight",))]


def layers(
    count: int, theirs: str, ours: str, names: Iterable[tuple[str, ...]], transposed: bool = False
) -> list[Rule]:
    """Rules for every layer: `theirs` and `ours` are prefixes with {} for its number, names pair up what follows."""
    return [
        Rule(theirs.format(i) + name[0], tuple(ours.format(i) + own for own in name[1:]), transposed)
        for i in range(count)
        for name in names
    ]


def load(
    model: nn.Module,
    rules: Sequence[Rule],
    names: Iterable[str],
    read: Callable[[str], Tensor],
    ignored: Sequence[str],
    where: object,
    dtype: torch.dtype,
) -> None:
    """Fill a model (on the meta device) with foreign tensors.

    names: what the file holds; read: fetches one by name; ignored: patterns of names that carry nothing.
    A tensor that no rule uses, one that is missing and one of another shape are ModelErrors by name.
    Shapes are compared before anything is copied.
    """
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    available, state = set(names), {}
    missing = [r.theirs for r in rules if r.theirs not in available and not r.zero]
    if missing:
        raise ModelError(f"{where}: tensor {missing[0]} is missing" + _more(missing))
    unused = available - {r.theirs for r in rules}
    unused = {name for name in unused if not any(re.fullmatch(pattern, name) for pattern in ignored)}
    if unused:
        known = sorted(unused)
        raise ModelError(f"{where}: tensor {known[0]} is not part of this model" + _more(known))
    for r in rules:
        if r.theirs not in available:
            for name in r.ours:
                state[name] = torch.zeros(shapes[name], dtype=dtype)
            continue
        theirs = read(r.theirs)
        if not theirs.is_floating_point():
            raise ModelError(
                f"{where}: tensor {r.theirs} holds {theirs.dtype}; rounded ones need GGUF or a quantization_config"
            )
        parts = _split(theirs, r, [shapes[name] for name in r.ours], where)
        for name, part in zip(r.ours, parts, strict=True):
            state[name] = part.to(dtype).contiguous()
    model.load_state_dict(state, strict=True, assign=True)


def save(model: nn.Module, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """The model's tensors under their foreign names, as `load` reads them back."""
    state: Mapping[str, Tensor] = model.state_dict()
    covered = {name for r in rules for name in r.ours}
    if covered != set(state):
        raise ModelError(
            f"no rule exports {sorted(covered ^ set(state))[0]}; merge or remove what was added to the model"
        )
    theirs = {}
    for r in rules:
        joined = torch.cat([state[name] for name in r.ours]) if len(r.ours) > 1 else state[r.ours[0]]
        theirs[r.theirs] = (joined.t() if r.transposed else joined[None] if r.row else joined).contiguous()
    return theirs


def _split(theirs: Tensor, r: Rule, shapes: Sequence[torch.Size], where: object) -> tuple[Tensor, ...]:
    turned = theirs.t() if r.transposed and theirs.dim() == 2 else theirs
    if r.row and theirs.dim() == 2 and len(theirs) == 1:
        turned = theirs[0]
    expected = torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])
    if turned.shape != expected:
        raise ModelError(
            f"{where}: tensor {r.theirs} has shape {tuple(theirs.shape)}, "
            f"{' + '.join(r.ours)} need {tuple(expected[::-1] if r.transposed else expected)}"
        )
    return torch.split(turned, [shape[0] for shape in shapes])


def _more(names: Sequence[object]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def number(theirs: Mapping[str, Any], key: str, default: int | None = None, below: int = 2**40) -> int:
    """A positive whole number of a foreign configuration; ModelError by name where it is not one."""
    value = theirs.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < below:
        raise ModelError(f"config.json: {key} is {value!r}; a whole number from 1 to {below - 1} is needed")
    return value


def token(theirs: Mapping[str, Any], key: str, default: int, vocab: int) -> int:
    """An id of a foreign configuration; ModelError by name where there is no such token."""
    value = theirs.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab:
        raise ModelError(f"config.json: {key} is {value!r}; an id below {vocab} is needed")
    return value


def real(theirs: Mapping[str, Any], key: str, default: float | None = None, above: float = 0.0) -> float:
    """A finite number of a foreign configuration, above a bound; ModelError by name where it is not one."""
    value = theirs.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < math.inf:
        raise ModelError(f"config.json: {key} is {value!r}; a number above {above:g} is needed")
    return float(value)


def flag(theirs: Mapping[str, Any], key: str, default: bool) -> bool:
    """A true or false of a foreign configuration; ModelError by name where it is neither."""
    value = theirs.get(key)
    if not isinstance(value, bool | None):
        raise ModelError(f"config.json: {key} is {value!r}; true or false is needed")
    return default if value is None else value


def choice(theirs: Mapping[str, Any], key: str, default: str, options: Mapping[str, Any]) -> Any:
    """One of the named options of a foreign configuration; ModelError naming them where it is not."""
    value = theirs.get(key) or default
    if not isinstance(value, str) or value not in options:
        raise ModelError(f"config.json: {key} is {value!r}; supported are {', '.join(options)}")
    return options[value]


def refuse(theirs: Mapping[str, Any], **expected: Any) -> None:
    """ModelError where a setting that changes the computation has another value than the one supported."""
    for key, value in expected.items():
        if theirs.get(key, value) not in (value, None):
            raise ModelError(f"config.json: {key} = {theirs[key]!r} is not supported (only {value!r})")
