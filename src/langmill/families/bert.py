"""BERT. Devlin et al. 2018, arXiv:1810.04805; sentence encoders of its shape, such as MiniLM (arXiv:2002.10957)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langmill.families.heads import ENDINGS, described, labels_of, reader_head, task_of
from langmill.families.weights import MOST_LAYERS, Rule, choice, layers, linear, number, real, refuse, rule
from langmill.model.config import Head, Learned, ModelConfig, StackConfig, Task, Tokens

MODEL_TYPES = ("bert",)
PREFIX = "bert."
HEAD = "cls.predictions.decoder.weight"
OUTSIDE = ("cls.", "classifier.", "qa_outputs.")
LEFT = (r"classifier\.(weight|bias)", r"qa_outputs\.(weight|bias)")  # heads of other tasks, left in the file
IGNORED = (
    r"bert\.embeddings\.position_ids",  # 0, 1, 2, …, kept as a buffer by old files
    r"cls\.seq_relationship\..*",  # next-sentence prediction, which only pretraining used
    r"cls\.predictions\.decoder\.bias",  # the bias again
    r"cls\.predictions\.(bias|decoder\.weight|transform\.(dense|LayerNorm)\.(weight|bias))",  # of another task's file
    r"bert\.pooler\..*",  # where the head does not stand on it
    *LEFT,
)
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "bert": SHAPE,
    "bert-plain": {**SHAPE, "hidden_act": "relu", "type_vocab_size": 1},
}


def config(theirs: Mapping[str, Any]) -> ModelConfig:
    """A BERT `config.json` as our shape."""
    return encoder(theirs, length=number(theirs, "max_position_embeddings", 512), offset=0, eps=1e-12)


def encoder(theirs: Mapping[str, Any], *, length: int, offset: int, eps: float) -> ModelConfig:
    """The shape that BERT and RoBERTa share. offset: rows of the position table before the first position's."""
    refuse(theirs, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    if (task := task_of(theirs, "embed")) == "text":  # the others have no matrix that could be the embedding
        refuse(theirs, tie_word_embeddings=True)
    dim, heads = number(theirs, "hidden_size", 768), number(theirs, "num_attention_heads", 12)
    vocab, act = number(theirs, "vocab_size", 30522), choice(theirs, "hidden_act", "gelu", ACTIVATIONS)
    return ModelConfig(
        encoder=StackConfig(
            dim=dim,
            layers=number(theirs, "num_hidden_layers", 12, MOST_LAYERS),
            heads=heads,
            kv_heads=heads,
            head_dim=max(1, dim // heads),
            hidden=number(theirs, "intermediate_size", 3072),
            norm="layer",
            norm_eps=real(theirs, "layer_norm_eps", eps),
            activation=act,
            gated=False,
            bias=frozenset({"q", "k", "v", "o", "mlp"}),
            position=Learned(offset),
            norm_order="post",
            causal=False,
        ),
        encoder_input=Tokens(vocab, length, types=number(theirs, "type_vocab_size", 2), norm=True),
        head=head_for(task, vocab, act, labels_of(theirs)),
    )


def head_for(task: Task, vocab: int, activation: Any, labels: tuple[str, ...]) -> Head | None:
    """What stands on the encoder for each task; for embed the pooler, which `adjust` drops where a file has none."""
    pooler = Head(0, False, transform="tanh", pool="first", task="embed")
    return reader_head(task, vocab, activation, labels, "tanh", pooler)


def adjust(c: ModelConfig, names: Mapping[str, Any], prefix: str = PREFIX) -> ModelConfig:
    """Without a pooler in the file (sentence encoders often have none) the states themselves come out."""
    pooler = c.head is not None and c.head.outputs == 0
    return replace(c, head=None) if pooler and prefix + "pooler.dense.weight" not in names else c


def with_task(c: ModelConfig, task: Task, labels: tuple[str, ...]) -> ModelConfig:
    """The same encoder with the head for another task."""
    return replace(c, head=head_for(task, c.vocab, c.main.activation, labels))


def export(c: ModelConfig) -> dict[str, Any] | None:
    """Our shape as a BERT `config.json`; None where BERT cannot express it."""
    return written(c, "bert", "Bert", config)


def written(c: ModelConfig, kind: str, name: str, read: Any) -> dict[str, Any] | None:
    """The `config.json` of a family of BERT's shape, where `read` makes the same shape of it again."""
    d, task = c.encoder, "embed" if c.head is None else c.head.task
    if d is None or c.decoder is not None or not isinstance(d.position, Learned):
        return None
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    back = {
        "architectures": [name + ENDINGS.get(task, "ForMaskedLM")],
        "model_type": kind,
        "vocab_size": c.vocab,
        "hidden_size": d.dim,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "intermediate_size": d.hidden,
        "hidden_act": names[d.activation],
        "max_position_embeddings": c.length + d.position.offset,
        "type_vocab_size": c.input.types,
        "layer_norm_eps": d.norm_eps,
        **({} if d.position.offset == 0 else {"pad_token_id": d.position.offset - 1}),
        **({} if c.head is None else described(c.head)),
    }
    if not c.input.types:
        return None
    same = read(back)
    return back if c == (replace(same, head=None) if c.head is None else same) else None


def rules(c: ModelConfig) -> tuple[Rule, ...]:
    """BERT's names."""
    return (*body(c, PREFIX), *_head(c))


def body(c: ModelConfig, prefix: str) -> tuple[Rule, ...]:
    """The names of the encoder and what goes into it, shared with RoBERTa."""
    table, names = prefix + "embeddings.", []
    for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v")):
        names += linear(f"attention.self.{theirs}", f"attention.{ours}")
    names += linear("attention.output.dense", "attention.o")
    names += linear("attention.output.LayerNorm", "attention_norm")
    names += linear("intermediate.dense", "mlp.up") + linear("output.dense", "mlp.down")
    names += linear("output.LayerNorm", "mlp_norm")
    return (
        rule(table + "word_embeddings.weight", "tokens.weight"),
        rule(table + "position_embeddings.weight", "encoder.positions.weight"),
        rule(table + "token_type_embeddings.weight", "encoder.types.weight"),
        *(rule(*pair) for pair in linear(table + "LayerNorm", "encoder.embedding_norm")),
        *layers(c.main.layers, prefix + "encoder.layer.{}.", "encoder.blocks.{}.", names),
    )


def _head(c: ModelConfig) -> list[Rule]:
    head, pairs = c.head, []
    if head is None:
        return []
    if head.task == "text":
        pairs += linear("cls.predictions.transform.dense", "head_dense")
        pairs += linear("cls.predictions.transform.LayerNorm", "head_norm")
        pairs += [("cls.predictions.bias", "output_bias" if head.tied else "head.bias")]
        pairs += [] if head.tied else [(HEAD, "head.weight")]
    elif head.task == "answer":
        pairs += linear("qa_outputs", "head")
    else:
        pairs += linear(PREFIX + "pooler.dense", "head_dense") if head.transform else []
        pairs += linear("classifier", "head") if head.outputs else []
    return [rule(*pair) for pair in pairs]
