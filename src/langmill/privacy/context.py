"""Words beside a number that say what it is, or that it is something else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Letters of scripts that have capitals: they bound a word. Others stand beside their words without spaces.
_CASED = r"[a-z\u00df-\u024f\u0400-\u04ff]"
_NUMBER = re.compile(r"[0-9]{4}([^0-9]*)\Z")
_LETTER = re.compile(r"[^\W\d_]")
_LONG_WORD = re.compile(r"[^\W\d_]{5}")
_STOP = re.compile(r"[.,;:!?\n。，；：！？،]")
_BEFORE, _BEHIND = 60, 24  # characters in which words count


@dataclass(frozen=True)
class Context:
    """Words of one type. `bound` and `loose` find them in casefolded text; `speaks`: for a find, or against it."""

    bound: re.Pattern[str]
    loose: re.Pattern[str] | None
    speaks: Mapping[str, bool]

    @classmethod
    def of(cls, row: Mapping[str, Sequence[str]]) -> Context:
        """Of the words under "for" and "against" in patterns.yaml; a word that ends in * may go on."""
        given = {word.casefold(): group == "for" for group in ("against", "for") for word in row[group]}
        cased = {word: word[0].isupper() or word[0].islower() for word in given}
        loose = [word for word, has in cased.items() if not has]
        return cls(
            re.compile(f"(?<!{_CASED})(?:{_tree([word for word, has in cased.items() if has])})"),
            re.compile(_tree(loose, "")) if loose else None,
            {word.rstrip("*"): speaks for word, speaks in given.items()},
        )

    def told(self, text: str, start: int, end: int) -> bool | None:
        """Whether the nearest word before text[start:end] speaks for the find or against it, or one just behind speaks
        for it; None where there is none. A word counts for the next number, and for those that are listed behind it."""
        if not _LETTER.search(text, max(0, start - _BEFORE), end + _BEHIND):
            return None
        before = text[max(0, start - _BEFORE) : start]
        if (number := _NUMBER.search(before)) and _LONG_WORD.search(number[1]):
            before = number[1]
        if near := self._words(before.casefold()):
            return max(near)[1]
        behind = self._words(_STOP.split(text[end : end + _BEHIND], maxsplit=1)[0].casefold())
        return True if behind and min(behind)[1] else None

    def _words(self, text: str) -> list[tuple[int, bool]]:
        """Where each ends, and what it says."""
        found = list(self.bound.finditer(text))
        if self.loose and not text.isascii():
            found += self.loose.finditer(text)
        return [(one.end(), self.speaks[one[0]]) for one in found]


def _tree(words: Sequence[str], end: str = f"(?!{_CASED})") -> str:
    """A pattern of words by their first letters, the longest first: most places of a text are then no beginning."""
    firsts: dict[str, list[str]] = {}
    for word in sorted(words, key=len, reverse=True):
        rest = re.escape(word.rstrip("*")[1:]) + ("" if word[-1] == "*" else end)
        firsts.setdefault(re.escape(word[0]), []).append(rest)
    return "|".join(f"{first}(?:{'|'.join(rests)})" for first, rests in firsts.items())
