from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from langmill.common.errors import CheckpointError
from langmill.common.files import read_json, write_json
from langmill.train import checkpoint
from langmill.train.optim import Optimizer


def save(tiny: ModuleType, folder: Path, kind: str = "llama", step: int = 7) -> tuple[Any, Optimizer]:
    model = tiny.model(kind, seed=3)
    optimizer = Optimizer(model, tiny.settings())
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step(0.01)
    checkpoint.save(folder, step, model, optimizer, {"note": "大雪 ثلج"})
    return model, optimizer


@pytest.mark.parametrize("kind", ["llama", "untied", "lstm"])
def test_all_comes_back(tiny: ModuleType, tmp_path: Path, kind: str) -> None:
    model, optimizer = save(tiny, tmp_path, kind)
    found = checkpoint.newest(tmp_path)
    assert found and found.state["note"] == "大雪 ثلج" and found.folder.name == "step-00000007"
    fresh = tiny.model(kind)
    other = Optimizer(fresh, tiny.settings())
    checkpoint.load(found, fresh, other)
    assert tiny.digest(fresh) == tiny.digest(model)
    assert all(torch.equal(value, optimizer.tensors()[name]) for name, value in other.tensors().items())
    names = set(load_file(found.folder / "model.safetensors"))
    assert names == {name for name, _ in model.named_parameters()}, "a tied matrix is written once"


def test_another_model_is_refused_by_name(tiny: ModuleType, tmp_path: Path) -> None:
    save(tiny, tmp_path)
    found = checkpoint.newest(tmp_path)
    assert found
    other = tiny.model("untied")
    with pytest.raises(CheckpointError, match=r"head\.weight is not in the checkpoint"):
        checkpoint.load(found, other, Optimizer(other, tiny.settings()))
    wide = tiny.model()
    wide.tokens.weight = torch.nn.Parameter(torch.zeros(51, 16))
    with pytest.raises(CheckpointError, match=r"tokens\.weight is \[50, 16\] and the model's \[51, 16\]"):
        checkpoint.load(found, wide, Optimizer(wide, tiny.settings()))
    assert not wide.tokens.weight.any(), "nothing was changed"


def test_a_newer_format_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    save(tiny, tmp_path)
    path = tmp_path / "step-00000007" / "state.json"
    state = read_json(path, "checkpoint", 1)
    write_json(path, {k: v for k, v in state.items() if k not in ("format", "version")}, "checkpoint", 2)
    with pytest.raises(CheckpointError, match="upgrade Langmill"):
        checkpoint.newest(tmp_path)


def test_what_was_cut_short_is_cleared(tiny: ModuleType, tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") is None
    (tmp_path / ".step-00000009.tmp").mkdir()
    (tmp_path / ".step-00000003.gone").mkdir()
    assert checkpoint.newest(tmp_path) is None and not list(tmp_path.iterdir())
    save(tiny, tmp_path)
    (tmp_path / "step-00000007/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or damaged"):
        checkpoint.newest(tmp_path)
    save(tiny, tmp_path)
    assert checkpoint.newest(tmp_path), "saving again replaces what was damaged"


def test_pruning(tiny: ModuleType, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tiny, tmp_path, step=step)
    checkpoint.prune(tmp_path, 2, 1)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["1", "3", "4"]
    checkpoint.prune(tmp_path, 1, None)
    assert [path.name[-1] for path in tmp_path.iterdir()] == ["4"]
