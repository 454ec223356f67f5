# SPDX-License-Identifier: Apache-2.0
"""A descriptor for pollers that have none: an epoll that only has to be readable.

A loop that is part of another loop gives it one descriptor, readable while there is something to do. poll(2) has none.
An io_uring has two, and on Linux 6.18 neither will do: the ring's own does not wake an epoll (with DEFER_TASKRUN), and
a registered eventfd is not signalled, but for the first time and then 15 ms late, when the event that fires is an
eventfd itself, as every AioContext.notify() is; the kernel puts such nested signals off and loses them.

So a poller that is asked for its descriptor makes an epoll, registers with it all that it has itself, and keeps the two
equal from then on. Nothing is ever read from it. The price is one epoll_ctl(2) per change, for embedded pollers only.

    mirror = Mirror("poll(2)")
    mirror.follow([(fd, IN)])
    outer.register(mirror.fileno(), IN)
"""

from __future__ import annotations

import errno
import select


class Mirror:
    """What a poller has registered, as an epoll."""

    __slots__ = ("_epoll",)

    def __init__(self, whose: str) -> None:
        """OSError that says whose descriptor it would have been, if epoll is refused."""
        try:
            self._epoll = select.epoll()
        except OSError as refused:
            text = f"{whose} can only be embedded in another loop by an epoll, which is refused: {refused.strerror}"
            raise OSError(refused.errno, text) from refused

    def follow(self, masks: list[tuple[int, int]]) -> None:
        """Take over what the poller has already."""
        for fd, mask in masks:
            try:
                self._epoll.register(fd, mask)
            except OSError as failed:
                # Closed, which the poller finds out by itself; or another thread was faster.
                if failed.errno not in (errno.EBADF, errno.EEXIST):
                    raise

    def fileno(self) -> int:
        return self._epoll.fileno()

    def register(self, fd: int, mask: int) -> None:
        self._epoll.register(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        try:
            self._epoll.modify(fd, mask)
        except FileNotFoundError:  # closed and opened again: epoll has forgotten the old file, the poller has not
            self._epoll.register(fd, mask)

    def unregister(self, fd: int) -> None:
        try:
            self._epoll.unregister(fd)
        except OSError:
            pass  # closed, and therefore forgotten

    def close(self) -> None:
        self._epoll.close()
