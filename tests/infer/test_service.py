"""The engine behind asyncio: streams, cancelling by leaving, closing, and failures that leave nobody waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from fake_engine import LENGTH, RAISES, ZERO, Fake, alone, request

from langmill.common.errors import LangmillError, ModelError, UsageError
from langmill.infer.engine import Engine
from langmill.infer.request import Request
from langmill.infer.service import Service

SHORT = [request([n], max_new_tokens=4 + n, temperature=n % 2) for n in range(8)]
LONG = request([1, 2], max_new_tokens=30, stop_ids=frozenset())


class Gate(Fake):
    """A runner that runs a pass only when it is told to, so that tests meet requests half way."""

    def __init__(self) -> None:
        super().__init__()
        self.passes_left, self.broken = threading.Semaphore(0), False

    def run(self, *given: Any) -> Any:
        assert self.passes_left.acquire(timeout=60)
        return super().run(*given)


async def ids_of(service: Service, one: Request) -> tuple[list[int], str | None]:
    ids, finish = [], None
    async for event in service.generate(one):
        assert finish is None
        ids += event.ids
        finish = event.finish
    return ids, finish


def with_service(
    use: Callable[[Service, Any], Coroutine[Any, Any, None]], runner: Any = None, close: bool = True
) -> Service:
    """Run `use` with a service; nothing is left of it afterwards."""

    async def run() -> Service:
        over = runner or Fake()
        service = Service(Engine(over, pass_tokens=8))
        await use(service, over)
        if close:
            await service.close()
        return service

    service = asyncio.run(asyncio.wait_for(run(), 60))
    assert service.accounting() == ZERO and not service._streams and not service._thread.is_alive()
    return service


def test_streams_side_by_side_are_those_of_each_alone() -> None:
    async def use(service: Service, runner: Any) -> None:
        found = await asyncio.gather(*(ids_of(service, one) for one in SHORT))
        assert found == [alone(one) for one in SHORT]

    with_service(use)


def test_leaving_a_stream_cancels_its_request() -> None:
    async def use(service: Service, runner: Gate) -> None:
        runner.passes_left.release(2)
        events = service.generate(LONG)
        assert (await anext(events)).ids == alone(LONG)[0][:1]
        await events.aclose()
        runner.passes_left.release(100)
        assert await ids_of(service, SHORT[1]) == alone(SHORT[1])
        assert len(runner.passes) < 20 and service._engine.counts["cancelled"] == 1

    with_service(use, Gate())


def test_a_cancelled_task_cancels_its_request() -> None:
    async def use(service: Service, runner: Gate) -> None:
        task = asyncio.create_task(ids_of(service, LONG))
        runner.passes_left.release(1)
        while not runner.passes:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        runner.passes_left.release(100)
        assert await ids_of(service, SHORT[2]) == alone(SHORT[2])
        assert service._engine.counts["cancelled"] == 1

    with_service(use, Gate())


def test_what_is_refused_is_raised_where_it_was_asked() -> None:
    async def use(service: Service, runner: Any) -> None:
        with pytest.raises(ModelError, match=f"there is room for {LENGTH}"):
            await ids_of(service, request([1] * (LENGTH + 1)))
        with pytest.raises(LangmillError, match="ValueError"):
            await ids_of(service, request("no ids"))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="no tokenizer"):
            await ids_of(service, request([1], stop=("x",)))
        assert await ids_of(service, request([RAISES])) == ([], "error")
        assert await ids_of(service, SHORT[0]) == alone(SHORT[0])

    with_service(use)


def test_closing_lets_requests_end_or_cancels_them() -> None:
    async def drained(service: Service, runner: Gate) -> None:
        task = asyncio.create_task(ids_of(service, LONG))
        await asyncio.sleep(0)
        runner.passes_left.release(100)
        await service.close()
        assert await task == alone(LONG)
        with pytest.raises(UsageError, match="closed"):
            await ids_of(service, LONG)

    async def dropped(service: Service, runner: Gate) -> None:
        tasks = [asyncio.create_task(ids_of(service, LONG)) for _ in range(5)]
        runner.passes_left.release(3)
        while len(runner.passes) < 3:
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(service.close(drain=False))
        await asyncio.sleep(0)
        runner.passes_left.release(1)  # the one that had begun
        await closing
        assert {finish for _, finish in await asyncio.gather(*tasks)} == {"cancelled"}

    for use in (drained, dropped):
        with_service(use, Gate(), close=False)


def test_a_failing_engine_leaves_nobody_waiting_and_goes_on() -> None:
    async def use(service: Service, runner: Any) -> None:
        step = service._engine.step

        def broken() -> Any:
            service._engine.step = step  # type: ignore[method-assign]
            raise RuntimeError("a wheel came off")

        service._engine.step = broken  # type: ignore[method-assign]
        events = [event async for event in service.generate(LONG)]
        assert [event.finish for event in events] == ["error"] and "a wheel came off" in str(events[0].reason)
        assert await ids_of(service, LONG) == alone(LONG)

    with_service(use)


def test_a_loop_that_is_gone_holds_nothing_up() -> None:
    runner = Gate()
    service = Service(Engine(runner, pass_tokens=8))

    async def abandon() -> Any:
        events = service.generate(LONG)
        runner.passes_left.release(1)
        await anext(events)
        return events

    loop = asyncio.new_event_loop()
    events = loop.run_until_complete(abandon())
    loop.close()
    runner.passes_left.release(100)
    assert asyncio.run(ids_of(service, SHORT[3])) == alone(SHORT[3])
    asyncio.run(service.close())
    assert service.accounting() == ZERO and len(runner.passes) < 20
    del events
