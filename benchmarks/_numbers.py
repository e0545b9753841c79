"""Made-up numbers, right and wrong: each check digit is computed here, apart from the checks that are measured."""

from __future__ import annotations

import random
import string
from datetime import date, timedelta

_LUHN = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)
_TURNS = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)  # Verhoeff's permutation
_KINDS = {
    "#": string.digits, "N": "23456789", "M": "1234567", "I": "6789", "C": "356789", "@": string.ascii_uppercase,
    "$": string.ascii_uppercase + string.digits, "＃": "".join(chr(0xFF10 + d) for d in range(10)),
    "Ｃ": "".join(chr(0xFF10 + d) for d in (3, 5, 6, 7, 8, 9)),
}  # fmt: skip
_IDCARD = "CFGHJKLMNPRTVWXYZ"
_BANKS = {
    "DE": "##################", "GB": "@@@@##############", "FR": "##########$$$$$$$$$$$##",
    "ES": "####################", "NL": "@@@@##########", "SA": "##$$$$$$$$$$$$$$$$$$",
    "AE": "###################", "CH": "#####$$$$$$$$$$$$",
}  # fmt: skip


def digits(r: random.Random, n: int) -> str:
    return "".join(r.choice(string.digits) for _ in range(n))


def drawn(r: random.Random, pattern: str) -> str:
    """#: digit; N: 2-9; M: 1-7; I: 6-9; C: 3-9; @: capital; $: capital or digit; ＃: full-width digit."""
    text = "".join(r.choice(_KINDS[sign]) if sign in _KINDS else sign for sign in pattern)
    if "٠" in pattern:
        text = text.translate(str.maketrans(string.digits, "٠١٢٣٤٥٦٧٨٩"))
    return text


def _luhn_digit(body: str) -> str:
    total = sum(_LUHN[int(d)] if i % 2 == 0 else int(d) for i, d in enumerate(reversed(body)))
    return str(-total % 10)


def other(r: random.Random, digit: str) -> str:
    return r.choice([d for d in string.digits if d != digit])


def card(r: random.Random, right: bool = True) -> str:
    start, size = r.choice(
        [("4", 16), ("51", 16), ("55", 16), ("2221", 16), ("37", 15), ("34", 15), ("6011", 16), ("62", 16)]
    )
    body = start + digits(r, size - 1 - len(start))
    last = _luhn_digit(body)
    number = body + (last if right else other(r, last))
    joint = r.choice([" ", "-", ""])
    sizes = (4, 6, 5) if size == 15 else (4, 4, 4, 4)
    return joint.join(split(number, sizes))


def split(text: str, sizes: tuple[int, ...]) -> list[str]:
    found, place = [], 0
    for size in sizes:
        found.append(text[place : place + size])
        place += size
    return found


def iban(r: random.Random, right: bool = True) -> str:
    country = r.choice(sorted(_BANKS))
    body = drawn(r, _BANKS[country])
    value = int(
        "".join(str(string.digits.index(c) if c.isdigit() else ord(c) - 55) for c in body + country + "00")
    )
    check = 98 - value % 97
    if not right:
        check = (check + r.randrange(1, 90)) % 97
    account = f"{country}{check:02d}{body}"
    return account if r.random() < 0.4 else " ".join(split(account, (4,) * 9)).strip()


def us_ssn(r: random.Random) -> str:
    area = r.choice([n for n in range(1, 900) if n != 666])
    return f"{area:03d}-{r.randrange(1, 100):02d}-{r.randrange(1, 10000):04d}"


def uk_nino(r: random.Random) -> str:
    prefix = r.choice(["AB", "CE", "HJ", "JG", "KL", "MW", "PX", "SR", "TY", "WZ"])
    number = (prefix, digits(r, 2), digits(r, 2), digits(r, 2), r.choice("ABCD"))
    return r.choice([" ", ""]).join(number)


def uk_nhs(r: random.Random) -> str:
    while True:
        body = r.choice("4567") + digits(r, 8)
        last = -sum(int(d) * (10 - i) for i, d in enumerate(body)) % 11
        if last < 10:
            return r.choice([" ", "", "-"]).join(split(f"{body}{last}", (3, 3, 4)))


def de_tax_id(r: random.Random) -> str:
    while True:
        signs = r.sample(string.digits, 9)
        signs.insert(r.randrange(10), r.choice(signs))
        if signs[0] != "0":
            break
    rest = 10
    for sign in signs:
        total = (int(sign) + rest) % 10
        rest = (2 * (total if total else 10)) % 11
    number = "".join(signs) + str((11 - rest) % 10)
    return r.choice([" ", ""]).join(split(number, (2, 3, 3, 3)))


def de_id_card(r: random.Random) -> str:
    body = (
        r.choice("LMNPRTVWXY")
        + "".join(r.choice(_IDCARD + string.digits) for _ in range(7))
        + r.choice(string.digits)
    )
    values = [int(c) if c.isdigit() else ord(c) - 55 for c in body]
    return body + str(sum(v * w for v, w in zip(values, (7, 3, 1) * 3, strict=True)) % 10)


def fr_nir(r: random.Random) -> str:
    body = f"{r.choice('12')}{r.randrange(100):02d}{r.randrange(1, 13):02d}{r.randrange(1, 96):02d}{digits(r, 6)}"
    number = f"{body}{97 - int(body) % 97:02d}"
    return r.choice([" ", ""]).join(split(number, (1, 2, 2, 2, 3, 3, 2)))


def _times(a: int, b: int) -> int:
    """In the group of the pentagon's turns and flips."""
    if a < 5:
        return (a + b) % 5 if b < 5 else 5 + (a + b) % 5
    return 5 + (a - b) % 5 if b < 5 else (a - b) % 5


def in_aadhaar(r: random.Random, right: bool = True) -> str:
    body = r.choice("23456789") + digits(r, 10)
    row, state = list(range(10)), 0
    for digit in reversed(body):
        row = [row[place] for place in _TURNS] if row != list(range(10)) else list(_TURNS)
        state = _times(state, row[int(digit)])
    last = next(d for d in range(10) if _times(state, d) == 0 or _times(d, state) == 0)
    number = body + (str(last) if right else other(r, str(last)))
    return r.choice([" ", " ", ""]).join(split(number, (4, 4, 4)))


def in_pan(r: random.Random) -> str:
    return drawn(r, "@@@") + r.choice("ABCFGHLJPT") + drawn(r, "@####@")


def day(r: random.Random, first: int = 1940) -> date:
    return date(first, 1, 1) + timedelta(days=r.randrange(365 * 60))


def cn_id(r: random.Random, right: bool = True) -> str:
    body = (
        r.choice(["110105", "310115", "440304", "510107", "330106"])
        + day(r).strftime("%Y%m%d")
        + digits(r, 3)
    )
    rest = sum(int(d) * pow(2, 17 - i, 11) for i, d in enumerate(body)) % 11
    last = "X" if (12 - rest) % 11 == 10 else str((12 - rest) % 11)
    return body + (last if right else r.choice([d for d in string.digits if d != last]))


def es_dni(r: random.Random, right: bool = True) -> str:
    letters = "TRWAGMYFPDXBNJZSQVHLCKE"
    foreign = r.random() < 0.3
    start = r.choice("XYZ") if foreign else ""
    number = digits(r, 7 if foreign else 8)
    last = letters[int({"X": "0", "Y": "1", "Z": "2", "": ""}[start] + number) % 23]
    if not right:
        last = r.choice([c for c in letters if c != last])
    return f"{start}{number}{r.choice(['', '-'])}{last}"


def sa_id(r: random.Random) -> str:
    body = r.choice("12") + digits(r, 8)
    return body + _luhn_digit(body)
