# SPDX-License-Identifier: Apache-2.0
"""Readiness by epoll(7).

The kernel keeps the set and the list of what is ready in it, so a wait costs as much as there is to report, however
many descriptors are registered. ``select.epoll`` counts its timeout in whole milliseconds, rounded up, which would
turn a timer of 50 us into one of 1 ms; epoll_pwait2(2) takes nanoseconds but costs a microsecond more through ctypes.
Therefore short finite timeouts take the exact call and everything else the cheap one. Neither returns early, except
from a wait of over a day.

A change from another thread works at once, also on a loop that sleeps. A descriptor that is closed without
unregister() is forgotten by the kernel, and its number can be registered again, unless a duplicate keeps the file
open: then it goes on being reported under the old number, and nobody can unregister it any more.

    poller = EpollPoller()
    poller.register(fd, IN)
    poller.wait(-1)  # [(fd, IN)]
    poller.close()
"""

from __future__ import annotations

import errno
import select
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from bottomhalf.host.linux.syscalls import EpollBuffer

MAX_EVENTS: Final = 128  # taken per wait, as QEMU's fdmon-epoll; the rest stays ready (level-triggered)
WAIT_NS_MAX: Final = 86_400_000_000_000  # a day; the C interface counts milliseconds in an int
_EXACT_BELOW_NS: Final = 20_000_000


class EpollPoller:
    """A host.protocol.Poller."""

    __slots__ = ("_buffer", "_epoll", "_exact", "_poll")

    name = "epoll"

    def __init__(self) -> None:
        """OSError: whichever of its three system calls the kernel refuses (EPERM, ENOSYS), EMFILE, ENOMEM."""
        self._epoll = select.epoll()
        try:
            self._probe()
        except BaseException:
            self._epoll.close()
            raise
        self._poll = self._epoll.poll
        self._exact = True
        self._buffer: EpollBuffer | None = None

    def _probe(self) -> None:
        """A strict profile may let us make an epoll and refuse to use it; better to learn that now."""
        try:
            self._epoll.register(self._epoll.fileno())
        except OSError as refused:
            if refused.errno != errno.EINVAL:  # what the kernel says to an epoll in itself
                raise
        self._epoll.poll(0)

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
            poll = self._poll  # twice as fast on CPython 3.11 as a call of the slot
            return poll(None if timeout_ns else 0, MAX_EVENTS)
        if timeout_ns < _EXACT_BELOW_NS and self._exact:
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
