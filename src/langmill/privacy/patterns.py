"""Finds what patterns can tell: numbers, addresses of mail and machines, secrets. The tables are in patterns.yaml.

A text is not searched for every pattern. A few cheap gates (six digits near each other, an @, a colon between hex
digits ...) say where patterns may look, and how far; without any, the text holds nothing. All repetitions in patterns
have bounds, so the time grows with the text's length and no faster, whatever is in it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from importlib.resources import files
from typing import NamedTuple

import yaml

from langmill.privacy.addresses import SPELT, at, spelt
from langmill.privacy.checks import CHECKS
from langmill.privacy.context import Context
from langmill.privacy.phones import FITS
from langmill.privacy.plain import plain

_LEFT = r"(?<![0-9A-Za-z])(?<![0-9][-./])(?<![0-9a-f]{4}-)"
_RIGHT = r"(?![0-9A-Za-z])(?![-./][0-9])(?!-[0-9a-f]{4}-)"
_PHONE = r"(?<![0-9A-Za-z+])(?<![0-9][-./])"
_DUMP = r"(?![0-9]{2}(?: [0-9A-Fa-f]{2}){5})(?<![^0-9A-Za-z][0-9A-Fa-f]{2} )"
_START = re.compile(rf"{_LEFT}([0-9A-Za-z+(])|[0-9A-Za-z+(](?<![0-9A-Za-z].)")  # the group: as {{L}} says
_TOKEN = re.compile(r"[A-Za-z0-9+/_.~=-]{15,512}+")
_REST, _LONG = re.compile(r"[A-Za-z0-9+/_.~=-]*+"), 250
_DIGIT = re.compile("[0-9]")
_CLUSTER = re.compile(r"[0-9](?:[ ./()\-]{0,3}+[0-9]){5,}+")
_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_BODY = re.compile(r"(?:(?:\\n|\s){0,4}[A-Za-z0-9+/=]{16,}+(?=\s|\\n|\Z)){0,4096}")


class Find(NamedTuple):
    """What stands at text[start:end]; `told`: a word beside it says so."""

    start: int
    end: int
    type: str
    told: bool = False


@dataclass(frozen=True)
class Gate:
    """`ask`, for RE2, matches in every text that `windows` finds something in."""

    ask: str
    windows: Callable[[str], Iterator[tuple[int, int]]]  # between which places finds begin
    reach: int = 0  # how far a find may go on behind the end
    digit: bool = True  # no text without a digit has one


@dataclass(frozen=True)
class Pattern:
    """A row of patterns.yaml; `number`, that of its row, decides between finds of the same place."""

    number: int
    type: str
    pattern: re.Pattern[str]
    check: Callable[[str], bool] | None
    fit: Callable[[str], int] | None
    when: str
    least: int
    bounded: bool  # it begins as {L} says, which is looked at once for all of them
    named: bool


Head = tuple[
    int, str, bool, Callable[..., re.Match[str] | None], Pattern
]  # what is asked of a row, ready at hand


@dataclass(frozen=True)
class Tables:
    """patterns.yaml, ready for use."""

    patterns: dict[str, tuple[Pattern, ...]]  # by gate, but for digits
    heads: dict[str, tuple[Head, ...]]  # of digits, by the first character
    context: dict[str, Context]
    gates: dict[str, Gate]
    types: tuple[str, ...]
    never: dict[str, str]
    codes: dict[str, list[int]]  # of countries; see phones.py


def _read() -> str:
    return files("langmill.privacy").joinpath("patterns.yaml").read_text(encoding="utf-8")


def edition() -> str:
    """8 hex digits of the tables: what was redacted by others is not the same."""
    return hashlib.sha256(_read().encode("utf-8")).hexdigest()[:8]


@lru_cache(maxsize=1)
def tables() -> Tables:
    """The tables; what is wrong in them is a KeyError or re.error at the first use."""
    read = yaml.safe_load(_read())
    words = "|".join(read["words"])
    signs = {"{L}": _LEFT, "{R}": _RIGHT, "{P}": _PHONE, "{D}": _DUMP, "{words}": f"(?i:{words})"}
    fits: dict[str, Callable[[str], int]] = {name: partial(fit, read["codes"]) for name, fit in FITS.items()}
    fits["account"] = partial(account, read["accounts"])
    rows = [
        *read["patterns"],
        {"type": "secret", "gate": "secrets", "when": "always", "pattern": _keys(read["keys"])},
    ]
    by_gate: dict[str, list[Pattern]] = {}
    heads: dict[str, list[Pattern]] = {}
    for number, row in enumerate(rows):
        near = row["gate"] == "digits"
        bounded = near and row["pattern"].startswith("{L}")
        source = row["pattern"].removeprefix("{L}") if bounded else row["pattern"]
        pattern = re.compile(reduce(lambda text, sign: text.replace(sign, signs[sign]), signs, source))
        check, fit = CHECKS.get(row.get("check")), fits.get(row.get("fit"))
        made = Pattern(
            number, row["type"], pattern, check, fit, row["when"], row.get("least", 0), bounded,
            "find" in pattern.groupindex,
        )  # fmt: skip
        if near:
            for character in filter(re.compile(f"[{row['head']}]").match, map(chr, range(128))):
                heads.setdefault(character, []).append(made)
        else:
            by_gate.setdefault(row["gate"], []).append(made)
    types = dict.fromkeys(["email", "url", *(row["type"] for row in rows), "private_key"])
    return Tables(
        {name: tuple(found) for name, found in by_gate.items()},
        {
            character: tuple((row.least, row.type, row.bounded, row.pattern.match, row) for row in found)
            for character, found in heads.items()
        },
        {name: Context.of(row) for name, row in read["context"].items()},
        _gates("|".join([f"(?i:{words})", *map(_loose, read["keys"])])),
        tuple(types),
        read["never"],
        read["codes"],
    )


def _loose(key: str) -> str:
    """What every text with this key matches, of few states: no counts, and nothing that a key may begin or end with."""
    counted = re.sub(r"\{[0-9,]+\}", "+", key.removeprefix("(?<!-)"))
    return re.sub(r"^\[[^]]+\]\+|(?<=\])\+$", "", counted)


def _keys(keys: Iterable[str]) -> str:
    return rf"(?<![A-Za-z0-9_])(?:{'|'.join(keys)})(?![A-Za-z0-9_])"


def _gates(secrets: str) -> dict[str, Gate]:
    account = (
        "[0-9]{0}[ .-]?(?:[A-Za-z]{{0,3}}[0-9][A-Za-z0-9 .-]{{3}}|[A-Za-z]{{4}}[ .-]?[A-Za-z0-9]{{0,3}}[0-9])"
    )
    accounts = f"[A-Za-z]{{2}}{account.format('[0-9]')}|[A-Za-z]{{5}}[0-9]{{4}}[A-Za-z]"
    accounts += "|[A-Z]{5}[ -][0-9]{4}[ -][A-Z]|[A-Z][A-Z0-9]{8}[0-9]"
    # The same from a digit on, since there are fewer of those than of letters.
    behind = r"(?<=(?<![0-9A-Za-z])"
    digits = (
        f"[0-9](?:{behind}[A-Za-z]{{2}}.){account.format('')}|{behind}[A-Za-z]{{5}}.)[0-9]{{3}}[A-Za-z]"
        f"|{behind}[A-Z]{{5}}[ -].)[0-9]{{3}}[ -][A-Z]|{behind}[A-Z][A-Z0-9]{{8}}.))"
    )
    dots = r"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]|\.[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}"
    colons = r":[0-9A-Fa-f]{0,4}:|-[0-9A-Fa-f]{2}(?:-[0-9A-Fa-f]{2}-|[0-9A-Fa-f]{2}-[0-9A-Fa-f]{4})"
    return {
        "digits": Gate(r"[0-9](?:[ ./()\-]{0,3}[0-9]){5}", _clusters, 32),
        "accounts": Gate(f"(?:^|[^0-9A-Za-z])(?:{accounts})", partial(_around, re.compile(digits), 10), 64),
        "dots": Gate(dots, partial(_around, re.compile(dots), 4), 24, False),
        "colons": Gate(f"{colons}|{SPELT}", partial(_around, re.compile(colons), 4), 64, False),
        "secrets": Gate(secrets, _tokens, 1),
        "at": Gate("@", lambda text: iter(()), digit=False),
        "begin": Gate("-----BEGIN", lambda text: iter(()), digit=False),
    }


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    for found in _CLUSTER.finditer(text):
        start, end = found.span()
        yield max(0, start - 5), end


def _around(scan: re.Pattern[str], back: int, text: str) -> Iterator[tuple[int, int]]:
    """Places that the scan finds and a few characters before them, those that touch as one."""
    start = end = -1
    for found in scan.finditer(text):
        if found.start() - back > end:
            if end >= 0:
                yield start, end
            start = max(0, found.start() - back)
        end = found.end()
    if end >= 0:
        yield start, end


def _tokens(text: str) -> Iterator[tuple[int, int]]:
    """Long rows of letters and digits, and what may stand before them to say what they are."""
    for found in _TOKEN.finditer(text):
        if _DIGIT.search(found[0]):
            yield max(0, found.start() - 48), found.end()


def find(text: str, gates: Collection[str] | None = None) -> list[Find]:
    """All finds in a text, in order and apart from each other.

    gates: those that are known to be open for this text, `None`: all. Finds that overlap become one, of the type of the
    longest, from the first's start to the last's end: none is left half.
    """
    read, known = plain(text), tables()
    found: list[Find] = []
    if gates is None:
        numbered = _DIGIT.search(read)
        gates = [name for name, gate in known.gates.items() if numbered or not gate.digit]
    for name in gates:
        if name == "at":
            found += [Find(*place) for place in at(read)]
        elif name == "begin":
            found += _private_keys(read)
        else:
            if name == "colons":  # they share a gate
                found += [Find(*place) for place in spelt(read)]
            gate = known.gates[name]
            for start, end in gate.windows(read):
                if name == "digits":
                    found += _numbers(read, known, start, end)
                else:
                    found += _window(read, known, known.patterns[name], start, end, end + gate.reach)
    return apart(found)


def _numbers(text: str, known: Tables, start: int, end: int) -> list[Find]:
    """Finds that begin between start and end, where a number may. Of one type those of earlier rows stay."""
    stop = end + known.gates["digits"].reach
    found: list[tuple[int, Find]] = []
    for place in _START.finditer(text, start, end):
        first = place.start()
        if (rows := known.heads.get(text[first])) is None:
            continue
        bounded, left = place.lastindex, end - first
        types: set[str] = set()
        for least, type, alone, match, row in rows:
            if least > left or type in types or (alone and not bounded):
                continue
            if (seen := match(text, first, stop)) and (one := _accepted(row, known.context, text, seen)):
                found.append((row.number, one))
                types.add(type)
    if len(found) < 2:
        return [one for _, one in found]
    kept: list[Find] = []
    taken: dict[str, bytearray] = {}
    for _, one in sorted(found):
        mine = taken.setdefault(one.type, bytearray(stop - start))
        a, b = one.start - start, one.end - start
        if 1 not in mine[a:b]:
            mine[a:b] = b"\1" * (b - a)
            kept.append(one)
    return kept


def _window(
    text: str, known: Tables, rows: tuple[Pattern, ...], start: int, end: int, stop: int
) -> Iterator[Find]:
    """Finds that begin between start and end; what is matched may go on as far as stop."""
    for row in rows:
        place = start
        while (match := row.pattern.search(text, place, stop)) is not None and match.start() < end:
            found = _accepted(row, known.context, text, match)
            if found and found.type == "secret":
                found = _whole(text, found)
            if found:
                yield found
            place = found.end if found else match.start() + 1


def _whole(text: str, found: Find) -> Find:
    """A secret that is longer than the bound of its pattern, to its end; without the full stop of a sentence."""
    end = found.end
    if end - found.start >= _LONG and (rest := _REST.match(text, end)):
        end = rest.end()
    while text[end - 1] == ".":
        end -= 1
    return found._replace(end=end)


def _accepted(row: Pattern, context: dict[str, Context], text: str, match: re.Match[str]) -> Find | None:
    """What is meant of a match, where it can be real and its context allows it."""
    start, end = match.span("find") if row.named else match.span()
    told = None
    if row.fit is None and row.check is not None and not row.check(text[start:end]):
        return None
    if row.when == "context" and not (told := context[row.type].told(text, start, end)):
        return None
    if row.fit is not None:
        end = start + row.fit(text[start:end])
        if start == end or (row.check is not None and not row.check(text[start:end])):
            return None
    if row.when == "unless" and (told := context[row.type].told(text, start, end)) is False:
        return None
    return Find(start, end, row.type, bool(told))


def _private_keys(text: str) -> Iterator[Find]:
    """PEM and OpenPGP blocks (RFC 7468); where the end is missing, as far as lines of base64 go on."""
    last, found = _END.search(text), _BEGIN.search(text)
    while found:
        if last is not None and last.start() < found.end():
            last = _END.search(text, found.end())
        again = _BEGIN.search(text, found.end())
        if last is None or (again and again.start() < last.start()):
            body = _BODY.match(text, found.end())
            place = body.end() if body else found.end()
        else:
            place = last.end()
        yield Find(found.start(), place, "private_key")
        found = again


def account(lengths: dict[str, int], value: str) -> int:
    """Characters of `value` that are an account number of its country's length; 0 where none are, or more follows."""
    left = lengths.get(value[:2].upper(), 0)
    for place, character in enumerate(value, 1):
        left -= character not in " .-"
        if left == 0:
            return place if not value[place : place + 1].strip(" .-") else 0
    return 0


def apart(finds: Iterable[Find]) -> list[Find]:
    """Sorted, with those that overlap as one, of the longest's type; among equals one with context, then the first."""
    finds = list(finds)
    if len(finds) < 2:
        return finds
    joined: list[Find] = []
    best: list[tuple[int, bool]] = []
    for one in sorted(finds, key=lambda f: (f.start, f.end)):
        rank = (one.end - one.start, one.told)
        if not joined or one.start >= joined[-1].end:
            joined.append(one)
            best.append(rank)
            continue
        last = joined[-1]
        better = one if rank > best[-1] else last
        joined[-1] = Find(last.start, max(last.end, one.end), better.type, better.told)
        best[-1] = max(best[-1], rank)
    return joined
