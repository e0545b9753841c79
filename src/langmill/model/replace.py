"""Swap layers of a model for others, by name: how techniques enter without editing the Transformer."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace(
    model: nn.Module, want: Callable[[str, nn.Module], bool], make: Callable[[str, nn.Module], nn.Module]
) -> list[str]:
    """Put `make(name, layer)` in the place of every layer for which `want(name, layer)` holds; the names of those.

    Names are those of `named_modules`. What was put in is not looked into again.
    """
    names = [name for name, layer in model.named_modules() if name and want(name, layer)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make(name, model.get_submodule(name)))
    return names
