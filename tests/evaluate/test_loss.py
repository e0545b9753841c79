import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from langmill.common.errors import DataError, ModelError, SettingsError
from langmill.evaluate import loss as loss_room
from langmill.evaluate.loss import Encoded, bootstrap, score
from langmill.families.folder import load_model

VOCAB, LENGTH = 97, 32
START = 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights in transformers and here."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


def documents(sizes, seed=0):
    random = np.random.default_rng(seed)
    return [Encoded(f"d{i}", random.integers(2, VOCAB, size), 3 * size + 1) for i, size in enumerate(sizes)]


@torch.inference_mode()
def expected_nll(theirs, ids, length):
    """Transformers' mean loss over each window, times its tokens."""
    sequence = [START, *ids]
    total = 0.0
    for at in range(0, len(ids), length):
        window = torch.tensor([sequence[at : at + length + 1]])
        # `labels` shifts by one: with one token more than predictions its loss covers exactly the window
        logits = theirs(window[:, :-1]).logits
        total += theirs.loss_function(logits, None, VOCAB, shift_labels=window[:, 1:]).item() * (
            window.shape[1] - 1
        )
    return total


def test_it_is_transformers_loss_on_the_same_ids(models):
    theirs, ours = models
    docs = documents([5, 31, 70, 1, 12])
    found = score(ours, docs, start_id=START, length=20, rows=4)
    for document, nll in zip(docs, found.nll_N, strict=True):
        assert nll == pytest.approx(expected_nll(theirs, document.ids, 20), rel=1e-5)
    assert found.tokens_N.tolist() == [5, 31, 70, 1, 12]
    assert (found.documents, found.tokens, found.bytes) == (5, 119, 3 * 119 + 5)
    assert found.loss == pytest.approx(found.nll_N.sum() / 119)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.nll_N.sum() / math.log(2) / found.bytes)
    assert found.names == ("d0", "d1", "d2", "d3", "d4")


def test_no_figure_depends_on_the_batch(models, monkeypatch):
    docs = documents(np.random.default_rng(1).integers(1, 60, 40))
    one, many = (score(models[1], docs, start_id=START, length=LENGTH, rows=rows) for rows in (1, 16))
    np.testing.assert_allclose(one.nll_N, many.nll_N, atol=1e-5)
    monkeypatch.setattr(loss_room, "_SCORES", 7 * VOCAB)  # logits in small portions
    monkeypatch.setattr(loss_room, "_SORTED", 2)
    portions = score(models[1], iter(docs), start_id=START, length=LENGTH, rows=4)
    np.testing.assert_allclose(one.nll_N, portions.nll_N, atol=1e-5)
    assert one.loss_interval == pytest.approx(portions.loss_interval)


def test_without_a_start_token_the_first_token_is_not_scored(models):
    found = score(models[1], documents([9, 4]), start_id=None, length=LENGTH)
    assert found.tokens_N.tolist() == [8, 3]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 9))
def test_bootstrap_is_a_resampled_sum(documents_, resamples, seed):
    totals = np.random.default_rng(seed).random((3, documents_))
    sums = bootstrap(totals, resamples, seed)
    picks = np.random.default_rng(seed).integers(documents_, size=(resamples, documents_))
    np.testing.assert_allclose(sums, np.stack([totals[:, pick].sum(1) for pick in picks], 1))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Documents of known mean loss, 200 samples of 60: a 95 % interval covers it 183 to 198 times (99 %)."""
    random, covered = np.random.default_rng(0), 0
    for trial in range(200):
        tokens = random.integers(1, 200, 60)
        nll = random.normal(2.0, 0.5, 60) * tokens
        found = loss_room._summary(["d"] * 60, nll, tokens, tokens * 4, 400, trial)
        covered += found.loss_interval[0] <= 2.0 <= found.loss_interval[1]
        assert found.bits_per_byte_interval[0] < found.bits_per_byte < found.bits_per_byte_interval[1]
        assert found.perplexity_interval[1] == pytest.approx(math.exp(found.loss_interval[1]))
    assert 183 <= covered <= 198


def test_one_document_has_no_interval(models):
    found = score(models[1], documents([9, 0]), start_id=START, length=LENGTH)
    assert found.loss_interval is found.bits_per_byte_interval is found.perplexity_interval is None
    assert (found.documents, found.tokens) == (2, 9)


def test_what_cannot_be_scored_is_an_error(models):
    with pytest.raises(DataError, match="2 documents hold no token"):
        score(models[1], documents([0, 0]), start_id=START, length=LENGTH)
    with pytest.raises(SettingsError, match=f"{LENGTH + 1} tokens exceed the model's {LENGTH}"):
        score(models[1], documents([5]), start_id=START, length=LENGTH + 1)
    broken = load_model_with_nan(models[1])
    with pytest.raises(ModelError, match="not finite"):
        score(broken, documents([5]), start_id=START, length=LENGTH)


def load_model_with_nan(model):
    broken = type(model)(model.config)
    with torch.no_grad():
        broken.tokens.weight.fill_(math.nan)
    return broken
