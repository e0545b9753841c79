"""A model is a folder that other tools load too: read one, write one.

`load` also takes a .gguf file and a hub id; every door ends in the same families and the same rules.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from langmill.common.errors import ModelError
from langmill.common.files import atomic_folder, write_json
from langmill.families import family, generation, modules, quantised, weights
from langmill.families.heads import gaps_of, limit_of, threshold_of
from langmill.model.config import Config, LSTMConfig, ModelConfig
from langmill.model.recurrent import LSTM
from langmill.model.transformer import Transformer
from langmill.text.tokenizer import Tokenizer

Model = Transformer | LSTM
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
STARTS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


def load(
    where: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    keep: bool = False,
) -> tuple[Model, Tokenizer | None]:
    """A model and its tokenizer from a folder, a .gguf file or a hub id ("name/model[@revision]").

    The folder may hold a PEFT adapter: then it is loaded onto the model that it names.

    dtype: the type that the weights are brought to. keep: the matrices that a .gguf file holds in 4 bits stay so
    (`Int4Linear`); those of a compressed folder always do. The tokenizer is None where the folder has none.
    ModelError says which file and tensor is wrong; nothing is allocated before the shapes agree.
    """
    from langmill.families.hub import resolve

    path = resolve(str(where))
    if path.suffix == ".gguf":
        from langmill.families.gguf import load_gguf

        return load_gguf(path, dtype=dtype, device=device, keep=keep)
    from langmill.families import peft, vocabulary

    if peft.is_adapter(path):
        return peft.load_adapted(path, None, dtype, device)
    model = load_model(path, dtype).to(device)
    tokenizer = vocabulary.tokenizer_of(path)
    if tokenizer is not None:
        check_match(model.config, tokenizer, path)
    return model, tokenizer


def outline(where: str | Path) -> tuple[Config, Tokenizer | None]:
    """What `load` would give, as a shape and a tokenizer: no weight is read. Errors as `load`'s."""
    from langmill.families.hub import resolve

    path = resolve(str(where))
    if path.suffix == ".gguf":
        from langmill.families.gguf import outline_gguf

        return outline_gguf(path)
    from langmill.families import peft, vocabulary

    if peft.is_adapter(path):
        return outline(peft.base_of(path))
    theirs = read_config(path / "config.json")
    try:
        config = family(theirs.get("model_type"), path / "config.json").config(theirs)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return config, vocabulary.tokenizer_of(path)


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Model:
    """The model of a folder, without its tokenizer, ready for use (in evaluation mode)."""
    theirs = read_config(path / "config.json")
    said = generation.settings_of(path, theirs)
    theirs = generation.started(theirs, said)
    kind = family(theirs.get("model_type"), path / "config.json")
    quantised.check(theirs, path)
    files = _files(path)
    try:
        handles = [safe_open(file, framework="pt") for file in files]
        for file in files:
            check_names(file)
        where = _places(kind, handles, path)
    except (SafetensorError, OSError) as reason:
        raise ModelError(
            f"{path}: the safetensors files cannot be read, cut short perhaps: {reason}"
        ) from None

    def read(name: str) -> Tensor:
        handle, key = where[name]
        return handle.get_tensor(key)

    model = assemble(kind, theirs, where, read, path, dtype)
    generation.attach(model, said, path)
    return model


def assemble(
    kind: Any,
    theirs: Mapping[str, Any],
    names: Mapping[str, Any],
    read: Callable[[str], Tensor],
    where: Path,
    dtype: torch.dtype,
    fill: Callable[..., None] | None = None,
) -> Model:
    """A model of family file `kind` from its foreign configuration and tensors: the one way in, for every format.

    fill: fills the model in place of `weights.load`, with the same arguments.
    """
    try:
        config = kind.config(theirs)
        if isinstance(config, ModelConfig):
            config = _untied(
                kind, kind.adjust(config, names) if hasattr(kind, "adjust") else config, names, read
            )
            config = dataclasses.replace(config, gaps=gaps_of(theirs))
            if config.head is not None:
                threshold = threshold_of(theirs) if config.head.task == "answer" else 0.0
                head = dataclasses.replace(config.head, threshold=threshold, limit=limit_of(theirs))
                config = dataclasses.replace(config, head=head)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    depth = (
        config.layers if isinstance(config, LSTMConfig) else sum(stack.layers for stack, _ in config.stacks)
    )
    if depth > len(names):
        raise ModelError(f"{where}: {depth} layers are announced, but there are only {len(names)} tensors")
    with torch.device("meta"):  # shapes alone: a configuration that lies about its size costs nothing
        model: Model = LSTM(config) if isinstance(config, LSTMConfig) else Transformer(config)
    again = isinstance(config, ModelConfig) and model.head is None  # the tied matrix stored twice
    ignored = (*kind.IGNORED, re.escape(kind.HEAD)) if again else kind.IGNORED
    fill = fill or (quantised.load if theirs.get("quantization_config") else weights.load)
    fill(model, kind.rules(config), names, read, ignored, where, dtype)
    return model.eval()


def _untied(
    kind: Any, config: ModelConfig, names: Mapping[str, Any], read: Callable[[str], Tensor]
) -> ModelConfig:
    """An output matrix of its own counts, even where the configuration calls it the embedding, as in transformers."""
    if config.head is None or not config.head.tied or kind.HEAD not in names:
        return config
    embedding = next(r.theirs for r in kind.rules(config) if r.ours == ("tokens.weight",))
    if embedding not in names or torch.equal(read(kind.HEAD), read(embedding)):
        return config
    return dataclasses.replace(config, head=dataclasses.replace(config.head, tied=False))


def save(
    model: Model,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    lineage: Mapping[str, Any] | None = None,
    card: str | None = None,
    replace: bool = False,
) -> None:
    """Write a folder that transformers loads: configuration, safetensors, tokenizer, and what is known of it.

    lineage: where the model came from (lineage.json). card: README.md. The folder appears whole or not
    at all; one that exists is refused unless `replace`.
    """
    theirs, kind = export_config(model.config)
    if tokenizer is not None:
        check_match(model.config, tokenizer, folder)
        theirs |= _special_ids(tokenizer)
    theirs |= quantised.described(model, kind)
    dtype = next(model.parameters()).dtype
    theirs |= {"dtype": str(dtype).removeprefix("torch."), "torch_dtype": str(dtype).removeprefix("torch.")}
    with atomic_folder(Path(folder), replace=replace) as fresh:
        _write_weights(_named(model, kind), fresh)
        quantised.write_own(model, fresh)
        _json(fresh / "config.json", theirs)
        if tokenizer is not None:
            tokenizer.save(fresh, model.config.length)
            # transformers begins a decoder with bos where this file does not say otherwise
            starts = {name: theirs[name] for name in STARTS if theirs.get(name) is not None}
            rules = dict(generation.rules_of(model).kept)
            _json(fresh / generation.FILE, _special_ids(tokenizer) | rules | starts)
        if lineage is not None:
            write_json(fresh / "lineage.json", lineage, "lineage", 1)
        if card is not None:
            (fresh / "README.md").write_text(card, encoding="utf-8")


def export_config(config: Config) -> tuple[dict[str, Any], Any]:
    """The foreign configuration that expresses this shape, and the family file it belongs to."""
    if isinstance(config, LSTMConfig):
        kind = family("langmill_lstm", "config")
        return kind.export(config), kind
    head, shape = config.head, dataclasses.replace(config, gaps="psm")
    own: dict[str, Any] = {} if config.gaps == "psm" else {"gap_order": config.gaps}
    if head is not None and head.threshold:
        shape = dataclasses.replace(shape, head=dataclasses.replace(head, threshold=0.0))
        own["answer_threshold"] = head.threshold
    for kind in dict.fromkeys(modules().values()):
        theirs = kind.export(shape) if "lstm" not in kind.MODEL_TYPES[0] else None
        if theirs is not None:
            return theirs | own, kind
    raise ModelError(f"no known family has this shape, so other tools could not load it: {config}")


def check_match(config: Config, tokenizer: Tokenizer, where: object) -> None:
    """Refuse a tokenizer whose ids the model does not have, or which leaves out the eos that texts are scored by."""
    if tokenizer.vocab_size > config.vocab:
        raise ModelError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} entries and the model {config.vocab}: "
            "they do not belong together"
        )
    by_end = isinstance(config, ModelConfig) and config.rereads
    if by_end and tokenizer.frame.single.ids[-1][-1:] != (tokenizer.eos_id,):
        raise ModelError(
            f"{where}: the model scores a text by its last token, eos, and the tokenizer does not put one there: take "
            "an encoder such as BERT, or a decoder"
        )


def read_config(path: Path) -> dict[str, Any]:
    """A foreign JSON object; ModelError where it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: {path.parent} is not a model folder") from None
    except (ValueError, OSError, RecursionError) as reason:
        raise ModelError(f"{path} cannot be read as JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value


def check_names(file: Path) -> None:
    """Raise ModelError where a safetensors file, one that opens, names a tensor twice: the library keeps the last."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ModelError(f"{file}: {twice} occurs twice: make or fetch the file again")
        return found

    with open(file, "rb") as stream:
        json.loads(stream.read(int.from_bytes(stream.read(8), "little")), object_pairs_hook=once)


def _files(path: Path) -> list[Path]:
    if (path / INDEX).exists():
        table = read_config(path / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise ModelError(f"{path / INDEX} has no weight_map of tensors to file names")
        names = sorted(set(table.values()))
        outside = [name for name in names if Path(name).name != name]
        missing = [name for name in names if not (path / name).is_file()]
        if outside or missing:
            raise ModelError(
                f"{path / INDEX} names {(outside + missing)[0]}, which is not a file of this folder"
            )
        return [path / name for name in names]
    if (path / SINGLE).exists():
        return [path / SINGLE]
    old = sorted(path.glob("pytorch_model*.bin"))
    hint = f": {old[0].name} is a pickle, which is never read; convert it to safetensors first" if old else ""
    raise ModelError(f"{path} has no {SINGLE}{hint}")


def _places(kind: Any, handles: Sequence[Any], path: Path) -> dict[str, tuple[Any, str]]:
    """Where each tensor is, by the name that the rules know it by: its file and its name there."""
    where: dict[str, tuple[Any, str]] = {}
    for handle in handles:
        for key in handle.keys():  # noqa: SIM118 - not a dict
            name = _name(kind, key)
            if name in where:
                raise ModelError(
                    f"{path}: {where[name][1]} and {key} are the same tensor: fetch the files again"
                )
            where[name] = handle, key
    shared = getattr(kind, "SHARED", None)
    if shared is not None and shared not in where:
        user = next((user for user in kind.USERS if user in where), None)
        where |= {} if user is None else {shared: where[user]}
    return where


def _name(kind: Any, key: str) -> str:
    """Files of a bare body leave the prefix out, and old ones of BERT name a norm's weights as TensorFlow did."""
    for old, new in OLD_NAMES.items():
        if key.endswith(old):
            key = key.removesuffix(old) + new
    bare = kind.PREFIX and not key.startswith((kind.PREFIX, *kind.OUTSIDE))
    return f"{kind.PREFIX}{key}" if bare else key


def _named(model: Model, kind: Any) -> dict[str, Tensor]:
    """The tensors under their foreign names, which for a body without a head have no prefix."""
    state, config = quantised.named(model, kind.rules(model.config)), model.config
    if isinstance(config, ModelConfig) and (config.head is None or config.head.outputs == 0):
        return {name.removeprefix(kind.PREFIX): tensor for name, tensor in state.items()}
    return state


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    stops = sorted(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": tokenizer.pad_id,
    }


def _write_weights(state: dict[str, Tensor], folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    # on a GPU an LSTM's weights are pieces of one storage, which safetensors refuses
    own = {
        name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        for name, tensor in state.items()
    }
    save_torch_state_dict(own, folder, max_shard_size=SHARD_BYTES)


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
