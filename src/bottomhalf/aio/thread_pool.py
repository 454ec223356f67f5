# SPDX-License-Identifier: Apache-2.0
"""Worker threads of a context, for calls that may wait inside the kernel.

    request = context.thread_pool.submit(lambda: os.fsync(fd), done)     # done(request) later, in this thread
    result = await context.thread_pool.call(checksum, path)              # in a coroutine

Facts. A thread costs tens of microseconds to start and nothing to keep for a while, so threads are made when there is
more work than idle ones and leave when they found none for ten seconds. What a thread has finished is told in the
context's own thread, by a bottom half. An owner that is told may wait, in a nested poll, for another request that has
finished as well: so that bottom half schedules itself again before each owner is told, and a nested poll goes on with
the rest. (QEMU's pool hung there once, as its linux-aio did.)

A thread that becomes idle stands in a list with a lock that it waits for; whoever has work takes one out and releases
that lock. So a wake-up has one addressee: it is not lost when a thread gives up waiting at the same moment, for only
one of the two can take the thread out of the list. The one that was idle last goes first; the others may leave.

Only a request that no thread has begun can be cancelled. It completes like the others, with ECANCELED.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio.bottom_half import name_of
from bottomhalf.aio.coroutine import Coroutine, Waitable, current, suspend
from bottomhalf.aio.defer import deferred
from bottomhalf.aio.errors import AioError, WrongContext
from bottomhalf.aio.statistics import ThreadPoolStatistics
from bottomhalf.host.threads import Lock

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext
    from bottomhalf.host.protocol import Thread

THREADS_MAX: Final = 64  # of a context, unless set_limits() says otherwise (QEMU's default)
THREADS_LIMIT: Final = 4096  # what set_limits() accepts; each costs a stack
IDLE_NS: Final = 10_000_000_000  # a thread that found no work for so long leaves (QEMU: 10 s)

QUEUED: Final = "queued"
RUNNING: Final = "running"
DONE: Final = "done"


class PoolRequest(Waitable):
    """A call that a worker thread makes, has made, or will not make because it was cancelled."""

    __slots__ = ("_callback", "_error", "_pool", "_result", "_work", "name", "state", "told")

    def __init__(
        self, pool: ThreadPool, work: Callable[[], Any], callback: Callable[[PoolRequest], object] | None, name: str
    ) -> None:
        self._pool = pool
        self._work = work
        self._callback = callback
        self._result: Any = None
        self._error: BaseException | None = None
        self.name = name or name_of(work)
        self.state = QUEUED
        self.told = False  # the owner's callback was called

    @property
    def what(self) -> str:
        return f"{self.name}, {self.state} in a worker thread of {self._pool.context.name}"

    def result(self) -> Any:
        """What the work returned; raises what it raised, or OSError (ECANCELED). AioError if it is not done."""
        if self.state is not DONE:
            raise AioError(f"{self.name} is {self.state}")
        if self._error is not None:
            raise self._error
        return self._result

    def cancel(self) -> bool:
        """Take it back if no thread has begun it; whether that was so. Then, too, the owner is told, later. Home
        thread only."""
        return self._pool.cancel(self)

    def take_back(self, waiter: Coroutine) -> bool:
        if not self.cancel():
            return False
        self._callback = None
        return True

    def run(self) -> None:
        """In a worker thread."""
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        self.state = DONE

    def cancelled(self) -> None:
        self._error = OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        self.state = DONE

    def tell(self) -> None:
        """In the home thread."""
        self.told = True
        callback, self._callback = self._callback, None
        if callback is not None:
            callback(self)


class _Worker:
    """A thread, and the lock that it waits for when it is idle; whoever has work for it releases that."""

    __slots__ = ("bell", "request", "thread")

    def __init__(self, bell: Any) -> None:
        self.bell = bell
        self.request: PoolRequest | None = None
        self.thread: Thread | None = None


class ThreadPool:
    """The worker threads of one context. Requests are submitted and told in its home thread only."""

    def __init__(self, context: AioContext) -> None:
        self.context = context
        self._host = context.host
        self._guard = Lock()  # of the lists and limits below; held for a few instructions
        self._queue: deque[PoolRequest] = deque()
        self._idle: list[_Worker] = []
        self._workers: set[_Worker] = set()
        self._min = 0
        self._max = THREADS_MAX
        self._made = 0
        self._stopping = False
        self._done: deque[PoolRequest] = deque()  # and not told yet
        self._outstanding = 0
        self._completed = 0
        self.completions = context.bottom_half(self._complete, name="thread pool completions")

    @property
    def outstanding(self) -> int:
        """Requests whose owners have not been told."""
        return self._outstanding

    def submit(
        self, work: Callable[[], Any], callback: Callable[[PoolRequest], object] | None = None, name: str = ""
    ) -> PoolRequest:
        """Have a worker thread call ``work()``, first come first served; later ``callback(request)`` is called in this
        thread, in no particular order, never from in here. WrongContext from another thread."""
        if not self.context.is_home:
            raise WrongContext(f"{name or name_of(work)} is submitted to {self.context.name} by another thread")
        request = PoolRequest(self, work, callback, name)
        self._outstanding += 1
        with self._guard:
            worker = self._idle.pop() if self._idle else None
            if worker is None:
                self._queue.append(request)
                more = len(self._workers) < self._max
            else:
                request.state = RUNNING
                worker.request = request
        if worker is not None:
            worker.bell.release()
        elif more:
            try:
                self._start_worker()
            except BaseException:
                if self.cancel(request):  # nobody is there to do it
                    self._done.remove(request)
                    self._outstanding -= 1
                    raise
        return request

    async def call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``work(*arguments)`` in a worker thread and wait for it; what it returns or raises. A coroutine of this
        context only. Cancelled before a thread has begun, it is never called."""
        me = current()
        if me.context is not self.context:
            raise WrongContext(f"{me!r} of {me.context.name} uses the worker threads of {self.context.name}")
        call = (lambda: work(*arguments)) if arguments else work
        request = self.submit(call, lambda _: me.context.wake(me), name_of(work))
        await suspend(request)
        assert request.told, "woken by something else than the thread pool"
        return request.result()

    def cancel(self, request: PoolRequest) -> bool:
        """PoolRequest.cancel()."""
        if not self.context.is_home:
            raise WrongContext(f"{request.name} of {self.context.name} is cancelled by another thread")
        with self._guard:
            if request.state is not QUEUED:
                return False
            self._queue.remove(request)
            request.cancelled()
        self._done.append(request)
        self.completions.schedule()
        return True

    def set_limits(self, min_threads: int, max_threads: int) -> None:
        """Keep at least so many threads and at most so many, from now on: 0 <= min <= max, and 1 <= max <= 4096.
        Threads above the maximum leave when they have finished. Home thread only."""
        if not (0 <= min_threads <= max_threads and 1 <= max_threads <= THREADS_LIMIT):
            raise AioError(
                f"thread-pool-min {min_threads} and thread-pool-max {max_threads} of {self.context.name}: "
                f"0 <= min <= max and 1 <= max <= {THREADS_LIMIT} must hold"
            )
        with self._guard:
            self._min, self._max = min_threads, max_threads
            leaving = [self._idle.pop() for _ in range(min(len(self._workers) - max_threads, len(self._idle)))]
            missing = max(min_threads, min(len(self._queue), max_threads)) - len(self._workers)
        for worker in leaving:
            worker.bell.release()
        for _ in range(missing):
            self._start_worker()

    def statistics(self) -> ThreadPoolStatistics:
        """What it is doing, in figures. From any thread."""
        with self._guard:
            threads, idle, queued = len(self._workers), len(self._idle), len(self._queue)
        running = max(self._outstanding - queued - len(self._done), 0)
        return ThreadPoolStatistics(threads, idle, queued, running, self._completed)

    def close(self) -> None:
        """End all threads. AioError if a request is outstanding: its owner would never be told."""
        if self._outstanding:
            raise AioError(f"{self._outstanding} requests of {self.context.name} are in worker threads")
        with self._guard:
            self._stopping = True
            leaving, self._idle = self._idle, []
            workers = tuple(self._workers)
        for worker in leaving:
            worker.bell.release()
        for worker in workers:
            assert worker.thread is not None
            worker.thread.join()
        self.completions.delete()

    # -- telling owners -----------------------------------------------------------------------------------------

    def _complete(self) -> None:
        done, completions = self._done, self.completions
        with deferred():
            while True:
                while done:
                    completions.schedule()  # a poll inside the next callback goes on with the rest
                    request = done.popleft()
                    self._outstanding -= 1
                    self._completed += 1
                    request.tell()
                completions.cancel()
                if not done:  # looked at after the cancellation, for a thread appends before it schedules
                    break

    # -- worker threads -----------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        bell = self._host.lock()
        bell.acquire()
        worker = _Worker(bell)
        with self._guard:
            self._workers.add(worker)
            self._made += 1
        name = f"{self.context.name}-worker-{self._made}"
        try:
            worker.thread = self._host.start_thread(lambda: self._work(worker), name, daemon=True)
        except BaseException:
            with self._guard:
                self._workers.discard(worker)
                alone = not self._workers
            if alone:
                raise  # else the others will do the work

    def _work(self, worker: _Worker) -> None:
        while (request := self._next(worker)) is not None:
            request.run()
            self._done.append(request)
            self.completions.schedule()

    def _next(self, worker: _Worker) -> PoolRequest | None:
        """The next request for a worker, which may wait for it; None: leave."""
        while True:
            with self._guard:
                if self._stopping or len(self._workers) > self._max:
                    self._workers.discard(worker)
                    return None
                if self._queue:
                    request = self._queue.popleft()
                    request.state = RUNNING
                    return request
                self._idle.append(worker)
            rung = worker.bell.acquire(IDLE_NS)
            with self._guard:
                given, worker.request = worker.request, None
                if given is None and not rung:
                    if worker in self._idle:
                        self._idle.remove(worker)
                        rung = True
                    if len(self._workers) > self._min:
                        self._workers.discard(worker)
                        return None
            if not rung:
                worker.bell.acquire()  # it is about to be rung, or was meanwhile
            if given is not None:
                return given
