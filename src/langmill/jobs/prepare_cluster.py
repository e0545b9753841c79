"""Units of work done on a Ray cluster whose machines share the disk: each unit is a task, the same as in a process."""

from __future__ import annotations

import contextlib
import platform
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from langmill.common.errors import DataError, MissingExtra, UsageError
from langmill.common.files import atomic_write
from langmill.common.settings import PrepareSettings
from langmill.data.sources import Unit
from langmill.data.units import Recipe

MARK = "cluster"  # in the run folder while a cluster works: a machine that does not see it has another disk
RETRIES = 3  # after a worker or its machine died

Attempt = Callable[[Unit, Recipe, Path], str]


def clustered(
    todo: Sequence[Unit], recipe: Recipe, units: Path, settings: PrepareSettings, attempt: Attempt
) -> Iterator[tuple[Unit, str]]:
    """Units as they end, with "" or why they could not be read to their end; `attempt` does one.

    A unit whose worker dies is begun again elsewhere, RETRIES times. DataError where a machine does not see the disk,
    UsageError where no cluster answers; a fault of the disk is raised as it was met there.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise MissingExtra("cluster", "ray") from None
    mark, token = units.absolute().parent / MARK, secrets.token_hex(8)
    atomic_write(mark, token)
    with contextlib.ExitStack() as stack:
        stack.callback(mark.unlink, missing_ok=True)
        _connect(ray, settings.address)
        stack.callback(ray.shutdown)  # ends the tasks that still run
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_task)
        shared = ray.put((attempt, recipe, units.absolute(), token))
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        most = settings.workers or 2 * cores  # those beyond the cores wait their turn
        left = iter(sorted(todo, key=lambda unit: -unit.size))
        running: dict[Any, Unit] = {}
        while True:
            for unit in islice(left, most - len(running)):
                running[task.remote(_placed(unit), shared)] = unit
            if not running:
                return
            for reference in ray.wait([*running], num_returns=1)[0]:
                yield running.pop(reference), _told(ray, reference)


def _connect(ray: Any, address: str | None) -> None:
    host, _, port = (address or "").rpartition(":")
    here = {"include_dashboard": False} if address is None else {}
    try:
        if port.isdigit() and "/" not in host:  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **here)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"no Ray cluster answers at {address or 'this machine'} ({reason}): "
            "start one with  ray start --head  and give the address that it prints"
        ) from None


def _placed(unit: Unit) -> Unit:
    """With paths that hold in a worker, which has a working directory of its own."""
    pieces = (replace(p, file=replace(p.file, path=p.file.path.absolute())) for p in unit.pieces)
    return replace(unit, pieces=tuple(pieces))


def _task(unit: Unit, shared: tuple[Attempt, Recipe, Path, str]) -> str:
    attempt, recipe, units, token = shared
    mark = units.parent / MARK
    if not mark.is_file() or mark.read_text(encoding="utf-8") != token:
        raise DataError(
            f"the machine {platform.node()} of the cluster does not see {units.parent}: all of its machines must "
            "share the disk of --out and of the sources, under the same path"
        )
    return attempt(unit, recipe, units)


def _told(ray: Any, reference: Any) -> str:
    """What a task returned; why it did not return, where its worker died each time."""
    try:
        told: str = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        return f"its worker died {RETRIES + 1} times, perhaps for memory ({type(error).__name__})"
    return told
