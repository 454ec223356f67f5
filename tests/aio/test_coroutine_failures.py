# SPDX-License-Identifier: Apache-2.0
"""Coroutines that fail: to whom the exception goes, and that nobody else loses by it. Running one to its end."""

from __future__ import annotations

import gc

import pytest

from bottomhalf.aio import AioContext, WrongContext, sleep_ns, suspend
from bottomhalf.aio.coroutine import RUNNERS_IDLE_MAX, _idle_runners
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import drain, until


async def fails(error: BaseException) -> None:
    raise error


async def fails_later() -> None:
    await suspend("the test")
    raise ValueError("later")


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


def test_exception_at_the_end(host: Host) -> None:
    """No poll comes any more: it goes out of close()."""
    context = AioContext(host)
    context.wake(context.enter(fails_later()))
    with pytest.raises(ValueError, match="later"):
        context.close()
    context.close()


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
