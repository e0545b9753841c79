"""Adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors, read and written.

A family that keeps several of our layers in one tensor (GPT-2's c_attn) has one adapter for them there: reading, each
of ours gets the shared A and its rows of B; writing, the A's are stacked and the B's stand block by block, so that the
rank grows by the number of layers and the change stays the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from langmill.common.errors import ModelError
from langmill.families.folder import Model, check_match, check_names, export_config, load, read_config
from langmill.model.layers import Int4Linear, Int8Linear, LoRA
from langmill.model.replace import replace
from langmill.text.tokenizer import Tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST_RANK = 8192
# Kinds of adapter that change more than W by a low rank, and what their absence looks like.
_NEUTRAL: Mapping[str, Any] = {
    "bias": "none", "modules_to_save": None, "layer_replication": None, "use_qalora": False, "use_bdlora": None,
    "alora_invocation_tokens": None, "arrow_config": None, "trainable_token_indices": None, "target_parameters": None,
    "lora_bias": False, "velora_config": None,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A linear layer of theirs, and those of ours that lie in it one after another."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool


def places(model: Model) -> list[Place]:
    """Where adapters can stand: the linear layers of the stack, by both names."""
    kind = export_config(model.config)[1]
    linear = {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Int4Linear | Int8Linear | LoRA)
    }
    found = []
    for r in kind.rules(model.config):
        if r.theirs.endswith(".weight"):
            ours = tuple(name.removesuffix(".weight") for name in r.ours)
            if linear.issuperset(ours) and "head" not in ours:
                found.append(Place(r.theirs.removesuffix(".weight"), ours, r.transposed))
    return found


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter in place of a model."""
    return (Path(folder) / CONFIG).is_file()


def base_of(folder: str | Path) -> str:
    """The model that an adapter was made for: as it names it, seen from here or from the adapter's own place."""
    path = Path(folder)
    name = read_config(path / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"{path / CONFIG} does not name the model that the adapter belongs to: give it by --base"
        )
    beside = path.parent / name
    return str(beside) if beside.exists() and not Path(name).expanduser().exists() else name


def load_adapted(
    folder: Path, base: str | None, dtype: torch.dtype, device: str | torch.device
) -> tuple[Model, Tokenizer | None]:
    """An adapter on its model, `base` or the one that it names, with the adapter's own tokenizer where it has one."""
    named = base or base_of(folder)
    if Path(named).is_dir() and is_adapter(named):
        raise ModelError(f"{folder}: its model {named} is an adapter itself: merge that one first")
    try:
        model, tokenizer = load(named, dtype, device)
    except ModelError as reason:
        raise ModelError(f"{folder} is an adapter for {named}: {reason}") from reason
    load_adapter(model, folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(folder)
        check_match(model.config, tokenizer, folder)
    return model.to(device), tokenizer


def write_adapter(model: Model, folder: Path, base: str | None, dropout: float = 0.0) -> None:
    """Write the LoRA layers of a model into a folder as a PEFT adapter; `base`: the model's name, as others find it."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    first: LoRA | None = None
    transposed = False
    for place in places(model):
        layers = [model.get_submodule(name) for name in place.ours]
        if not any(isinstance(layer, LoRA) for layer in layers):
            continue
        ours = [layer for layer in layers if isinstance(layer, LoRA)]
        if len(ours) != len(layers):
            raise ModelError(
                f"{place.theirs} is one layer to other tools, so adapt all of {', '.join(place.ours)}"
            )
        first = first or ours[0]
        transposed |= place.transposed
        key = f"{PREFIX}{place.theirs}."
        tensors[f"{key}lora_A.weight"] = torch.cat([layer.a for layer in ours])
        tensors[f"{key}lora_B.weight"] = torch.block_diag(*[layer.b for layer in ours])
        if ours[0].m is not None:
            tensors[f"{key}lora_magnitude_vector"] = torch.cat(
                [layer.m for layer in ours if layer.m is not None]
            )
        rank = len(tensors[f"{key}lora_A.weight"])
        alpha = ours[0].scale * (rank**0.5 if ours[0].rslora else rank)
        ranks[place.theirs] = (rank, alpha)
    if first is None:
        raise ModelError("this model has no adapter to save")
    usual = (first.rank, first.alpha)
    other = {name: pair for name, pair in ranks.items() if pair != usual}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": usual[0], "lora_alpha": _plain(usual[1]), "lora_dropout": dropout, "bias": "none",
        "target_modules": sorted(ranks), "use_rslora": first.rslora, "use_dora": first.m is not None,
        "fan_in_fan_out": transposed, "init_lora_weights": True, "modules_to_save": None,
        "rank_pattern": {name: pair[0] for name, pair in other.items()},
        "alpha_pattern": {name: _plain(pair[1]) for name, pair in other.items()},
    }  # fmt: skip
    save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: Model, folder: str | Path) -> None:
    """Put the adapter of `folder` onto a model, in place.

    Raises ModelError naming the file and the tensor where the adapter is of another kind, was made for another model,
    or is damaged; the model is as it was then.
    """
    made = _layers(model, folder)
    replace(model, lambda name, layer: name in made, lambda name, layer: made[name])


@dataclass(frozen=True)
class LowRank:
    """What an adapter makes of a layer W x + c, in float32: d (W x + B A x) + c. b_OR holds the adapter's scale;
    lengths_O is d, None where all are 1. O outputs, I inputs, R rank."""

    a_RI: Tensor
    b_OR: Tensor
    lengths_O: Tensor | None


@torch.no_grad()
def low_ranks(model: Model, folder: str | Path) -> dict[str, LowRank]:
    """The adapter of `folder` by the names of the model's layers, which stay as they are. Raises as `load_adapter`."""
    found = {}
    for name, layer in _layers(model, folder).items():
        b_OR, lengths_O = layer.scale * layer.b.float(), None
        if layer.m is not None:
            whole_OI = layer.base.weight.float().addmm(b_OR, layer.a.float())
            lengths_O = layer.m.float() / whole_OI.norm(dim=1)
        found[name] = LowRank(layer.a.detach().float(), b_OR, lengths_O)
    return found


def _layers(model: Model, folder: str | Path) -> dict[str, LoRA]:
    """The LoRA layers of an adapter by the names of those that they stand on, which are not replaced yet."""
    path = Path(folder)
    if next(adapters(model), None):
        raise ModelError(f"{path}: this model has an adapter already: merge it first")
    config = _config(path)
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            check_names(path / WEIGHTS)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise ModelError(f"{path} has no {WEIGHTS}") from None
    except (SafetensorError, OSError) as reason:
        raise ModelError(f"{path / WEIGHTS} cannot be read, cut short perhaps: {reason}") from None
    there, made = places(model), dict[str, LoRA]()
    tensors = _whole_names(tensors, there)
    for place in there:
        made |= _adapted(model, place, config, tensors, path)
    if tensors:
        words = [name for name in sorted(tensors) if ".lora_embedding_" in name or ".lm_head." in name]
        if words:
            raise ModelError(
                f"{path}: tensor {words[0]} changes the model's words, and only adapters of the stack's linear layers "
                "are supported"
            )
        raise ModelError(
            f"{path}: tensor {min(tensors)} belongs to no layer of this model; was it made for another one?"
        )
    if not made:
        raise ModelError(f"{path / WEIGHTS} holds no adapter")
    return made


def _whole_names(tensors: dict[str, Tensor], there: Sequence[Place]) -> dict[str, Tensor]:
    """The tensors of an adapter by their full names: made on a model without its head (transformers' AutoModel) it
    leaves out the name that all layers share, `bert` or `model`."""
    shared = {place.theirs.split(".", 1)[0] for place in there}
    first = f"{PREFIX}{min(shared, default='')}."
    if len(shared) != 1 or any(name.startswith(first) for name in tensors):
        return tensors
    return {first + name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _config(path: Path) -> dict[str, Any]:
    config = read_config(path / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path / CONFIG}: peft_type is {config.get('peft_type')!r}; LORA is supported")
    for key, neutral in _NEUTRAL.items():
        if config.get(key, neutral) not in (neutral, None, [], {}):
            raise ModelError(f"{path / CONFIG}: {key} = {config[key]!r} is not supported")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ModelError(f"{path / CONFIG}: {key} is no mapping of layers to numbers")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ModelError(f"{path / CONFIG}: lora_dropout is {dropout!r:.40}; a share below 1 is needed")
    return config


def _adapted(
    model: Model, place: Place, config: Mapping[str, Any], tensors: dict[str, Tensor], path: Path
) -> dict[str, LoRA]:
    """The LoRA layers of one place; what is used is taken out of `tensors`."""
    key, named = f"{PREFIX}{place.theirs}.", config.get("target_modules")
    a, b = tensors.pop(f"{key}lora_A.weight", None), tensors.pop(f"{key}lora_B.weight", None)
    m = tensors.pop(f"{key}lora_magnitude_vector", None)
    if a is None and b is None and m is None:
        return {}
    layers = [model.get_submodule(name) for name in place.ours]
    outputs, inputs = [int(layer.out_features) for layer in layers], int(layers[0].in_features)  # type: ignore[arg-type]
    if a is None or b is None or (m is None) == bool(config.get("use_dora")):
        raise ModelError(f"{path}: the adapter of {place.theirs} is not whole")
    if isinstance(named, list) and not any(_ends(place.theirs, name) for name in named):  # text is a pattern
        raise ModelError(
            f"{path}: it adapts {place.theirs}, which target_modules in its {CONFIG} does not name"
        )
    rank, alpha = _pattern(config, place.theirs, "rank_pattern", "r"), _pattern(
        config, place.theirs, "alpha_pattern", "lora_alpha"
    )  # fmt: skip
    expected = {
        "lora_A": (rank, inputs),
        "lora_B": (sum(outputs), rank),
        "lora_magnitude_vector": (sum(outputs),),
    }
    for name, tensor in (("lora_A", a), ("lora_B", b), ("lora_magnitude_vector", m)):
        if tensor is not None and not tensor.is_floating_point():
            raise ModelError(
                f"{path}: {place.theirs}.{name} is {tensor.dtype}, and an adapter's numbers are floats"
            )
        if tensor is not None and tuple(tensor.shape) != expected[name]:
            raise ModelError(
                f"{path}: {place.theirs}.{name} is {tuple(tensor.shape)} and this model needs {expected[name]}: "
                "the adapter is of another model or another rank"
            )
    parts = b.split(outputs)
    lengths: Sequence[Tensor | None] = [None] * len(parts) if m is None else m.split(outputs)
    return {
        name: _layer(layer, a, part, length, alpha, config)
        for name, layer, part, length in zip(place.ours, layers, parts, lengths, strict=True)
    }


def _layer(
    layer: Any, a: Tensor, b: Tensor, m: Tensor | None, alpha: float, config: Mapping[str, Any]
) -> LoRA:
    made = LoRA(
        layer,
        len(a),
        alpha,
        float(config.get("lora_dropout") or 0.0),
        bool(config.get("use_rslora")),
        m is not None,
    )
    with torch.no_grad():
        made.a.copy_(a)
        made.b.copy_(b)
        if made.m is not None and m is not None:
            made.m.copy_(m)
    return made.train(layer.training)


def _pattern(config: Mapping[str, Any], name: str, pattern: str, usual: str) -> Any:
    """A layer's own rank or alpha: the first pattern that ends its name, as PEFT matches them, or the usual one."""
    given = config.get(pattern) or {}
    value = next((v for k, v in given.items() if _ends(name, k)), config.get(usual))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST_RANK:
        raise ModelError(
            f"{CONFIG}: {usual} is {value!r:.40}; a number above 0, at most {LARGEST_RANK}, is needed"
        )
    return value


def _ends(name: str, part: object) -> bool:
    return name == part or name.endswith(f".{part}")


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def merge(model: Model) -> list[str]:
    """Work the adapters into the layers they stand on, in place; the names of those layers."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, LoRA)]
    if not names:
        raise ModelError("this model has no adapter to merge")
    replace(model, lambda name, layer: isinstance(layer, LoRA), lambda name, layer: _plain_layer(layer))
    return names


def check_plain(model: Model, where: object) -> None:
    """Raise where a model that is to be trained is an adapter on another: its weights are not its own."""
    if next(adapters(model), None):
        raise ModelError(
            f"{where} is an adapter: `langmill merge {where} --out MODEL` makes a model of it first"
        )


def _plain_layer(layer: Any) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    made.weight = nn.Parameter(layer.weight.detach().clone())
    if layer.bias is not None:
        made.bias = layer.bias
    return made.train(layer.training)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRA]]:
    """The LoRA layers of a model by name."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRA))
