"""How much one may ask for: requests and tokens a minute for each key, and the bytes and seconds of a body."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from langmill.common.settings import ServeSettings
from langmill.serve import errors
from langmill.serve.errors import Refused
from langmill.serve.state import State


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

    def told(self, what: str) -> dict[str, str]:
        """What it holds, in OpenAI's headers; reset: until it is full again."""
        minutes, seconds = divmod(math.ceil(self.wait(self.size)), 60)
        return {
            f"X-RateLimit-Limit-{what}": str(self.size),
            f"X-RateLimit-Remaining-{what}": str(max(0, math.floor(self.left))),
            f"X-RateLimit-Reset-{what}": f"{minutes}m{seconds}s" if minutes else f"{seconds}s",
        }

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
        wanted = {"requests": 1, "tokens": tokens}
        taken: list[tuple[Bucket, int]] = []
        for what, size in self._sizes().items():
            count = wanted[what]
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
                    headers={"Retry-After": str(seconds)},
                )
            taken.append((bucket, count))
        for bucket, count in taken:
            bucket.left -= count

    def spend(self, key: str | None, tokens: int) -> None:
        """Take the tokens that were written."""
        if self.settings.tokens_per_minute is not None:
            self._bucket("tokens", key, self.settings.tokens_per_minute).left -= tokens

    def told(self, key: str | None) -> dict[str, str]:
        """The headers that say what a key has left; none where nothing is limited."""
        buckets = [(what.title(), self._bucket(what, key, size)) for what, size in self._sizes().items()]
        return {name: value for what, bucket in buckets for name, value in bucket.told(what).items()}

    def _sizes(self) -> dict[str, int]:
        both = {"requests": self.settings.requests_per_minute, "tokens": self.settings.tokens_per_minute}
        return {what: size for what, size in both.items() if size is not None}

    def _bucket(self, what: str, key: str | None, size: int) -> Bucket:
        now = self.clock()
        bucket = self._buckets.setdefault((what, key), Bucket(size, size, now))
        bucket.refill(now)
        return bucket


class Told:
    """Adds to every answer what its key has left of its limits."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.limits, self.keys = app, state.limits, state.keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                key = scope.get("state", {}).get("key")
                if key is not None or self.keys.path is None:
                    MutableHeaders(scope=message).update(self.limits.told(key))
            await send(message)

        await self.app(scope, receive, telling if scope["type"] == "http" else send)


class Bodies:
    """Refuses a body that is larger than allowed, by what it says of itself and by what comes, or too slow."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.metrics = app, state.metrics
        self.most, self.seconds = state.settings.max_body_bytes, state.settings.request_seconds

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
        size, whole, end = 0, False, time.monotonic() + self.seconds

        async def counted() -> Message:
            nonlocal size, whole
            if whole:  # what follows is the client leaving, for which there is no hurry
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except TimeoutError:
                raise HTTPException(408, f"the body was not there after {self.seconds:g} seconds") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.most:
                raise HTTPException(413, too_large)
            return message

        await self.app(scope, counted, send)
