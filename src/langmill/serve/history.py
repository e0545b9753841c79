"""Conversations in SQLite: each is a tree of messages, so that an edit or another answer loses nothing.

What a call has returned from survives a crash of the process or the machine: write-ahead log, synchronous FULL
(https://sqlite.org/pragma.html#pragma_synchronous). Every conversation has an owner, the name of a key or "", and for
anybody else it does not exist. What is deleted is overwritten in the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from langmill.common.errors import DataError, LangmillError, UsageError
from langmill.common.settings import ServeSettings
from langmill.serve.errors import Refused

STEPS = (  # step n leads from version n to n + 1 and is never changed once released
    """
    CREATE TABLE conversations (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, created REAL NOT NULL, changed REAL NOT NULL
    ) STRICT;
    CREATE INDEX by_owner ON conversations (owner, changed DESC);
    CREATE TABLE messages (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE,
        parent INTEGER REFERENCES messages ON DELETE CASCADE,
        role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
        content TEXT NOT NULL, model TEXT, settings TEXT NOT NULL, created REAL NOT NULL,
        finish TEXT, tokens INTEGER, seconds REAL, likely TEXT
    ) STRICT;
    CREATE INDEX by_conversation ON messages (conversation);
    CREATE INDEX by_parent ON messages (parent);
    """,
)
COLUMNS = (
    "number, parent, role, content, model, settings, created, finish, tokens, seconds, likely IS NOT NULL"
)
EMPTY = "title = '' AND NOT EXISTS (SELECT 1 FROM messages WHERE conversation = id)"
EMPTY_SECONDS = 24 * 3600  # after which one that nobody said anything in may go
WAIT_SECONDS = 20  # for another process that writes
TITLE = 60  # characters that a title takes from the first message


@dataclass(frozen=True)
class Message:
    """A turn of a conversation. parent: the number of the one before, None for a first one.

    settings: how the answer was asked for. Of an answer: finish "stop", "length", "cancelled" or "error", the tokens
    written, the seconds it took, and whether the probabilities of its tokens are kept (`likely`).
    """

    role: str
    content: str
    parent: int | None = None
    model: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None
    tokens: int | None = None
    seconds: float | None = None
    number: int = 0
    created: float = 0.0
    likely: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Conversation:
    """What a list shows of a conversation; times in seconds since 1970."""

    id: str
    title: str
    created: float
    changed: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class History:
    """All conversations of a server. Calls block for a moment, may come from any thread, and wait for each other; a
    search, which reads every message, has a connection of its own in the file and holds up only other searches."""

    def __init__(self, file: Path | None) -> None:
        """Open or make the file, readable by its owner alone; None: in memory, and gone with the server.

        UsageError where it cannot be made or a newer Langmill wrote it, DataError where it is damaged or another
        program's.
        """
        self.file = file
        self._lock = threading.Lock()
        where = ":memory:" if file is None else _claimed(file)
        try:
            self._db = _connected(where)
            for line in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
                self._db.execute(f"PRAGMA {line}")
            migrate(self._db, STEPS, where)
            self._db.execute(
                f"DELETE FROM conversations WHERE {EMPTY} AND created < ?", (time.time() - EMPTY_SECONDS,)
            )
            self._search = (self._db, self._lock) if file is None else (_connected(where), threading.Lock())
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{where} cannot be read as conversations ({error}): move it away, or give another --history"
            ) from None

    def close(self) -> None:
        """Nothing is asked any more."""
        for db, lock in ((self._db, self._lock), self._search):
            with lock:
                db.close()

    def make(self, owner: str, title: str = "") -> Conversation:
        """A new conversation without messages; without a title it takes one from its first message."""
        now = time.time()
        made = Conversation(secrets.token_hex(12), title, now, now)
        with self._writing() as db:
            db.execute("INSERT INTO conversations VALUES (?, ?, ?, ?, ?)", (made.id, owner, title, now, now))
        return made

    def all(
        self, owner: str, search: str = "", offset: int = 0, limit: int = 100
    ) -> tuple[list[Conversation], bool]:
        """The owner's conversations with a title or a message, the last changed first, and whether more follow.

        search: those with this text in their title or a message, in capitals or not.
        """
        where = (
            f"owner = :owner AND NOT ({EMPTY}) AND (:search = '' OR holds(title, :search)"
            " OR EXISTS (SELECT 1 FROM messages WHERE conversation = id AND holds(content, :search)))"
        )
        given = {"owner": owner, "search": search.casefold(), "limit": limit + 1, "offset": offset}
        with self._searching() if search else self._reading() as db:
            rows = db.execute(
                f"SELECT id, title, created, changed FROM conversations WHERE {where}"
                " ORDER BY changed DESC, id LIMIT :limit OFFSET :offset",
                given,
            ).fetchall()
        return [Conversation(*row) for row in rows[:limit]], len(rows) > limit

    def find(self, owner: str, id: str) -> Conversation:
        """Refused (404) where this owner has none of this id; so do all calls below."""
        with self._reading() as db:
            return _found(db, owner, id)

    def rename(self, owner: str, id: str, title: str) -> Conversation:
        """Give it this title."""
        with self._writing() as db:
            _found(db, owner, id)
            db.execute("UPDATE conversations SET title = ? WHERE id = ?", (title, id))
            return _found(db, owner, id)

    def delete(self, owner: str, id: str) -> None:
        """Remove it, so that nothing of it is left in the file or its log."""
        with self._writing() as db:
            _found(db, owner, id)
            db.execute("DELETE FROM conversations WHERE id = ?", (id,))
        with self._reading() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def messages(self, owner: str, id: str) -> list[Message]:
        """Its whole tree, in the order in which the messages came."""
        with self._reading() as db:
            _found(db, owner, id)
            rows = db.execute(f"SELECT {COLUMNS} FROM messages WHERE conversation = ? ORDER BY number", (id,))
            return [_message(row) for row in rows]

    def path(self, owner: str, id: str, number: int | None) -> list[Message]:
        """From the first message to this one; none for None. Refused (404) where it is not in the conversation."""
        by_number = {one.number: one for one in self.messages(owner, id)}
        found: list[Message] = []
        while number is not None:
            if number not in by_number:
                raise Refused(
                    f"there is no message {number} in this conversation", 404, "no_such_message", "parent"
                )
            found.append(by_number[number])
            number = found[-1].parent
        return found[::-1]

    def add(self, owner: str, id: str, message: Message, likely: Sequence[Any] | None = None) -> Message:
        """Keep a message behind its parent: a user's behind an answer or first of all, an answer behind a user's.
        Refused where it does not go there."""
        with self._writing() as db:
            found = _found(db, owner, id)
            _check_parent(db, id, message)
            now = time.time()
            number = db.execute(
                "INSERT INTO messages (conversation, parent, role, content, model, settings, created, finish, tokens,"
                " seconds, likely) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    id, message.parent, message.role, message.content, message.model, _json(message.settings), now,
                    message.finish, message.tokens, message.seconds, None if likely is None else _json(likely),
                ),
            ).lastrowid  # fmt: skip
            title = found.title or _title(message.content)
            db.execute("UPDATE conversations SET changed = ?, title = ? WHERE id = ?", (now, title, id))
            row = db.execute(f"SELECT {COLUMNS} FROM messages WHERE number = ?", (number,)).fetchone()
        return _message(row)

    def likely(self, owner: str, id: str, number: int) -> list[Any] | None:
        """What `add` was given with this message; None where it was nothing."""
        with self._reading() as db:
            _found(db, owner, id)
            row = db.execute(
                "SELECT likely FROM messages WHERE conversation = ? AND number = ?", (id, number)
            ).fetchone()
        if row is None:
            raise Refused(f"there is no message {number} in this conversation", 404, "no_such_message")
        return None if row[0] is None else list(json.loads(row[0]))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _named():
            yield self._db

    @contextlib.contextmanager
    def _searching(self) -> Iterator[sqlite3.Connection]:
        db, lock = self._search
        with lock, _named():
            yield db

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _named(), _transaction(self._db):
            yield self._db


def open_history(settings: ServeSettings) -> History | None:
    """The conversations of a server with these settings: None where it has no page, in memory for --history off."""
    if not settings.page:
        return None
    if settings.history != "off":
        return History(default_file() if settings.history is None else Path(settings.history))
    if settings.workers > 1:
        raise UsageError(
            "--history off keeps conversations in one process's memory, and there are "
            f"{settings.workers} --workers: give --history FILE, or --no-page"
        )
    return History(None)


def default_file(state_home: str = "") -> Path:
    """Where this user's programs keep what they remember. state_home: XDG_STATE_HOME, which counts where it is a whole
    path (XDG Base Directory Specification 0.8)."""
    if Path(state_home).is_absolute():
        return Path(state_home, "langmill", "history.sqlite")
    below = {"win32": "AppData/Local/Langmill", "darwin": "Library/Application Support/Langmill"}
    return Path.home() / below.get(sys.platform, ".local/state/langmill") / "history.sqlite"


def migrate(db: sqlite3.Connection, steps: Sequence[str], where: str) -> None:
    """Bring a file to the version of these steps, all of them or none. UsageError where a newer Langmill wrote it."""
    with _transaction(db):
        version = db.execute("PRAGMA user_version").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if version > len(steps):
            raise UsageError(
                f"{where} has version {version} of the conversations, and this Langmill knows {len(steps)} at most: "
                "upgrade Langmill, or give another --history"
            )
        if version == 0 and tables:
            raise DataError(f"{where} is another program's database: give another --history")
        for step in steps[version:]:
            for statement in filter(str.strip, step.split(";")):
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(steps)}")


def _claimed(file: Path) -> str:
    """The file, made where it was missing: what people say to a model is nobody else's to read."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise UsageError(
            f"the conversations cannot be kept in {file} ({error.strerror}): give another --history, or off"
        ) from None
    return str(file)


def _connected(where: str) -> sqlite3.Connection:
    db = sqlite3.connect(where, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    db.create_function("holds", 2, _holds, deterministic=True)
    return db


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Say of an error of the database what it is about."""
    try:
        yield
    except sqlite3.Error as error:
        raise LangmillError(f"the file of conversations failed: {error}") from error


def _found(db: sqlite3.Connection, owner: str, id: str) -> Conversation:
    row = db.execute(
        "SELECT id, title, created, changed FROM conversations WHERE id = ? AND owner = ?", (id, owner)
    ).fetchone()
    if row is None:
        raise Refused(f"there is no conversation {id[:40]} here", 404, "no_such_conversation")
    return Conversation(*row)


def _check_parent(db: sqlite3.Connection, id: str, message: Message) -> None:
    row = db.execute(
        "SELECT role FROM messages WHERE conversation = ? AND number = ?", (id, message.parent)
    ).fetchone()
    if message.parent is not None and row is None:
        raise Refused(
            f"there is no message {message.parent} in this conversation", 404, "no_such_message", "parent"
        )
    fits = (
        row is not None and row[0] == "user"
        if message.role == "assistant"
        else row is None or row[0] != "user"
    )
    if not fits:
        wanted = (
            "a user's message" if message.role == "assistant" else "an answer, or null for a first message"
        )
        raise Refused(f"parent must be {wanted}", param="parent")


def _message(row: Sequence[Any]) -> Message:
    number, parent, role, content, model, settings, created, finish, tokens, seconds, likely = row
    return Message(
        role,
        content,
        parent,
        model,
        json.loads(settings),
        finish,
        tokens,
        seconds,
        number,
        created,
        bool(likely),
    )


def _title(content: str) -> str:
    line = " ".join(content.split())
    return line if len(line) <= TITLE else line[: TITLE - 1].rstrip() + "…"


def _holds(text: str, search: str) -> bool:
    return search in text.casefold()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
