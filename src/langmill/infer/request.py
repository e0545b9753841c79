"""What is asked of the engine, and what it answers.

V vocabulary, D width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from langmill.infer.sampling import Sampling
from langmill.infer.text import Writer

Ids = NDArray[np.int64]
Finish = Literal["stop", "length", "cancelled", "error"]


class Constraint(Protocol):
    """What a request may write, such as a grammar; it belongs to one request. An error that it raises ends that one."""

    @property
    def done(self) -> bool:
        """Whether what is written is complete and nothing can follow, so that the request stops."""

    @property
    def whole(self) -> bool:
        """Whether what is written is complete as it stands: stop ids may come where it is, and nowhere else."""

    def allows(self, id: int) -> bool:
        """Whether this id may come next, as `mask` says: asked first where one is likely, since it costs less."""

    def mask(self) -> Any:
        """The ids that may come next, as `sampling.allowed` takes them; None for all."""

    def steer(self, id: int, left: int) -> int:
        """What to write where this id was chosen: another one, where after it the `left` tokens that may still be
        written, with it, would not do to become complete."""

    def accept(self, id: int) -> None:
        """This id came next."""

    def forced(self) -> Sequence[int]:
        """What will probably come next whatever the model says, to be read ahead."""


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """One prompt to go on from, or one text to make a vector of (`kind` "embed"), given as ids.

    source: what an encoder-decoder reads first; the prompt is then how its answer starts. stop_ids: None for the
    tokenizer's own. priority: higher ones go first, and may take the place of lower ones. logprobs: how many of the
    likeliest ids to tell with each token, None for no log-probabilities. scored: tell those of the prompt too, which is
    then read anew, whatever slots hold. adapter: its number by `Engine.adapt`, 0 for the model itself. choice: 0, 1, …
    for several answers to one prompt with one seed: each draws its own numbers.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    kind: Literal["write", "embed"] = "write"
    source: Sequence[int] | None = None
    stop_ids: frozenset[int] | None = None
    priority: int = 0
    constraint: Constraint | None = None
    logprobs: int | None = None
    choice: int = 0
    scored: bool = False
    adapter: int = 0

    @property
    def private(self) -> bool:
        """Whether it shares nothing that was read with others."""
        return self.source is not None or self.scored


class Likely(NamedTuple):
    """A token's log-probability in nats, as the model gave it, and the likeliest ids with theirs."""

    log: float
    top: list[tuple[int, float]]


@dataclass(eq=False, slots=True)
class Event:
    """What a step did for a request.

    ids: the tokens that it wrote, a stop id included; text: what became certain of their text. finish: on a request's
    last event how it ended: "stop" after a stop id, a stop text, a complete constraint or a vector; "length" after
    max_new_tokens or the last place; "cancelled"; "error". reason: of an error, or why the text does not meet the
    request's constraint. cached: the prompt's tokens that were known
    from earlier requests. vector: (D,) of an "embed". prompt: of a `scored` request, with its first token: what
    `likely` is, of each of the prompt's tokens but the first, which nothing stands before.
    """

    request: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    likely: list[Likely] = field(default_factory=list)
    finish: Finish | None = None
    reason: str | None = None
    cached: int = 0
    vector: NDArray[np.float32] | None = None
    prompt: list[Likely] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Live:
    """A request inside the engine: what it has written, and what it needs to go on."""

    number: int
    request: Request
    prompt: Ids
    limit: int = 0  # tokens it may write
    stop_ids: frozenset[int] = frozenset()
    numbers: random.Random = field(default_factory=random.Random)
    writer: Writer | None = None
    seen_V: Tensor | None = None  # True at its ids; kept where there is a penalty on them
    counts_V: Tensor | None = None  # how often it wrote each id; kept where a penalty asks
    written: list[int] = field(default_factory=list)
    slot: int = -1  # -1: it waits
    queued: int = 0  # tokens that count as waiting
    encoded: bool = True  # its source, if it has one
    cached: int | None = None  # set when it is admitted
    told: list[Likely] = field(default_factory=list)  # of a prompt that is scored, as far as it is read

    @property
    def order(self) -> tuple[int, int]:
        """Smaller ones go first."""
        return -self.request.priority, self.number

    @property
    def ids(self) -> Ids:
        """All tokens so far."""
        return np.concatenate((self.prompt, np.array(self.written, np.int64)))
