"""Choices that are measured on this machine, once a run, and kept for its whole life.

Number type, compilation and threads decide how floats are rounded, so a resumed run must take those of the
run it goes on with, not measure again. `choose` measures; `prepare` puts the choices to work.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from langmill.common.settings import LoopSettings
from langmill.model.config import LSTMConfig, ModelConfig
from langmill.model.count import training_flops
from langmill.train.guard import first_line
from langmill.train.objectives import Objective, Tensors

TRIAL_TOKENS = 2048  # of a batch, in the trials that need not have its real shape
TRIAL_SECONDS = 6.0  # for each comparison, after which the running round is the last
MARGIN = 1.05  # what is less exact or slower to start must be this much faster
COMPILE_GAIN = 0.15  # share of the eager time that it saves; measured 0.05 to 0.2 on two CPUs

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Choices:
    """What was chosen, and why. matmul_flops: this machine's best matrix-product rate in `dtype`, FLOP/s."""

    dtype: Dtype
    compile: bool
    threads: int
    matmul_flops: float
    why: tuple[str, ...]

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> Choices:
        """From the JSON of a checkpoint."""
        return cls(**{**saved, "why": tuple(saved["why"])})


@dataclass
class _Trials:
    """Short, timed passes over one batch, forward and backward, in each number type, compiled or not."""

    model: nn.Module
    objective: Objective
    batch: Tensors
    prepared: dict[tuple[Dtype, bool], Objective] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.batch["tokens"].device

    def few(self) -> tuple[Tensors, float]:
        """Some rows of the batch, and how many times as many it has."""
        rows, length = self.batch["tokens"].shape
        kept = min(rows, max(1, TRIAL_TOKENS // length))
        return {name: value[:kept] for name, value in self.batch.items()}, rows / kept

    def once(self, dtype: Dtype, compiled: bool = False, batch: Tensors | None = None) -> None:
        key = (dtype, compiled)
        if key not in self.prepared:
            self.prepared[key] = prepare(self.objective, dtype, compiled, self.device)
        self.model.zero_grad(set_to_none=True)
        self.prepared[key](self.model, batch or self.batch)[0].backward()

    def race(self, *kinds: tuple[Dtype, bool], batch: Tensors | None = None) -> list[float]:
        """The best seconds of each."""
        return race([lambda kind=kind: self.once(*kind, batch=batch) for kind in kinds], self.device)  # type: ignore[misc]


def choose(
    model: nn.Module, objective: Objective, batch: Tensors, settings: LoopSettings, micro_batches: int
) -> Choices:
    """Decide by short trials on one batch; the weights stay as they are, gradients are cleared.

    micro_batches: how many the run will do, from which follows whether a compile is repaid.
    """
    return choose_and_prepare(model, objective, batch, settings, micro_batches)[0]


def choose_and_prepare(
    model: nn.Module, objective: Objective, batch: Tensors, settings: LoopSettings, micro_batches: int
) -> tuple[Choices, Objective]:
    """`choose`, and the objective made ready as chosen: what a trial compiled is not compiled again."""
    threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    trials = _Trials(model, objective, batch)
    try:
        dtype, why_dtype = _dtype(trials, settings)
        compiled, why_compile = _compile(trials, settings, dtype, micro_batches)
    finally:
        model.zero_grad(set_to_none=True)
    why = (why_dtype, why_compile, f"{threads} threads")
    choices = Choices(dtype, compiled, threads, matmul_flops(dtype, trials.device), why)
    ready = trials.prepared.get((dtype, compiled)) or prepare(objective, dtype, compiled, trials.device)
    return choices, ready


def _dtype(trials: _Trials, settings: LoopSettings) -> tuple[Dtype, str]:
    if settings.dtype != "auto":
        return settings.dtype, f"{settings.dtype}: as train.dtype says"
    float32, bfloat16 = trials.race(("float32", False), ("bfloat16", False), batch=trials.few()[0])
    gain = float32 / bfloat16
    return (
        "bfloat16" if gain > MARGIN else "float32",
        f"{'bfloat16' if gain > MARGIN else 'float32'}: bfloat16 runs at {gain:.2f} times its speed here",
    )


def _compile(trials: _Trials, settings: LoopSettings, dtype: Dtype, micro_batches: int) -> tuple[bool, str]:
    config = getattr(trials.model, "config", None)
    if settings.compile is False:
        return False, "eager: train.compile is false"
    if isinstance(config, LSTMConfig):
        return False, "eager: torch.compile does nothing for an LSTM"
    if settings.compile == "auto":
        few, times = trials.few()
        run_seconds = trials.race((dtype, False), batch=few)[0] * times * micro_batches
        cost = compile_seconds(config.main.layers if isinstance(config, ModelConfig) else 6)
        if run_seconds * COMPILE_GAIN < cost:
            return (
                False,
                f"eager: a run of about {run_seconds:.0f} s would not repay {cost:.0f} s of compiling",
            )
    started = time.perf_counter()
    try:
        trials.once(dtype, compiled=True)
    except Exception as reason:  # whatever a toolchain that is absent or broken raises
        return False, f"eager: torch.compile fails here, for want of a C++ compiler? ({first_line(reason)})"
    cold = time.perf_counter() - started
    eager, compiled = trials.race((dtype, False), (dtype, True))
    gain = eager / compiled
    if settings.compile == "auto" and gain < MARGIN:
        return False, f"eager: compiled code runs at only {gain:.2f} times its speed here"
    return True, f"compiled: {gain:.2f} times the eager speed, after {cold:.0f} s of compiling"


def prepare(objective: Objective, dtype: str, compiled: bool, device: torch.device) -> Objective:
    """The objective in a number type, compiled or not.

    Compiled code must not depend on what was compiled before, and so on where a run was interrupted: each
    shape gets its own (dynamic=False), and other runs in this process do not count (isolate_recompiles).
    """

    def run(model: nn.Module, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            return objective(model, batch)

    if not compiled:
        return run
    return torch.compile(run, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]  # its stub is older


def race(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The best seconds of each, run in turn so that a busy machine slows all alike."""
    best = [math.inf] * len(runs)
    started = time.perf_counter()
    for _ in range(4):  # the first also warms up
        for index, run in enumerate(runs):
            best[index] = min(best[index], _seconds(run, device))
        if time.perf_counter() - started > TRIAL_SECONDS:
            break
    return best


def compile_seconds(layers: int) -> float:
    """What a cold compile is expected to take; it grows with the layers, which are compiled one by one."""
    return 15.0 + 2.0 * layers


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def matmul_flops(dtype: str, device: torch.device) -> float:
    """The best rate of matrix products here, in FLOP/s: what model FLOPs utilisation is measured against."""
    best = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.ones(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
        seconds = race([lambda a=a, b=b: a @ b], device)[0]  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
    return best


def utilisation(model: nn.Module, length: int, tokens_per_second: float, choices: Choices) -> float | None:
    """Model FLOPs utilisation: the share of the matrix-product rate that training makes use of.

    None where the model's operations are not known in closed form.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig | LSTMConfig):
        return None
    return training_flops(config, length) * tokens_per_second / choices.matmul_flops


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process ever held, or the GPU held for it; 0 where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
