"""Rows of made-up people in eight locales, with what stands where: sentences and pools of people.yaml, filled in.

`held`: sentences and names that are kept for the score and were not looked at while patterns were written.
"""

from __future__ import annotations

import base64
import random
import re
import string
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _numbers as numbers
import yaml

PATTERNED = (
    "email", "phone", "card", "iban", "us_ssn", "uk_nino", "uk_nhs", "de_tax_id", "de_id_card", "fr_nir", "in_aadhaar",
    "in_pan", "cn_id", "es_dni", "sa_id", "ip", "mac", "url", "secret", "private_key",
)  # fmt: skip
_SLOT = re.compile(r"\{(\w+)\}")
_DATES = ("%Y-%m-%d", "%d.%m.%Y", "%d/%m/%Y", "%d-%m-%Y", "%B %d, %Y")
_PRICES = ("${}.{:02d}", "{}.{:02d} EUR", "{},{:02d} €")
_HEX = string.hexdigits[:16]
_BASE = string.ascii_letters + string.digits
Span = tuple[int, int, str]


class Row(NamedTuple):
    text: str
    spans: tuple[Span, ...]
    locale: str


def rows(count: int, held: bool, seed: int = 0) -> list[Row]:
    """So many rows, of all locales in turn."""
    pools = yaml.safe_load(Path(__file__).with_name("people.yaml").read_text(encoding="utf-8"))
    r = random.Random(seed * 2 + held)
    return [
        _row(r, locale, pools[locale], held)
        for locale, _ in zip(_cycle(list(pools)), range(count), strict=False)
    ]


def _cycle(names: list[str]) -> Any:
    while True:
        yield from names


def _row(r: random.Random, locale: str, pool: dict[str, Any], held: bool) -> Row:
    template = r.choice(pool["held" if held else "learn"])
    text, spans, place = "", [], 0
    for slot in _SLOT.finditer(template):
        text += template[place : slot.start()]
        value, type = fill(r, slot[1], pool, held)
        if type:
            spans.append((len(text), len(text) + len(value), type))
        text += value
        place = slot.end()
    return Row(text + template[place:], tuple(spans), locale)


def fill(r: random.Random, slot: str, pool: dict[str, Any], held: bool) -> tuple[str, str]:
    """A value and its type, "" for what is nobody's."""
    first, last = (pool.get(f"{'held_' if held else ''}{name}", ["x"]) for name in ("first", "last"))
    if slot == "name":
        given, family = r.choice(first), r.choice(last)
        return (family + given if ord(family[0]) > 0x3000 else f"{given} {family}"), "person"
    if slot == "address":
        parts = {
            "n": str(r.randrange(1, 999)),
            "street": r.choice(pool["streets"]),
            "city": r.choice(pool["cities"]),
        }
        return pool["address"][0].format(**parts), "address"
    if slot == "city":
        return r.choice(pool["cities"]), ""
    if slot in ("phone", "loose_phone"):
        return numbers.drawn(r, r.choice(pool[slot])), "phone"
    if slot == "email":
        return _email(r, r.choice(first), r.choice(last)), "email"
    if slot in PERSONAL:
        return PERSONAL[slot](r), "secret" if slot in ("token", "secret") else "ip" if slot == "ip6" else slot
    return NOBODYS[slot](r), ""


def _email(r: random.Random, given: str, family: str) -> str:
    plain = [
        unicodedata.normalize("NFKD", n).encode("ascii", "ignore").decode().lower() or "user"
        for n in (given, family)
    ]
    plain = [re.sub("[^a-z]", "", name) or "info" for name in plain]
    local = r.choice(["{0}.{1}", "{0}_{1}{n}", "{1}", "{0}+news", "{0}{n}", "{0}-{1}"]).format(
        *plain, n=r.randrange(99)
    )
    host = r.choice(
        ["example.com", "mail.example.org", "example.co.uk", "uni-beispiel.de", "qq.com", "post.example.info"]
    )
    return f"{local}@{host}"


def _text(r: random.Random, alphabet: str, size: int) -> str:
    return "".join(r.choice(alphabet) for _ in range(size))


def _secret(r: random.Random) -> str:
    start, alphabet, size = r.choice([
        ("AKIA", string.ascii_uppercase + string.digits, 16), ("ghp_", _BASE, 36), ("glpat-", _BASE, 20),
        ("AIza", _BASE, 35), ("xoxb-", string.digits, 24), ("sk_live_", _BASE, 24), ("sk-proj-", _BASE, 48),
        ("hf_", _BASE, 34), ("npm_", _BASE, 36),
    ])  # fmt: skip
    return start + _text(r, alphabet, size)


def _token(r: random.Random) -> str:
    while True:
        made = _text(r, _BASE, r.randrange(20, 48))
        if any(c.isdigit() for c in made) and not made.isdigit():
            return made


def _pem(r: random.Random) -> str:
    kind = r.choice(["RSA PRIVATE KEY", "PRIVATE KEY", "OPENSSH PRIVATE KEY", "EC PRIVATE KEY"])
    body = base64.b64encode(r.randbytes(300)).decode()
    lines = "\n".join(body[i : i + 64] for i in range(0, len(body), 64))
    return f"-----BEGIN {kind}-----\n{lines}\n-----END {kind}-----"


def _ip(r: random.Random) -> str:
    return ".".join(str(r.randrange(1, 224) if i == 0 else r.randrange(256)) for i in range(4)).replace(
        "127.", "128.", 1
    )


def _ip6(r: random.Random) -> str:
    groups = [_text(r, _HEX[1:], 1) + _text(r, _HEX, r.randrange(4)) for _ in range(6)]
    full = ":".join(["2001", "db8", *groups])
    return r.choice(
        [full, f"fe80::{':'.join(groups[: r.randrange(1, 5)])}", f"2a02:{groups[0]}::{groups[1]}"]
    )


def _mac(r: random.Random) -> str:
    text = r.choice(":-").join(_text(r, _HEX, 2) for _ in range(6))
    return text.upper() if r.random() < 0.5 else text


def _url(r: random.Random) -> str:
    scheme, port = r.choice([("https", ""), ("postgres", ":5432"), ("ftp", ""), ("redis", ":6379")])
    return f"{scheme}://{_text(r, _BASE, 6)}:{_text(r, _BASE + '!$.', 10)}a@db.example.com{port}/{_text(r, _BASE, 5)}"


def _isbn(r: random.Random) -> str:
    body = "978" + numbers.digits(r, 9)
    last = -sum(int(d) * (3 if i % 2 else 1) for i, d in enumerate(body)) % 10
    return r.choice(["-", " ", ""]).join(numbers.split(f"{body}{last}", (3, 1, 2, 6, 1)))


def _order(r: random.Random) -> str:
    return numbers.drawn(
        r,
        r.choice(
            [
                "########",
                "@@-######",
                "2024-#######",
                "###########",
                "1#########",
                "A########",
                "###-#######-#######",
            ]
        ),
    )


PERSONAL: dict[str, Callable[[random.Random], str]] = {
    **{name: getattr(numbers, name) for name in PATTERNED if hasattr(numbers, name)},
    "ip": _ip, "ip6": _ip6, "mac": _mac, "url": _url, "secret": _secret, "token": _token, "private_key": _pem,
}  # fmt: skip
NOBODYS: dict[str, Callable[[random.Random], str]] = {
    "order": _order,
    "isbn": _isbn,
    "serial": lambda r: numbers.drawn(r, r.choice(["@@##-####-@@", "#########", "@#########", "##.###.###"])),
    "version": lambda r: f"{r.randrange(30)}.{r.randrange(20)}.{r.randrange(3000)}",
    "version4": lambda r: f"{r.randrange(30)}.{r.randrange(20)}.{r.randrange(200)}.{r.randrange(200)}",
    "date": lambda r: numbers.day(r, 1970).strftime(r.choice(_DATES)),
    "time": lambda r: f"{r.randrange(24):02d}:{r.randrange(60):02d}:{r.randrange(60):02d}",
    "price": lambda r: r.choice(_PRICES).format(r.randrange(99999), r.randrange(100)),
    "decimal": lambda r: f"{r.random() * 1000:.9f}",
    "count": lambda r: f"{r.randrange(10**7):,}",
    "range": lambda r: f"{r.randrange(100, 999)}-{r.randrange(1000, 2000)}",
    "port": lambda r: str(r.randrange(1024, 65536)),
    "stamp": lambda r: str(r.randrange(1_500_000_000, 1_800_000_000)),
    "hash": lambda r: _text(r, _HEX, r.choice([7, 32, 40, 64])),
    "uuid": lambda r: "-".join(_text(r, _HEX, n) for n in (8, 4, 4, 4, 12)),
    "fingerprint": lambda r: ":".join(_text(r, _HEX, 2) for _ in range(20)),
    "bad_card": partial(numbers.card, right=False),
    "bad_iban": partial(numbers.iban, right=False),
    "bad_dni": partial(numbers.es_dni, right=False),
    "bad_aadhaar": partial(numbers.in_aadhaar, right=False),
    "bad_cn": partial(numbers.cn_id, right=False),
}  # fmt: skip


def score(
    found: list[list[Span]], made: list[Row], types: tuple[str, ...] = PATTERNED
) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 by exact place and type: of each type, each locale, and "all" together."""
    counts: dict[str, list[int]] = {}
    for spans, row in zip(found, made, strict=True):
        mine, true = ({s for s in group if s[2] in types} for group in (spans, row.spans))
        for group, place in ((mine & true, 0), (mine - true, 1), (true - mine, 2)):
            for span in group:
                for name in ("all", span[2], row.locale):
                    counts.setdefault(name, [0, 0, 0])[place] += 1
    return {name: _rates(*value) for name, value in sorted(counts.items())}


def _rates(right: int, wrong: int, missed: int) -> dict[str, float]:
    precision, recall = right / max(1, right + wrong), right / max(1, right + missed)
    f1 = 2 * right / max(1, 2 * right + wrong + missed)
    rates = {"precision": precision, "recall": recall, "f1": f1}
    return {name: round(rate, 4) for name, rate in rates.items()} | {"spans": right + missed}
