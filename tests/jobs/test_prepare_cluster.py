"""Units as a cluster's tasks, with a stand-in for Ray; `scripts/bench ray_cluster` has the real one, and kills."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from langmill.common.errors import DataError, MissingExtra, UsageError
from langmill.common.settings import PrepareSettings
from langmill.data.forgotten import known_as
from langmill.jobs import prepare, prepare_cluster


class RayError(Exception):
    """What Ray raises where a worker or its machine died."""


class RayTaskError(RayError):
    """What Ray raises where a task did."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


@dataclass(eq=False)
class Reference:
    task: Callable[[Any, Any], str]
    unit: Any
    shared: Any


class Ray:
    """Does the tasks here, once they are waited for; `meets(unit)` is called before each."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, meets: Callable[[Any], None]) -> None:
        self.meets, self.up, self.most, self.running = meets, False, 0, 0

    def init(self, **given: Any) -> None:
        self.up = True

    def shutdown(self) -> None:
        self.up = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        def queued(task: Any, unit: Any, shared: Any) -> Any:
            self.running += 1
            self.most = max(self.most, self.running)
            return Reference(task, unit, shared)

        return lambda task: SimpleNamespace(remote=lambda unit, shared: queued(task, unit, shared))

    def wait(self, running: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        self.running -= 1
        return running[-1:], running[:-1]

    def get(self, reference: Any) -> Any:
        here = Path.cwd()
        self.meets(reference.unit)
        try:
            return reference.task(reference.unit, reference.shared)
        except Exception as error:
            raise RayTaskError(error) from error
        finally:
            os.chdir(here)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    rows = [
        {"text": f"Boat {i} went down the river with {i * 37 % 101} cows and {i} letters."} for i in range(90)
    ]
    (tmp_path / "raw" / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return tmp_path / "raw"


def settings(out: Path, **more: Any) -> PrepareSettings:
    small = {"read": {"unit_bytes": 1024}, "language": {"detect": False}, "workers": 1}
    return PrepareSettings(source=["raw"], out=out, **small | more)


def cluster(monkeypatch: pytest.MonkeyPatch, meets: Callable[[Any], None] = lambda unit: None) -> Ray:
    ray = Ray(meets)
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


def made(folder: Path) -> dict[str, str]:
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in folder.rglob("*")
        if f.is_file()
    }


def test_a_cluster_and_one_process_write_the_same(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(raw.parent)
    elsewhere = raw.parent / "elsewhere"
    elsewhere.mkdir()
    ray = cluster(monkeypatch, lambda unit: os.chdir(elsewhere))  # a worker's own working directory
    prepare.run(settings(raw.parent / "ray", engine="ray"), quiet=True)
    assert ray.most == 1 and not ray.up and not (raw.parent / "ray.run" / "cluster").exists()
    prepare.run(settings(Path("native")), quiet=True)
    assert made(raw.parent / "ray") == made(raw.parent / "native")
    prepare.run(settings(raw.parent / "many", engine="ray", workers=None), quiet=True)
    assert ray.most == 4  # two for each core


def test_what_was_forgotten_stays_away_on_a_cluster(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(raw.parent)
    prepare.run(settings(Path("out")), quiet=True)
    key = prepare.key_of(Path("out.run"))
    (raw.parent / "out.run" / "forgotten.json").write_text(
        json.dumps({"format": "forgotten", "version": 2, "hashes": [known_as(key, "raw/rows.jsonl#00000001")],
                    "begun": []})
    )  # fmt: skip
    cluster(monkeypatch, lambda unit: os.chdir("/"))
    report = prepare.run(settings(Path("out").absolute(), engine="ray", force=True), quiet=True)
    assert report.counts["documents"] == 89


def test_a_unit_whose_worker_dies_each_time_is_left_out_and_done_by_the_next_run(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(raw.parent)

    def dies(unit: Any) -> None:
        if unit.pieces[0].start == 0:
            raise RayError

    cluster(monkeypatch, dies)
    report = prepare.run(settings(Path("out"), engine="ray"), quiet=True)
    assert not report.ok and ["died 4 times" in why for *_, why in report.extra["failed"]] == [True]
    cluster(monkeypatch)
    again = prepare.run(settings(Path("out"), engine="ray"), quiet=True)
    assert again.ok and again.counts["documents"] == 90
    assert again.extra["units"]["reused"] == again.extra["units"]["total"] - 1


def test_faults_of_the_cluster_say_what_to_do(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(raw.parent)
    mark = raw.parent / "out.run" / prepare_cluster.MARK

    def another_disk(unit: Any) -> None:
        mark.write_text("of another run")

    ray = cluster(monkeypatch, another_disk)
    with pytest.raises(DataError, match="does not see .*out.run: all of its machines must share"):
        prepare.run(settings(Path("out"), engine="ray"), quiet=True)
    assert not ray.up and not mark.exists()
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"no Ray cluster answers at {address}.*ray start --head"):
            prepare.run(settings(Path("out"), engine="ray", address=address), quiet=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"langmill\[cluster\]"):
        prepare.run(settings(Path("out"), engine="ray"), quiet=True)
