"""Learning from preferences: losses as pure functions of log-probabilities, and the objective that fit() takes.

A batch holds pairs whole. Document 2p+1 of a row is the chosen sequence of its pair p and 2p+2 the rejected one; for
KTO, which learns from single answers, the second is the prompt with another prompt's answer. Log-probabilities are
sums over the answer's tokens, in nats. B rows, T predictions in a row, P = T/2 places for pairs, N = B·T, D width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from langmill.common.settings import PreferSettings
from langmill.train.objectives import CHUNK, IGNORED, Objective, Tensors, frozen_costs

WITHOUT_REFERENCE = frozenset({"orpo", "simpo"})
BETA, SIMPO_BETA = 0.1, 2.0  # where prefer.beta is not given; Meng et al. 2024, section 4, take 2.0 to 2.5


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation: -log σ(βΔ), Δ = log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l), for each pair
    (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    label_smoothing ε is how often a label is thought wrong: -(1-ε) log σ(βΔ) - ε log σ(-βΔ) (conservative DPO:
    Chowdhury et al. 2024, arXiv:2403.00409, eq. 9).
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    beta: float,
) -> Tensor:
    """Identity preference optimisation: (h - 1/2β)², h the difference of the log-ratios, for each pair (Azar et al.
    2023, arXiv:2310.12036, eq. 17; β is the paper's τ).

    Log-ratios are means over an answer's tokens: of sums the square would grow with length, and so the paper's results
    were made, as its authors told TRL's.
    """
    difference = (chosen - reference_chosen) / chosen_tokens - (
        rejected - reference_rejected
    ) / rejected_tokens
    return (difference - 1 / (2 * beta)) ** 2


def kto(
    policy: Tensor,
    reference: Tensor,
    labels: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation: λ_D (1 - σ(β(r - z₀))) where an answer is desirable (label above 0) and
    λ_U (1 - σ(β(z₀ - r))) where not, r = log π/π_ref (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7)."""
    against = beta * (policy - reference - kl)
    desirable = desirable_weight * torch.sigmoid(-against)
    return torch.where(labels > 0, desirable, undesirable_weight * torch.sigmoid(against))


def kto_kl(policy: Tensor, reference: Tensor, real: Tensor) -> Tensor:
    """z₀ of KTO: the mean log-ratio of prompts with other prompts' answers, at least 0 (section 4.1). A constant: no
    gradient flows through it. `real` says which places hold an example."""
    ratio = torch.where(real, policy - reference, 0.0)
    return (ratio.sum() / real.sum().clamp(min=1)).clamp(min=0).detach()


def orpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    chosen_nll: Tensor,
    beta: float,
) -> Tensor:
    """Odds ratio preference optimisation: NLL(y_w) - β log σ(log odds(y_w) - log odds(y_l)), for each pair, with
    odds(y) = p/(1-p) and log p the mean over tokens (Hong et al. 2024, arXiv:2403.07691, eqs. 4, 6, 7; β is its λ)."""
    log_p, log_q = chosen / chosen_tokens, rejected / rejected_tokens
    return chosen_nll - beta * F.logsigmoid((log_p - _log1mexp(log_p)) - (log_q - _log1mexp(log_q)))


def simpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Simple preference optimisation: -log σ(β/|y_w| log π(y_w) - β/|y_l| log π(y_l) - γ), for each pair (Meng et al.
    2024, arXiv:2405.14734, eq. 6). label_smoothing as in `dpo`."""
    margin = beta * (chosen / chosen_tokens - rejected / rejected_tokens) - gamma
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - eˣ) for x below 0, by the branch that loses no digits; each gets only what it can take."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -0.6931471805599453
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, -0.5)))
    return torch.where(near, by_expm1, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


@dataclass(frozen=True)
class Scores:
    """Pairs under a model: their two sequences along the last dimension, chosen first.

    policy, reference: summed log-probabilities (…, 2) of the scored tokens, whose numbers are `tokens`. chosen_nll:
    (…), nats a token over all of the chosen sequence, its prompt included; zeros unless it was asked for. labels: (…),
    1, or -1 where KTO's answer is undesirable, 0 where there is no pair.
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor
    chosen_nll: Tensor
    labels: Tensor


def beta_of(prefer: PreferSettings) -> float:
    """prefer.beta, or what suits the loss."""
    return prefer.beta or (SIMPO_BETA if prefer.loss == "simpo" else BETA)


def losses(scores: Scores, prefer: PreferSettings) -> Tensor:
    """The chosen loss of each pair, or of each example for KTO; finite and meaningless where there is none."""
    beta, tokens = beta_of(prefer), scores.tokens.clamp(min=1)
    (chosen, rejected), (chosen_tokens, rejected_tokens) = scores.policy.unbind(-1), tokens.unbind(-1)
    was_chosen, was_rejected = scores.reference.unbind(-1)
    match prefer.loss:
        case "dpo":
            return dpo(chosen, rejected, was_chosen, was_rejected, beta, prefer.label_smoothing)
        case "ipo":
            return ipo(chosen, rejected, was_chosen, was_rejected, chosen_tokens, rejected_tokens, beta)
        case "kto":
            kl = kto_kl(rejected, was_rejected, scores.labels != 0)
            weights = prefer.desirable_weight, prefer.undesirable_weight
            return kto(chosen, was_chosen, scores.labels, kl, beta, *weights)
        case "orpo":
            return orpo(chosen, rejected, chosen_tokens, rejected_tokens, scores.chosen_nll, beta)
        case "simpo":
            gamma, smoothing = prefer.simpo_gamma, prefer.label_smoothing
            return simpo(chosen, rejected, chosen_tokens, rejected_tokens, beta, gamma, smoothing)


def rewards(scores: Scores, prefer: PreferSettings) -> Tensor:
    """The implicit rewards (…, 2): β log π/π_ref, or β times the mean log-probability where there is no reference."""
    if prefer.loss in WITHOUT_REFERENCE:
        return beta_of(prefer) * scores.policy / scores.tokens.clamp(min=1)
    return beta_of(prefer) * (scores.policy - scores.reference)


def objective(prefer: PreferSettings) -> Objective:
    """The sum of the loss over the pairs of a batch, and their number: so accumulated micro-batches weigh as pairs.

    KTO's z₀ alone is of a micro-batch, as in the paper: it changes with how a step is cut into them. ORPO's likelihood
    term is a mean over each pair's tokens, prompt included; TRL's is one over the tokens of a micro-batch, which is
    the same where sequences are equally long.
    """

    def run(model: nn.Module, batch: Tensors) -> tuple[Tensor, Tensor]:
        scores = scored(model, batch, whole=prefer.loss == "orpo")
        real_BP = scores.labels != 0
        return torch.where(real_BP, losses(scores, prefer), 0.0).sum(), real_BP.sum()

    return run


def scored(model: nn.Module, batch: Tensors, whole: bool = False) -> Scores:
    """The pairs of a batch (see data.pairs.PairBatch) under a model, in float32; `whole` asks for `chosen_nll`."""
    network: Any = model
    h_BTD = network.hidden(batch["tokens"], positions_BT=batch["positions"], documents_BT=batch["documents"])
    counted_BT, targets_BT = batch["scored"], batch["targets"]
    wanted_BT = targets_BT if whole else torch.where(counted_BT, targets_BT, IGNORED)
    bias = getattr(model, "head_bias", None)
    flat = token_logps(h_BTD.flatten(0, 1), network.head_weight, wanted_BT.flatten(), bias)
    logps_BT, documents_BT = flat.view_as(targets_BT), batch["documents"]
    tokens = by_document(counted_BT.float(), documents_BT)
    policy = by_document(torch.where(counted_BT, logps_BT, 0.0), documents_BT)
    nll = torch.zeros_like(policy[..., 0])
    if whole:
        every = by_document((targets_BT != IGNORED).float(), documents_BT)
        nll = -(by_document(logps_BT, documents_BT) / every.clamp(min=1))[..., 0]
    return Scores(policy, batch["reference"], tokens, nll, batch["labels"])


def by_document(values_BT: Tensor, documents_BT: Tensor) -> Tensor:
    """Sums over the documents of each row, as pairs (B, P, 2); what belongs to document 0 is left out."""
    rows, length = values_BT.shape
    first_B1 = torch.arange(rows, device=values_BT.device)[:, None] * (length + 1)
    places_N = (documents_BT.long() + first_B1).flatten()
    sums_N = values_BT.new_zeros(rows * (length + 1)).index_add(0, places_N, values_BT.flatten())
    return sums_N.view(rows, length + 1)[:, 1:].unflatten(1, (-1, 2))


def token_logps(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """log p(target) of each token (N,), float32, 0 where a target is -100, from the last hidden states.

    CHUNK · V scores exist at once: the backward pass makes them again, chunk by chunk, or where the output matrix is
    not trained needs none. What has no target is left out, unless the code is compiled, which must know its shapes.
    """
    weight_VD = weight_VD.to(h_ND.dtype)  # a frozen embedding may be narrower

    def plain(h: Tensor, targets: Tensor) -> Tensor:
        scores = F.linear(h, weight_VD, bias_V).float()  # sums over V in bfloat16 would be off by percents
        return -F.cross_entropy(scores, targets, reduction="none", ignore_index=IGNORED)

    def chunked(h: Tensor, targets: Tensor) -> Tensor:
        pieces = zip(h.split(CHUNK), targets.split(CHUNK), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([plain(*piece) for piece in pieces])
        options: dict[str, Any] = {
            "use_reentrant": False,
            "preserve_rng_state": False,
        }  # nothing random inside
        return torch.cat([checkpoint(plain, *piece, **options) for piece in pieces])

    if torch.compiler.is_compiling():
        return chunked(h_ND, targets_N)
    wanted = (targets_N != IGNORED).nonzero()[:, 0]
    given = h_ND[wanted], targets_N[wanted]
    frozen = not weight_VD.requires_grad and (bias_V is None or not bias_V.requires_grad)
    if frozen and given[0].requires_grad:
        found = -frozen_costs(given[0], weight_VD, given[1], bias_V)
    else:
        found = chunked(*given)
    return found.new_zeros(len(targets_N)).index_add(0, wanted, found)
