"""Advantages and losses against TRL's figures and the formulae by hand; answers written, kept and gone back to."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from langmill.adapt.lora import adapt
from langmill.adapt.reinforce import (
    Tally,
    advantages,
    k3,
    logps,
    objective,
    reduced,
    surrogate,
    without_adapters,
)
from langmill.adapt.rollouts import Parts, Prompt, Rollouts, Written, write
from langmill.common.errors import CheckpointError
from langmill.common.settings import LoRASettings, ModelSettings, ReinforceSettings
from langmill.data.batches import IGNORED
from langmill.infer.generate import generate_ids
from langmill.infer.sampling import Sampling
from langmill.jobs.pretrain import fresh
from langmill.jobs.size import config_for
from langmill.text.tokenizer import Tokenizer
from langmill.train.step import tensors

LOGPS = [[-0.5, -1.2, -0.3], [-2.0, -0.7, -0.1], [-0.9, -0.4, -1.6], [-1.1, -0.2, -0.8]]
OLD = [[-0.6, -0.8, -0.9], [-1.7, -0.9, -0.5], [-0.9, -1.1, -1.5], [-0.7, -0.3, -0.9]]
START = [[-0.4, -1.0, -0.7], [-2.2, -0.6, -0.3], [-1.0, -0.8, -1.2], [-1.5, -0.4, -0.6]]
LENGTHS, REWARDS = (3, 2, 3, 1), [[1.0, 0.0], [0.2, 0.7]]
# GRPOTrainer._compute_loss of TRL 1.16.0 on these, beta 0.04, epsilon 0.2, at most 5 tokens, by (loss_type, the upper
# epsilon); and its KL and share of clipped tokens. Of random batches of logits, temperatures 0.7 and 1 and all four
# kinds, losses agreed to 3e-15 and gradients to 1.3e-7, relative.
TRL = {
    ("grpo", 0.2): 0.11741417676907635, ("bnpo", 0.2): 0.1817779321221864, ("dr_grpo", 0.2): 0.08180006945498389,
    ("dapo", 0.2): 0.1817779321221864, ("grpo", 0.28): 0.11270079813356511, ("bnpo", 0.28): 0.17549342727483813,
    ("dr_grpo", 0.28): 0.07897204227367716, ("dapo", 0.28): 0.17549342727483813,
}  # fmt: skip
TRL_ADVANTAGES = (0.7070067953266834, -0.7070067953266834, -0.7069068377390945, 0.7069068377390946)
TRL_KL, TRL_CLIPPED = 0.03978862235262167, 2 / 9


class Told(nn.Module):
    """A model whose scores are given: of two words, the first has these log-probabilities."""

    def __init__(self, logps: list[list[float]]) -> None:
        super().__init__()
        first = torch.tensor(logps)
        self.states = nn.Parameter(torch.stack([first, torch.log(-torch.expm1(first))], -1))
        self.head_weight = torch.eye(2)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        return self.states


def batch(rows: slice = slice(None), **without: bool) -> dict[str, Tensor]:
    real = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
    gains = advantages(torch.tensor(REWARDS, dtype=torch.float64)).flatten()
    made = {
        "tokens": torch.zeros(4, 3, dtype=torch.long),
        "targets": torch.where(real, 0, IGNORED),
        "advantages": gains,
        "old": torch.tensor(OLD),
        "reference": torch.tensor(START),
    }
    return {name: value[rows] for name, value in made.items() if name not in without}


def kind(loss_type: Any, high: float | None = None, beta: float = 0.04) -> ReinforceSettings:
    return ReinforceSettings(loss_type=loss_type, epsilon_high=high, beta=beta, max_completion_length=5)


@pytest.mark.parametrize("loss_type, high", TRL)
def test_losses_are_trl_s(loss_type: str, high: float) -> None:
    tally = Tally()
    total, count = objective(kind(loss_type, high), tally)(Told(LOGPS), batch())
    assert float(total.detach() / count) == pytest.approx(TRL[loss_type, high], rel=1e-6)
    assert tally.kl / tally.tokens == pytest.approx(TRL_KL, rel=1e-6)
    assert tally.clipped / tally.tokens == pytest.approx(TRL_CLIPPED)
    assert batch()["advantages"].tolist() == pytest.approx(TRL_ADVANTAGES)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_micro_batches_weigh_as_one_batch(loss_type: str) -> None:
    run = objective(kind(loss_type), Tally())
    parts = [run(Told(LOGPS[rows]), batch(rows)) for rows in (slice(0, 1), slice(1, 4))]
    whole, count = run(Told(LOGPS), batch())
    assert float(sum(total.detach() for total, _ in parts)) == pytest.approx(float(whole.detach()))
    assert int(sum(number for _, number in parts)) == int(count)


def test_without_old_log_probabilities_it_is_the_policy_gradient() -> None:
    model = Told(LOGPS)
    total, count = objective(kind("dapo", beta=0), Tally())(model, batch(old=True, reference=True))
    total.backward()
    plain = Told(LOGPS)
    found_BT = logps(plain, batch(), 1.0)
    (-batch()["advantages"][:, None] * found_BT).sum().backward()
    assert int(count) == sum(LENGTHS)
    assert torch.allclose(model.states.grad, plain.states.grad)  # type: ignore[arg-type]


@given(st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=5))
def test_advantages_are_centred_in_their_group(rewards: list[list[int]]) -> None:
    rewards_PG = torch.tensor(rewards, dtype=torch.float64)
    for scale in ("group", "batch", "none"):
        found_PG = advantages(rewards_PG, scale)
        assert torch.allclose(found_PG.sum(1), torch.zeros(len(rewards), dtype=torch.float64), atol=1e-8)
        assert torch.allclose(advantages(rewards_PG + 3, scale), found_PG, atol=1e-8)
    spread_P = advantages(rewards_PG).std(1)
    assert all(s == 0 if len(set(r)) == 1 else s > 0.999 for s, r in zip(spread_P, rewards, strict=True))


@given(st.floats(-3, 0), st.floats(-3, 0), st.floats(-2, 2))
def test_the_clip_and_the_divergence_by_hand(new: float, old: float, gain: float) -> None:
    new_BT, old_BT, gain_B = (torch.tensor(v, dtype=torch.float64) for v in ([[new]], [[old]], [gain]))
    loss_BT, held_BT = surrogate(new_BT, old_BT, gain_B, 0.2, 0.3)
    ratio = np.exp(new - old)
    assert float(loss_BT) == pytest.approx(-min(ratio * gain, min(max(ratio, 0.8), 1.3) * gain))
    assert bool(held_BT) == (min(max(ratio, 0.8), 1.3) * gain < ratio * gain)
    assert float(k3(new_BT, old_BT)) == pytest.approx(1 / ratio - np.log(1 / ratio) - 1, abs=1e-12)
    assert float(k3(new_BT, old_BT)) >= 0


def test_an_answer_that_is_masked_counts_for_grpo_and_not_for_dapo() -> None:
    losses_BT, mask_BT = torch.ones(2, 3), torch.tensor([[True, True, False], [False] * 3])
    found = {
        kind: [float(part) for part in reduced(losses_BT, mask_BT, kind, 4)]
        for kind in ("grpo", "dapo", "dr_grpo")
    }
    assert found == {"grpo": [1, 2], "dapo": [2, 2], "dr_grpo": [0.5, 2]}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["The quick brown fox jumps over the lazy dog. 床前明月光 مرحبا"] * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Any:
    made = fresh(config_for(ModelSettings(size="100k"), tokenizer.vocab_size, 64), 0)
    with torch.no_grad():
        made.tokens.weight.mul_(8)
    return made


def test_log_probabilities_are_those_of_the_temperature(model: Any) -> None:
    tokens_BT = torch.arange(20).view(2, 10)
    targets_BT = torch.where(torch.arange(10) < 4, IGNORED, tokens_BT + 1)
    found_BT = logps(model, {"tokens": tokens_BT, "targets": targets_BT}, 0.7)
    wanted_BT = (model(tokens_BT) / 0.7).log_softmax(-1).gather(-1, (tokens_BT + 1)[..., None])[..., 0]
    assert torch.allclose(found_BT, torch.where(targets_BT == IGNORED, 0.0, wanted_BT), atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_without_adapters_it_is_the_base(tokenizer: Tokenizer, dora: bool) -> None:
    made = fresh(config_for(ModelSettings(size="100k"), tokenizer.vocab_size, 64), 0)
    tokens_BT = torch.arange(10).view(1, 10)
    base_BTV = made(tokens_BT)
    adapt(made, LoRASettings(use_dora=dora), 0)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith((".b", ".m")):
                weight.add_(0.3)
    names, changed_BTV = [name for name, _ in made.named_parameters()], made(tokens_BT)
    with without_adapters(made):
        assert torch.equal(made(tokens_BT), base_BTV) and not torch.allclose(changed_BTV, base_BTV)
    assert torch.equal(made(tokens_BT), changed_BTV) and [n for n, _ in made.named_parameters()] == names


def test_answers_are_drawn_apart_and_again_the_same(model: Any, tokenizer: Tokenizer) -> None:
    asked, done = [[3, 4, 5]] * 4 + [[6, 7]], []
    model.train()
    first, again = (
        write(model, tokenizer, asked, Sampling(12, 4.0, seed=9), lambda: done.append(1)) for _ in "ab"
    )
    assert first == again and len(done) == 10 and model.training
    assert len({tuple(one.ids) for one in first[:4]}) == 4
    other = write(model, tokenizer, asked, Sampling(12, 4.0, seed=10), lambda: None)
    assert other != first
    greedy = write(model, tokenizer, asked[:1], Sampling(12, 1e-4), lambda: None)[0]
    model.eval()
    steps = generate_ids(model, [[3, 4, 5]], Sampling(12), tokenizer.stop_ids)
    assert greedy.ids == [step[0].id for step in steps]


def rollouts(passes_rows: int = 3, prompts: int = 5, **more: Any) -> tuple[Rollouts, list[int]]:
    """Of a stand-in that writes the number of the step, and is told how often."""
    numbers: list[int] = []

    def told(asked: Any, number: int) -> list[Written]:
        numbers.append(number)
        return [Written([number, place % 3], "x" * place, place % 2 == 0) for place in range(len(asked))]

    given = ReinforceSettings(prompts_per_step=2, num_generations=2, **more)
    known = [Prompt(f"row {n}", "p", [1] * (n + 1), {}) for n in range(prompts)]
    scores = lambda made: np.where(made.targets_BT == IGNORED, 0, -0.1 - made.tokens_BT).astype(np.float32)  # noqa: E731
    parts = Parts(
        told, lambda p, w: [([float(len(one.text))], float(len(one.text))) for one in w], scores, scores
    )
    return Rollouts(known, np.arange(prompts), given, passes_rows, 0, 0, parts, Tally()), numbers


def test_batches_hold_answers_behind_their_prompts() -> None:
    made, _ = rollouts(num_iterations=1)
    both = [next(made), next(made)]
    assert made.passes == 2 and [len(b.tokens_BT) for b in both] == [3, 1]
    for answer, row in zip(made.answers[:3], range(3), strict=True):
        first, given = answer.prompt, both[0]  # one token fewer than the prompt has
        targets = given.targets_BT[row]
        assert targets[first : first + 2].tolist() == answer.ids and (targets[:first] == IGNORED).all()
        assert (targets[first + 2 :] == IGNORED).all() and given.advantages_B[row] == np.float32(
            answer.advantage
        )
        assert (
            given.old_BT is not None
            and given.old_BT[row, first] < 0
            and not given.old_BT[row, first + 2 :].any()
        )
    assert sum(a.advantage for a in made.answers) == pytest.approx(0)
    masked, _ = rollouts(mask_truncated_completions=True)
    next(masked)
    batch_BT = next(masked).targets_BT if not masked.answers[-1].stopped else None
    learnt = sum(int((masked._batch([a]).targets_BT != IGNORED).any()) for a in masked.answers)
    assert learnt == 2 and (batch_BT is None or (batch_BT == IGNORED).all())


def test_a_place_in_the_middle_of_a_step_is_gone_back_to() -> None:
    made, _ = rollouts(num_iterations=2)
    for _ in range(6):  # one step of four batches, and half of the next
        next(made)
    state = json.loads(json.dumps(made.state()))
    wanted = [tensors(next(made), torch.device("cpu")) for _ in range(4)]
    again, numbers = rollouts(num_iterations=2)
    next(again)  # as fit looks at a batch first
    again.restore(state)
    found = [tensors(next(again), torch.device("cpu")) for _ in range(4)]
    for one, other in zip(wanted, found, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert numbers == [0, 2], "what was written before the checkpoint is not written again"
    place, _ = rollouts(num_iterations=2)
    assert place.state()["answers"] is None
    other, _ = rollouts(prompts=4, num_iterations=2)
    with pytest.raises(CheckpointError, match="resume with the same data"):
        other.restore(state)


def test_every_prompt_is_asked_once_an_epoch() -> None:
    made, _ = rollouts(prompts=4)
    asked = []
    for _ in range(4):
        next(made), next(made)
        asked.append(sorted({answer.prompt for answer in made.answers}))
    assert sorted(asked[0] + asked[1]) == sorted(asked[2] + asked[3]) == [0, 1, 2, 3]
