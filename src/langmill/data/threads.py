"""Posts and messages put together into their threads, in order. They wait in a file, so that memory does not grow."""

from __future__ import annotations

import sqlite3
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Post:
    """A row of an export: its number, text and bytes, and what it says of itself."""

    place: int
    text: str
    size: int
    id: str | None = None
    thread: str | None = None
    parent: str | None = None
    author: str | None = None
    time: str | None = None


def threads(posts: Iterable[Post]) -> Iterator[tuple[int, str, int, dict[str, Any]]]:
    """(number of the first row, text, bytes, meta) of every thread, in order of their first rows.

    A post stands on a line of its own as "author: text", in order of time, then of the file. Its thread is the one it
    names, else that of the first post that its parents lead back to; a loop of parents ends where it began. meta:
    thread, messages, and authors, each written as it stands before their posts.
    """
    with tempfile.TemporaryDirectory(prefix="langmill-") as folder:
        base = sqlite3.connect(Path(folder) / "posts")
        try:
            base.execute("pragma journal_mode=off")
            base.execute(
                "create table post (place integer, text text, size integer, id text, thread text, parent text, "
                "author text, time text)"
            )
            base.executemany("insert into post values (?,?,?,?,?,?,?,?)", map(astuple, posts))
            _name(base)
            base.execute("create index ordered on post (thread, time, place)")
            for thread, place in base.execute(
                "select thread, min(place) from post group by thread order by 2"
            ):
                told = base.execute(
                    "select author, text, size from post where thread = ? order by cast(time as real), time, place",
                    (thread,),
                ).fetchall()
                said = [(_label(author or ""), text) for author, text, _ in told]
                text = "\n".join(f"{author}: {text}" if author else text for author, text in said)
                meta = {"thread": thread, "messages": len(told)}
                if authors := sorted({author for author, _ in said if author}):
                    meta["authors"] = authors
                yield place, text, sum(size for *_, size in told), meta
        finally:
            base.close()


def _label(author: str) -> str:
    """A name on one line, of characters that later steps leave as they are."""
    shown = "".join(" " if unicodedata.category(sign) in ("Cc", "Zl", "Zp") else sign for sign in author)
    return " ".join(unicodedata.normalize("NFC", shown.replace("\ufeff", "").replace("\xad", "")).split())


def _name(base: sqlite3.Connection) -> None:
    """Give a thread to every post that names none."""
    base.execute("create index ids on post (id)")
    named = []
    for place, id, parent in base.execute(
        "select place, id, parent from post where thread is null"
    ).fetchall():
        chain, thread = dict.fromkeys([id]), None
        while parent is not None and parent not in chain:
            chain[parent] = None
            above = base.execute("select parent, thread from post where id = ?", (parent,)).fetchone()
            parent, thread = above or (None, None)
        ids = list(chain)
        root = ids[-1] if parent is None else min(filter(None, ids[ids.index(parent) :]))  # else a loop
        named.append((thread or root or f"row {place}", place))
    base.executemany("update post set thread = ? where place = ?", named)
