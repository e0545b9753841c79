"""A model as a GGUF file that llama.cpp and Ollama run: what gguf.py reads, by the same tables, the other way.

Tensors are made and written one by one, so that beside the model no more than one of them is in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from langmill.common.errors import ModelError
from langmill.families import family
from langmill.families.folder import Model, check_match, export_config
from langmill.families.gguf import FACTORS, NAMES
from langmill.families.gguf_container import Slot, write
from langmill.families.gguf_file import read
from langmill.families.gguf_pack import (
    BLOCK,
    FLOATS,
    Rows,
    form,
    half_steps,
    narrowest,
    packed,
    repacked,
    unpacked,
)
from langmill.families.gguf_write_tokenizer import entries
from langmill.model.config import Learned, ModelConfig, Rope, StackConfig
from langmill.model.positions import rotary
from langmill.text.tokenizer import Tokenizer

SUPPORTED = "llama, mistral, qwen2, qwen3 and gpt2 models that write"
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}  # llama.cpp's numbers
_WHOLE = ("position_embd",)  # added to float32 vectors as they stand


@dataclass(frozen=True)
class Piece:
    """One tensor of the file.

    ours: the tensors of ours that it holds, one after another along the outputs. shape: outermost first. heads: its
    rows are paired for llama.cpp's rotation over so many heads, 0 for as they are.
    """

    name: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    heads: int = 0


def save_gguf(
    model: Model,
    tokenizer: Tokenizer | None,
    path: Path,
    kind: str | None = None,
    head: str | None = None,
    name: str = "model",
    settle: bool = False,
) -> list[Piece]:
    """Write a .gguf file; what each of its tensors is.

    kind: the matrices' type, one of gguf_pack.TYPES; None: as the layers are quantised, else the float of two bytes
    that holds them. head: the type of the embedding and the output layer; None: `kind`, and Q8_0 beside four bits.
    Vectors and learned positions stay F32; a matrix whose rows are no whole blocks of 32 becomes F16, a quantised one
    F32. settle: give the model the numbers that were written, in place, so that it computes what a reader of the file
    does. The file appears whole or not at all. ModelError where the format cannot say what the model is; MissingExtra
    without `gguf`.
    """
    arch = architecture(model)
    assert isinstance(model.config, ModelConfig)
    found = pieces(model, kind, head)
    metadata = described(model.config, arch) | {"general.name": name, "general.quantization_version": 2}
    metadata["general.file_type"] = _FILE_TYPES[_common(found)]
    if tokenizer is None:
        metadata["tokenizer.ggml.model"] = "none"
    else:
        check_match(model.config, tokenizer, path)
        metadata |= entries(tokenizer, model.config.vocab)
    extra = _divisors(model.config.main)
    slots = [Slot(key, numbers.shape, "F32") for key, numbers in extra.items()]
    slots += [Slot(piece.name, piece.shape, piece.kind) for piece in found]
    data: Iterator[NDArray[Any]] = chain(extra.values(), (content(model, piece, settle) for piece in found))
    write(path, metadata, slots, data)
    return found


def architecture(model: Model) -> str:
    """llama.cpp's name for the kind of model. ModelError where it has none, or the format cannot say the shape."""
    c = model.config
    kind = export_config(c)[0]["model_type"] if isinstance(c, ModelConfig) and c.writes else None
    arch = "llama" if kind == "mistral" else kind
    if arch not in NAMES or not isinstance(c, ModelConfig):
        raise ModelError(f"GGUF is written for {SUPPORTED}; take --to hf for this one")
    d, cannot = c.main, None
    usual = "gelu_tanh" if arch == "gpt2" else "silu"
    if d.activation != usual:
        cannot = f"the activation {d.activation} (llama.cpp computes {usual} in {arch})"
    elif d.scale is not None:
        cannot = f"attention scaled by {d.scale}"
    elif len(set(d.window)) > 1:
        cannot = "windows that differ from layer to layer"
    elif arch == "qwen3" and d.bias:
        cannot = "biases in qwen3's attention"
    elif isinstance(d.position, Rope) and d.position.scaling is not None:
        s = d.position.scaling
        if s.kind == "dynamic" or (s.kind == "llama3" and arch != "llama"):
            cannot = f"{s.kind} scaling of rotary positions in {arch}"
        elif s.kind == "yarn" and not s.truncate:
            cannot = "yarn without whole dimensions (truncate: false)"
    if cannot:
        raise ModelError(f"GGUF cannot say {cannot}: take --to hf for this model")
    return str(arch)


def pieces(model: Model, kind: str | None, head: str | None) -> list[Piece]:
    """The tensors of the file in order, each with its type. Arguments and errors as save_gguf's."""
    arch = architecture(model)
    rules = family(export_config(model.config)[0]["model_type"], "config").rules(model.config)
    _check_covered(model, {name for r in rules for name in r.ours})
    forms = [found for layer in model.modules() if (found := form(layer))]
    usual = kind or (max(set(forms), key=forms.count) if forms else narrowest(model))
    floats = kind or narrowest(model)  # of matrices that are plain: nothing is rounded that was not asked for
    ends = head or (usual if usual in FLOATS or usual == "Q8_0" else "Q8_0")
    made = []
    for r in rules:
        name = _rename(r.theirs, arch)
        first = _weight(model, r.ours[0])
        shape = (sum(_weight(model, own).shape[0] for own in r.ours), *first.shape[1:])
        asked, given = (head, ends) if r.ours[0] in ("tokens.weight", "head.weight") else (kind, floats)
        stem = name.split(".")[-2]
        if len(shape) == 1 or stem in _WHOLE:
            asked = given = "F32"
        layers = [model.get_submodule(own.rpartition(".")[0]) for own in r.ours]
        d = model.config.main  # type: ignore[union-attr]
        heads = {"attn_q": d.heads, "attn_k": d.kv_heads}.get(stem, 0) if arch == "llama" else 0
        made.append(Piece(name, r.ours, shape, _kind(layers, shape, asked, given, name), heads))
    return made


def _kind(layers: list[nn.Module], shape: tuple[int, ...], asked: str | None, given: str, name: str) -> str:
    """The type of one tensor: what was asked for, where the rows are blocks and nothing would be quantised twice."""
    whole = shape[-1] % BLOCK == 0 or given in FLOATS
    forms = {form(layer) for layer in layers} if len(shape) > 1 else {None}
    if forms == {None}:
        return given if whole else "F16"
    own = forms.pop() if len(forms) == 1 and shape[-1] % BLOCK == 0 else None
    if asked is None:
        return own or "F32"
    if asked not in FLOATS and asked != own:
        kept = f"quantised to {own}" if own else "quantised in a way that its blocks cannot hold"
        raise ModelError(
            f"{name} is {kept}, and {asked} would round it once more: leave --type out, or quantise the model that it "
            "was made of"
        )
    return asked


def described(c: ModelConfig, arch: str) -> dict[str, Any]:
    """The shape as metadata: what `configuration` of gguf.py reads."""
    d = c.main
    found: dict[str, Any] = {
        "vocab_size": c.vocab, "context_length": c.length, "embedding_length": d.dim, "block_count": d.layers,
        "feed_forward_length": d.hidden, "attention.head_count": d.heads,
    }  # fmt: skip
    if isinstance(d.position, Learned):
        found["attention.layer_norm_epsilon"] = d.norm_eps
    else:
        found |= {
            "attention.head_count_kv": d.kv_heads, "attention.layer_norm_rms_epsilon": d.norm_eps,
            "attention.key_length": d.head_dim, "attention.value_length": d.head_dim,
            "rope.dimension_count": d.head_dim,
        }  # fmt: skip
    if d.window and d.window[0] is not None and d.window[0] < c.length:
        found["attention.sliding_window"] = d.window[0]
    if isinstance(d.position, Rope):
        found |= _rope(d.position)
    return {
        "general.architecture": arch,
        "general.type": "model",
        **{f"{arch}.{key}": value for key, value in found.items()},
    }


def _rope(rope: Rope) -> dict[str, Any]:
    s, found = rope.scaling, {"rope.freq_base": float(rope.base)}
    if s is None:
        return found
    more: dict[str, Any] = {"original_context_length": s.original_length}
    if s.kind != "llama3":
        more |= {"type": s.kind, "factor": float(s.factor)}
    if s.kind == "yarn":
        usual = 0.1 * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0
        cos, _ = rotary(torch.zeros(1, 1), rope, 2)  # at position 0, what attention is scaled by
        more |= {"yarn_beta_fast": float(s.beta_fast), "yarn_beta_slow": float(s.beta_slow)}
        if not math.isclose(factor := cos.flatten()[0].item() / usual, 1.0, rel_tol=1e-6):
            more["attn_factor"] = factor
    return found | {f"rope.scaling.{key}": value for key, value in more.items()}


def _divisors(d: StackConfig) -> dict[str, NDArray[np.float32]]:
    """What llama.cpp divides each rotary frequency by for Llama 3's scaling; see `_llama3` of gguf.py."""
    s = d.position.scaling if isinstance(d.position, Rope) else None
    if s is None or s.kind != "llama3" or not isinstance(d.position, Rope):
        return {}
    count = d.head_dim // 2
    turns = d.position.base ** (-np.arange(count) / count) / (2 * math.pi)  # 1 / wavelength
    ramp = np.clip(
        (s.original_length * turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1
    )
    return {FACTORS: (1 / ((1 - ramp) / s.factor + ramp)).astype(np.float32)}


def content(model: Model, piece: Piece, settle: bool = False) -> Rows:
    """One tensor as the bytes of its rows, (O, bytes); settle: as in save_gguf."""
    parts = []
    for own in piece.ours:
        layer = model.get_submodule(own.rpartition(".")[0])
        plain = _weight(model, own)
        matrix = plain[:, None] if plain.dim() == 1 else plain
        kept = plain.dim() > 1 and form(layer) == piece.kind
        rows = repacked(layer) if kept else packed(matrix, piece.kind, piece.name)
        if settle:
            _settle(model, own, unpacked(rows, piece.kind, matrix.shape[1]).reshape(plain.shape), kept)
        parts.append(rows)
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return np.ascontiguousarray(paired(joined, piece.heads) if piece.heads else joined)


def paired(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of llama's queries and keys, i beside i + d/2: the inverse of gguf.py's `half_split`."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def differing(model: Model, path: Path, found: list[Piece]) -> str | None:
    """The first tensor of a file whose numbers are not those of the model, which `settle` made equal; None: none."""
    file = read(path)
    for piece in found:
        weight = torch.cat([_weight(model, own).detach().float() for own in piece.ours]).numpy()
        expected = paired(weight, piece.heads) if piece.heads else weight
        info = file.tensors.get(piece.name)
        if info is None or info.shape != expected.shape or file.type_name(piece.name) != piece.kind:
            return piece.name
        if not np.array_equal(file.dequantize(piece.name), expected):
            return piece.name
    return None


def _settle(model: Model, own: str, value: Tensor, kept: bool) -> None:
    """Give one of the model's tensors the numbers that were written."""
    where, _, leaf = own.rpartition(".")
    layer: Any = model.get_submodule(where)
    if kept:
        if form(layer) == "Q8_0":
            layer.steps = half_steps(layer).to(layer.steps.dtype).reshape(layer.steps.shape)
        return
    weight = getattr(layer, leaf)
    if isinstance(weight, nn.Parameter):
        weight.data = value.to(weight.dtype)
        return
    made: Any
    if where == "tokens":
        made = nn.Embedding(value.shape[0], value.shape[1], device="meta")
    else:
        made = nn.Linear(value.shape[1], value.shape[0], bias=layer.bias is not None, device="meta")
        made.bias = layer.bias
    made.weight = nn.Parameter(value)
    model.set_submodule(where, made.train(layer.training))


def _weight(model: Model, own: str) -> Tensor:
    """One of our tensors by name; of a quantised or an adapted layer, what it computes with."""
    where, _, leaf = own.rpartition(".")
    weight: Tensor = getattr(model.get_submodule(where), leaf)
    return weight


def _check_covered(model: Model, ours: set[str]) -> None:
    """Every tensor of the model must have a place in the file, those inside of replaced layers by their layer."""
    homes = {name.rpartition(".")[0] for name in ours if name.endswith(".weight")}
    for name in model.state_dict():
        layer = name.rpartition(".")[0]
        inside = any(layer == home or layer.startswith(f"{home}.") for home in homes)
        plain = name.endswith((".weight", ".bias")) and ".base." not in name
        if name not in ours and (plain or not inside):
            raise ModelError(
                f"{name} has no place in a GGUF file; merge or remove what was added to the model"
            )


def _rename(theirs: str, arch: str) -> str:
    """llama.cpp's name of a tensor of the Hugging Face folder: the table of gguf.py from right to left."""
    stem, _, part = theirs.rpartition(".")
    for gguf, pattern in NAMES[arch].items():
        match = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), stem)
        if match:
            return f"blk.{match[1]}.{gguf}.{part}" if match.groups() else f"{gguf}.{part}"
    raise ModelError(f"{theirs} has no name in a GGUF file of {arch} models")


def _common(found: list[Piece]) -> str:
    """The type that most of the matrices' numbers have."""
    sizes: dict[str, int] = {}
    for piece in found:
        if len(piece.shape) > 1 and piece.name.startswith("blk."):
            sizes[piece.kind] = sizes.get(piece.kind, 0) + math.prod(piece.shape)
    return max(sizes, key=lambda kind: sizes[kind])
