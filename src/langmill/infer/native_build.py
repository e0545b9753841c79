"""native.cpp as a library: built once on each machine with its own compiler, kept under the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from langmill.common.files import atomic_write

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++20", "-shared", "-fPIC", "-pthread", "-w")
COMPILERS = ("g++", "clang++", "c++")
_SECONDS = 300


class NotBuilt(Exception):
    """Why there is no library here, for people to read."""


@cache
def library(*more: str) -> ctypes.CDLL:
    """The library for this machine; built on first use, in some seconds. NotBuilt says why there is none.

    more: flags for the compiler, such as -DPORTABLE for code without this processor's own vectors.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise NotBuilt(f"there is no C++ compiler here ({', '.join(COMPILERS)})")
    version = _said([compiler, "--version"])
    # -march=native: the same file serves no other processor
    key = hashlib.sha256(
        "\0".join((SOURCE.read_text(encoding="utf-8"), version, *FLAGS, *more, _processor())).encode()
    ).hexdigest()
    built = Path.home() / ".cache" / "langmill" / "native" / f"{key[:32]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / built.name
            _said([compiler, *FLAGS, *more, "-o", str(made), str(SOURCE)])
            atomic_write(built, made.read_bytes())
    try:
        return ctypes.CDLL(str(built))
    except OSError as reason:
        raise NotBuilt(f"{built} cannot be loaded: {reason}") from None


def not_built() -> str | None:
    """Why the library cannot be had on this machine; None where it can."""
    try:
        library()
    except NotBuilt as reason:
        return str(reason)
    return None


def _said(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as reason:
        lines = str(getattr(reason, "stderr", "") or reason).strip().splitlines()
        raise NotBuilt(f"{command[0]} failed: {lines[0] if lines else reason}") from None
    return done.stdout


def _processor() -> str:
    """What this processor can do, by its own words."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("flags", "Features", "model name", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    except OSError:
        return " ".join(platform.uname())
