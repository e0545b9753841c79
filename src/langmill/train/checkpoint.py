"""Checkpoints: what a run needs to go on exactly, in folders that are whole or not there.

    checkpoints/step-00000100/
        model.safetensors       trained weights by name, a shared one once
        optimizer.safetensors   state by weight's name: see Optimizer.tensors
        state.json              everything else, and the SHA-256 of the two files; written last

A folder is filled under a hidden name, flushed to the disk and renamed, so a kill or a full disk leaves
the checkpoints before it whole. What does not match its sums is never loaded.
"""

from __future__ import annotations

import base64
import errno
import json
import platform
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from langmill.common.errors import CheckpointError, SettingsError, TrainingError
from langmill.common.files import atomic_folder, free_bytes, read_json, sha256, write_json
from langmill.common.settings import LoopSettings
from langmill.train.optim import Optimizer

FORMAT, VERSION = "checkpoint", 1
_FILES = ("model.safetensors", "optimizer.safetensors")
# Settings that may differ when a run is resumed: no weight depends on them while all is finite.
_FREE = {"save_every", "eval_every", "keep_last", "log_every", "non_finite", "device"}


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, and what state.json holds."""

    folder: Path
    state: dict[str, Any]


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> Path:
    """Write `folder`/step-…; `state` must be JSON. TrainingError where the disk is full."""
    path = folder / f"step-{step:08}"
    contents = (weights(model), optimizer.tensors())
    try:
        with atomic_folder(path, replace=True) as fresh:
            for name, named in zip(_FILES, contents, strict=True):
                save_file(
                    {key: value.detach().cpu().contiguous() for key, value in named.items()}, fresh / name
                )
            sums = {name: sha256(fresh / name) for name in _FILES}
            write_json(fresh / "state.json", {**state, "files": sums}, FORMAT, VERSION)
    except (OSError, SafetensorError) as reason:
        if not _disk_full(reason):
            raise
        needed = sum(value.nbytes for named in contents for value in named.values())
        raise TrainingError(
            f"the disk of {folder} is full: the checkpoint of step {step} needs {needed / 1e6:,.0f} MB and "
            f"{free_bytes(folder) / 1e6:,.0f} MB are free. Earlier checkpoints are whole: make room, then --resume"
        ) from reason
    return path


def newest(folder: Path, say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
    """The newest whole checkpoint, or None where none was ever finished.

    Clears away what a killed run left half-written. A damaged checkpoint is reported through `say` and
    removed once an older whole one is found; CheckpointError where all are damaged.
    """
    for torn in folder.glob(".step-*"):
        shutil.rmtree(torn)
    damaged: list[tuple[Path, CheckpointError]] = []
    for path in _finished(folder):
        try:
            found = Checkpoint(path, _read(path))
        except CheckpointError as reason:
            damaged.append((path, reason))
            continue
        for bad, why in damaged:
            say(f"{why}; going back to {path.name}")
            shutil.rmtree(bad)
        return found
    if damaged:
        raise CheckpointError(f"no checkpoint is whole: {'; '.join(str(why) for _, why in damaged)}")
    return None


def _finished(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _read(path: Path) -> dict[str, Any]:
    state = read_json(path / "state.json", FORMAT, VERSION, CheckpointError)
    for name, expected in state["files"].items():
        if not (path / name).is_file() or sha256(path / name) != expected:
            raise CheckpointError(f"{path / name} is missing or damaged")
    return state


def load(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Fill a model and its optimizer, in place. CheckpointError names a tensor that does not fit."""
    _fill(checkpoint, model)
    optimizer.load(load_file(checkpoint.folder / _FILES[1]))


def load_step(folder: Path, step: int, model: nn.Module) -> None:
    """Give a model the weights that it had after `step`, whose checkpoint must be there and whole."""
    path = folder / f"step-{step:08}"
    _fill(Checkpoint(path, _read(path)), model)


def _fill(checkpoint: Checkpoint, model: nn.Module) -> None:
    saved, mine = load_file(checkpoint.folder / _FILES[0]), weights(model)
    for name in sorted(saved.keys() ^ mine.keys()):
        where = "this model" if name in saved else "the checkpoint"
        raise CheckpointError(f"{checkpoint.folder.name}: {name} is not in {where}")
    for name, tensor in mine.items():
        if saved[name].shape != tensor.shape:
            raise CheckpointError(
                f"{checkpoint.folder.name}: {name} is {list(saved[name].shape)} and the model's {list(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(saved[name])


def prune(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Remove all but the last `keep_last` checkpoints and that of `best_step`."""
    for path in _finished(folder)[keep_last:]:
        if path.name != f"step-{best_step or 0:08}":
            gone = path.with_name(f".{path.name}.gone")  # hidden first: a kill leaves nothing half-removed
            path.replace(gone)
            shutil.rmtree(gone)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's trained weights by name; one that is shared appears once, under its first name.

    What is frozen (all but the adapters, where there are some) is what the run was started on, and not kept.
    """
    named = model.named_parameters()  # names a shared one once
    return {name: weight for name, weight in named if weight.requires_grad}


def identity(settings: LoopSettings, model: nn.Module, seed: int) -> dict[str, Any]:
    """All that decides the final weights and could be changed between two starts, by its name, as JSON."""
    named = {f"train.{name}": value for name, value in settings.model_dump(exclude=_FREE).items()}
    config = getattr(model, "config", None)
    if is_dataclass(config) and not isinstance(config, type):
        named |= {f"model.{name}": value for name, value in asdict(config).items()}
    plain: dict[str, Any] = json.loads(json.dumps({**named, "seed": seed}, default=sorted))  # sets as lists
    return plain


def check_identity(checkpoint: Checkpoint, mine: Mapping[str, Any]) -> None:
    """SettingsError, naming what differs, where a checkpoint belongs to another run than `mine`."""
    theirs = checkpoint.state["identity"]
    changed = [
        f"{name} was {theirs.get(name)} and is {mine.get(name)}"
        for name in sorted(theirs.keys() | mine.keys())
        if theirs.get(name) != mine.get(name)
    ]
    if changed:
        raise SettingsError(
            f"{checkpoint.folder} is of a run with other settings: {'; '.join(changed)}. Resume with the same "
            "settings, or start a new run (--from goes on with a model's weights)"
        )


def versions() -> dict[str, str]:
    """What the last bits depend on, beside the number of threads."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "machine": platform.machine(), "instructions": capability}


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators, as JSON."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    torch_states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": [base64.b64encode(state.numpy().tobytes()).decode("ascii") for state in torch_states],
    }


def restore_random(state: Mapping[str, Any]) -> None:
    """Put the generators where `random_state` found them."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    cpu, *cuda = (
        torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for text in state["torch"]
    )
    torch.set_rng_state(cpu)
    for device, saved in enumerate(cuda[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(saved, device)


def _disk_full(reason: Exception) -> bool:
    if isinstance(reason, OSError):
        return reason.errno in (errno.ENOSPC, errno.EDQUOT) or getattr(reason, "winerror", None) == 112
    return any(f"os error {number}" in str(reason) for number in (errno.ENOSPC, errno.EDQUOT, 112))
