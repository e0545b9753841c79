"""The secret key of pseudonyms."""

from __future__ import annotations

import hmac
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from langmill.common.errors import UsageError

LEAST = 16  # bytes


@dataclass(frozen=True)
class Key:
    """A key of at least 16 bytes, which shows itself by `id` alone: 8 hex digits that say whether two are the same."""

    secret: bytes = field(repr=False)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        if len(self.secret) < LEAST:
            raise UsageError(f"a key has at least {LEAST} bytes, and this one has {len(self.secret)}")
        object.__setattr__(self, "id", self.digest("key", "").hex()[:8])

    def digest(self, type: str, value: str) -> bytes:
        """32 bytes for a value (HMAC-SHA256, RFC 2104): without the key nobody can tell or test which value it was."""
        return hmac.digest(self.secret, f"{type}\0{value}".encode("utf-8", "surrogatepass"), "sha256")


def read_key(file: Path | None, variable: str | None, make: bool = False) -> Key:
    """The key in a file, or in the environment variable of that name; white space around it does not count.

    make: a file that is not there is written, readable by its owner alone. UsageError where there is no key, or both.
    """
    if (file is None) == (variable is None):
        raise UsageError(
            "pseudonyms need a key: --key-file FILE (with --make-key to write one) or --key-env NAME, one of them"
        )
    if variable is not None:
        value = os.environ.get(variable, "").strip()
        if not value:
            raise UsageError(
                f"the environment variable {variable} is empty or not set: it should hold the key"
            )
        return Key(value.encode("utf-8"))
    assert file is not None
    if make and not file.exists():
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(secrets.token_hex(32) + "\n")
    if not file.is_file():
        raise UsageError(f"{file} is no file: --make-key writes a new key there")
    try:
        return Key(file.read_bytes().strip())
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
