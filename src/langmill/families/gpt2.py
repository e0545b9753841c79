"""GPT-2. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langmill.families.heads import ENDINGS, described, labels_of, task_of
from langmill.families.llama import head_for, head_rules
from langmill.families.llama import with_task as with_task
from langmill.families.weights import MOST_LAYERS, Rule, choice, flag, layers, number, real, refuse, rule
from langmill.model.config import Learned, ModelConfig, StackConfig, Tokens

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."
HEAD = "lm_head.weight"
OUTSIDE = ("lm_head.", "score.", "classifier.", "qa_outputs.")
IGNORED = (
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)  # the causal mask, kept as a buffer by old files
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt2-unscaled": {
        "vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 48,
        "activation_function": "relu", "scale_attn_weights": False, "tie_word_embeddings": False,
    },
}  # fmt: skip


def config(theirs: Mapping[str, Any]) -> ModelConfig:
    """A GPT-2 `config.json` as our shape."""
    refuse(theirs, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    dim, heads = number(theirs, "n_embd", 768), number(theirs, "n_head", 12)
    vocab = number(theirs, "vocab_size", 50257)
    return ModelConfig(
        decoder=StackConfig(
            dim=dim,
            layers=number(theirs, "n_layer", 12, MOST_LAYERS),
            heads=heads,
            kv_heads=heads,
            head_dim=dim // heads,
            hidden=number(theirs, "n_inner", 4 * dim),
            norm="layer",
            norm_eps=real(theirs, "layer_norm_epsilon", 1e-5),
            activation=choice(theirs, "activation_function", "gelu_new", ACTIVATIONS),
            gated=False,
            bias=frozenset({"q", "k", "v", "o", "mlp"}),
            scale=None if flag(theirs, "scale_attn_weights", True) else 1.0,
            position=Learned(),
        ),
        decoder_input=Tokens(vocab, number(theirs, "n_positions", 1024)),
        head=head_for(
            task_of(theirs, "text"), vocab, flag(theirs, "tie_word_embeddings", True), labels_of(theirs)
        ),
    )


def export(c: ModelConfig) -> dict[str, Any] | None:
    """Our shape as a GPT-2 `config.json`; None where GPT-2 cannot express it."""
    d = c.main
    if c.decoder is None or c.encoder is not None or not isinstance(d.position, Learned):
        return None
    task = "embed" if c.head is None else c.head.task
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    back = {
        "architectures": ["GPT2" + ENDINGS.get(task, "LMHeadModel")],
        "model_type": "gpt2",
        "vocab_size": c.vocab,
        "n_positions": c.length,
        "n_embd": d.dim,
        "n_layer": d.layers,
        "n_head": d.heads,
        "n_inner": d.hidden,
        "activation_function": names[d.activation],
        "layer_norm_epsilon": d.norm_eps,
        "scale_attn_weights": d.scale is None,
        "tie_word_embeddings": c.tied,
        **({} if c.head is None else described(c.head)),
        # none by default here; said, so that other tools continue the same way
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return back if config(back) == c else None


def rules(c: ModelConfig) -> tuple[Rule, ...]:
    """GPT-2's names: fused q, k, v in Conv1D layers, which store (inputs, outputs)."""
    theirs, ours, count = PREFIX + "h.{}.", "decoder.blocks.{}.", c.main.layers
    matrices = [
        ("attn.c_attn.weight", "attention.q.weight", "attention.k.weight", "attention.v.weight"),
        ("attn.c_proj.weight", "attention.o.weight"),
        ("mlp.c_fc.weight", "mlp.up.weight"),
        ("mlp.c_proj.weight", "mlp.down.weight"),
    ]
    vectors = [tuple(name.replace("weight", "bias") for name in names) for names in matrices]
    for norm_theirs, norm_ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
        vectors += [(f"{norm_theirs}.{part}", f"{norm_ours}.{part}") for part in ("weight", "bias")]
    return (
        rule(PREFIX + "wte.weight", "tokens.weight"),
        rule(PREFIX + "wpe.weight", "decoder.positions.weight"),
        *layers(count, theirs, ours, matrices, transposed=True),
        *layers(count, theirs, ours, vectors),
        rule(PREFIX + "ln_f.weight", "decoder.norm.weight"),
        rule(PREFIX + "ln_f.bias", "decoder.norm.bias"),
        *head_rules(c),
    )
