"""SpamAssassin's public mail as rows {"text", "label", "group"}: for the converters of assets.py."""

from __future__ import annotations

import email
import html
import re
from collections.abc import Iterator
from email.header import decode_header
from email.message import Message
from pathlib import Path

from asset_alike import groups

LONGEST = 20_000  # characters kept of a message: 34 of 6,046 are longer
HIDDEN = re.compile(r"<!--.*?(?:-->|\Z)|<(script|style|title)\b.*?(?:</\1\s*>|\Z)", re.DOTALL | re.IGNORECASE)
BREAK = re.compile(r"<(?:br|/p|/div|/tr|/li|/h\d|/table)\b[^>]*>", re.IGNORECASE)
TAG = re.compile(r"</?[a-zA-Z!?][^<>]*>")
DECLARED = re.compile(rb"charset=[\"']?([\w-]+)", re.IGNORECASE)
# A tenth of the spam came through the list where it was reported, whose footer would give the label away.
REPORTED = re.compile(
    r"(?:\n*--DeathToSpam\w*--)?(?:\n+-{40,}\nThis sf\.net [^_]*)?\n+_{40,}\nSpamassassin-Sightings mailing list\n.*\Z"
    r"|\n*--DeathToSpam\w*--\Z",
    re.DOTALL,
)


def rows(unpacked: Path) -> Iterator[dict[str, object]]:
    files = sorted(Path(unpacked, "package", "data").glob("*/*.txt"))
    texts = [message_text(file.read_bytes()) for file in files]
    for file, text, group in zip(files, texts, groups(texts), strict=True):
        yield {"text": text, "label": "spam" if "spam" in file.parent.name else "ham", "group": group}


def message_text(data: bytes) -> str:
    """Subject and body of a mail; every other header goes, and with it what filters and lists wrote there."""
    message = email.message_from_bytes(data)
    plain: list[str] = []
    marked: list[str] = []
    for part in message.walk():
        kind = part.get_content_type()
        if kind not in ("text/plain", "text/html") or part.get_content_disposition() == "attachment":
            continue
        body = part.get_payload(decode=True)
        text = _decode(body, part.get_content_charset()) if isinstance(body, bytes) else ""
        is_page = kind == "text/html" or re.search(r"<(html|body)\b", text, re.IGNORECASE)
        (marked if is_page else plain).append(text)
    body = "\n\n".join(plain).strip() or "\n\n".join(map(visible, marked))
    lines = (re.sub(r"[^\S\n]+", " ", line).strip() for line in body.replace("\0", "").splitlines())
    body = REPORTED.sub("", re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())
    return f"{_subject(message)}\n\n{body}".strip()[:LONGEST].rstrip()


def _subject(message: Message) -> str:
    raw = next((str(value) for name, value in message.raw_items() if name.lower() == "subject"), "")
    try:
        pieces = decode_header(raw)
    except ValueError:  # it says base64, and is none
        pieces = [(raw, None)]
    subject = "".join(
        _decode(piece if isinstance(piece, bytes) else piece.encode("utf-8", "surrogateescape"), charset)
        for piece, charset in pieces
    )
    return " ".join(subject.split())


def _decode(data: bytes, charset: str | None) -> str:
    """Bytes as the mail says, or the page in it, or the two most common encodings, whichever fits first."""
    page = DECLARED.search(data[:2000])
    for name in (charset, page[1].decode() if page else None, "utf-8"):
        try:
            return data.decode("gb18030" if name == "gb2312" else name or "ascii")
        except (LookupError, ValueError):
            continue
    return data.decode("cp1252", errors="replace")


def visible(page: str) -> str:
    """The text of a web page. Patterns, not a parser: the same on every Python, and mail breaks every parser."""
    return html.unescape(TAG.sub("", BREAK.sub("\n", HIDDEN.sub(" ", page))))
