"""What takes the place of a find.

remove     nothing
mask       *******: the same length, with a star for each letter and digit
label      [EMAIL]
pseudonym  another value of the same type, drawn by a keyed hash: the same value gets the same one under one key, and
           those of two keys have nothing in common. Numbers keep their length and marks. None can be anybody's: each
           begins in a way that is never given out (`never` in patterns.yaml), machines get reserved addresses
           (RFC 1112, 3849, 2606). Two values can meet in one pseudonym, by chance of their length: 1 in 10 million
           for telephone numbers of 10 digits, 1 in 268 million for IPv4. A value is the same however it is spelt: with
           other marks and in small letters, a telephone number with its country's code or the 0 before its area (which
           then ends in the same digits), an e-mail address with "(at)" or its host's name in ASCII, an address of IPv4
           written as one of IPv6.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Sequence
from typing import Literal

from langmill.common.errors import UsageError
from langmill.privacy.addresses import mailbox
from langmill.privacy.checks import bare
from langmill.privacy.key import Key
from langmill.privacy.patterns import Find, tables
from langmill.privacy.phones import subscriber
from langmill.privacy.plain import plain

Policy = Literal["mask", "label", "pseudonym", "remove"]
_SIGN = re.compile(r"[^\W_]")
_ENOUGH = {
    "fr_nir": 13,
    "uk_nino": 8,
    "de_id_card": 10,
}  # characters that name one; what follows is often left out
_CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def replaced(text: str, finds: Sequence[Find], policy: Policy, key: Key | None = None) -> str:
    """The text with its finds, in order and apart, replaced. UsageError for pseudonyms without a key."""
    if policy == "pseudonym" and key is None:
        raise UsageError("pseudonyms need a key")
    parts, place = [], 0
    for one in finds:
        parts += [text[place : one.start], _instead(text[one.start : one.end], one.type, policy, key)]
        place = one.end
    return "".join(parts) + text[place:]


def _instead(value: str, type: str, policy: Policy, key: Key | None) -> str:
    if policy == "mask":
        return masked(value)
    if policy == "label":
        return f"[{type.upper()}]"
    return pseudonym(value, type, key) if policy == "pseudonym" and key is not None else ""


def masked(value: str) -> str:
    """A star for each letter and digit."""
    return _SIGN.sub("*", value)


def pseudonym(value: str, type: str, key: Key) -> str:
    """The value's stand-in under a key; see the top of the file."""
    read = plain(value)
    digest = key.digest(type, _same(read, type))
    word = base64.b32encode(digest).decode("ascii").lower()
    number = int.from_bytes(digest, "big")
    if type == "email":
        return f"user-{word[:12]}@example.org"
    if type == "url":
        return f"{read.partition('://')[0]}://user-{word[:12]}:{word[12:24]}@example.org"
    if type == "ip":
        old = ":" not in read or (":" not in _same(read, type))
        network = ipaddress.ip_network("240.0.0.0/4" if old else "2001:db8::/32")
        return ("::ffff:" if old and ":" in read else "") + str(network[number % network.num_addresses])
    if type == "mac":
        made = _shaped(read, f"02{digest[:5].hex()}", number)
        return made if read.upper() == read else made.lower()
    if type in tables().never:
        begin = "999" if type == "phone" and read.startswith("+") else tables().never[type]
        return _shaped(read, begin, number, letters=type != "phone")
    return f"{type.replace('_', '-')}-{word[:16]}"


def _same(value: str, type: str) -> str:
    """What two spellings of a value have in common."""
    if type == "phone":
        return subscriber(tables().codes, value)
    if type in tables().never or type == "mac":
        return bare(value)[: _ENOUGH.get(type)]
    if type == "ip":
        address = ipaddress.ip_address(value)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).compressed
    if type == "email":
        return mailbox(value)
    return (
        " ".join(value.split())
        if type in ("url", "secret", "private_key")
        else " ".join(value.casefold().split())
    )


def _shaped(value: str, begin: str, number: int, letters: bool = True) -> str:
    """Letters and digits of `begin`, then drawn ones of the kinds that the value has, in the value's marks.

    letters: False is for telephone numbers: it keeps them, such as "ext.", and draws from the end, so that a longer
    form ends as a shorter one does.
    """
    made, places = list(value), [i for i, sign in enumerate(value) if _SIGN.match(sign)]
    if not letters:
        places = [i for i in places if value[i].isdigit()]
    for nth, place in sorted(enumerate(places), reverse=not letters):
        sign, fixed = value[place], begin[nth : nth + 1] or "."
        if fixed == ".":
            kind = "0123456789" if sign.isdigit() else _CAPITALS
            number, drawn = divmod(number, len(kind))
            fixed = kind[drawn]
        made[place] = fixed.lower() if sign.islower() else fixed.upper()
    return "".join(made)
