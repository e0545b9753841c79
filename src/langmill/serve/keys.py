"""API keys: a file of their hashes, and the door at which each request shows one.

A key is 256 random bits, so that one SHA-256 of it cannot be turned back; the file never holds the key itself.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from langmill.common.errors import UsageError
from langmill.common.files import atomic_write
from langmill.common.settings import ServeSettings
from langmill.serve import errors
from langmill.serve.hosts import is_loopback
from langmill.serve.state import State

LOG = logging.getLogger("langmill.serve")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LINE = re.compile(rf"({NAME.pattern})\s*:\s*([0-9a-f]{{64}})")
HEAD = "# Keys of langmill serve, as name: SHA-256. Delete a line to take a key back.\n"
OPEN = (
    "/",
    "/health",
    "/favicon.ico",
)  # GET without a key: they tell nothing of the models or of anybody's text


@dataclass
class Keys:
    """Names by the hashes of their keys, and the file that they are in; None where no key is asked for."""

    names: Mapping[bytes, str]
    path: Path | None = None
    _mark: tuple[int, ...] = ()

    def refresh(self) -> None:
        """Read the file again where it is another than before. One that cannot be read leaves the keys as they were,
        and is logged; one without keys lets nobody in."""
        if self.path is None:
            return
        try:
            found = self.path.stat()
        except OSError:
            mark: tuple[int, ...] = ()
        else:
            mark = (found.st_ino, found.st_size, found.st_mtime_ns)
        if mark == self._mark:
            return
        before, self._mark = self._mark, mark
        try:
            self.names = read_keys(self.path)
        except UsageError as error:
            LOG.error("the keys are those of before: %s", error)
        else:
            if before:
                LOG.warning("%s has changed: %d keys", self.path, len(self.names))

    def owner(self, key: str) -> str | None:
        """Whose key this is, in a time that does not depend on how much of it is right; None for nobody's."""
        digest, found = digest_of(key), None
        for known, name in self.names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def open_keys(settings: ServeSettings) -> Keys:
    """The keys of the settings. UsageError where the address can be reached from elsewhere and there are none, and for
    a file that is not one of keys."""
    if settings.api_keys is None:
        if not is_loopback(settings.host):
            raise UsageError(
                f"--host {settings.host} can be reached from other machines, so it needs keys: make one with "
                f"`langmill serve --new-key NAME --api-keys keys.txt`, then add --api-keys keys.txt"
            )
        return Keys({})
    found = Keys(read_keys(settings.api_keys), settings.api_keys)
    if not found.names:
        raise UsageError(f"{settings.api_keys} holds no key: make one with --new-key NAME")
    found.refresh()
    return found


def read_keys(path: Path) -> dict[bytes, str]:
    """Names by hashes. UsageError with the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-keys: {path} cannot be read: {error}") from None
    found: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if (match := LINE.fullmatch(line.strip())) is None:
            raise UsageError(
                f"{path}, line {number}: this is no `name: SHA-256 in hex`"
            )  # the line may be a key
        found[bytes.fromhex(match[2])] = match[1]
    return found


def add_key(path: Path, name: str) -> str:
    """Make a key, add its hash to the file, which only its owner may read, and return the key: it is kept nowhere."""
    if NAME.fullmatch(name) is None:
        raise UsageError(f"--new-key {name!r}: a name has letters, digits, dots and dashes, 64 at most")
    known = read_keys(path) if path.exists() else {}
    if name in known.values():
        raise UsageError(f"{path} has a key of {name}: delete that line first, or take another name")
    key = "lm-" + secrets.token_urlsafe(32)
    before = path.read_text(encoding="utf-8").rstrip("\n") + "\n" if path.exists() else HEAD
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, f"{before}{name}: {digest_of(key).hex()}\n")
    path.chmod(0o600)
    return key


def shown_key(headers: Headers) -> str | None:
    """The key of a request: `Authorization: Bearer KEY` (OpenAI), or `x-api-key: KEY` (Anthropic)."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key")


class Authorise:
    """Lets requests with a known key in, and tells the routes whose it is (`scope["state"]["key"]`)."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.keys, self.metrics = app, state.keys, state.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.keys.path is None:
            return await self.app(scope, receive, send)
        self.keys.refresh()
        key = shown_key(Headers(scope=scope))
        name = None if key is None else self.keys.owner(key)
        scope.setdefault("state", {})["key"] = name
        if name is None and not _is_open(scope):
            said = "this server asks for a key: send it as `Authorization: Bearer KEY`"
            told = errors.Refused(
                said if key is None else "this key is not known here", 401, "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
            return await errors.refused(told, self.metrics, scope, receive, send)
        await self.app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    path = str(scope["path"])
    return scope["method"] in ("GET", "HEAD") and (
        path in OPEN or path.startswith("/page/") or path.startswith("/health/")
    )
