"""Main text out of pages, PDFs and mail. These functions meet hostile bytes: `guard.Guard` runs them in a process of
their own, with a limit of time and of memory.

Each takes bytes and what is known of them and returns (text, meta) pairs; Unusable says why there is no text.
"""

from __future__ import annotations

import codecs
import email
import email.message
import email.policy
import logging
import re
from collections.abc import Callable
from html import unescape
from typing import Any

from langmill.common.errors import MissingExtra
from langmill.data.chats import Unusable

Found = list[tuple[str, dict[str, Any]]]
LARGEST = 64 << 20  # bytes of one page, PDF or mail
_CHARSET = re.compile(
    rb"""<(?:meta[^>]{0,400}?charset|\?xml[^>]{0,200}?encoding)\s*=\s*["']?\s*([\w.:-]{1,40})""", re.I
)
_TITLE = re.compile(r"<title[^>]{0,200}>([^<]{1,500})", re.I)
_LANG = re.compile(r"""<html[^>]{0,400}?\slang\s*=\s*["']?([A-Za-z-]{2,20})""", re.I)
_LICENCE = re.compile(r"""<(?:a|link)\s[^>]{0,400}?\brel\s*=\s*["']?license\b[^>]{0,400}?>""", re.I)
_HREF = re.compile(r"""\bhref\s*=\s*["']?([^"'\s>]{1,500})""", re.I)
_ROBOTS = re.compile(r"""<meta\s[^>]{0,200}?\bname\s*=\s*["']?robots\b[^>]{0,400}?>""", re.I)
_CONTENT = re.compile(r"""\bcontent\s*=\s*["']?([^"'>]{1,200})""", re.I)
_HEAD = 1 << 16  # what these expressions look at
_ESCAPED = ("iso-2022", "hz", "utf-7")  # encodings in ASCII
_SIDE_BY_SIDE = re.compile(rb"[\x80-\xff]{2}")
_FEW = 10  # of so many characters that are not ASCII one may be broken
_BROKEN = 100  # a text of which one character in so many is none was read wrongly
NOTHING = "no text in the page"
_SPACE = re.compile(r"[ \t]+\n")


def html(data: bytes, charset: str = "") -> Found:
    """The main text of a page by trafilatura: no menus, headers, footers. `charset`: as HTTP declared it.

    The parser below it (libxml2) refuses elements more than 255 deep and lines of text of 10 MB: it finds no
    text there.
    """
    page, encoding = decoded(data, charset)
    meta = {"encoding": encoding} if encoding != "utf-8" else {}
    head = page[:_HEAD]
    if title := _TITLE.search(head):
        meta["title"] = " ".join(unescape(title[1]).split())
    if lang := _LANG.search(head):
        meta["lang"] = lang[1]
    if (licence := _LICENCE.search(page)) and (where := _HREF.search(licence[0])):
        meta["licence"] = where[1]
    if (robots := _ROBOTS.search(head)) and (asked := _CONTENT.search(robots[0])):
        meta["robots"] = asked[1].strip()
    if page.isspace() or not page:
        raise Unusable(NOTHING, "the file is empty")
    try:
        import trafilatura
    except ImportError:
        raise MissingExtra("data", "trafilatura") from None
    _silence("trafilatura", "htmldate", "courlan", "justext", "readability")
    text = trafilatura.extract(page.replace("\0", ""), include_comments=False, include_tables=True)
    if not text:
        raise Unusable(
            NOTHING,
            "no main text was found, or its elements stand too deep in each other, or one holds 10 MB of text",
        )
    return [(text, meta)]


def _silence(*names: str) -> None:
    """What these libraries think of each page goes nowhere: a page gives text, or is set aside with its reason."""
    for name in names:
        if (
            logging.getLogger(name).level <= logging.CRITICAL
        ):  # setting it costs all loggers what they remember
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def plain(data: bytes, charset: str = "") -> Found:
    """A text as it is."""
    text, encoding = decoded(data, charset)
    return [(text, {"encoding": encoding} if encoding != "utf-8" else {})]


def decoded(data: bytes, charset: str = "") -> tuple[str, str]:
    """(text, encoding). A mark at the start, then UTF-8 where the bytes are that, then what was declared. A declaration
    can be wrong, valid UTF-8 hardly ever is. ISO-2022-JP and its like, whose bytes are all ASCII, go before UTF-8.

    What fits none of them is UTF-8 with a few wrong bytes, else it is guessed; what may have a Latin script is read as
    windows-1252, as browsers do. Unusable where much of it is no character there.
    """
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(name, errors="replace").removeprefix("\ufeff"), name
    declared = _CHARSET.search(data[:4096])
    names = (charset, declared[1].decode("ascii", "replace") if declared else "")
    escaped = [name for name in names if name.lower().startswith(_ESCAPED)]
    if b"\x1b$" in data:  # as mail of the time before MIME has it
        escaped.append("iso-2022-jp")
    for name in (*escaped, "utf-8", *names):
        try:
            if name and codecs.lookup(name)._is_text_encoding:
                return data.decode(name), name.lower()
        except (LookupError, ValueError):
            continue
    text, _ = codecs.utf_8_decode(data, "replace")  # without a character that the end of a page cut
    if _FEW * text.count("\ufffd") < len(text) - len(text.encode("ascii", "ignore")):
        return text, "utf-8"
    name = _guessed(data)
    text = data.decode(name, errors="replace")
    if text.count("\ufffd") * _BROKEN > len(text):
        raise Unusable(
            "not in a known encoding", f"neither UTF-8 nor {' nor '.join(filter(None, names)) or name}"
        )
    return text, name


def _guessed(data: bytes) -> str:
    """The likeliest encoding of a text whose letters are no Latin ones: bytes that are not ASCII stand side by side.
    Else windows-1252: its like are hardly told apart."""
    if 4 * _SIDE_BY_SIDE.subn(b"", data)[1] < len(data.translate(None, bytes(range(128)))):
        return "windows-1252"
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        raise MissingExtra("data", "charset-normalizer") from None
    end = max(data.rfind(b"<", 0, _HEAD), data.rfind(b"\n", 0, _HEAD))  # which are no part of a character
    found = from_bytes(data[:end] if len(data) > _HEAD and end > 0 else data[:_HEAD]).best()
    other = [character for character in str(found or "") if not character.isascii()]
    strange = sum(character >= "\u0370" for character in other)
    return found.encoding if found is not None and 2 * strange > len(other) else "windows-1252"


def pdf(path: str) -> Found:
    """The text of a PDF, pages apart by a blank line. A scan holds none: it needs character recognition first."""
    try:
        import pypdf
    except ImportError:
        raise MissingExtra("data", "pypdf") from None
    _silence("pypdf")
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unusable("PDF is locked", "it asks for a password")
        pages = [page.extract_text() for page in reader.pages]
        title = reader.metadata.title if reader.metadata else None
    except (MemoryError, Unusable):
        raise
    except (
        Exception
    ) as error:  # what a damaged PDF raises is no closed list: KeyError, TypeError, RecursionError …
        raise Unusable("broken PDF", f"{type(error).__name__}: {error}"[:400]) from None
    text = "\n\n".join(_SPACE.sub("\n", page).strip() for page in pages).strip()
    if not text:
        raise Unusable("no text in the PDF", f"{len(pages)} pages without text: scanned pages need OCR first")
    meta: dict[str, Any] = {"pages": len(pages)}
    return [(text, meta | ({"title": str(title)} if title else {}))]


def mail(data: bytes) -> Found:
    """A mail: its subject, a blank line, its text (of text/plain, else of text/html). Who wrote to whom is left
    out, and what was attached: meta says how many things."""
    try:
        message = email.message_from_bytes(data, policy=email.policy.default)
        subject = _header(message, "subject")
        body = message.get_body(preferencelist=("plain", "html"))
        raw = body.get_payload(decode=True) if body is not None else None
        charset = (body.get_content_charset() or "") if body is not None else ""
        attachments = sum(1 for _ in message.iter_attachments())
    except (MemoryError, Unusable):
        raise
    except Exception as error:  # the package raises AttributeError, KeyError, ValueError … for broken headers
        raise Unusable("broken mail", f"{type(error).__name__}: {error}"[:400]) from None
    if not isinstance(raw, bytes) or not raw.strip():
        raise Unusable("no text in the mail", "it has no part that is text/plain or text/html")
    assert body is not None
    if body.get_content_type() == "text/html":
        text = html(raw, charset)[0][0]
    else:
        text, _ = decoded(raw, charset)
    date, thread = _header(message, "date"), _header(message, "references") or _header(message, "in-reply-to")
    id = _header(message, "message-id")
    known = {"date": date, "id": id, "thread": (thread.split() or [id])[0], "attachments": attachments}
    return [
        (f"{subject}\n\n{text}" if subject else text, {name: value for name, value in known.items() if value})
    ]


def _header(message: email.message.Message, name: str) -> str:
    """A header on one line; "" where there is none, or none that can be read."""
    try:
        value = str(message.get(name, ""))
        raw = next((str(v) for key, v in message.raw_items() if key.lower() == name), "")
        if not raw.isascii():  # bytes that say of no encoding, against RFC 2047
            value = decoded(raw.encode("utf-8", "surrogateescape"))[0]
        return " ".join(value.encode("utf-8", "replace").decode("utf-8").split())
    except Exception:  # as above
        return ""


EXTRACT: dict[str, Callable[..., Found]] = {"html": html, "plain": plain, "pdf": pdf, "mail": mail}
