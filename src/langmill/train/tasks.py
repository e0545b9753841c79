"""What encoders and encoder-decoders learn: objectives as in `objectives`, pure functions of a model and a batch.

Options are keywords, to be bound with functools.partial. The batches are those of data.rows, their arrays named without
the shape. B rows, T tokens, P places for documents in a row, K what is scored or all documents, D width, C classes,
V vocabulary, M pairs, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from langmill.model.config import Pool
from langmill.model.pool import pooled
from langmill.train.objectives import IGNORED, Tensors, head_loss

Sum = tuple[Tensor, Tensor]  # over what is scored, and how many that are
SCALE = 20.0  # of cosines: a temperature of 0.05, as in sentence-transformers
Work = TypeVar("Work", bound=Callable[..., Any])


def _eager(work: Work) -> Work:
    """How much is scored differs from batch to batch, and compiled code wants one shape: this runs as it is."""
    return cast(Work, torch.compiler.disable(work))


def masked(model: nn.Module, batch: Tensors) -> Sum:
    """Cross-entropy of the tokens at the places that have a target, in nats (Devlin et al. 2018, arXiv:1810.04805,
    section 3.1). batch: "tokens", "targets" (B, T), "documents", "positions", perhaps "types"."""
    return _head(model, _read(model, batch), batch["targets"], 0.0)


def seq2seq(model: nn.Module, batch: Tensors, *, label_smoothing: float = 0.0) -> Sum:
    """Cross-entropy of what a decoder writes of what an encoder read, in nats a token.

    batch: as `masked`, and "encoder_tokens", "encoder_documents", "encoder_positions" (B, S). label_smoothing ε: the
    target has 1 - ε and ε is spread over all V (Szegedy et al. 2016, arXiv:1512.00567, section 7), as transformers'
    LabelSmoother has it: CE + ε (z_target - mean z), for which no second pass over V is needed.
    """
    given = {name: batch.get(name) for name in ("encoder_tokens", "encoder_documents", "encoder_positions")}
    return _head(model, _read(model, batch, **given), batch["targets"], label_smoothing)


def classify(
    model: nn.Module, batch: Tensors, *, weights: Sequence[float] | None = None, label_smoothing: float = 0.0
) -> Sum:
    """Cross-entropy of each document's class. batch: "labels" (B, P), -1 where there is none.

    weights (C,): what a document of each class counts in the sum, while all count 1 in the number. So micro-batches
    of a step weigh as they should however classes fall into them; the loss is that of torch's weighted mean where
    weights average 1 over the training documents (N / (C · N_c) does), which keeps the learning rate's meaning.
    """
    return _classified(model, _read(model, batch), batch, weights, label_smoothing)


def multilabel(model: nn.Module, batch: Tensors, *, positive: Sequence[float] | None = None) -> Sum:
    """Binary cross-entropy of each document and class; both are counted. batch: "labels" (B, P, C): 1, 0, or -1 where
    unknown. positive (C,): what a class's presence weighs beside its absence."""
    return _multilabelled(model, _read(model, batch), batch, positive)


def regress(model: nn.Module, batch: Tensors) -> Sum:
    """Squared error of each document's number. batch: "values" (B, P), NaN where there is none."""
    return _regressed(model, _read(model, batch), batch)


def tag(model: nn.Module, batch: Tensors, *, weights: Sequence[float] | None = None) -> Sum:
    """Cross-entropy of the class of each token that has a target. batch: "targets" (B, T); weights as in `classify`."""
    return _tagged(model, _read(model, batch), batch["targets"], weights)


def span(model: nn.Module, batch: Tensors) -> Sum:
    """The mean of two cross-entropies for each document, of where its answer begins and where it ends, over its own
    tokens that are "allowed" (Devlin et al. 2018, section 4.2); transformers' where those are all.

    batch: "starts", "ends" (B, P), -1 where there is no document; "allowed" (B, T).
    """
    network: Any = model
    z_NS = network.logits(_read(model, batch)).float().flatten(0, 1)
    documents_BT, wanted_BPS = (
        batch["documents"].long(),
        torch.stack((batch["starts"], batch["ends"]), dim=-1),
    )
    rows, places = batch["starts"].shape
    real_BT = documents_BT > 0
    first_B1 = torch.arange(rows, device=z_NS.device)[:, None] * places
    place_N = torch.where(real_BT, first_B1 + documents_BT - 1, rows * places).flatten()
    allowed_N1 = (real_BT & batch["allowed"]).flatten()[:, None]
    scores_NS = z_NS.masked_fill(~allowed_N1, -torch.inf)
    best_GS = z_NS.new_full((rows * places + 1, 2), -torch.inf)
    best_GS = best_GS.scatter_reduce(0, place_N[:, None].expand(-1, 2), scores_NS.detach(), "amax")
    best_GS = best_GS.masked_fill(best_GS == -torch.inf, 0.0)
    shares_NS = (scores_NS - best_GS[place_N]).exp()
    sums_GS = torch.zeros_like(best_GS).index_add(0, place_N, shares_NS)[:-1]
    wanted_GS = wanted_BPS.flatten(0, 1)
    known_GS = wanted_GS >= 0
    log_sums_GS = best_GS[:-1] + torch.where(known_GS, sums_GS, 1.0).log()
    own_NS = F.pad(wanted_GS, (0, 0, 0, 1), value=-1)[place_N]
    hit_NS = own_NS == batch["positions"].flatten()[:, None]
    loss = torch.where(known_GS, log_sums_GS, 0.0).sum() - torch.where(hit_NS, z_NS, 0.0).sum()
    return loss / 2, known_GS[:, 0].sum()


def contrastive(
    model: nn.Module,
    batch: Tensors,
    *,
    scale: float = SCALE,
    symmetric: bool = False,
    dims: Sequence[tuple[int, float]] = (),
    pool: Pool | None = None,
) -> Sum:
    """InfoNCE: for each anchor the cross-entropy of its positive among the positives and hard negatives of the whole
    batch, by `scale` times their cosine (van den Oord et al. 2018, arXiv:1807.03748, eq. 4; with these negatives
    Henderson et al. 2017, arXiv:1705.00652, section 4.4).

    symmetric: the mean of that and of each positive's anchor among all anchors. dims: first numbers of an embedding
    that are trained to serve alone, each with the weight of its loss in the sum (Matryoshka: Kusupati et al. 2022,
    arXiv:2205.13147); none: all numbers. pool: how the states stand for a text, where the head does not say.
    batch: "pairs" (B, P), -1 where there is none. With "contents" (B, P, G) no text is held against an anchor that
    equals it, its positive or another positive of the same anchor.

    Negatives come from a micro-batch: the loss changes with how a step is cut into them, and so, unlike with the other
    objectives, more rows at once are not the same as more accumulation.
    """
    return _contrasted(model, _read(model, batch), batch, scale, symmetric, dims, pool)


def info_nce(x_MGE: Tensor, scale: float, symmetric: bool = False, false: Tensor | None = None) -> Tensor:
    """The loss of `contrastive` summed over M groups of an anchor, its positive and G - 2 negatives.

    false (M, M·(G-1)): candidates to leave out, positives first.
    """
    with torch.autocast(x_MGE.device.type, enabled=False):  # bfloat16 cannot tell cosines that are near 1
        anchors_ME, others_MGE = F.normalize(x_MGE, dim=-1).tensor_split([1], dim=1)
        candidates_NE = others_MGE.transpose(0, 1).flatten(0, 1)
        scores_MN = scale * anchors_ME[:, 0] @ candidates_NE.T
    if false is not None:
        scores_MN = scores_MN.masked_fill(false, -torch.inf)
    count = len(x_MGE)
    own_M = torch.arange(count, device=x_MGE.device)
    loss = F.cross_entropy(scores_MN, own_M, reduction="sum")
    if symmetric:
        loss = (loss + F.cross_entropy(scores_MN[:, :count].T, own_M, reduction="sum")) / 2
    return loss


def _false_negatives(contents_MG: Tensor) -> Tensor:
    """(M, M·(G-1)), which candidates are no negatives of each anchor: see `contrastive`."""
    others_N = contents_MG[:, 1:].T.flatten()
    same = (others_N == contents_MG[:, :1]) | (others_N == contents_MG[:, 1:2])
    count = len(contents_MG)
    same[:, :count] |= contents_MG[:, :1] == contents_MG[:, 0]
    same[:, :count].fill_diagonal_(False)
    return same


def _read(model: nn.Module, batch: Tensors, **more: Any) -> Tensor:
    """The last states (B, T, D)."""
    network: Any = model
    if "types" in batch:
        more["types_BT"] = batch["types"]
    h_BTD: Tensor = network.hidden(
        batch["tokens"], positions_BT=batch.get("positions"), documents_BT=batch.get("documents"), **more
    )
    return h_BTD


@_eager
def _head(model: nn.Module, h_BTD: Tensor, targets_BT: Tensor, label_smoothing: float) -> Sum:
    """Cross-entropy over the vocabulary at the places that have a target: the others cost nothing."""
    network: Any = model
    scored_BT = targets_BT != IGNORED
    targets_K, count = targets_BT[scored_BT], scored_BT.sum()
    if not len(targets_K):
        return h_BTD.sum() * 0.0, count
    h_KD = network.transform(h_BTD[scored_BT])
    weight_VD, bias_V = network.head_weight, network.head_bias
    loss = head_loss(h_KD, weight_VD, targets_K, bias_V)
    if label_smoothing:
        loss = loss + label_smoothing * _above_mean(h_KD, weight_VD, targets_K, bias_V)
    return loss, count


def _above_mean(h_KD: Tensor, weight_VD: Tensor, targets_K: Tensor, bias_V: Tensor | None) -> Tensor:
    """Σ_k (z_target - mean_v z_v), z = h Wᵀ + b, in float32."""
    h_KD = h_KD.float()
    found = (h_KD * F.embedding(targets_K, weight_VD).float()).sum()
    found = found - (h_KD.sum(dim=0) * weight_VD.mean(dim=0, dtype=torch.float32)).sum()
    if bias_V is not None:
        found = found + bias_V[targets_K].float().sum() - len(targets_K) * bias_V.float().mean()
    return found


@_eager
def _classified(
    model: nn.Module,
    h_BTD: Tensor,
    batch: Tensors,
    weights: Sequence[float] | None,
    label_smoothing: float,
) -> Sum:
    logits_KC, labels_K = _by_document(model, h_BTD, batch, "labels")
    return _classes(logits_KC, labels_K, -1, weights, label_smoothing)


@_eager
def _multilabelled(model: nn.Module, h_BTD: Tensor, batch: Tensors, positive: Sequence[float] | None) -> Sum:
    logits_KC, labels_KC = _by_document(model, h_BTD, batch, "labels")
    known_KC = labels_KC >= 0
    weigh = None if positive is None else logits_KC.new_tensor(positive)
    costs_KC = F.binary_cross_entropy_with_logits(
        logits_KC, labels_KC.clamp(min=0).to(logits_KC.dtype), pos_weight=weigh, reduction="none"
    )
    return torch.where(known_KC, costs_KC, 0.0).sum(), known_KC.sum()


@_eager
def _regressed(model: nn.Module, h_BTD: Tensor, batch: Tensors) -> Sum:
    logits_K1, values_K = _by_document(model, h_BTD, batch, "values")
    known_K = ~values_K.isnan()
    return ((logits_K1[:, 0][known_K] - values_K[known_K]) ** 2).sum(), known_K.sum()


@_eager
def _tagged(model: nn.Module, h_BTD: Tensor, targets_BT: Tensor, weights: Sequence[float] | None) -> Sum:
    network: Any = model
    scored_BT = targets_BT != IGNORED
    logits_KC = network.logits(h_BTD[scored_BT]).float()
    return _classes(logits_KC, targets_BT[scored_BT], IGNORED, weights, 0.0)


@_eager
def _contrasted(
    model: nn.Module,
    h_BTD: Tensor,
    batch: Tensors,
    scale: float,
    symmetric: bool,
    dims: Sequence[tuple[int, float]],
    pool: Pool | None,
) -> Sum:
    network: Any = model
    real_BP, documents_BT = batch["pairs"] >= 0, batch["documents"]
    if not real_BP.any():
        return h_BTD.sum() * 0.0, real_BP.sum()
    if pool is not None:
        x_KE = pooled(h_BTD, documents_BT, pool)
    else:
        x_KE = network.logits(network.pooled(h_BTD, documents_BT))
    x_MGE = x_KE.float().unflatten(0, (int(real_BP.sum()), -1))
    false = _false_negatives(batch["contents"][real_BP]) if "contents" in batch else None
    parts = [
        weight * info_nce(x_MGE[..., :dim], scale, symmetric, false)
        for dim, weight in dims or ((x_MGE.shape[-1], 1.0),)
    ]
    return torch.stack(parts).sum(), real_BP.sum()


def _by_document(model: nn.Module, h_BTD: Tensor, batch: Tensors, name: str) -> tuple[Tensor, Tensor]:
    """(scores of all documents (K, C), what the batch says of each (K, ...))."""
    network: Any = model
    logits_KC = network.logits(network.pooled(h_BTD, batch["documents"])).float()
    places_P = torch.arange(batch[name].shape[1], device=h_BTD.device)
    return logits_KC, batch[name][places_P < batch["documents"].amax(dim=1, keepdim=True)]


def _classes(
    logits_KC: Tensor,
    labels_K: Tensor,
    unknown: int,
    weights: Sequence[float] | None,
    label_smoothing: float,
) -> Sum:
    """Cross-entropy of classes, `unknown` left out, each thing times its class's weight."""
    known_K = labels_K != unknown
    logits_KC, labels_K = logits_KC[known_K], labels_K[known_K]
    weigh = None if weights is None else logits_KC.new_tensor(weights)
    loss = F.cross_entropy(logits_KC, labels_K, weigh, reduction="sum", label_smoothing=label_smoothing)
    return loss, known_K.sum()
