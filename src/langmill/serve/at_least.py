"""`min_tokens`: what a request may write, with no end before so many tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from langmill.infer.request import Constraint
from langmill.serve.errors import Refused
from langmill.serve.sampling_fields import Writing


@dataclass
class AtLeast:
    """A `Constraint`: the ids that end an answer come behind `fewest` tokens at the earliest. inner: what else holds.

    Where nothing can follow what `inner` asks for, the answer ends before.
    """

    fewest: int
    inner: Constraint | None = None
    written: int = 0

    @property
    def done(self) -> bool:
        """Whether nothing can follow."""
        return self.inner is not None and self.inner.done

    @property
    def whole(self) -> bool:
        """Whether the answer may end here."""
        return self.done or (self.written >= self.fewest and (self.inner is None or self.inner.whole))

    def allows(self, id: int) -> bool:
        """Whether this id, which ends nothing, may come next."""
        return self.inner is None or self.inner.allows(id)

    def mask(self) -> Any:
        """What `inner` has."""
        return None if self.inner is None else self.inner.mask()

    def steer(self, id: int, left: int) -> int:
        """What `inner` has."""
        return id if self.inner is None else self.inner.steer(id, left)

    def accept(self, id: int) -> None:
        """This id came next."""
        self.written += 1
        if self.inner is not None:
            self.inner.accept(id)

    def forced(self) -> Sequence[int]:
        """What `inner` has."""
        return () if self.inner is None else self.inner.forced()


def at_least(
    asked: Writing, limit: int, inner: Callable[[], Constraint] | None
) -> Callable[[], Constraint] | None:
    """What makes the constraint of each answer of at most `limit` tokens. Refused where `min_tokens` is more."""
    fewest = asked.min_tokens or 0
    if fewest > limit:
        raise Refused(
            f"min_tokens is {fewest}, and at most {limit} tokens are written: ask for fewer, or raise the limit",
            param="min_tokens",
        )
    if not fewest:
        return inner
    return lambda: AtLeast(fewest, None if inner is None else inner())
