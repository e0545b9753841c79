"""Weights in 8 and 4 bits in a folder: "pack-quantized" of compressed-tensors, which transformers and vLLM load.

A linear layer X has X.weight_packed (int32: eight codes of 4 bits or four of 8, the first lowest, counted from the
least number), X.weight_scale, X.weight_shape, and where a group has its own zero X.weight_zero_point. Codes of 4 bits
lie in memory as we hold them, so they stay where the file is mapped; those of 8 bits are moved by 128.

An embedding in 8 bits is a plain float16 tensor, since transformers 5 knows no other, where that is exact: then
embedding.json beside it holds the steps, by which its codes are found again. Else, and in 4 bits, it is packed too.
O outputs, I inputs, G groups, V vocabulary.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from langmill.common.errors import ModelError
from langmill.common.files import read_json, write_json
from langmill.families import weights
from langmill.families.weights import Rule
from langmill.model.config import ModelConfig
from langmill.model.layers import GROUP, ROUNDED, Int4Embedding, Int4Linear, Int8Embedding, Int8Linear

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
ROWS = "pack-quantized-rows"  # of GPT-2's Conv1D, which the format has no word for: other tools then refuse the folder
OWN = "embedding.json"
PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
EMBEDDING = "tokens"


def check(theirs: Mapping[str, Any], where: object) -> None:
    """Raise ModelError where a configuration tells of weights that are rounded in a way which is not read here."""
    given = theirs.get("quantization_config")
    if given is None:
        return
    method = given.get("quant_method") if isinstance(given, Mapping) else given
    if not isinstance(given, Mapping) or method != METHOD:
        raise ModelError(
            f"{where}: its weights are quantised ({method}); take the model before that, or a .gguf file"
        )
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if (value := given.get(key)) and value != {"format": "dense"}:
            raise ModelError(
                f"{where}: quantization_config has a {key} ({_short(value)}), which is not supported"
            )
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ModelError(
            f"{where}: quantization_config has no config_groups that say how its weights are rounded"
        )
    for name, group in groups.items():
        if reason := _unknown(group, given):
            raise ModelError(
                f"{where}: quantization_config.{name} has {reason}; supported are whole numbers of 4 bits by group or "
                "channel and of 8 bits by channel, packed, of weights alone"
            )


def _unknown(group: Any, whole: Mapping[str, Any]) -> str:
    """What is not supported in a group of layers; nothing where all is."""
    if not isinstance(group, Mapping) or not isinstance(args := group.get("weights"), Mapping):
        return "no weights"
    for side in ("input_activations", "output_activations"):
        if group.get(side):
            return f"{side}, which are rounded too"
    form = group.get("format") or whole.get("format")
    if form not in (FORMAT, ROWS):
        return f"the format {form!r}"
    bits, strategy, size = args.get("num_bits"), args.get("strategy"), args.get("group_size")
    if strategy is None:
        strategy = "group" if isinstance(size, int) and size > 0 else "channel" if size == -1 else "tensor"
    if args.get("type", "int") != "int" or args.get("dynamic") or bits not in (4, 8):
        return f"weights of {bits} bits, {args.get('type')}" + (", dynamic" if args.get("dynamic") else "")
    if args.get("actorder") not in (None, False, "weight", "static"):
        return f"the order of activations {args['actorder']!r}"
    if strategy == "group" and (bits == 8 or not isinstance(size, int) or size % GROUP):
        return f"groups of {size} weights of {bits} bits"
    if strategy not in ("group", "channel"):
        return f"the strategy {strategy!r}"
    return "" if bits == 4 or args.get("symmetric", True) else "zeros of 8 bits"


def load(
    model: nn.Module,
    rules: Sequence[Rule],
    names: Iterable[str],
    read: Callable[[str], Tensor],
    ignored: Sequence[str],
    where: Path,
    dtype: torch.dtype,
) -> None:
    """`weights.load` of a folder that holds rounded layers too: these are put in the places of the plain ones."""
    there, plain = set(names), list[Rule]()
    made: dict[str, Any] = {}
    steps = _own_steps(where)
    for r in rules:
        stem = r.theirs.removesuffix("weight")
        if stem + PACKED in there:
            held = {part: read(stem + part) for part in (PACKED, SCALE, SHAPE, ZERO) if stem + part in there}
            there -= {stem + part for part in held}
            made |= _packed(model, r, held, where)
        elif steps is not None and r.ours == (f"{EMBEDDING}.weight",) and r.theirs in there:
            there.remove(r.theirs)
            made[EMBEDDING] = _embedding(read(r.theirs), steps, where / OWN)
        else:
            plain.append(r)
    place(model, made, lambda: weights.load(model, plain, there, read, ignored, where, dtype))


def place(model: nn.Module, made: Mapping[str, Any], fill: Callable[[], None]) -> None:
    """Put rounded layers that are `made`, by name, into a model of which `fill` fills the rest."""
    for name in made:  # meanwhile nothing but a bias is there to be filled
        hole: Any = nn.Module()
        hole.bias = getattr(model.get_submodule(name), "bias", None)
        _put(model, name, hole)
    fill()
    for name, layer in made.items():
        if (bias := getattr(model.get_submodule(name), "bias", None)) is not None:
            layer.bias = bias
        _put(model, name, layer)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _packed(model: nn.Module, r: Rule, held: Mapping[str, Tensor], where: Path) -> dict[str, nn.Module]:
    """Our layers of one packed matrix of theirs, by name."""
    stem = r.theirs.removesuffix(".weight")
    if SCALE not in held or SHAPE not in held:
        raise ModelError(f"{where}: {stem} has a {PACKED}, but no {SCALE if SCALE not in held else SHAPE}")
    shape = tuple(held[SHAPE].tolist())
    return layers(model, r, shape, lambda: _opened(held, shape, f"{where}: {stem}"), where)


def layers(
    model: nn.Module,
    r: Rule,
    shape: tuple[int, ...],
    parts: Callable[[], tuple[Tensor, Tensor, Tensor | None]],
    where: Path,
) -> dict[str, nn.Module]:
    """Layers of the rule's names that hold `parts` (codes, steps, lows) of a matrix of that shape, split among them.

    ModelError where one of them is not a linear layer nor the embedding, or needs another shape.
    """
    stem, names = r.theirs.removesuffix(".weight"), [name.removesuffix(".weight") for name in r.ours]
    plain: list[Any] = [model.get_submodule(name) for name in names]
    if not all(isinstance(layer, nn.Linear) for layer in plain) and names != [EMBEDDING]:
        raise ModelError(f"{where}: {stem} is packed, and is neither a linear layer nor the embedding")
    outputs, inputs = [len(layer.weight) for layer in plain], int(plain[0].weight.shape[1])
    if shape != (sum(outputs), inputs):
        raise ModelError(
            f"{where}: {stem} has shape {shape}, {' + '.join(r.ours)} need {(sum(outputs), inputs)}"
        )
    pieces = zip(
        *(part.split(outputs) if part is not None else [None] * len(outputs) for part in parts()), strict=True
    )
    return {
        name: _layer(names == [EMBEDDING], inputs, list(piece))
        for name, piece in zip(names, pieces, strict=True)
    }


def _layer(embedding: bool, inputs: int, parts: list[Any]) -> nn.Module:
    codes, steps, lows = parts
    size = (len(codes), inputs) if embedding else (inputs, len(codes))
    layer: Any
    with torch.device("meta"):
        if codes.dtype == torch.int8:
            layer = Int8Embedding(*size) if embedding else Int8Linear(*size)
        else:
            kind = Int4Embedding if embedding else Int4Linear
            layer = kind(*size, symmetric=lows is None)
    layer.codes, layer.steps = codes, steps
    if lows is not None:
        layer.lows = lows
    return layer


def _opened(
    held: Mapping[str, Tensor], shape: tuple[int, int], where: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, steps and minima as our layers hold them."""
    (outputs, inputs), packed, scale = shape, held[PACKED], held[SCALE]
    words = tuple(packed.shape)
    if packed.dtype != torch.int32 or packed.dim() != 2 or not scale.is_floating_point() or scale.dim() != 2:
        raise ModelError(f"{where}.{PACKED} must be a matrix of int32, and {SCALE} one of floats")
    if not torch.isfinite(scale).all() or len(scale) != outputs:
        raise ModelError(f"{where}.{SCALE} of shape {tuple(scale.shape)} is not a finite row for each output")
    if words == (outputs, -(-inputs // 4)) and scale.shape[1] == 1 and ZERO not in held:
        codes = (packed.view(torch.uint8) ^ 128).view(torch.int8)[:, :inputs].contiguous()
        return codes, scale[:, 0].float(), None
    groups = scale.shape[1]
    if inputs % GROUP or words != (outputs, inputs // 8) or not groups or inputs % (groups * GROUP):
        raise ModelError(
            f"{where}.{PACKED} of shape {words} with {groups} steps a row is neither 8 bits by channel nor 4 bits in "
            f"groups of a multiple of {GROUP}"
        )
    repeated, steps = inputs // groups // GROUP, scale.half()
    lows = (
        None if ZERO not in held else (-_zeros(held[ZERO], (outputs, groups), where) * steps.float()).half()
    )
    if not torch.isfinite(steps).all():
        raise ModelError(f"{where}.{SCALE} holds steps beyond float16's largest")
    if repeated > 1:
        steps = steps.repeat_interleave(repeated, dim=1)
        lows = None if lows is None else lows.repeat_interleave(repeated, dim=1)
    return packed.view(torch.uint8), steps, lows


def _zeros(packed: Tensor, shape: tuple[int, int], where: str) -> Tensor:
    """The zeros 0 … 15 (O, G), packed along the outputs."""
    outputs, groups = shape
    if packed.dtype != torch.int32 or tuple(packed.shape) != (-(-outputs // 8), groups):
        raise ModelError(f"{where}.{ZERO} of shape {tuple(packed.shape)} does not fit {outputs} outputs")
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)[None, :, None]
    return ((packed[:, None] >> shifts) & 15).flatten(0, 1)[:outputs].float()


def _own_steps(where: Path) -> Tensor | None:
    """The steps (V,) of an embedding that is stored as float16; None where there are none of its own."""
    if not (where / OWN).is_file():
        return None
    try:
        raw = base64.b64decode(read_json(where / OWN, "embedding", 1, ModelError)["steps"], validate=True)
    except (KeyError, TypeError, ValueError) as reason:
        raise ModelError(f"{where / OWN} holds no steps that can be read: {reason}") from None
    return torch.frombuffer(bytearray(raw), dtype=torch.float16).float() if raw else torch.zeros(0)


def _embedding(weight_VI: Tensor, steps_V: Tensor, where: Path) -> nn.Module:
    if weight_VI.dim() != 2 or len(weight_VI) != len(steps_V) or weight_VI.dtype != torch.float16:
        raise ModelError(f"{where} belongs to another model: its steps do not fit the embedding; remove it")
    layer: Any = Int8Embedding(*weight_VI.shape)
    layer.steps = steps_V
    divided = torch.where(steps_V == 0, torch.inf, steps_V)[:, None]
    for start in range(0, len(weight_VI), 4096):  # not all of it in floats at once
        some = slice(start, start + 4096)
        numbers = (weight_VI[some].float() / divided[some]).round()
        fits = torch.equal(numbers * steps_V[some, None], weight_VI[some].float())
        if not fits or (len(numbers) and float(numbers.abs().max()) > 127):
            raise ModelError(
                f"{where} belongs to another model: the embedding is not made of its steps; remove it"
            )
        layer.codes[some] = numbers.to(torch.int8)
    return layer


def is_rounded(model: nn.Module) -> bool:
    """Whether a model holds a layer in 8 or 4 bits."""
    return any(isinstance(layer, ROUNDED) for layer in model.modules())


def named(model: nn.Module, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """`weights.save` of a model that holds rounded layers too."""
    rounded = {name: layer for name, layer in model.named_modules() if isinstance(layer, ROUNDED)}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in rounded or name.endswith(".bias")
    }
    plain, found = [], dict[str, Tensor]()
    for r in rules:
        layers = [rounded.get(name.removesuffix(".weight")) for name in r.ours]
        if not any(layers):
            plain.append(r)
        elif not all(layers):
            raise ModelError(
                f"{r.theirs} would hold layers in different numbers of bits: {', '.join(r.ours)}"
            )
        elif as_floats(layers[0]):
            layer: Any = layers[0]
            found[r.theirs] = layer.codes.half() * layer.steps.half()[:, None]
        else:
            stem = r.theirs.removesuffix("weight")
            found |= {stem + part: tensor for part, tensor in _closed(layers, r.theirs).items()}
    rest: Any = SimpleNamespace(state_dict=lambda: state)
    return weights.save(rest, plain) | found


def as_floats(layer: object) -> bool:
    """Whether an embedding is stored as float16: one in 8 bits whose values are exact in it, for steps of 4 digits."""
    if not isinstance(layer, Int8Embedding) or not len(layer.steps):
        return False
    digits = torch.frexp(layer.steps)[0] * 16
    narrow, widest = layer.steps.half(), (127 * layer.steps).half()
    return bool((digits == digits.round()).all() & (narrow == layer.steps).all() & widest.isfinite().all())


def _closed(layers: Sequence[Any], name: str) -> dict[str, Tensor]:
    """Layers as one packed matrix: what `_opened` opens."""
    codes, steps = (_joined([getattr(layer, part) for layer in layers]) for part in ("codes", "steps"))
    shape = torch.tensor([len(codes), layers[0].in_features])
    if codes.dtype == torch.int8:
        padded = nn.functional.pad(codes.view(torch.uint8) ^ 128, (0, -codes.shape[1] % 4))
        # as float32, in which others multiply them by the codes then
        return {PACKED: padded.contiguous().view(torch.int32), SCALE: steps[:, None].clone(), SHAPE: shape}
    found = {PACKED: codes.contiguous().view(torch.int32), SCALE: steps.contiguous(), SHAPE: shape}
    if any(layer.lows is not None for layer in layers):
        lows = _joined([-8 * layer.steps if layer.lows is None else layer.lows for layer in layers])
        safe = torch.where(steps == 0, 1.0, steps.float())
        zeros = (-lows.float() / safe).round()
        if not torch.equal((-zeros * steps.float()).half(), lows) or zeros.min() < 0 or zeros.max() > 15:
            raise ModelError(
                f"{name} is in 4 bits with minima that are no whole steps, which no folder holds: save the model as it "
                "was before, and `langmill compress` that"
            )
        wide = nn.functional.pad(zeros.to(torch.int32), (0, 0, 0, -len(zeros) % 8)).unflatten(0, (-1, 8))
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)[None, :, None]
        found[ZERO] = (wide << shifts).sum(1).to(torch.int32)
    return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One after the other; a single one as it is, which may lie in a mapped file."""
    return parts[0].detach().cpu() if len(parts) == 1 else torch.cat([part.detach().cpu() for part in parts])


def write_own(model: nn.Module, folder: Path) -> None:
    """Write what only we read of an embedding that other tools read as float16."""
    if as_floats(layer := getattr(model, EMBEDDING, None)):
        steps: Any = layer
        text = base64.b64encode(steps.steps.detach().cpu().half().numpy().tobytes()).decode()
        write_json(folder / OWN, {"bits": 8, "steps": text}, "embedding", 1)


def described(model: Any, kind: Any) -> dict[str, Any]:
    """The entry of `config.json` that says how the layers are rounded; nothing where none is."""
    if not is_rounded(model):
        return {}
    config: ModelConfig = model.config
    bare = (
        kind.PREFIX if config.head is None or config.head.outputs == 0 else ""
    )  # a body alone has no prefix
    groups: dict[tuple[int, bool, bool], list[str]] = {}
    ignored = list[str]()
    for r, layer in _matrices(model, kind.rules(config)):
        stem = r.theirs.removesuffix(".weight").removeprefix(bare)
        if isinstance(layer, ROUNDED) and not as_floats(layer):
            bits = 8 if isinstance(layer, Int8Linear | Int8Embedding) else 4
            own = isinstance(layer, Int8Embedding | Int4Embedding)
            symmetric = bits == 8 or getattr(layer, "lows", None) is None
            groups.setdefault((bits, symmetric, own or stem == _stem(kind)), []).append(stem)
        elif isinstance(layer, nn.Linear):
            ignored.append(stem)
    writes, transposed = config.writes, any(r.transposed for r in kind.rules(config))
    if config.tied:
        ignored.append(_stem(kind))
    entries = {}
    for number, ((bits, symmetric, outside), stems) in enumerate(
        sorted(groups.items(), key=lambda g: -g[0][2])
    ):
        whole = writes and not outside and not transposed
        entries[f"group_{number}"] = {
            "targets": ["Linear"] if whole else sorted({_pattern(stem) for stem in stems}),
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
                **({"strategy": "group", "group_size": GROUP} if bits == 4 else {"strategy": "channel"}),
            },
            "input_activations": None, "output_activations": None,
            "format": ROWS if transposed and not outside else FORMAT,
        }  # fmt: skip
    told = {"quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed"}
    return {"quantization_config": {**told, "config_groups": entries, "ignore": ignored}}


def _matrices(model: nn.Module, rules: Sequence[Rule]) -> Iterator[tuple[Rule, nn.Module]]:
    """The rules of layers with a matrix, and the first layer of each."""
    for r in rules:
        owner, _, leaf = r.ours[0].rpartition(".")
        if leaf == "weight" and owner:
            yield r, model.get_submodule(owner)


def _stem(kind: Any) -> str:
    return str(kind.HEAD).removesuffix(".weight")


def _pattern(stem: str) -> str:
    """A pattern of all layers with this name, whatever their numbers."""
    return "re:.*" + re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(stem)) + "$"


def _short(value: object) -> str:
    return str(value)[:80]
