# SPDX-License-Identifier: Apache-2.0
"""Read-write locks, queues with a mutex, shared resources."""

from __future__ import annotations

import random

import pytest

from bottomhalf.aio import (
    AioContext,
    AioError,
    CoMutex,
    CoQueue,
    Coroutine,
    CoRwLock,
    SharedResource,
    WasCancelled,
    current,
    give_way,
    suspend,
)
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import drain, until


def test_upgrade(context: AioContext) -> None:
    """/locking/co-rwlock/upgrade, T58: it queues behind a waiting writer, so it is not atomic, and says so."""
    lock = CoRwLock()
    done: list[str] = []

    async def first() -> None:
        await lock.acquire_read()
        await suspend("the test")
        assert await lock.upgrade() is False
        lock.release()
        done.append("first")

    async def second() -> None:
        await lock.acquire_write()
        await suspend("the test")
        lock.release()
        done.append("second")

    one, two = context.enter(first()), context.enter(second())
    assert lock.statistics().waiters == 1
    context.enter(one)
    assert done == [] and lock._writer is two, "the upgrade goes behind the writer who waits"
    context.enter(two)
    assert done == ["second", "first"] and one.done and two.done
    assert lock.statistics().holders == 0


def test_upgrade_at_once(context: AioContext) -> None:
    """The only reader, whom nobody waits for, upgrades without giving the lock up."""
    lock = CoRwLock()

    async def body() -> None:
        async with lock.reading():
            assert await lock.upgrade() is True
            assert lock.holds(current())

    assert context.enter(body()).done and not lock.statistics().holders


def test_downgrade(context: AioContext) -> None:
    """/locking/co-rwlock/downgrade, T58: it does not wait, and lets in the readers who wait first."""
    lock = CoRwLock()
    done: list[int] = []

    async def first() -> None:
        await lock.acquire_read()
        await suspend("the test")
        lock.release()
        await suspend("the test")
        done.append(1)

    async def second() -> None:
        await lock.acquire_write()
        lock.downgrade()
        lock.release()
        done.append(2)

    async def third() -> None:
        await lock.acquire_read()
        lock.release()
        done.append(3)

    async def fourth() -> None:
        await lock.acquire_write()
        lock.release()
        done.append(4)

    coroutines = [context.enter(body()) for body in (first, second, third, fourth)]
    assert done == []
    context.enter(coroutines[0])
    assert sorted(done) == [2, 3, 4] and done[-1] == 4
    context.enter(coroutines[0])
    assert done[-1] == 1


def test_readers_do_not_overtake_writers(context: AioContext) -> None:
    lock = CoRwLock("the graph")
    order: list[str] = []

    async def read(name: str) -> None:
        async with lock.reading():
            order.append(name)
            await suspend("the test")

    async def write(name: str) -> None:
        async with lock.writing():
            order.append(name)

    a = context.enter(read("a"))
    context.enter(write("b"))
    c = context.enter(read("c"))
    assert order == ["a"] and c.waiting_for == "the graph" and lock.blockers() == (a,)
    context.enter(a)
    assert order == ["a", "b", "c"]
    context.enter(c)
    assert lock.statistics().holders == 0


def test_misuse(context: AioContext) -> None:
    lock = CoRwLock()

    async def body() -> None:
        with pytest.raises(AioError, match="does not hold"):
            lock.release()
        with pytest.raises(AioError, match="does not write"):
            lock.downgrade()
        with pytest.raises(AioError, match="does not share"):
            await lock.upgrade()
        async with lock.writing():
            with pytest.raises(AioError, match="already writes"):
                await lock.acquire_read()
            with pytest.raises(AioError, match="already holds"):
                await lock.acquire_write()
        async with lock.reading(), lock.reading():
            with pytest.raises(AioError, match="already holds"):
                await lock.acquire_write()
            with pytest.raises(AioError, match="exactly once"):
                await lock.upgrade()
        assert lock.statistics().holders == 0

    assert context.enter(body()).done


def test_cancelled_writer_lets_readers_in(context: AioContext) -> None:
    lock = CoRwLock()
    got: list[str] = []

    async def read(name: str) -> None:
        async with lock.reading():
            got.append(name)
            await suspend("the test")

    async def write() -> None:
        async with lock.writing():
            got.append("writer")

    first = context.enter(read("first"))
    writer, second = context.enter(write()), context.enter(read("second"))
    writer.cancel()
    assert writer.done and got == ["first", "second"]
    with pytest.raises(WasCancelled):
        writer.result()
    for reader in (first, second):
        context.enter(reader)
    assert lock.statistics() == type(lock.statistics())("a read-write lock", 0, 0)


def test_cancelled_upgrade_holds_nothing(context: AioContext) -> None:
    lock = CoRwLock()

    async def read() -> None:
        async with lock.reading():
            await suspend("the test")

    async def upgrade() -> None:
        async with lock.reading():
            await lock.upgrade()

    reader, upgrader = context.enter(read()), context.enter(upgrade())
    assert not upgrader.done
    upgrader.cancel()
    assert upgrader.done and lock.statistics().waiters == 0 and lock.statistics().holders == 1
    context.enter(reader)
    assert lock.statistics().holders == 0


def test_against_a_model(sim: SimHost) -> None:
    """Random readers, writers, upgrades, downgrades and cancellations: never a writer beside anybody, nobody lost."""
    context = AioContext(sim)
    chance = random.Random(sim.seed)
    lock = CoRwLock()
    inside: dict[Coroutine, str] = {}
    ended = 0

    def check() -> None:
        kinds = list(inside.values())
        assert "w" not in kinds or len(kinds) == 1, kinds

    async def body() -> None:
        nonlocal ended
        me = current()
        try:
            for _ in range(chance.randrange(1, 5)):
                if chance.random() < 0.3:
                    await lock.acquire_write()
                    inside[me] = "w"
                    check()
                    await give_way()
                    if chance.random() < 0.5:
                        lock.downgrade()
                        inside[me] = "r"
                        check()
                        await give_way()
                else:
                    await lock.acquire_read()
                    inside[me] = "r"
                    check()
                    await give_way()
                    if chance.random() < 0.3:
                        del inside[me]
                        await lock.upgrade()
                        inside[me] = "w"
                        check()
                        await give_way()
                inside.pop(me)
                lock.release()
        finally:
            assert inside.pop(me, None) is None
            ended += 1

    coroutines = [context.enter(body()) for _ in range(20)]
    while ended < 20:
        if chance.random() < 0.1:
            victim = chance.choice(coroutines)
            if victim in inside or victim.queued is not None:
                pass  # it holds the lock, and would take it away with it
            else:
                victim.cancel()
        context.poll(False)
    assert lock.statistics().holders == lock.statistics().waiters == 0
    context.close()


def test_queue_with_a_mutex(context: AioContext) -> None:
    """wait() gives the mutex up and holds it again afterwards, also when it is cancelled."""
    mutex, queue = CoMutex(), CoQueue("an announcement")
    seen: list[str] = []

    async def waiter(name: str) -> None:
        async with mutex:
            await queue.wait(mutex)
            assert mutex.holder is current()
            seen.append(name)

    first, second = context.enter(waiter("first")), context.enter(waiter("second"))
    assert not mutex.locked and len(queue) == 2
    first.cancel()
    assert first.done and not mutex.locked and len(queue) == 1

    async def announce() -> None:
        async with mutex:
            assert queue.wake_next() is True
            assert seen == []

    context.enter(announce())
    drain(context)
    assert seen == ["second"] and second.done and not mutex.locked


def test_queue_front(context: AioContext) -> None:
    """One that was woken too early waits at the front again."""
    queue = CoQueue("a slot")
    order: list[int] = []

    async def wait(n: int, front: bool) -> None:
        await queue.wait(front=front)
        order.append(n)

    for n, front in ((1, False), (2, False), (3, True)):
        context.enter(wait(n, front))
    while queue.wake_next():
        pass
    assert order == [3, 1, 2]


def test_lockable(context: AioContext) -> None:
    """/locking/co-mutex/lockable: what takes "a lock or none" takes None for none; no wrapper is needed."""
    queue = CoQueue("an announcement")
    mutex = CoMutex()

    async def wait(lock: CoMutex | None) -> None:
        await queue.wait(lock)

    without = context.enter(wait(None))
    assert queue.wake_next() and without.done

    async def holding() -> None:
        async with mutex:
            await wait(mutex)

    context.enter(holding())
    assert not mutex.locked and queue.wake_next() and not mutex.locked


def test_acquire_nowait(context: AioContext) -> None:
    mutex = CoMutex()

    async def body() -> bool:
        return mutex.acquire_nowait()

    assert context.enter(body()).result() is True and context.enter(body()).result() is False


def test_shared_resource(context: AioContext) -> None:
    """In order of arrival: one that wants much is not overtaken by those who want little."""
    resource = SharedResource(10, "bytes of buffers")
    got: list[int] = []

    async def take(count: int) -> None:
        await resource.take(count)
        got.append(count)

    for count in (6, 8, 2):
        context.enter(take(count))
    assert got == [6] and resource.available == 4 and not resource.take_nowait(1)
    resource.give(6)
    assert got == [6, 8, 2] and resource.available == 0
    with pytest.raises(AioError, match="11 of bytes of buffers wanted, there are never more than 10"):
        resource.take_nowait(11)
    with pytest.raises(AioError, match="10 were taken"):
        resource.give(11)
    resource.give(10)
    assert resource.statistics().holders == 0
    with pytest.raises(AioError, match="-1"):
        SharedResource(-1)


def test_shared_resource_cancelled(context: AioContext) -> None:
    """The large wish that others wait behind is given up: they get theirs."""
    resource = SharedResource(10)
    got: list[int] = []

    async def take(count: int) -> None:
        await resource.take(count)
        got.append(count)

    context.enter(take(6))
    large = context.enter(take(8))
    context.enter(take(2))
    assert got == [6]
    large.cancel()
    until(context, lambda: len(got) == 2)
    assert got == [6, 2] and large.done
