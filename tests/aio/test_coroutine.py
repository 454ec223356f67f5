# SPDX-License-Identifier: Apache-2.0
"""Coroutines: entering, suspending, waking, chaining, moving, failing, and every way to misuse them."""

from __future__ import annotations

import asyncio
import gc
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
from bottomhalf.aio.coroutine import RUNNERS_IDLE_MAX, _idle_runners, in_coroutine
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


# Failing


def test_exception_of_an_entered_one(context: AioContext) -> None:
    with pytest.raises(ValueError, match="mine"):
        context.enter(fails(ValueError("mine")))
    coroutine = context.enter(fails_later())
    with pytest.raises(ValueError, match="later"):
        context.enter(coroutine)
    with pytest.raises(ValueError, match="later"):
        coroutine.result()
    drain(context)


@pytest.mark.parametrize("handled", [False, True])
def test_exceptions_of_scheduled_ones(context: AioContext, handled: bool) -> None:
    """Those behind are entered nevertheless."""
    told: list[str] = []
    if handled:
        context.exception_handler = lambda _context, error, where: told.append(f"{where}: {error}")
    ran: list[int] = []

    async def body(n: int) -> None:
        ran.append(n)
        if n % 2:
            raise ValueError(n)

    for n in range(6):
        context.schedule(body(n))
    raised = 0
    while len(ran) < 6:
        try:
            context.poll(True)
        except ValueError:
            raised += 1
    drain(context)
    assert ran == list(range(6)) and raised == (0 if handled else 3)
    assert told == ([f"coroutine {body.__qualname__}: {n}" for n in (1, 3, 5)] if handled else [])


@pytest.mark.parametrize("handled", [False, True])
def test_exception_of_a_woken_one(context: AioContext, handled: bool) -> None:
    """The waker is not interrupted: the exception goes to the handler, or out of the poll in which it happened."""
    told: list[str] = []
    if handled:
        context.exception_handler = lambda _context, error, where: told.append(str(error))
    coroutine = context.enter(fails_later())
    went_on: list[int] = []

    def wake() -> None:
        context.wake(coroutine)
        went_on.append(1)

    context.schedule_oneshot(wake)
    if handled:
        assert context.poll(True) is True
    else:
        with pytest.raises(ValueError, match="later"):
            context.poll(True)
    assert went_on == [1] and told == (["later"] if handled else [])
    assert context.poll(False) is False


def test_exception_of_one_woken_outside(context: AioContext) -> None:
    """Outside of any poll, too; the next poll does not sleep on it."""
    for count in (1, 2):
        for _ in range(count):
            context.wake(context.enter(fails_later()))
        for _ in range(count):
            with pytest.raises(ValueError, match="later"):
                context.poll(True)
    assert context.poll(False) is False


def test_exception_handler_that_raises(context: AioContext) -> None:
    """What it raises goes out of the poll, not into the waker."""

    def handler(*_: object) -> None:
        raise KeyError("handler")

    context.exception_handler = handler
    context.wake(context.enter(fails_later()))
    with pytest.raises(KeyError, match="handler"):
        context.poll(True)
    assert context.poll(False) is False


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("guilty", ["waker", "woken"])
def test_exceptions_lose_no_wakeups(context: AioContext, kind: type[BaseException], guilty: str) -> None:
    """A coroutine wakes three others, and it, or one of them, fails: the others run."""
    ran: list[str] = []

    async def woken(name: str) -> None:
        await suspend("the test")
        ran.append(name)
        if guilty == name:
            raise kind(name)

    async def waker() -> None:
        for coroutine in coroutines:
            context.wake(coroutine)
        if guilty == "waker":
            raise kind("waker")

    coroutines = [context.enter(woken(name)) for name in ("a", "woken", "c")]
    try:
        context.enter(waker())
        assert guilty == "woken" and kind is ValueError  # then it is the poll's
    except kind:
        pass
    for _ in range(3):
        try:
            context.poll(False)
        except kind as error:
            assert error.args == ("woken",)
    assert sorted(ran) == ["a", "c", "woken"] and all(one.done for one in coroutines)
    assert context.poll(False) is False


def test_interrupts_of_scheduled_ones(context: AioContext) -> None:
    """KeyboardInterrupt goes straight out; the others stay scheduled."""
    ran: list[int] = []

    async def body(n: int) -> None:
        ran.append(n)
        if n == 0:
            raise KeyboardInterrupt

    for n in range(3):
        context.schedule(body(n))
    with pytest.raises(KeyboardInterrupt):
        context.poll(True)
    context.poll(True)
    assert ran == [0, 1, 2]


def test_exception_loses_no_runner(context: AioContext) -> None:
    """After exceptions and results of all kinds coroutines still get the right results."""

    async def body(n: int) -> tuple[int] | str:
        if n % 3 == 0:
            raise ValueError(n)
        await suspend("x")
        return (n,) if n % 3 == 1 else "a string"

    for _ in range(2):
        started = []
        for n in range(2 * RUNNERS_IDLE_MAX):
            try:
                started.append((n, context.enter(body(n))))
            except ValueError:
                assert n % 3 == 0
        for n, coroutine in started:
            context.enter(coroutine)
            assert coroutine.result() == ((n,) if n % 3 == 1 else "a string")
    assert 0 < len(_idle_runners) <= RUNNERS_IDLE_MAX


def test_thrown_away_half_done(context: AioContext) -> None:
    """A coroutine that nobody remembers is closed, with its finally clauses, as Python does it."""
    closed: list[int] = []

    async def body() -> None:
        try:
            await suspend("what never comes")
        finally:
            closed.append(1)

    context.enter(body())
    gc.collect()
    assert closed == [1]


def test_results_are_not_kept(context: AioContext) -> None:
    """An idle runner keeps nothing of the coroutine that it has served alive."""

    class Big:
        alive = 0

        def __init__(self) -> None:
            Big.alive += 1

        def __del__(self) -> None:
            Big.alive -= 1

    async def body() -> Big:
        return Big()

    coroutine = context.enter(body())
    assert Big.alive == 1
    del coroutine
    gc.collect()
    assert Big.alive == 0


# run()


def test_run(context: AioContext) -> None:
    async def body(error: Exception | None) -> int:
        await sleep_ns(1000)
        if error is not None:
            raise error
        return 5

    assert context.run(body(None)) == 5
    with pytest.raises(KeyError):
        context.run(body(KeyError()))
    with pytest.raises(ValueError):
        context.run(fails(ValueError()))
    assert context.run(body(None)) == 5


def test_run_interrupted(context: AioContext) -> None:
    with pytest.raises(KeyboardInterrupt):
        context.run(fails(KeyboardInterrupt()))
    drain(context)


def test_run_and_the_exceptions_of_others(context: AioContext) -> None:
    """They go out of the poll and so out of run(); the coroutine goes on in later polls."""
    ran: list[int] = []

    async def body() -> None:
        await sleep_ns(100_000)
        ran.append(1)

    context.schedule_oneshot(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        context.run(body())
    until(context, lambda: ran)


def test_run_where_it_cannot(sim: SimHost) -> None:
    """In a coroutine or another thread: nothing of the body runs, now or later."""
    context = AioContext(sim)
    ran: list[int] = []

    async def body() -> None:
        ran.append(1)

    async def runs() -> None:
        context.run(body())

    with pytest.raises(WrongContext, match="await it"):
        context.enter(runs())
    with sim.as_thread(2), pytest.raises(WrongContext, match="another thread"):
        context.run(body())
    drain(context)
    assert ran == []
    context.close()


def test_sleep(sim: SimHost) -> None:
    context = AioContext(sim)
    start_ns = context.now_ns()

    async def body(ns: int) -> int:
        await sleep_ns(ns)
        return context.now_ns() - start_ns

    async def many() -> list[int]:
        sleepers = [context.enter(body(ns)) for ns in (5000, 0, 3000)]
        return [await one for one in sleepers]

    assert context.run(many()) == [5000, 0, 3000]
    assert context.timeout_ns() == -1
    context.close()


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
