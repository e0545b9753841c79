"""Asks a rule about the rows of a batch that are still kept, some hundred thousand characters at a time.

A batch is a pyarrow Table with the columns id, text, source, meta and dropped. R: rows that a rule is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from langmill.data.characters import LONE, Bools, Ints, Texts, sums

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 1 << 19  # characters at a time: what numpy makes of them stays in the processor's cache
SHARE = 1 / 3  # of a text's words, from which it is read by characters
_LEAST = 1 / 50  # of its characters, where that can be: English words are long


@dataclass(frozen=True, slots=True)
class Verdict:
    """(R,) for each reason: which rows fail; the first reason of a row is the one told. New texts by row."""

    reasons: dict[str, Bools]
    changed: dict[int, str] = field(default_factory=dict)


def judge(
    batch: pa.Table,
    name: str,
    rule: Callable[[list[str]], Verdict],
    *,
    by_characters: bool | None,
    among: Bools | None = None,
) -> pa.Table:
    """The batch with "name: reason" in `dropped` for rows that fail, and changed texts for others.

    `by_characters`: True asks about texts in scripts without spaces alone, False about all others, None about all.
    `among`: asks about these rows alone.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    text = batch.column("text").combine_chunks()
    asked = batch.column("dropped").is_null().to_numpy(zero_copy_only=False)
    if among is not None:
        asked &= among
    if by_characters is not None:
        asked &= without_spaces(text, asked) == by_characters
    reasons: list[str] = []
    codes = np.full(len(batch), -1, np.int32)
    changed: dict[int, str] = {}
    for rows, texts in chunks(text, np.flatnonzero(asked)):
        verdict = rule(texts)
        reasons = reasons or list(verdict.reasons)
        for code, failing in reversed(list(enumerate(verdict.reasons.values()))):
            codes[rows[failing]] = code
        changed.update((int(rows[row]), new) for row, new in verdict.changed.items())
    failed = codes >= 0
    if failed.any():
        told = pa.array([f"{name}: {reason}" for reason in reasons], pa.string())
        told = told.take(pa.array(codes, mask=~failed))
        batch = _replace(batch, "dropped", pc.coalesce(batch.column("dropped").combine_chunks(), told))
    changed = {row: new for row, new in changed.items() if not failed[row]}
    if changed:
        mask = np.zeros(len(batch), bool)
        mask[list(changed)] = True
        new = pa.array([changed[row] for row in sorted(changed)], text.type)
        batch = _replace(batch, "text", pc.replace_with_mask(text, pa.array(mask), new))
    return batch


def below(values: NDArray[Any], least: float | None) -> Bools:
    """(R,) true where less than the least; none where that is None."""
    return np.zeros(len(values), bool) if least is None else np.asarray(values < least)


def above(values: NDArray[Any], most: float | None) -> Bools:
    """(R,) true where more than the most; none where that is None."""
    return np.zeros(len(values), bool) if most is None else np.asarray(values > most)


def chunks(text: Any, rows: Ints) -> Iterator[tuple[Ints, list[str]]]:
    """Row numbers and their texts, about CHUNK characters at a time; a longer text comes alone."""
    import pyarrow.compute as pc

    chosen = text.take(rows)
    sizes = pc.utf8_length(chosen).to_numpy(zero_copy_only=False)
    ends = np.cumsum(sizes)
    start = 0
    while start < len(rows):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + CHUNK, "right")))
        yield rows[start:end], chosen.slice(start, end - start).to_pylist()
        start = end


def without_spaces(text: Any, asked: Bools) -> Bools:
    """(rows,) texts of whose words SHARE are characters of scripts that put no spaces between words; False where not
    asked. Words and not characters are counted, since names, code and addresses make up much of a technical page."""
    import pyarrow.compute as pc

    sizes = pc.utf8_length(text).to_numpy(zero_copy_only=False)
    extra = pc.binary_length(text).to_numpy(zero_copy_only=False) - sizes
    # Each such character has at least two bytes more than an English letter.
    likely = asked & (extra >= 2 * _LEAST * sizes) & (sizes > 0)
    found = np.zeros(len(text), bool)
    for rows, texts in chunks(text, np.flatnonzero(likely)):
        read = Texts(texts)
        lone = sums((read.flags_N[read.names.starts] & LONE) != 0, read.names.bounds)
        found[rows] = (lone >= SHARE * read.names.counts) & (lone > 0)
    return found


def _replace(batch: Any, name: str, column: Any) -> Any:
    return batch.set_column(batch.schema.get_field_index(name), name, column)
