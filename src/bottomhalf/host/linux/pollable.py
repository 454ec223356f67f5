# SPDX-License-Identifier: Apache-2.0
"""Whether a descriptor can be polled at all.

epoll refuses what has no readiness (a regular file, a directory, /dev/null) with EPERM. poll(2) and io_uring take it
and call it ready for ever, and a loop around them would spin. So the pollers built on those ask here first, and all
pollers refuse the same descriptors.

    check_pollable(fd)  # or PermissionError, or OSError with EBADF
"""

from __future__ import annotations

import errno
import os
import select
import stat
from typing import Final

from bottomhalf.host.linux.syscalls import error

_NEVER: Final = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFBLK)  # but for a few below /proc and /sys


def check_pollable(fd: int) -> None:
    """PermissionError (EPERM) for what cannot be polled, OSError (EBADF) for what is not open. Any thread."""
    if fd < 0:
        raise ValueError(f"file descriptor cannot be a negative integer ({fd})")
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind in _NEVER or kind == stat.S_IFCHR:
        _ask_epoll(fd, kind)


def _ask_epoll(fd: int, kind: int) -> None:
    """Only the file's driver knows, and only epoll asks it: /proc/mounts can be polled, /dev/null cannot."""
    try:
        epoll = select.epoll()
    except OSError:
        if kind in _NEVER:
            raise error(errno.EPERM) from None
        return
    with epoll:
        epoll.register(fd, 0)
