# SPDX-License-Identifier: Apache-2.0
"""The thread pool on the simulated host: the seed decides which worker runs when, and time is virtual."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

from bottomhalf.aio import AioContext, IOThread, sleep_ns, wait_while
from bottomhalf.aio.thread_pool import IDLE_NS, QUEUED, RUNNING, PoolRequest
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import until


class Gate:
    """Work that waits for the test."""

    def __init__(self, host: SimHost) -> None:
        self._lock = host.lock()
        self._lock.acquire()

    def __call__(self) -> str:
        with self._lock:
            return "through"

    def open(self) -> None:
        self._lock.release()


def test_submit(sim: SimHost) -> None:
    """/thread-pool/submit-no-complete, /thread-pool/submit-aio, /thread-pool/submit-co"""
    context = AioContext(sim)
    pool = context.thread_pool
    ran: list[str] = []
    told: list[PoolRequest] = []
    unattended = pool.submit(lambda: ran.append("unattended"))
    attended = pool.submit(lambda: ran.append("attended"), told.append)
    assert not told and not unattended.told

    async def body() -> Any:
        return await pool.call(lambda: ran.append("coroutine") or "result")

    coroutine = context.enter(body())
    until(context, lambda: pool.outstanding == 0)
    assert sorted(ran) == ["attended", "coroutine", "unattended"]
    assert told == [attended] and coroutine.result() == "result"
    context.close()


def test_submit_many(sim: SimHost) -> None:
    """/thread-pool/submit-many, with fewer threads, so that they are used again."""
    context = AioContext(sim)
    pool = context.thread_pool
    pool.set_limits(0, 3)
    ran: list[int] = []
    for n in range(20):
        pool.submit(lambda n=n: ran.append(n))
    until(context, lambda: pool.outstanding == 0)
    assert sorted(ran) == list(range(20)) and pool.statistics().threads <= 3
    context.close()


@pytest.mark.parametrize("how", ["sync", "async"])
def test_cancel(sim: SimHost, how: str) -> None:
    """/thread-pool/cancel, /thread-pool/cancel-async"""
    context = AioContext(sim)
    pool = context.thread_pool
    pool.set_limits(0, 2)
    gate = Gate(sim)
    told: list[PoolRequest] = []
    requests = [pool.submit(gate, told.append) for _ in range(6)]
    tick = context.timer(lambda: None)
    while sum(request.state is RUNNING for request in requests) < 2:
        tick.arm_ns(context.now_ns() + 1000)
        context.poll(True)
    waiting = [request for request in requests if request.state is QUEUED]
    assert [request.cancel() for request in requests].count(True) == len(waiting) == 4
    assert told == []
    if how == "sync":
        wait_while(context, lambda: not all(request.told for request in waiting), "the cancelled")
        assert len(told) == 4
    gate.open()
    until(context, lambda: len(told) == 6)
    for request in waiting:
        with pytest.raises(OSError) as failure:
            request.result()
        assert failure.value.errno == errno.ECANCELED
    context.close()


def test_idle_time_out_and_new_work(sim: SimHost) -> None:
    """T79: work comes around the moment at which an idle thread gives up waiting; somebody does it."""
    context = AioContext(sim)
    pool = context.thread_pool
    chance = random.Random(sim.seed)
    for _ in range(10):
        request = pool.submit(lambda: None)
        until(context, lambda: request.told)  # noqa: B023
        context.run(sleep_ns(IDLE_NS + chance.randrange(-2000, 2000)))
    context.run(sleep_ns(2 * IDLE_NS))
    assert pool.statistics().threads == 0, "virtual time has passed: all have left"
    context.close()


def test_limits_change_under_load(sim: SimHost) -> None:
    """T79: at random; no request is forgotten, none is done twice."""
    context = AioContext(sim)
    pool = context.thread_pool
    chance = random.Random(sim.seed)
    done: list[int] = []
    cancelled = 0
    for n in range(40):
        request = pool.submit(lambda n=n: done.append(n))
        if chance.random() < 0.3:
            least = chance.randrange(3)
            pool.set_limits(least, chance.randrange(max(least, 1), 5))
        if chance.random() < 0.1:
            cancelled += request.cancel()
        if chance.random() < 0.3:
            context.poll(False)
    until(context, lambda: pool.outstanding == 0)
    assert len(done) == len(set(done)) == 40 - cancelled
    context.close()


def test_in_iothreads(sim: SimHost) -> None:
    """Each context has a pool of its own, and is told in its own thread."""
    main = AioContext(sim)
    threads = [IOThread(f"io{n}", sim) for n in range(2)]
    told: list[tuple[str, bool]] = []

    def submit(thread: IOThread) -> None:
        context = thread.context
        context.thread_pool.submit(lambda: None, lambda _: (told.append((thread.name, context.is_home)), main.notify()))

    for thread in threads:
        thread.context.schedule_oneshot(lambda thread=thread: submit(thread))
    until(main, lambda: len(told) == 2)
    assert sorted(told) == [("io0", True), ("io1", True)]
    for thread in threads:
        thread.stop()
    main.close()


def test_same_seed_same_run(sim: SimHost) -> None:
    def run() -> list[int]:
        host = SimHost(sim.seed)
        context = AioContext(host)
        order: list[int] = []
        for n in range(10):
            context.thread_pool.submit(lambda n=n: order.append(n))
        until(context, lambda: context.thread_pool.outstanding == 0)
        context.close()
        return order

    assert run() == run()
