# SPDX-License-Identifier: Apache-2.0
"""Readiness by epoll, wake-ups by eventfd.

epoll(7) tells in one call which of many descriptors are ready and keeps the set in the kernel. Of the three monitors
here it is the fastest for whatever was measured (``benchmarks.micro_pollers``: a wait that finds one descriptor among
a thousand takes 0.4 us, with poll(2) 27, with a ring 6), so "auto" takes it where it is allowed. ``select.epoll``
counts its timeout in whole milliseconds, rounded up, which would turn a timer of 50 us into one of 1 ms;
epoll_pwait2(2) takes nanoseconds but costs a microsecond more through ctypes. Therefore short finite timeouts
take the exact call and everything else the cheap one. Neither returns early, except from a wait of over a day.
"""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from bottomhalf.host.linux.syscalls import EpollBuffer

MAX_EVENTS: Final = 128  # taken per wait, as QEMU's fdmon-epoll; the rest stays ready (level-triggered)
WAIT_NS_MAX: Final = 86_400_000_000_000  # a day; the C interface counts milliseconds in an int
EXACT_BELOW_NS: Final = 20_000_000  # milliseconds would be too coarse


class LinuxPoller:
    """A host.protocol.Poller."""

    __slots__ = ("_buffer", "_epoll", "_exact", "_poll")

    name = "epoll"

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._poll = self._epoll.poll
        self._exact = True
        self._buffer: EpollBuffer | None = None

    def fileno(self) -> int:
        return self._epoll.fileno()

    def register(self, fd: int, mask: int) -> None:
        self._epoll.register(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        self._epoll.modify(fd, mask)

    def unregister(self, fd: int) -> None:
        self._epoll.unregister(fd)

    def wait(self, timeout_ns: int) -> list[tuple[int, int]]:
        if timeout_ns <= 0:
            poll = self._poll
            return poll(None if timeout_ns else 0, MAX_EVENTS)
        if timeout_ns < EXACT_BELOW_NS and self._exact:
            return self._wait_exactly(timeout_ns)
        return self._poll(min(timeout_ns, WAIT_NS_MAX) / 1e9, MAX_EVENTS)

    def _wait_exactly(self, timeout_ns: int) -> list[tuple[int, int]]:
        if self._buffer is None:
            from bottomhalf.host.linux.syscalls import EpollBuffer

            self._buffer = EpollBuffer(MAX_EVENTS)
        end_ns = time.monotonic_ns() + timeout_ns
        try:
            while (ready := self._buffer.wait(self._epoll.fileno(), timeout_ns)) is None:
                # A signal, whose handler has run by now, or work of a ring: go on, as epoll.poll() does.
                timeout_ns = max(end_ns - time.monotonic_ns(), 0)
        except OSError:  # ENOSYS before Linux 5.11, EPERM under a strict seccomp profile
            self._exact = False
            return self._poll(timeout_ns / 1e9, MAX_EVENTS)
        return ready

    def close(self) -> None:
        self._epoll.close()


class LinuxEvent:
    """A host.protocol.Event: eventfd(2), non-blocking, close-on-exec."""

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        try:
            os.eventfd_write(self._fd, 1)
        except BlockingIOError:
            pass  # the counter is full: it is readable already

    def clear(self) -> bool:
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
