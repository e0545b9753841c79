"""What stands around a run: signals noted instead of deadly, deterministic algorithms, errors put in words."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from langmill.common.errors import Interrupted, TrainingError


class Signals:
    """Inside, Ctrl-C and SIGTERM are noted in `caught`; a second one is a KeyboardInterrupt at once."""

    def __init__(self, quiet: bool) -> None:
        self.caught = 0
        self.quiet = quiet
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number
        if not self.quiet:  # print() might be interrupted in the middle of itself
            os.write(2, b"\nfinishing this step and saving; Ctrl-C again quits at once\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def interrupted(self, step: int, steps: int) -> Interrupted:
        """The error that tells the caller: exit code 130 for Ctrl-C, 143 for SIGTERM."""
        name = "Ctrl-C" if self.caught == signal.SIGINT else "SIGTERM"
        where = f"after step {step} of {steps}, which is saved" if step else "before the first step"
        return Interrupted(f"stopped by {name} {where}: go on with --resume", exit_code=128 + self.caught)


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms inside; they and the number of threads are as they were afterwards."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses without it
    strict = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic
    fill, threads = options.fill_uninitialized_memory, torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    options.fill_uninitialized_memory = False  # finds bugs in kernels, at a price
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=lenient)
        options.fill_uninitialized_memory = fill
        torch.set_num_threads(threads)


@contextlib.contextmanager
def explained(step: int) -> Iterator[None]:
    """Turn the errors of torch that a user can act on into TrainingError, for optimizer step `step`."""
    try:
        yield
    except (MemoryError, RuntimeError) as reason:
        if isinstance(reason, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(reason):
            raise TrainingError(
                f"memory ran out at step {step}: halve train.micro_batch_size and double "
                "train.gradient_accumulation_steps (the result stays the same), or set "
                "train.gradient_checkpointing=true"
            ) from reason
        if isinstance(reason, torch._dynamo.exc.TorchDynamoException):
            raise TrainingError(
                "this run is compiled, and torch.compile does not work here now: put its C++ compiler back, "
                f"or start a new run with train.compile=false ({first_line(reason)})"
            ) from reason
        raise


def first_line(reason: BaseException) -> str:
    """The first line of an error that says anything, or its kind."""
    return next((line.strip() for line in str(reason).splitlines() if line.strip()), type(reason).__name__)
