"""docs/server.md: every command that it prints serves a tiny model, what it tells a client to do works there, and what
it lists is what the code has."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from tests.serve.conftest import certificate, save, save_encoder
from tests.serve.test_models import adapter

from langmill import cli
from langmill.common.settings import ServeSettings
from langmill.serve.schema import Asked
from langmill.serve.state import State

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [block for kind, block in fenced if kind == language]


COMMANDS = [shlex.split(line)[1:] for block in blocks("") for line in block.splitlines()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models of the page; the log is as it was afterwards."""
    for name in ("MODEL", "WRITER"):
        save(tmp_path / name)
    save_encoder(tmp_path / "ENCODER")
    adapter(str(tmp_path / "MODEL"), tmp_path / "ADAPTER")
    certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "mill.crt"))
    monkeypatch.chdir(tmp_path)
    for log in (logging.getLogger("langmill.serve"), logging.getLogger("uvicorn.error")):
        for name in ("handlers", "propagate", "level"):
            monkeypatch.setattr(log, name, getattr(log, name))
    return tmp_path


def served(words: list[str], visit: Callable[[str], None]) -> int:
    """Run a command that serves, visit its address once it answers, and stop it by a signal; its exit code."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    scheme = "https" if "--tls-cert" in words else "http"
    url, ended, failures = f"{scheme}://127.0.0.1:{port}", threading.Event(), list[BaseException]()

    def guest() -> None:
        while not ended.wait(0.05):
            try:
                assert httpx.get(f"{url}/health", timeout=60).status_code == 200
            except httpx.TransportError:
                continue
            try:
                visit(url)
            except BaseException as error:
                failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)
            return

    thread = threading.Thread(target=guest)
    thread.start()
    try:
        history = [] if "--history" in words else ["--history", "off"]
        return cli.run([*words, *history, "--port", str(port), "--threads", "1", "--quiet"])
    finally:
        ended.set()
        thread.join()
        assert not failures, failures


def test_every_command_serves(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    keys: list[str] = []
    [code] = blocks("python")

    def visit(url: str) -> None:
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        asked = httpx.get(f"{url}/v1/models", headers=headers)
        names.append([model["id"] for model in asked.json()["data"]])
        if words == ["serve", "MODEL"]:
            own = code.replace("http://127.0.0.1:8000", url)
            subprocess.run([sys.executable, "-c", own], check=True, capture_output=True, timeout=120)

    names: list[list[str]] = []
    assert len(COMMANDS) >= 8
    for words in COMMANDS:
        if "--workers" in words:
            continue  # two processes take long to start: test_run.py does it
        if "--new-key" in words:
            assert cli.run(words) == 0
            keys.append(re.search(r"^lm-\S+$", capfd.readouterr().out, re.MULTILINE)[0])  # type: ignore[index]
            continue
        assert served(words, visit) == 0, (words, capfd.readouterr().err)
    assert ["MODEL"] in names and ["MODEL", "tone"] in names and ["mill", "vectors", "german"] in names


def test_the_page_and_the_code_speak_of_the_same(state: State, url: str) -> None:
    fields = ServeSettings.model_fields
    options = {name.replace("-", "_").removeprefix("no_") for name in re.findall(r"--([a-z][a-z-]+)", PAGE)}
    others = {"config", "create_home", "cache_dir"}  # the last two: useradd's and pip's
    assert options <= set(fields) | others
    [harmless] = re.findall(r"\*\*Harmless\*\*: (.*?) and in assistant", PAGE, re.DOTALL)
    assert all(f"`{name}" in harmless for name in Asked.model_fields)
    routes = httpx.get(f"{url}/openapi.json").json()["paths"]
    told = {route for route in routes if f"`{route}" in PAGE or f" {route}`" in PAGE or f"`{route}`" in PAGE}
    assert {route for route in routes if not route.startswith("/api/") and "{" not in route} <= told
    metrics = set(
        re.findall(r"# TYPE (langmill_\w+) (?:counter|gauge|histogram)", httpx.get(f"{url}/metrics").text)
    )
    named = set(re.findall(r"`(langmill_\w+)`", PAGE)) | {
        f"langmill_engine{end}" for end in re.findall(r"`(_\w+)`", PAGE)
    }
    assert {name for name in metrics if not name.endswith("_created")} == named
