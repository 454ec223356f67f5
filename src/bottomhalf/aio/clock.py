# SPDX-License-Identifier: Apache-2.0
"""Clocks: what "now" means to a timer.

    clocks = clocks_of(host)
    clocks.stop()                           # the machine is paused: virtual time stands still
    clocks.start()

==========  ===============================================  ==============================
realtime    the host's monotonic clock                       never stops, never jumps
host        the host's wall clock                            may jump, either way
virtual     a clock of our own                               stands while the machine does
virtual_rt  the same, for what must not be counted in steps  stands while the machine does
==========  ===============================================  ==============================

The names are QEMU's, where "realtime" is the one that is monotonic. There the virtual clock stands until a machine
is started, so a time-out on it never comes in a program without a machine (a throttled disk in a tool, say). Ours
run until somebody stops them. They belong to the host: all its contexts see the same time.

Stopping does not wait for timers that are running, so a timer may stop its own clock; those due behind it wait for
the start. (Where stopping waits for the pass that is going on, a callback that stops its clock waits for itself.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final
from weakref import WeakSet, WeakValueDictionary

from bottomhalf.aio.errors import AioError

if TYPE_CHECKING:
    from bottomhalf.aio.timer import TimerList
    from bottomhalf.host.protocol import Host

CLOCKS: Final = ("realtime", "virtual", "host", "virtual_rt")  # the order in which a pass runs them (QEMU's)


class Clock:
    """One clock of a host. ``now_ns()`` may be called from any thread."""

    __slots__ = ("_lists", "name", "now_ns")

    def __init__(self, name: str, now_ns: Callable[[], int]) -> None:
        self.name = name
        self.now_ns = now_ns
        self._lists: WeakSet[TimerList] = WeakSet()

    @property
    def running(self) -> bool:
        return True

    def add(self, timers: TimerList) -> None:
        """To be told when the clock starts and stops."""
        self._lists.add(timers)


class StoppableClock(Clock):
    """A clock that stands still while somebody wants it to. It begins at 0 and runs."""

    __slots__ = ("_base_ns", "_read_ns", "_started_ns")

    def __init__(self, name: str, read_ns: Callable[[], int]) -> None:
        super().__init__(name, self._read)
        self._read_ns = read_ns
        self._base_ns = 0  # what it showed when it was last started or stopped
        self._started_ns: int | None = read_ns()

    @property
    def running(self) -> bool:
        return self._started_ns is not None

    def _read(self) -> int:
        started_ns = self._started_ns
        return self._base_ns if started_ns is None else self._base_ns + self._read_ns() - started_ns

    def start(self) -> None:
        """Go on from where it stands. Idempotent; main thread only."""
        if self._started_ns is None:
            self._started_ns = self._read_ns()
            for timers in tuple(self._lists):
                timers.context.notify()

    def stop(self) -> None:
        """Stand still. Idempotent; main thread only. Its timers keep their deadlines."""
        if self._started_ns is not None:
            self._base_ns, self._started_ns = self._read(), None
            for timers in tuple(self._lists):
                timers.end_pass()

    def advance_to_ns(self, now_ns: int) -> None:
        """Move a standing clock forward, as a machine that counts its steps does. AioError if it runs, or back."""
        if self.running or now_ns < self._base_ns:
            raise AioError(f"the {self.name} clock shows {self._read()}: it can be moved forward while it stands")
        self._base_ns = now_ns
        for timers in tuple(self._lists):
            timers.context.notify()


class Clocks:
    """The four clocks of a host."""

    def __init__(self, host: Host) -> None:
        self.realtime = Clock("realtime", host.monotonic_ns)
        self.host = Clock("host", host.realtime_ns)
        self.virtual = StoppableClock("virtual", host.monotonic_ns)
        self.virtual_rt = StoppableClock("virtual_rt", host.monotonic_ns)

    def __getitem__(self, name: str) -> Clock:
        if name not in CLOCKS:
            raise AioError(f"there is no clock {name!r}; there are {', '.join(CLOCKS)}")
        clock: Clock = getattr(self, name)
        return clock

    def stop(self) -> None:
        """The machine stops, and its two clocks with it."""
        self.virtual.stop()
        self.virtual_rt.stop()

    def start(self) -> None:
        """The machine goes on."""
        self.virtual.start()
        self.virtual_rt.start()


_clocks: WeakValueDictionary[int, Clocks] = WeakValueDictionary()  # by the id of the host, which they keep alive


def clocks_of(host: Host) -> Clocks:
    """The clocks that all contexts of a host share. They last as long as somebody, a context say, holds them."""
    clocks = _clocks.get(id(host))
    return clocks if clocks is not None else _clocks.setdefault(id(host), Clocks(host))
