"""Other tools' model families: one file each, found by the model types that it names."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from langmill.common.errors import ModelError


def modules() -> dict[str, ModuleType]:
    """Every family file of this folder, by each `model_type` that it handles."""
    found: dict[str, ModuleType] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for model_type in getattr(module, "MODEL_TYPES", ()):
            found[model_type] = module
    return found


def family(model_type: object, where: object) -> ModuleType:
    """The file for one `model_type`; ModelError naming the known ones where there is none."""
    known = modules()
    if not isinstance(model_type, str) or model_type not in known:
        raise ModelError(
            f"{where}: model_type {model_type!r} is not supported; known are {', '.join(sorted(known))}"
        )
    return known[model_type]
