"""`tiny`, the module of tiny.py, and no time spent on measuring the machine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from langmill.train import measure


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    return _load()


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "matmul_flops", lambda dtype, device: 1e9)
