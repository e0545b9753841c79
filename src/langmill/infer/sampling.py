"""Choosing the next token from the logits: greedy, or a draw after temperature and filters.

Each filter is a cut on the scores: what lies below it gets -inf, ties at the cut stay, so that no
result hangs on a sort's order. They act in the order penalties, bias, temperature, top-k, top-p, min-p.

Legend: B rows, V vocabulary, K likeliest few.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from langmill.common.errors import ModelError, SettingsError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to go on from a prompt; SettingsError names a value out of its range.

    max_new_tokens      tokens to write at most, >= 1
    temperature         0: always the likeliest token; above: softmax(logits / temperature)
    top_k               only the k likeliest; 0: all (Fan et al. 2018)
    top_p               only the smallest set of likeliest tokens with this probability, in (0, 1]
                        (nucleus sampling, Holtzman et al. 2020, section 3.1)
    min_p               only tokens with at least this share of the likeliest one's probability,
                        in [0, 1] (Nguyen et al. 2024)
    repetition_penalty  scores of tokens already seen, prompt included, are divided by it where
                        positive and multiplied where negative, > 0 (Keskar et al. 2019, section 4.1)
    presence_penalty    taken from the score of each token that was written, prompt not included
    frequency_penalty   taken from it once for each time that it was written
    logit_bias          {id: number added to its score}, kept as pairs in the order of the ids
    seed                fixes every draw, >= 0
    stop                texts before which to end, none of them empty
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "logit_bias", tuple(sorted(dict(self.logit_bias).items())))
        ranges = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (no limit) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("seed", self.seed >= 0, "0 or above"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number"),
            (
                "logit_bias",
                all(id >= 0 and math.isfinite(by) for id, by in self.biases),
                "of ids and numbers",
            ),
        )
        for name, valid, expected in ranges:
            if not valid:
                raise SettingsError(f"{name} is {getattr(self, name)}: it must be {expected}")
        if not all(isinstance(text, str) and text for text in stop):
            raise SettingsError("stop holds an empty text: give texts of at least one character")

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """The pairs of logit_bias."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    @property
    def counts(self) -> bool:
        """Whether it matters how often each token was written."""
        return bool(self.presence_penalty or self.frequency_penalty)


def streams(seed: int, prompts: Sequence[Sequence[int]]) -> list[random.Random]:
    """One source of random numbers a row, made from the seed and the row's own prompt.

    A row so draws the same alone as in any batch; equal prompts in one batch draw differently.
    """
    made, earlier = [], Counter[bytes]()
    for prompt in prompts:
        ids = np.asarray(prompt, dtype="<i8").tobytes()
        key = hashlib.blake2b(f"{seed}:{earlier[ids]}:".encode() + ids, digest_size=16).digest()
        made.append(random.Random(int.from_bytes(key, "little")))
        earlier[ids] += 1
    return made


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float | Tensor) -> Tensor:
    """The CTRL repetition penalty, one number or (B, 1), on the tokens that `seen_BV` (bool) marks."""
    less_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, less_BV, logits_BV)


def adjust(logits_BV: Tensor, counts_BV: Tensor | None, sampling: Sampling) -> Tensor:
    """OpenAI's penalties on tokens by how often each row wrote them (`counts_BV`), and the bias; one row (V,) too."""
    if sampling.counts and counts_BV is not None:
        logits_BV = logits_BV - sampling.frequency_penalty * counts_BV
        logits_BV = logits_BV - sampling.presence_penalty * (counts_BV > 0)
    if sampling.biases:
        ids, numbers = zip(*sampling.biases, strict=True)
        logits_BV = logits_BV.clone()
        logits_BV[..., list(ids)] += torch.tensor(numbers, device=logits_BV.device)
    return logits_BV


def keep_top_k(scores_BV: Tensor, k: int) -> Tensor:
    """-inf below the k-th largest score of each row; ties with it stay."""
    if k >= scores_BV.shape[-1]:
        return scores_BV
    cut_B1 = scores_BV.topk(k).values[:, -1:]
    return scores_BV.masked_fill(scores_BV < cut_B1, -math.inf)


def keep_top_p(scores_BV: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of likeliest tokens whose probabilities reach p."""
    vocabulary = scores_BV.shape[-1]
    mass_B1 = scores_BV.logsumexp(-1, keepdim=True)
    # The nucleus is nearly always small: look at the likeliest few before sorting a whole vocabulary.
    for width in (min(256, vocabulary), vocabulary):
        best_BK = scores_BV.topk(width).values
        reached_BK = (best_BK - mass_B1).exp().cumsum(-1)
        if bool((reached_BK[:, -1] >= p).all()):
            break
    last_B1 = (reached_BK < p).sum(-1, keepdim=True).clamp(max=width - 1)
    return scores_BV.masked_fill(scores_BV < best_BK.gather(-1, last_B1), -math.inf)


def keep_min_p(scores_BV: Tensor, p: float) -> Tensor:
    """-inf on tokens less probable than p times the row's likeliest."""
    cut_B1 = scores_BV.amax(-1, keepdim=True) + math.log(p)
    return scores_BV.masked_fill(scores_BV < cut_B1, -math.inf)


def draw(scores_BV: Tensor, rows: Sequence[random.Random]) -> Tensor:
    """One id a row with probability softmax(scores): the cumulative sum inverted at a number of the row's own."""
    probability_BV = scores_BV.softmax(-1)
    if probability_BV.device.type == "mps":  # knows no float64
        probability_BV = probability_BV.cpu()
    total_BV = probability_BV.cumsum(-1, dtype=torch.float64)
    point_B1 = torch.tensor([[row.random()] for row in rows], dtype=torch.float64).to(total_BV.device)
    return torch.searchsorted(total_BV, point_B1 * total_BV[:, -1:], right=True)[:, 0].to(scores_BV.device)


def sample(
    logits_BV: Tensor,
    sampling: Sampling,
    seen_BV: Tensor | None,
    rows: Sequence[random.Random],
    counts_BV: Tensor | None = None,
) -> Tensor:
    """The next id of each row, (B,) int64.

    `seen_BV` marks the ids already in each row and is read where repetition_penalty is not 1;
    `rows` holds each row's random numbers and is read where temperature is above 0; `counts_BV` is for `adjust`.
    ModelError where the logits are not finite numbers (-inf forbids a token and is allowed).
    """
    scores_BV = logits_BV.float()
    if sampling.repetition_penalty != 1 and seen_BV is not None:
        scores_BV = penalise(scores_BV, seen_BV, sampling.repetition_penalty)
    scores_BV = adjust(scores_BV, counts_BV, sampling)
    best_B1, ids_B1 = scores_BV.max(-1, keepdim=True)
    if not bool(best_B1.isfinite().all()):
        raise ModelError(
            "the model's logits are not finite numbers (NaN or infinite): its weights are damaged or "
            "overflow in this number type; try float32"
        )
    if sampling.temperature == 0:
        return ids_B1[:, 0]
    scores_BV = (scores_BV - best_B1) / sampling.temperature  # best first: a tiny temperature cannot overflow
    if sampling.top_k:
        scores_BV = keep_top_k(scores_BV, sampling.top_k)
    if sampling.top_p < 1:
        scores_BV = keep_top_p(scores_BV, sampling.top_p)
    if sampling.min_p:
        scores_BV = keep_min_p(scores_BV, sampling.min_p)
    return draw(scores_BV, rows)


def choose(
    logits_BV: Tensor, samplings: Sequence[Sampling], rows: Sequence[random.Random]
) -> tuple[list[int], list[bool]]:
    """The next id of each row as its own sampling says, and whether the row's logits are finite numbers.

    The id of a row where they are not means nothing. One call serves all greedy rows, and one those that sample alike.
    Penalties and biases are left to the caller, who knows what each row has seen.
    """
    scores_BV = logits_BV.numpy()
    ids_B = scores_BV.argmax(
        -1
    )  # NumPy's is 15 times as fast as torch's, and like it finds NaN before any number
    ids, finite = ids_B.tolist(), np.isfinite(scores_BV[np.arange(len(ids_B)), ids_B]).tolist()
    alike: dict[tuple[float, ...], list[int]] = {}
    for row, s in enumerate(samplings):
        if s.temperature and finite[row]:
            alike.setdefault((s.temperature, s.top_k, s.top_p, s.min_p), []).append(row)
    for group in alike.values():
        how = replace(samplings[group[0]], logit_bias=())
        drawn_B = sample(logits_BV[group], how, None, [rows[row] for row in group])
        for row, id in zip(group, drawn_B.tolist(), strict=True):
            ids[row] = id
    return ids, finite


def allowed(mask: NDArray[np.bool_] | NDArray[np.int32] | Tensor, vocab: int) -> Tensor:
    """(V,) True at the ids that a constraint's mask allows: a bool an id, or a bit an id, 32 in an integer, the lowest
    first. What lies beyond the mask is forbidden."""
    given = np.asarray(mask).reshape(-1)
    if given.dtype != np.bool_:
        given = np.unpackbits(given.astype("<u4").view(np.uint8), bitorder="little").view(np.bool_)
    flags = np.zeros(vocab, np.bool_)
    flags[: len(given)] = given[:vocab]
    return torch.from_numpy(flags)
