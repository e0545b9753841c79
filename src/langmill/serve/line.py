"""A line before something that one may use at a time; it is not endless."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from langmill.common.errors import QueueFull


@dataclass(eq=False)
class Line:
    """Those that wait, one after the other, of `what` at most `most` in all. One event loop's alone."""

    most: int
    what: str = "tokens"
    sizes: list[int] = field(default_factory=list)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def busy(self) -> bool:
        """Whether it is somebody's turn."""
        return self._lock.locked()

    @asynccontextmanager
    async def turn(self, size: int) -> AsyncGenerator[None, None]:
        """Wait for one's turn; it ends with the context. QueueFull, with the numbers, where so much may not wait."""
        if self.busy and sum(self.sizes) + size > self.most:
            raise QueueFull(
                f"{size} {self.what} cannot wait beside the {sum(self.sizes)} that do already: at most {self.most} "
                "may; try again later"
            )
        self.sizes.append(size)
        try:
            await self._lock.acquire()
        finally:
            self.sizes.remove(size)
        try:
            yield
        finally:
            self._lock.release()

    def accounting(self) -> dict[str, int]:
        """What is in use, as an engine tells it."""
        waiting, now = len(self.sizes), int(self.busy)
        return {
            "requests": waiting + now, "queued": waiting, "queued_tokens": sum(self.sizes), "slots": now,
        }  # fmt: skip
