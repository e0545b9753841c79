"""BLEU and chrF of any part of a corpus, from counts a sentence that only have to be summed: what resampling needs.

Both are sacrebleu's defaults (Post 2018, arXiv:1804.08771; chrF2: Popović 2015): a corpus score is that of the sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDERS, WORDS = 6, 4  # n-grams of characters, of words
BETA = 2  # how much more recall weighs than precision


def counts(said: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64]:
    """(texts, 28): `bleu_counts` and `chrf_counts` of each text and its reference. ImportError without sacrebleu."""
    pairs = list(zip(said, wanted, strict=True))
    return np.array([np.concatenate((bleu_counts(*pair), chrf_counts(*pair))) for pair in pairs])


def scores(counts_N: NDArray[np.int64]) -> dict[str, float]:
    """{"bleu", "chrf"} of the texts with these `counts`."""
    sums = counts_N.sum(0)
    return {"bleu": bleu(sums[: 2 * WORDS + 2]), "chrf": chrf(sums[2 * WORDS + 2 :])}


def bleu_counts(said: str, wanted: str) -> NDArray[np.int64]:
    """(10,) matching n-grams of words, all that were said, and both lengths. ImportError without sacrebleu."""
    from sacrebleu.metrics.bleu import BLEU

    found: Any = BLEU(effective_order=True).sentence_score(said, [wanted])
    return np.array([*found.counts, *found.totals, found.sys_len, found.ref_len], np.int64)


def bleu(counts: NDArray[np.int64]) -> float:
    """0 to 100, of summed `bleu_counts`."""
    from sacrebleu.metrics.bleu import BLEU

    own = [int(count) for count in counts]
    found: Any = BLEU.compute_bleu(own[:WORDS], own[WORDS : 2 * WORDS], own[-2], own[-1], smooth_method="exp")
    return float(found.score)


def chrf_counts(said: str, wanted: str) -> NDArray[np.int64]:
    """(18,) for n = 1 to 6: n-grams of characters that were said, that were wanted, and that are both."""
    ours, theirs = "".join(said.split()), "".join(wanted.split())
    rows = []
    for n in range(1, ORDERS + 1):
        a, b = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (ours, theirs))
        rows.append((a.total() if b else 0, b.total(), (a & b).total()))
    return np.array(rows, np.int64).ravel()


def chrf(counts: NDArray[np.int64]) -> float:
    """0 to 100, of summed `chrf_counts`; orders that either side lacks do not count."""
    own = counts.reshape(ORDERS, 3).astype(np.float64)
    own = own[(own[:, 0] > 0) & (own[:, 1] > 0)]
    if not len(own):
        return 0.0
    precision, recall = (own[:, 2] / own[:, 0]).mean(), (own[:, 2] / own[:, 1]).mean()
    if precision + recall == 0:
        return 0.0
    return float(100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall))
