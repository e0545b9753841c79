"""The engine: many requests over one model, each as if it were alone. A step is plan, run, write.

It is a plain object for one thread, and knows nothing of networks; service.py puts a thread and asyncio around it.

W wanted logits, V vocabulary, K texts, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import TypeVar

import numpy as np
from torch import Tensor

from langmill.common.errors import ModelError, SettingsError, UsageError
from langmill.infer.adapters import AdaptedRunner, Adapter
from langmill.infer.admission import admitted
from langmill.infer.pick import Pick, pick, tell
from langmill.infer.request import Event, Finish, Live, Request
from langmill.infer.runner import Embedder, Floats, Runner, SourceRunner
from langmill.infer.scheduler import Part, Propose, Scheduler
from langmill.infer.slots import Slots
from langmill.text.tokenizer import Tokenizer

T = TypeVar("T")
CUT = "the text ends before what its constraint asks for is complete: it needs more tokens, or another stop text"


class Engine:
    """submit, then step until idle; every request ends in exactly one event with a `finish`.

    runner: for requests that write, None where there are none. tokenizer: for their text; None where ids are enough.
    embedder: for requests of kind "embed". pass_tokens, queue_tokens, worth: see `Scheduler`. propose: guesses what
    comes next, so that one pass may write several tokens; it changes no result. SettingsError where pass_tokens leaves
    no room for prompts.
    """

    def __init__(
        self,
        runner: Runner | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        embedder: Embedder | None = None,
        pass_tokens: int = 512,
        queue_tokens: int = 1 << 18,
        worth: int = 32,
        propose: Propose | None = None,
    ):
        slots = 0 if runner is None else runner.slots
        if pass_tokens <= slots:
            raise SettingsError(
                f"pass_tokens is {pass_tokens}: it must be above the number of slots, {slots}"
            )
        self.runner, self.tokenizer, self.embedder = runner, tokenizer, embedder
        self.slots = Slots(slots, 0 if runner is None else runner.length)
        self.scheduler = Scheduler(self.slots, self._copy, pass_tokens, queue_tokens, worth, propose)
        self.counts = self.scheduler.counts
        self._tokenizers = [tokenizer]  # the model's and each adapter's
        self._lives: dict[int, Live] = {}
        self._events: list[Event] = []  # of what happened between steps
        self._numbers = count(1)

    def adapt(self, adapter: Adapter) -> int:
        """Keep an adapter beside the model, for requests that name it; its number, from 1 on. ModelError where the
        runner keeps none."""
        if not isinstance(self.runner, AdaptedRunner):
            raise ModelError("what runs this model keeps no adapter beside it: merge it into the model")
        number = self.runner.adapt(adapter.changes)
        self._tokenizers.append(adapter.tokenizer)
        return number

    def submit(self, request: Request) -> int:
        """Take a request; its number. ModelError where the model cannot do it, such as a prompt longer than the window;
        UsageError where its parts do not fit together, or it names an adapter that is not there; QueueFull."""
        tokenizer = self._tokenizer_of(request)
        live = admitted(next(self._numbers), request, self.runner, self.embedder, tokenizer)
        self.scheduler.add(live)
        self._lives[live.number] = live
        return live.number

    def cancel(self, number: int) -> bool:
        """End a request now; False where there is none of this number any more. The next step tells of its end."""
        live = self._lives.get(number)
        if live is None:
            return False
        self._end(Event(number), "cancelled")
        return True

    def abort(self, reason: str) -> list[Event]:
        """End all requests with this error; nothing that slots hold is trusted afterwards."""
        for number in list(self._lives):
            self._end(Event(number), "error", reason)
        self.slots.forget()
        return self._told()

    @property
    def idle(self) -> bool:
        """Whether a step has nothing to do and nothing to tell."""
        return not self._lives and not self._events

    def accounting(self) -> dict[str, int]:
        """What is in use: all zeros when nothing is going on."""
        return {
            "requests": len(self._lives),
            "queued": len(self.scheduler.queue) + len(self.scheduler.texts),
            "queued_tokens": self.scheduler.waiting,
            "slots": int(self.slots.taken_S.sum()),
            "owners": sum(owner is not None for owner in self.scheduler.owners),
            "events": len(self._events),
        }

    def step(self) -> list[Event]:
        """One pass over the model, and what it did for whom. What it raises is no request's fault: `abort` then."""
        plan = self.scheduler.plan()
        for part in plan.sources:
            self._each([part], self._encode)
        for texts, vectors_KD in self._each(plan.texts, self._embed):
            for part, vector in zip(texts, vectors_KD, strict=True):
                self._end(Event(part.live.number, vector=vector), "stop")
        parts = [part for part in plan.parts if part.live.number in self._lives]
        for read, logits_WV in self._each(parts, self._run):
            self._write(read, logits_WV)
        return self._told()

    def _tokenizer_of(self, request: Request) -> Tokenizer | None:
        if not 0 <= request.adapter < len(self._tokenizers):
            raise UsageError(f"adapter is {request.adapter}, and this engine has {len(self._tokenizers) - 1}")
        if request.adapter and request.kind == "embed":
            raise UsageError("an adapter beside the model makes no vectors: merge it into the model for them")
        return self._tokenizers[request.adapter]

    def _told(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _each(self, parts: list[Part], call: Callable[[list[Part]], T]) -> list[tuple[list[Part], T]]:
        """`call` of all parts together. Where it raises, of each alone, so that only the culprits end with an error."""
        if not parts:
            return []
        try:
            return [(parts, call(parts))]
        except Exception as error:
            if len(parts) > 1:
                return [found for part in parts for found in self._each([part], call)]
            reason = f"the model failed on this request: {type(error).__name__}: {error}"
            self._end(Event(parts[0].live.number), "error", reason)
            return []

    def _run(self, parts: Sequence[Part]) -> Tensor:
        """Read the parts in one pass; the logits (W, V) that they want, in their order."""
        assert self.runner is not None
        slots_R, starts_R, sizes_R, wants_R = np.array(
            [(part.live.slot, part.start, part.size, part.tells + part.wants) for part in parts], np.int64
        ).T
        ends_R = sizes_R.cumsum()
        slots_N = slots_R.repeat(sizes_R)
        places_N = np.arange(ends_R[-1]) + (starts_R + sizes_R - ends_R).repeat(sizes_R)
        back_N = ends_R.repeat(sizes_R) - np.arange(ends_R[-1])  # 1 for a part's last token
        wanted_W = np.flatnonzero(back_N <= wants_R.repeat(sizes_R))
        self.counts["passes"] += 1
        self.counts["read"] += len(slots_N)
        tokens_N, adapters_N = self.slots.tokens_SL[slots_N, places_N], self.slots.adapters_S[slots_N]
        began = time.perf_counter()
        if adapters_N.any():
            assert isinstance(self.runner, AdaptedRunner)
            logits_WV = self.runner.run(tokens_N, slots_N, places_N, wanted_W, adapters_N)
        else:
            logits_WV = self.runner.run(tokens_N, slots_N, places_N, wanted_W)
        if self.scheduler.propose is not None:
            self.scheduler.propose.took(len(slots_N), time.perf_counter() - began)
        return logits_WV

    def _encode(self, parts: Sequence[Part]) -> None:
        assert isinstance(self.runner, SourceRunner)
        for live in (part.live for part in parts):
            self.runner.encode(live.slot, np.asarray(live.request.source, np.int64))
            self.counts["read"] += len(live.request.source or ())

    def _embed(self, parts: Sequence[Part]) -> Floats:
        assert self.embedder is not None
        self.counts["read"] += sum(part.size for part in parts)
        return self.embedder.embed([part.live.prompt for part in parts])

    def _write(self, parts: Sequence[Part], logits_WV: Tensor) -> None:
        """Give each part that wants scores its next token, and one more as long as what was guessed is what came."""
        going: list[tuple[Part, Event, int]] = []
        row = 0
        for part in parts:
            guesses = max(part.wants - 1, 0)
            self.slots.held_S[part.live.slot] = part.start + part.size - guesses
            if part.tells:
                tell(part.live, part.start, logits_WV[row : row + part.tells])
                row += part.tells
            if part.wants:
                going.append((part, Event(part.live.number, cached=part.live.cached or 0), row))
            row += part.wants
        while going:
            rows = [row for _, _, row in going]
            one = slice(rows[0], rows[0] + 1)  # a view: many rows are copied
            wanted_BV = (
                logits_WV if len(rows) == len(logits_WV) else logits_WV[one if len(rows) == 1 else rows]
            )
            picks = pick([part.live for part, _, _ in going], wanted_BV)
            going = [
                (part, event, row + 1)
                for (part, event, row), one in zip(going, picks, strict=True)
                if self._take(part, event, one)
            ]

    def _take(self, part: Part, event: Event, one: Pick) -> bool:
        """Write a token of a part; whether it was guessed, so that the scores behind it count too."""
        live, slots = part.live, self.slots
        if not live.written:
            event.prompt = live.told
        finish, reason = self._written(live, event, one)
        if finish is not None:
            self._end(event, finish, reason)
            return False
        known = slots.known_S[live.slot]
        guessed = len(event.ids) < part.wants and bool(slots.tokens_SL[live.slot, known] == one.id)
        slots.append(live.slot, one.id)
        if guessed:
            slots.held_S[live.slot] += 1
            self.counts["guessed right"] += 1
        else:
            event.text = live.writer.take(last=False) if live.writer else ""
            self._events.append(event)
        return guessed

    def _written(self, live: Live, event: Event, one: Pick) -> tuple[Finish | None, str | None]:
        """Add a token to what a request wrote; how it ends with it, and why if by an error."""
        if one.problem is not None:
            return "error", one.problem
        live.written.append(one.id)
        event.ids.append(one.id)
        self.counts["written"] += 1
        if one.likely is not None:
            event.likely.append(one.likely)
        if live.seen_V is not None:
            live.seen_V[one.id] = True
        if live.counts_V is not None:
            live.counts_V[one.id] += 1
        if one.id in live.stop_ids:
            return "stop", None
        ended = live.writer is not None and live.writer.ended(one.id)
        constraint, cut = live.request.constraint, None
        if constraint is not None:
            try:
                constraint.accept(one.id)
                ended = ended or constraint.done
                cut = None if constraint.whole else CUT
            except Exception as error:  # see pick.py
                return "error", f"the request's constraint failed: {type(error).__name__}: {error}"
        if ended:
            return "stop", cut
        return ("length", cut) if len(live.written) == live.limit else (None, None)

    def _end(self, event: Event, finish: Finish, reason: str | None = None) -> None:
        """The last event of a request, which leaves the engine."""
        live = self._lives.pop(event.request)
        self.scheduler.remove(live, keep=finish != "error")
        if live.writer is not None:
            event.text = live.writer.take(last=finish in ("stop", "length"))
        event.finish, event.reason = finish, reason
        event.cached = live.cached or 0
        self.counts[finish] += 1
        self._events.append(event)

    def _copy(self, source: int, target: int, length: int) -> None:
        assert self.runner is not None
        self.runner.copy(source, target, length)
