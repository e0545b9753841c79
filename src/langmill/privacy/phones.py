"""How much of a row of digits is a telephone number.

A number ends where its group of digits does: what follows it behind a space ("+44 20 7946 0958 3 items") is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

_GROUP = re.compile(r"\d+")
_TRUNK = re.compile(r"\(0\) ?")
_EXTENSION = re.compile(r" ?(?:x|ext\.?|extension) ?\d{1,6}\Z")
_CHINESE = re.compile(r"\(?0[3-9]\d\d[)-]{1,2} ?\d{4}[ -]?\d{4}(?![ -]?\d)")
_AMERICAN = re.compile(r"1[ .-]?\(?[2-9]\d\d\)?[ .-]{0,2}[2-9]\d\d[ .-]?\d{4}")
_PREFIXED = re.compile(r"86(1[3-9]\d{9})|91([6-9]\d{9})|8([3-9]\d{9})")
_DATE = re.compile(
    r"(?:[0-3]?\d([./ -])[01]?\d\1|[01]?\d([./ -])[0-3]?\d\2)(?:19|20)\d\d(?!\d)|(?:19|20)\d\d([./ -])[01]\d\3[0-3]\d"
)
Table = dict[str, list[int]]


def international(codes: Table, value: str) -> int:
    """Characters of `value`, which begins with + or 00 and a country's code, that are a number of that country's
    lengths (ITU-T E.164: at most 15 digits with the code); 0 where none are.

    codes: for each code the least and most digits of a national number.
    """
    groups, extension = _parts(value)
    digits = "".join(group for group, _ in groups)
    prefix = 0 if value[0] == "+" else 2
    code = next((digits[prefix : prefix + n] for n in (1, 2, 3) if digits[prefix : prefix + n] in codes), "")
    if not code:
        return 0
    least, most = codes[code]
    skip = prefix + len(code)
    if trunk := _TRUNK.search(value):
        skip += trunk.start() < 8
    return _longest(value, groups, skip + least, skip + min(most, 15 - len(code)), extension)


def national(codes: Table, value: str) -> int:
    """Characters of `value`, which begins with a 0 before the area, that are a number of 9 to 11 digits, or 12 of a
    German mobile one and of a Chinese one of 4 and 8; 0 where none are, as for dates and book numbers."""
    groups, extension = _parts(value)
    if _DATE.match(value) or len(groups[0][0]) < 2:
        return 0
    long = value.lstrip("(")[:3] in ("015", "016", "017") or _CHINESE.match(value)
    most = 12 if long else 11
    if len(groups) > 1 and len(groups[0][0]) + len(groups[1][0]) < 5 and len(groups[0][0]) > 3:
        return 0
    return _longest(value, groups[: _alike(value, groups)], 9, most, extension)


def plain(codes: Table, value: str) -> int:
    """Characters of `value`, any row of groups, that are 7 to 13 digits and no date."""
    groups, extension = _parts(value)
    if _DATE.match(value):
        return 0
    return _longest(value, groups[: _alike(value, groups)], 7, 13, extension)


def subscriber(codes: Table, value: str) -> str:
    """What a number has in common with and without its country: its digits behind the country's code and the 0, or in
    Russia the 8, that stands before the area, and its extension.

    Numbers of two countries that are alike behind those are one: as rare as two numbers of one pseudonym.
    """
    found = _EXTENSION.search(value)
    main, more = (value[: found.start()], found[0]) if found else (value, "")
    digits = "".join(_GROUP.findall(main))
    if value[0] == "+" or digits.startswith("00"):
        digits = digits.lstrip("0")
        digits = next((digits[n:] for n in (1, 2, 3) if digits[:n] in codes), digits)
    elif _AMERICAN.fullmatch(main) and main[1:2] in " .-(":
        digits = digits[1:]
    elif whole := _PREFIXED.fullmatch(digits):
        digits = next(filter(None, whole.groups()))
    return digits.lstrip("0") + "x".join(["", *_GROUP.findall(more)])


def _parts(value: str) -> tuple[list[tuple[str, int]], int]:
    """Groups of digits with the place where each ends, and where an extension begins (the end, where there is none)."""
    found = _EXTENSION.search(value)
    end = found.start() if found else len(value)
    return [(group[0], group.end()) for group in _GROUP.finditer(value, 0, end)], end


def _alike(value: str, groups: list[tuple[str, int]]) -> int:
    """Groups that are joined as the second and third are: another mark begins something else."""
    joints = [value[before:end].rstrip("0123456789") for (_, before), (_, end) in pairwise(groups)]
    for number, joint in enumerate(joints[2:], 2):
        if joint != joints[1]:
            last = number + 2 == len(groups) and joint == "-" and len(groups[-1][0]) <= 3
            return number + 1 + last  # an extension, as in 089 12 34 56-0
    return len(groups)


def _longest(value: str, groups: list[tuple[str, int]], least: int, most: int, extension: int) -> int:
    total, best = 0, 0
    for digits, end in groups:
        total += len(digits)
        if total > most:
            break
        if total >= least and value[end : end + 1] in ("", " ", ")", "x", "e"):  # else the number goes on
            best = end
    if best and best == extension < len(value):
        return len(value)
    return best


FITS: dict[str, Callable[[Table, str], int]] = {fit.__name__: fit for fit in (international, national, plain)}
