# SPDX-License-Identifier: Apache-2.0
"""Timers of a context.

    timer = context.timer(retry)
    timer.arm_ns(context.now_ns() + 50_000_000)

A heap orders arms by deadline and, among equals, by the order of arming. Cancelling or re-arming does not search
the heap: it makes the entry stale. A stale entry is dropped when it comes to the top, and all are when they are
more than half of the heap (a time-out that every request moves would fill it for hours). Only the home thread
touches the heap, so it needs no lock, which would cost more than all the rest; other threads leave their arms in
an inbox.

A pass reads the clock once and runs what was due then and armed before it began: a callback that re-arms itself
into the past runs again in the next pass, not for ever in this one, and those due behind it get their turn. Each
timer leaves the heap before its callback runs, so a callback may re-arm, cancel, and poll; a pass inside a pass
runs all that is due, and the outer one ends.

To take one entry from a large heap costs as much as all the rest of a timer's life. When a pass finds that a good
part of the heap is due, it sorts the heap (a sorted list is a heap) and takes that part off at once.

A timer is what a sleeping coroutine waits for, so it can be named.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Final, TypeAlias

from bottomhalf.aio.bottom_half import name_of

if TYPE_CHECKING:
    from bottomhalf.aio.clock import Clock
    from bottomhalf.aio.context import AioContext

STALE_MIN: Final = 64  # stale entries that are not worth a search
SORT_AFTER: Final = 16  # entries taken one by one before a pass thinks of sorting
SORT_SHARE: Final = 16  # times as many as were taken may be left, lest a large heap is sorted for a few

_Entry: TypeAlias = "tuple[int, int, Timer]"  # deadline, number of the arm, whose


class Timer:
    """Made by AioContext.timer(). One shot; arm it again for the next."""

    __slots__ = ("_entry", "_list", "_name", "callback", "deadline_ns")

    def __init__(self, timers: TimerList, callback: Callable[[], object], name: str) -> None:
        self.callback = callback
        self._name = name
        self._list = timers
        self._entry = 0  # number of the valid heap entry, 0 when not armed

    @property
    def name(self) -> str:
        return self._name or name_of(self.callback)

    @property
    def armed(self) -> bool:
        return self._entry != 0

    def arm_ns(self, deadline_ns: int) -> None:
        """Run the callback once when the clock has reached ``deadline_ns``, replacing an earlier arm. Negative
        deadlines are 0. Callable from any thread."""
        timers = self._list
        context = timers.context
        if deadline_ns < 0:
            deadline_ns = 0
        self.deadline_ns = deadline_ns
        self._entry = number = timers.next_number()
        entry = (deadline_ns, number, self)
        if not context._at_home():
            timers.inbox.append(entry)
            context.notify()
            return
        heap = timers.heap
        heappush(heap, entry)
        if context.notify_me and heap[0] is entry:
            context.notify()
        if len(heap) > timers.purge_at:
            timers.purge()

    def anticipate_ns(self, deadline_ns: int) -> None:
        """Arm it, unless it is armed for that time or an earlier one. Callable from any thread."""
        if not self._entry or deadline_ns < self.deadline_ns:
            self.arm_ns(deadline_ns)

    def cancel(self) -> None:
        """Forget the arm, if any. From another thread it does not wait for a callback that is running."""
        self._entry = 0


class TimerList:
    """The timers of one clock in one context."""

    __slots__ = (
        "__weakref__",
        "_pass",
        "clock",
        "context",
        "due",
        "heap",
        "inbox",
        "next_number",
        "now_ns",
        "purge_at",
    )

    def __init__(self, context: AioContext, clock: Clock) -> None:
        self.context = context
        self.clock = clock
        self.heap: list[_Entry] = []
        self.inbox: deque[_Entry] = deque()  # what other threads have armed, or the pass that is going on leaves alone
        self.next_number = count(1).__next__
        self.now_ns = clock.now_ns
        self.purge_at = 2 * STALE_MIN
        self.due: list[_Entry] = []  # what the pass that is going on has taken off, the first of them last
        self._pass = 0
        clock.add(self)

    @property
    def armed(self) -> int:
        """How many timers are armed."""
        entries = (*self.heap, *self.inbox, *self.due)
        return sum(timer._entry == number for _, number, timer in entries)

    def purge(self) -> None:
        """Drop stale entries."""
        self.heap[:] = [entry for entry in self.heap if entry[2]._entry == entry[1]]
        heapify(self.heap)
        self.purge_at = 2 * max(len(self.heap), STALE_MIN)

    def deadline_ns(self) -> int:
        """When the first timer is due, -1 for never."""
        self.take_in()
        heap = self.heap
        if not self.clock.running:
            return -1
        while heap:
            deadline_ns, number, timer = heap[0]
            if timer._entry == number:
                return deadline_ns
            heappop(heap)
        return -1

    def run(self) -> bool:
        """Run what is due; whether anything ran. An exception leaves the rest for the next pass."""
        self.take_in()
        heap = self.heap
        if not heap or not self.clock.running:
            return False
        now_ns = self.now_ns()
        if heap[0][0] > now_ns:
            return False
        self._pass = mine = self._pass + 1
        newest = self.next_number()
        progress = False
        due, taken, sort_at = self.due, 0, SORT_AFTER
        try:
            while due or (heap and heap[0][0] <= now_ns):
                if due:
                    first = due.pop()
                else:
                    first = heappop(heap)
                    taken += 1
                    if taken == sort_at:
                        sort_at *= 2
                        if len(heap) <= taken * SORT_SHARE:
                            self._take_due(now_ns)
                timer = first[2]
                if timer._entry != first[1]:
                    continue
                if first[1] > newest:
                    self.inbox.append(first)
                    continue
                timer._entry = 0
                progress = True
                try:
                    timer.callback()
                except Exception as error:
                    self.context.failed(error, f"timer {timer.name!r}")
                if self._pass != mine:
                    break
        finally:
            self.take_in()
        return progress

    def _take_due(self, now_ns: int) -> None:
        """Take off the heap all that is due."""
        heap = self.heap
        heap.sort()
        count = bisect_right(heap, now_ns, key=_deadline_ns)
        self.due.extend(reversed(heap[:count]))
        del heap[:count]

    def end_pass(self) -> None:
        """The clock was stopped, perhaps by one of its timers: the pass that is going on ends with that one."""
        self._pass += 1

    def take_in(self) -> None:
        """Put into the heap what other threads have armed, and what a pass around this one has not come to."""
        while self.inbox:
            heappush(self.heap, self.inbox.popleft())
        if self.due:
            self.heap += self.due
            self.due.clear()
            heapify(self.heap)


def _deadline_ns(entry: _Entry) -> int:
    return entry[0]
