"""BART and Marian. Lewis et al. 2019, arXiv:1910.13461; Junczys-Dowmunt et al. 2018, arXiv:1804.00344."""

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
    refuse,
    rule,
    token,
)
from langmill.model.config import Head, Learned, ModelConfig, Sinusoidal, StackConfig, Task, Tokens

MODEL_TYPES = ("bart", "marian")
PREFIX = "model."
HEAD = "lm_head.weight"
OUTSIDE = ("lm_head.", "final_logits_bias", "classification_head.", "qa_outputs.")
SCORED = ("classify", "multilabel", "regress")
OFFSET = 2  # rows of BART's position tables that nothing uses, since fairseq counted padding
IGNORED = (
    r"model\.(encoder|decoder)\.embed_tokens\.weight",  # the shared embedding again
    r"model\.(encoder|decoder)\.version",
    r"model\.(encoder|decoder)\.embed_positions\.weight",  # Marian's old files keep what is computed
    r"classification_head\.(dense|out_proj)\.(weight|bias)",  # of another task's file, as the next two
    r"qa_outputs\.(weight|bias)",
    r"final_logits_bias|lm_head\.weight",
)
SHARED = "model.shared.weight"  # some files keep it under the name of one of its users alone
USERS = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
}
_SHAPE = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "bart": _SHAPE,
    "bart-scaled": {**_SHAPE, "scale_embedding": True, "activation_function": "relu", "decoder_start_token_id": 0},
    "marian": {
        **_SHAPE, "pad_token_id": 96, "decoder_start_token_id": 96, "eos_token_id": 0, "scale_embedding": True,
        "activation_function": "swish",
    },
}  # fmt: skip


def config(theirs: Mapping[str, Any]) -> ModelConfig:
    """A BART or Marian `config.json` as our shape. A body alone, as facebook/bart-base is announced, is what writes:
    its matrix of scores is the embedding."""
    kind = theirs.get("model_type", "bart")
    refuse(theirs, share_encoder_decoder_embeddings=True, tie_word_embeddings=True, normalize_before=False)
    refuse(
        theirs,
        add_final_layer_norm=False,
        normalize_embedding=kind == "bart",
        static_position_embeddings=kind == "marian",
    )
    task = task_of(theirs, "text")
    if task != "text" and (kind != "bart" or task not in SCORED):
        fitting = "models that write and that classify are" if kind == "bart" else "model that writes is"
        raise ModelError(f"config.json: of {kind}, the {fitting} supported, not {theirs['architectures'][0]}")
    dim, vocab = number(theirs, "d_model", 1024), number(theirs, "vocab_size", 50265)
    refuse(theirs, decoder_vocab_size=vocab)
    scale = dim**0.5 if flag(theirs, "scale_embedding", False) else 1.0
    length, start = (
        number(theirs, "max_position_embeddings", 1024),
        token(theirs, "decoder_start_token_id", 2, vocab),
    )
    return ModelConfig(
        encoder=_stack(theirs, "encoder", kind, dim),
        encoder_input=Tokens(vocab, length, norm=kind == "bart", scale=scale),
        decoder=_stack(theirs, "decoder", kind, dim),
        decoder_input=Tokens(vocab, length, norm=kind == "bart", scale=scale, start=start),
        head=Head(vocab, True, True) if task == "text" else _scored(task, labels_of(theirs)),
    )


def _scored(task: Task, labels: tuple[str, ...]) -> Head:
    """On the state of a text's last token, eos, of which the decoder has read all tokens before (section 3.2)."""
    return Head(len(labels), False, True, "tanh", pool="last", task=task, labels=labels)


def with_task(c: ModelConfig, task: Task, labels: tuple[str, ...]) -> ModelConfig:
    """The same stacks with the head for another task; ModelError where other tools have no such head."""
    if task not in SCORED or isinstance(c.main.position, Sinusoidal):
        kind = "marian" if isinstance(c.main.position, Sinusoidal) else "bart"
        raise ModelError(f"models of type {kind} cannot {task}: choose an encoder such as BERT, or a decoder")
    return replace(c, head=_scored(task, labels))


def _stack(theirs: Mapping[str, Any], side: str, kind: str, dim: int) -> StackConfig:
    heads = number(theirs, f"{side}_attention_heads", 16)
    return StackConfig(
        dim=dim,
        layers=number(theirs, f"{side}_layers", 12, MOST_LAYERS),
        heads=heads,
        kv_heads=heads,
        head_dim=max(1, dim // heads),
        hidden=number(theirs, f"{side}_ffn_dim", 4096),
        norm="layer",
        norm_eps=1e-5,
        activation=choice(theirs, "activation_function", "gelu", ACTIVATIONS),
        gated=False,
        bias=frozenset({"q", "k", "v", "o", "mlp"}),
        position=Learned(OFFSET) if kind == "bart" else Sinusoidal(),
        norm_order="post",
        causal=side == "decoder",
        cross=side == "decoder",
    )


def export(c: ModelConfig) -> dict[str, Any] | None:
    """Our shape as the `config.json` of the one that can express it; None where neither can."""
    e, d, read = c.encoder, c.decoder, c.encoder_input
    if e is None or d is None or read is None or c.head is None:
        return None
    kind, name = (
        ("marian", "MarianMTModel")
        if isinstance(d.position, Sinusoidal)
        else ("bart", "Bart" + ENDINGS.get(c.head.task, "ForConditionalGeneration"))
    )
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    back: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        "is_encoder_decoder": True,
        "vocab_size": c.vocab,
        "d_model": d.dim,
        "activation_function": names[d.activation],
        "scale_embedding": read.scale != 1.0,
        "max_position_embeddings": c.length,
        "decoder_start_token_id": c.input.start,
        "forced_eos_token_id": None,
        # none by default here; said, so that other tools continue the same way
        "dropout": 0.0,
        **described(c.head),
    }
    if kind == "marian":
        back["pad_token_id"] = c.input.start  # Marian begins with the padding id
    for side, stack in (("encoder", e), ("decoder", d)):
        back |= {f"{side}_layers": stack.layers, f"{side}_attention_heads": stack.heads}
        back[f"{side}_ffn_dim"] = stack.hidden
    return back if c.input.start is not None and config(back) == c else None


def rules(c: ModelConfig) -> tuple[Rule, ...]:
    """The names of both."""
    found = [rule(SHARED, "tokens.weight")]
    for side, (stack, tokens) in zip(("encoder", "decoder"), c.stacks, strict=True):
        where = f"{PREFIX}{side}."
        if isinstance(stack.position, Learned):
            found += [rule(where + "embed_positions.weight", f"{side}.positions.weight")]
        if tokens.norm:
            found += [rule(*pair) for pair in linear(where + "layernorm_embedding", f"{side}.embedding_norm")]
        names = _attention("self_attn", "attention") + linear("self_attn_layer_norm", "attention_norm")
        if stack.cross:
            names += _attention("encoder_attn", "cross") + linear("encoder_attn_layer_norm", "cross_norm")
        names += linear("fc1", "mlp.up") + linear("fc2", "mlp.down") + linear("final_layer_norm", "mlp_norm")
        found += layers(stack.layers, where + "layers.{}.", side + ".blocks.{}.", names)
    if c.head is not None and c.head.task != "text":
        names = linear("classification_head.dense", "head_dense")
        names += linear("classification_head.out_proj", "head")
        return (*found, *(rule(*pair) for pair in names))
    bias = Rule("final_logits_bias", ("output_bias" if c.tied else "head.bias",), row=True, zero=True)
    return (*found, bias, *(() if c.tied else (rule(HEAD, "head.weight"),)))


def _attention(theirs: str, ours: str) -> list[tuple[str, ...]]:
    parts = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o"))
    return [pair for part, own in parts for pair in linear(f"{theirs}.{part}", f"{ours}.{own}")]
