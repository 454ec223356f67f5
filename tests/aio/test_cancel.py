# SPDX-License-Identifier: Apache-2.0
"""Cancellation that a driver survives; several coroutines together; time limits."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bottomhalf.aio import (
    AioContext,
    AioError,
    Cancelled,
    CoMutex,
    CoQueue,
    Sleep,
    TimedOut,
    WasCancelled,
    cancel_after,
    current,
    gather,
    give_up_after,
    give_way,
    shielded,
    sleep_ns,
    suspend,
)
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import drain, until

SECOND_NS = 1_000_000_000


async def _never() -> None:
    await suspend("what never comes")


def test_a_sleeper_ends_at_once(context: AioContext) -> None:
    cleaned: list[str] = []

    async def body() -> None:
        try:
            await sleep_ns(1000 * SECOND_NS)
        except Exception:
            cleaned.append("an Exception, which survivors of failures would swallow")
        finally:
            cleaned.append("finally")

    sleeper = context.enter(body())
    sleeper.cancel()
    assert sleeper.done and cleaned == ["finally"] and context.timeout_ns() == -1
    with pytest.raises(WasCancelled, match="body was cancelled"):
        sleeper.result()
    sleeper.cancel()  # nothing happens
    assert context.poll(False) is False


def test_what_cannot_be_taken_back_is_waited_for(context: AioContext) -> None:
    """A device has the buffer: the coroutine goes on to the next wait that can be given up."""
    steps: list[str] = []

    async def write() -> None:
        await suspend("a write")  # a string says nothing of taking back
        steps.append("written")
        await give_way()
        steps.append("gave way")
        await sleep_ns(0)
        steps.append("slept")

    writer = context.enter(write())
    writer.cancel()
    assert not writer.done and writer.cancelling and steps == []
    context.wake(writer)
    until(context, lambda: writer.done)
    assert steps == ["written", "gave way"]


def test_shielded(context: AioContext) -> None:
    """The request waits for the end of the outermost section, and cleaning up may wait again."""
    steps: list[str] = []

    async def body() -> None:
        try:
            with shielded(), shielded():
                await sleep_ns(1000)
                steps.append("table written")
            steps.append("section left")
            await sleep_ns(1000)
            steps.append("not reached")
        finally:
            await sleep_ns(1000)
            steps.append("cleaned up")

    coroutine = context.enter(body())
    coroutine.cancel()
    coroutine.cancel()
    until(context, lambda: coroutine.done)
    assert steps == ["table written", "section left", "cleaned up"]


def test_not_started_yet(context: AioContext) -> None:
    """It starts, so that it can clean up what it was given, and ends at its first wait."""
    steps: list[str] = []

    async def body() -> None:
        try:
            steps.append("started")
            await sleep_ns(SECOND_NS)
            steps.append("not reached")
        finally:
            steps.append("cleaned up")

    coroutine = context.schedule(body())
    coroutine.cancel()
    assert steps == []
    drain(context)
    assert coroutine.done and steps == ["started", "cleaned up"]
    with pytest.raises(WasCancelled):
        coroutine.result()


def test_cancels_itself(context: AioContext) -> None:
    steps: list[int] = []

    async def body() -> None:
        current().cancel()
        steps.append(1)
        await sleep_ns(SECOND_NS)
        steps.append(2)

    assert context.enter(body()).done and steps == [1]


def test_swallowed(context: AioContext) -> None:
    """A request is one exception; who swallows it goes on."""

    async def body() -> str:
        try:
            await sleep_ns(SECOND_NS)
        except Cancelled:
            await sleep_ns(1)
        return "went on"

    coroutine = context.enter(body())
    coroutine.cancel()
    until(context, lambda: coroutine.done)
    assert coroutine.result() == "went on"


def test_waiters_learn_of_it(context: AioContext) -> None:
    """Those who await it get an ordinary error, not their own cancellation."""

    async def waiter() -> str:
        try:
            await child
        except WasCancelled as error:
            return str(error)
        return "nothing"

    async def sleeper() -> None:
        await sleep_ns(SECOND_NS)

    child = context.enter(sleeper())
    waiting = context.enter(waiter())
    child.cancel()
    assert "sleeper was cancelled" in waiting.result()


def test_the_waiter_leaves_the_awaited_alone(context: AioContext) -> None:
    async def waiter() -> None:
        await child

    child = context.enter(_never())
    waiting, other = context.enter(waiter()), context.enter(waiter())
    waiting.cancel()
    assert waiting.done and not child.done and not other.done
    context.wake(child)
    assert child.done and other.done


def test_lock_is_handed_on(context: AioContext) -> None:
    """A waiter leaves the queue; one that was handed the lock in the same moment holds it and gives it up."""
    mutex = CoMutex()
    got: list[int] = []

    async def body(n: int) -> None:
        async with mutex:
            got.append(n)
            await sleep_ns(1000)

    coroutines = [context.enter(body(n)) for n in range(4)]
    coroutines[1].cancel()
    coroutines[3].cancel()
    until(context, lambda: all(coroutine.done for coroutine in coroutines))
    assert got == [0, 2] and not mutex.locked


def test_handed_over_and_cancelled(context: AioContext) -> None:
    mutex = CoMutex()

    async def holder() -> None:
        async with mutex:
            await suspend("the test")
        second.cancel()  # which has just been handed the lock
        assert mutex.holder is second

    async def waiter() -> None:
        async with mutex:
            await sleep_ns(SECOND_NS)

    first, second = context.enter(holder()), context.enter(waiter())
    context.wake(first)
    drain(context)
    assert second.done and not mutex.locked


def test_from_another_thread(sim: SimHost) -> None:
    context = AioContext(sim)

    async def body() -> None:
        await sleep_ns(SECOND_NS)

    coroutine = context.enter(body())
    with sim.as_thread(2):
        coroutine.cancel()
    assert not coroutine.done
    drain(context)
    assert coroutine.done and context.timeout_ns() == -1
    context.close()


def test_early_wake_of_a_sleep(context: AioContext) -> None:
    """qemu_co_sleep_wake: ends a sleep, does nothing when nobody sleeps."""
    sleep = Sleep()
    woken: list[bool] = []

    async def body() -> None:
        await sleep.for_ns(1000 * SECOND_NS)
        woken.append(True)

    sleep.wake()
    context.enter(body())
    assert sleep.asleep and "realtime" in sleep.what
    sleep.wake()
    sleep.wake()
    assert woken == [True] and not sleep.asleep and context.timeout_ns() == -1


# -- several together -----------------------------------------------------------------------------------------------


def test_gather(context: AioContext) -> None:
    async def after(turns: int) -> int:
        for _ in range(turns):
            await give_way()
        return turns

    assert context.run(gather(after(3), after(0), after(1))) == [3, 0, 1]
    assert context.run(gather()) == []


def test_gather_limit(context: AioContext) -> None:
    running = most = 0

    async def body(n: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await give_way()
        running -= 1
        return n

    assert context.run(gather(*(body(n) for n in range(20)), limit=3)) == list(range(20))
    assert most == 3
    with pytest.raises(AioError, match="0 at a time"):
        context.run(gather(body(1), limit=0))


def test_gather_leaves_nothing_behind(context: AioContext) -> None:
    """The first failure cancels the others; it is raised when they have ended, writes on their way included."""
    ended: list[str] = []
    writer = None

    async def write() -> None:
        nonlocal writer
        writer = current()
        try:
            await suspend("a write")
        finally:
            ended.append("write")

    async def sleep() -> None:
        try:
            await sleep_ns(1000 * SECOND_NS)
        finally:
            ended.append("sleep")

    async def fail() -> None:
        await give_way()
        raise ValueError("first")

    async def parent() -> None:
        with pytest.raises(ValueError, match="first"):
            await gather(write(), sleep(), fail(), _never(), limit=3)
        ended.append("gather")

    entered = context.enter(parent())
    drain(context)
    assert ended == ["sleep"] and not entered.done
    assert writer is not None
    context.wake(writer)
    drain(context)
    assert ended == ["sleep", "write", "gather"] and entered.done


def test_gather_cancelled(context: AioContext) -> None:
    ended: list[int] = []

    async def child(n: int) -> None:
        try:
            await sleep_ns(1000 * SECOND_NS)
        finally:
            ended.append(n)

    async def parent() -> None:
        await gather(child(1), child(2))

    entered = context.enter(parent())
    context.poll(False)
    entered.cancel()
    drain(context)
    assert sorted(ended) == [1, 2] and entered.done
    with pytest.raises(WasCancelled):
        entered.result()


def test_gather_of_one_that_is_cancelled(context: AioContext) -> None:
    """Somebody cancels a child: for the parent that is a failure, not its own end."""
    children = []

    async def child() -> None:
        children.append(current())
        await sleep_ns(1000 * SECOND_NS)

    async def parent() -> str:
        try:
            await gather(child(), child())
        except WasCancelled:
            return "a child was cancelled"
        return "nothing"

    entered = context.enter(parent())
    context.poll(False)
    children[0].cancel()
    drain(context)
    assert entered.result() == "a child was cancelled" and all(one.done for one in children)


# -- time limits ----------------------------------------------------------------------------------------------------


def test_give_up_after(sim: SimHost) -> None:
    """T60: it goes on; ``clean`` is called when it ends, once, and in no other case."""
    context = AioContext(sim)
    cleaned: list[int] = []

    async def slow(duration_ns: int) -> str:
        await sleep_ns(duration_ns)
        return "done"

    async def body(duration_ns: int) -> str:
        return str(await give_up_after(slow(duration_ns), SECOND_NS, lambda: cleaned.append(context.now_ns())))

    assert context.run(body(SECOND_NS // 2)) == "done" and cleaned == []
    start_ns = context.now_ns()
    with pytest.raises(TimedOut, match="slow took longer than 1000000000 ns; it goes on"):
        context.run(body(3 * SECOND_NS))
    assert context.now_ns() == start_ns + SECOND_NS and cleaned == []
    context.run(sleep_ns(5 * SECOND_NS))
    assert cleaned == [start_ns + 3 * SECOND_NS]

    async def unlimited() -> str:
        return str(await give_up_after(slow(10), 0))

    assert context.run(unlimited()) == "done"
    context.close()


def test_exact_tie(sim: SimHost) -> None:
    """T60: both at the same instant: either is right, nothing is told twice, nothing is left."""
    context = AioContext(sim)
    cleaned: list[int] = []

    async def slow() -> str:
        await sleep_ns(SECOND_NS)
        return "done"

    async def body() -> str:
        try:
            return str(await give_up_after(slow(), SECOND_NS, lambda: cleaned.append(1)))
        except TimedOut:
            return "too late"

    result = context.run(body())
    drain(context)
    assert (result, len(cleaned)) in (("done", 0), ("too late", 1))
    assert context.timeout_ns() == -1
    context.close()


def test_failures_of_what_is_limited(context: AioContext) -> None:
    async def fail() -> None:
        await give_way()
        raise ValueError("mine")

    for limited in (give_up_after, cancel_after):
        with pytest.raises(ValueError, match="mine"):
            context.run(limited(fail(), SECOND_NS))


@pytest.mark.parametrize("limited", [give_up_after, cancel_after])
def test_a_failure_in_time_is_told_once(sim: SimHost, limited: Any) -> None:
    """To the caller, and not out of the loop as well."""
    context = AioContext(sim)

    async def fail() -> None:
        await sleep_ns(SECOND_NS // 2)
        raise ValueError("mine")

    async def body() -> str:
        try:
            await limited(fail(), SECOND_NS)
        except ValueError as error:
            return str(error)
        return "nothing"

    caller = context.enter(body())
    context.run(sleep_ns(2 * SECOND_NS))
    assert caller.result() == "mine"
    context.close()


def test_what_cleaning_up_raises_is_heard(sim: SimHost) -> None:
    context = AioContext(sim)

    def clean() -> None:
        raise ValueError("not clean")

    with pytest.raises(TimedOut):
        context.run(give_up_after(sleep_ns(2 * SECOND_NS), SECOND_NS, clean))
    with pytest.raises(ValueError, match="not clean"):
        context.run(sleep_ns(2 * SECOND_NS))
    context.close()


def test_cancel_after(sim: SimHost) -> None:
    context = AioContext(sim)
    queue = CoQueue("an announcement")
    ended: list[int] = []

    async def body() -> None:
        try:
            await queue.wait()
        finally:
            ended.append(context.now_ns())

    start_ns = context.now_ns()
    with pytest.raises(TimedOut, match="body took longer"):
        context.run(cancel_after(body(), SECOND_NS))
    assert ended == [start_ns + SECOND_NS] and len(queue) == 0

    async def stubborn() -> str:
        with shielded():
            await sleep_ns(2 * SECOND_NS)
        return "done all the same"

    assert context.run(cancel_after(stubborn(), SECOND_NS)) == "done all the same"
    context.close()


def test_cancelled_while_limited(context: AioContext) -> None:
    """cancel_after() passes it on, give_up_after() leaves the other behind."""
    ended: list[str] = []

    async def sleep(name: str) -> None:
        try:
            await sleep_ns(1000 * SECOND_NS)
        finally:
            ended.append(name)

    passed_on = context.enter(cancel_after(sleep("passed on"), SECOND_NS))
    left = context.enter(give_up_after(sleep("left behind"), SECOND_NS, lambda: ended.append("cleaned")))
    context.poll(False)
    for coroutine in (passed_on, left):
        coroutine.cancel()
    drain(context)
    assert ended == ["passed on"] and passed_on.done and left.done


def test_at_random(sim: SimHost) -> None:
    """Coroutines that sleep, lock, queue and gather, cancelled at random: all end, all locks are free."""
    context = AioContext(sim)
    chance = random.Random(sim.seed)
    mutex, queue = CoMutex(), CoQueue("an announcement")
    inside = 0

    async def body(depth: int) -> None:
        nonlocal inside
        for _ in range(chance.randrange(4)):
            what = chance.randrange(6)
            if what == 0:
                await sleep_ns(chance.randrange(1000))
            elif what == 1:
                await give_way()
            elif what == 2 and chance.random() < 0.5:
                await queue.wait()
            elif what == 3:
                async with mutex:
                    inside += 1
                    assert inside == 1
                    try:
                        await sleep_ns(chance.randrange(100))
                    finally:
                        inside -= 1
            elif what == 4 and depth < 2:
                try:
                    await gather(*(body(depth + 1) for _ in range(3)), limit=2)
                except WasCancelled:
                    pass
            elif what == 5 and depth < 2:
                try:
                    await cancel_after(body(depth + 1), chance.randrange(1, 500))
                except (TimedOut, WasCancelled):
                    pass

    coroutines = [context.enter(body(0)) for _ in range(10)]
    while not all(coroutine.done for coroutine in coroutines):
        if chance.random() < 0.2:
            chance.choice(coroutines).cancel()
        if chance.random() < 0.3:
            queue.wake_next()
        context.timer(lambda: None).arm_ns(context.now_ns() + 100)
        context.poll(True)
    while queue.wake_next():
        pass
    drain(context)
    assert not mutex.locked and inside == 0
    context.close()
