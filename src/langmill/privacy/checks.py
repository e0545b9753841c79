"""What makes a number a card, an account or an identity: check digits, and ranges that are never given out.

A check takes what was found, written as in the text (ASCII digits, with its spaces and dashes), and says whether it
can be real.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable
from datetime import date

_APART = re.compile(r"[^0-9A-Za-z]")
# Verhoeff 1969: multiplication in the dihedral group D5, and the permutation of each place.
_D5 = (
    "0123456789", "1234067895", "2340178956", "3401289567", "4012395678",
    "5987604321", "6598710432", "7659821043", "8765932104", "9876543210",
)  # fmt: skip
_PLACES = (
    "0123456789",
    "1576283094",
    "5803796142",
    "8916043527",
    "9453126870",
    "4286573901",
    "2793806415",
    "7046913258",
)
_CN_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_CN_REGIONS = frozenset(
    "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65 71 81 82 83".split()
)
_CARD = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[689]\d)\d{11,13}|6(?:011|5\d\d|4[4-9]\d)\d{12}|(?:5[0678]|6[37])\d{14}(?:\d{3})?|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)
_DOUBLED = str.maketrans("0123456789", "0246813579")  # twice a digit, its own digits added
_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
_PAIRS = re.compile(r"[0-9A-Fa-f]{2}")


def bare(value: str) -> str:
    """Without spaces, dashes and marks, in capitals."""
    return _APART.sub("", value).upper()


def luhn(value: str) -> bool:
    """The sum of ISO/IEC 7812-1, annex B."""
    digits = bare(value)
    return sum(map(int, digits[-1::-2] + digits[-2::-2].translate(_DOUBLED))) % 10 == 0


def card(value: str) -> bool:
    """A payment card: the first digits of a known network, its length, and Luhn's sum."""
    digits = bare(value)
    return bool(_CARD.fullmatch(digits)) and luhn(digits)


def iban(value: str) -> bool:
    """ISO 7064 MOD 97-10, as ISO 13616 asks of an IBAN: country and check digits moved to the end, letters as 10-35.
    In small letters one of fewer than 10 digits is a row of words."""
    account = bare(value)
    if value != value.upper() and sum(c.isdigit() for c in account) < 10:
        return False
    return int("".join(str(int(c, 36)) for c in account[4:] + account[:4])) % 97 == 1


def verhoeff(value: str) -> bool:
    """Verhoeff's check digit, at the end: Aadhaar has one."""
    state = 0
    for place, digit in enumerate(reversed(bare(value))):
        state = int(_D5[state][int(_PLACES[place % 8][int(digit)])])
    return state == 0


def aadhaar(value: str) -> bool:
    """12 digits, of which the first is 2 to 9."""
    return bare(value)[0] not in "01" and verhoeff(value)


def ssn(value: str) -> bool:
    """Never given out: areas 000, 666 and 900 to 999, group 00, serial 0000; nor some known from advertisements."""
    digits = bare(value)
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    given = area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"
    return given and digits not in ("078051120", "219099999") and len(set(digits)) > 1


def itin(value: str) -> bool:
    """A number of those who pay taxes in the USA without an SSN: groups that the Internal Revenue Service gives out."""
    group = int(bare(value)[3:5])
    return 50 <= group <= 65 or 70 <= group <= 88 or (90 <= group <= 99 and group != 93)


def nino(value: str) -> bool:
    """A British National Insurance number: prefixes that are not given out."""
    return bare(value)[:2] not in ("BG", "GB", "NK", "KN", "TN", "NT", "ZZ")


def nhs(value: str) -> bool:
    """A British NHS number: weights 10 to 2, modulo 11; not one digit ten times."""
    digits = [int(d) for d in bare(value)]
    rest = 11 - sum(d * w for d, w in zip(digits, range(10, 1, -1), strict=False)) % 11
    return rest % 11 == digits[9] and rest != 10 and len(set(digits)) > 1


def steuer_id(value: str) -> bool:
    """A German tax number: of its first ten digits one stands two or three times; ISO 7064 MOD 11,10."""
    digits = bare(value)
    counts = sorted(Counter(digits[:10]).values(), reverse=True)
    if digits[0] == "0" or counts[0] not in (2, 3) or (len(counts) > 1 and counts[1] > 1):
        return False
    product = 10
    for digit in digits[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def id_card(value: str) -> bool:
    """A German identity card or passport: weights 7, 3, 1, letters as 10-35 (ICAO 9303), the tenth is the sum."""
    text = bare(value)[:10]
    total = sum(int(c, 36) * (7, 3, 1)[i % 3] for i, c in enumerate(text[:9]))
    return text[9].isdigit() and total % 10 == int(text[9]) and any(c.isdigit() for c in text[:9])


def nir(value: str) -> bool:
    """A French social security number: a key of 97 less the rest; 2A and 2B of Corsica count as 19 and 18."""
    digits = (
        bare(value).replace("2A", "19", 1) if "A" in value.upper() else bare(value).replace("2B", "18", 1)
    )
    month = int(digits[3:5])
    known = 1 <= month <= 12 or 20 <= month <= 42 or 50 <= month <= 99
    return known and (len(digits) == 13 or 97 - int(digits[:13]) % 97 == int(digits[13:]))


def resident(value: str) -> bool:
    """A Chinese resident identity (GB 11643): province, a day that was, ISO 7064 MOD 11-2."""
    text = bare(value)
    if text[:2] not in _CN_REGIONS or not _day(text[6:14]):
        return False
    return "10X98765432"[sum(int(d) * w for d, w in zip(text, _CN_WEIGHTS, strict=False)) % 11] == text[17]


def _day(digits: str) -> bool:
    try:
        return 1880 <= date(int(digits[:4]), int(digits[4:6]), int(digits[6:])).year <= 2100
    except ValueError:
        return False


def dni(value: str) -> bool:
    """A Spanish identity: the letter at the end says the number modulo 23; X, Y, Z of a foreigner's are 0, 1, 2."""
    text = bare(value)
    number = text[:-1].translate(str.maketrans("XYZ", "012"))
    return _LETTERS[int(number) % 23] == text[-1]


def egyptian(value: str) -> bool:
    """An Egyptian identity: century 2 or 3, a day that was, a governorate."""
    digits = bare(value)
    return _day(f"{17 + int(digits[0])}{digits[1:7]}") and 1 <= int(digits[7:9]) <= 88


def ip(value: str) -> bool:
    """An address of some machine: not this machine's own, nor none, nor a mask of a network."""
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return 0 < int(address) >> 24 < 255 and not address.is_loopback
    return not (address.is_loopback or address.is_unspecified)


def mac(value: str) -> bool:
    """Not all zeros nor all ones, which name no device."""
    return len(set(bare(value))) > 1


def entropy(value: str) -> float:
    """Bits a character, after Shannon 1948, of a text taken by itself."""
    counts = Counter(value)
    return -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())


def secret(value: str) -> bool:
    """Letters and digits mixed as nobody writes them, at least 3 bits a character; no path."""
    mixed = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
    return mixed and value[0] not in "/.~" and entropy(value) >= 3.0


CHECKS: dict[str, Callable[[str], bool]] = {
    check.__name__: check
    for check in (
        card, iban, aadhaar, ssn, itin, nino, nhs, steuer_id, id_card, nir, resident, dni, egyptian, luhn, ip,
        mac, secret
    )
}  # fmt: skip
