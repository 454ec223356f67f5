# SPDX-License-Identifier: Apache-2.0
"""Wake-ups by eventfd(2): any thread, and any signal handler, makes a poller's wait end.

    event = LinuxEvent()
    poller.register(event.fileno(), IN)
    event.set()
"""

from __future__ import annotations

import os


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
