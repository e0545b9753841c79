"""Parameters, operations and bytes in closed form, without building a model."""

from __future__ import annotations

from dataclasses import dataclass

from langmill.model.config import Config, Learned, LSTMConfig, ModelConfig, StackConfig


def parameters(config: Config) -> int:
    """All weights, a tied matrix counted once."""
    if isinstance(config, LSTMConfig):
        recurrent = sum(
            4 * config.hidden * ((config.dim if layer == 0 else config.hidden) + config.hidden + 2)
            for layer in range(config.layers)
        )
        head = 0 if config.tied else config.vocab * config.hidden
        return config.vocab * config.dim + recurrent + head
    c, tokens = config.decoder, config.decoder_input
    embeddings = tokens.vocab * c.dim + (tokens.length * c.dim if isinstance(c.position, Learned) else 0)
    head = 0 if config.head.tied else config.head.outputs * c.dim
    return embeddings + c.layers * _block(c) + _norm(c) + head


def _norm(c: StackConfig) -> int:
    return c.dim * (2 if c.norm == "layer" else 1)


def _block(c: StackConfig) -> int:
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention = c.dim * (2 * queries + 2 * keys)
    attention += sum({"q": queries, "k": keys, "v": keys, "o": c.dim}.get(p, 0) for p in c.bias)
    attention += 2 * c.head_dim if c.qk_norm else 0
    mlp = c.dim * c.hidden * (3 if c.gated else 2)
    mlp += (c.hidden * (2 if c.gated else 1) + c.dim) if "mlp" in c.bias else 0
    return attention + mlp + 2 * _norm(c)


def multiplied(config: Config) -> int:
    """The weights that every token is multiplied with: all but table look-ups, the head included."""
    if isinstance(config, LSTMConfig):
        return parameters(config) - (0 if config.tied else config.vocab * config.dim)
    c, tokens = config.decoder, config.decoder_input
    looked_up = 0 if config.head.tied else tokens.vocab * c.dim
    looked_up += tokens.length * c.dim if isinstance(c.position, Learned) else 0
    return parameters(config) - looked_up


def training_flops(config: Config, length: int) -> float:
    """Operations to train on one token of rows of `length`: 6 a multiplied weight, and attention's.

    Attention is 12 · layers · heads · head_dim a pair of tokens, of which a causal row has (length+1)/2
    a token (Chowdhery et al. 2022, appendix B, halved for causality).
    """
    flops = 6.0 * multiplied(config)
    if isinstance(config, ModelConfig):
        c = config.decoder
        flops += 12.0 * c.layers * c.heads * c.head_dim * (length + 1) / 2
    return flops


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step, by part."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.activations + self.logits


def training_memory(
    config: Config,
    rows: int,
    length: int,
    *,
    element: int = 4,
    checkpointing: bool = False,
    logits_chunk: int | None = None,
) -> Memory:
    """Bytes that a step over `rows` rows of `length` tokens holds at its peak.

    Master weights, gradients and AdamW's two moments are float32. element: bytes of an activation, 4 for
    float32 and 2 for bfloat16. logits_chunk: tokens whose scores exist at once (None: all of them).
    An estimate from the tensors that the backward pass keeps; `langmill plan` measures it too.
    """
    count, tokens = parameters(config), rows * length
    if isinstance(config, LSTMConfig):
        kept = config.layers * (config.hidden * 8 + config.dim) + config.dim
        vocab = config.vocab
    else:
        c, vocab = config.decoder, config.head.outputs
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        # norm in and out twice, q/k before and after rotation, v, attention's result; the MLP's inner tensors
        block = 6 * c.dim + 3 * queries + 3 * keys + c.hidden * (4 if c.gated else 2)
        kept = c.dim * c.layers + block if checkpointing else c.layers * block
        kept += 2 * c.dim
    chunk = min(tokens, logits_chunk or tokens)
    return Memory(4 * count, 4 * count, 8 * count, tokens * kept * element, 2 * 4 * chunk * vocab)
