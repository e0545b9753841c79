import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langmill.common.errors import SettingsError
from langmill.common.settings import ModelSettings, TrainSettings
from langmill.families.folder import export_config
from langmill.jobs.size import NAMED, config_for, largest_vocabulary, lstm_of, resolve, target
from langmill.model.config import LSTMConfig, ModelConfig
from langmill.model.count import parameters

sizes = st.floats(6, 10.5).map(lambda power: round(10**power))


@settings(max_examples=60, deadline=None)
@given(sizes, st.sampled_from(["llama", "gpt2", "qwen3", "lstm"]), st.floats(0.05, 1))
def test_any_count_is_met(count: int, family: str, share: float) -> None:
    vocab = max(300, int(share * min(largest_vocabulary(count), 200_000)))
    config, train = resolve(ModelSettings(family=family, size=str(count)), TrainSettings(), vocab)
    assert abs(parameters(config) / count - 1) < 0.09
    if isinstance(config, ModelConfig):
        assert (
            config.decoder.dim % 64 == 0 and config.decoder.hidden % 64 == 0 and config.decoder.head_dim == 64
        )
        assert 1.5 < config.decoder.hidden / config.decoder.dim < 7
    assert config.length == train.max_length and train.micro_batch_size and train.learning_rate


@settings(max_examples=60, deadline=None)
@given(st.integers(600_000, 10**9), st.integers(300, 50_000), st.booleans(), st.integers(1, 3))
def test_the_lstm_is_as_large_as_asked(count: int, vocab: int, tied: bool, layers: int) -> None:
    vocab = min(vocab, count // 400)
    assert abs(parameters(lstm_of(count, vocab, 256, layers, tied)) / count - 1) < 0.01


@given(sizes, sizes)
@settings(max_examples=30, deadline=None)
def test_larger_models_learn_slower_on_longer_rows(one: int, other: int) -> None:
    small, large = sorted((one, other))
    rates = [resolve(ModelSettings(size=str(n)), TrainSettings(), 1024)[1] for n in (small, large)]
    assert rates[0].learning_rate >= rates[1].learning_rate * 0.8
    assert rates[0].max_length <= rates[1].max_length


@settings(max_examples=60, deadline=None)
@given(
    sizes, st.sampled_from([("bert", "masked"), ("marian", "denoise"), ("t5", "denoise")]), st.floats(0.05, 1)
)
def test_encoders_and_pairs_are_as_large_as_asked_and_other_tools_know_them(
    count: int, what: tuple[str, str], share: float
) -> None:
    family, objective = what
    vocab = max(300, int(share * min(largest_vocabulary(count), 200_000)))
    model, train = ModelSettings(family=family, size=str(count)), TrainSettings(objective=objective)
    config, train = resolve(model, train, vocab, start=1)
    assert isinstance(config, ModelConfig) and abs(parameters(config) / count - 1) < 0.09
    theirs, _ = export_config(config)
    assert theirs["model_type"] == {"t5": "mt5"}.get(family, family)
    assert [tokens.start for _, tokens in config.stacks] == ([None] if family == "bert" else [None, 1])
    assert len({(stack.layers, stack.dim, stack.hidden) for stack, _ in config.stacks}) == 1


def test_the_small_model_is_the_benchmark_shape() -> None:
    config = config_for(ModelSettings(), 8192, 256)
    assert isinstance(config, ModelConfig)
    d = config.decoder
    assert (d.layers, d.dim, d.heads, d.hidden) == (6, 384, 6, 1024)
    assert [
        abs(parameters(config_for(ModelSettings(size=s), 4096, 256)) / n - 1) < 0.08 for s, n in NAMED.items()
    ]


def test_what_is_given_stays() -> None:
    model = ModelSettings(layers=3, dim=96, heads=4, kv_heads=2, hidden=200, tied=False)
    train = TrainSettings(max_length=77, micro_batch_size=3, learning_rate=0.5)
    config, chosen = resolve(model, train, 500)
    assert isinstance(config, ModelConfig)
    d = config.decoder
    assert (d.layers, d.dim, d.heads, d.kv_heads, d.head_dim, d.hidden) == (3, 96, 4, 2, 24, 200)
    assert not config.head.tied and config.length == 77 and chosen == train
    assert config_for(ModelSettings(family="lstm", dim=20, hidden=30), 500, 9) == LSTMConfig(
        500, 9, 20, 30, 2, False
    )


def test_a_loaded_shape_is_kept_and_its_length_is_a_limit() -> None:
    shape = config_for(ModelSettings(size="1M"), 1000, 128)
    config, train = resolve(ModelSettings(), TrainSettings(), 1000, shape)
    assert config is shape and train.max_length == 128
    with pytest.raises(SettingsError, match="128 tokens"):
        resolve(ModelSettings(), TrainSettings(max_length=129), 1000, shape)


@pytest.mark.parametrize(
    ("model", "vocab", "match"),
    [
        (ModelSettings(size="huge"), 500, "tiny"),
        (ModelSettings(size="9"), 500, "10k"),
        (ModelSettings(size="1M"), 50_000, "tokenizer.vocab_size"),
        (ModelSettings(family="lstm", size="1M"), 5_000_000, "tokenizer.vocab_size"),
        (ModelSettings(dim=128, heads=3), 500, "divide"),
        (ModelSettings(family="gpt2", heads=4, dim=128, layers=2, kv_heads=2), 500, "gpt2"),
    ],
)
def test_what_cannot_be_says_why(model: ModelSettings, vocab: int, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        config_for(model, vocab, 64)


def test_names_and_counts() -> None:
    assert target("small") == 14_000_000 and target("1.5B") == 1_500_000_000
