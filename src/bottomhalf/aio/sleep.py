# SPDX-License-Identifier: Apache-2.0
"""Sleeping in a coroutine, and sleeping until somebody has something to do.

    await sleep_ns(50_000_000)

    sleep = Sleep()
    await sleep.for_ns(1_000_000_000)       # in one coroutine
    sleep.wake()                            # in the same thread, from whatever has come up
"""

from __future__ import annotations

from bottomhalf.aio.coroutine import ASLEEP, Coroutine, Waitable, current, suspend
from bottomhalf.aio.timer import Timer


class Sleep(Waitable):
    """A sleep that others may end. Used by one coroutine at a time."""

    __slots__ = ("_clock", "_sleeper", "_timer")

    def __init__(self, clock: str = "realtime") -> None:
        self._clock = clock
        self._sleeper: Coroutine | None = None
        self._timer: Timer | None = None

    @property
    def what(self) -> str:
        return f"the {self._clock} clock"

    @property
    def asleep(self) -> bool:
        return self._sleeper is not None

    async def for_ns(self, duration_ns: int) -> None:
        """Suspend the coroutine for at least ``duration_ns`` of its context's clock, or until wake(); 0 lets others
        run.

        Who enters it before the time is up gets an error."""
        me = current()
        assert self._sleeper is None, f"{self._sleeper!r} sleeps here"
        context = me.context
        self._sleeper = me
        self._timer = timer = context.timer(self.wake, self._clock, name="sleep")
        timer.arm_ns(context.now_ns(self._clock) + duration_ns)
        me.queued = ASLEEP
        try:
            await suspend(self)
        finally:
            self._end(me)

    def _end(self, sleeper: Coroutine) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if sleeper.queued is ASLEEP:
            sleeper.queued = None
        self._sleeper = None

    def wake(self) -> None:
        """End the sleep; nothing happens if nobody sleeps. Home thread of the sleeper only."""
        sleeper = self._sleeper
        if sleeper is not None and sleeper.queued is ASLEEP:
            self._end(sleeper)
            sleeper.context.wake(sleeper)

    def take_back(self, waiter: Coroutine) -> bool:
        if waiter is not self._sleeper or waiter.queued is not ASLEEP:
            return False
        self._end(waiter)
        return True


async def sleep_ns(duration_ns: int, clock: str = "realtime") -> None:
    """Suspend the coroutine for at least ``duration_ns`` of its context's clock; 0 lets others run.

    Who enters it before the time is up gets an error."""
    await Sleep(clock).for_ns(duration_ns)
