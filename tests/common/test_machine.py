from __future__ import annotations

import os

from langmill.common import machine


def test_the_machine_has_some_of_everything() -> None:
    assert 2**28 < machine.available_bytes() <= machine.memory_bytes() < 2**50
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)


def test_a_container_limit_counts(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "max").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(machine, "_GROUP_LIMITS", (str(tmp_path / "none"), str(tmp_path / "absent")))
    whole = machine.memory_bytes()
    monkeypatch.setattr(machine, "_GROUP_LIMITS", (str(tmp_path / "none"), str(tmp_path / "max")))
    assert machine.memory_bytes() == 1_000_000 < whole and machine.available_bytes() <= 1_000_000
