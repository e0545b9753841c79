from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from langmill.common import files
from langmill.common.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    LangmillError,
    TrainingError,
    UsageError,
)
from langmill.common.files import (
    Lock,
    atomic_folder,
    atomic_write,
    claimed,
    free_bytes,
    read_json,
    run_folder,
    run_lock,
    sha256,
    write_json,
    written_here,
)


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that has printed its first line."""
    process = python(code, *arguments)
    assert process.stdout and process.stdout.readline()
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
    process.wait()
    assert process.stdout
    process.stdout.close()


WRITER = """
import sys; from pathlib import Path; from langmill.common.files import atomic_write
path = Path(sys.argv[1]); atomic_write(path, "a" * 2**20); print("ready", flush=True)
while True:
    for letter in "ab": atomic_write(path, letter * 2**20)
"""


@pytest.mark.parametrize("delay", [0.02, 0.051, 0.083])
def test_a_killed_write_leaves_the_old_file_or_the_new(tmp_path: Path, delay: float) -> None:
    path = tmp_path / "file"
    process = start(WRITER, str(path))
    time.sleep(delay)
    kill(process)
    assert path.read_text() in ("a" * 2**20, "b" * 2**20)
    atomic_write(path, "after")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old ü")
    monkeypatch.setattr(
        files, "_flush", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert path.read_text(encoding="utf-8") == "old ü" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(RuntimeError), atomic_folder(path) as new:
        (new / "part").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    path.mkdir()
    with atomic_folder(path) as new:
        (new / "sub").mkdir()
        (new / "sub" / "file").write_text("1")
        assert not list(path.iterdir())
    with pytest.raises(UsageError, match="exists"), atomic_folder(path):
        pass
    with pytest.raises(RuntimeError), atomic_folder(path, replace=True) as new:
        raise RuntimeError
    assert (path / "sub" / "file").read_text() == "1"
    with atomic_folder(path, replace=True) as new:
        (new / "other").write_text("2")
    assert [file.name for file in path.iterdir()] == ["other"] and len(list(tmp_path.iterdir())) == 1


def test_a_folder_killed_between_its_two_renames_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".folder.old").mkdir()
    (tmp_path / ".folder.old" / "kept").write_text("1")
    (tmp_path / ".folder.tmp").mkdir()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder", replace=True):
        raise RuntimeError
    assert (tmp_path / "folder" / "kept").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


HOLDER = """
import sys, time; from pathlib import Path; from langmill.common.files import Lock
with Lock(Path(sys.argv[1])): print("held", flush=True); time.sleep(60)
"""


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    process = start(HOLDER, str(path))
    with pytest.raises(UsageError, match=rf"in use by another run \(process {process.pid}\)"), Lock(path):
        pass
    kill(process)
    with Lock(path):
        assert path.read_text().strip() == str(os.getpid())
    with Lock(path):
        pass


def claim(out: Path, **given: Any) -> Path:
    """Claim `out` for a run that makes nothing."""
    with claimed(out, **given) as run:
        return run


def test_an_existing_out_is_refused_resumed_or_replaced(tmp_path: Path) -> None:
    out = tmp_path / "model.v1"
    out.mkdir()
    with claimed(out) as run:  # an empty folder holds nothing to lose
        assert run.name == "model.v1.run" and not out.exists()
        with pytest.raises(UsageError, match="in use"):
            claim(out)
    assert not run.exists()
    atomic_write(run / "settings.yaml", "")
    claim(out)  # and neither does a run that ended before it made anything
    assert not run.exists()
    atomic_write(run / "metrics.jsonl", "{}")
    with pytest.raises(UsageError, match=r"model\.v1\.run exists already.*--out, or replace it with --force"):
        claim(out)
    with pytest.raises(UsageError, match="--resume.*--force"):
        claim(out, resumable=True)
    claim(out, resume=True)
    with pytest.raises(UsageError, match="one of them"):
        claim(out, resume=True, force=True)
    with run_lock(out), pytest.raises(UsageError, match="in use"):
        claim(out, force=True)
    assert (run / "metrics.jsonl").exists()
    claim(out, force=True)
    assert not out.exists() and not run.exists()


def test_force_never_removes_what_is_not_ours(tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    atomic_write(out / "chapter.txt", "years of work")
    atomic_write(run_folder(out) / "metrics.jsonl", "{}")
    with pytest.raises(UsageError, match="remove it yourself"):
        claim(out, force=True)
    assert (out / "chapter.txt").exists() and run_folder(out).exists()
    atomic_write(out / "lineage.json", "{}")
    claim(out, force=True)
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        claim(out, force=True)


def test_force_never_removes_what_the_run_reads(tmp_path: Path) -> None:
    out = tmp_path / "model"
    atomic_write(out / "lineage.json", "{}")
    atomic_write(run_folder(out) / "shards" / "shards.json", "{}")
    (tmp_path / "link").symlink_to(out)
    for given in (out, run_folder(out) / "shards", tmp_path / "link"):
        with pytest.raises(UsageError, match="--force would remove .* which this run reads"):
            claim(out, force=True, inputs=["org/name", None, given])
    assert written_here(out) and written_here(run_folder(out) / "shards") and not written_here(tmp_path)
    claim(out, force=True, inputs=[tmp_path, "org/name", None])
    assert not out.exists()


def everything(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "lock")
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("error", [DataError("no row"), KeyboardInterrupt(), OSError("disk")])
def test_a_run_that_fails_before_it_began_leaves_all_as_it_was(
    error: BaseException, forced: bool, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "down" / "model"
    if forced:
        for name in ("lineage.json", "weights/one"):
            atomic_write(out / name, "old")
        for name in ("lock", "metrics.jsonl", "choices.json", "checkpoints/step/w"):
            atomic_write(run_folder(out) / name, "old")
    before = everything(tmp_path)
    with pytest.raises(type(error)), claimed(out, force=forced, resumable=True, began="choices.json") as run:
        assert not out.exists() and not (run / "choices.json").exists()
        atomic_write(run / "settings.yaml", "new")
        atomic_write(run / "shards" / "0", "new")
        raise error
    if forced or isinstance(error, DataError):
        assert everything(tmp_path) == before
        assert forced or not list(tmp_path.iterdir())
    else:  # what was made is whole or absent, and --resume goes on from there
        assert everything(tmp_path) == {
            "deep/down/model.run/settings.yaml": "new",
            "deep/down/model.run/shards/0": "new",
        }


def test_a_run_that_fails_later_is_kept_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "model"
    atomic_write(out / "lineage.json", "old")
    with pytest.raises(
        TrainingError, match=r"it broke\. .*model\.run keeps .* --resume .* --force"
    ) as raised:
        with claimed(out, force=True, resumable=True, began="choices.json") as run:
            atomic_write(run / "choices.json", "new")
            raise TrainingError("it broke")
    assert raised.value.exit_code == 1 and everything(tmp_path) == {"model.run/choices.json": "new"}
    for told in (Interrupted("go on with --resume"), UsageError("not so")):
        with (
            pytest.raises(LangmillError) as plain,
            claimed(out, resume=True, resumable=True, began="choices.json"),
        ):
            raise told
        assert str(plain.value) in ("go on with --resume", "not so")
    assert everything(tmp_path) == {"model.run/choices.json": "new"}


def test_what_a_killed_run_put_aside_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "model"
    for path in (out / "lineage.json", run_folder(out) / "report.json"):
        atomic_write(path, "old")
    with claimed(out, force=True, began="choices.json") as run:
        atomic_write(run / "settings.yaml", "new")
        shutil.copytree(run, tmp_path / "killed")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(tmp_path / "killed", run)
    shutil.rmtree(tmp_path / "killed")
    with pytest.raises(DataError), claimed(out, force=True, began="choices.json"):
        raise DataError("no row")
    assert everything(tmp_path) == {"model/lineage.json": "old", "model.run/report.json": "old"}


def test_our_json_knows_its_kind_and_version(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(CheckpointError, match="missing"):
        read_json(path, "state", 1, CheckpointError)
    write_json(path, {"step": 7, "名": "値"}, "state", 2)
    assert read_json(path, "state", 2) == {"format": "state", "version": 2, "step": 7, "名": "値"}
    assert read_json(path, "state", 3)["version"] == 2
    with pytest.raises(DataError, match=r"x\.json has state version 2.*knows 1 at most"):
        read_json(path, "state", 1)
    with pytest.raises(DataError, match="not a shards file"):
        read_json(path, "shards", 2)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="damaged"):
        read_json(path, "state", 2)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="damaged"):
        read_json(path, "state", 2)


def test_hash_and_free_space(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert free_bytes(tmp_path / "not" / "there") > 0
