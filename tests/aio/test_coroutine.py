# SPDX-License-Identifier: Apache-2.0
"""Coroutines: entering, suspending, waking, chaining, moving, failing, and every way to misuse them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from types import coroutine as awaitable
from typing import Any

import pytest

from bottomhalf.aio import (
    AioContext,
    AioError,
    Coroutine,
    IOThread,
    WrongContext,
    current,
    sleep_ns,
    suspend,
)
from bottomhalf.aio.coroutine import in_coroutine
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import drain, until


async def fails(error: BaseException) -> None:
    raise error


def test_lifecycle(context: AioContext) -> None:
    """/basic/lifecycle"""
    for n in range(2):
        done: list[int] = []

        async def body(done: list[int] = done, n: int = n) -> int:
            done.append(n)
            return n

        coroutine = context.enter(body())
        assert done == [n] and coroutine.done and coroutine.result() == n


def test_yield(context: AioContext) -> None:
    """/basic/yield: it suspends five times."""
    done = False

    async def body() -> None:
        nonlocal done
        for _ in range(5):
            await suspend("the test")
        done = True

    coroutine = context.enter(body())
    enters = 1
    while not done:
        assert coroutine.waiting_for == "the test" and "waits for the test" in repr(coroutine)
        context.enter(coroutine)
        enters += 1
    assert enters - 1 == 5 and "ended" in repr(coroutine)


def test_nesting(context: AioContext) -> None:
    """/basic/nesting: each enters the next, 128 deep; ours start when the enterer suspends or ends."""
    enters = returns = 0

    async def body(left: int) -> None:
        nonlocal enters, returns
        enters += 1
        if left:
            context.enter(body(left - 1))
        returns += 1

    context.enter(body(127))
    assert enters == returns == 128


def test_nested_awaits(context: AioContext) -> None:
    """The same with plain awaits, a suspension at the bottom, and results on the way up."""

    async def body(left: int) -> int:
        if left:
            return 1 + await body(left - 1)
        await suspend("the test")
        return 1

    coroutine = context.enter(body(127))
    context.enter(coroutine)
    assert coroutine.result() == 128


def test_self_and_in_coroutine(context: AioContext) -> None:
    """/basic/self, /basic/in_coroutine, /basic/entered"""
    assert not in_coroutine()
    seen: list[Coroutine] = []

    async def body() -> None:
        assert in_coroutine()
        seen.append(current())
        assert "running" in repr(current())
        await suspend("the test")
        assert current() is seen[0]

    coroutine = context.enter(body())
    assert seen == [coroutine] and not in_coroutine()
    context.enter(coroutine)
    assert coroutine.done and not in_coroutine()
    with pytest.raises(WrongContext):
        current()


def test_order(context: AioContext) -> None:
    """/basic/order"""
    trace: list[tuple[int, int]] = []

    async def body() -> None:
        trace.append((2, 1))
        await suspend("the test")
        trace.append((2, 2))

    trace.append((1, 1))
    coroutine = context.enter(body())
    trace.append((1, 2))
    context.enter(coroutine)
    trace.append((1, 3))
    assert trace == [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]


def test_queue_chaining(context: AioContext) -> None:
    """/aio/coroutine/queue-chaining, T52: two coroutines wake each other 25,000 times; the stack does not grow."""
    rounds = 25_000
    counts = [0, 0]
    coroutines: list[Coroutine] = []

    async def body(me: int) -> None:
        for _ in range(rounds):
            context.wake(coroutines[1 - me])
            await suspend("the other")
            counts[me] += 1

    async def first() -> None:
        await suspend("the test")
        await body(0)

    async def second() -> None:
        await suspend("the test")
        await body(1)

    coroutines += [context.enter(first()), context.enter(second())]
    context.enter(coroutines[0])
    assert counts == [rounds, rounds - 1]
    context.enter(coroutines[1])
    assert counts == [rounds, rounds] and all(coroutine.done for coroutine in coroutines)


def test_depth_first(context: AioContext) -> None:
    """A wakes B and C, B wakes D: after A come B, D, C."""
    order: list[str] = []

    async def body(name: str, *others: str) -> None:
        await suspend("the test")
        for other in others:
            context.wake(coroutines[other])
        order.append(name)

    wakes = {"A": ("B", "C"), "B": ("D",), "C": (), "D": ()}
    coroutines = {name: context.enter(body(name, *others)) for name, others in wakes.items()}
    context.enter(coroutines["A"])
    assert order == ["A", "B", "D", "C"]


def test_scheduled_in_order(context: AioContext) -> None:
    """T1: coroutines are entered first come, first served, on every host."""
    order: list[int] = []

    async def body(n: int) -> None:
        order.append(n)

    for n in range(10):
        context.schedule(body(n))
    assert order == []
    assert context.poll(True) is True
    assert order == list(range(10))
    assert context.poll(False) is False


@pytest.mark.parametrize("how", ["enter", "schedule"])
def test_from_a_worker_thread(how: str) -> None:
    """/aio/coroutine/worker-thread-co-enter: it runs at home."""
    context = AioContext(LinuxHost())
    ran_in: list[int] = []

    async def body() -> None:
        ran_in.append(threading.get_ident())

    thread = threading.Thread(target=lambda: getattr(context, how)(body()))
    thread.start()
    thread.join()
    assert ran_in == []
    assert context.poll(True) is True and ran_in == [threading.get_ident()]
    assert context.poll(False) is False
    context.close()


def test_wake_by_another_thread_before_the_suspension(sim: SimHost) -> None:
    """Who registers himself and then suspends may be woken in between; the loop enters him afterwards."""
    context = AioContext(sim)

    async def body() -> str:
        me = current()
        with sim.as_thread(2):
            me.context.wake(me)
        await suspend("the other thread")
        return "woken"

    coroutine = context.enter(body())
    assert not coroutine.done
    assert context.poll(True) is True and coroutine.result() == "woken"
    context.close()


# Awaiting coroutines


def test_await_a_coroutine(context: AioContext) -> None:
    async def child(n: int) -> int:
        await suspend("the test")
        return n

    children = [context.enter(child(n)) for n in range(3)]

    async def parent() -> list[int]:
        return [await one for one in children]

    parents = [context.enter(parent()) for _ in range(2)]
    assert parents[0].waiting_for is not None and "end of" in parents[0].waiting_for
    for one in reversed(children):
        context.enter(one)
    assert [one.result() for one in parents] == [[0, 1, 2]] * 2


def test_await_failures(context: AioContext) -> None:
    """The exception goes to all who await, to those who come later too, and then to nobody else."""

    async def child() -> None:
        await suspend("the test")
        raise ValueError("child")

    async def parent() -> str:
        try:
            await failing
        except ValueError as error:
            return str(error)
        return "nothing"

    failing = context.enter(child())
    parents = [context.enter(parent()) for _ in range(3)]
    context.enter(failing)
    parents.append(context.enter(parent()))
    assert [one.result() for one in parents] == ["child"] * 4
    for _ in range(2):
        with pytest.raises(ValueError, match="child"):
            failing.result()
    drain(context)


def test_awaiting_misuse(context: AioContext) -> None:
    mine: list[Coroutine] = []

    async def waits_for_itself() -> None:
        mine.append(current())
        await suspend("the test")
        await mine[0]

    coroutine = context.enter(waits_for_itself())
    with pytest.raises(AioError, match="has not ended"):
        coroutine.result()
    with pytest.raises(AioError, match="awaits itself"):
        context.enter(coroutine)

    other = context.enter(fails_later())
    with pytest.raises(WrongContext):
        other.__await__().send(None)


async def fails_later() -> None:
    await suspend("the test")
    raise ValueError("later")


def test_end_in_another_thread() -> None:
    """Awaiting a coroutine of another thread: whether it ends before, while or after one looks."""
    host = LinuxHost()
    context = AioContext(host)
    thread = IOThread("io0", host, poll_max_ns=0)

    async def child(n: int) -> int:
        if n % 2:
            await sleep_ns(n * 100)
        return n

    async def parent() -> int:
        total = 0
        for n in range(300):
            total += await thread.context.enter(child(n))
        return total

    assert context.run(parent()) == sum(range(300))
    thread.stop()
    context.close()


# Misuse


def test_scheduled_twice(context: AioContext) -> None:
    """T50: named with who was first."""
    ran: list[int] = []

    async def body() -> None:
        ran.append(1)

    coroutine = context.schedule(body())
    for again in (context.schedule, context.enter, context.wake):
        with pytest.raises(AioError, match=r"body not started> cannot be .*: it is scheduled in main"):
            again(coroutine)
    assert context.poll(True) is True and ran == [1]
    for again in (context.schedule, context.enter, context.wake):
        with pytest.raises(AioError, match="it has ended"):
            again(coroutine)
    assert context.poll(False) is False


def test_woken_twice(context: AioContext) -> None:
    async def body() -> None:
        await suspend("the test")

    async def wakes_twice() -> None:
        context.wake(coroutine)
        context.wake(coroutine)

    coroutine = context.enter(body())
    with pytest.raises(AioError, match=r"cannot be entered by .*wakes_twice: .*wakes_twice has woken it"):
        context.enter(wakes_twice())
    assert coroutine.done


def test_enters_itself(context: AioContext) -> None:
    async def body() -> None:
        context.enter(current())

    with pytest.raises(AioError, match="enters itself"):
        context.enter(body())


def test_entered_while_asleep(context: AioContext) -> None:
    """T50: only the timer may end a sleep; who else tries is told, and the sleep goes on."""

    async def body() -> int:
        await sleep_ns(1_000_000)
        return context.now_ns()

    start_ns = context.now_ns()
    coroutine = context.enter(body())
    for way in (context.enter, context.wake, context.schedule):
        with pytest.raises(AioError, match="it sleeps"):
            way(coroutine)
    until(context, lambda: coroutine.done)
    assert coroutine.result() >= start_ns + 1_000_000


def test_entered_twice_as_a_body(context: AioContext) -> None:
    """What was entered once is continued through the Coroutine, not through the async def's call."""

    async def body() -> None:
        await suspend("the test")

    raw = body()
    coroutine = context.enter(raw)
    for way in (context.enter, context.schedule):
        with pytest.raises(AioError, match="give the Coroutine that enter"):
            way(raw)
    context.enter(coroutine)
    assert coroutine.done


@pytest.mark.parametrize("wrong", [None, 5, test_enters_itself])
def test_not_a_coroutine(context: AioContext, wrong: Any) -> None:
    for way in (context.enter, context.schedule):
        with pytest.raises(AioError, match="calling an async def"):
            way(wrong)


@awaitable
def _foreign(what: Any) -> Generator[Any, None, None]:
    yield what


@pytest.mark.parametrize("what", [None, 5, object()])
def test_foreign_awaitables(context: AioContext, what: Any) -> None:
    """Nobody would ever wake it: it learns that at once, and may go on."""
    survived: list[str] = []

    async def body() -> None:
        try:
            await _foreign(what)
        except AioError:
            survived.append("yes")
            raise

    with pytest.raises(AioError, match="not the event core's"):
        context.enter(body())
    assert survived == ["yes"]

    async def asleep() -> None:
        await asyncio.sleep(0)

    with pytest.raises(AioError, match="asyncio"):
        context.enter(asleep())


def test_no_poll_inside(context: AioContext) -> None:
    """T53: a coroutine that polls could never be woken by what it polls for."""

    async def body() -> None:
        context.poll(False)

    with pytest.raises(WrongContext, match="await instead"):
        context.enter(body())


# Moving


def test_moves_between_contexts(sim: SimHost) -> None:
    """T51: it is handed over only when it has suspended, however quick the other thread is."""
    here = AioContext(sim, "here")
    with sim.as_thread(2):
        there = AioContext(sim, "there", is_main=False)
    where: list[str] = []

    async def body() -> None:
        me = current()
        there.schedule(me)
        with sim.as_thread(2):
            there.poll_max_ns = 0  # it is not there yet: its loop finds nothing
            assert not there._scheduled
        await suspend("a move")
        where.append(me.context.name)

    coroutine = here.enter(body())
    with pytest.raises(AioError, match="scheduled in there"):
        here.wake(coroutine)
    assert here.poll(True) is True and not coroutine.done
    with sim.as_thread(2):
        assert there.poll(True) is True
    assert coroutine.done and where == ["there"]
    here.close()
    with sim.as_thread(2):
        there.close()


def test_ping_pong_between_threads() -> None:
    """T51, with real threads, both on the way there and back; T54: the thread's facts are the right ones."""
    host = LinuxHost()
    main = AioContext(host)
    threads = [IOThread(f"io{n}", host, poll_max_ns=0) for n in range(2)]
    rounds = 1000
    homes: list[int] = []
    done: list[int] = []

    async def body() -> None:
        me = current()
        for n in range(rounds):
            context = threads[n % 2].context
            context.schedule(me)
            await suspend("a move")
            assert me.context is context and context.is_home and current() is me
            homes.append(threading.get_ident())
        main.schedule(me)
        await suspend("the way home")
        done.append(1)

    main.enter(body())
    until(main, lambda: done)
    for thread in threads:
        thread.stop()
    assert len(homes) == rounds and set(homes[::2]).isdisjoint(homes[1::2])
    main.close()
