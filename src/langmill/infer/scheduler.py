"""Which requests have a slot, and what of them the next pass reads.

Every pass takes the next token of all that write, then pieces of prompts up to a bound of tokens, so that a long prompt
holds nobody up for longer than a pass (chunked prefill, Agrawal et al. 2024, arXiv:2403.02310, section 4.2). Requests
join and leave between passes (continuous batching, Yu et al. 2022, OSDI, section 3).
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from langmill.common.errors import QueueFull
from langmill.infer.request import Ids, Live
from langmill.infer.slots import Slots

LOOK = 64  # waiting requests that a pass looks at: others behind these may be let in one pass later


class Propose(Protocol):
    """What guesses; see speculative.py."""

    def __call__(self, slots: Sequence[int], tokens: Sequence[Ids]) -> Sequence[Sequence[int]]:
        """Of each slot and its tokens so far, what may come next: read in the same pass, and kept as far as it comes.
        The tokens of a slot go on from those of the call before."""

    def took(self, tokens: int, seconds: float) -> None:
        """So long took a pass of so many tokens, for it to weigh its guesses by."""

    def leave(self, slot: int) -> None:
        """What comes next in this slot is another request."""


class Part(NamedTuple):
    """What a pass reads of one request: `size` tokens of its slot from place `start` on, and the scores behind the
    last `wants` of them. More than one are wanted where the last tokens are guessed. tells: scores behind the tokens
    before those, for a prompt that is scored."""

    live: Live
    start: int
    size: int
    wants: int
    tells: int = 0


@dataclass
class Pass:
    """One pass: sources to be encoded first, texts to make vectors of, and the tokens of slots."""

    sources: list[Part] = field(default_factory=list)
    texts: list[Part] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


class Scheduler:
    """The requests of an engine, waiting and in slots.

    copy: of a runner. pass_tokens: the bound of a pass; one text or source that must be read whole may alone exceed
    it. queue_tokens: the bound of what waits. worth: shared tokens from which copying them, or waiting until another
    request has read them, is better than reading them anew. counts: what was done, for people to watch.
    """

    def __init__(
        self,
        slots: Slots,
        copy: Callable[[int, int, int], None],
        pass_tokens: int,
        queue_tokens: int,
        worth: int,
        propose: Propose | None = None,
    ):
        self.slots, self.copy, self.propose = slots, copy, propose
        self.pass_tokens, self.queue_tokens, self.worth = pass_tokens, queue_tokens, worth
        self.owners: list[Live | None] = [None] * len(slots.taken_S)
        self.queue: list[Live] = []  # for slots, in their order
        self.texts: list[Live] = []  # for vectors: these need no slot
        self.waiting = 0  # tokens in both
        self.counts: Counter[str] = Counter()

    def add(self, live: Live) -> None:
        """Let it wait its turn; QueueFull where too much waits already."""
        tokens = len(live.prompt) + len(live.request.source or ())
        if self.waiting + tokens > self.queue_tokens:
            raise QueueFull(
                f"{tokens} tokens cannot wait beside the {self.waiting} that do already: at most "
                f"{self.queue_tokens} may; try again later"
            )
        live.queued = tokens
        self.waiting += tokens
        insort(self.texts if live.request.kind == "embed" else self.queue, live, key=_order)

    def remove(self, live: Live, keep: bool = True) -> None:
        """It is over. keep: what its slot holds is good for others."""
        self._leave_queue(live)
        if live.slot >= 0:
            self._leave_slot(live, keep)
        else:
            waits = self.texts if live.request.kind == "embed" else self.queue
            waits[:] = [other for other in waits if other is not live]

    def plan(self) -> Pass:
        """What to read next: those that need but one token first, then prompts, sources and texts in their order."""
        self._admit()
        made, held_S, known_S = Pass(), self.slots.held_S, self.slots.known_S
        prompts = []
        for live in self.owners:
            if live is None:
                continue
            if live.encoded and known_S[live.slot] - held_S[live.slot] == 1:
                made.parts.append(Part(live, int(held_S[live.slot]), 1, 1))
            else:
                prompts.append(live)
        left = free = self.pass_tokens - len(made.parts)
        for live in heapq.merge(sorted(prompts, key=_order), self.texts, key=_order):
            whole = _whole(live)
            if left <= 0 or (whole > left and left < free):
                break
            left -= whole
            if live.slot < 0:
                made.texts.append(Part(live, 0, whole, 0))
                continue
            if not live.encoded:
                made.sources.append(Part(live, 0, whole, 0))
                live.encoded = True
            start = int(held_S[live.slot])
            size = min(int(known_S[live.slot]) - start, max(left, 0))
            left -= size
            if size:
                wants = int(start + size == known_S[live.slot])
                made.parts.append(Part(live, start, size, wants, (size - wants) * live.request.scored))
        del self.texts[: len(made.texts)]
        for part in made.texts:
            self._leave_queue(part.live)
        if left > 0:
            made.parts = self._guess(made.parts, left)
        made.parts.sort(key=_adapter)  # one walk over an adapter's weights serves all its tokens
        return made

    def _admit(self) -> None:
        """Give slots to those that wait, as long as there are any, or ones of less important requests."""
        for live in self.queue[:LOOK]:
            if not self.slots.free and (victim := self._victim(live)) is None:
                return
            if self._comes(live):
                continue
            if not self.slots.free:
                assert victim is not None
                self._leave_slot(victim, keep=True)
                victim.encoded = victim.request.source is None
                insort(self.queue, victim, key=_order)
                self.counts["preempted"] += 1
            self.queue.remove(live)
            self._leave_queue(live)
            asked = live.request
            slot, kept, source = self.slots.take(live.ids, self.worth, asked.private, asked.adapter)
            live.slot, self.owners[slot] = slot, live
            if source is not None:
                self.copy(source, slot, kept)
            live.cached = kept if live.cached is None else live.cached
            self.counts["reused"] += kept

    def _victim(self, live: Live) -> Live | None:
        """The least important request with a slot, the youngest of these, if it is less important than this one."""
        last = max((owner for owner in self.owners if owner is not None), key=_order, default=None)
        return last if last is not None and last.request.priority < live.request.priority else None

    def _comes(self, live: Live) -> bool:
        """Whether a request as important is about to read tokens that this one begins with too."""
        if live.request.private:
            return False
        common_S = self.slots.common(live.ids[:-1], live.request.adapter)
        best = int(np.minimum(common_S, self.slots.held_S).max())
        ahead = np.flatnonzero(self.slots.taken_S & (common_S - best >= self.worth))
        owners = (self.owners[slot] for slot in ahead)
        return any(o is not None and o.request.priority >= live.request.priority for o in owners)

    def _guess(self, parts: list[Part], left: int) -> list[Part]:
        """The parts with guesses of what follows them, as many as the pass and their slots have room for."""
        chosen = [part for part in parts if part.wants and not part.tells]
        tokens, known_S = self.slots.tokens_SL, self.slots.known_S
        slots = [part.live.slot for part in chosen]
        guesses: Sequence[Sequence[int]] = [()] * len(slots)
        if self.propose is not None:
            guesses = self.propose(slots, [tokens[slot, : known_S[slot]] for slot in slots])
        longer = {}
        for part, guess in zip(chosen, guesses, strict=True):
            live, known = part.live, int(known_S[part.live.slot])
            guess = _forced(live) or guess
            guess = guess[: max(0, min(left, live.limit - len(live.written) - 1))]
            tokens[live.slot, known : known + len(guess)] = guess
            left -= len(guess)
            longer[live.number] = part._replace(size=part.size + len(guess), wants=1 + len(guess))
            self.counts["guessed"] += len(guess)
        return [longer.get(part.live.number, part) for part in parts]

    def _leave_queue(self, live: Live) -> None:
        self.waiting -= live.queued
        live.queued = 0

    def _leave_slot(self, live: Live, keep: bool) -> None:
        if self.propose is not None:
            self.propose.leave(live.slot)
        self.slots.release(live.slot, keep)
        self.owners[live.slot], live.slot = None, -1


def _order(live: Live) -> tuple[int, int]:
    return live.order


def _adapter(part: Part) -> int:
    return part.live.request.adapter


def _forced(live: Live) -> Sequence[int]:
    """What its constraint leaves no choice about."""
    try:
        return live.request.constraint.forced() if live.request.constraint is not None else ()
    except Exception:  # a broken one ends its request where the next token is picked
        return ()


def _whole(live: Live) -> int:
    """Tokens that must be read at once before anything else of it."""
    if live.request.kind == "embed":
        return len(live.prompt)
    return 0 if live.encoded else len(live.request.source or ())
