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
_HEAD = 1 << 16  # what these expressions look at
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
    if page.isspace() or not page:
        raise Unusable("no text in the page", "the file is empty")
    try:
        import trafilatura
    except ImportError:
        raise MissingExtra("data", "trafilatura") from None
    _silence("trafilatura", "htmldate", "courlan", "justext", "readability")
    text = trafilatura.extract(page.replace("\0", ""), include_comments=False, include_tables=True)
    if not text:
        raise Unusable(
            "no text in the page", "no main text was found, or its elements stand too deep in each other"
        )
    return [(text, meta)]


def _silence(*names: str) -> None:
    """What these libraries think of each page goes nowhere: a page gives text, or is set aside with its reason."""
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def decoded(data: bytes, charset: str = "") -> tuple[str, str]:
    """(text, encoding). A mark at the start, then UTF-8 where the bytes are that, then what was declared; what does not
    fit even so is read as windows-1252, as browsers do. A declaration can be wrong, valid UTF-8 hardly ever is."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(name, errors="replace").removeprefix("\ufeff"), name
    declared = _CHARSET.search(data[:4096])
    for name in ("utf-8", charset, declared[1].decode("ascii") if declared else ""):
        try:
            if name and codecs.lookup(name)._is_text_encoding:
                return data.decode(name), name.lower()
        except (LookupError, ValueError):
            continue
    if (end := data.rfind(b">")) > 0:  # a page that was cut within a character is UTF-8 still
        try:
            return data[: end + 1].decode("utf-8"), "utf-8"
        except ValueError:
            pass
    return data.decode("windows-1252", errors="replace"), "windows-1252"


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
    """A mail: its subject, a blank line, its text (of text/plain, else of text/html). Who wrote to whom is left out."""
    try:
        message = email.message_from_bytes(data, policy=email.policy.default)
        subject = _header(message, "subject")
        body = message.get_body(preferencelist=("plain", "html"))
        raw = body.get_payload(decode=True) if body is not None else None
        charset = (body.get_content_charset() or "") if body is not None else ""
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
    known = {"date": date, "id": id, "thread": (thread.split() or [id])[0]}
    return [
        (f"{subject}\n\n{text}" if subject else text, {name: value for name, value in known.items() if value})
    ]


def _header(message: email.message.Message, name: str) -> str:
    """A header on one line; "" where there is none, or none that can be read."""
    try:
        return " ".join(str(message.get(name, "")).encode("utf-8", "replace").decode("utf-8").split())
    except Exception:  # as above
        return ""


EXTRACT: dict[str, Callable[..., Found]] = {"html": html, "pdf": pdf, "mail": mail}
