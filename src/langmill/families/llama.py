"""Llama, Mistral, Qwen2, Qwen3. arXiv:2307.09288, 2310.06825, 2407.10671, 2505.09388."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langmill.common.errors import ModelError
from langmill.families.heads import ENDINGS, described, labels_of, task_of
from langmill.families.weights import (
    MOST_LAYERS,
    Rule,
    choice,
    flag,
    layers,
    linear,
    number,
    real,
    refuse,
    rule,
)
from langmill.model.config import Head, ModelConfig, Rope, RopeScaling, StackConfig, Task, Tokens

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
PREFIX = "model."
HEAD = "lm_head.weight"
OUTSIDE = ("lm_head.", "score.", "qa_outputs.")
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # computed, but stored by old files
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
SCALINGS = {"linear": "linear", "dynamic": "dynamic", "llama3": "llama3", "yarn": "yarn"}
_SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "llama": {**_SHAPE, "tie_word_embeddings": True},
    "llama-biased": {**_SHAPE, "head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "llama-linear": {**_SHAPE, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    "llama-dynamic": {**_SHAPE, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "llama-llama3": {
        **_SHAPE,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama-yarn": {
        **_SHAPE,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        },
    },
    "mistral": {**_SHAPE, "sliding_window": 8},
    "qwen2": {**_SHAPE, "tie_word_embeddings": True},
    "qwen2-windows": {**_SHAPE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {**_SHAPE, "head_dim": 16},
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {  # what each type's files may leave out
    "llama": {"tie_word_embeddings": False, "bias": frozenset()},
    "mistral": {
        "tie_word_embeddings": False,
        "bias": frozenset(),
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"tie_word_embeddings": False, "bias": frozenset({"q", "k", "v"})},
    "qwen3": {"tie_word_embeddings": False, "bias": frozenset(), "head_dim": 128},
}


def config(theirs: Mapping[str, Any]) -> ModelConfig:
    """A `config.json` of these families, written by transformers 4 or 5, as our shape."""
    kind = theirs.get("model_type", "llama")
    defaults = DEFAULTS[kind]
    refuse(theirs, partial_rotary_factor=1.0)
    dim, heads = number(theirs, "hidden_size"), number(theirs, "num_attention_heads")
    vocab, length = number(theirs, "vocab_size"), number(theirs, "max_position_embeddings", 2048)
    count = number(theirs, "num_hidden_layers", below=MOST_LAYERS)
    bias = set(defaults["bias"])
    bias |= (
        {"q", "k", "v", "o"}
        if kind in ("llama", "qwen3") and flag(theirs, "attention_bias", False)
        else set()
    )
    bias |= {"mlp"} if kind == "llama" and flag(theirs, "mlp_bias", False) else set()
    return ModelConfig(
        decoder=StackConfig(
            dim=dim,
            layers=count,
            heads=heads,
            kv_heads=number(theirs, "num_key_value_heads", defaults.get("num_key_value_heads", heads)),
            head_dim=number(theirs, "head_dim", defaults.get("head_dim", max(1, dim // heads))),
            hidden=number(theirs, "intermediate_size"),
            norm_eps=real(theirs, "rms_norm_eps", 1e-6),
            activation=choice(theirs, "hidden_act", "silu", ACTIVATIONS),
            bias=frozenset(bias),
            qk_norm=kind == "qwen3",
            position=_rope(theirs, length),
            window=_windows(kind, theirs, count),
        ),
        decoder_input=Tokens(vocab, length),
        head=head_for(
            task_of(theirs, "text"),
            vocab,
            flag(theirs, "tie_word_embeddings", defaults["tie_word_embeddings"]),
            labels_of(theirs),
        ),
    )


def head_for(task: Task, vocab: int, tied: bool, labels: tuple[str, ...]) -> Head | None:
    """What stands on a decoder for each task: scores of the next token, or of the last token for a whole text."""
    match task:
        case "text":
            return Head(vocab, tied)
        case "embed":
            return None
        case "tag":
            return Head(len(labels), False, True, task="tag", labels=labels)
        case "answer":
            return Head(2, False, True, task="answer")
    return Head(len(labels), False, pool="last", task=task, labels=labels)


def with_task(c: ModelConfig, task: Task, labels: tuple[str, ...]) -> ModelConfig:
    """The same decoder with the head for another task."""
    return replace(c, head=head_for(task, c.vocab, c.tied, labels))


def head_rules(c: ModelConfig) -> tuple[Rule, ...]:
    """The names of each head of a decoder."""
    if c.head is None or c.tied:
        return ()
    if c.head.task == "text":
        return (rule(HEAD, "head.weight"),)
    theirs = "qa_outputs" if c.head.task == "answer" else "score"
    return tuple(rule(*pair) for pair in linear(theirs, "head", c.head.bias))


def _windows(kind: str, theirs: Mapping[str, Any], count: int) -> tuple[int | None, ...]:
    size = theirs.get(
        "sliding_window", DEFAULTS[kind].get("sliding_window", 4096 if "qwen" in kind else None)
    )
    if kind == "llama" or size is None or ("qwen" in kind and not flag(theirs, "use_sliding_window", False)):
        return ()
    number({"sliding_window": size}, "sliding_window")
    full = "full_attention"
    if kind == "mistral":
        types = ["sliding_attention"] * count
    elif theirs.get("layer_types"):
        types = theirs["layer_types"]
    else:
        first = 0 if theirs.get("max_window_layers") == 0 else number(theirs, "max_window_layers", 28)
        types = [full if index < first else "sliding_attention" for index in range(count)]
    known = isinstance(types, list) and all(t in (full, "sliding_attention") for t in types)
    if not known or len(types) != count:
        raise ModelError(
            f"config.json: layer_types must name full_attention or sliding_attention for {count} layers"
        )
    return () if set(types) == {full} else tuple(None if t == full else size for t in types)


def _rope(theirs: Mapping[str, Any], length: int) -> Rope:
    """transformers 5 writes rope_parameters, 4 rope_theta and rope_scaling."""
    given = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"config.json: rope_parameters is {given!r}, not a table of settings")
    base = real(given, "rope_theta", real(theirs, "rope_theta", 10000.0, above=1.0), above=1.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    refuse(given, partial_rotary_factor=1.0)
    if kind == "default":
        return Rope(base)
    kind = choice({"rope_type": kind}, "rope_type", kind, SCALINGS)
    # linear and dynamic count from the declared length, whatever else the file says.
    early = kind in ("linear", "dynamic")
    original = length if early else number(given, "original_max_position_embeddings", length)
    optional: dict[str, Any] = {
        key: real(given, key)
        for key in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale",
                    "mscale_all_dim")
        if given.get(key) not in ((None, 0) if "mscale" in key else (None,))
    }  # fmt: skip
    optional["truncate"] = flag(given, "truncate", True)
    scaling = RopeScaling(kind, real(given, "factor", length / original), original, **optional)
    if kind == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ModelError("config.json: low_freq_factor must be smaller than high_freq_factor")
    return Rope(base, scaling)


def export(c: ModelConfig) -> dict[str, Any] | None:
    """Our shape as the `config.json` of the family that can express it; None where none can."""
    if c.decoder is None or c.encoder is not None or not isinstance(c.decoder.position, Rope):
        return None
    for kind in MODEL_TYPES:
        back = _export(c, kind)
        if config(back) == c:
            return back
    return None


def _export(c: ModelConfig, kind: str) -> dict[str, Any]:
    d, task = c.main, "embed" if c.head is None else c.head.task
    assert isinstance(d.position, Rope)
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    class_name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    back: dict[str, Any] = {
        "architectures": [class_name + ENDINGS.get(task, "ForCausalLM")],
        "model_type": kind,
        "vocab_size": c.vocab,
        "hidden_size": d.dim,
        "intermediate_size": d.hidden,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "hidden_act": names[d.activation],
        "max_position_embeddings": c.length,
        "rms_norm_eps": d.norm_eps,
        "tie_word_embeddings": c.tied,
        "rope_parameters": _rope_export(d.position),
        "rope_theta": d.position.base,  # for readers of the older form
        **({} if c.head is None else described(c.head)),
    }
    if kind in ("llama", "qwen3"):
        back["attention_bias"] = "q" in d.bias
    if kind == "llama":
        back["mlp_bias"] = "mlp" in d.bias
    if kind == "mistral":
        back["sliding_window"] = d.window[0] if d.window else None
    if kind in ("qwen2", "qwen3"):
        sizes = [size for size in d.window if size is not None]
        back |= {"use_sliding_window": bool(sizes), "sliding_window": sizes[0] if sizes else None}
        back["layer_types"] = [
            "sliding_attention" if d.window and d.window[i] else "full_attention" for i in range(d.layers)
        ]
    return back


def _rope_export(rope: Rope) -> dict[str, Any]:
    s = rope.scaling
    if s is None:
        return {"rope_type": "default", "rope_theta": rope.base}
    back: dict[str, Any] = {"rope_type": s.kind, "rope_theta": rope.base, "factor": s.factor}
    back["original_max_position_embeddings"] = s.original_length
    if s.kind == "llama3":
        back |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        back |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
        optional = {
            "attention_factor": s.attention_factor,
            "mscale": s.mscale,
            "mscale_all_dim": s.mscale_all_dim,
        }
        back |= {key: value for key, value in optional.items() if value is not None}
    if s.kind in ("linear", "dynamic"):
        del back["original_max_position_embeddings"]
    return back


def rules(c: ModelConfig) -> tuple[Rule, ...]:
    """The names of these families; which biases and norms exist follows from the shape."""
    d = c.main
    names: list[tuple[str, ...]] = []
    for projection in ("q", "k", "v", "o"):
        names += linear(f"self_attn.{projection}_proj", f"attention.{projection}", projection in d.bias)
    for part in ("gate", "up", "down"):
        names += linear(f"mlp.{part}_proj", f"mlp.{part}", "mlp" in d.bias)
    names += [("input_layernorm.weight", "attention_norm.weight")]
    names += [("post_attention_layernorm.weight", "mlp_norm.weight")]
    if d.qk_norm:
        names += [(f"self_attn.{p}_norm.weight", f"attention.{p}_norm.weight") for p in ("q", "k")]
    return (
        rule(PREFIX + "embed_tokens.weight", "tokens.weight"),
        *layers(d.layers, PREFIX + "layers.{}.", "decoder.blocks.{}.", names),
        rule(PREFIX + "norm.weight", "decoder.norm.weight"),
        *head_rules(c),
    )
