"""Sources: the files of folders and patterns, each once, in order of their ids, cut into units of work.

A file's id is the source's last name and its path below it, so that it is the same on every machine. A unit is some
files of one source, or a range of lines of a long JSONL file. Where units begin depends on names and content alone:
when a source grows, the units before the growth stay as they are, and are found done.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from langmill.common.errors import UsageError
from langmill.common.files import written_here
from langmill.common.prepare_settings import InputSettings
from langmill.data import hub
from langmill.data.streams import CHUNK, COMPRESSED

FORMATS = (
    ".txt", ".md", ".html", ".htm", ".xhtml", ".warc", ".pdf", ".jsonl", ".ndjson", ".json", ".csv", ".tsv",
    ".parquet", ".mbox", ".eml",
)  # fmt: skip
_PLAIN = (".json", ".parquet", ".pdf")  # which are not read compressed
_SUFFIXES = tuple(
    one + packed for one in FORMATS for packed in ("", *COMPRESSED) if not (packed and one in _PLAIN)
)
_SPLIT = (".jsonl", ".ndjson")  # which are cut into ranges of lines
_MARKUP = (".html", ".htm", ".xhtml")  # of which text is the least part
_GROUPS = 64  # a unit of many files ends after one of so many, which their names choose

Reject = Callable[[str, str, str, int, str], None]  # source, id, reason, bytes, detail


@dataclass(frozen=True)
class File:
    """A file to read. `id`: its source's name and its path below that."""

    path: Path
    id: str
    source: str
    size: int
    changed: int  # st_mtime_ns

    @property
    def format(self) -> str:
        return format_of(self.path)


@dataclass(frozen=True)
class Piece:
    """A file, or the bytes from `start` to `end` of one, which begin with row number `first`. `hash`: of them."""

    file: File
    start: int
    end: int
    first: int
    hash: str


@dataclass(frozen=True)
class Unit:
    """Work that is done as a whole. Equal keys give equal results."""

    key: str
    source: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.end - piece.start for piece in self.pieces)


def format_of(path: PurePath) -> str:
    """The suffix that names a file's format, compressed or not; "" where it is not a known one."""
    name = PurePath(path.name.lower())
    packed = name.suffix in COMPRESSED
    suffix = PurePath(name.stem).suffix if packed else name.suffix
    return suffix if suffix in FORMATS and not (packed and suffix in _PLAIN) else ""


@dataclass(frozen=True)
class Root:
    """A source: its name, the folder or file that ids are counted from, and what to read of it. inside: the folder that
    links may lead to. revision: the commit of a data set of the hub."""

    name: str
    base: Path
    paths: tuple[Path, ...]
    inside: Path
    revision: str = ""


def roots(sources: Sequence[str]) -> list[Root]:
    """The sources by name: the last part of their path, or more of it where two would be the same.

    UsageError for a source that does not exist, a pattern that nothing matches, a file of no known format; for data
    sets of the hub see hub.py.
    """
    found: dict[PurePath, list[Path]] = {}
    named = _of_hub([source for source in sources if source.startswith(hub.PREFIX)])
    for source in dict.fromkeys(source for source in sources if not source.startswith(hub.PREFIX)):
        path = Path(source)
        if path.exists():
            if path.is_file() and not format_of(path):
                raise UsageError(f"{path} is not a known format: known are {', '.join(FORMATS)}")
            found.setdefault(_plain(path), []).append(path)
        elif glob.has_magic(source):
            matched = [Path(name) for name in sorted(glob.glob(source, recursive=True))]  # noqa: PTH207
            if not matched:
                raise UsageError(f"no file matches {source}")
            start = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
            found.setdefault(_plain(Path(*path.parts[:start])), []).extend(matched)
        else:
            raise UsageError(f"{source} does not exist")
    for base, paths in found.items():
        depth = 1
        while any(other != base and other.parts[-depth:] == base.parts[-depth:] for other in found):
            depth += 1
        name = "/".join(part for part in base.parts[-depth:] if part != base.anchor)
        inside = Path(base) if Path(base).is_dir() else Path(base).parent
        named.append(Root(name, Path(base), tuple(paths), inside))
    return named


def _of_hub(sources: Sequence[str]) -> list[Root]:
    """A root for each data set, with all that is asked of it. UsageError where two revisions of one are."""
    found: dict[str, Root] = {}
    for source in dict.fromkeys(sources):
        got = hub.fetched(source, _SUFFIXES)
        root = found.setdefault(got.name, Root(got.name, got.folder, (), got.inside, got.commit))
        if root.base != got.folder:
            raise UsageError(
                f"{source}: another revision of {got.name} is a source already: give one of them"
            )
        found[got.name] = replace(root, paths=tuple(dict.fromkeys([*root.paths, *got.files])))
    return list(found.values())


def _plain(path: Path) -> PurePath:
    return PurePath(os.path.abspath(path))  # noqa: PTH100 - links are not followed: ids keep the names given


def files(sources: Sequence[str], follow: bool, reject: Reject) -> list[File]:
    """Every file of the sources once, sorted by id. What cannot be read is rejected with its reason."""
    seen: set[tuple[int, int]] = set()
    found: list[File] = []
    for root in roots(sources):
        for path in root.paths:
            below = PurePath(os.path.relpath(_plain(path), root.base)).as_posix()
            id = root.name if below == "." else f"{root.name}/{below}"
            _walk(path, root.name, id, root.inside, follow, seen, found, reject)
    return sorted(found, key=lambda file: file.id + "#")


def _walk(
    start: Path, source: str, name: str, base: Path, follow: bool, seen: set[tuple[int, int]], found: list[File],
    reject: Reject,
) -> None:  # fmt: skip
    """Add the files at and below `start`. A list of what is left to visit, not a call for each level: folders can be
    thousands of levels deep."""
    left = [(start, name)]
    real = base.resolve()
    while left:
        path, id = left.pop()
        try:
            status = path.stat()
            if path.is_symlink() and not follow and path != start and not path.resolve().is_relative_to(real):
                reject(source, id, "link that leads out of its source", 0, "read.follow_links=true reads it")
                continue
        except (OSError, RuntimeError) as error:  # resolve() raises RuntimeError in a loop of links
            reject(source, id, "cannot be opened", 0, str(error))
            continue
        same = (status.st_dev, status.st_ino)
        reason = _unfit(path, status, path == start)
        if reason:
            reject(source, id, reason, status.st_size if stat.S_ISREG(status.st_mode) else 0, "")
        elif same in seen:
            what = "folder" if stat.S_ISDIR(status.st_mode) else "file"
            reject(source, id, f"link to a {what} that was read already", 0, "")
        elif stat.S_ISDIR(status.st_mode):
            seen.add(same)
            try:
                left += [(entry, f"{id}/{_name(entry)}") for entry in sorted(path.iterdir(), reverse=True)]
            except OSError as error:
                reject(source, id, "folder cannot be read", 0, str(error))
        else:
            seen.add(same)
            found.append(File(path, id, source, status.st_size, status.st_mtime_ns))


def _name(path: Path) -> str:
    """Its name; bytes that are no UTF-8 are written as \\xNN."""
    return os.fsencode(path.name).decode("utf-8", errors="backslashreplace")


def _unfit(path: Path, status: os.stat_result, given: bool) -> str:
    if path.name.startswith(".") and not given:
        return "hidden file or folder"
    if stat.S_ISDIR(status.st_mode):
        if (path / "manifest.json").is_file() and (path / "clean").is_dir():
            return "a prepared folder: give its clean folder"
        return "a model or run of Langmill" if written_here(path) else ""
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        return "not a regular file"
    return "" if format_of(path) else f"not a known format ({path.suffix.lower() or 'no extension'})"


def units(found: Sequence[File], settings: InputSettings, recipe: str, reject: Reject) -> Iterator[Unit]:
    """The files in units, in order. `recipe`: of all that decides what is made of them. Reads every byte once, to hash.

    A file that cannot be read is rejected.
    """
    group: list[Piece] = []
    size = 0
    for file in found:
        if group and file.source != group[0].file.source:
            yield _unit(group, recipe)
            group, size = [], 0
        format = file.format
        cut = settings.unit_bytes if format in _SPLIT and file.path.suffix.lower() in _SPLIT else None
        cut = None if grouped(settings) else cut
        try:
            pieces = list(_pieces(file, cut))
        except OSError as error:
            reject(file.source, file.id, "cannot be opened", file.size, str(error))
            continue
        if len(pieces) > 1 or file.size >= settings.unit_bytes:
            if group:
                yield _unit(group, recipe)
            yield from (_unit([piece], recipe) for piece in pieces)
            group, size = [], 0
            continue
        group += pieces
        size += sum(piece.end // (4 if format in _MARKUP else 1) for piece in pieces)
        lot = hashlib.blake2b(file.id.encode("utf-8"), digest_size=8).digest()
        ends = int.from_bytes(lot, "little") % _GROUPS == 0
        if ends or size >= settings.unit_bytes or len(group) >= settings.unit_files:
            yield _unit(group, recipe)
            group, size = [], 0
    if group:
        yield _unit(group, recipe)


def grouped(settings: InputSettings) -> bool:
    """Whether rows are put together into threads, so that a file cannot be cut."""
    return any(field.partition("=")[0] in ("thread", "parent") for field in settings.fields)


def _unit(pieces: Sequence[Piece], recipe: str) -> Unit:
    sums = hashlib.blake2b(recipe.encode("utf-8"), digest_size=16)
    for piece in pieces:
        sums.update(repr((piece.file.id, piece.start, piece.first, piece.hash)).encode("utf-8"))
    return Unit(sums.hexdigest(), pieces[0].file.source, tuple(pieces))


def _pieces(file: File, cut: int | None) -> Iterator[Piece]:
    """The file as one piece, or in pieces that end with the line in which `cut` bytes are reached."""
    start = place = 0
    first, rows = 1, 0
    sums = hashlib.blake2b(digest_size=16)
    with open(file.path, "rb") as stream:
        while data := stream.read(CHUNK):
            while cut is not None and place + len(data) - start >= cut:
                end = data.find(b"\n", max(0, start + cut - place - 1)) + 1
                if not end:
                    break
                sums.update(data[:end])
                rows += data.count(b"\n", 0, end)
                place += end
                yield Piece(file, start, place, first, sums.hexdigest())
                start, first, rows = place, first + rows, 0
                sums, data = hashlib.blake2b(digest_size=16), data[end:]
            sums.update(data)
            rows += data.count(b"\n")
            place += len(data)
    if place > start or start == 0:
        yield Piece(file, start, place, first, sums.hexdigest())
