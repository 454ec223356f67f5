# SPDX-License-Identifier: Apache-2.0
"""Locks for coroutines: who cannot go on suspends, nobody spins.

    async with mutex:
        ...
    async with rwlock.reading():
        ...

First come, first served: a release hands over to the longest waiter, so nobody is overtaken. A ``CoMutex`` may be
shared by coroutines of several contexts. The others belong to those of one thread, for nothing would keep the condition
that they wait for from changing between the look and the wait; a ``CoQueue`` with a mutex is the exception.

Every wait here can be cancelled: the waiter leaves the queue and holds nothing. A lock that is handed over is held,
though, even when its new holder is cancelled in the same moment; he comes to know at his next wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType

from bottomhalf.aio.coroutine import Coroutine, Waitable, current, shielded, suspend
from bottomhalf.aio.errors import AioError
from bottomhalf.aio.statistics import LockStatistics
from bottomhalf.host.threads import Lock


def _wake(waiter: Coroutine) -> None:
    waiter.context.wake(waiter)


class CoMutex(Waitable):
    """Mutual exclusion between coroutines, with hand-over in order of arrival."""

    __slots__ = ("_guard", "_holder", "_waiters", "_what")

    def __init__(self, what: str = "a lock") -> None:
        self._what = what
        self._guard = Lock()  # of the two below; held for a few instructions
        self._holder: Coroutine | None = None
        self._waiters: deque[Coroutine] = deque()

    @property
    def what(self) -> str:
        return self._what

    @property
    def locked(self) -> bool:
        return self._holder is not None

    @property
    def holder(self) -> Coroutine | None:
        return self._holder

    async def acquire(self) -> None:
        """Hold it, after all who came before. AioError if this coroutine holds it already."""
        me = current()
        with self._guard:
            if self._holder is None:
                self._holder = me
                return
            if self._holder is me:
                raise AioError(f"{me!r} already holds {self.what}")
            self._waiters.append(me)
        await suspend(self)
        assert self._holder is me, "woken by someone who did not hand the lock over"

    def acquire_nowait(self) -> bool:
        """Hold it if nobody does; whether it is held now."""
        me = current()
        with self._guard:
            if self._holder is not None:
                return False
            self._holder = me
            return True

    def release(self) -> None:
        """Hand it to the longest waiter. AioError if this coroutine does not hold it."""
        me = current()
        with self._guard:
            if self._holder is not me:
                raise AioError(f"{me!r} does not hold {self.what}")
            self._holder = next_one = self._waiters.popleft() if self._waiters else None
        if next_one is not None:
            _wake(next_one)

    def blockers(self) -> tuple[Waitable, ...]:
        holder = self._holder
        return (holder,) if holder is not None else ()

    def take_back(self, waiter: Coroutine) -> bool:
        with self._guard:
            return _removed(self._waiters, waiter)

    def statistics(self) -> LockStatistics:
        return LockStatistics(self.what, int(self.locked), len(self._waiters))

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not GeneratorExit:  # then it is thrown away half done, by nobody who could hand over
            self.release()


class CoQueue(Waitable):
    """Coroutines that wait for something to be announced.

    With a mutex, ``wait(mutex)`` gives it up while it waits and holds it again afterwards, and then waiters and wakers
    may be of several contexts, if the wakers hold it too."""

    __slots__ = ("_waiters", "_what")

    def __init__(self, what: str) -> None:
        self._what = what
        self._waiters: deque[Coroutine] = deque()

    @property
    def what(self) -> str:
        return self._what

    def __len__(self) -> int:
        return len(self._waiters)

    async def wait(self, mutex: CoMutex | None = None, *, front: bool = False) -> None:
        """Wait until woken; with ``front`` before all others, for one that was woken too early."""
        me = current()
        if front:
            self._waiters.appendleft(me)
        else:
            self._waiters.append(me)
        if mutex is None:
            await suspend(self)
            return
        mutex.release()
        try:
            await suspend(self)
        finally:
            with shielded():
                await mutex.acquire()

    def wake_next(self) -> bool:
        """Wake the longest waiter; whether there was one."""
        if not self._waiters:
            return False
        _wake(self._waiters.popleft())
        return True

    def wake_all(self) -> None:
        """Wake those who wait now; one that waits again in turn is not woken again."""
        waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            _wake(waiter)

    def take_back(self, waiter: Coroutine) -> bool:
        return _removed(self._waiters, waiter)

    def statistics(self) -> LockStatistics:
        return LockStatistics(self.what, 0, len(self._waiters))


class CoRwLock(Waitable):
    """Any number of readers, or one writer. Readers queue behind a waiting writer, so that he is not starved."""

    __slots__ = ("_readers", "_waiters", "_what", "_writer")

    def __init__(self, what: str = "a read-write lock") -> None:
        self._what = what
        self._readers: dict[Coroutine, int] = {}  # how often each holds it
        self._writer: Coroutine | None = None
        self._waiters: deque[tuple[Coroutine, bool]] = deque()  # and whether it wants to write

    @property
    def what(self) -> str:
        return self._what

    async def acquire_read(self) -> None:
        """Share it. One who shares it already may again, also past a waiting writer (who would wait for him)."""
        me = current()
        if self._writer is me:
            raise AioError(f"{me!r} already writes under {self.what}; downgrade()")
        if me in self._readers or (self._writer is None and not self._waiters):
            self._readers[me] = self._readers.get(me, 0) + 1
            return
        await self._wait(me, False)
        assert me in self._readers, "woken by someone who did not hand the lock over"

    async def acquire_write(self) -> None:
        """Hold it alone."""
        me = current()
        if self._writer is me or me in self._readers:
            raise AioError(f"{me!r} already holds {self.what}; upgrade() turns reading into writing")
        if self._writer is None and not self._readers and not self._waiters:
            self._writer = me
            return
        await self._wait(me, True)
        assert self._writer is me, "woken by someone who did not hand the lock over"

    async def upgrade(self) -> bool:
        """Turn reading into writing. False if another writer may have come in between: then what was read before has
        to be read again. At once if this is the only reader and nobody waits; else it queues behind those who do."""
        me = current()
        if self._readers.get(me) != 1:
            raise AioError(f"{me!r} does not share {self.what} exactly once")
        del self._readers[me]
        if not self._readers and not self._waiters:
            self._writer = me
            return True
        self._waiters.append((me, True))
        self._hand_over(upgrading=me)
        if self._writer is not me:
            await suspend(self)
        assert self._writer is me, "woken by someone who did not hand the lock over"
        return False

    def downgrade(self) -> None:
        """Turn writing into reading, without waiting, and let those readers in who wait first."""
        me = current()
        if self._writer is not me:
            raise AioError(f"{me!r} does not write under {self.what}")
        self._writer = None
        self._readers[me] = 1
        self._hand_over()

    def release(self) -> None:
        """Give up what this coroutine holds (one share of it, if it reads)."""
        me = current()
        if self._writer is me:
            self._writer = None
        elif me not in self._readers:
            raise AioError(f"{me!r} does not hold {self.what}")
        elif self._readers[me] > 1:
            self._readers[me] -= 1
        else:
            del self._readers[me]
        self._hand_over()

    async def _wait(self, me: Coroutine, writing: bool) -> None:
        self._waiters.append((me, writing))
        await suspend(self)

    def _hand_over(self, upgrading: Coroutine | None = None) -> None:
        """Let in whoever may go on, in order of arrival. One that is upgrading has not suspended yet."""
        waiters = self._waiters
        while waiters and self._writer is None:
            waiter, writing = waiters[0]
            if writing and self._readers:
                break
            waiters.popleft()
            if writing:
                self._writer = waiter
            else:
                self._readers[waiter] = 1
            if waiter is not upgrading:
                _wake(waiter)

    def blockers(self) -> tuple[Waitable, ...]:
        return (self._writer,) if self._writer is not None else tuple(self._readers)

    def take_back(self, waiter: Coroutine) -> bool:
        for entry in self._waiters:
            if entry[0] is waiter:
                self._waiters.remove(entry)
                self._hand_over()  # readers may have waited behind this writer
                return True
        return False

    def holds(self, coroutine: Coroutine) -> bool:
        return self._writer is coroutine or coroutine in self._readers

    def statistics(self) -> LockStatistics:
        return LockStatistics(self.what, len(self._readers) + (self._writer is not None), len(self._waiters))

    def reading(self) -> _Held:
        """``async with``: acquire_read() and release()."""
        return _Held(self, self.acquire_read)

    def writing(self) -> _Held:
        """``async with``: acquire_write() and release()."""
        return _Held(self, self.acquire_write)


class _Held:
    """A lock held for the length of a section."""

    __slots__ = ("_acquire", "_lock")

    def __init__(self, lock: CoRwLock, acquire: Callable[[], Awaitable[None]]) -> None:
        self._lock = lock
        self._acquire = acquire

    async def __aenter__(self) -> None:
        await self._acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is GeneratorExit:  # it is thrown away half done, by nobody who could hand over
            return
        if kind is None or self._lock.holds(current()):  # cancelled while upgrading it holds nothing
            self._lock.release()


class SharedResource(Waitable):
    """So many of something (bytes of buffers, requests in flight), shared in order of arrival.

    One that wants much is not overtaken by those who want little."""

    __slots__ = ("_available", "_total", "_waiters", "_what")

    def __init__(self, total: int, what: str = "a shared resource") -> None:
        if total < 0:
            raise AioError(f"there cannot be {total} of {what}")
        self._total = total
        self._available = total
        self._what = what
        self._waiters: deque[tuple[Coroutine, int]] = deque()

    @property
    def what(self) -> str:
        return self._what

    @property
    def available(self) -> int:
        return self._available

    def take_nowait(self, count: int) -> bool:
        """Take ``count`` if they are there and nobody waits; whether that was so."""
        self._check(count)
        if self._waiters or count > self._available:
            return False
        self._available -= count
        return True

    async def take(self, count: int) -> None:
        """Take ``count``, waiting until they are there. AioError for more than there will ever be."""
        if not self.take_nowait(count):
            self._waiters.append((current(), count))
            await suspend(self)

    def give(self, count: int) -> None:
        """Give ``count`` back."""
        if not 0 <= count <= self._total - self._available:
            raise AioError(f"{count} of {self.what} given back, {self._total - self._available} were taken")
        self._available += count
        self._serve()

    def _serve(self) -> None:
        while self._waiters and self._waiters[0][1] <= self._available:
            waiter, count = self._waiters.popleft()
            self._available -= count
            _wake(waiter)

    def _check(self, count: int) -> None:
        if not 0 <= count <= self._total:
            raise AioError(f"{count} of {self.what} wanted, there are never more than {self._total}")

    def take_back(self, waiter: Coroutine) -> bool:
        for entry in self._waiters:
            if entry[0] is waiter:
                self._waiters.remove(entry)
                self._serve()
                return True
        return False

    def statistics(self) -> LockStatistics:
        return LockStatistics(self.what, self._total - self._available, len(self._waiters))


def _removed(waiters: deque[Coroutine], waiter: Coroutine) -> bool:
    """Take a waiter out of a queue; False if it was not there."""
    try:
        waiters.remove(waiter)
    except ValueError:
        return False
    return True
