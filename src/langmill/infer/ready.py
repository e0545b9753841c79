"""A model made ready to run where and as the settings say."""

from __future__ import annotations

from pathlib import Path

import torch

from langmill.common.errors import ModelError, SettingsError
from langmill.families import peft, vocabulary
from langmill.families.folder import Model, load, read_config
from langmill.families.hub import resolve
from langmill.text.tokenizer import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def ready(
    where: str,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    adapter: Path | None = None,
) -> tuple[Model, Tokenizer]:
    """The model and tokenizer at `where`, for use.

    dtype: float32, bfloat16, or auto: float32 on a CPU, where the 4 bits of a .gguf file stay as they are, and the
    file's own elsewhere. device: auto takes a GPU
    where there is one. threads: CPU threads of this process, None for torch's own choice. adapter: folder of a
    PEFT adapter to put onto the model; a tokenizer beside it takes the place of the model's.
    ModelError where the model has no tokenizer or the adapter is not one of its, SettingsError where the device
    is not there.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    place = find_device(device)
    if dtype != "auto":
        chosen = _DTYPES[dtype]
    else:
        chosen = torch.float32 if place.type == "cpu" else _stored(where)
    if adapter is None:
        model, tokenizer = load(where, chosen, place, keep=dtype == "auto" and place.type == "cpu")
    elif peft.is_adapter(adapter):
        model, tokenizer = peft.load_adapted(adapter, where, chosen, place)
    else:
        raise ModelError(f"{adapter} holds no {peft.CONFIG}: --adapter takes the folder of a PEFT adapter")
    if tokenizer is None:
        raise ModelError(vocabulary.missing(where))
    return model, tokenizer


def find_device(name: str) -> torch.device:
    """The device of that name; auto is the first of CUDA, MPS and CPU that is there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_there in there.items() if is_there))
    kind, _, number = name.partition(":")
    if kind not in there or (number and not number.isdigit()):
        raise SettingsError(f"device '{name}' is unknown: say auto, cpu, cuda, cuda:1 or mps")
    if not there[kind] or (kind == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        raise SettingsError(
            f"device '{name}' is not on this machine (or this torch was built without it): use cpu"
        )
    return torch.device(name)


def _stored(where: str) -> torch.dtype:
    """The number type that a model's files are in; bfloat16 where they are quantised or do not say."""
    path = resolve(where)
    if peft.is_adapter(path):
        path = resolve(peft.base_of(path))
    theirs = {} if path.suffix == ".gguf" else read_config(path / "config.json")
    return _DTYPES.get(str(theirs.get("dtype") or theirs.get("torch_dtype")), torch.bfloat16)
