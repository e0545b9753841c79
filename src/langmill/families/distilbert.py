"""DistilBERT. Sanh et al. 2019, arXiv:1910.01108: BERT's layers without segments or pooler, under names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langmill.families.bert import ACTIVATIONS, LEFT
from langmill.families.heads import ENDINGS, described, labels_of, reader_head, task_of
from langmill.families.weights import MOST_LAYERS, Rule, choice, layers, linear, number, refuse, rule
from langmill.model.config import Head, Learned, ModelConfig, StackConfig, Task, Tokens

MODEL_TYPES = ("distilbert",)
PREFIX = "distilbert."
HEAD = "vocab_projector.weight"
OUTSIDE = ("vocab_", "pre_classifier.", "classifier.", "qa_outputs.")
IGNORED = (
    r"distilbert\.embeddings\.position_ids",
    r"vocab_(transform|layer_norm|projector)\.(weight|bias)",  # of another task's file
    r"pre_classifier\.(weight|bias)",
    *LEFT,
)
TINY: dict[str, dict[str, Any]] = {
    "distilbert": {
        "vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64,
    },
}  # fmt: skip


def config(theirs: Mapping[str, Any]) -> ModelConfig:
    """A DistilBERT `config.json` as our shape."""
    # its sinusoids, where it starts from them, are stored as a table
    if (task := task_of(theirs, "embed")) == "text":  # the others have no matrix that could be the embedding
        refuse(theirs, tie_word_embeddings=True)
    dim, heads = number(theirs, "dim", 768), number(theirs, "n_heads", 12)
    vocab, act = number(theirs, "vocab_size", 30522), choice(theirs, "activation", "gelu", ACTIVATIONS)
    return ModelConfig(
        encoder=StackConfig(
            dim=dim,
            layers=number(theirs, "n_layers", 6, MOST_LAYERS),
            heads=heads,
            kv_heads=heads,
            head_dim=max(1, dim // heads),
            hidden=number(theirs, "hidden_dim", 4 * dim),
            norm="layer",
            norm_eps=1e-12,
            activation=act,
            gated=False,
            bias=frozenset({"q", "k", "v", "o", "mlp"}),
            position=Learned(),
            norm_order="post",
            causal=False,
        ),
        encoder_input=Tokens(vocab, number(theirs, "max_position_embeddings", 512), norm=True),
        head=reader_head(task, vocab, act, labels_of(theirs), "relu", None),
    )


def with_task(c: ModelConfig, task: Task, labels: tuple[str, ...]) -> ModelConfig:
    """The same encoder with the head for another task."""
    return replace(c, head=reader_head(task, c.vocab, c.main.activation, labels, "relu", None))


def export(c: ModelConfig) -> dict[str, Any] | None:
    """Our shape as a DistilBERT `config.json`; None where DistilBERT cannot express it."""
    d, task = c.encoder, "embed" if c.head is None else c.head.task
    if d is None or c.decoder is not None:
        return None
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    back = {
        "architectures": ["DistilBert" + ENDINGS.get(task, "ForMaskedLM")],
        "model_type": "distilbert",
        "vocab_size": c.vocab,
        "dim": d.dim,
        "n_layers": d.layers,
        "n_heads": d.heads,
        "hidden_dim": d.hidden,
        "activation": names[d.activation],
        "max_position_embeddings": c.length,
        **({} if c.head is None else described(c.head)),
    }
    return back if config(back) == c else None


def rules(c: ModelConfig) -> tuple[Rule, ...]:
    """DistilBERT's names."""
    table, names = PREFIX + "embeddings.", []
    for part in ("q", "k", "v"):
        names += linear(f"attention.{part}_lin", f"attention.{part}")
    names += linear("attention.out_lin", "attention.o") + linear("sa_layer_norm", "attention_norm")
    names += linear("ffn.lin1", "mlp.up") + linear("ffn.lin2", "mlp.down")
    names += linear("output_layer_norm", "mlp_norm")
    return (
        rule(table + "word_embeddings.weight", "tokens.weight"),
        rule(table + "position_embeddings.weight", "encoder.positions.weight"),
        *(rule(*pair) for pair in linear(table + "LayerNorm", "encoder.embedding_norm")),
        *layers(c.main.layers, PREFIX + "transformer.layer.{}.", "encoder.blocks.{}.", names),
        *(rule(*pair) for pair in _head(c.head)),
    )


def _head(head: Head | None) -> list[tuple[str, ...]]:
    if head is None:
        return []
    if head.task == "text":
        own = [] if head.tied else [(HEAD, "head.weight")]
        bias = [("vocab_projector.bias", "output_bias" if head.tied else "head.bias")]
        return linear("vocab_transform", "head_dense") + linear("vocab_layer_norm", "head_norm") + bias + own
    if head.task == "answer":
        return linear("qa_outputs", "head")
    before = linear("pre_classifier", "head_dense") if head.transform else []
    return before + linear("classifier", "head")
