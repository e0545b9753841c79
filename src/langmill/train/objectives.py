"""What training minimises: pure functions of a model and a batch.

An objective returns a SUM over the tokens it scores and their number, never a mean: only so can the
optimizer step weigh micro-batches by their tokens. B rows, T tokens, N = B·T, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from langmill.model.sparing import narrowed

IGNORED = -100  # a target that is not scored
CHUNK = 1024  # tokens whose V scores exist at once
FROZEN_CHUNK = 512  # the same where only the states' gradient is wanted
WHOLE = 1 << 25  # scores that may exist at once in mixed precision: 400 MB

Tensors = Mapping[str, Tensor]  # the arrays of a batch by name, on the model's device
Objective = Callable[[nn.Module, Tensors], tuple[Tensor, Tensor]]


def causal(model: nn.Module, batch: Tensors) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy: the sum of -ln p(target) in nats over scored targets, and their number.

    batch: "tokens" and "targets" int64 (B, T), targets of -100 unscored; "documents" (B, T) keeps
    attention inside a document and "positions" (B, T) restarts there; both may be left out. A model
    with a `head_bias` (V,) has it added.
    """
    network: Any = model
    h_BTD = network.hidden(
        batch["tokens"], positions_BT=batch.get("positions"), documents_BT=batch.get("documents")
    )
    targets_N = batch["targets"].flatten()
    loss = head_loss(h_BTD.flatten(0, 1), network.head_weight, targets_N, getattr(model, "head_bias", None))
    return loss, (targets_N != IGNORED).sum()


OBJECTIVES: Mapping[str, Objective] = {"causal": causal}  # by the name that settings give


def head_loss(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """Cross-entropy summed over scored targets (N,), from the last hidden states and the output matrix.

    Peak memory is that of CHUNK · V scores, or of N · V up to WHOLE of them: 0.3 GB in float32 instead of
    2.3 for 4096 x 576 and 49,152 words. Measured on CPU, 4096 x 384 and 8192 words: in float32 torch's
    chunked kernel takes 0.75 to 0.8 of the plain time (its own choice of chunk, 128, takes longer than 1024,
    which does as well as 2048). In mixed precision that kernel works in float32, or else sums losses in
    bfloat16. There a CPU has `_Head`, 0.67 of the plain time. Elsewhere the scores are made whole, or where they
    are too many, in chunks that the backward pass makes again, for 1.03 to 1.07 of a step's time.
    """

    weight_VD = weight_VD.to(h_ND.dtype)  # a frozen embedding may be narrower
    if h_ND.requires_grad and not weight_VD.requires_grad and (bias_V is None or not bias_V.requires_grad):
        return frozen_head_loss(h_ND, weight_VD, targets_N, bias_V)

    def plain(
        h: Tensor, targets: Tensor, options: torch.nn.LinearCrossEntropyOptions | None = None
    ) -> Tensor:
        return F.linear_cross_entropy(
            h, weight_VD, targets, linear_bias=bias_V, reduction="sum", ignore_index=IGNORED, options=options
        )

    if not torch.is_autocast_enabled(h_ND.device.type):
        retain = torch.compiler.is_compiling()  # compiled code cannot have it otherwise
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, allow_retain_graph=retain)
        return plain(h_ND, targets_N, options)
    if h_ND.device.type == "cpu" and h_ND.requires_grad and not torch.compiler.is_compiling():
        scored = targets_N != IGNORED
        total: Tensor = _Head.apply(h_ND[scored], weight_VD, targets_N[scored], bias_V)  # type: ignore[no-untyped-call]
        return total
    if len(h_ND) * len(weight_VD) <= WHOLE:
        return plain(h_ND, targets_N)
    pieces = zip(h_ND.split(CHUNK), targets_N.split(CHUNK), strict=True)
    return torch.stack([checkpoint(plain, h, targets, use_reentrant=False) for h, targets in pieces]).sum()


# How many targets are scored differs from batch to batch, and compiled code wants one shape.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def frozen_head_loss(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """`head_loss` where the output matrix is not trained: unscored rows cost nothing, and the gradient of the states is
    made with the scores, so that a chunk's scores are made once and dropped."""
    scored = targets_N != IGNORED
    return frozen_costs(h_ND[scored], weight_VD, targets_N[scored], bias_V).sum()


def frozen_costs(h_KD: Tensor, weight_VD: Tensor, targets_K: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """-ln p(target) of each row (K,), float32, for an output matrix that is not trained."""
    costs_K: Tensor = _FrozenHead.apply(h_KD, weight_VD, targets_K, bias_V)  # type: ignore[no-untyped-call]
    return costs_K


def _errors(
    h_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-ln softmax(h Wᵀ + b)[target] of each row (C,), and softmax - onehot (C, V): what the scores' gradient is."""
    z_CV = F.linear(h_CD, weight_VD, bias_V).float()
    p_CV = torch.softmax(z_CV, dim=-1)
    best_C1, place_C1 = z_CV.max(dim=-1, keepdim=True)
    target_C1 = targets_C[:, None]
    # ln of the sum, from the largest score's own share of it: no underflow, and no second pass of exp
    log_sum_C1 = best_C1 - p_CV.gather(1, place_C1).log()
    costs_C = (log_sum_C1 - z_CV.gather(1, target_C1))[:, 0]
    del z_CV  # before a product takes p in its own type
    return costs_C, p_CV.scatter_add_(1, target_C1, torch.full_like(log_sum_C1, -1.0))


class _FrozenHead(torch.autograd.Function):
    """-ln softmax(h Wᵀ + b)[target] of each row; d/dh = (softmax - onehot) W."""

    @staticmethod
    def forward(
        ctx: Any, h_KD: Tensor, weight_VD: Tensor, targets_K: Tensor, bias_V: Tensor | None
    ) -> Tensor:
        costs_K, gradient_KD = h_KD.new_empty(len(h_KD), dtype=torch.float32), torch.empty_like(h_KD)
        weight_VD = narrowed(weight_VD)  # once, not for every chunk
        for at in range(0, len(h_KD), FROZEN_CHUNK):
            rows = slice(at, at + FROZEN_CHUNK)
            costs_K[rows], error_CV = _errors(h_KD[rows], weight_VD, targets_K[rows], bias_V)
            gradient_KD[rows] = torch.matmul(error_CV, weight_VD).to(h_KD.dtype)  # autocast chooses the type
        ctx.save_for_backward(gradient_KD)
        return costs_K

    @staticmethod
    def backward(ctx: Any, gradient_K: Tensor) -> tuple[Tensor, None, None, None]:
        (saved_KD,) = ctx.saved_tensors
        return (gradient_K[:, None] * saved_KD).to(saved_KD.dtype), None, None, None


class _Head(torch.autograd.Function):
    """The sum of `_FrozenHead`'s rows, and the gradients of the matrix and the bias too, made with the scores in chunks
    that stay in the processor's cache."""

    @staticmethod
    def forward(
        ctx: Any, h_KD: Tensor, weight_VD: Tensor, targets_K: Tensor, bias_V: Tensor | None
    ) -> Tensor:
        gradient_KD, narrow_VD = torch.empty_like(h_KD), narrowed(weight_VD)
        own_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        own_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        total, chunk = h_KD.new_zeros((), dtype=torch.float32), min(max(len(weight_VD) // 32, 256), CHUNK)
        for at in range(0, len(h_KD), chunk):
            h_CD = h_KD[at : at + chunk].to(narrow_VD.dtype)
            costs_C, error_CV = _errors(h_CD, narrow_VD, targets_K[at : at + chunk], bias_V)
            total += costs_C.sum()
            if own_V is not None:
                own_V += error_CV.sum(0)
            narrow_CV = error_CV.to(narrow_VD.dtype)
            gradient_KD[at : at + chunk] = torch.mm(narrow_CV, narrow_VD)
            own_VD += torch.mm(narrow_CV.T, h_CD)
        ctx.save_for_backward(gradient_KD, own_VD, own_V)
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved_KD, own_VD, own_V = ctx.saved_tensors
        weights, bias = ctx.dtypes
        own_V = None if own_V is None else (gradient * own_V).to(bias)
        return (gradient * saved_KD).to(saved_KD.dtype), (gradient * own_VD).to(weights), None, own_V
