from __future__ import annotations

from dataclasses import asdict
from types import ModuleType
from typing import Any

import pytest
import torch

from langmill.common.settings import TrainSettings
from langmill.model.count import training_flops
from langmill.train import measure
from langmill.train.measure import Choices, choose_and_prepare, peak_bytes, utilisation
from langmill.train.objectives import causal
from langmill.train.step import tensors

CPU = torch.device("cpu")
REAL = measure.matmul_flops


def decide(
    tiny: ModuleType, kind: str = "llama", steps: int = 10, objective: Any = causal, **settings: Any
) -> Choices:
    model = tiny.model(kind)
    before = tiny.digest(model)
    batch = tensors(next(tiny.Rows()), CPU)
    choices, ready = choose_and_prepare(model, objective, batch, TrainSettings(**settings), steps)
    assert tiny.digest(model) == before and all(weight.grad is None for weight in model.parameters())
    assert ready(model, batch)[0] > 0
    return choices


@pytest.mark.parametrize(("slow", "chosen"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_the_faster_number_type_wins(tiny: ModuleType, slow: torch.dtype, chosen: str) -> None:
    def objective(model: Any, batch: Any) -> Any:
        mixed = torch.is_autocast_enabled("cpu")
        for _ in range(20 if mixed == (slow == torch.bfloat16) else 1):
            found = causal(model, batch)
        return found

    choices = decide(tiny, objective=objective)
    assert choices.dtype == chosen and f"{chosen}: bfloat16 runs at" in choices.why[0]


def test_a_short_run_is_not_compiled(tiny: ModuleType) -> None:
    choices = decide(tiny, dtype="float32")
    assert not choices.compile and "would not repay 19 s of compiling" in choices.why[1]


def test_an_lstm_is_not_compiled(tiny: ModuleType) -> None:
    choices = decide(tiny, "lstm", dtype="float32", compile=True)
    assert not choices.compile and "LSTM" in choices.why[1]


@pytest.mark.parametrize("wish", [True, "auto"])
def test_without_a_compiler_it_stays_eager_and_says_so(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, wish: Any
) -> None:
    def no_compiler(run: Any, **_: Any) -> Any:
        def fail(*_: Any) -> None:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    choices = decide(tiny, dtype="float32", compile=wish, steps=10**9)
    assert not choices.compile and "No working C++ compiler found" in choices.why[1]


@pytest.mark.parametrize(("speed", "compiled"), [(1.0, True), (2.0, False)])
def test_compiled_code_must_be_faster(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, speed: float, compiled: bool
) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    monkeypatch.setattr(measure, "race", lambda runs, device: [2.0, speed][: len(runs)])
    choices = decide(tiny, dtype="float32", steps=1000)
    assert choices.compile is compiled and f" {2 / speed:.2f} times " in choices.why[1]


def test_threads_are_set_and_kept(tiny: ModuleType) -> None:
    assert decide(tiny, dtype="float32", compile=False).threads == torch.get_num_threads() == 1
    try:
        assert decide(tiny, dtype="float32", compile=False, threads=2).threads == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_utilisation_counts_operations(tiny: ModuleType) -> None:
    choices = Choices("float32", False, 1, 1e9, ("a", "b"))
    assert Choices.restore(asdict(choices)) == choices
    config = tiny.model().config
    assert utilisation(tiny.model(), 12, 100.0, choices) == training_flops(config, 12) * 100 / 1e9
    assert utilisation(torch.nn.Linear(1, 1), 12, 100.0, choices) is None


def test_rates_and_memory_are_plausible() -> None:
    assert 1e8 < REAL("float32", CPU) < 1e14
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_bytes(CPU) > block.nbytes
