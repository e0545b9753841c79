"""Products x Wᵀ with rounded weights, by whichever of torch's operators is the fastest on this machine.

The ways to one are raced once on every machine, at one, some and many rows, and the winner is remembered on disk. Only
those take part that come as near to the exact product as `TOLERANCE` says for the type of x; weights made anew as
floats always do. N rows, I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from langmill.common.errors import ModelError
from langmill.common.files import read_json, write_json

GROUP = 32  # weights in 4 bits that share a step
KEPT = Path(".cache") / "langmill" / "products.json"  # under the user's home
ROWS = (1, 16, 256)  # what is raced: the first that is at least as many as there are counts
# Distance from the exact product as a share of its length. Four bits have moved it by some percent already.
TOLERANCE = {(8, torch.float32): 1e-3, (4, torch.float32): 4e-3}
NARROW = 1e-2  # where x has 16 bits
OUTPUTS = 4096  # made as floats at once: what is multiplied next is still in the cache
DEEPEST = 1 << 17  # inputs whose sum of products of 8-bit numbers 32 bits hold
_RACES, _SHAPE = 4, (4096, 1024)
_PANEL = 16  # outputs that int4pack takes together

Weights = Any  # (codes, steps), or (codes, steps, lows, packed); packed() gives what int4pack takes, or None
Way = Callable[[Tensor, Weights], Tensor | None]  # None: not with these weights


def widened(codes_OI: Tensor, steps_O: Tensor, dtype: torch.dtype) -> Tensor:
    """(O, I) weights of eight-bit codes."""
    return codes_OI.to(dtype) * steps_O[:, None].to(dtype)


def unpacked(codes: Tensor, steps: Tensor, lows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(O, I) weights of four-bit codes (O, I/2) by their groups' steps and minima (O, G); None: -8 steps."""
    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).unflatten(1, (-1, GROUP))
    step = steps[..., None].to(dtype)
    if lows is None:
        return ((both.to(dtype) - 8) * step).flatten(1)
    return torch.addcmul(lows[..., None].to(dtype), both.to(dtype), step).flatten(1)


def packed_nibbles(codes_OI: Tensor) -> Tensor:
    """Codes 0 … 15 (O, I), two a byte: the even input in the low half."""
    codes = codes_OI.to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def _widened_8(x_NI: Tensor, weights: Weights) -> Tensor:
    codes, steps = weights
    parts = [F.linear(x_NI, part.to(x_NI.dtype)) for part in codes.split(OUTPUTS)]
    return (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]) * steps.to(x_NI.dtype)


def _two_products(x_NI: Tensor, weights: Weights) -> Tensor | None:
    """x as a coarse and a fine part of 8 bits each, which leaves 1/64,000 of a row's largest; sums are exact."""
    codes, steps = weights
    if codes.shape[1] > DEEPEST:
        return None
    rows = len(x_NI)
    scale_N1 = x_NI.float().abs().amax(1, keepdim=True) / 127
    x = x_NI / torch.where(scale_N1 == 0, 1.0, scale_N1)
    coarse = x.round()
    both = torch.cat((coarse, (254 * (x - coarse)).round())).to(torch.int8)
    sums = torch._int_mm(both, codes.t()).float()
    return (torch.add(sums[:rows], sums[rows:], alpha=1 / 254) * (scale_N1 * steps)).to(x_NI.dtype)


def _int8pack(x_NI: Tensor, weights: Weights) -> Tensor:
    codes, steps = weights
    ones = torch.ones(len(codes), dtype=torch.bfloat16)  # the steps themselves would be rounded
    return (torch.ops.aten._weight_int8pack_mm(x_NI.bfloat16(), codes, ones).float() * steps).to(x_NI.dtype)


def _widened_4(x_NI: Tensor, weights: Weights) -> Tensor:
    codes, steps, lows, _ = weights
    made = []
    for start in range(0, len(codes), OUTPUTS):
        some = slice(start, start + OUTPUTS)
        part = unpacked(codes[some], steps[some], None if lows is None else lows[some], x_NI.dtype)
        made.append(F.linear(x_NI, part))
    return torch.cat(made, dim=1) if len(made) > 1 else made[0]


def _int4pack(x_NI: Tensor, weights: Weights) -> Tensor | None:
    packed = weights[3]()
    if packed is None:
        return None
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x_NI.bfloat16(), packed[0], GROUP, packed[1])
    return y.to(x_NI.dtype)


def pack(codes: Tensor, steps: Tensor, lows: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Codes and scales as int4pack takes them; None where its scales, bfloat16 ones, would not be these steps."""
    scales = steps.bfloat16()
    if lows is not None or len(codes) % _PANEL or not torch.equal(scales.float(), steps.float()):
        return None
    plain = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).int()
    both_GO2 = torch.stack((scales, torch.zeros_like(scales)), dim=-1).transpose(0, 1).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(plain, 1), both_GO2


WAYS: Mapping[int, Mapping[str, Way]] = {  # the first of each is always right, and has no need of a CPU
    8: {"widened": _widened_8, "two products": _two_products, "int8pack": _int8pack},
    4: {"widened": _widened_4, "int4pack": _int4pack},
}


def product(bits: int, x: Tensor, weights: Weights) -> Tensor:
    """x Wᵀ (..., O) of x (..., I), without a gradient."""
    x_NI = x.reshape(-1, x.shape[-1])
    ways = WAYS[bits]
    plain = x.device.type != "cpu" or torch.compiler.is_compiling() or not len(x_NI)
    name = "widened" if plain else chosen(bits, x.dtype, _like(len(x_NI)), torch.get_num_threads())
    y_NO = ways[name](x_NI, weights)
    if y_NO is None:
        y_NO = ways["widened"](x_NI, weights)
        assert y_NO is not None
    return y_NO.view(*x.shape[:-1], -1)


def _like(rows: int) -> int:
    return next((known for known in ROWS if rows <= known), ROWS[-1])


@cache
def chosen(bits: int, dtype: torch.dtype, rows: int, threads: int) -> str:
    """The name of the fastest way to a product of so many rows: as remembered on this machine, or raced now."""
    key = f"{_machine()}, {threads} threads: {bits} bits, {dtype}, {rows} rows"
    known = _remembered()
    if known.get(key) in WAYS[bits]:
        return known[key]
    name = raced(bits, dtype, rows)
    with contextlib.suppress(OSError, RuntimeError):  # a home that is not there or cannot be written
        write_json(Path.home() / KEPT, {"chosen": _remembered() | {key: name}}, "products", 1)
    return name


def _remembered() -> dict[str, str]:
    try:
        found = read_json(Path.home() / KEPT, "products", 1, ModelError)["chosen"]
    except (ModelError, OSError, RuntimeError, KeyError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _machine() -> str:
    system = f"{platform.node()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__}, {system}"


@torch.no_grad()
def raced(bits: int, dtype: torch.dtype, rows: int) -> str:
    """The fastest way to a product of random numbers, among those whose result is near enough."""
    random = torch.Generator().manual_seed(0)
    weights, exact_OI = _sample(bits, random)
    x_NI = torch.randn(rows, _SHAPE[1], generator=random).to(dtype)
    exact_NO = x_NI.double() @ exact_OI.T.double()
    near = TOLERANCE.get((bits, dtype), NARROW) * exact_NO.norm()
    running = {}
    for name, way in WAYS[bits].items():
        with contextlib.suppress(
            RuntimeError, AttributeError
        ):  # not in this build of torch, not for this type
            y_NO = way(x_NI, weights)
            if y_NO is not None and (y_NO.double() - exact_NO).norm() <= near:
                running[name] = way
    best = dict.fromkeys(running, math.inf)
    for _ in range(_RACES):  # in turn, so that a busy machine slows all alike
        for name, way in running.items():
            started = time.perf_counter()
            way(x_NI, weights)
            best[name] = min(best[name], time.perf_counter() - started)
    return min(best, key=lambda name: best[name])


def _sample(bits: int, random: torch.Generator) -> tuple[Weights, Tensor]:
    """Random weights, and what they stand for."""
    outputs, inputs = _SHAPE
    if bits == 8:
        codes = torch.randint(-127, 128, _SHAPE, generator=random, dtype=torch.int8)
        steps = torch.rand(outputs, generator=random)
        return (codes, steps), widened(codes, steps, torch.float32)
    codes = packed_nibbles(torch.randint(0, 16, _SHAPE, generator=random))
    steps = torch.rand(outputs, inputs // GROUP, generator=random).bfloat16().half()
    packed = cache(lambda: pack(codes, steps, None))
    return (codes, steps, None, packed), unpacked(codes, steps, None, torch.float32)
