from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from langmill.common.errors import MissingExtra
from langmill.common.metrics import Metrics


def test_rows_are_json_lines_without_nan(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "run")
    assert metrics.rows() == []
    metrics.log(1, loss=2.5, note="é")
    metrics.log(2, loss=float("nan"), grad_norm=float("inf"), best=None)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == metrics.rows()
    assert metrics.rows()[1] == {"step": 2, "loss": None, "grad_norm": None, "best": None}


def test_a_resumed_run_forgets_what_it_will_write_again(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.log(step, loss=1 / step)
    whole = metrics.path.read_bytes()
    metrics.path.write_bytes(whole + b'{"step": 6, "lo')  # killed within a line
    assert len(metrics.rows()) == 5
    metrics.truncate(3)
    assert metrics.path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])


def test_tensorboard_files_hold_the_scalars(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = Metrics(tmp_path, tensorboard=True)
    metrics.log(3, loss=2.5, note="text", skipped=None)
    metrics.close()
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["tensors"] == ["loss"] and board.Tensors("loss")[0].step == 3


def test_a_missing_tensorboard_names_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(MissingExtra, match=r'pip install "langmill\[track\]"'):
        Metrics(tmp_path, tensorboard=True)
