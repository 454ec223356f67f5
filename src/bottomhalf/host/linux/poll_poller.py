# SPDX-License-Identifier: Apache-2.0
"""Readiness by poll(2), for a machine that refuses epoll.

poll(2) is told the whole set at every call and answers with the whole set, so a wait costs in proportion to all that
is watched. It has been there for ever, needs no descriptor, and no sandbox forbids it. Its milliseconds are too coarse
for timers of microseconds; ppoll(2) counts nanoseconds.

A descriptor that was closed without being unregistered is told once by the kernel as invalid, and forgotten here; one
whose number was given away meanwhile is watched in the other's place (epoll forgets it at the close).
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import struct
import time
from typing import Final

from bottomhalf.host.linux.poller import EXACT_BELOW_NS, MAX_EVENTS, WAIT_NS_MAX
from bottomhalf.host.linux.syscalls import error, ppoll

_INVALID: Final = select.POLLNVAL
_POLLFD: Final = struct.Struct("=ihh")  # descriptor, events, and room for the answer


def check_pollable(fd: int) -> None:
    """What epoll_ctl(2) says of itself: EBADF for no descriptor, EPERM for a file, which is always ready."""
    if fd < 0:
        raise ValueError(f"file descriptor cannot be a negative integer ({fd})")
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        raise error(errno.EPERM)


class MirroredPoller:
    """A poller whose own descriptor, if anybody asks for it, is that of an epoll that watches the same.

    poll(2) has none. A ring's eventfd is written late, or not at all, when the readiness comes from a write to another
    eventfd (seen on 6.18; the kernel will not signal one from within the other), and a context always has one of
    those."""

    __slots__ = ("_epoll", "_masks")

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._epoll: select.epoll | None = None

    def fileno(self) -> int:
        """OSError where epoll is refused; then this poller cannot be put into another loop."""
        if self._epoll is None:
            self._epoll = select.epoll()
            for fd, mask in self._masks.items():
                self._epoll.register(fd, mask)
        return self._epoll.fileno()

    def register(self, fd: int, mask: int) -> None:
        check_pollable(fd)
        if fd in self._masks:
            raise error(errno.EEXIST)
        if self._epoll is not None:
            self._epoll.register(fd, mask)
        self._masks[fd] = mask
        self._set(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        self._check_known(fd)
        if self._epoll is not None:
            self._epoll.modify(fd, mask)
        self._masks[fd] = mask
        self._set(fd, mask)

    def unregister(self, fd: int) -> None:
        self._check_known(fd)
        if self._epoll is not None:
            self._epoll.unregister(fd)
        self._forget(fd)

    def _check_known(self, fd: int) -> None:
        check_pollable(fd)
        if fd not in self._masks:
            raise error(errno.ENOENT)

    def _set(self, fd: int, mask: int) -> None:
        """Watch it from now on for this, and nothing else."""
        raise NotImplementedError

    def _forget(self, fd: int) -> None:
        del self._masks[fd]

    def close(self) -> None:
        if self._epoll is not None:
            self._epoll.close()


class PollPoller(MirroredPoller):
    """A host.protocol.Poller."""

    __slots__ = ("_array", "_poll", "_timespec")

    name = "poll"

    def __init__(self) -> None:
        super().__init__()
        self._poll = select.poll()
        self._array: ctypes.Array[ctypes.c_char] | None = None  # struct pollfd, made anew after a change
        self._timespec = ctypes.create_string_buffer(16)

    def _set(self, fd: int, mask: int) -> None:
        self._poll.register(fd, mask)
        self._array = None

    def _forget(self, fd: int) -> None:
        super()._forget(fd)
        self._poll.unregister(fd)
        self._array = None

    def wait(self, timeout_ns: int) -> list[tuple[int, int]]:
        if 0 < timeout_ns < EXACT_BELOW_NS:
            ready = self._wait_exactly(timeout_ns)
        elif timeout_ns <= 0:
            ready = self._poll.poll(timeout_ns)
        else:
            ready = self._poll.poll(min(timeout_ns, WAIT_NS_MAX) / 1e6)  # rounded up to milliseconds
        if any(mask & _INVALID for _, mask in ready):
            return self._without_closed(ready)
        return ready if len(ready) <= MAX_EVENTS else ready[:MAX_EVENTS]

    def _without_closed(self, ready: list[tuple[int, int]]) -> list[tuple[int, int]]:
        for fd, mask in ready:
            if mask & _INVALID:
                self._forget(fd)
        return [(fd, mask) for fd, mask in ready if not mask & _INVALID][:MAX_EVENTS]

    def _wait_exactly(self, timeout_ns: int) -> list[tuple[int, int]]:
        end_ns = time.monotonic_ns() + timeout_ns
        array = self._array
        if array is None:
            packed = b"".join(_POLLFD.pack(fd, mask, 0) for fd, mask in self._masks.items())
            array = self._array = ctypes.create_string_buffer(packed, max(len(packed), 1))
        while True:
            struct.pack_into("<qq", self._timespec, 0, timeout_ns // 1_000_000_000, timeout_ns % 1_000_000_000)
            count = ppoll(ctypes.addressof(array), len(self._masks), ctypes.addressof(self._timespec))
            if count != -errno.EINTR:
                break
            timeout_ns = max(end_ns - time.monotonic_ns(), 0)  # a signal, whose handler has run by now
        if count < 0:
            raise error(-count)
        if count == 0:
            return []
        return [(fd, found) for fd, _, found in _POLLFD.iter_unpack(array.raw[: len(self._masks) * 8]) if found]
