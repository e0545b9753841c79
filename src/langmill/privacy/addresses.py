"""Addresses of mail, also in the ways that hide them from machines, and URLs with a name and password.

Each function yields (start, end, type), in order and apart. "joe at example dot com", without brackets, is left: too
much of prose reads so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Place = tuple[int, int, str]
_LOCAL = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.!#$%&'*+/=?^_{|}~-"
    + "".join(chr(code) for code in range(0xC0, 0x250))
)
# Greek and Cyrillic letters too. Scripts without spaces are left: nobody can tell where an address begins in them.
_WIDE = _LOCAL | {chr(code) for code in range(0x370, 0x500)}
_LABEL = r"[A-Za-z0-9\u00c0-\u024f](?:[A-Za-z0-9_\u00c0-\u024f-]{0,61}[A-Za-z0-9\u00c0-\u024f])?"
_DOMAIN = re.compile(
    rf"(?:{_LABEL}\.){{1,8}}(?P<top>[A-Za-z]{{2,24}}|xn--[A-Za-z0-9-]{{2,59}})(?![A-Za-z0-9_])"
)
_WIDE_LABEL = r"[A-Za-z0-9\u0370-\u04ff](?:[A-Za-z0-9\u0370-\u04ff-]{0,61}[A-Za-z0-9\u0370-\u04ff])?"
_WIDE_DOMAIN = re.compile(rf"(?:{_WIDE_LABEL}\.){{1,8}}(?P<top>[\u0370-\u04ff]{{2,24}})(?!\w)")
_PICTURES = frozenset("png jpg jpeg gif svg webp css js html php json xml py ts".split())
_LOGIN = re.compile(r"[!#-&(-.0-9;=?A-Z^-~]*:[!#-&(-.0-9:;=?A-Z^-~]*")  # ASCII, without / \ quotes < > @
_HOST = re.compile(r"""[^\s@/"'<>`\\]{1,253}(?:[/?#][^\s"'<>`\\]{0,2048})?""")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,20}\Z")

SPELT = r"[%&\[({] ?(?:40|#0{0,4}64;|#[xX]0{0,4}40;|commat;|(?:at|AT|At|@) ?[\])}])"  # it, and a little more
_MARK = re.compile(SPELT)
_AT = re.compile(r" ?(?:%40|&#0*64;|&#[xX]0*40;|&commat;|[\[({] ?(?:at|AT|At|@) ?[\])}]) ?")
_DOT = r"(?:\.| ?[\[({] ?(?:dot|DOT|Dot|\.) ?[\])}] ?| dot | DOT )"
_SPELT_LOCAL = re.compile(r"(?<!%)(?<!%[0-9A-Fa-f])[A-Za-z0-9](?:[A-Za-z0-9._+-]|%2[Bb]){0,63}\Z")
_SPELT_DOMAIN = re.compile(rf"(?:{_LABEL}{_DOT}){{1,8}}(?P<top>[A-Za-z]{{2,24}})(?![A-Za-z0-9_])")
_BARE = re.compile(r"[^\[({ ]@")
_ANY_DOT = re.compile(_DOT, re.IGNORECASE)


def at(text: str) -> Iterator[Place]:
    """E-mail addresses, and URLs that hold a name and password before their @."""
    done, at = 0, text.find("@")
    while at >= 0:
        found = _credentials(text, done, at) or _email(text, done, at)
        if found:
            yield found
            done = found[1]
        at = text.find("@", max(at + 1, done))


def _email(text: str, done: int, at: int) -> Place | None:
    domain = _DOMAIN.match(text, at + 1, at + 256)
    start = _start(text, done, at, _LOCAL) if domain else at
    if start == at:
        domain = domain or _WIDE_DOMAIN.match(text, at + 1, at + 256)
        start = _start(text, done, at, _WIDE) if domain else at
    if start == at or domain is None or text[at - 1] == "." or domain["top"].lower() in _PICTURES:
        return None
    return start, domain.end(), "email"


def _start(text: str, done: int, at: int, letters: frozenset[str]) -> int:
    start, least = at, max(done, at - 256)
    while start > least and text[start - 1] in letters:
        start -= 1
    while start < at and text[start] in ".'-/=&?*{|}#!":
        start += 1
    return start


def _credentials(text: str, done: int, at: int) -> Place | None:
    """scheme://name:password@host and all that follows without a space."""
    head = text.rfind("://", max(done, at - 256), at)
    if head < 0 or not _LOGIN.fullmatch(text, head + 3, at):
        return None
    scheme = _SCHEME.search(text, max(done, head - 21), head)
    host = _HOST.match(text, at + 1)
    if scheme is None or host is None:
        return None
    end = host.end()
    while text[end - 1] in ".,;:!?)]}，。；、）":
        end -= 1
    return scheme.start(), end, "url"


def spelt(text: str) -> Iterator[Place]:
    """joe [at] example [dot] com, joe(at)example.com, and what pages have: joe%40example.com, joe&#64;example.com."""
    if not any(sign in text for sign in "%&[({"):  # faster than the pattern
        return
    done = 0
    for seen in _MARK.finditer(text):
        mark = _AT.match(text, seen.start() - (text[seen.start() - 1 : seen.start()] == " "))
        if mark is None or mark.start() < done:
            continue
        local = _SPELT_LOCAL.search(text, max(done, mark.start() - 64), mark.start())
        domain = _SPELT_DOMAIN.match(text, mark.end(), mark.end() + 256)
        if local and domain and domain["top"].lower() not in _PICTURES:
            done = domain.end()
            yield local.start(), done, "email"


def mailbox(value: str) -> str:
    """An address in small letters and plain marks; names of hosts in ASCII (RFC 5891)."""
    mark = None if _BARE.search(value) else _AT.search(value)
    local, _, domain = value.partition(mark[0] if mark else "@")
    local, domain = local.casefold().replace("%2b", "+"), _ANY_DOT.sub(".", domain.casefold())
    try:
        return f"{local}@{domain.encode('idna').decode('ascii')}"
    except UnicodeError:  # a label that is too long for a name of a host
        return f"{local}@{domain}"
