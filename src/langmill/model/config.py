"""The shape of a model as frozen data. No torch here: plans and tables read these without loading it.

A new mechanism is one field and the few lines that read it; a field that no family file uses is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from langmill.common.errors import ModelError

Norm = Literal["layer", "rms"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Projection = Literal["q", "k", "v", "o", "mlp"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was trained on.

    linear: positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
    dynamic: the base grows with the running length (NTK-aware).
    llama3: long wavelengths divided by `factor`, short kept, a ramp between (Llama 3.1 model card).
    yarn: the ramp by number of rotations, and attention scaled (Peng et al. 2023, arXiv:2309.00071).
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float
    original_length: int
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions


@dataclass(frozen=True)
class Rope:
    """Rotary positions in the half-split convention (Su et al. 2021, arXiv:2104.09864)."""

    base: float = 10000.0
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class Learned:
    """One learned vector a position, added to the token's (GPT-2)."""


@dataclass(frozen=True)
class Tokens:
    """Input by token ids.

    vocab: rows of the embedding table. length: the longest sequence the model is made for, in tokens.
    """

    vocab: int
    length: int


@dataclass(frozen=True)
class Head:
    """The output layer: `outputs` scores a position; `tied` shares the input embedding's matrix."""

    outputs: int
    tied: bool = True


@dataclass(frozen=True)
class StackConfig:
    """A stack of Transformer blocks.

    dim: width of the residual stream. heads: query heads. kv_heads: key and value heads, a divisor of
    heads (grouped-query attention, arXiv:2305.13245). hidden: width inside the MLP. gated: the MLP is
    down(act(gate(x)) * up(x)) instead of down(act(up(x))). bias: the projections that carry a bias.
    qk_norm: RMS norm of each head's queries and keys. scale: attention's multiplier, None for
    1/sqrt(head_dim). window: for each layer the number of tokens that a token sees, itself included,
    or None for all; empty for all layers None.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    gated: bool = True
    bias: frozenset[Projection] = field(default_factory=frozenset)
    qk_norm: bool = False
    scale: float | None = None
    position: Rope | Learned = Rope()
    window: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "kv_heads", "head_dim", "hidden"):
            if getattr(self, name) < 1:
                raise ModelError(f"the model's {name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ModelError(f"{self.heads} query heads cannot share {self.kv_heads} key heads evenly")
        if isinstance(self.position, Rope) and self.head_dim % 2:
            raise ModelError(f"rotary positions need an even head_dim, not {self.head_dim}")
        if self.window and len(self.window) != self.layers:
            raise ModelError(f"{len(self.window)} windows for {self.layers} layers")


@dataclass(frozen=True)
class ModelConfig:
    """A Transformer: which stacks are present, and what goes in and comes out."""

    decoder: StackConfig
    decoder_input: Tokens
    head: Head

    def __post_init__(self) -> None:
        if self.decoder_input.vocab < 1 or self.decoder_input.length < 1:
            raise ModelError(f"vocabulary and length must be at least 1: {self.decoder_input}")
        if self.head.tied and self.head.outputs != self.decoder_input.vocab:
            raise ModelError(
                f"a tied head has one output a token: {self.head.outputs} outputs, "
                f"{self.decoder_input.vocab} tokens"
            )

    @property
    def vocab(self) -> int:
        return self.decoder_input.vocab

    @property
    def length(self) -> int:
        return self.decoder_input.length


@dataclass(frozen=True)
class LSTMConfig:
    """Embedding, LSTM layers, softmax over the vocabulary (Hochreiter & Schmidhuber 1997).

    dim: width of the embedding. hidden: width of the LSTM. A tied head needs hidden == dim.
    length: the longest sequence that training shows it; the recurrence itself has no limit.
    """

    vocab: int
    length: int
    dim: int
    hidden: int
    layers: int = 2
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab", "length", "dim", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ModelError(f"the model's {name} is {getattr(self, name)}; it must be at least 1")
        if self.tied and self.hidden != self.dim:
            raise ModelError(f"a tied LSTM needs hidden == dim, not {self.hidden} and {self.dim}")


Config = ModelConfig | LSTMConfig  # the shape of any model
