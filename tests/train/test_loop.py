from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from langmill.common.errors import CheckpointError, Interrupted, SettingsError, TrainingError, UsageError
from langmill.train import checkpoint
from langmill.train.objectives import causal
from langmill.train.optim import Optimizer
from langmill.train.schedule import learning_rate
from langmill.train.step import tensors, train_step

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="sends signals, which Windows does not have")


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs between two runs of the same: time and memory."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clock = ("tokens_per_second", "mfu", "memory")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


@pytest.mark.parametrize("kind", ["llama", "lstm"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(tiny: ModuleType, tmp_path: Path, kind: str, optimizer: str) -> None:
    settings = {"max_steps": 150, "optimizer": optimizer, "learning_rate": 0.03, "log_every": 10}
    _, outcome = tiny.run(tmp_path, kind, settings=settings)
    assert outcome.loss < 0.6 * math.log(tiny.VOCAB)


def stop_at(last: int) -> Any:
    return lambda step, state: step == last


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"dtype": "bfloat16", "gradient_accumulation_steps": 2}),
        ("untied", {"optimizer": "muon", "schedule": "wsd", "gradient_checkpointing": True}),
        ("llama", {"dropout": 0.1, "gradient_checkpointing": True}),
        ("lstm", {}),
    ],
)
def test_a_resumed_run_ends_with_the_same_bytes(
    tiny: ModuleType, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    figure = iter([3.0, 2.0, 2.5, 2.6, 2.7] * 9)

    def validate(model: torch.nn.Module) -> dict[str, float]:
        assert not model.training
        return {"loss": next(figure)}

    whole, outcome = tiny.run(tmp_path / "whole", kind, settings=changes)
    for last in (5, 9, None):
        hooks = [stop_at(last)]
        half, _ = tiny.run(tmp_path / "half", kind, settings=changes, hooks=hooks, resume=True)
    assert tiny.digest(half) == tiny.digest(whole) != tiny.digest(tiny.model(kind))
    assert rows(tmp_path / "half") == rows(tmp_path / "whole")
    assert outcome.steps == 12
    validated, _ = tiny.run(tmp_path / "validated", kind, settings=changes, validate=validate)
    assert tiny.digest(validated) == tiny.digest(whole), "looking at held-out text changes nothing"


def test_a_compiled_run_resumes_with_the_same_bytes(tiny: ModuleType, tmp_path: Path) -> None:
    changes = {"compile": True, "max_steps": 4, "save_every": 2}
    whole, outcome = tiny.run(tmp_path / "whole", "shallow", settings=changes)
    if not outcome.choices.compile:
        pytest.skip(outcome.choices.why[1])
    tiny.run(tmp_path / "half", "shallow", settings=changes, hooks=[stop_at(2)])
    torch._dynamo.reset()
    half, _ = tiny.run(tmp_path / "half", "shallow", settings=changes, resume=True)
    assert tiny.digest(half) == tiny.digest(whole)


@POSIX
def test_three_kills_one_while_saving(tiny: ModuleType, tmp_path: Path) -> None:
    """kill -9 before the first checkpoint, within one, and between two."""
    folder = tmp_path / "killed"

    def start(**wish: Any) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(tiny.__file__), str(folder), json.dumps({"quiet": False, **wish})]
        return subprocess.run(words, capture_output=True, text=True)

    whole, _ = tiny.run(tmp_path / "whole")
    assert start(kill_at=2).returncode == -signal.SIGKILL
    second = start(kill_in_save=8, resume=True)
    assert second.returncode == -signal.SIGKILL and "no checkpoint yet: the run starts over" in second.stderr
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [".step-00000008.tmp", "step-00000004"], "killed in the middle of the second"
    third = start(kill_at=10, resume=True)
    assert third.returncode == -signal.SIGKILL and "going on after step 4 of 12" in third.stderr
    last = start(resume=True)
    assert "going on after step 8 of 12" in last.stderr
    assert last.stdout.split() == [tiny.digest(whole)], last.stderr
    assert rows(folder) == rows(tmp_path / "whole")


@POSIX
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_so(tiny: ModuleType, tmp_path: Path, number: int, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="after step 3 of 12, which is saved") as stop:
        tiny.run(tmp_path / "half", hooks=[lambda step, state: step == 3 and os.kill(os.getpid(), number)])
    assert stop.value.exit_code == code and signal.getsignal(number) is before
    half, _ = tiny.run(tmp_path / "half", resume=True)
    whole, _ = tiny.run(tmp_path / "whole")
    assert tiny.digest(half) == tiny.digest(whole)


@POSIX
def test_a_second_ctrl_c_quits_at_once(tiny: ModuleType, tmp_path: Path) -> None:
    def twice(step: int, state: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, hooks=[twice])
    assert not (tmp_path / "checkpoints").exists()


def full_disk_errors() -> list[Exception]:
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    return [OSError(errno.ENOSPC, "No space left on device"), SafetensorError(text)]


@pytest.mark.parametrize("error", full_disk_errors(), ids=["os", "safetensors"])
def test_a_full_disk_leaves_the_checkpoint_before_whole(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real = checkpoint.save_file

    def write(named: dict[str, torch.Tensor], path: Path) -> None:
        if "00000008" in str(path) and path.name.startswith("optimizer"):
            raise error
        real(named, path)

    monkeypatch.setattr(checkpoint, "save_file", write)
    with pytest.raises(TrainingError, match=r"disk of .* is full: .* step 8 needs .* MB"):
        tiny.run(tmp_path / "half")
    assert [path.name for path in (tmp_path / "half/checkpoints").iterdir()] == ["step-00000004"]
    monkeypatch.setattr(checkpoint, "save_file", real)
    half, _ = tiny.run(tmp_path / "half", resume=True)
    whole, _ = tiny.run(tmp_path / "whole")
    assert tiny.digest(half) == tiny.digest(whole)


def spoilt(calls: set[int], made: list[str], tiny: ModuleType) -> Any:
    """An objective whose loss is infinite at these calls; `made` gets the weights it met."""

    def objective(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(tiny.digest(model))
        loss, count = causal(model, batch)
        return loss * (math.inf if len(made) in calls else 1.0), count

    return objective


def test_a_loss_that_is_not_finite_stops_and_names_the_documents(tiny: ModuleType, tmp_path: Path) -> None:
    seen: list[str] = []
    objective = spoilt(set(range(7, 999)), seen, tiny)
    with pytest.raises(TrainingError, match="at step 7 the loss is .*documents: letter 7\\. Look") as error:
        tiny.run(tmp_path, objective=objective, name_of=lambda number: f"letter {number}")
    assert "train.non_finite=skip" in str(error.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_skipping_counts_and_gives_up_in_the_end(tiny: ModuleType, tmp_path: Path) -> None:
    seen: list[str] = []
    skip = {"non_finite": "skip", "max_steps": 20}
    _, outcome = tiny.run(tmp_path / "a", objective=spoilt({7, 8}, seen, tiny), settings=skip)
    assert outcome.skipped == 2 and outcome.steps == 20
    changed = [seen[i] != seen[i + 1] for i in range(4, len(seen) - 1)]
    assert changed == [True, True, False, False, *[True] * (len(changed) - 4)]
    with pytest.raises(TrainingError, match="10 steps in a row"):
        tiny.run(tmp_path / "b", objective=spoilt(set(range(7, 99)), [], tiny), settings=skip)


def test_dropout_is_for_transformers(tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"train\.dropout is for Transformers"):
        tiny.run(tmp_path / "lstm", "lstm", settings={"dropout": 0.1})
    plain, dropped = (tiny.run(tmp_path / str(p), "llama", settings={"dropout": p})[0] for p in (0.0, 0.1))
    assert tiny.digest(plain) != tiny.digest(dropped)


def test_another_run_is_not_resumed(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.run(tmp_path, hooks=[stop_at(5)])
    with pytest.raises(UsageError, match="--resume"):
        tiny.run(tmp_path)
    with pytest.raises(SettingsError, match=r"seed was 0 and is 1; train.beta2 was 0.95 and is 0.9\."):
        tiny.run(tmp_path, settings={"beta2": 0.9}, seed=1, resume=True)
    with pytest.raises(SettingsError, match="model.dim was None and is 16"):
        tiny.run(tmp_path, "lstm", resume=True)
    _, outcome = tiny.run(tmp_path, settings={"log_every": 1, "non_finite": "skip"}, resume=True)
    assert outcome.steps == 12


def test_a_damaged_checkpoint_is_passed_over(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = tiny.run(tmp_path)

    def damage(name: str, file: str) -> None:
        path = tmp_path / "checkpoints" / name / file
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    damage("step-00000012", "optimizer.safetensors")
    again, _ = tiny.run(tmp_path, resume=True, quiet=False)
    assert "is missing or damaged; going back to step-00000008" in capsys.readouterr().err
    assert tiny.digest(again) == tiny.digest(whole)
    for name in ("step-00000008", "step-00000012"):
        damage(name, "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-00000012.*step-00000008"):
        tiny.run(tmp_path, resume=True)


def test_the_last_and_the_best_are_kept(tiny: ModuleType, tmp_path: Path) -> None:
    figures = iter([math.nan, 2.0, 2.5, 2.6])
    validate = lambda model: {"loss": 9.0, "bits_per_byte": next(figures)}  # noqa: E731
    changes = {"eval_every": 3, "save_every": 2, "keep_last": 1}
    _, outcome = tiny.run(tmp_path, settings=changes, validate=validate)
    assert outcome.best == 2.0
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000012"]
    logged = {row["step"]: row["eval_bits_per_byte"] for row in rows(tmp_path) if "eval_loss" in row}
    assert logged == {3: None, 6: 2.0, 9: 2.5, 12: 2.6}


def test_an_epoch_ends_with_a_shorter_window(tiny: ModuleType, tmp_path: Path) -> None:
    """Ten rows are five micro-batches of two: steps of two, two and one, by tokens as ever."""
    settings = {"max_steps": None, "gradient_accumulation_steps": 2, "log_every": 1}
    made, outcome = tiny.run(tmp_path, settings=settings)
    assert outcome.steps == 3
    mine, batches = tiny.model(), tiny.Rows()
    given = tiny.settings(**settings)
    optimizer = Optimizer(mine, given)
    for step, many in enumerate((2, 2, 1)):
        micro = [tensors(next(batches), torch.device("cpu")) for _ in range(many)]
        rate = learning_rate(step, 3, given)
        done = train_step(mine, optimizer, causal, micro, learning_rate=rate, max_grad_norm=1.0)
        row = rows(tmp_path)[step]
        assert (row["loss"], row["grad_norm"], row["learning_rate"]) == (done.loss, done.grad_norm, rate)
    assert tiny.digest(mine) == tiny.digest(made)


def test_random_state_comes_back(tiny: ModuleType) -> None:
    saved = json.loads(json.dumps(checkpoint.random_state()))
    drawn = (torch.rand(3).tolist(), np.random.rand(3).tolist())
    checkpoint.restore_random(saved)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist()) == drawn


def test_data_that_ends_and_data_without_an_end(tiny: ModuleType, tmp_path: Path) -> None:
    class Five(tiny.Rows):  # type: ignore[name-defined, misc]
        def __next__(self) -> Any:
            if self.number == 5:
                raise StopIteration
            return super().__next__()

    _, outcome = tiny.run(tmp_path / "a", batches=Five(), settings={"gradient_accumulation_steps": 2})
    assert outcome.steps == 3 and (tmp_path / "a/checkpoints/step-00000003").is_dir()
    endless = tiny.Rows(rows_per_epoch=None)
    with pytest.raises(SettingsError, match=r"train\.max_steps must be given"):
        tiny.run(tmp_path / "b", batches=endless, settings={"max_steps": None})
