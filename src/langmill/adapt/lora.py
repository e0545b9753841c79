"""Low-rank adapters on a model: LoRA, DoRA, rsLoRA, and QLoRA on four-bit weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from langmill.common.errors import SettingsError
from langmill.common.settings import LoRASettings
from langmill.families.folder import Model
from langmill.families.peft import Place, places
from langmill.model.layers import GROUP, Int4Linear, LoRA
from langmill.model.replace import replace


def adapt(model: Model, settings: LoRASettings, seed: int, four_bit: bool = False) -> list[str]:
    """Freeze a model and put adapters on its linear layers, in place; the names of those.

    four_bit: the frozen linear layers are brought to 4 bits and the embedding to bfloat16 (Dettmers et al. 2023,
    arXiv:2305.14314, with groups of 32 in place of NF4). Raises SettingsError where no layer is of the kinds wanted.
    """
    for weight in model.parameters():
        weight.requires_grad_(False)
    if four_bit:
        quantise(model)
    wanted = {name for place in _chosen(places(model), settings.lora_targets) for name in place.ours}
    state = torch.get_rng_state()
    torch.manual_seed(seed)

    def make(name: str, layer: Any) -> LoRA:
        return LoRA(
            layer,
            settings.lora_r,
            settings.lora_alpha,
            settings.lora_dropout,
            settings.use_rslora,
            settings.use_dora,
        )

    names = replace(model, lambda name, layer: name in wanted, make)
    torch.set_rng_state(state)
    return names


def quantise(model: Model) -> None:
    """Bring the linear layers of the stack to 4 bits and the embedding to bfloat16; layers that do not divide stay."""

    def fits(name: str, layer: nn.Module) -> bool:
        return name.startswith("decoder.") and isinstance(layer, nn.Linear) and layer.in_features % GROUP == 0

    replace(model, fits, lambda name, layer: Int4Linear.of(layer))  # type: ignore[arg-type]
    model.tokens.weight.data = model.tokens.weight.data.bfloat16()
    for weight in model.parameters():  # while one weight lies in the mapped file, all of the file is held
        weight.data = weight.data.clone()


def _chosen(known: list[Place], targets: list[str]) -> list[Place]:
    """The places whose name, theirs or ours, ends with one of `targets`; all where none is named."""
    if not targets:
        return known
    found, unknown = [], set(targets)
    for place in known:
        names = {place.theirs.rpartition(".")[2], *(name.rpartition(".")[2] for name in place.ours)}
        if names & set(targets):
            found.append(place)
            unknown -= names
    if unknown:
        there = sorted({place.theirs.rpartition(".")[2] for place in known})
        raise SettingsError(f"lora_targets: no layer is called {min(unknown)}; there are {', '.join(there)}")
    return found
