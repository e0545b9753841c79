"""Preference losses against closed forms and against numbers of TRL 1.16; what a pair scores, packed or alone."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from langmill.common.settings import PreferSettings
from langmill.data.pairs import Item, PairRows, Pairs, pairs_once
from langmill.text.turns import Example
from langmill.train import objectives, preferences
from langmill.train.preferences import Scores, losses, objective, rewards, scored, token_logps
from langmill.train.step import tensors

LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")
CPU = torch.device("cpu")


def example_scores() -> Scores:
    """Three pairs, written down; for KTO they are a good, a bad and a good answer."""
    policy = torch.tensor([[-12.0, -15.0], [-30.5, -28.0], [-8.25, -9.0]], dtype=torch.float64)
    reference = torch.tensor([[-13.0, -14.0], [-29.0, -29.5], [-8.0, -9.5]], dtype=torch.float64)
    tokens = torch.tensor([[4, 5], [10, 9], [3, 4]], dtype=torch.float64)
    nll = torch.tensor([2.5, 3.0, 2.0], dtype=torch.float64)
    return Scores(policy, reference, tokens, nll, torch.tensor([1, 1, 1]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss": "dpo"}, [0.5981389, 0.8543552, 0.7313501]),
        ({"loss": "dpo", "beta": 0.5, "label_smoothing": 0.2}, [0.5132617, 1.4014133, 0.8231233]),
        ({"loss": "ipo", "beta": 0.5}, [0.3025, 1.7336111, 1.4600694]),
        ({"loss": "orpo"}, [2.5 + 0.0693147, 3.0 + 0.0661633, 2.0 + 0.1002524]),
        ({"loss": "simpo", "label_smoothing": 0.1}, [0.924077, 0.8619926, 1.5514133]),
    ],
)
def test_the_losses_are_those_of_trl(settings: dict[str, Any], expected: list[float]) -> None:
    found = losses(example_scores(), PreferSettings(**settings))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_kto_is_that_of_trl() -> None:
    """Here z₀ is the mean of -1, 1.5 and 0.5: a third."""
    prefer = PreferSettings(loss="kto", beta=0.3, undesirable_weight=1.5)
    scores = example_scores()
    scores = Scores(
        scores.policy, scores.reference, scores.tokens, scores.chosen_nll, torch.tensor([1, -1, 1])
    )
    assert float(losses(scores, prefer).mean()) == pytest.approx(0.5142004344694666, abs=1e-9)


def closed_form(
    name: str, policy: Any, reference: Any, tokens: Any, nll: float, good: bool, kl: float
) -> float:
    """One pair, straight from the paper, in Python's own numbers."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    ratio = [p - r for p, r in zip(policy, reference, strict=True)]
    mean = [p / t for p, t in zip(policy, tokens, strict=True)]
    if name == "dpo":
        return -math.log(sigmoid(0.3 * (ratio[0] - ratio[1])))
    if name == "ipo":
        return (ratio[0] / tokens[0] - ratio[1] / tokens[1] - 1 / (2 * 0.3)) ** 2
    if name == "kto":
        value = sigmoid(0.3 * (ratio[0] - kl)) if good else sigmoid(0.3 * (kl - ratio[0]))
        return (2.0 if good else 1.5) * (1 - value)
    if name == "orpo":
        odds = [math.exp(m) / (1 - math.exp(m)) for m in mean]
        return nll - 0.3 * math.log(sigmoid(math.log(odds[0] / odds[1])))
    return -math.log(sigmoid(0.3 * mean[0] - 0.3 * mean[1] - 0.7))


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_are_those_of_the_papers(name: str) -> None:
    random = np.random.default_rng(3)
    policy, reference = -random.uniform(0.5, 60, (2, 40, 2))
    tokens, nll = random.integers(1, 30, (40, 2)).astype(float), random.uniform(0, 5, 40)
    labels = np.where(random.random(40) < 0.5, 1, -1)
    kl = max(0.0, float((policy - reference)[:, 1].mean()))
    prefer = PreferSettings(
        loss=name,
        beta=0.3,
        simpo_gamma=0.7,
        desirable_weight=2.0,
        undesirable_weight=1.5,  # type: ignore[arg-type]
    )
    found = losses(Scores(*map(torch.tensor, (policy, reference, tokens, nll, labels))), prefer)
    expected = [
        closed_form(name, *one, good=label > 0, kl=kl)
        for *one, label in zip(policy, reference, tokens, nll, labels, strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_rewards_and_certain_answers() -> None:
    scores = example_scores()
    torch.testing.assert_close(rewards(scores, PreferSettings())[0], torch.tensor([0.1, -0.1]).double())
    simpo = rewards(scores, PreferSettings(loss="simpo"))
    torch.testing.assert_close(simpo[0], torch.tensor([-6.0, -6.0]).double())
    policy = torch.tensor([[0.0, -1e-9], [-1e5, -0.6931]], requires_grad=True)  # p of 1, and of nothing
    ones = torch.ones_like(policy)
    for name in LOSSES:
        prefer = PreferSettings(loss=name)  # type: ignore[arg-type]
        value = losses(Scores(policy, -ones, ones, ones[:, 0], torch.tensor([1, -1])), prefer)
        gradient = torch.autograd.grad(value.sum(), policy)[0]
        assert value.isfinite().all() and gradient.isfinite().all(), name


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_log_probabilities_come_in_chunks(
    monkeypatch: pytest.MonkeyPatch, mixed: bool, bias: bool, frozen: bool
) -> None:
    monkeypatch.setattr(preferences, "CHUNK", 7)
    monkeypatch.setattr(objectives, "FROZEN_CHUNK", 7)
    made: list[int] = []
    real = F.cross_entropy

    def noted(scores: Tensor, *given: Any, **named: Any) -> Tensor:
        made.append(len(scores))
        return real(scores, *given, **named)

    monkeypatch.setattr(F, "cross_entropy", noted)
    random = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=random).requires_grad_() for shape in ((40, 8), (30, 8), (30,))]
    for leaf in leaves[1:]:
        leaf.requires_grad_(not frozen)
    targets = torch.randint(0, 30, (40,), generator=random)
    targets[::3] = -100
    weights = torch.randn(40, generator=random)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = token_logps(leaves[0], leaves[1], targets, leaves[2] if bias else None)
    used = [leaf for leaf in leaves[: 3 if bias else 2] if leaf.requires_grad]
    mine = torch.autograd.grad((found * weights).sum(), used)
    logps = (leaves[0] @ leaves[1].T + (leaves[2] if bias else 0)).log_softmax(-1)
    plain = torch.where(targets < 0, 0.0, logps.gather(1, targets.clamp(min=0)[:, None])[:, 0])
    assert found.dtype == torch.float32
    if not frozen:
        assert max(made) == 7 and sum(made) == 2 * 26, "made again going back, and never all at once"
    torch.testing.assert_close(found, plain, rtol=0.02 if mixed else 1e-5, atol=0.05 if mixed else 1e-5)
    for got, want in zip(mine, torch.autograd.grad((plain * weights).sum(), used), strict=True):
        torch.testing.assert_close(got, want, rtol=0.02 if mixed else 1e-5, atol=0.1 if mixed else 1e-5)


def some_pairs(count: int = 9, labels: bool = False) -> Pairs:
    random = np.random.default_rng(1)

    def sequence(prompt: list[int]) -> Example:
        answer = random.integers(0, 50, random.integers(1, 6)).tolist()
        return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    items = []
    for i in range(count):
        prompt = random.integers(0, 50, random.integers(1, 6)).tolist()
        items.append(Item(f"pair {i}", sequence(prompt), sequence(prompt), -1 if labels and i % 2 else 1))
    pairs = Pairs.of(items, pad_id=0)
    pairs.reference[:] = random.normal(-20, 3, pairs.reference.shape)
    return pairs


@torch.no_grad()
def test_a_pair_scores_in_a_pack_what_it_scores_alone(tiny: ModuleType) -> None:
    model, pairs = tiny.model(), some_pairs()
    for weight in model.parameters():
        weight.mul_(5)  # sharp enough for a leak to show
    seen = []
    for batch in pairs_once(pairs, np.arange(len(pairs)), 24):
        found = scored(model, tensors(batch, CPU), whole=True)
        for place, number in enumerate(batch.numbers_BP[0].tolist()):  # type: ignore[attr-defined]
            if number < 0:
                assert not found.labels[0, place] and not found.tokens[0, place].any()
                continue
            seen.append(number)
            for side in (0, 1):
                example = pairs.examples.example(2 * number + side)
                ids = torch.tensor(example.ids)
                logps = model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                trained = torch.tensor(example.trained[1:])
                torch.testing.assert_close(found.policy[0, place, side], logps[trained].sum())
                assert int(found.tokens[0, place, side]) == int(trained.sum())
                if side == 0:
                    torch.testing.assert_close(found.chosen_nll[0, place], -logps.mean())
            torch.testing.assert_close(found.reference[0, place], torch.from_numpy(pairs.reference[number]))
    assert sorted(seen) == list(range(len(pairs)))


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_weigh_by_their_pairs(tiny: ModuleType, name: str) -> None:
    """Four rows at once give the loss and the gradient of four times one row; KTO's z₀ is kept at 0 for it."""
    pairs, prefer = some_pairs(labels=name == "kto"), PreferSettings(loss=name)  # type: ignore[arg-type]
    if name == "kto":
        pairs.reference[:, 1] = 0
    found = []
    for rows in (4, 1):
        model, batches = tiny.model(), PairRows(pairs, np.arange(len(pairs)), 24, rows, seed=0)
        total, count = torch.zeros(()), 0
        for _ in range(4 // rows):
            loss, number = objective(prefer)(model, tensors(next(batches), CPU))
            loss.backward()
            total, count = total + loss.detach(), count + int(number)
        found.append((total, count, [weight.grad for weight in model.parameters()]))
    assert found[0][1] == found[1][1] == len(pairs)
    torch.testing.assert_close(found[0][0], found[1][0])
    for one, other in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
