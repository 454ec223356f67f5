# SPDX-License-Identifier: Apache-2.0
"""The thread pool: work in threads, owners told at home, cancellation of what was not begun, limits.

Work waits for gates that the test opens, never for time."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator

import pytest

from bottomhalf.aio import AioContext, AioError, WasCancelled, WrongContext, wait_while
from bottomhalf.aio.thread_pool import DONE, QUEUED, RUNNING, THREADS_MAX, PoolRequest, ThreadPool
from bottomhalf.host.linux import LinuxHost
from tests.aio.helpers import drain, until


@pytest.fixture
def context() -> Iterator[AioContext]:
    made = AioContext(LinuxHost())
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if "worker" in thread.name]


@pytest.fixture
def pool(context: AioContext) -> ThreadPool:
    return context.thread_pool


def spin(condition: Callable[[], object]) -> None:
    """Until another thread has done what nobody is told of."""
    while not condition():
        pass


class Work:
    """QEMU's fixture: counts, and says what it found."""

    def __init__(self) -> None:
        self.count = 0
        self.active = 0
        self._guard = threading.Lock()
        self.results: list[object] = []

    def __call__(self) -> int:
        with self._guard:
            self.count += 1
            return self.count - 1

    def done(self, request: PoolRequest) -> None:
        assert request.state is DONE
        self.active -= 1
        self.results.append(request.result())

    def submit(self, pool: ThreadPool) -> PoolRequest:
        self.active += 1
        return pool.submit(self, self.done)


class Gate:
    """Work that waits for the test, and tells it that it has begun."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.opened = threading.Event()

    def __call__(self) -> str:
        self.begun.release()
        assert self.opened.wait(60)
        return "through"


def test_submit_no_complete(context: AioContext, pool: ThreadPool) -> None:
    """/thread-pool/submit-no-complete: nobody wants to be told."""
    work = Work()
    request = pool.submit(work)
    until(context, lambda: request.told)
    assert work.count == 1 and request.result() == 0


def test_submit_aio(context: AioContext, pool: ThreadPool) -> None:
    """/thread-pool/submit-aio: the owner is told in a poll, never before."""
    work = Work()
    request = work.submit(pool)
    assert work.active == 1 and not request.told
    until(context, lambda: not work.active)
    assert work.count == 1 and work.results == [0]


def test_submit_co(context: AioContext, pool: ThreadPool) -> None:
    """/thread-pool/submit-co"""
    work = Work()

    async def body() -> object:
        result = await pool.call(work)
        assert work.count == 1
        return result

    coroutine = context.enter(body())
    assert not coroutine.done and "in a worker thread of main" in str(coroutine.waiting_for)
    until(context, lambda: coroutine.done)
    assert coroutine.result() == 0


def test_submit_many(context: AioContext, pool: ThreadPool) -> None:
    """/thread-pool/submit-many: more than there may be threads."""
    work = Work()
    for _ in range(100):
        work.submit(pool)
    until(context, lambda: not work.active)
    assert work.count == 100 and sorted(map(str, work.results)) == sorted(map(str, range(100)))
    statistics = pool.statistics()
    assert 1 <= statistics.threads <= THREADS_MAX and statistics.completed == 100
    assert statistics.queued == statistics.running == pool.outstanding == 0


@pytest.mark.parametrize("how", ["sync", "async"])
def test_cancel(context: AioContext, pool: ThreadPool, how: str) -> None:
    """/thread-pool/cancel, /thread-pool/cancel-async, T80: only what no thread has begun; it calls back too."""
    gate, told = Gate(), []
    requests = [pool.submit(gate, told.append) for _ in range(100)]
    for _ in range(THREADS_MAX):
        gate.begun.acquire()
    running = [request for request in requests if request.state is RUNNING]
    waiting = [request for request in requests if request.state is QUEUED]
    assert len(running) == THREADS_MAX and len(waiting) == 100 - THREADS_MAX
    assert [request.cancel() for request in waiting] == [True] * len(waiting)
    assert [request.cancel() for request in running] == [False] * len(running)
    assert told == [], "owners are told in a poll"
    if how == "sync":
        wait_while(context, lambda: not all(request.told for request in waiting), "the cancelled requests")
        assert not any(request.told for request in running)
    gate.opened.set()
    until(context, lambda: len(told) == 100)
    for request in waiting:
        assert request.cancel() is False
        with pytest.raises(OSError) as failure:
            request.result()
        assert failure.value.errno == errno.ECANCELED
    assert all(request.result() == "through" for request in running)


def test_cancelled_coroutine(context: AioContext, pool: ThreadPool) -> None:
    """Its call is never made if no thread has begun it; else it is waited for."""
    pool.set_limits(0, 1)
    gate, made = Gate(), []

    async def body(n: int) -> None:
        await pool.call(lambda: (gate(), made.append(n)))

    first, second = context.enter(body(1)), context.enter(body(2))
    gate.begun.acquire()
    for coroutine in (first, second):
        coroutine.cancel()
    assert second.done and not first.done
    gate.opened.set()
    until(context, lambda: first.done and pool.outstanding == 0)
    assert made == [1] and first.result() is None
    with pytest.raises(WasCancelled):
        second.result()


def test_first_waits_for_second(context: AioContext, pool: ThreadPool) -> None:
    """T71, T72: both have finished when the first owner is told, and he waits for the other in a nested poll."""
    told: list[str] = []
    finished = threading.Barrier(3)

    def first_told(_: PoolRequest) -> None:
        if not told:
            told.append("waits")
            wait_while(context, lambda: len(told) < 2, "the other request")
        told.append("told")

    for _ in range(2):
        pool.submit(finished.wait, first_told)
    finished.wait()
    spin(lambda: len(pool._done) == 2)
    until(context, lambda: len(told) == 3)
    assert told == ["waits", "told", "told"] and pool.outstanding == 0
    drain(context)
    assert not pool.completions.scheduled


def test_exceptions(context: AioContext, pool: ThreadPool) -> None:
    """Of the work: its owner's. Of an owner: it goes out of the poll, and the others are told all the same."""

    def fail() -> None:
        raise KeyError("work")

    async def body() -> None:
        with pytest.raises(KeyError, match="work"):
            await pool.call(fail)

    context.run(body())
    told: list[int] = []

    def owner(_: PoolRequest) -> None:
        told.append(1)
        raise ValueError("owner")

    for _ in range(3):
        pool.submit(lambda: None, owner)
    raised = 0
    while raised < 3:
        try:
            context.poll(True)
        except ValueError:
            raised += 1
    assert len(told) == 3 and pool.outstanding == 0


def test_misuse(context: AioContext, pool: ThreadPool) -> None:
    """T81: submitted, cancelled and told at home only; a coroutine that has moved is refused."""
    failures: list[BaseException] = []

    def elsewhere() -> None:
        for call in (lambda: pool.submit(lambda: None), lambda: pool.cancel(request)):
            try:
                call()
            except WrongContext as error:
                failures.append(error)

    gate = Gate()
    request = pool.submit(gate)
    with pytest.raises(AioError, match=r"is running|is queued"):
        request.result()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(failures) == 2
    with pytest.raises(AioError, match="1 requests of main are in worker threads"):
        pool.close()
    gate.opened.set()
    until(context, lambda: request.told)
    other = AioContext(context.host, "other")

    async def body() -> None:
        await pool.call(lambda: None)

    with pytest.raises(WrongContext, match="uses the worker threads of main"):
        other.enter(body())
    other.close()


@pytest.mark.parametrize(("least", "most"), [(-1, 4), (5, 4), (0, 0), (0, 100_000)])
def test_limits_are_checked(pool: ThreadPool, least: int, most: int) -> None:
    with pytest.raises(AioError, match="thread-pool-min"):
        pool.set_limits(least, most)


def test_limits(context: AioContext, pool: ThreadPool) -> None:
    """T79: shrunk under load, the threads above the maximum leave and nobody's work is forgotten; grown, there are
    more at once."""
    gate, told = Gate(), []
    for _ in range(8):
        pool.submit(gate, told.append)
    for _ in range(8):
        gate.begun.acquire()
    assert pool.statistics().threads == 8
    pool.set_limits(0, 2)
    waiting = [pool.submit(gate, told.append) for _ in range(4)]
    gate.opened.set()
    until(context, lambda: len(told) == 12)
    spin(lambda: pool.statistics().threads <= 2)
    last = pool.submit(gate, told.append)
    until(context, lambda: last.told)
    assert all(request.result() == "through" for request in waiting)
    pool.set_limits(5, 10)
    assert pool.statistics().threads == 5
    pool.set_limits(0, 1)
    spin(lambda: pool.statistics().threads <= 1)


def test_idle_threads_are_used_again(context: AioContext, pool: ThreadPool) -> None:
    for _ in range(10):
        request = pool.submit(threading.get_ident)
        until(context, lambda request=request: request.told)
        spin(lambda: pool.statistics().idle == 1)
    assert pool.statistics().threads == 1 and pool._made == 1


def test_idle_threads_leave(context: AioContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, but not below the minimum; the next request finds or makes one."""
    monkeypatch.setattr("bottomhalf.aio.thread_pool.IDLE_NS", 1)
    pool = context.thread_pool
    work = Work()
    for _ in range(50):
        work.submit(pool)
        until(context, lambda: not work.active)
    assert work.count == 50
    spin(lambda: pool.statistics().threads == 0)
    pool.set_limits(1, 4)
    work.submit(pool)
    until(context, lambda: not work.active)
    assert pool.statistics().threads >= 1


def test_no_thread_to_be_had(context: AioContext, pool: ThreadPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thread cannot be made: the caller hears of it and nothing is left. A later one: the others do it."""

    def refuse(*_: object, daemon: bool) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(context.host, "start_thread", refuse, raising=False)
        with pytest.raises(RuntimeError, match="can't start"):
            pool.submit(lambda: None)
        assert pool.outstanding == 0 and pool.statistics().queued == 0
    gate = Gate()
    first = pool.submit(gate)
    gate.begun.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(context.host, "start_thread", refuse, raising=False)
        second = pool.submit(gate)
    gate.opened.set()
    until(context, lambda: first.told and second.told)
    assert second.result() == "through"


def test_completions_are_not_lost() -> None:
    """A thread that finishes while the last owner is being told is told of as well."""
    context = AioContext(LinuxHost())
    pool = context.thread_pool
    left = 20_000

    def told(_: PoolRequest) -> None:
        nonlocal left
        left -= 1
        if left >= 16:
            pool.submit(int, told)

    for _ in range(16):
        pool.submit(int, told)
    until(context, lambda: left <= 0)
    assert pool.outstanding == 0 and pool.statistics().completed >= 20_000
    context.close()
