"""`langmill serve`: load the models, listen, and answer until a signal comes; then let what runs end."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from langmill.common.errors import MissingExtra, UsageError
from langmill.common.metrics import Report
from langmill.common.settings import ServeSettings
from langmill.serve.tls import check_tls, scheme_of

if TYPE_CHECKING:
    from types import FrameType

    import uvicorn

    from langmill.serve.models import Loaded
    from langmill.serve.state import State

BACKLOG = 2048  # connections that wait to be taken
SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 5.0  # beyond the drain, for what a process does after it
LOOK_SECONDS = 0.1


def run(settings: ServeSettings, *, quiet: bool = False, state_home: str = "") -> Report:
    """Serve until Ctrl-C or SIGTERM; running answers then have `drain_seconds`, a second Ctrl-C ends at once.

    With `new_key` nothing is served: a key is made and told once. state_home: the folder of XDG_STATE_HOME, where the
    conversations are kept if the settings do not say where. UsageError where the port is taken, keys are missing or a
    certificate cannot be used, before any model is loaded. Counts: what the engines did. Figures: load_seconds.
    """
    try:
        import fastapi  # noqa: F401 - looked for
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtra("serve", error.name or "fastapi") from None
    if settings.new_key is not None:
        return _new_key(settings)
    from langmill.serve.history import default_file
    from langmill.serve.hosts import origins_of
    from langmill.serve.keys import open_keys

    if settings.page and settings.history is None:
        settings = settings.model_copy(update={"history": str(default_file(state_home))})
    open_keys(settings)  # what is wrong shows before the port is opened and the models are loaded
    origins_of(settings)
    check_tls(settings)
    with listening(settings) as listener:
        if settings.workers > 1:
            from langmill.serve.workers import watch

            return watch(settings, listener, quiet)
        return serve(settings, listener, quiet)


def _new_key(settings: ServeSettings) -> Report:
    from langmill.serve.keys import add_key

    if settings.api_keys is None or settings.new_key is None:
        raise UsageError("--new-key NAME needs --api-keys FILE, where the key's hash is kept")
    key = add_key(settings.api_keys, settings.new_key)
    text = f"{key}\nThis is the key of {settings.new_key}. It is shown this once: {settings.api_keys} holds its hash."
    return Report(out=settings.api_keys, text=text, extra={"key": key})


@contextmanager
def listening(settings: ServeSettings) -> Iterator[socket.socket]:
    """The socket, which nobody answers yet."""
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {settings.port} of {settings.host} is taken: stop what listens there, or take another --port"
            ) from None
        if error.errno == errno.EACCES:
            raise UsageError(f"port {settings.port} is not for ordinary users: take one above 1023") from None
        raise UsageError(f"--host {settings.host}: {error.strerror or error}") from None
    with made:
        yield made


def serve(settings: ServeSettings, listener: socket.socket, quiet: bool) -> Report:
    """One process: load, answer, drain, and what it did."""
    import uvicorn

    from langmill.serve.app import create_app
    from langmill.serve.connections import config_of
    from langmill.serve.heap import few_heaps
    from langmill.serve.state import open_state

    began = time.perf_counter()
    few_heaps()
    write_log(settings, quiet)
    state = open_state(settings)
    seconds = time.perf_counter() - began
    app = create_app(state)
    server = uvicorn.Server(config_of(app, state))
    app.state.server = server
    with ended_in_time(server, settings.drain_seconds + GRACE_SECONDS):
        with stopped_by_signals(server):
            if not quiet:
                print(started(settings, listener, state.models.names(), seconds), file=sys.stderr, flush=True)
            server.run(sockets=[listener])
        asyncio.run(state.models.close(drain=False))
    return _report(state, seconds)


def write_log(settings: ServeSettings, quiet: bool) -> None:
    """Let the server's lines go to standard error; with `quiet` only what went wrong."""
    from langmill.serve.logs import LOG, Line

    handler = logging.StreamHandler()
    handler.setFormatter(Line(settings.log_format == "json"))
    for log in (LOG, logging.getLogger("uvicorn.error"), logging.getLogger("asyncio")):
        log.handlers, log.propagate = [handler], False
    LOG.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each client that leaves a stream


def started(settings: ServeSettings, listener: socket.socket, models: list[Loaded], seconds: float) -> str:
    """What a person reads once the server answers."""
    host, port = listener.getsockname()[:2]
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    base = f"{scheme_of(settings)}://{name}:{port}"
    lines = [f"Langmill answers at {base}/v1 ({seconds:.1f} s to load)"]
    for model in models:
        whole = getattr(model.model.config, "length", None)
        cut = (
            f" of the model's {whole:,} (more by --context, --slots 4 or --kv-bits 8)"
            if isinstance(whole, int) and "write" in model.does and model.window < whole
            else ""
        )
        lines.append(f"  {model.name}: {', '.join(sorted(model.does))}; context {model.window:,}{cut}")
    if settings.page:
        lines.append(f"  chat page: {base}/")
    if settings.api_keys is not None:
        lines.append(f"  each request needs a key of {settings.api_keys}")
    return "\n".join([*lines, "  Ctrl-C stops it"])


@contextmanager
def ended_in_time(server: uvicorn.Server, seconds: float) -> Iterator[None]:
    """End the process `seconds` after it was told to stop, or GRACE_SECONDS after it was told so twice, whatever its
    threads do: Python would wait for them, and one that reads a long text cannot be stopped."""
    ended = threading.Event()

    def watch() -> None:
        left = seconds
        while left > 0:
            if ended.wait(LOOK_SECONDS):
                return
            if server.should_exit:
                left = min(left, GRACE_SECONDS if server.force_exit else left) - LOOK_SECONDS
        print("stopped although a text was still being read", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Signals before uvicorn listens to them stop it too; it raises each again afterwards, when its work is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(state: State, seconds: float) -> Report:
    counts: dict[str, int] = {}
    for model in state.models.names():
        for name, count in (model.service.counts() if model.service is not None else {}).items():
            counts[name.replace(" ", "_")] = counts.get(name.replace(" ", "_"), 0) + count
    return Report(
        counts=counts,
        figures={"load_seconds": seconds},
        text="stopped: " + json.dumps(counts) if counts else "stopped",
        extra={"models": [model.name for model in state.models.names()]},
    )
