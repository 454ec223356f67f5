# SPDX-License-Identifier: Apache-2.0
"""Timers of a context.

    timer = context.timer(retry)
    timer.arm_ns(context.now_ns() + 50_000_000)

A heap orders arms by deadline and, among equals, by the order of arming. Cancelling or re-arming does not search
the heap: it makes the entry stale, and a stale entry is dropped when it comes to the top. A pass reads the clock
once and runs what was due then and armed before it began: a callback that re-arms itself into the past runs again
in the next pass, not for ever in this one. Each timer leaves the heap before its callback runs, so a callback may
re-arm, cancel, and poll.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from bottomhalf.aio.errors import AioError
from bottomhalf.host.threads import Lock

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext

CLOCKS: Final = ("realtime", "host")


class Timer:
    """Made by AioContext.timer(). One shot; arm it again for the next."""

    __slots__ = ("_entry", "_list", "callback", "name")

    def __init__(self, timers: TimerList, callback: Callable[[], object], name: str) -> None:
        self.callback = callback
        self.name = name
        self._list = timers
        self._entry = 0  # number of the valid heap entry, 0 when not armed

    @property
    def armed(self) -> bool:
        return self._entry != 0

    def arm_ns(self, deadline_ns: int) -> None:
        """Run the callback once when the clock has reached ``deadline_ns``, replacing an earlier arm. Negative
        deadlines are 0. Callable from any thread."""
        timers = self._list
        with timers.lock:
            timers.number += 1
            self._entry = timers.number
            heapq.heappush(timers.heap, (max(deadline_ns, 0), self._entry, self))
            first = timers.heap[0][1] == self._entry
        if first:
            timers.context.notify()

    def cancel(self) -> None:
        """Forget the arm, if any. Does not wait for a callback that is running elsewhere."""
        self._entry = 0


class TimerList:
    """The timers of one clock in one context."""

    __slots__ = ("clock", "context", "heap", "lock", "now_ns", "number")

    def __init__(self, context: AioContext, clock: str) -> None:
        if clock not in CLOCKS:
            raise AioError(f"there is no clock {clock!r}; there are {', '.join(CLOCKS)}")
        self.context = context
        self.clock = clock
        self.heap: list[tuple[int, int, Timer]] = []
        self.number = 0
        self.lock = Lock()
        self.now_ns = context.host.monotonic_ns if clock == "realtime" else context.host.realtime_ns

    def deadline_ns(self) -> int:
        """When the first timer is due, -1 for never."""
        heap = self.heap
        while heap:
            deadline_ns, entry, timer = heap[0]
            if timer._entry == entry:
                return deadline_ns
            with self.lock:
                if heap and heap[0][1] == entry:
                    heapq.heappop(heap)
        return -1

    def run(self) -> bool:
        """Run what is due; whether anything ran. An exception leaves the rest for the next pass."""
        heap = self.heap
        now_ns, newest = self.now_ns(), self.number
        progress = False
        while heap:
            with self.lock:
                deadline_ns, entry, timer = heap[0]
                stale = timer._entry != entry
                if not stale and (deadline_ns > now_ns or entry > newest):
                    break
                heapq.heappop(heap)
                if stale:
                    continue
                timer._entry = 0
            progress = True
            try:
                timer.callback()
            except Exception as error:
                self.context.failed(error, f"timer {timer.name!r}")
        return progress
