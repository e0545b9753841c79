from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from langmill.common import files
from langmill.common.errors import CheckpointError, DataError, UsageError
from langmill.common.files import (
    Lock,
    atomic_folder,
    atomic_write,
    claim_out,
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


def test_an_existing_out_is_refused_resumed_or_replaced(tmp_path: Path) -> None:
    out = tmp_path / "model.v1"
    claim_out(out)
    out.mkdir()
    claim_out(out)  # an empty folder holds nothing to lose
    with run_lock(out):
        assert run_folder(out).name == "model.v1.run"
        with pytest.raises(UsageError, match="in use"):
            claim_out(out)
    claim_out(out)  # and neither does a run that ended before it made anything
    assert not run_folder(out).exists()
    atomic_write(run_folder(out) / "metrics.jsonl", "{}")
    with pytest.raises(UsageError, match=r"model\.v1\.run exists already.*--out, or replace it with --force"):
        claim_out(out)
    with pytest.raises(UsageError, match="--resume.*--force"):
        claim_out(out, resumable=True)
    claim_out(out, resume=True)
    with pytest.raises(UsageError, match="one of them"):
        claim_out(out, resume=True, force=True)
    with run_lock(out), pytest.raises(UsageError, match="in use"):
        claim_out(out, force=True)
    claim_out(out, force=True)
    assert not out.exists() and not run_folder(out).exists()


def test_force_never_removes_what_is_not_ours(tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    atomic_write(out / "chapter.txt", "years of work")
    atomic_write(run_folder(out) / "metrics.jsonl", "{}")
    with pytest.raises(UsageError, match="remove it yourself"):
        claim_out(out, force=True)
    assert (out / "chapter.txt").exists() and run_folder(out).exists()
    atomic_write(out / "lineage.json", "{}")
    claim_out(out, force=True)
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        claim_out(out, force=True)


def test_force_never_removes_what_the_run_reads(tmp_path: Path) -> None:
    out = tmp_path / "model"
    atomic_write(out / "lineage.json", "{}")
    atomic_write(run_folder(out) / "shards" / "shards.json", "{}")
    (tmp_path / "link").symlink_to(out)
    for given in (out, run_folder(out) / "shards", tmp_path / "link"):
        with pytest.raises(UsageError, match="--force would remove .* which this run reads"):
            claim_out(out, force=True, inputs=["org/name", None, given])
    assert written_here(out) and written_here(run_folder(out) / "shards") and not written_here(tmp_path)
    claim_out(out, force=True, inputs=[tmp_path, "org/name", None])
    assert not out.exists()


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
