# SPDX-License-Identifier: Apache-2.0
"""A hang is a sentence: who waits for whom, from plain code down to what never comes."""

from __future__ import annotations

import gc

import pytest

from bottomhalf.aio import (
    AioContext,
    CoMutex,
    CoQueue,
    CoRwLock,
    SharedResource,
    current,
    explain,
    gather,
    give_way,
    sleep_ns,
    suspend,
    wait_while,
    waits,
)
from bottomhalf.aio.explain import CHAIN_MAX, SUSPENDED_MAX, chain, suspended
from bottomhalf.host.request import READ, Request
from bottomhalf.host.sim import Deadlock, SimHost

SECOND_NS = 1_000_000_000


@pytest.fixture(autouse=True)
def _nothing_of_others() -> None:
    """What earlier tests have thrown away half done is really gone."""
    gc.collect()


async def lost_reply() -> None:
    await suspend("a reply that never comes")


def test_chain_through_locks_and_coroutines(sim: SimHost) -> None:
    """Plain code, a coroutine, a lock, its holder, what he awaits."""
    context = AioContext(sim)
    mutex, rwlock = CoMutex("the tables of disk0"), CoRwLock("the graph")

    async def flush() -> None:
        async with mutex:
            await context.enter(lost_reply())

    async def grow() -> None:
        async with rwlock.writing(), mutex:
            pass

    async def mirror() -> None:
        async with rwlock.reading():
            pass

    context.enter(flush())
    context.enter(grow())
    with pytest.raises(Deadlock) as failure:
        context.run(mirror(), "the end of the mirror job")
    assert (
        "main waits for the end of the mirror job (0.0 s): coroutine mirror waits for the graph, held by coroutine "
        "grow, which waits for the tables of disk0, held by coroutine flush, which waits for the end of lost_reply, "
        "which waits for a reply that never comes"
    ) in str(failure.value).replace(f"{test_chain_through_locks_and_coroutines.__name__}.<locals>.", "")
    context.close()


def test_circle(sim: SimHost) -> None:
    context = AioContext(sim)
    one, two = CoMutex("one"), CoMutex("two")

    async def ab(first: CoMutex, second: CoMutex) -> None:
        async with first:
            await sleep_ns(1)
            async with second:
                pass

    context.enter(ab(one, two))
    with pytest.raises(Deadlock, match="wait for each other for ever"):
        context.run(ab(two, one))
    context.close()


def test_where_time_goes(sim: SimHost) -> None:
    """The sentence says for how long, and the others that wait are told too."""
    context = AioContext(sim)
    told: list[str] = []
    lost = context.enter(lost_reply())  # held, for one that nobody holds is gone at once
    context.timer(lambda: told.append(explain())).arm_ns(context.now_ns() + 2 * SECOND_NS)

    async def sleeper() -> None:
        await sleep_ns(3 * SECOND_NS)

    context.run(sleeper())
    assert told[0].splitlines() == [
        "main waits for test_where_time_goes.<locals>.sleeper (2.0 s): "
        "coroutine test_where_time_goes.<locals>.sleeper waits for the realtime clock",
        f"in main, coroutine {lost.name} waits for a reply that never comes",
    ]
    context.close()


def test_requests_are_named(sim: SimHost) -> None:
    sim.add_file("disk.raw", 4096)
    context = AioContext(sim)
    file = sim.open_file("disk.raw")
    fault = sim.fault(path="disk.raw", op=READ, hold=True)

    async def read() -> None:
        request = Request()
        request.op, request.offset, request.length = READ, 512, 1024
        request.buffer = memoryview(bytearray(1024))
        await context.engine.co_submit(file, request)

    with pytest.raises(Deadlock, match=r"waits for a read of 1024 bytes at 512 of disk\.raw"):
        context.run(read())
    fault.remove()
    while suspended():
        context.poll(True)
    file.close()
    context.close()


def test_everything_has_a_name(context: AioContext) -> None:
    """Each primitive that a coroutine can wait for says what it is, and counts."""
    queue, resource = CoQueue("an announcement"), SharedResource(1, "buffers")
    mutex, rwlock = CoMutex("a mutex"), CoRwLock("an rwlock")

    async def hold() -> None:
        await mutex.acquire()
        await rwlock.acquire_write()
        await resource.take(1)
        await suspend("the test")

    async def group() -> None:
        await gather(lost_reply(), lost_reply())

    holder = context.enter(hold())
    expected = {
        queue.wait: "an announcement",
        mutex.acquire: "a mutex",
        rwlock.acquire_read: "an rwlock",
        lambda: resource.take(1): "buffers",
        group: "2 coroutines",
    }
    for body, what in expected.items():
        coroutine = context.enter(body())
        assert coroutine.waiting_for == what and coroutine in suspended()
        if what in ("a mutex", "an rwlock"):
            assert f"held by coroutine {holder.name}" in chain(coroutine)
            assert coroutine.blockers()[0].statistics().waiters == 1  # type: ignore[attr-defined]
    assert "held by coroutine lost_reply and 1 more" in chain(coroutine) or "has not started" in chain(coroutine)
    assert explain().count("in main, coroutine") == 6
    for coroutine in suspended():
        coroutine.cancel()
    context.wake(holder)
    for _ in range(5):
        context.poll(False)
    for coroutine in suspended():
        if not coroutine.done:  # by the end of another
            context.wake(coroutine)


def test_what_was_waited_for_is_not_told(context: AioContext) -> None:
    """One that waited for a lock and has given way since waits for nothing; nor does one that is used again."""
    mutex = CoMutex("the tables")

    async def body() -> None:
        async with mutex:
            pass
        await give_way()
        await give_way()

    async def holder() -> None:
        async with mutex:
            await suspend("the test")

    holding = context.enter(holder())
    waiting = context.enter(body())
    assert "the tables" in chain(waiting)
    context.wake(holding)
    assert chain(waiting).endswith("is about to go on") and waiting.blockers() == ()
    assert "about to go on" in repr(waiting)
    for _ in range(3):
        context.poll(False)
    assert waiting.done


def test_nothing_waits(context: AioContext) -> None:
    assert waits() == () and suspended() == [] and explain() == "nothing waits"

    async def body() -> None:
        assert "is running" in chain(current())

    context.enter(body())
    assert chain(context.schedule(body())).endswith("has not started")
    context.poll(False)


def test_long_chains_and_crowds_are_bounded(context: AioContext) -> None:
    async def link(n: int) -> None:
        if n:
            await context.enter(link(n - 1))
        else:
            await suspend("the test")

    last = context.enter(link(200))
    while not any(found.waiting_for == "the test" for found in suspended()):
        context.poll(False)
    assert chain(last).count("waits for") == CHAIN_MAX
    text = explain()
    assert len(text.splitlines()) == SUSPENDED_MAX + 1 and text.endswith(f"{201 - SUSPENDED_MAX} more coroutines wait")
    for coroutine in suspended():
        if coroutine.waiting_for == "the test":
            context.wake(coroutine)
    assert suspended() == []


def test_the_2014_deadlock_in_a_sentence(sim: SimHost) -> None:
    """A wait of plain code inside a wait: both are told, the inner one last."""
    context = AioContext(sim)
    lines: list[str] = []

    def command() -> None:
        try:
            wait_while(context, lambda: True, "the second request")
        finally:
            lines.extend(explain().splitlines())

    context.schedule_oneshot(command)
    with pytest.raises(Deadlock):
        wait_while(context, lambda: True, "the first request")
    assert lines[0].startswith("main waits for the first request")
    context.close()
