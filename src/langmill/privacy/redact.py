"""The step of `data prepare` that takes personal details and secrets out of texts, and the same for one text.

A batch is a pyarrow Table with the columns id, text, source, meta and dropped. Gates (see patterns.py) are asked of
the whole column by Arrow; texts that could hold something are read one by one, and only for what they could hold.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from langmill.common.errors import UsageError
from langmill.privacy.key import Key
from langmill.privacy.patterns import Find, apart, edition, find, tables
from langmill.privacy.plain import foreign, plain
from langmill.privacy.policy import Policy, masked, replaced

if TYPE_CHECKING:
    import pyarrow as pa

NAMES = ("person", "address")
META = "redacted"
AUTHORS = (
    "authors"  # of meta: those of a thread, whose names stand before what they said; see data/threads.py
)
# Of meta: what names a document, or says when it was made. It stays, so that `data why` finds the document.
_NAMES_IT = frozenset("id thread url date timestamp".split())
_SAMPLES = 3  # of each type, masked
Names = Callable[[Sequence[str]], list[list[Find]]]


def redact(text: str, policy: Policy = "mask", *, types: Sequence[str] = (), key: Key | None = None) -> str:
    """The text without the personal details and secrets that patterns find; see policy.py and `Redact`."""
    return Redact(policy, tuple(types), key).text(text)[0]


@dataclass(frozen=True)
class Redact:
    """Replaces e-mail addresses, telephone numbers, payment cards, accounts, national identities, addresses of
    machines and secrets, in text and meta (but for ids and addresses of documents); counts them in meta as
    "redacted": {type: number}. Authors of a thread are persons where their names stand before what they said; meta
    then names them no more.

    types: those that are looked for, none: all (`patterns.tables().types`). names: finds persons and addresses too
    (names.py). edition: of the patterns, so that a changed table makes another step. UsageError for a type or policy
    that does not exist, and for pseudonyms without a key.
    """

    policy: Policy = "mask"
    types: tuple[str, ...] = ()
    key: Key | None = None
    names: Names | None = None
    name: str = "redact"
    edition: str = field(default_factory=edition)

    def __post_init__(self) -> None:
        known = [*tables().types, *NAMES]
        for kind, given, all_ in (("type", self.types, known), ("policy", [self.policy], get_args(Policy))):
            for one in set(given) - set(all_):
                near = difflib.get_close_matches(one, all_, 1)
                raise UsageError(
                    f"{self.name}: there is no {kind} '{one}'"
                    + (f": did you mean {near[0]}?" if near else f": {', '.join(all_)}")
                )
        if self.policy == "pseudonym" and self.key is None:
            raise UsageError(f"{self.name}: pseudonyms need a key")

    def text(self, text: str, before: str = "") -> tuple[str, list[Find]]:
        """The text redacted, and what was found at which places of the text as it came.

        before: what stands before it, such as the name of its column, and counts as its context.
        """
        finds = self._all(before + text, None, self.names([text])[0] if self.names and not before else [])
        if before:
            finds = [f._replace(start=f.start - len(before), end=f.end - len(before)) for f in finds]
            finds = apart(
                [*(f for f in finds if f.start >= 0), *(self.names([text])[0] if self.names else [])]
            )
        return replaced(text, finds, self.policy, self.key), finds

    def _all(self, text: str, gates: Sequence[str] | None, named: Sequence[Find]) -> list[Find]:
        finds = find(text, gates) if gates is None or gates else []
        if named:
            finds = apart([*finds, *named])
        return [one for one in finds if one.type in self.types] if self.types else finds

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa
        import pyarrow.compute as pc

        if not len(batch):
            return batch
        kept = pc.is_null(batch["dropped"]).combine_chunks()
        batch, authors = _authors(batch, kept)
        batch = self._meta(batch, kept)
        text = batch["text"].combine_chunks()
        open_ = _open(text, kept)
        chosen = kept if self.names else open_.pop("any")
        rows = sorted({*pc.indices_nonzero(chosen).to_pylist(), *authors})
        texts = text.take(pa.array(rows, pa.int64())).to_pylist()
        named = self.names(texts) if self.names else [[]] * len(rows)
        gates = {name: mask.to_pylist() for name, mask in open_.items() if name != "any"}
        new: dict[int, str] = {}
        counts: dict[int, Counter[str]] = {}
        for row, one, own in zip(rows, texts, named, strict=True):
            own = [*own, *_labels(one, authors[row])] if row in authors else own
            finds = self._all(one, [name for name, mask in gates.items() if mask[row]], own)
            if finds:
                new[row] = replaced(one, finds, self.policy, self.key)
                counts[row] = Counter(found.type for found in finds)
        if not new:
            return batch
        mask = pa.array([row in new for row in range(len(batch))])
        told = batch["meta"].take(pa.array(list(counts), pa.int64())).to_pylist()
        meta = [_counted(said, count) for said, count in zip(told, counts.values(), strict=True)]
        for column, values in (("text", list(new.values())), ("meta", meta)):
            old = batch[column].combine_chunks()
            fresh = pc.replace_with_mask(old, mask, pa.array(values, old.type))
            batch = batch.set_column(batch.column_names.index(column), column, fresh)
        return batch

    def _meta(self, batch: pa.Table, kept: Any) -> pa.Table:
        """The batch with titles and the like redacted too, by patterns alone."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = batch["meta"].combine_chunks()
        open_ = _open(column, kept)
        rows = pc.indices_nonzero(open_.pop("any")).to_pylist()
        meta = column.to_pylist() if rows else []
        for row in rows:
            values, counts = json.loads(meta[row]), Counter[str]()
            for name in [n for n, value in values.items() if isinstance(value, str) and n not in _NAMES_IT]:
                values[name], finds = self._patterns(values[name])
                counts.update(one.type for one in finds)
            if counts:
                told = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
                meta[row] = _counted(told, counts)
        place = batch.column_names.index("meta")
        return batch.set_column(place, "meta", pa.array(meta, column.type)) if rows else batch

    def _patterns(self, text: str) -> tuple[str, list[Find]]:
        finds = self._all(text, None, [])
        return replaced(text, finds, self.policy, self.key), finds


def _open(text: Any, kept: Any) -> dict[str, Any]:
    """For each gate the rows for which it is open, and for "any" those for which one is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    other = pc.and_(kept, pc.match_substring_regex(text, f"[{foreign()}]"))
    if pc.any(other).as_py():
        text = pc.replace_with_mask(
            text, other, pa.array(map(plain, text.filter(other).to_pylist()), text.type)
        )
    found, any_ = {}, pa.array([False] * len(text))
    numbered = pc.match_substring_regex(text, "[0-9]")
    asked = {True: text.filter(numbered), False: text}
    for name, gate in tables().gates.items():
        seen = pc.match_substring_regex(asked[gate.digit], gate.ask)
        if gate.digit:
            seen = pc.replace_with_mask(numbered, numbered, seen)
        found[name] = pc.and_(kept, seen)
        any_ = pc.or_(any_, found[name])
    return found | {"any": any_}


def _authors(batch: pa.Table, kept: Any) -> tuple[pa.Table, dict[int, list[str]]]:
    """The batch without the authors that meta names, and those of each row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = batch["meta"].combine_chunks()
    named = pc.and_(kept, pc.match_substring(column, f'"{AUTHORS}"'))
    rows = pc.indices_nonzero(named).to_pylist()
    if not rows:
        return batch, {}
    meta, found = column.to_pylist(), {}
    for row in rows:
        values = json.loads(meta[row])
        if isinstance(values.get(AUTHORS), list):
            found[row] = [str(name) for name in values.pop(AUTHORS)]
            meta[row] = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    place = batch.column_names.index("meta")
    return batch.set_column(place, "meta", pa.array(meta, column.type)), found


def _labels(text: str, authors: Sequence[str]) -> Iterator[Find]:
    """Names of authors before a colon, wherever other steps put the lines; also as `Tidy` may have repaired them."""
    names = {*authors, *(_repaired(name) for name in authors)}
    choice = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    for found in re.finditer(rf"(?<!\w)(?:{choice})(?=: )", text):
        yield Find(*found.span(), "person")


def _repaired(name: str) -> str:
    try:
        return name.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return name


def _counted(meta: str, counts: Mapping[str, int]) -> str:
    if META not in meta:
        inside = ",".join(f'"{type}":{count}' for type, count in sorted(counts.items()))
        said = f'"{META}":{{{inside}}}}}'
        return "{" + said if meta == "{}" else f"{meta[:-1]},{said}"
    values = json.loads(meta)
    before = values.get(META)
    total = Counter(before if isinstance(before, dict) else {}) + Counter(counts)
    return json.dumps(values | {META: dict(sorted(total.items()))}, ensure_ascii=False, separators=(",", ":"))


@dataclass
class Tally:
    """Counts of finds by source and type, and a few masked samples of each type: nothing of the finds themselves."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    samples: dict[str, list[str]] = field(default_factory=dict)

    def take(self, source: str, text: str, finds: Sequence[Find]) -> None:
        mine = self.counts.setdefault(source, Counter())
        for one in finds:
            mine[one.type] += 1
            shown = self.samples.setdefault(one.type, [])
            sample = masked(text[one.start : one.end].partition("\n")[0])[:60]
            if len(shown) < _SAMPLES and sample not in shown:
                shown.append(sample)

    def take_batch(self, batch: pa.Table) -> None:
        """What `Redact` wrote into the meta of the rows that are kept."""
        for source, meta in zip(batch["source"].to_pylist(), batch["meta"].to_pylist(), strict=True):
            if f'"{META}"' in meta:
                self.counts.setdefault(source, Counter()).update(json.loads(meta).get(META, {}))

    def total(self) -> Counter[str]:
        return sum(self.counts.values(), Counter())

    def lines(self) -> list[str]:
        """A line for each type: how many, and what they look like."""
        return [
            f"{count:>8,}  {type:12}  {'  '.join(self.samples.get(type, []))}".rstrip()
            for type, count in sorted(self.total().items(), key=lambda item: (-item[1], item[0]))
        ]
