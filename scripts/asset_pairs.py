"""Translated texts as rows {"translation", "group"}: for the converters of assets.py.

Rows whose English is nearly the same share a group, so that a split can keep them on one side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from asset_alike import groups

HELP = Path("usr", "share", "libreoffice", "help")
BULLET = re.compile(r" (?: *[-*•+]| +o) +")  # on a line of a stanza, which begins with a space
Pair = tuple[str, str]


def rows(pairs: Iterable[Pair], other: str) -> Iterator[dict[str, object]]:
    """Each pair of English and another language once; what was left untranslated is no pair."""
    unique = list(
        dict.fromkeys((ours, theirs) for ours, theirs in pairs if ours and theirs and ours != theirs)
    )
    numbers = groups([english for english, _ in unique])
    for (english, theirs), group in zip(unique, numbers, strict=True):
        yield {"translation": {"en": english, other: theirs}, "group": group}


def descriptions(unpacked: Path, other: str) -> Iterator[Pair]:
    """Titles and paragraphs of Debian's descriptions, joined on the checksum of the English one.

    A description counts where both sides have as many paragraphs; a list is taken apart where both have as many items.
    """
    ours, theirs = (_described(unpacked, language) for language in ("en", other))
    for key in (key for key in ours if key in theirs):
        (title, *paragraphs), (other_title, *others) = ours[key], theirs[key]
        yield title, other_title
        if len(paragraphs) == len(others):
            for paragraph, translated in zip(paragraphs, others, strict=True):
                items, other_items = _items(paragraph), _items(translated)
                if len(items) != len(other_items):
                    items, other_items = ["\n".join(items)], ["\n".join(other_items)]
                yield from zip(items, other_items, strict=True)


def _described(folder: Path, language: str) -> dict[str, list[str]]:
    """For each description's checksum its title and its paragraphs."""
    found = {}
    for file in sorted(folder.glob(f"Translation-{language}*")):
        for stanza in file.read_text(encoding="utf-8").split("\n\n"):
            checksum = re.search(r"^Description-md5: (\w+)", stanza, re.MULTILINE)
            _, here, text = stanza.partition(f"\nDescription-{language}:")
            if checksum and here:
                title, _, body = text.partition("\n")
                paragraphs = re.split(r"^ ?\.$", body, flags=re.MULTILINE)
                found[checksum[1]] = [title.strip(), *(part for part in paragraphs if part.strip())]
    return found


def _items(paragraph: str) -> list[str]:
    """The items of a list without their bullets, the rest as one: lines are wrapped at a width of no meaning."""
    items: list[list[str]] = [[]]
    for line in paragraph.split("\n"):
        if bullet := BULLET.match(line):
            items.append([])
            line = line[bullet.end() :]
        items[-1].append(" ".join(line.split()))
    return [text for item in items if (text := " ".join(item).strip())]


class _Elements(HTMLParser):
    """The text of every paragraph and heading that has an id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.inside: tuple[str, str] | None = None
        self.pieces: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = dict(attrs).get("id") or ""
        if self.inside is None and "_id" in name and re.fullmatch(r"p|h\d", tag):
            self.inside, self.pieces = (tag, name), []
        elif tag == "br":
            self.pieces.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if self.inside and tag == self.inside[0]:
            self.texts.setdefault(self.inside[1], " ".join("".join(self.pieces).split()))
            self.inside = None

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


def help_pages(unpacked: Path, other: str) -> Iterator[Pair]:
    """LibreOffice's help, aligned by file and element: the ids are the same in every language."""
    root = unpacked / HELP / "en-US" / "text"
    for file in sorted(root.rglob("*.html")):
        page = unpacked / HELP / other / "text" / file.relative_to(root)
        if page.exists():
            theirs = _Elements(page.read_text(encoding="utf-8")).texts
            for name, text in _Elements(file.read_text(encoding="utf-8")).texts.items():
                yield text, theirs.get(name, "")
