"""Files that are whole or absent: atomic writes, locks, hashes, claimed outputs, format versions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from langmill.common.errors import DataError, LangmillError, UsageError

REPLACED = "replaced"  # in a run folder: what --force replaces, until the new run has begun
# A folder holding one of these was written by Langmill, so `--force` may replace it.
OURS = {"lineage.json", "shards.json", "tokenizer.json"}
STARTED = {
    "lock",
    "settings.yaml",
    "errors.jsonl",
}  # what a run folder holds before the run has made anything


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash at any moment, meets the old content or the new, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            _flush(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def recover(path: Path) -> None:
    """Put back the folder that `atomic_folder` was about to replace when it was killed between its two renames."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.replace(path)


@contextlib.contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path` to fill; it becomes `path` when the block ends well.

    Files and folder are flushed to the disk before the rename, so a crash leaves the old state or the
    new. On an error nothing is left. An existing `path` is refused unless `replace` or empty. Two processes must
    not write the same path at once (see Lock); what a killed writer left behind is cleared here.
    """
    temporary, old = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old"))
    recover(path)
    if path.exists() and not replace and any(path.iterdir()):
        raise UsageError(f"{path} exists already: choose another name or remove it")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                with open(Path(folder, name), "rb+") as file:
                    _flush(file)
            _sync_folder(Path(folder))
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.replace(old)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            old.replace(path)
        raise
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; systems that cannot open a folder (Windows) need no such step."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Lock:
    """`with Lock(path):` holds a lock file that keeps a second writer out.

    The operating system frees it when the process ends, however it ends. A lock held elsewhere is a
    UsageError that names the process. The file itself stays: removing it would open a race.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+", encoding="utf-8")
        try:
            _lock(file)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise UsageError(
                f"{self.path.parent} is in use by another run (process {holder}): wait for it, "
                "stop it, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()
            self._file = None


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[str]) -> None:
        file.seek(1 << 30)  # a byte beyond the content: Windows locks forbid reading what they cover
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: IO[str]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def run_folder(out: Path) -> Path:
    """The private folder of the run that writes the model folder `out`: its name with ".run" added."""
    return out.with_name(out.name + ".run")


def run_lock(out: Path) -> Lock:
    """The lock that a run writing `out` holds from its first write to its last."""
    return Lock(run_folder(out) / "lock")


@contextlib.contextmanager
def claimed(
    out: Path,
    resume: bool = False,
    force: bool = False,
    resumable: bool = False,
    inputs: Sequence[str | Path | None] = (),
    began: str = "",
) -> Iterator[Path]:
    """Yield the locked run folder of a run that writes `out`, which is refused where it exists and is neither resumed
    nor forced; a run folder that holds nothing else is gone afterwards.

    Forced, what is there is put aside, and deleted when the block ends or the training loop starts. Where the block
    fails before the file `began` stands in the run folder (""; anywhere), all is as it was, but for a `resumable` run
    that was killed or met a fault of the machine: it keeps what it made. A later error is told how to go on.
    Only a folder that Langmill wrote is put aside, and never what a running process holds or the run reads (`inputs`).
    """
    if resume and force:
        raise UsageError("--resume goes on with what is there and --force removes it: give one of them")
    run = run_folder(out)
    there = next(folder for folder in run.absolute().parents if folder.exists())
    goes_on = resume and run.is_dir()
    with run_lock(out):
        try:
            if not resume:
                _recover(out, run, began)
                _check_out(out, force, resumable, inputs)
                _put_aside(out, run)
            with _undone(out, run, resumable, began, goes_on):
                yield run
        finally:
            if not _names(run) - {"lock"}:
                _remove_new(run.absolute(), there)


@contextlib.contextmanager
def _undone(out: Path, run: Path, resumable: bool, began: str, goes_on: bool) -> Iterator[None]:
    """See `claimed`. goes_on: what is there was made by an earlier start of the same run."""
    try:
        yield
    except BaseException as error:
        if began and (run / began).exists():
            shutil.rmtree(run / REPLACED, ignore_errors=True)
            _advise(error, run, resumable)
        elif not goes_on and (isinstance(error, LangmillError) or not resumable or (run / REPLACED).exists()):
            _put_back(out, run)
        raise
    shutil.rmtree(run / REPLACED, ignore_errors=True)


def claim_out(
    out: Path, force: bool = False, resumable: bool = False, inputs: Sequence[str | Path | None] = ()
) -> None:
    """Refuse an `out` that exists as `claimed` does; forced, what is there is removed at once."""
    with claimed(out, False, force, resumable, inputs):
        pass


def _check_out(out: Path, force: bool, resumable: bool, inputs: Sequence[str | Path | None]) -> None:
    run = run_folder(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, and this writes a folder: choose another --out")
    taken = [folder for folder in (out, run) if _names(folder) - STARTED]
    if taken and not force:
        go_on = "go on with --resume, " if resumable else ""
        raise UsageError(
            f"{taken[0]} exists already: choose another --out, {go_on}or replace it with --force"
        )
    if _names(out) and not _names(out) & OURS:
        raise UsageError(
            f"{out} does not look like Langmill's own: remove it yourself, or choose another --out"
        )
    gone = [folder.resolve() for folder in (out, run)]
    for place in (Path(given).resolve() for given in inputs if given is not None):
        if place.exists() and any(folder in (place, *place.parents) for folder in gone):
            raise UsageError(f"--force would remove {place}, which this run reads: choose another --out")


def _put_aside(out: Path, run: Path) -> None:
    """`out` and what the run folder holds go into a folder of the latter, by renaming alone."""
    old = run / REPLACED
    names = _names(run) - {"lock"}
    if names or out.exists():
        (old / "run").mkdir(parents=True)
    for name in names:
        (run / name).rename(old / "run" / name)
    if out.exists():
        out.rename(old / "out")


def _put_back(out: Path, run: Path) -> None:
    """Remove what the run made; what was put aside returns."""
    old = run / REPLACED
    for made in (out, *(run / name for name in _names(run) - {"lock", REPLACED})):
        shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
    for name in _names(old / "run"):
        (old / "run" / name).rename(run / name)
    if (old / "out").exists():
        (old / "out").rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _recover(out: Path, run: Path, began: str) -> None:
    """What a run put aside that was killed before it began comes back; after that it was not wanted any more."""
    if (run / REPLACED).exists() and began and (run / began).exists():
        shutil.rmtree(run / REPLACED)
    elif (run / REPLACED).exists():
        _put_back(out, run)


def _advise(error: BaseException, run: Path, resumable: bool) -> None:
    """Add to an error of a run under way how to go on, where it does not say so itself."""
    fault = isinstance(error, LangmillError) and not isinstance(error, UsageError)
    if fault and resumable and "--resume" not in str(error):
        more = f"{run} keeps what was done: --resume goes on with the same settings, --force starts anew"
        error.args = (f"{error}. {more}", *error.args[1:])


def _remove_new(folder: Path, there: Path) -> None:
    """Remove a run folder, and those above it that are empty and were made with it, up to the one that was there."""
    shutil.rmtree(folder, ignore_errors=True)
    for above in folder.parents:
        if above == there or _names(above):
            break
        above.rmdir()


def written_here(folder: Path) -> bool:
    """Whether a folder is Langmill's own work, a model, shards or a run, and so no text to learn from."""
    made = any((folder / name).is_file() for name in ("lineage.json", "shards.json"))
    return made or (folder.suffix == ".run" and (folder / "lock").is_file())


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} if folder.is_dir() else set()


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Mapping[str, Any], kind: str, version: int) -> None:
    """Write one of our own files, atomically: `value` after its "format" (kind) and "version"."""
    head = {"format": kind, "version": version}
    atomic_write(path, json.dumps(head | dict(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, kind: str, version: int, error: type[LangmillError] = DataError) -> dict[str, Any]:
    """Read a file that write_json wrote, with its "format" and "version".

    `version` is the newest this code knows: a newer file is refused by name, an older one returned for
    the caller to migrate. A missing, broken or foreign file raises `error`.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except ValueError as reason:
        raise error(f"{path} is damaged and cannot be read as JSON: {reason}") from None
    if (
        not isinstance(value, dict)
        or value.get("format") != kind
        or not isinstance(value.get("version"), int)
    ):
        raise error(f"{path} is not a {kind} file of Langmill")
    if value["version"] > version:
        raise error(
            f"{path} has {kind} version {value['version']}, and this Langmill knows {version} at most: upgrade Langmill"
        )
    return value


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds `path`, or would hold it."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
