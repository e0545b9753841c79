"""Which texts are held out so that every label is scored, and what to know of the labels of all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence

import numpy as np

from langmill.data.batches import Ints
from langmill.data.examples import hash_of

NAMED = 10  # labels that a sentence lists


def stratified(keys: Sequence[bytes], labels: Sequence[Collection[str]], holdout: float) -> tuple[Ints, Ints]:
    """(training, held-out) numbers of items with these keys and labels; equal keys stand on one side.

    As many keys are held out as `examples.apart` would take, and which say their hashes, as there. But as far as they
    go round, each label of two keys or more has one of them, the common labels first; then each label has its share
    (of several labels the rarest counts: Sechidis et al. 2011, section 3). The last key of a label is never held out.
    """
    groups: dict[bytes, set[str]] = {}
    for key, own in zip(keys, labels, strict=True):
        groups.setdefault(key, set()).update(own)
    none = holdout == 0 or len(groups) < 2
    count = 0 if none else min(len(groups) - 1, max(1, round(holdout * len(groups))))
    order = sorted(groups, key=hash_of, reverse=True)
    total = Counter(label for own in groups.values() for label in own)
    left, held, seen = total.copy(), set[bytes](), set[str]()

    def take(key: bytes) -> bool:
        own = groups[key]
        if key in held or len(held) == count or any(left[label] < 2 for label in own):
            return False
        held.add(key)
        seen.update(own)
        left.subtract(own)
        return True

    by_label = defaultdict(list)
    for key in order if count else ():
        for label in groups[key]:
            by_label[label].append(key)
    for label in sorted(by_label, key=lambda label: (-total[label], label)):
        if label not in seen and len(held) < count:
            next((key for key in by_label[label] if take(key)), None)
    for key in _by_shares(order, groups, total):
        take(key)
    apart = np.array([key in held for key in keys], np.bool_)
    return np.flatnonzero(~apart), np.flatnonzero(apart)


def _by_shares(order: Sequence[bytes], groups: dict[bytes, set[str]], total: Counter[str]) -> list[bytes]:
    """The keys so that any number of first ones has of each stratum its share, and within a stratum their order."""
    stratum = {key: min(groups[key], key=lambda label: (total[label], label), default="") for key in order}
    sizes, rank, place = Counter(stratum.values()), Counter[str](), dict[bytes, float]()
    for key in order:
        place[key] = (rank[stratum[key]] + 0.5) / sizes[stratum[key]]
        rank[stratum[key]] += 1
    return sorted(order, key=place.__getitem__)


def unscored(labels: Sequence[Collection[str]], held: Collection[int]) -> str:
    """A sentence that names the labels that no held-out text has, "" where there is none. held: numbers of texts."""
    total = Counter(label for own in labels for label in set(own))
    missing = sorted(total.keys() - {label for number in held for label in labels[number]})
    if not missing or not held:
        return ""
    named = [f'"{label}" ({total[label]:,} in all)' for label in missing[:NAMED]]
    more = [f"{len(missing) - NAMED:,} more"] if len(missing) > NAMED else []
    return f"no held-out text has the label {', '.join([*named, *more])}: the figures say nothing of that."


def contradicted(rows: Iterable[tuple[str, Hashable, Hashable]]) -> tuple[int, str]:
    """(how many rows have a text that another row labels otherwise, a sentence that names two, or "") of rows as (where
    it stands, text, label): a model can learn no more than how often each label is right."""
    found: dict[Hashable, dict[Hashable, list[str]]] = {}
    for where, text, label in rows:
        found.setdefault(text, {}).setdefault(label, []).append(where)
    apart = [own for own in found.values() if len(own) > 1]
    if not apart:
        return 0, ""
    first, second, *_ = (places[0] for places in apart[0].values())
    count = sum(len(places) for own in apart for places in own.values())
    return count, (
        f"{len(apart):,} texts occur with different labels (such as {first} and {second}): no model can tell which is "
        "right."
    )
