"""What every test stands on: one thread, no network, no hub, fixed randomness, and real models where fetched."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Before torch is imported: two spinning threads on a busy machine stall small operations a hundredfold.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["COLUMNS"] = "120"

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
hypothesis.settings.register_profile(
    "langmill", deadline=None, derandomize=True, database=None, max_examples=60
)
hypothesis.settings.load_profile("langmill")


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Every connection that would leave this machine raises; loopback and local sockets work."""
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            if host not in ("localhost", "::1") and not str(host).startswith("127."):
                raise PermissionError(f"a test tried to reach {host}")
        real(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield


def load_script(name: str) -> ModuleType:
    """A Python file of scripts/ as a module."""
    path = ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """`asset("smollm2")` is the folder of a fetched asset; without it the test is skipped, and in CI it fails."""
    cached = load_script("assets").cached

    def find(name: str) -> Path:
        folder: Path | None = cached(name)
        if folder is None:
            message = f"asset {name} is not there: run scripts/fetch_assets {name}"
            pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
        return folder

    return find
