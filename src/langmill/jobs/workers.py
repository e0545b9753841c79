"""Units of work done by processes of this machine, or of a cluster."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from langmill.common.errors import DataError, MissingExtra
from langmill.common.progress import track
from langmill.common.settings import PrepareSettings
from langmill.data.guard import kept
from langmill.data.sources import Unit
from langmill.data.units import Recipe, process
from langmill.jobs.prepare_cluster import clustered

_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Failed:
    """A unit that could not be read to its end; nothing of it is kept, and the next run tries again."""

    unit: Unit
    reason: str

    @property
    def named(self) -> str:
        """Its first file, and how many others go with it."""
        first, *others = dict.fromkeys(piece.file.id for piece in self.unit.pieces)
        return f"{first} and {len(others)} more" if others else first


def work(
    todo: Sequence[Unit], recipe: Recipe, units: Path, settings: PrepareSettings, quiet: bool
) -> list[Failed]:
    """Do the units; those that failed. A full disk ends it all (OSError), and so does a process that was killed."""
    units.mkdir(parents=True, exist_ok=True)
    if not todo:
        return []
    failed = []
    with track("reading", sum(unit.size for unit in todo), "B", quiet) as progress:
        for unit, reason in _done(todo, recipe, units, settings):
            if reason:
                failed.append(Failed(unit, reason))
            progress.advance(unit.size)
    return sorted(failed, key=lambda one: one.unit.pieces[0].file.id)


def _done(
    todo: Sequence[Unit], recipe: Recipe, units: Path, settings: PrepareSettings
) -> Iterator[tuple[Unit, str]]:
    if settings.engine == "ray":
        yield from clustered(todo, recipe, units, settings, attempt)
        return
    workers = min(settings.workers or _cores(), len(todo))
    if workers == 1:
        with kept(recipe.read.seconds, recipe.read.memory):
            yield from ((unit, attempt(unit, recipe, units)) for unit in todo)
        return
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, context, _die_with_parent) as pool:
        left = iter(
            sorted(todo, key=lambda unit: -unit.size)
        )  # the longest first, so that none is waited for at the end
        running: dict[Future[str], Unit] = {}
        try:
            while True:
                for unit in left:
                    running[pool.submit(attempt, unit, recipe, units)] = unit
                    if len(running) > 2 * workers:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker was killed, perhaps for memory: run again with fewer workers; what is done stays"
            ) from None
        except BaseException:  # Ctrl-C, a full disk: what the others have begun is done anew by the next run
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def attempt(unit: Unit, recipe: Recipe, units: Path) -> str:
    """`units.process`, with what goes wrong as a sentence: other units go on."""
    try:
        return process(unit, recipe, units)
    except MissingExtra:
        raise
    except DataError as error:
        return str(error)
    except OSError as error:
        if error.errno in _FATAL:
            raise
        return f"{error.filename or unit.source}: {error.strerror or error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:400]


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for ever, or write beside the next run. Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
