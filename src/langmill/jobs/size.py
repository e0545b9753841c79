"""One dial, `size`, behind which stand depth, width, heads, row length, micro-batch and learning rate.

The rules are smooth, so that a size between two names lies between their shapes:

- Loss depends on the number of parameters and hardly on the shape (Kaplan et al. 2020, arXiv:2001.08361, section
  3.1), so the shape is chosen for speed: width 64 a layer up to 12 layers, as in GPT-3 125M, and beyond it layers
  grow as width^0.7, which passes near GPT-3 XL (24 x 2048) and Llama (32 x 4096).
- The MLP is 8/3 as wide as the stream where it is gated (Touvron et al. 2023, arXiv:2302.13971), else 4 times.
- An encoder and a decoder share the layers: half of them each.
- Heads are 64 wide; keys are shared by 4 heads from 16 heads on (Ainslie et al. 2023, arXiv:2305.13245).
- The learning rate falls as 1/width (Yang et al. 2022, arXiv:2203.03466), so that GPT-3's and Llama's sizes get
  about theirs and small models the higher ones that short runs like best (measured, LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from langmill.common.errors import SettingsError
from langmill.common.settings import ModelSettings, TrainSettings, parse_count
from langmill.model.config import (
    Activation,
    Config,
    Head,
    Learned,
    LSTMConfig,
    ModelConfig,
    Position,
    Relative,
    Rope,
    Sinusoidal,
    StackConfig,
    Tokens,
)
from langmill.model.count import parameters

NAMED = {
    "tiny": 1_000_000,
    "mini": 4_000_000,
    "small": 14_000_000,
    "base": 60_000_000,
    "medium": 160_000_000,
    "large": 350_000_000,
    "xl": 1_300_000_000,
}
WRITERS = ("llama", "gpt2", "qwen3", "lstm")
FAMILIES = {
    "causal": WRITERS,
    "infill": WRITERS,
    "blanks": WRITERS,
    "masked": ("bert",),
    "denoise": ("marian", "t5"),
}  # by objective
BOTH = ("marian", "t5")  # an encoder and a decoder
PLAIN = ("gpt2", "bert", "marian")  # MLPs without a gate, biases, layer norms
MULTIPLE = 64  # widths in whole tiles of every matrix unit
WIDEST = 16_384
TIED_BELOW = 2_000_000_000


def target(size: str) -> int:
    """The number of parameters that a name or a count such as "10M" asks for; SettingsError where it is neither."""
    if size in NAMED:
        return NAMED[size]
    try:
        count = parse_count(size)
    except ValueError:
        count = 0
    if count < 10_000:
        raise SettingsError(
            f'"{size}" is no size: give {", ".join(NAMED)} or a parameter count from 10k on, such as 10M'
        )
    return count


def family_of(family: str | None, objective: str) -> str:
    """The family to train by an objective, its first one where none is named; SettingsError for one that cannot be."""
    fitting = FAMILIES[objective]
    if family in (None, *fitting):
        return family or fitting[0]
    others = [name for name, families in FAMILIES.items() if family in families]
    raise SettingsError(
        f"train.objective={objective} trains {', '.join(fitting)}; {family} is trained by {' or '.join(others)}"
    )


def resolve(
    model: ModelSettings, train: TrainSettings, vocab: int, shape: Config | None = None, start: int = 0
) -> tuple[Config, TrainSettings]:
    """The shape for `vocab` tokens, and the training settings with nothing left to choose by size.

    `shape` given (a loaded model's) is kept, and the training settings follow from it. start: the id that begins what
    a decoder writes behind an encoder.
    """
    if shape is None:
        model = model.model_copy(update={"family": family_of(model.family, train.objective)})
    count = parameters(shape) if shape else target(model.size)
    length = train.max_length or (min(row_length(count), shape.length) if shape else row_length(count))
    if isinstance(shape, ModelConfig) and length > shape.length:
        raise SettingsError(
            f"train.max_length is {length}; the model was made for {shape.length} tokens at most"
        )
    config = shape or config_for(model, vocab, length, start)
    width = config.hidden if isinstance(config, LSTMConfig) else config.main.dim
    chosen = {
        "max_length": length,
        "micro_batch_size": train.micro_batch_size or micro_batch(count, length),
        "learning_rate": train.learning_rate or learning_rate(width) / _slower(config, shape is not None),
    }
    return config, train.model_copy(update=chosen)


FURTHER = 4  # a trained model goes on at a quarter of the rate it would start with (Ibrahim et al. 2024, 2403.08763)
# Norms behind the sums bear less (Xiong et al. 2020, 2002.04745): at 6e-3 masked loss did not get below frequencies'.
POST_NORM = 4


def _slower(config: Config, trained: bool) -> int:
    if trained:
        return FURTHER
    return POST_NORM if isinstance(config, ModelConfig) and config.main.norm_order == "post" else 1


def row_length(count: int) -> int:
    """Tokens in a row: 256 for 1 M parameters, 512 for 14 M, 1024 for 160 M, 2048 for 1.3 B; a power of two."""
    return int(2 ** round(math.log2(512 * (count / 14e6) ** 0.25)))


def micro_batch(count: int, length: int) -> int:
    """Rows in one pass: about 2,000 tokens for 1 M parameters, 4,000 for 14 M, 16,000 for 1.3 B; a power of two.

    Small on purpose: within a given time more steps teach more than larger ones until a run is days long
    (McCandlish et al. 2018, arXiv:1812.06162). `gradient_accumulation_steps` makes the batch larger.
    """
    return int(2 ** max(0, round(math.log2(4096 * (count / 14e6) ** 0.3 / length))))


def learning_rate(width: int) -> float:
    """AdamW's peak rate: 1e-3 at width 768, falling as 1/width, at most 6e-3."""
    return min(6e-3, 1e-3 * 768 / width)


def largest_vocabulary(count: int) -> int:
    """The vocabulary whose table takes about a third of `count` parameters; a multiple of 64, at least 512."""
    width = MULTIPLE * max(1, round((count / 12 / MULTIPLE**2) ** (1 / 3) * 0.75))
    return max(512, count // 3 // width // MULTIPLE * MULTIPLE)


def config_for(model: ModelSettings, vocab: int, length: int, start: int = 0) -> Config:
    """The shape nearest to the size asked for; numbers given in the settings stay as given.

    Raises SettingsError where `vocab` tokens leave no room for a model of this size, or the numbers do not fit
    together.
    """
    count = target(model.size)
    if model.family == "lstm":
        return _lstm(model, count, vocab, length)
    tied = model.tied if model.tied is not None else count < TIED_BELOW
    if model.family in ("bert", *BOTH) and not tied:
        if model.tied is False:
            raise SettingsError(
                f"{model.family} shares the embedding with the output layer: leave model.tied out"
            )
        tied = True
    best = min(
        _candidates(model, count, vocab, Tokens(vocab, length, start=start), tied),
        key=lambda found: found[0],
        default=None,
    )
    if best is None:
        raise SettingsError(
            "model.dim, model.heads and model.kv_heads do not fit together: heads must divide dim evenly"
        )
    config = best[1]
    if (model.dim is None or model.layers is None) and not 0.8 < parameters(config) / count < 1.25:
        raise _no_room(count, parameters(config), vocab)
    return config


def _no_room(count: int, reached: int, vocab: int) -> SettingsError:
    return SettingsError(
        f"a vocabulary of {vocab} and the numbers given do not fit into {count:,} parameters (nearest: {reached:,}): "
        f"choose a larger --size, or tokenizer.vocab_size={largest_vocabulary(count)} at most"
    )


def _candidates(
    model: ModelSettings, count: int, vocab: int, tokens: Tokens, tied: bool
) -> Iterator[tuple[float, ModelConfig]]:
    """Shapes and how far each lies from the rules: in parameters first, then in depth and in the MLP's width."""
    widest = max(MULTIPLE, min(WIDEST, int(1.25 * count / vocab)))
    gated, sides = model.family not in PLAIN, 2 if model.family in BOTH else 1
    # From 1024 on in steps of 256, so that heads come in fours that can share keys.
    widths = [*range(MULTIPLE, min(widest, 1024) + 1, MULTIPLE), *range(1280, widest + 1, 256)]
    for dim in [model.dim] if model.dim else widths:
        usual = _depth(dim) / sides
        ideal = dim * (8 / 3 if gated else 4)
        for layers in (
            [model.layers] if model.layers else range(max(1, round(usual * 0.6)), round(usual * 1.7) + 2)
        ):
            for hidden in _widths(model, count, vocab, dim, layers, ideal, tied):
                config = _shape(model, dim, layers, hidden, tokens, tied)
                if config is None:
                    continue
                missed = abs(math.log(parameters(config) / count))
                yield 8 * missed + abs(math.log(layers / usual)) + abs(math.log(hidden / ideal)), config


def _depth(dim: int) -> float:
    return dim / 64 if dim <= 768 else 12 * (dim / 768) ** 0.7


def _widths(
    model: ModelSettings, count: int, vocab: int, dim: int, layers: int, ideal: float, tied: bool
) -> Iterator[int]:
    """The usual width of the MLP, and the one that meets the count if it is not far from usual."""
    if model.hidden:
        yield model.hidden
        return
    usual = max(MULTIPLE, round(ideal / MULTIPLE) * MULTIPLE)
    yield usual
    if model.dim and model.layers:
        return
    # a decoder that reads an encoder has a second attention
    matrices, sides, attentions = (2 if model.family in PLAIN else 3), 1, 1
    if model.family in BOTH:
        sides, attentions = 2, 3
    rest = count - vocab * dim * (1 if tied else 2) - layers * attentions * 4 * dim * dim
    exact = round(rest / (layers * sides * matrices * dim) / MULTIPLE) * MULTIPLE
    reach = 1.6 if sides == 1 else 2.0  # a pair of layers is a larger step
    if exact != usual and ideal / reach <= exact <= ideal * reach:
        yield exact


def _shape(
    model: ModelSettings, dim: int, layers: int, hidden: int, tokens: Tokens, tied: bool
) -> ModelConfig | None:
    """The configuration of a family with these numbers; None where heads do not divide the width."""
    stack, vocab = _stack(model, dim, layers, hidden), tokens.vocab
    if stack is None:
        return None
    match model.family:
        case "bert":
            encoder = replace(stack, causal=False, norm_order="post", norm_eps=1e-12)
            head = Head(vocab, bias=True, transform="gelu", transform_norm=True)
            read = replace(tokens, start=None, types=2, norm=True)
            return ModelConfig(encoder=encoder, encoder_input=read, head=head)
        case "marian":
            stack, tokens = replace(stack, norm_order="post"), replace(tokens, scale=dim**0.5)
        case "t5":
            stack = replace(stack, scale=1.0)
        case _:
            return ModelConfig(stack, replace(tokens, start=None), head=Head(vocab, tied))
    return ModelConfig(
        decoder=replace(stack, cross=True),
        decoder_input=tokens,
        encoder=replace(stack, causal=False),
        encoder_input=replace(tokens, start=None),
        head=Head(vocab, bias=model.family == "marian"),
    )


ACTIVATIONS: dict[str, Activation] = {
    "gpt2": "gelu_tanh",
    "bert": "gelu",
    "marian": "silu",
    "t5": "gelu_tanh",
}
POSITIONS: dict[str, Position] = {
    "gpt2": Learned(), "bert": Learned(), "marian": Sinusoidal(), "t5": Relative(),
}  # fmt: skip


def _stack(model: ModelSettings, dim: int, layers: int, hidden: int) -> StackConfig | None:
    """The stack of a family, before what tells an encoder from a decoder; None where heads do not divide the width."""
    family = model.family or WRITERS[0]
    heads = model.heads or max(1, dim // 64)
    if dim % heads or (dim // heads) % 2:
        return None
    shared = model.kv_heads or (heads // 4 if heads >= 16 and heads % 4 == 0 else heads)
    if heads % shared:
        return None
    plain = family in PLAIN
    if (plain or family == "t5") and shared != heads:
        if model.kv_heads:
            raise SettingsError(f"{family} has a key head for every query head: leave model.kv_heads out")
        shared = heads
    return StackConfig(
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=shared,
        head_dim=dim // heads,
        hidden=hidden,
        norm="layer" if plain else "rms",
        norm_eps=1e-5 if plain else 1e-6,
        activation=ACTIVATIONS.get(family, "silu"),
        gated=not plain,
        bias=frozenset({"q", "k", "v", "o", "mlp"}) if plain else frozenset(),
        qk_norm=family == "qwen3",
        position=POSITIONS.get(family, Rope(10000.0)),
    )


def _lstm(model: ModelSettings, count: int, vocab: int, length: int) -> LSTMConfig:
    layers = model.layers or 2
    if model.dim or model.hidden:
        dim = model.dim or model.hidden or 0
        hidden = model.hidden or dim
        return LSTMConfig(
            vocab, length, dim, hidden, layers, dim == hidden if model.tied is None else model.tied
        )
    return lstm_of(count, vocab, length, layers, model.tied is not False)


def lstm_of(count: int, vocab: int, length: int, layers: int = 2, tied: bool = True) -> LSTMConfig:
    """The LSTM whose number of parameters is nearest to `count`, for a comparison at equal size.

    Solves vocab·d + layers·(8 d² + 8 d) = count for the width d and takes the better whole number. Within 1 % from
    about half a million parameters on. Raises SettingsError where the vocabulary leaves no room.
    """
    square, linear = 8 * layers, vocab * (1 if tied else 2) + 8 * layers
    width = max(1, int((math.sqrt(linear**2 + 4 * square * count) - linear) / (2 * square)))
    configs = [LSTMConfig(vocab, length, dim, dim, layers, tied) for dim in (width, width + 1)]
    config = min(configs, key=lambda c: abs(parameters(c) - count))
    if not 0.8 < parameters(config) / count < 1.25:
        raise _no_room(count, parameters(config), vocab)
    return config
