import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers.generation import logits_process as theirs

from langmill.common.errors import ModelError, SettingsError
from langmill.infer.sampling import (
    Sampling,
    adjust,
    allowed,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise,
    sample,
    streams,
)

B, V = 3, 17
LOGITS = hnp.arrays("float32", (B, V), elements=st.floats(-30, 30, width=32), unique=True).map(
    torch.from_numpy
)
ANY = torch.zeros(B, 1, dtype=torch.long)


def numbers(rows=B, seed=0):
    return [random.Random(f"{seed}/{row}") for row in range(rows)]


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.integers(1, V + 3), st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.floats(0.3, 3))
def test_filters_equal_transformers(logits, k, top_p, min_p, penalty):
    assert torch.equal(keep_top_k(logits, k), theirs.TopKLogitsWarper(k)(ANY, logits))
    assert torch.equal(keep_min_p(logits, min_p), theirs.MinPLogitsWarper(min_p)(ANY, logits))
    ids = torch.randint(V, (B, 5), generator=torch.Generator().manual_seed(k))
    seen = torch.zeros(B, V, dtype=torch.bool).scatter_(1, ids, True)
    reference = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalise(logits, seen, penalty), reference)
    # Sums in another order may differ by a rounding at the very edge of the nucleus: then p moves a little.
    accepted = [theirs.TopPLogitsWarper(top_p + e)(ANY, logits) for e in (0, -1e-6, 1e-6)]
    ours = keep_top_p(logits, top_p)
    assert all(any(torch.equal(ours[b], one[b]) for one in accepted) for b in range(B))


def test_top_p_looks_beyond_the_first_few():
    flat = torch.arange(1000).flip(0)[None] * 1e-6
    kept = keep_top_p(flat, 0.9).isfinite().sum()
    assert kept == theirs.TopPLogitsWarper(0.9)(ANY[:1], flat).isfinite().sum() == 900


def test_ties_at_a_cut_stay_together():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert keep_top_k(logits, 2).isfinite().tolist() == [[True, True, True, False]]
    assert keep_top_p(logits, 0.7).isfinite().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(
    "chosen",
    [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"temperature": 2.0, "top_k": 5, "top_p": 0.9}],
)
def test_draws_follow_the_distribution(chosen):
    """Pearson's chi-square of 20,000 draws stays under its 99.9 % point (fixed seed)."""
    draws = 20_000
    logits = torch.tensor([1.5, 0.3, -0.5, 2.0, 0.0, -2.0, 1.0, -torch.inf])
    sampling = Sampling(**{"temperature": 0.8, **chosen})
    expected = logits / sampling.temperature
    expected = keep_top_k(expected[None], sampling.top_k or 8)
    expected = keep_top_p(expected, sampling.top_p) if sampling.top_p < 1 else expected
    expected = keep_min_p(expected, sampling.min_p)[0] if sampling.min_p else expected[0]
    expected = expected.softmax(-1) * draws
    ids = sample(logits.expand(draws, -1), sampling, None, [random.Random(7)] * draws)
    counts = torch.bincount(ids, minlength=8)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    degrees = int(possible.sum()) - 1
    # Wilson and Hilferty's approximation of the chi-square's quantile, z = 3.09
    assert chi_square < degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("number, id", [(0.0, 1), (math.nextafter(1, 0), 2)])
def test_no_number_draws_a_forbidden_token(number, id):
    row = random.Random()
    row.random = lambda: number
    assert draw(torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]), [row]).tolist() == [id]


def test_greedy_needs_no_random_numbers_and_a_tiny_temperature_is_greedy():
    logits = torch.randn(B, V, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, Sampling(top_k=4), None, []), logits.argmax(-1))
    assert torch.equal(sample(logits, Sampling(temperature=1e-40), None, numbers()), logits.argmax(-1))


def test_penalty_acts_before_greedy():
    logits, seen = torch.tensor([[3.0, 2.9, -1.0]]), torch.tensor([[True, False, True]])
    assert sample(logits, Sampling(repetition_penalty=1.2), seen, []).tolist() == [1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), max_size=4), min_size=1, max_size=6), st.integers(0, 5))
def test_a_row_draws_the_same_alone_and_in_company(prompts, seed):
    together = [stream.random() for stream in streams(seed, prompts)]
    assert len(set(together)) == len(prompts)  # equal prompts too draw differently
    for prompt in prompts:
        assert streams(seed, [prompt])[0].random() == together[prompts.index(prompt)]


def test_a_batch_samples_each_row_as_if_alone():
    logits = torch.randn(B, V, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=1.0, top_p=0.9)
    together = sample(logits, sampling, None, numbers())
    alone = [sample(logits[b : b + 1], sampling, None, numbers()[b : b + 1]) for b in range(B)]
    assert torch.equal(together, torch.cat(alone))


def test_rows_of_one_call_may_sample_differently_and_a_broken_one_is_told():
    logits = torch.randn(40, V, generator=torch.Generator().manual_seed(2))
    ways = [Sampling(temperature=t, top_k=k) for t in (0.0, 0.3, 3.0) for k in (0, 4)]
    samplings = [ways[row % len(ways)] for row in range(40)]
    logits[7, 3], logits[8] = math.nan, -math.inf
    ids, finite = choose(logits.clone(), samplings, numbers(40))
    assert [row for row in range(40) if not finite[row]] == [7, 8]
    for row, id in enumerate(ids):
        alone = (
            sample(logits[row : row + 1], samplings[row], None, numbers(40)[row : row + 1])
            if finite[row]
            else id
        )
        assert id == alone


def test_a_mask_is_a_bool_or_a_bit_an_id():
    flags = np.random.default_rng(0).random(70) < 0.5
    for vocab in (64, 70, 90):
        wanted = torch.from_numpy(np.resize(np.append(flags, [False] * 20), vocab))
        words = np.packbits(np.append(flags, [False] * 26), bitorder="little").view(np.int32)
        assert torch.equal(allowed(flags, vocab), wanted)
        assert torch.equal(allowed(words[None], vocab), wanted)
        assert torch.equal(allowed(torch.from_numpy(words), vocab), wanted)


def test_penalties_count_what_was_written_and_a_bias_is_added():
    logits, counts = torch.zeros(2, V), torch.zeros(2, V)
    counts[0, 3], counts[1, 4] = 2, 1
    adjusted = adjust(
        logits, counts, Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 3.0, 0: -1.0})
    )
    assert adjusted[0, [0, 3, 4]].tolist() == [-1.0, -1.0, 3.0] and adjusted[1, 4] == 2.25
    assert adjusted.count_nonzero() == 5 and not logits.any()
    banned = Sampling(logit_bias={0: -100.0, 1: 9.0})
    assert sample(logits, banned, None, []).tolist() == [1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad, temperature):
    logits = torch.zeros(B, V)
    logits[1, 3] = bad
    with pytest.raises(ModelError, match="not finite"):
        sample(logits, Sampling(temperature=temperature), None, numbers())


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_new_tokens", 0), ("temperature", -0.1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0),
        ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5), ("repetition_penalty", 0.0), ("seed", -1), ("stop", ("",)),
        ("presence_penalty", math.nan), ("frequency_penalty", math.inf), ("logit_bias", {-1: 1.0}),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named_with_its_range(field, value):
    with pytest.raises(SettingsError, match=f"{field} .*(must be|at least one)"):
        Sampling(**{field: value})


def test_one_stop_text_may_be_given_bare():
    assert Sampling(stop="END").stop == ("END",)
