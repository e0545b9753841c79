"""How well a model predicts text: loss, perplexity and bits per byte, with an interval over documents.

Legend: B rows of a batch, T tokens of the longest row, N scored tokens, D width (N documents in the
arrays of `Scores`), R resamples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from langmill.common.errors import DataError, ModelError, SettingsError
from langmill.families.folder import Model
from langmill.model.config import ModelConfig
from langmill.text.tasks import windows

Interval = tuple[float, float]
Window = tuple[int, Tensor, Tensor]  # which document, inputs (T,), targets (T,)
_SCORES = 1 << 24  # logits held at once: 64 MiB in float32
_PICKS = 1 << 21  # documents picked at once by the bootstrap
_SORTED = 64  # batches of windows that are sorted by length together


class Encoded(NamedTuple):
    """A document to score: its name, its ids without special tokens, its text's bytes in UTF-8."""

    name: str
    ids: Sequence[int] | NDArray[Any]
    bytes: int


@dataclass(frozen=True)
class Scores:
    """What `score` found. Logarithms: loss in nats a token, bits_per_byte in bits a byte of UTF-8 text.

    An interval is the 95 % percentile bootstrap over documents (Efron & Tibshirani 1993, chapter 13);
    None where there is one document, which says nothing about others. The arrays hold one value a
    document, in the order of `names`.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    loss_interval: Interval | None
    perplexity_interval: Interval | None
    bits_per_byte_interval: Interval | None
    documents: int
    tokens: int
    bytes: int
    names: tuple[str, ...]
    nll_N: NDArray[np.float64]
    tokens_N: NDArray[np.int64]
    bytes_N: NDArray[np.int64]


def score(
    model: Model,
    documents: Iterable[Encoded],
    *,
    start_id: int | None,
    length: int,
    rows: int = 8,
    resamples: int = 1000,
    seed: int = 0,
    on_tokens: Callable[[int], object] | None = None,
) -> Scores:
    """Score every token of every document, each in its own context, the start token before it.

    length: tokens in one window; a longer document is cut into windows of which each sees only itself,
    as in training. rows: windows in one pass; no figure depends on it. Without a start_id a document's
    first token has no context and is not scored. The documents are read as a stream. `on_tokens` is
    called with the number of tokens that each pass scored.
    Raises DataError where nothing can be scored, ModelError where the model's loss is not finite.
    """
    if isinstance(model.config, ModelConfig) and length > model.config.length:
        raise SettingsError(f"windows of {length} tokens exceed the model's {model.config.length} positions")
    names: list[str] = []
    sizes: list[int] = []
    nll: list[float] = []
    tokens: list[int] = []
    start = np.array([] if start_id is None else [start_id], np.int64)

    def cut() -> Iterator[Window]:
        for index, document in enumerate(documents):
            names.append(document.name)
            sizes.append(document.bytes)
            nll.append(0.0)
            tokens.append(0)
            sequence = np.concatenate((start, np.asarray(document.ids, np.int64)))
            for inputs, targets in windows(sequence, length):
                yield index, torch.from_numpy(inputs), torch.from_numpy(targets)

    for batch in _batches(cut(), rows):
        for (index, _, targets_T), found in zip(batch, _row_losses(model, batch), strict=True):
            nll[index] += found
            tokens[index] += len(targets_T)
        if on_tokens is not None:
            on_tokens(sum(len(targets_T) for _, _, targets_T in batch))
    if not sum(tokens):
        raise DataError(f"the {len(names)} documents hold no token to score: give text that is not empty")
    return _summary(names, np.array(nll), np.array(tokens), np.array(sizes), resamples, seed)


def _batches(items: Iterator[Window], rows: int) -> Iterator[list[Window]]:
    """Rows of like length together: sorted, longest first, within a bounded stretch of the stream."""
    while stretch := list(itertools.islice(items, rows * _SORTED)):
        stretch.sort(key=lambda window: -len(window[1]))
        yield from (stretch[at : at + rows] for at in range(0, len(stretch), rows))


@torch.inference_mode()
def _row_losses(model: Model, batch: Sequence[Window]) -> list[float]:
    """Negative log-likelihood of each row's targets, in nats.

    Rows are padded on the right, where a causal model's real tokens do not look.
    """
    device = next(model.parameters()).device
    tokens_BT = pad_sequence([inputs_T for _, inputs_T, _ in batch], batch_first=True).to(device)
    lengths = [len(targets_T) for _, _, targets_T in batch]
    targets_N = torch.cat([targets_T for _, _, targets_T in batch]).to(device)
    real_BT = torch.arange(tokens_BT.shape[1]) < torch.tensor(lengths)[:, None]
    h_ND = model.hidden(tokens_BT)[real_BT.to(device)]
    size = max(1, _SCORES // model.config.vocab)
    nll_N = torch.cat(
        [
            F.cross_entropy(model.logits(h_D).float(), target, reduction="none")
            for h_D, target in zip(h_ND.split(size), targets_N.split(size), strict=True)
        ]
    )
    found = [float(row.double().sum()) for row in nll_N.cpu().split(lengths)]
    if not all(map(math.isfinite, found)):
        raise ModelError("the model's loss on this text is not finite: its weights are damaged or overflow")
    return found


def _summary(
    names: Sequence[str],
    nll_N: NDArray[np.float64],
    tokens_N: NDArray[np.int64],
    bytes_N: NDArray[np.int64],
    resamples: int,
    seed: int,
) -> Scores:
    totals_3N = np.stack((nll_N, tokens_N, bytes_N)).astype(np.float64)[:, tokens_N > 0]
    nll, tokens, size = totals_3N.sum(-1)
    by_token = by_byte = None
    if totals_3N.shape[1] > 1:
        nll_R, tokens_R, bytes_R = bootstrap(totals_3N, resamples, seed)
        by_token, by_byte = _interval(nll_R / tokens_R), _interval(nll_R / bytes_R / math.log(2))
    return Scores(
        loss=float(nll / tokens),
        perplexity=_exp(nll / tokens),
        bits_per_byte=float(nll / size / math.log(2)),
        loss_interval=by_token,
        perplexity_interval=None if by_token is None else (_exp(by_token[0]), _exp(by_token[1])),
        bits_per_byte_interval=by_byte,
        documents=len(names),
        tokens=int(tokens),
        bytes=int(size),
        names=tuple(names),
        nll_N=nll_N,
        tokens_N=tokens_N,
        bytes_N=bytes_N,
    )


def bootstrap(totals_KN: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """(K, R) sums of K per-document totals over R samples of N documents, drawn with replacement.

    Ratios of the sums are bootstrap replicates of a ratio such as nats a token.
    """
    random = np.random.default_rng(seed)
    count = totals_KN.shape[1]
    together = max(1, _PICKS // count)
    parts = []
    for done in range(0, resamples, together):
        picks_RN = random.integers(count, size=(min(together, resamples - done), count))
        parts.append(totals_KN[:, picks_RN].sum(-1))
    return np.concatenate(parts, axis=1)


def _interval(values_R: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values_R, (2.5, 97.5))
    return float(low), float(high)


def _exp(loss: float) -> float:
    return math.exp(min(loss, 709.0))  # the largest that a float holds
