"""The process: what it says at the start, how it stops, a taken port, keys by the command, several workers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from langmill import cli

LONG = {"model": "long", "prompt": "The quick", "max_tokens": 600, "stream": True, "ignore_eos": True}


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """`start(model, option, …)`: the process and its address, once it answers."""
    begun: list[subprocess.Popen[str]] = []

    def run(*words: str) -> tuple[subprocess.Popen[str], str]:
        command = [
            sys.executable,
            "-m",
            "langmill",
            "serve",
            *words,
            "--port",
            "0",
            "--threads",
            "1",
            "--history",
            "off",
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begun.append(process)
        assert process.stderr is not None
        for line in process.stderr:  # ends with the process
            if found := re.search(r"answers at (http://\S+)/v1", line):
                return process, found[1]
        raise AssertionError(f"it ended with {process.wait()}")

    yield run
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_signal_lets_running_answers_end_and_takes_no_new_ones(start: Any, long_folder: str) -> None:
    process, url = start(long_folder, "--json")
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:  # it stops listening
            try:
                httpx.get(f"{url}/health", timeout=5)
            except httpx.TransportError:
                break
        else:
            raise AssertionError("it still takes requests")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in "".join(rest)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["ok"] and told["counts"]["written"] == 600 and told["models"] == ["long"]


def test_what_does_not_end_in_time_is_ended(start: Any, long_folder: str) -> None:
    process, url = start(long_folder, "--drain-seconds", "0.1")
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**LONG, "max_tokens": 8000}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        with ThreadPoolExecutor() as others:
            whole = others.submit(
                httpx.post, f"{url}/v1/completions", json={**LONG, "stream": False, "max_tokens": 8000}
            )
            while 'engine_slots{model="long"} 2.0' not in httpx.get(f"{url}/metrics").text:
                pass
            process.send_signal(signal.SIGINT)
            assert whole.result().status_code == 503 and whole.result().headers["retry-after"] == "1"
        assert json.loads([line for line in lines if line][-1][6:])["error"]["code"] == "stopping"
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err


@pytest.mark.parametrize("work, twice, code", [(0, False, 0), (99, False, 1), (99, True, 1)])
def test_threads_that_do_not_end_do_not_hold_the_process(work: float, twice: bool, code: int) -> None:
    seconds = 99 if twice else 0.3
    script = (
        "import time\nfrom types import SimpleNamespace\nfrom langmill.serve import run\nrun.GRACE_SECONDS = 0.3\n"
        f"with run.ended_in_time(SimpleNamespace(should_exit=True, force_exit={twice}), {seconds}): time.sleep({work})"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == code and ("still being read" in ended.stderr) == bool(code)


def test_what_is_wrong_shows_before_a_model_is_loaded(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.run(["serve", "no/such/model", "--port", port]) == 2
    assert f"port {port} of 127.0.0.1 is taken" in capsys.readouterr().err
    assert cli.run(["serve", folder, "--host", "0.0.0.0"]) == 2
    assert "needs keys" in capsys.readouterr().err
    assert cli.run(["serve", folder, "--allow-origin", "*"]) == 2
    assert "an origin is a scheme and a host" in capsys.readouterr().err
    assert cli.run(["serve", "--new-key", "ann"]) == 2
    assert "needs --api-keys FILE" in capsys.readouterr().err
    assert cli.run(["serve", "--new-key", "ann", "--api-keys", str(tmp_path / "keys"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["key"].startswith("lm-") and made["key"] not in (tmp_path / "keys").read_text()


def test_conversations_are_kept_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "langmill").write_text("in the way")
    assert cli.run(["serve", "no/such/model", "--port", "0"]) == 2
    told = capsys.readouterr().err
    assert f"cannot be kept in {tmp_path}/langmill/history.sqlite" in told


def test_workers_share_a_port_and_a_dead_one_is_started_again(start: Any, folder: str) -> None:
    process, url = start(folder, "--workers", "2", "--no-page")

    def answering() -> set[str]:
        found = (re.search(r'worker="(\d+)"', httpx.get(f"{url}/metrics").text) for _ in range(12))
        return {match[1] for match in found if match}

    seen: set[str] = set()
    deadline = time.monotonic() + 60
    while len(seen) < 2:
        seen |= answering()
        assert time.monotonic() < deadline, seen
    killed = seen.pop()
    os.kill(int(killed), signal.SIGKILL)
    while not answering() - {killed, *seen}:
        assert time.monotonic() < deadline + 60
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "ended by signal 9; it is started again" in err
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")


def test_workers_end_with_the_process_that_watches_them(start: Any, folder: str) -> None:
    process, url = start(folder, "--workers", "2", "--no-page")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{url}/health", timeout=5)
        except httpx.TransportError:
            break
    else:
        raise AssertionError("the workers live on")


def test_workers_that_cannot_start_are_not_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").mkdir()
    words = ["serve", str(tmp_path / "m"), "--port", "0", "--workers", "2", "--no-page"]
    assert cli.run(words) == 1
    assert "a worker could not start" in capfd.readouterr().err
