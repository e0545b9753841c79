"""Near-duplicate texts, so that a split can keep them on one side: for the converters of assets.py."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from math import ceil

WORD = re.compile(r"[^\W\d_]+")


def groups(texts: Sequence[str], alike: float = 0.8) -> list[int]:
    """A number for each text, shared by near-duplicates: runs of five words with a Jaccard index over `alike`.

    Exact, by prefix filtering (Bayardo et al. 2007): of two alike sets, sorted rarest first, the heads overlap.
    Two texts that are each like a third share its number.
    """
    sets = [_runs(text) for text in texts]
    often = Counter(run for runs in sets for run in runs)
    leader = list(range(len(texts)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    holders: dict[bytes, list[int]] = defaultdict(list)
    for i, runs in enumerate(sets):
        head = sorted(runs, key=lambda run: (often[run], run))[: len(runs) - ceil(alike * len(runs)) + 1]
        for j in {j for run in head for j in holders[run]}:
            shared = len(runs & sets[j])
            if find(i) != find(j) and shared > alike * (len(runs) + len(sets[j]) - shared):
                leader[find(i)] = find(j)
        for run in head:
            holders[run].append(i)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(find(i), len(numbers)) for i in range(len(texts))]


def _runs(text: str) -> set[bytes]:
    words = WORD.findall(text.casefold())
    runs = (" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4)))
    return {blake2b(run.encode(), digest_size=8).digest() for run in runs}
