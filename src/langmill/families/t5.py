"""T5, T5 v1.1 and mT5. Raffel et al. 2020, arXiv:1910.10683; Xue et al. 2021, arXiv:2010.11934."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langmill.common.errors import ModelError
from langmill.families.heads import task_of
from langmill.families.weights import MOST_LAYERS, Rule, choice, flag, layers, number, real, rule, token
from langmill.model.config import Head, ModelConfig, Relative, StackConfig, Tokens

MODEL_TYPES = ("t5", "mt5")
PREFIX = ""
HEAD = "lm_head.weight"
OUTSIDE = ()
IGNORED = (
    r"(encoder|decoder)\.embed_tokens\.weight",  # the shared embedding again
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # in old files, never used
)
FORWARD = {
    "relu": ("relu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gelu": ("gelu", False),
    "gated-silu": ("silu", True),
}
SHARED = "shared.weight"  # some files keep it under the name of one of its users alone
USERS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
LENGTH = 512  # what T5 was trained on; its positions have no end
_SHAPE = {
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
}
TINY: dict[str, dict[str, Any]] = {
    "t5": {
        **_SHAPE,
        "num_decoder_layers": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
    },
    "t5-v1.1": {**_SHAPE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {**_SHAPE, "layer_norm_epsilon": 1e-5},
}


def config(theirs: Mapping[str, Any]) -> ModelConfig:
    """A T5 `config.json` as our shape. Only the first T5 scales what goes into its head. A body alone (T5Model) is what
    writes: its matrix of scores is the embedding."""
    kind = theirs.get("model_type", "t5")
    if task_of(theirs, "text") != "text":
        raise ModelError(
            f"config.json: of {kind}, the model that writes is supported, not {theirs['architectures'][0]}"
        )
    vocab, dim = number(theirs, "vocab_size", 32128), number(theirs, "d_model", 512)
    untied = theirs.get("tie_word_embeddings") is False
    scaled = kind == "t5" and flag(theirs, "scale_decoder_outputs", not untied)
    length, start = number(theirs, "n_positions", LENGTH), token(theirs, "decoder_start_token_id", 0, vocab)
    return ModelConfig(
        encoder=_stack(theirs, "encoder", kind, dim),
        encoder_input=Tokens(vocab, length),
        decoder=_stack(theirs, "decoder", kind, dim),
        decoder_input=Tokens(vocab, length, start=start),
        head=Head(vocab, True, scale=dim**-0.5 if scaled else 1.0),
    )


def _stack(theirs: Mapping[str, Any], side: str, kind: str, dim: int) -> StackConfig:
    heads, count = number(theirs, "num_heads", 8), number(theirs, "num_layers", 6, MOST_LAYERS)
    forward = theirs.get("feed_forward_proj") or ("gated-gelu" if kind == "mt5" else "relu")
    activation, gated = choice({"feed_forward_proj": forward}, "feed_forward_proj", "relu", FORWARD)
    buckets, reach = (
        number(theirs, "relative_attention_num_buckets", 32),
        number(theirs, "relative_attention_max_distance", 128),
    )
    if buckets < 4 or reach <= buckets // 2:
        raise ModelError(f"config.json: {buckets} buckets cannot hold distances up to {reach}")
    return StackConfig(
        dim=dim,
        layers=count if side == "encoder" else number(theirs, "num_decoder_layers", count, MOST_LAYERS),
        heads=heads,
        kv_heads=heads,
        head_dim=number(theirs, "d_kv", 64),
        hidden=number(theirs, "d_ff", 2048),
        norm_eps=real(theirs, "layer_norm_epsilon", 1e-6),
        activation=activation,
        gated=gated,
        scale=1.0,
        position=Relative(buckets, reach),
        causal=side == "decoder",
        cross=side == "decoder",
    )


def export(c: ModelConfig) -> dict[str, Any] | None:
    """Our shape as the `config.json` of the one that can express it; None where none can."""
    e, d = c.encoder, c.decoder
    if e is None or d is None or c.head is None or not isinstance(d.position, Relative):
        return None
    # mT5 is the one whose head never scales; the last two entries tell T5's class, if that reads the folder
    scaled = c.head.scale != 1.0
    kind, name = ("t5", "T5") if scaled else ("mt5", "MT5")
    forward = {ours: theirs for theirs, ours in FORWARD.items()}.get((d.activation, d.gated))
    back = {
        "architectures": [name + "ForConditionalGeneration"],
        "model_type": kind,
        "is_encoder_decoder": True,
        "vocab_size": c.vocab,
        "d_model": d.dim,
        "d_kv": d.head_dim,
        "d_ff": d.hidden,
        "num_layers": e.layers,
        "num_decoder_layers": d.layers,
        "num_heads": d.heads,
        "feed_forward_proj": forward,
        "layer_norm_epsilon": d.norm_eps,
        "relative_attention_num_buckets": d.position.buckets,
        "relative_attention_max_distance": d.position.reach,
        "n_positions": c.length,
        "decoder_start_token_id": c.input.start,
        "dropout_rate": 0.0,
        **({} if scaled else {"scale_decoder_outputs": False}),
        **({} if scaled or c.head.tied else {"tie_word_embeddings": False}),
    }
    if forward is None or c.input.start is None:
        return None
    same = config(back)
    return back if c in (same, _untied(same)) else None


def _untied(c: ModelConfig) -> ModelConfig:
    return c if c.head is None else replace(c, head=replace(c.head, tied=False))


def rules(c: ModelConfig) -> tuple[Rule, ...]:
    """The names of all three."""
    found = [rule(SHARED, "tokens.weight")]
    for side, (stack, _) in zip(("encoder", "decoder"), c.stacks, strict=True):
        names = _attention(0, "SelfAttention", "attention")
        names += _attention(1, "EncDecAttention", "cross") if stack.cross else []
        last = 2 if stack.cross else 1
        dense = f"layer.{last}.DenseReluDense."
        ups = (("wi_0", "mlp.gate"), ("wi_1", "mlp.up")) if stack.gated else (("wi", "mlp.up"),)
        names += [(f"{dense}{their}.weight", f"{our}.weight") for their, our in (*ups, ("wo", "mlp.down"))]
        names += [(f"layer.{last}.layer_norm.weight", "mlp_norm.weight")]
        first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found += [rule(first, f"{side}.relative.weight")]
        found += layers(stack.layers, side + ".block.{}.", side + ".blocks.{}.", names)
        found += [rule(f"{side}.final_layer_norm.weight", f"{side}.norm.weight")]
    return (*found, *(() if c.tied else (rule(HEAD, "head.weight"),)))


def _attention(place: int, theirs: str, ours: str) -> list[tuple[str, ...]]:
    where = f"layer.{place}."
    parts = [(f"{where}{theirs}.{part}.weight", f"{ours}.{part}.weight") for part in ("q", "k", "v", "o")]
    return [*parts, (f"{where}layer_norm.weight", f"{ours}_norm.weight")]
