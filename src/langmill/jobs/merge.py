"""`langmill merge`: an adapter and its model become one model."""

from __future__ import annotations

from pathlib import Path

import torch

from langmill.apps import sentence
from langmill.common.errors import ModelError
from langmill.common.files import claimed
from langmill.common.metrics import Report
from langmill.common.settings import MergeSettings
from langmill.families.folder import save
from langmill.families.hub import resolve
from langmill.families.peft import is_adapter, load_adapted, merge


def run(settings: MergeSettings, *, quiet: bool = False) -> Report:
    """Write a model folder with the adapter worked into its weights (float32). ModelError where it is no adapter."""
    folder: Path = resolve(settings.adapter)
    if not is_adapter(folder):
        raise ModelError(f"{settings.adapter} holds no adapter_config.json: give the folder of an adapter")
    with claimed(settings.out, force=settings.force, inputs=[settings.adapter, settings.base]):
        model, tokenizer = load_adapted(folder, settings.base, torch.float32, "cpu")
        layers = merge(model)
        save(model, tokenizer, settings.out)
        sentence.copy(sentence.folder_of(folder, settings.base), settings.out)
    words = (
        f'{settings.out}: {len(layers)} layers merged\nnext: langmill generate {settings.out} --chat "Hello"'
    )
    return Report(settings.out, counts={"layers": len(layers)}, text=words)
