"""GGUF, llama.cpp's single-file format: llama (Mistral included), qwen2, qwen3 and gpt2 models.

The metadata becomes the configuration that the model's Hugging Face folder has, the tensors take its
names, and both go through the family files like a folder's: there is one door.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from langmill.common.errors import ModelError
from langmill.families import family, folder, quantised, weights
from langmill.families.gguf_blocks import Nibbles, nibbles
from langmill.families.gguf_file import File, read, scalar
from langmill.families.gguf_tokenizer import build
from langmill.families.weights import Rule
from langmill.model.config import Config
from langmill.text.tokenizer import Tokenizer

FACTORS = "rope_freqs.weight"  # what Llama 3's scaling divides each rotary frequency by
_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    **{f"attn_{part}": f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"},
    **{f"ffn_{part}": f"model.layers.{{}}.mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.ln_1",
    "ffn_norm": "transformer.h.{}.ln_2",
    "attn_qkv": "transformer.h.{}.attn.c_attn",
    "attn_output": "transformer.h.{}.attn.c_proj",
    "ffn_up": "transformer.h.{}.mlp.c_fc",
    "ffn_down": "transformer.h.{}.mlp.c_proj",
}
NAMES = {"llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2}
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 keeps these (inputs, outputs)
# Numbers that would change what the model computes, and the value at which they do not.
_NEUTRAL = {
    "expert_count": 0, "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0, "attention.causal": True,
    "logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "attention.scale": 0.0,
    "final_logit_softcapping": 0.0, "attn_logit_softcapping": 0.0,
}  # fmt: skip


def load_gguf(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    pre: str | None = None,
    keep: bool = False,
) -> tuple[folder.Model, Tokenizer | None]:
    """The model of a .gguf file, dequantised, and the tokenizer that it carries (None where it carries none).

    keep: matrices in Q4_0, Q4_1 and Q4_K stay in 4 bits (not GPT-2's, which lie the other way round).
    pre: the name of the tokenizer's pre-tokenizer, in place of the file's own.
    Raises ModelError naming the field or tensor that is wrong or not supported; MissingExtra without `gguf`.
    """
    file, theirs, config, tokenizer = _outline(Path(path), pre)
    kind = family(theirs["model_type"], file.path)
    names = {_rename(name, file.metadata["general.architecture"]): name for name in _weights(file)}
    order = [names[r.theirs] for r in kind.rules(config) if r.theirs in names]
    keep = keep and theirs["model_type"] != "gpt2"
    with _Ahead(order, lambda name: _tensor(file, name, theirs, keep)) as fetch:
        model = folder.assemble(
            kind, theirs, names, lambda name: fetch(names[name]), file.path, dtype, _fill if keep else None
        )
    if tokenizer is not None:
        folder.check_match(model.config, tokenizer, file.path)
    return model.to(device), tokenizer


def _fill(
    model: Any,
    rules: Sequence[Rule],
    names: Iterable[str],
    read: Callable[[str], Tensor | Nibbles],
    ignored: Sequence[str],
    where: Path,
    dtype: torch.dtype,
) -> None:
    """`weights.load` of a file of which some matrices stay in 4 bits."""
    there, held, made = set(names), dict[str, Tensor](), dict[str, Any]()
    plain = list[Rule]()
    for r in rules:
        got = read(r.theirs) if r.theirs in there else None
        if isinstance(got, Nibbles):
            shape = (len(got.codes), 2 * got.codes.shape[1])
            made |= quantised.layers(model, r, shape, partial(Nibbles._make, got), where)
            there.remove(r.theirs)
            continue
        plain.append(r)  # `weights.load` reports one that is not there
        if got is not None:
            held[r.theirs] = got
    quantised.place(
        model, made, lambda: weights.load(model, plain, there, held.__getitem__, ignored, where, dtype)
    )


def outline_gguf(path: Path) -> tuple[Config, Tokenizer | None]:
    """The shape and the tokenizer alone; no weight is read."""
    return _outline(path, None)[2:]


def _outline(path: Path, pre: str | None) -> tuple[File, dict[str, Any], Config, Tokenizer | None]:
    file = read(path)
    theirs = configuration(file)
    tokenizer = build(file.metadata, file.path, pre)
    try:
        config = family(theirs["model_type"], file.path).config(theirs)
    except ModelError as error:
        raise ModelError(f"{file.path}: {error}") from error
    return file, theirs, config, tokenizer


def configuration(file: File) -> dict[str, Any]:
    """The metadata as the `config.json` of the model's Hugging Face folder."""
    arch = scalar(file.metadata, "general.architecture", file.path)
    if arch not in NAMES:
        raise ModelError(f"{file.path}: general.architecture is {arch!r}; supported are {', '.join(NAMES)}")
    if _number(file, "split.count", 1) > 1:
        raise ModelError(
            f"{file.path}: one part of a split model; join the parts with llama-gguf-split --merge"
        )
    for key, neutral in _NEUTRAL.items():
        if (value := scalar(file.metadata, f"{arch}.{key}", file.path, neutral)) != neutral:
            raise ModelError(f"{file.path}: {arch}.{key} = {value!r} is not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path}: tensor token_embd.weight is missing or not a matrix")
    layers, blocks = _number(file, f"{arch}.block_count"), _blocks(file)
    if blocks != layers:
        raise ModelError(
            f"{file.path}: {arch}.block_count is {layers}, but there are tensors of {blocks} blocks"
        )
    shared = {"vocab_size": embedding.shape[0], "tie_word_embeddings": _tied(file)}
    width, length = _number(file, f"{arch}.embedding_length"), _number(file, f"{arch}.context_length")
    heads, hidden = (
        _number(file, f"{arch}.attention.head_count"),
        _number(file, f"{arch}.feed_forward_length"),
    )
    if arch == "gpt2":
        return shared | {
            "model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": hidden,
            "n_positions": length, "layer_norm_epsilon": _real(file, "gpt2.attention.layer_norm_epsilon", 1e-5),
        }  # fmt: skip
    window = _number(file, f"{arch}.attention.sliding_window", length)
    return shared | {
        "model_type": "mistral" if arch == "llama" and window < length else arch,
        "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": _number(file, f"{arch}.attention.head_count_kv", heads),
        "head_dim": _head_dim(file, arch, width // heads), "max_position_embeddings": length,
        "rms_norm_eps": _real(file, f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, arch, length),
        "attention_bias": arch == "llama" and "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "sliding_window": window if window < length else None, "use_sliding_window": window < length,
        "max_window_layers": 0,
    }  # fmt: skip


def _number(file: File, key: str, default: int | None = None) -> int:
    """A whole number of the metadata; one given for every layer is taken where it is the same for all."""
    value = file.metadata.get(key)
    if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
        value = value[0].item()
    value = default if value is None or (type(value) is int and value == 0) else value
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise ModelError(f"{file.path}: {key} is {value!r}; one whole number of at least 1 is needed")
    return value


def _real(file: File, key: str, default: float | None = None) -> float:
    """A positive number of the metadata; float32 ones as the decimal number that they stand for."""
    value = file.metadata.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(f"{file.path}: {key} is {value!r}; a number above 0 is needed")
    return float(str(np.float32(value)))


def _blocks(file: File) -> int:
    return len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})


def _tied(file: File) -> bool:
    """The output layer is left out where it is the embedding; some files hold the same bytes twice."""
    a, b = file.tensors["token_embd.weight"], file.tensors.get("output.weight")
    if b is None:
        return True
    same = (a.kind, a.shape) == (b.kind, b.shape)
    return same and np.array_equal(
        file.data[a.start : a.start + a.size], file.data[b.start : b.start + b.size]
    )


def _head_dim(file: File, arch: str, default: int) -> int:
    size = _number(file, f"{arch}.attention.key_length", default or 1)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if (other := _number(file, key, size)) != size:
            raise ModelError(f"{file.path}: {key} = {other} is not supported where the heads' size is {size}")
    return size


def _rope(file: File, arch: str, length: int) -> dict[str, Any]:
    """Rotary positions: base and scaling."""
    base = _real(file, f"{arch}.rope.freq_base", 10000.0)
    at = f"{arch}.rope.scaling"
    old = _real(file, f"{arch}.rope.scale_linear", 1.0)  # files of 2023
    kind = scalar(file.metadata, f"{at}.type", file.path, "linear" if old != 1.0 else "none")
    if FACTORS in file.tensors:
        if kind not in ("none", "llama3"):
            raise ModelError(
                f"{file.path}: tensor {FACTORS} together with {at}.type {kind!r} is not supported"
            )
        return {"rope_theta": base} | _llama3(
            file, base, _number(file, f"{at}.original_context_length", 8192)
        )
    if kind == "none":
        return {"rope_type": "default", "rope_theta": base}
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{file.path}: {at}.type is {kind!r}; supported are none, linear and yarn")
    factor = _real(file, f"{at}.factor", old)
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": base, "factor": factor}
    if kind == "yarn":
        found["original_max_position_embeddings"] = _number(file, f"{at}.original_context_length", length)
        scale = _real(file, f"{at}.attn_factor", 1.0) * _real(file, f"{at}.yarn_attn_factor", 1.0)
        found["attention_factor"] = scale * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        found["beta_fast"] = _real(file, f"{at}.yarn_beta_fast", 32.0)
        found["beta_slow"] = _real(file, f"{at}.yarn_beta_slow", 1.0)
    return found


def _llama3(file: File, base: float, original: int) -> dict[str, Any]:
    """The settings behind Llama 3's divisors, which is all that a file keeps of them.

    A frequency of wavelength w is divided by 1 / ((1 - s) / factor + s), where s = (original / w - low) /
    (high - low) held within 0 and 1. The published low = 1 and high = 4 are tried first; else a line
    through the divisors between the ends gives a pair that computes the same.
    """
    divisors = file.dequantize(FACTORS).astype(np.float64).reshape(-1)
    count = len(divisors)
    factor = round(float(divisors.max(initial=1.0)), 6)
    if not np.isfinite(divisors).all() or divisors.min(initial=1.0) < 1 - 1e-6:
        raise ModelError(f"{file.path}: tensor {FACTORS} holds divisors below 1, which no known scaling has")
    if factor == 1.0:
        return {"rope_type": "default"}
    turns = base ** (-np.arange(count) / count) / (2 * math.pi)  # 1 / wavelength
    candidates = [(length, 1.0, 4.0) for length in (original, *(1 << power for power in range(4, 22)))]
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    inside = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if inside.sum() >= 2:
        slope, start = np.polyfit(turns[inside], smooth[inside], 1)
        low = max(-start, 1e-6) * original / slope
        candidates.append((original, low, low + original / slope))
    for length, low, high in candidates:
        s = np.clip((length * turns - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - s) / factor + s), divisors, rtol=1e-4):
            return {
                "rope_type": "llama3", "factor": factor, "original_max_position_embeddings": length,
                "low_freq_factor": float(low), "high_freq_factor": float(high),
            }  # fmt: skip
    raise ModelError(
        f"{file.path}: tensor {FACTORS} does not follow Llama 3's scaling, the only one supported"
    )


def _weights(file: File) -> Iterator[str]:
    """The tensors that are weights: without the rotary divisors and a second copy of the embedding."""
    dropped = {FACTORS, *(("output.weight",) if _tied(file) else ())}
    return (name for name in file.tensors if name not in dropped)


def _rename(name: str, arch: str) -> str:
    """The Hugging Face name of a tensor; one that is not known keeps its own and is refused by it later."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    stem = NAMES[arch].get(match[2]) if match else None
    if match is None or stem is None or ("{}" in stem) != (match[1] is not None):
        return name
    return f"{stem.format(match[1])}.{match[3]}"


def _tensor(file: File, name: str, theirs: Mapping[str, Any], keep: bool = False) -> Tensor | Nibbles:
    """One tensor as the Hugging Face folder holds it; keep: in the file's 4 bits where it has them."""
    part = name.rpartition("blk.")[2].split(".")[1:2]
    heads = None
    if file.metadata["general.architecture"] == "llama" and part in (["attn_q"], ["attn_k"]):
        heads = theirs["num_attention_heads" if part == ["attn_q"] else "num_key_value_heads"]
    if keep and (kept := nibbles(file, name)) is not None:
        return kept if heads is None else kept.moved(lambda x: half_split(x, heads))
    weight = torch.from_numpy(file.dequantize(name))
    if heads is not None:
        return half_split(weight, heads)
    if theirs["model_type"] == "gpt2" and _rename(name, "gpt2").endswith(_CONV1D):
        return weight.t()
    return weight


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of llama's queries and keys: the file pairs dimensions (0, 1), (2, 3), ...; here i pairs with i + d/2."""
    if weight.shape[0] % (2 * heads):
        return weight  # of the wrong shape, which loading reports
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


class _Ahead:
    """Work on a list of names in threads, a few ahead of where the caller takes results in the list's order."""

    def __init__(self, names: Sequence[str], work: Callable[[str], Any]) -> None:
        threads = max(1, min(4, torch.get_num_threads()))
        self._work, self._waiting = work, deque(names)
        self._pool, self._started, self._depth = (
            ThreadPoolExecutor(threads),
            dict[str, Future[Any]](),
            4 * threads,
        )

    def __enter__(self) -> Callable[[str], Any]:
        return self._take

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _take(self, name: str) -> Any:
        while self._waiting and len(self._started) < self._depth:
            ahead = self._waiting.popleft()
            self._started[ahead] = self._pool.submit(self._work, ahead)
        started = self._started.pop(name, None)
        return self._work(name) if started is None else started.result()
