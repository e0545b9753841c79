"""Several processes behind one port: each loads the models, takes connections from the one socket, and is started
again when it dies. They share the keys' file and the conversations; limits and metrics are each one's own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from types import FrameType

from langmill.common.errors import LangmillError, ModelError
from langmill.common.metrics import Report
from langmill.common.settings import ServeSettings
from langmill.serve.run import GRACE_SECONDS, LOOK_SECONDS, SIGNALS, serve

STEADY_SECONDS = 60.0  # a worker that lived so long is started again at once
MOST_SECONDS = 30.0  # between two starts of one that does not
HOPELESS = 78  # a worker's exit code where starting it again would not help (EX_CONFIG)


@dataclass
class Worker:
    """A process, when it was started, and after how long it is started again."""

    process: SpawnProcess
    began: float
    pause: float = 1.0
    due: float | None = None  # when it is to be started again


def watch(settings: ServeSettings, listener: socket.socket, quiet: bool) -> Report:
    """Keep the workers going until a signal; then pass it on, and end what does not end by itself. ModelError where one
    cannot start at all: it has said why."""
    stopping: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.append(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    context, restarts = multiprocessing.get_context("spawn"), 0

    def start(first: bool) -> SpawnProcess:
        process = context.Process(target=work, args=(settings, listener, quiet or not first), daemon=True)
        process.start()
        return process

    try:
        workers = [Worker(start(number == 0), time.monotonic()) for number in range(settings.workers)]
        while not stopping:
            for number, worker in enumerate(workers):
                if worker.process.exitcode == HOPELESS:
                    _end(workers, 0.0)
                    raise ModelError("a worker could not start, for the reason above")
                if not worker.process.is_alive():
                    restarts += _restarted(number, worker, start)
            time.sleep(LOOK_SECONDS)
        listener.close()  # or clients would wait here for a worker that takes no more
        _end(workers, settings.drain_seconds)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Report(counts={"workers": settings.workers, "restarts": restarts}, text="stopped")


def work(settings: ServeSettings, listener: socket.socket, quiet: bool) -> None:
    """What a worker's process does; what cannot start is not tried again."""
    threading.Thread(target=_orphaned, daemon=True).start()
    try:
        serve(settings, listener, quiet)
    except LangmillError as error:
        print(f"langmill: {error}", file=sys.stderr, flush=True)
        sys.exit(HOPELESS)


def _orphaned() -> None:
    """Stop this worker as a signal does once the process that watches it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _restarted(number: int, worker: Worker, start: Callable[[bool], SpawnProcess]) -> int:
    """Start a dead worker again once its time has come: at once after a steady life, later each time else."""
    now = time.monotonic()
    if worker.due is None:
        steady = now - worker.began > STEADY_SECONDS
        worker.pause = 1.0 if steady else min(MOST_SECONDS, worker.pause * 2)
        worker.due = now + (0.0 if steady else worker.pause)
        code = worker.process.exitcode
        why = f"signal {-code}" if code is not None and code < 0 else f"code {code}"
        print(
            f"worker {number + 1} ended by {why}; it is started again in {worker.due - now:.0f} s",
            file=sys.stderr,
        )
    if now < worker.due:
        return 0
    worker.process, worker.began, worker.due = start(False), now, None
    return 1


def _end(workers: list[Worker], drain_seconds: float) -> None:
    for worker in workers:
        if worker.process.is_alive():
            worker.process.terminate()
    end = time.monotonic() + drain_seconds + GRACE_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, end - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
