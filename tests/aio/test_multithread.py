# SPDX-License-Identifier: Apache-2.0
"""Several iothreads at work: QEMU's test-aio-multithread, bounded by counts. On the real host, where threads are
interrupted anywhere, and on the simulated one, where the seed interrupts them and a failure can be repeated."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from bottomhalf.aio import AioContext, CoMutex, Coroutine, IOThread, current, give_way, move_to, run_in, suspend
from bottomhalf.host.protocol import Host
from bottomhalf.host.threads import Lock
from tests.aio.helpers import until

THREADS = 5


def rounds_of(host: Host, many: int) -> int:
    """The simulated host needs few, for it has many seeds."""
    return many if host.name == "linux" else max(many // 50, 3)


def start(host: Host, count: int = THREADS) -> list[IOThread]:
    return [IOThread(f"io{n}", host, poll_max_ns=0) for n in range(count)]


def test_lifecycle(host: Host) -> None:
    """/aio/multi/lifecycle: five threads, a function in each, and an end."""
    main = AioContext(host)
    ids: list[int] = []
    threads = start(host)
    for thread in threads:
        assert not thread.context.is_home and thread.context.name == thread.name
        run_in(thread.context, lambda: ids.append(host.thread_id()))
    for thread in threads:
        thread.stop()
        thread.stop()
    assert len(set(ids)) == THREADS and host.thread_id() not in ids
    main.close()


def test_schedule(host: Host) -> None:
    """/aio/multi/schedule: coroutines in five threads take each other out of mailboxes and wake each other; none is
    scheduled twice, none is forgotten."""
    main = AioContext(host)
    threads = start(host)
    mailboxes: list[Coroutine | None] = [None] * THREADS
    guard = Lock()
    left = [rounds_of(host, 200)] * THREADS
    ended: list[int] = []

    def take(n: int) -> Coroutine | None:
        with guard:
            found, mailboxes[n] = mailboxes[n], None
            return found

    async def body(me: int) -> None:
        chance = random.Random(me)
        while left[me]:
            other = take(chance.randrange(THREADS))
            if other is not None:
                other.context.wake(other)
            mailboxes[me] = current()
            await suspend("my mailbox")
            assert mailboxes[me] is None
            left[me] -= 1
        ended.append(me)
        main.notify()

    def stir() -> None:
        """Everybody may sit in a mailbox: wake one."""
        for n in range(THREADS):
            sleeper = take(n)
            if sleeper is not None:
                sleeper.context.wake(sleeper)

    for n, thread in enumerate(threads):
        thread.context.enter(body(n))
    timer = main.timer(stir)
    while len(ended) < THREADS:
        timer.arm_ns(main.now_ns() + 50_000)
        main.poll(True)
    for thread in threads:
        thread.stop()
    assert mailboxes == [None] * THREADS and sorted(ended) == list(range(THREADS))
    main.close()


@pytest.mark.parametrize("count", [THREADS, 2], ids=["contended", "handoff"])
def test_mutex(host: Host, count: int) -> None:
    """/aio/multi/mutex/contended, /aio/multi/mutex/handoff, T57: plain counting under the lock stays exact."""
    main = AioContext(host)
    mutex = CoMutex()
    rounds = rounds_of(host, 500)
    counter = ended = 0

    async def body() -> None:
        nonlocal counter, ended
        for _ in range(rounds):
            async with mutex:
                before = counter
                host.thread_id()  # where the simulated host may let another thread run
                counter = before + 1
        async with mutex:
            ended += 1
        main.notify()

    threads = start(host, count)
    for thread in threads:
        thread.context.enter(body())
    until(main, lambda: ended == count)
    for thread in threads:
        thread.stop()
    assert counter == rounds * count and not mutex.locked and mutex.statistics().waiters == 0
    main.close()


class McsLock:
    """A queue lock: each waiter waits for a lock of its own, which the one before it opens."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._guard = Lock()  # stands for an atomic exchange
        self._tail: Any = None

    def acquire(self) -> Any:
        mine = self._host.lock()
        mine.acquire()
        with self._guard:
            before, self._tail = self._tail, mine
        if before is not None:
            before.acquire()
        return mine

    def release(self, mine: Any) -> None:
        with self._guard:
            if self._tail is mine:
                self._tail = None
                return
        mine.release()


def count_in_threads(host: Host, locked: Callable[[Callable[[], None]], None]) -> tuple[int, int]:
    """Five threads count under a lock; what they counted, and what they should have."""
    main = AioContext(host)
    counter = ended = 0
    rounds = rounds_of(host, 500)

    def add() -> None:
        nonlocal counter
        before = counter
        host.thread_id()
        counter = before + 1

    def work() -> None:
        nonlocal ended
        for _ in range(rounds):
            locked(add)
        locked(end)
        main.notify()

    def end() -> None:
        nonlocal ended
        ended += 1

    threads = start(host)
    for thread in threads:
        thread.context.schedule_oneshot(work)
    until(main, lambda: ended == THREADS)
    for thread in threads:
        thread.stop()
    main.close()
    return counter, rounds * THREADS


def test_mcs(host: Host) -> None:
    """/aio/multi/mutex/mcs: the harness, with a queue lock of threads."""
    lock = McsLock(host)

    def locked(work: Callable[[], None]) -> None:
        mine = lock.acquire()
        work()
        lock.release(mine)

    counted, expected = count_in_threads(host, locked)
    assert counted == expected


def test_pthread(host: Host) -> None:
    """/aio/multi/mutex/pthread: the harness, with an ordinary lock of threads."""
    lock = host.lock()

    def locked(work: Callable[[], None]) -> None:
        with lock:
            work()

    counted, expected = count_in_threads(host, locked)
    assert counted == expected


def test_the_harness_finds_a_missing_lock() -> None:
    """Without a lock some seed counts wrong: the tests above can fail."""
    from bottomhalf.host.sim import SimHost

    for seed in range(50):
        host = SimHost(seed)
        counted, expected = count_in_threads(host, lambda work: work())
        host.end_threads()
        if counted != expected:
            return
    raise AssertionError("no seed finds it")


def test_a_coroutine_moves(host: Host) -> None:
    """T51: through five threads, round and round; another thread never enters it before it has suspended."""
    main = AioContext(host)
    threads = start(host)
    rounds = rounds_of(host, 500)
    visited: list[int] = []

    async def tour() -> None:
        for n in range(rounds):
            await move_to(threads[n % THREADS].context)
            assert current().context.is_home
            visited.append(n)
            if n % 3 == 0:
                await give_way()
        await move_to(main)

    coroutine = main.enter(tour())
    until(main, lambda: coroutine.done)
    assert visited == list(range(rounds))
    for thread in threads:
        thread.stop()
    main.close()


def test_stop_while_others_schedule(host: Host) -> None:
    """What was scheduled before the stop runs; what comes from everywhere at the same time breaks nothing."""
    main = AioContext(host)
    for _ in range(rounds_of(host, 50)):
        target, *others = start(host, 3)
        ran: list[int] = []
        target.context.schedule_oneshot(lambda ran=ran: ran.append(0))
        for other in others:
            other.context.schedule_oneshot(partial(target.context.schedule_oneshot, partial(ran.append, 1)))
        for other in others:
            other.stop()
        target.stop()
        assert sorted(ran) == [0, 1, 1]
    main.close()


def test_kicks_are_not_lost(host: Host) -> None:
    """T15: a wait for what another thread counts down, kicked after each step."""
    from bottomhalf.aio import kick, wait_while

    main = AioContext(host)
    thread = start(host, 1)[0]
    for _ in range(rounds_of(host, 300)):
        left = 3

        def step() -> None:
            nonlocal left
            left -= 1
            kick()

        for _ in range(3):
            thread.context.schedule_oneshot(step)
        wait_while(thread.context, lambda: left, what="the count")  # noqa: B023
    thread.stop()
    main.close()
