# SPDX-License-Identifier: Apache-2.0
"""Locks for coroutines: who cannot go on suspends, nobody spins.

    async with mutex:
        ...

First come, first served: an unlock hands over to the longest waiter, so nobody is overtaken. A ``CoMutex`` may be
shared by coroutines of several contexts; a ``CoQueue`` belongs to those of one, for nothing would keep the
condition that they wait for from changing between the look and the wait.
"""

from __future__ import annotations

from collections import deque
from types import TracebackType

from bottomhalf.aio.coroutine import Coroutine, current, suspend
from bottomhalf.aio.errors import AioError
from bottomhalf.host.threads import Lock


class CoQueue:
    """Coroutines that wait for something to be announced."""

    __slots__ = ("_waiters", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self._waiters: deque[Coroutine] = deque()

    def __len__(self) -> int:
        return len(self._waiters)

    async def wait(self) -> None:
        self._waiters.append(current())
        await suspend(self.what)

    def wake_next(self) -> bool:
        """Wake the longest waiter; whether there was one."""
        if not self._waiters:
            return False
        waiter = self._waiters.popleft()
        waiter.context.wake(waiter)
        return True

    def wake_all(self) -> None:
        """Wake those who wait now; one that waits again in turn is not woken again."""
        waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            waiter.context.wake(waiter)


class CoMutex:
    """Mutual exclusion between coroutines, with hand-over in order of arrival."""

    __slots__ = ("_guard", "_holder", "_waiters", "what")

    def __init__(self, what: str = "a lock") -> None:
        self.what = what
        self._guard = Lock()  # of the two below; held for a few instructions
        self._holder: Coroutine | None = None
        self._waiters: deque[Coroutine] = deque()

    @property
    def locked(self) -> bool:
        return self._holder is not None

    async def acquire(self) -> None:
        me = current()
        with self._guard:
            if self._holder is None:
                self._holder = me
                return
            if self._holder is me:
                raise AioError(f"{me!r} already holds {self.what}")
            self._waiters.append(me)
        await suspend(self.what)
        assert self._holder is me, "woken by someone who did not hand the lock over"

    def release(self) -> None:
        me = current()
        with self._guard:
            if self._holder is not me:
                raise AioError(f"{me!r} does not hold {self.what}")
            self._holder = next_one = self._waiters.popleft() if self._waiters else None
        if next_one is not None:
            next_one.context.wake(next_one)

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not GeneratorExit:  # then it is thrown away half done, by nobody who could hand over
            self.release()
