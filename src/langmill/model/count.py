"""Parameters, operations and bytes in closed form, without building a model."""

from __future__ import annotations

from dataclasses import dataclass

from langmill.model.config import Config, Learned, LSTMConfig, ModelConfig, Relative, StackConfig, Tokens


def parameters(config: Config) -> int:
    """All weights, a tied matrix counted once."""
    if isinstance(config, LSTMConfig):
        recurrent = sum(
            4 * config.hidden * ((config.dim if layer == 0 else config.hidden) + config.hidden + 2)
            for layer in range(config.layers)
        )
        head = 0 if config.tied else config.vocab * config.hidden
        return config.vocab * config.dim + recurrent + head
    stacks = sum(_looked_up(c, tokens) + c.layers * _block(c) for c, tokens in config.stacks)
    norms = sum(_norm(c) * ((c.norm_order == "pre") + tokens.norm) for c, tokens in config.stacks)
    return config.vocab * config.main.dim + stacks + norms + _head(config)


def _looked_up(c: StackConfig, tokens: Tokens) -> int:
    """The tables of a stack beside the embedding: positions, distances, segments."""
    rows = tokens.types + (tokens.length + c.position.offset if isinstance(c.position, Learned) else 0)
    return rows * c.dim + (c.position.buckets * c.heads if isinstance(c.position, Relative) else 0)


def _head(config: ModelConfig) -> int:
    head, dim = config.head, config.main.dim
    if head is None:
        return 0
    matrix = (0 if head.tied else head.outputs * dim) + (head.outputs if head.bias else 0)
    dense = dim * (dim + 1) if head.transform else 0
    return matrix + dense + (_norm(config.main) if head.transform_norm else 0)


def _norm(c: StackConfig) -> int:
    return c.dim * (2 if c.norm == "layer" else 1)


def _block(c: StackConfig) -> int:
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention = c.dim * (2 * queries + 2 * keys)
    attention += sum({"q": queries, "k": keys, "v": keys, "o": c.dim}.get(p, 0) for p in c.bias)
    attention += 2 * c.head_dim if c.qk_norm else 0
    mlp = c.dim * c.hidden * (3 if c.gated else 2)
    mlp += (c.hidden * (2 if c.gated else 1) + c.dim) if "mlp" in c.bias else 0
    return (2 if c.cross else 1) * (attention + _norm(c)) + mlp + _norm(c)


def multiplied(config: Config) -> int:
    """The weights that every token is multiplied with: all but table look-ups, the head included."""
    if isinstance(config, LSTMConfig):
        return parameters(config) - (0 if config.tied else config.vocab * config.dim)
    tied = config.head is not None and config.head.tied
    looked_up = 0 if tied else config.vocab * config.main.dim
    return parameters(config) - looked_up - sum(_looked_up(c, tokens) for c, tokens in config.stacks)


def training_flops(config: Config, length: int) -> float:
    """Operations to train on one token of rows of `length`: 6 a multiplied weight, and attention's.

    Attention is 12 · layers · heads · head_dim a pair of tokens, of which a causal row has (length+1)/2
    a token (Chowdhery et al. 2022, appendix B, halved for causality). With an encoder and a decoder: a token of both.
    """
    flops = 6.0 * multiplied(config)
    if isinstance(config, ModelConfig):
        for c, _ in config.stacks:
            seen = ((length + 1) / 2 if c.causal else length) + (length if c.cross else 0)
            flops += 12.0 * c.layers * c.heads * c.head_dim * seen
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
        vocab = 0 if config.head is None else config.head.outputs
        kept = sum(_kept(c, checkpointing) for c, _ in config.stacks) + 2 * config.main.dim
    chunk = min(tokens, logits_chunk or tokens)
    return Memory(4 * count, 4 * count, 8 * count, tokens * kept * element, 2 * 4 * chunk * vocab)


def _kept(c: StackConfig, checkpointing: bool) -> int:
    """Numbers a token that a stack keeps for the backward pass."""
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    # norm in and out twice, q/k before and after rotation, v, attention's result; the MLP's inner tensors
    block = 6 * c.dim + 3 * queries + 3 * keys + c.hidden * (4 if c.gated else 2)
    block += 2 * c.dim + 2 * queries + 2 * keys if c.cross else 0
    return c.dim * c.layers + block if checkpointing else c.layers * block
