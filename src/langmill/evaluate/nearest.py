"""What a search by vectors finds: the rank of what is right among all candidates, for each of many queries.

Figures as in sentence-transformers' InformationRetrievalEvaluator. NDCG: Järvelin & Kekäläinen 2002, with gains of 1.
Q queries, C candidates, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
CUT = 10  # the last rank that counts
CELLS = 1 << 24  # cosines that are held at once


@dataclass(frozen=True)
class Found:
    """ranks: of all that is right, from 1, ascending. nearest: the number of the candidate that comes first."""

    ranks: tuple[int, ...]
    nearest: int

    @property
    def figures(self) -> dict[str, float]:
        """accuracy@1, mrr@10 and ndcg@10 of this query."""
        first, shown = self.ranks[0], [rank for rank in self.ranks if rank <= CUT]
        best = sum(1 / np.log2(1 + rank) for rank in range(1, min(len(self.ranks), CUT) + 1))
        return {
            "accuracy@1": float(first == 1),
            f"mrr@{CUT}": 1 / first if first <= CUT else 0.0,
            f"ndcg@{CUT}": float(sum(1 / np.log2(1 + rank) for rank in shown) / best),
        }


def search(
    queries_QD: Floats, candidates_CD: Floats, right: Sequence[Sequence[int]], left_out: Sequence[int | None]
) -> Iterator[Found]:
    """Of each query, by cosines of vectors of length 1.

    right: the numbers of its right candidates, one at least. left_out: a candidate that it does not choose from, such
    as its own text. What is as near as a right one comes before it, so that a model that takes all texts for equal
    finds nothing; so does what cannot be compared (NaN).
    """
    step = max(1, CELLS // max(1, len(candidates_CD)))
    for at in range(0, len(queries_QD), step):
        scores_QC = queries_QD[at : at + step] @ candidates_CD.T
        for scores_C, own, without in zip(
            scores_QC, right[at : at + step], left_out[at : at + step], strict=True
        ):
            if without is not None:
                scores_C[without] = -np.inf
            hits = -np.sort(-scores_C[list(own)])
            ahead = [int((~(scores_C < hit)).sum() - (~(hits < hit)).sum()) for hit in hits]
            ranks = tuple(1 + place + before for place, before in enumerate(ahead))
            yield Found(ranks, int(scores_C.argmax()))
