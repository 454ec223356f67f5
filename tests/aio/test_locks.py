# SPDX-License-Identifier: Apache-2.0
"""Locks of coroutines: in order of arrival, within a context and between threads."""

from __future__ import annotations

import pytest

from bottomhalf.aio import AioContext, AioError, CoMutex, CoQueue, WrongContext, current, suspend
from tests.aio.helpers import drain


def test_mutex(context: AioContext) -> None:
    """/locking/co-mutex: the waiter takes over as soon as the holder has ended."""
    mutex = CoMutex()
    count = 0
    inside = False

    async def body() -> None:
        nonlocal count, inside
        async with mutex:
            assert not inside and mutex.locked
            inside = True
            await suspend("the test")
            inside = False
        count += 1

    first = context.enter(body())
    second = context.enter(body())
    assert mutex.locked and count == 0 and second.waiting_for == "a lock"
    context.enter(first)
    assert count == 1 and mutex.locked and inside
    context.enter(second)
    assert count == 2 and not mutex.locked


def test_mutex_is_fair(context: AioContext) -> None:
    """Who comes first is served first, and who gives up the lock and wants it again goes to the end."""
    mutex = CoMutex("the metadata lock")
    order: list[str] = []
    gates = []

    async def body(name: str) -> None:
        for _ in range(2):
            async with mutex:
                order.append(name)
                gates.append(current())
                await suspend("the test")

    for name in "abc":
        context.enter(body(name))
    while gates:
        context.enter(gates.pop(0))
    assert order == list("abcabc") and not mutex.locked


def test_mutex_misuse(context: AioContext) -> None:
    mutex = CoMutex("the table lock")

    async def twice() -> None:
        async with mutex:
            await mutex.acquire()

    with pytest.raises(AioError, match="already holds the table lock"):
        context.enter(twice())
    assert not mutex.locked

    async def not_held() -> None:
        mutex.release()

    with pytest.raises(AioError, match="does not hold the table lock"):
        context.enter(not_held())
    with pytest.raises(WrongContext):
        mutex.release()


def test_mutex_and_exceptions(context: AioContext) -> None:
    mutex = CoMutex()
    ran: list[int] = []

    async def fails() -> None:
        async with mutex:
            await suspend("the test")
            raise ValueError

    async def waits() -> None:
        async with mutex:
            ran.append(1)

    first = context.enter(fails())
    context.enter(waits())
    with pytest.raises(ValueError):
        context.enter(first)
    assert ran == [1] and not mutex.locked


def test_woken_without_the_lock(context: AioContext) -> None:
    """T59: a wake-up by somebody else than the holder is found out."""
    mutex = CoMutex()

    async def body() -> None:
        async with mutex:
            await suspend("the test")

    first = context.enter(body())
    second = context.enter(body())
    with pytest.raises(AssertionError, match="did not hand the lock over"):
        context.enter(second)
    del first, second


def test_queue(context: AioContext) -> None:
    queue = CoQueue("a slot")
    ran: list[str] = []

    async def body(name: str) -> None:
        await queue.wait()
        ran.append(name)
        await queue.wait()
        ran.append(name + "2")

    coroutines = [context.enter(body(name)) for name in "abc"]
    assert len(queue) == 3 and coroutines[0].waiting_for == "a slot"
    assert queue.wake_next() is True
    assert ran == ["a"]
    queue.wake_all()  # who waits again in turn is not woken again
    assert ran == ["a", "b", "c", "a2"] and len(queue) == 2
    queue.wake_all()
    assert ran == ["a", "b", "c", "a2", "b2", "c2"]
    assert queue.wake_next() is False


def test_queue_woken_by_a_coroutine(context: AioContext) -> None:
    """The woken ones run when the waker suspends or ends."""
    queue = CoQueue("news")
    ran: list[str] = []

    async def waits(name: str) -> None:
        await queue.wait()
        ran.append(name)

    async def wakes() -> None:
        queue.wake_all()
        ran.append("waker")

    for name in "ab":
        context.enter(waits(name))
    context.enter(wakes())
    assert ran == ["waker", "a", "b"]
    drain(context)


def test_queue_survives_exceptions(context: AioContext) -> None:
    """One of those woken fails: the others run, the waker goes on, and the exception goes out of the poll."""
    queue = CoQueue("news")
    ran: list[int] = []

    async def waits(n: int) -> None:
        await queue.wait()
        if n == 1:
            raise ValueError(n)
        ran.append(n)

    for n in range(3):
        context.enter(waits(n))
    queue.wake_all()
    assert ran == [0, 2]
    with pytest.raises(ValueError):
        context.poll(True)
    assert context.poll(False) is False
