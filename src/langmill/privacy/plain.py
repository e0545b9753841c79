"""Texts as the patterns read them: each character stands for one of the text, so places are the text's own.

Digits of every script become 0 to 9 (Unicode's decimal value), full-width letters and marks those of ASCII, and every
kind of space and hyphen that stands inside numbers a plain one.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import lru_cache

_SPACES = "\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000"
_HYPHENS = "\u2010\u2011\u2012\u2013\u2014\u2212\u00ad\ufe63"
# Of full-width marks those that stand in addresses and numbers; commas and colons of Chinese prose are none.
_WIDE = "＠．＋－（）／＿"


@lru_cache(maxsize=1)
def _plain() -> dict[str, str]:
    found = {mark: chr(ord(mark) - 0xFEE0) for mark in _WIDE}
    found |= {chr(code): chr(code - 0xFEE0) for code in (*range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}
    found |= dict.fromkeys(_SPACES, " ") | dict.fromkeys(_HYPHENS, "-")
    for code in range(128, sys.maxunicode + 1):
        if (digit := unicodedata.decimal(chr(code), None)) is not None:
            found[chr(code)] = str(digit)
    return found


@lru_cache(maxsize=1)
def _other() -> re.Pattern[str]:
    return re.compile(f"[{foreign()}]")


@lru_cache(maxsize=1)
def foreign() -> str:
    """The inside of a class of all characters that `plain` changes, for re and RE2."""
    codes = sorted(map(ord, _plain()))
    runs: list[list[int]] = []
    for code in codes:
        if runs and code == runs[-1][1] + 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(chr(a) if a == b else f"{chr(a)}-{chr(b)}" for a, b in runs)


def plain(text: str) -> str:
    """A text of the same length, in plain digits."""
    if text.isascii():
        return text
    table = _plain()
    return _other().sub(lambda found: table[found[0]], text)
