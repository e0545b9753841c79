"""How much one may ask for: requests and tokens a minute for each key, and the bytes and seconds of a body."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from langmill.common.settings import ServeSettings
from langmill.serve import errors
from langmill.serve.errors import Refused
from langmill.serve.state import State

BODY_SECONDS = 30.0  # in which a body must be there, so that slow senders hold no connections


@dataclass
class Bucket:
    """So much a minute, and no more at once: what is taken comes back evenly. It may be in debt, since what a request
    writes is known only afterwards."""

    size: int
    left: float
    at: float

    def refill(self, now: float) -> None:
        """Up to this time."""
        self.left = min(self.size, self.left + (now - self.at) * self.size / 60)
        self.at = now

    def wait(self, wanted: int) -> float:
        """Seconds until so many are there."""
        return max(0.0, (wanted - self.left) * 60 / self.size)


@dataclass
class Limits:
    """The buckets of each key; without keys all requests share one. It lives in the server's event loop alone."""

    settings: ServeSettings
    clock: Callable[[], float] = time.monotonic
    _buckets: dict[tuple[str, str | None], Bucket] = field(default_factory=dict)

    def check(self, key: str | None, tokens: int) -> None:
        """Take one request and the tokens that it reads. Refused with 429 and Retry-After where a limit is reached, and
        with 400 where it could never be met."""
        wanted = [
            ("requests", self.settings.requests_per_minute, 1),
            ("tokens", self.settings.tokens_per_minute, tokens),
        ]
        taken: list[tuple[Bucket, int]] = []
        for what, size, count in wanted:
            if size is None:
                continue
            if count > size:
                raise Refused(
                    f"this request has {count} {what} and the limit is {size} a minute: make it smaller",
                    code=f"{what}_per_minute",
                )
            bucket = self._bucket(what, key, size)
            if seconds := math.ceil(bucket.wait(count)):
                raise Refused(
                    f"the limit of {size} {what} a minute is reached: try again in {seconds} s",
                    429,
                    "rate_limit_exceeded",
                    headers={
                        "Retry-After": str(seconds),
                        f"X-RateLimit-Limit-{what.title()}": str(size),
                        f"X-RateLimit-Remaining-{what.title()}": str(max(0, math.floor(bucket.left))),
                        f"X-RateLimit-Reset-{what.title()}": f"{seconds}s",
                    },
                )
            taken.append((bucket, count))
        for bucket, count in taken:
            bucket.left -= count

    def spend(self, key: str | None, tokens: int) -> None:
        """Take the tokens that were written."""
        if self.settings.tokens_per_minute is not None:
            self._bucket("tokens", key, self.settings.tokens_per_minute).left -= tokens

    def _bucket(self, what: str, key: str | None, size: int) -> Bucket:
        now = self.clock()
        bucket = self._buckets.setdefault((what, key), Bucket(size, size, now))
        bucket.refill(now)
        return bucket


class Bodies:
    """Refuses a body that is larger than allowed, by what it says of itself and by what comes, or too slow."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.most, self.metrics = app, state.settings.max_body_bytes, state.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        told = Headers(scope=scope).get("content-length", "0")
        too_large = (
            f"the body is larger than {self.most} bytes, the most that this server takes (--max-body-bytes)"
        )
        if not told.isdecimal() or len(told) > 18 or int(told) > self.most:
            told_so = Refused(too_large, 413, "body_too_large")
            return await errors.refused(told_so, self.metrics, scope, receive, send)
        size, whole, end = 0, False, time.monotonic() + BODY_SECONDS

        async def counted() -> Message:
            nonlocal size, whole
            if whole:  # what follows is the client leaving, for which there is no hurry
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except TimeoutError:
                raise HTTPException(408, f"the body was not there after {BODY_SECONDS:.0f} seconds") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.most:
                raise HTTPException(413, too_large)
            return message

        await self.app(scope, counted, send)
