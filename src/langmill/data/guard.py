"""A process of its own for what reads hostile bytes: it may take so much time and memory, and may crash."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from langmill.common.errors import MissingExtra
from langmill.data.chats import Unusable
from langmill.data.extract import EXTRACT, NOTHING, Found

_LONG, _LARGE, _CRASHED = "took too long to read", "took too much memory to read", "crashed its reader"
_PATIENCE = 10  # times the seconds of the processor that a call may last
_START = 120.0  # seconds that a new process may take to be there on a busy machine


class Guard:
    """`with Guard(seconds, memory) as guard: guard.call("html", data)`.

    The process starts with the first call, and anew after one that took too much: that document is Unusable, and what
    comes after it is not touched. What it fails at after others is tried again in a new one, since memory that others
    left can be missing under any name: only what fails alone is Unusable. A page without text is, where there was
    room. The limit of memory needs Linux; without timers (Windows) the seconds are those of the clock, times ten.
    """

    def __init__(self, seconds: float, memory: int) -> None:
        self.seconds, self.memory = seconds, memory
        self._process: Any = None
        self._pipe: Connection | None = None
        self._full = False  # whether the process holds more than half of what it may

    def __enter__(self) -> Self:
        return self

    def call(self, name: str, *given: Any) -> Found:
        """What `extract.EXTRACT[name](*given)` returns; Unusable where it raises, is killed, or takes too long."""
        alone = self._pipe is None
        try:
            return self._call(name, *given)
        except Unusable as error:
            if alone or error.reason == _LONG or (error.reason == NOTHING and not self._full):
                raise
        self._stop()
        return self._call(name, *given)

    def _call(self, name: str, *given: Any) -> Found:
        pipe = self._pipe or self._started()
        try:
            pipe.send((name, given))
            if not pipe.poll(self.seconds * _PATIENCE):
                self._stop()
                raise Unusable(_LONG, f"more than {self.seconds * _PATIENCE:g} s without using the processor")
            done, value, self._full = pipe.recv()
        except (EOFError, OSError):
            code = self._stop()
            if code is not None and code == -getattr(signal, "SIGPROF", 0):
                raise Unusable(
                    _LONG, f"more than {self.seconds:g} s of the processor (read.seconds)"
                ) from None
            raise Unusable(_CRASHED, f"the process ended with code {code}") from None
        if done == "text":
            return value
        if done == "extra":
            raise MissingExtra(*value)
        raise Unusable(*value)

    def _started(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self.seconds, self.memory), daemon=True)
        self._process.start()
        other.close()
        if not self._pipe.poll(_START):
            self._stop()
            raise OSError(f"the process that reads pages did not start within {_START:g} s")
        try:
            self._pipe.recv()
        except EOFError:
            code = self._stop()
            raise OSError(f"the process that reads pages ended with code {code} as it started") from None
        return self._pipe

    def _stop(self) -> int | None:
        process, self._process = self._process, None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if process is None:
            return None
        process.kill()
        process.join()
        code: int | None = process.exitcode
        return code

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()


@functools.lru_cache(maxsize=1)
def kept(seconds: float, memory: int) -> Guard:
    """The guard that this process keeps from unit to unit: starting one takes as long as a few hundred pages. `with`
    ends it; it ends with this process anyway."""
    return Guard(seconds, memory)


def _serve(pipe: Connection, seconds: float, memory: int) -> None:
    """The process: calls in, answers out, until the pipe is closed."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # Windows has none, macOS refuses some
        pass
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it closes the pipe
    pipe.send("ready")
    while True:
        try:
            name, given = pipe.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        answer: tuple[str, Any]
        _alarm(seconds)
        try:
            answer = ("text", EXTRACT[name](*given))
        except Unusable as error:
            answer = ("unusable", (error.reason, str(error)))
        except MissingExtra as error:
            answer = ("extra", (error.extra, error.package))
        except MemoryError:
            answer = (
                "unusable",
                (_LARGE, f"more than {memory >> 20} MiB (read.memory)"),
            )
        except RecursionError:
            answer = ("unusable", ("nested too deep", "its parts stand too deep in each other"))
        except Exception as error:
            answer = ("unusable", ("cannot be read", f"{type(error).__name__}: {error}"[:400]))
        _alarm(0)
        try:
            pipe.send((*answer, _size() > memory // 2))
        except OSError:  # nobody waits for it any more
            return


def _size() -> int:
    """The address space of this process, which its limit is of; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _alarm(seconds: float) -> None:
    """Ends this process after so many seconds of the processor; 0: does not. On a busy machine they last longer, so
    that the same documents fail there as elsewhere."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
