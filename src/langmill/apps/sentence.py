"""How a text becomes a vector, as sentence-transformers keeps it beside a model: read, applied, written and copied.

modules.json lists what a text goes through: Transformer and Pooling, then Dense and Normalize. 1_Pooling/config.json
says how a text's states become one vector, sentence_bert_config.json how many tokens of a text are read.

K texts, D numbers of a vector.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers.normalizers import Lowercase
from torch import Tensor

from langmill.common.errors import ModelError
from langmill.common.files import atomic_write
from langmill.families.folder import SINGLE, Model, check_names, read_config
from langmill.families.hub import resolve
from langmill.families.peft import base_of, is_adapter
from langmill.infer.runner import Embedder
from langmill.model.config import Pool

Floats = NDArray[np.float32]
Module = Callable[[Tensor], Tensor]
MODULES, POOLING, PROMPTS = "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"
KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
LENGTHS = tuple(f"sentence_{kind}_config.json" for kind in KINDS)
POOLS: dict[Any, Pool] = {"mean": "mean", "cls": "first", "lasttoken": "last"}
ACTIVATIONS: dict[str, Module] = {
    "Identity": lambda x: x, "Tanh": torch.tanh, "ReLU": F.relu, "GELU": F.gelu, "Sigmoid": torch.sigmoid,
}  # fmt: skip
KNOWN = (("Transformer",), ("Pooling", "Dense", "Normalize", "Dropout"), ("Dense", "Normalize", "Dropout"))
ENOUGH = 1 << 40  # tokens: what says nothing of a length reads all that the model does
INSTEAD = "make its vectors with sentence-transformers, or take a model without it"


@dataclass(frozen=True)
class Recipe:
    """How a model makes a vector of a text.

    pool: how its tokens' states become one. width: numbers of a vector. length: tokens of a text that are read, special
    ones included, the rest is cut off; None where the folder is none of sentence-transformers'. after: what the pooled
    states go through. prompt: what stands in front of every text. lower: texts are read in small letters.
    """

    pool: Pool
    width: int
    length: int | None = None
    after: tuple[Module, ...] = ()
    prompt: str = ""
    lower: bool = False

    def given(self, text: str) -> str:
        """The text as the tokenizer takes it."""
        text = self.prompt + text
        return str(Lowercase().normalize_str(text)) if self.lower else text

    def finished(self, x_KD: Floats) -> Floats:
        """Vectors of pooled states, not of length 1 yet."""
        if not self.after:
            return x_KD
        x = torch.from_numpy(x_KD)
        for module in self.after:
            x = module(x)
        return x.numpy()


class Finishing:
    """An `Embedder` (see runner.py) of finished vectors of length 1, over one of pooled states, and of texts no longer
    than the recipe says. Where nothing comes after the pooling the other one's are of length 1 already."""

    def __init__(self, pooled: Embedder, made: Recipe) -> None:
        self.pooled, self.made, self.vocab = pooled, made, pooled.vocab
        self.length = min(pooled.length, made.length or pooled.length)

    def embed(self, texts: Sequence[NDArray[np.int64]]) -> Floats:
        """(K, D), one a text."""
        x_KD = self.pooled.embed(texts)
        if not self.made.after:
            return x_KD
        x_KD = self.made.finished(x_KD)
        return x_KD / np.maximum(np.linalg.norm(x_KD, axis=1, keepdims=True), 1e-12)


def recipe(where: str | Path, model: Model, pool: Pool | Literal["auto"] = "auto") -> Recipe:
    """What the model's folder, or that of an adapter's model, says; `pool` takes the place of its pooling, which is the
    mean where it says nothing.

    ModelError names the file that cannot be followed, and the module that is not known here.
    """
    folder = folder_of(where)
    dim = model.config.main.dim if hasattr(model.config, "main") else 0
    modules = _modules(folder / MODULES)
    inner = next((path for kind, path in modules if kind == "Pooling"), None if modules else "1_Pooling")
    stated = None if inner is None else folder / inner / "config.json"
    if pool == "auto":
        pool = _pool(stated, folder, bool(modules))
    after: list[Module] = []
    for place, (kind, path) in enumerate(modules):
        if kind == "Dense":
            layers, dim = _dense(folder / path, dim)
            after += layers
        elif kind == "Normalize" and any(later == "Dense" for later, _ in modules[place:]):
            after.append(partial(F.normalize, dim=-1))  # the last one is for the setting to say
    first = folder / (modules[0][1] if modules else "")
    own = next((read_config(first / name) for name in LENGTHS if (first / name).is_file()), None)
    length = min(_length(own or {}, first), model.config.length) if modules or own else None
    prompt = _prompt(folder / PROMPTS)
    if prompt and stated and stated.is_file() and read_config(stated).get("include_prompt") is False:
        raise ModelError(f'{stated} leaves the prompt "{prompt}" out of the mean: {INSTEAD}')
    return Recipe(pool, dim, length, tuple(after), prompt, bool((own or {}).get("do_lower_case")))


def folder_of(where: str | Path, base: str | None = None) -> Path:
    """The folder that says how vectors are made: of an adapter that does not, its model's."""
    path = resolve(where)
    if is_adapter(path) and not (path / MODULES).is_file():
        return resolve(base or base_of(path))
    return path


def _modules(path: Path) -> list[tuple[str, str]]:
    """(name of its class, folder) of each module; none where there is no such file."""
    if not path.is_file():
        return []
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(listed, list):
            raise TypeError("it is no list")
        found = [(str(one["type"]).rpartition(".")[2], str(one["path"])) for one in listed]
    except (ValueError, OSError, RecursionError, TypeError, KeyError) as reason:
        raise ModelError(f"{path} is no list of modules, each with its type and path: {reason!r}") from None
    for place, (kind, inner) in enumerate(found):
        if kind not in KNOWN[min(place, 2)]:
            raise ModelError(
                f"{path} has {kind} as module {place}, which is not applied here (Transformer, Pooling, then Dense and "
                f"Normalize are): {INSTEAD}"
            )
        if Path(inner).name != inner or inner == "..":
            raise ModelError(f"{path} names {inner}, which is no folder beside it")
    return found


def _pool(path: Path | None, folder: Path, listed: bool) -> Pool:
    """Of 1_Pooling/config.json: by name, or by switches of which one is on, as older versions write them."""
    if path is None or not path.is_file():
        if not listed:
            return "mean"
        what = "names no Pooling" if path is None else f"names {path.parent.name}, and {path} is missing"
        raise ModelError(
            f"{folder / MODULES} {what}: fetch the folder whole, or choose --pool mean, first or last"
        )
    said = read_config(path)
    on = [
        key.removeprefix("pooling_mode_") for key, value in said.items() if "pooling_mode_" in key and value
    ]
    named = said.get("pooling_mode", [name.removesuffix("_tokens").removesuffix("_token") for name in on])
    modes = list(map(str, named)) if isinstance(named, list) else [str(named)]
    if len(modes) != 1 or modes[0] not in POOLS:
        raise ModelError(
            f"{path} pools by {' and '.join(modes) or 'nothing'}: choose --pool mean, first or last"
        )
    return POOLS[modes[0]]


def _dense(folder: Path, width: int) -> tuple[list[Module], int]:
    """A linear layer of vectors of `width` numbers and its activation, and how many numbers come out."""
    file, settings = folder / SINGLE, folder / "config.json"
    if missing := [path for path in (settings, file) if not path.is_file()]:
        raise ModelError(
            f"{missing[0]} is missing: fetch the folder whole; a pickle is never read, convert it"
        )
    said = read_config(settings)
    name = str(said.get("activation_function", "Tanh")).rpartition(".")[2]
    places = {said.get(f"module_{end}_name") or "sentence_embedding" for end in ("input", "output")}
    if name not in ACTIVATIONS or said.get("use_residual") or places != {"sentence_embedding"}:
        raise ModelError(
            f"{settings} asks for more than a linear layer and {', '.join(ACTIVATIONS)}: {INSTEAD}"
        )
    try:
        weights = {key: tensor.float() for key, tensor in load_file(file).items()}
        check_names(file)
    except (SafetensorError, OSError, ValueError) as reason:
        raise ModelError(f"{file} cannot be read, cut short perhaps: {reason}") from None
    weight, bias = weights.get("linear.weight"), weights.get("linear.bias")
    if weight is None or weight.dim() != 2 or weight.shape[1] != width:
        raise ModelError(f"{file} holds no linear.weight for vectors of {width} numbers")
    if (bias is not None) != said.get("bias", True) or (bias is not None and len(bias) != len(weight)):
        raise ModelError(f"{file} and {settings} disagree about linear.bias")
    return [partial(F.linear, weight=weight, bias=bias), ACTIVATIONS[name]], len(weight)


def _length(own: Mapping[str, Any], folder: Path) -> int:
    """Tokens of a text, as sentence-transformers is told; else what the tokenizer says."""
    given = own.get("processor_kwargs") or own.get("tokenizer_args") or {}
    length, file = given.get("model_max_length", own.get("max_seq_length")), folder / "tokenizer_config.json"
    if length is None and file.is_file():
        length = read_config(file).get("model_max_length")
    return int(min(length, ENOUGH)) if isinstance(length, int | float) and length > 0 else ENOUGH


def _prompt(path: Path) -> str:
    """What is put in front of every text for which no other prompt is named."""
    said = read_config(path) if path.is_file() else {}
    return str((said.get("prompts") or {}).get(said.get("default_prompt_name")) or "")


def write(folder: Path, pool: Pool, width: int, length: int, lower: bool = False) -> None:
    """Make a model's folder one that sentence-transformers reads, with vectors of length 1; see `Recipe`. Doing it
    again changes nothing."""
    types = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(types.items())
    ]
    # switches are what every version reads
    switches = {
        "pooling_mode_cls_token": pool == "first",
        "pooling_mode_mean_tokens": pool == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": pool == "last",
        "include_prompt": True,
    }
    (folder / POOLING).parent.mkdir(exist_ok=True)
    for name, value in (
        (POOLING, {"word_embedding_dimension": width, **switches}),
        (LENGTHS[0], {"max_seq_length": length, "do_lower_case": lower}),
        (MODULES, modules),
    ):
        atomic_write(folder / name, json.dumps(value, indent=2) + "\n")


def copy(source: Path, out: Path) -> None:
    """Bring what a model's folder says of vectors to the folder of a model that was made of it."""
    names = [MODULES, PROMPTS, *LENGTHS]
    inner = [
        file.relative_to(source) for end in ("config.json", SINGLE) for file in source.glob(f"[0-9]*_*/{end}")
    ]
    for name in [*map(Path, names), *inner]:
        if (source / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, out / name)
