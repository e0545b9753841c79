from __future__ import annotations

from importlib import metadata

import pytest
import torch

from langmill.jobs import doctor


def test_the_doctor_says_what_is_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor, "matmul_flops", lambda dtypes, device, tick: {"float32": 3e11, "bfloat16": 2e11}
    )
    monkeypatch.setattr(doctor, "not_built", lambda: "there is no C++ compiler here (g++)")
    report = doctor.run(quiet=True)
    assert "torch writes instead: there is no C++ compiler here (g++)" in report.text
    assert report.figures["matmul_gflops_float32"] == 300.0 and report.figures["memory_bytes"] > 0
    assert "float32 is the fast type here" in report.text and torch.__version__ in report.text
    assert capsys.readouterr().err == ""


def test_rates_are_measured_in_turns() -> None:
    ticks: list[int] = []
    rates = doctor.matmul_flops((torch.float32, torch.bfloat16), "cpu", lambda: ticks.append(1), seconds=0.01)
    assert (
        len(ticks) % 2 == 0
        and set(rates) == {"float32", "bfloat16"}
        and all(1e8 < r < 1e15 for r in rates.values())
    )


def test_a_missing_extra_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2",
        'nh3>=0.2; extra == "serve"',
        'numpy>=1; extra == "eval"',
        'langmill[eval]; extra == "all"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)

    def absent(name: str) -> str:
        if name == "nh3":
            raise metadata.PackageNotFoundError
        return "1"

    monkeypatch.setattr(metadata, "version", absent)
    extras = doctor.installed_extras()
    assert extras == {"serve": ["nh3"], "eval": []}
    assert doctor._extra_lines(extras)[0].endswith('missing nh3: pip install "langmill[serve]"')
