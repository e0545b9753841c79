"""The shape of a model as frozen data. No torch here: plans and tables read these without loading it.

A new mechanism is one field and the few lines that read it; a field that no family file uses is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from langmill.common.errors import ModelError

if TYPE_CHECKING:
    from langmill.text.tasks import Limit

Norm = Literal["layer", "rms"]
NormOrder = Literal["pre", "post"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Projection = Literal["q", "k", "v", "o", "mlp"]
Pool = Literal["first", "mean", "last"]
Task = Literal["text", "classify", "multilabel", "regress", "tag", "answer", "embed"]


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
    """One learned vector a position, added to the token's (GPT-2).

    offset: rows at the table's beginning that no position uses (BART 2, RoBERTa its pad id + 1).
    """

    offset: int = 0


@dataclass(frozen=True)
class Sinusoidal:
    """Fixed waves added to the token's vector, sines before cosines (Marian; Vaswani et al. 2017, section 3.5)."""


@dataclass(frozen=True)
class Relative:
    """One learned number a head and distance, added to attention's scores (Raffel et al. 2020, section 2.1).

    Distances fall into `buckets`: half of them exact, the rest logarithmic up to `reach`.
    """

    buckets: int = 32
    reach: int = 128


Position = Rope | Learned | Sinusoidal | Relative


@dataclass(frozen=True)
class Tokens:
    """Input by token ids.

    vocab: rows of the embedding table, which an encoder and a decoder share. length: the longest sequence that the
    stack is made for, in tokens. types: kinds of segment with a vector each (BERT: 2), 0 for none. norm: the summed
    vectors are normalised. scale: what the token's vector is multiplied by. start: the id that begins what a decoder
    writes behind an encoder.
    """

    vocab: int
    length: int
    types: int = 0
    norm: bool = False
    scale: float = 1.0
    start: int | None = None

    def __post_init__(self) -> None:
        if self.vocab < 1 or self.length < 1:
            raise ModelError(f"vocabulary and length must be at least 1: {self}")
        if self.start is not None and not 0 <= self.start < self.vocab:
            raise ModelError(f"the decoder starts with id {self.start}, and there are {self.vocab}")


@dataclass(frozen=True)
class Head:
    """The output layer.

    outputs: scores a position, or a document where `pool` says which of its states stand for it; 0: none, what comes
    out is the transformed state. tied: the matrix is the input embedding's. bias: one number a score.
    transform: an activation behind a dense layer of the stack's width, None for neither; transform_norm: then a norm.
    scale: what states are multiplied by before the matrix. task: what the scores mean; labels: their names.
    threshold: of one that points at answers, how much likelier "no answer" must be to be said; None: it never is.
    limit: how texts were cut when it was taught; None where that is not known. Both say how a model is used and are no
    part of its shape: heads that differ in nothing else are equal.
    """

    outputs: int
    tied: bool = True
    bias: bool = False
    transform: Activation | Literal["tanh"] | None = None
    transform_norm: bool = False
    scale: float = 1.0
    pool: Pool | None = None
    task: Task = "text"
    labels: tuple[str, ...] = ()
    threshold: float | None = field(default=0.0, compare=False)
    limit: Limit | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.outputs < 0 or (self.outputs == 0 and (self.tied or self.bias)):
            raise ModelError(f"an output layer of {self.outputs} scores cannot be tied or have a bias")
        if self.labels and len(self.labels) != self.outputs:
            raise ModelError(f"{len(self.labels)} labels for {self.outputs} scores")


@dataclass(frozen=True)
class StackConfig:
    """A stack of Transformer blocks.

    dim: width of the residual stream. heads: query heads. kv_heads: key and value heads, a divisor of
    heads (grouped-query attention, arXiv:2305.13245). hidden: width inside the MLP. gated: the MLP is
    down(act(gate(x)) * up(x)) instead of down(act(up(x))). bias: the projections that carry a bias.
    qk_norm: RMS norm of each head's queries and keys. scale: attention's multiplier, None for
    1/sqrt(head_dim). window: for each layer the number of tokens that a token sees, itself included,
    or None for all; empty for all layers None. norm_order: norms before attention and MLP, with one more at the
    end, or behind their sums (Vaswani et al. 2017). causal: a token sees none that come after it. cross: a second
    attention, to what the encoder made.
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
    position: Position = Rope()
    window: tuple[int | None, ...] = ()
    norm_order: NormOrder = "pre"
    causal: bool = True
    cross: bool = False

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
        if self.window and any(self.window) and not self.causal:
            raise ModelError("a window needs a causal stack")
        if isinstance(self.position, Sinusoidal) and self.dim % 2:
            raise ModelError(f"sinusoidal positions need an even dim, not {self.dim}")


Gaps = Literal["psm", "spm", "blank"]


@dataclass(frozen=True)
class ModelConfig:
    """A Transformer: which stacks are present, and what goes in and comes out.

    A decoder alone writes on, an encoder alone reads; a decoder with `cross` writes about what an encoder reads. The
    head stands on the decoder, or on the encoder where there is none; None: the states themselves come out. gaps: how
    it is asked to fill one (Bavarian et al. 2022, section 3), "spm" where it learned both orders: the text before the
    gap then stands next to what fills it, so that nothing has to be looked up far away; "blank" where a mark stands in
    the gap and once more behind the text (GLM, Du et al. 2022).
    """

    decoder: StackConfig | None = None
    decoder_input: Tokens | None = None
    encoder: StackConfig | None = None
    encoder_input: Tokens | None = None
    head: Head | None = None
    gaps: Gaps = "psm"

    def __post_init__(self) -> None:
        sides = ((self.decoder, self.decoder_input), (self.encoder, self.encoder_input))
        if (
            any((stack is None) != (tokens is None) for stack, tokens in sides)
            or self.decoder is self.encoder
        ):
            raise ModelError("a model has an encoder, a decoder or both, and an input for each")
        both = self.decoder is not None and self.encoder is not None
        if self.decoder is not None and self.decoder.cross != both:
            raise ModelError("a decoder has cross-attention where there is an encoder, and only there")
        if self.encoder is not None and (self.encoder.causal or self.encoder.cross):
            raise ModelError("an encoder is neither causal nor has cross-attention")
        if both and (self.encoder_input.vocab, self.encoder.dim) != (self.vocab, self.main.dim):  # type: ignore[union-attr]
            raise ModelError("encoder and decoder share one embedding: vocabulary and width must agree")
        if self.head is not None and self.head.tied and self.head.outputs != self.vocab:
            raise ModelError(
                f"a tied head has one output a token: {self.head.outputs} outputs, {self.vocab} tokens"
            )

    @property
    def main(self) -> StackConfig:
        """The stack that the head stands on: the decoder, or the encoder where there is none."""
        found = self.decoder or self.encoder
        assert found is not None
        return found

    @property
    def input(self) -> Tokens:
        """What goes into `main`."""
        found = self.decoder_input or self.encoder_input
        assert found is not None
        return found

    @property
    def stacks(self) -> tuple[tuple[StackConfig, Tokens], ...]:
        """The stacks that are present, the encoder first, each with its input."""
        both = ((self.encoder, self.encoder_input), (self.decoder, self.decoder_input))
        return tuple((stack, tokens) for stack, tokens in both if stack is not None and tokens is not None)

    @property
    def vocab(self) -> int:
        return self.input.vocab

    @property
    def length(self) -> int:
        return self.input.length

    @property
    def tied(self) -> bool:
        """Whether the head's matrix is the embedding."""
        return self.head is not None and self.head.tied

    @property
    def rereads(self) -> bool:
        """Whether its decoder reads the encoder's text once more, one token late, so that a text gets one score."""
        both = self.encoder is not None and self.decoder is not None
        return both and self.head is not None and self.head.pool is not None

    @property
    def writes(self) -> bool:
        """Whether it writes text by itself: a decoder without an encoder, with scores over its vocabulary."""
        return self.encoder is None and self.head is not None and self.head.task == "text"


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


def gap_order(config: Config) -> Gaps:
    """How a model is asked to fill a gap."""
    return config.gaps if isinstance(config, ModelConfig) else "psm"
