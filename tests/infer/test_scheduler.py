"""Slots and the scheduler by themselves: what is shared, what a pass reads, who must wait or go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_engine import request
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import QueueFull
from langmill.infer.request import Live
from langmill.infer.scheduler import Pass, Scheduler
from langmill.infer.slots import Slots, Taken

LENGTH = 40


def ids(*tokens: int) -> np.ndarray[Any, Any]:
    return np.array(tokens, np.int64)


def read(slots: Slots, prompt: np.ndarray[Any, Any], worth: int = 1) -> Taken:
    """A request that reads its prompt and leaves."""
    taken = slots.take(prompt, worth)
    slots.held_S[taken.slot] = slots.known_S[taken.slot]
    slots.release(taken.slot, keep=True)
    return taken


def test_a_free_slot_goes_on_from_what_it_holds() -> None:
    slots = Slots(2, LENGTH)
    assert read(slots, ids(1, 2, 3)) == Taken(0, 0, None)
    assert read(slots, ids(9, 8, 7)) == Taken(1, 0, None)
    assert read(slots, ids(1, 2, 3, 4, 5)) == Taken(0, 3, None)
    assert read(slots, ids(1, 2, 3, 4, 5)) == Taken(
        0, 4, None
    )  # the last is read again: its scores are needed


def test_a_used_slot_is_copied_from() -> None:
    slots = Slots(2, LENGTH)
    busy = slots.take(ids(1, 2, 3, 4), 1)
    slots.held_S[busy.slot] = 3  # the fourth is not read yet
    assert slots.take(ids(1, 2, 3, 4, 5), 1) == Taken(1, 3, busy.slot)
    assert not slots.free


def test_the_least_recently_used_slot_is_given() -> None:
    slots = Slots(3, LENGTH)
    for first in (10, 20, 30):
        read(slots, ids(first, 1, 2))
    read(slots, ids(10, 1, 2, 3))
    assert read(slots, ids(40, 1)).slot == 1
    assert read(slots, ids(50, 1)).slot == 2
    assert read(slots, ids(60, 1)).slot == 0


def test_a_shared_beginning_is_copied_rather_than_a_longer_past_forgotten() -> None:
    slots = Slots(3, LENGTH)
    read(slots, ids(*range(10), 20, 21, 22))
    assert read(slots, ids(*range(10), 30, 31)) == Taken(1, 10, 0)
    assert int(slots.held_S[0]) == 13
    # less than it is worth is neither copied nor a reason to give another slot than the oldest
    assert slots.take(ids(0, 1, 50), 8) == Taken(2, 0, None)


def test_what_stood_in_a_slot_before_is_not_expected_there() -> None:
    slots = Slots(1, LENGTH)
    read(slots, ids(1, 2, 3, 4))
    slots.take(ids(1, 2), 1)
    assert slots.common(ids(1, 2, 3, 4)).tolist() == [2]


def test_what_depends_on_more_than_ids_is_not_shared() -> None:
    slots = Slots(2, LENGTH)
    private = slots.take(ids(1, 2, 3), 1, private=True)
    slots.held_S[private.slot] = 3
    assert slots.take(ids(1, 2, 3, 4), 1) == Taken(1, 0, None)
    slots.release(private.slot, keep=True)
    assert slots.held_S.tolist() == [0, 0]
    assert slots.take(ids(1, 2, 3, 4), 1) == Taken(0, 0, None)


PROMPT = st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(0, 1))


@given(st.lists(PROMPT, min_size=1, max_size=20), st.integers(1, 4))
def test_what_is_kept_is_what_the_prompt_begins_with(
    prompts: list[tuple[list[int], int]], count: int
) -> None:
    """Of what the same adapter has read."""
    slots, held = Slots(count, LENGTH), [([], 0) for _ in range(count)]  # type: ignore[var-annotated]
    for prompt, adapter in prompts:
        longest = max(
            sum(1 for _ in iter_common(tokens, prompt[:-1])) * (reader == adapter) for tokens, reader in held
        )
        slot, kept, source = slots.take(ids(*prompt), 1, adapter=adapter)
        tokens, reader = held[slot if source is None else source]
        assert tokens[:kept] == prompt[:kept] and kept == longest and (reader == adapter or not kept)
        held[slot] = prompt, adapter
        slots.held_S[slot] = len(prompt)
        slots.release(slot, keep=True)


def iter_common(first: list[int], second: list[int]) -> Any:
    for a, b in zip(first, second, strict=False):
        if a != b:
            return
        yield a


class Table:
    """A scheduler whose passes are taken to have been read, one token written by each that wanted scores."""

    def __init__(self, slots: int = 2, **given: int):
        chosen = {"pass_tokens": 8, "queue_tokens": 100, "worth": 4} | given
        self.copies: list[tuple[int, ...]] = []
        self.slots, self.count = Slots(slots, LENGTH), 0
        self.scheduler = Scheduler(self.slots, lambda *copy: self.copies.append(copy), **chosen)

    def add(self, *prompt: int, **given: Any) -> Live:
        self.count += 1
        live = Live(self.count, request(prompt, **given), ids(*prompt), limit=10)
        live.encoded = live.request.source is None
        self.scheduler.add(live)
        return live

    def step(self) -> Pass:
        made = self.scheduler.plan()
        for live, start, size, wants, _ in made.parts:
            self.slots.held_S[live.slot] = start + size
            if wants:
                live.written.append(1)
                self.slots.append(live.slot, 1)
        for part in made.texts:
            self.scheduler.remove(part.live)
        return made

    def read(self) -> list[tuple[int, int, int, int]]:
        return [(part.live.number, *part[1:4]) for part in self.step().parts]


def test_the_next_tokens_go_first_and_prompts_in_pieces() -> None:
    table = Table()
    table.add(*range(10, 13))
    assert table.read() == [(1, 0, 3, 1)]
    table.add(*range(20, 40))
    assert table.read() == [(1, 3, 1, 1), (2, 0, 7, 0)]
    assert table.read() == [(1, 4, 1, 1), (2, 7, 7, 0)]
    assert table.read() == [(1, 5, 1, 1), (2, 14, 6, 1)]
    assert table.read() == [(1, 6, 1, 1), (2, 20, 1, 1)]


def test_a_request_joins_as_soon_as_a_slot_is_free() -> None:
    table = Table()
    first, _, third = table.add(1, 2), table.add(3, 4), table.add(5, 6)
    assert [row[0] for row in table.read()] == [1, 2]
    assert third.slot == -1 and table.scheduler.waiting == 2
    table.scheduler.remove(first)
    assert [row[0] for row in table.read()] == [2, 3]
    assert table.scheduler.waiting == 0


def test_a_beginning_that_others_share_is_read_once() -> None:
    table = Table(slots=3)
    shared = tuple(range(10, 22))
    for last in (1, 2, 3):
        table.add(*shared, last)
    assert table.read() == [(1, 0, 8, 0)]  # the others wait for it
    assert table.read() == [(1, 8, 5, 1)]
    assert table.read() == [(1, 13, 1, 1), (2, 12, 1, 1), (3, 12, 1, 1)]
    assert table.copies == [(0, 1, 12), (1, 2, 12)]


def test_nobody_waits_for_less_important_ones() -> None:
    table = Table(slots=3)
    shared = tuple(range(10, 22))
    table.add(*shared, 1)
    table.step()
    table.add(*shared, 2, priority=1)
    assert table.read() == [(2, 8, 5, 1), (1, 8, 3, 0)]
    assert table.copies == [(0, 1, 8)]


def test_important_requests_go_first_and_take_the_youngest_of_the_least_important() -> None:
    table = Table()
    old, young, same = table.add(1, 2), table.add(3, 4), table.add(5, 6)
    table.step()
    urgent = table.add(7, 8, priority=2)
    assert [row[0] for row in table.read()] == [1, 4]
    assert (young.slot, same.slot) == (-1, -1) and old.slot >= 0
    table.scheduler.remove(urgent)
    assert table.read() == [(1, 3, 1, 1), (2, 0, 3, 1)]  # before the third, with what it had written
    assert table.scheduler.counts["preempted"] == 1


def test_too_much_that_waits_is_refused_with_both_numbers() -> None:
    table = Table(slots=1, queue_tokens=10)
    table.add(*range(6))
    with pytest.raises(QueueFull, match="5 tokens cannot wait beside the 6 .* at most 10"):
        table.add(*range(5))
    table.step()
    table.add(*range(5))
    waits = table.add(*range(5))
    table.scheduler.remove(waits)
    table.add(*range(5))


def test_texts_and_sources_are_read_whole() -> None:
    table = Table()
    table.add(1, 2)
    table.step()
    for size in (4, 4, 12, 3):
        table.add(*range(size), kind="embed")
    table.add(9, source=range(5))
    made = [table.step() for _ in range(4)]
    texts = [[part.size for part in one.texts] for one in made]
    # seven tokens are left beside the first request's; a longer text goes alone
    assert texts == [[4], [4], [12], [3]]
    assert [[part.size for part in one.sources] for one in made] == [[], [], [], []]
    last = table.step()
    assert [part.size for part in last.sources] == [5] and [p.live.number for p in last.parts] == [1, 6]


def test_guesses_take_what_room_is_left() -> None:
    table = Table()
    table.scheduler.propose = lambda slots, tokens: [[int(own[-1])] * 9 for own in tokens]
    table.add(1, 2)
    assert table.read() == [(1, 0, 2 + 6, 1 + 6)]
    assert table.slots.tokens_SL[0, 3:8].tolist() == [2] * 5
    assert table.scheduler.counts["guessed"] == 6
