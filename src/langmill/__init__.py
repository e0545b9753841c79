"""Langmill turns a folder of text into a private language model.

    import langmill
    model, tokenizer = langmill.load("folder")
    for piece in langmill.generate(model, tokenizer, "Once upon a time"):
        print(piece, end="")

The names below are looked up on first use, so that `import langmill` loads no torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "generate", "load", "pretrain", "save"]

if TYPE_CHECKING:
    from langmill.families.folder import load, save
    from langmill.infer.generate import generate
    from langmill.jobs.evaluate import run as evaluate
    from langmill.jobs.pretrain import run as pretrain

_PLACES = {
    "generate": ("langmill.infer.generate", "generate"),
    "load": ("langmill.families.folder", "load"),
    "pretrain": ("langmill.jobs.pretrain", "run"),
    "save": ("langmill.families.folder", "save"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'langmill' has no attribute '{name}'")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__


class _Evaluate(ModuleType):
    """The room `langmill.evaluate`, and the function of that name, as one object."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return importlib.import_module("langmill.jobs.evaluate").run(*arguments, **named)


importlib.import_module("langmill.evaluate").__class__ = _Evaluate
