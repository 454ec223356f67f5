# SPDX-License-Identifier: Apache-2.0
"""Image locks that QEMU respects and that respect QEMU's.

QEMU guards an image with open-file-description locks on single bytes: a shared lock on byte 100 + n says "I hold
permission n", one on byte 200 + n says "I do not share permission n". To take a set, one first locks one's own
bytes (shared locks never collide with each other) and then asks of each opposite byte whether anybody has it: an
exclusive lock that could not be had means somebody does. Bytes that are no longer wanted are unlocked last.

The kernel does not say who holds an OFD lock (its pid is -1), but /proc/PID/fdinfo/FD lists the locks of each
descriptor. That is a search through /proc, done only to word an error.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final

from bottomhalf.host.linux.sockets import process_name
from bottomhalf.host.protocol import PERM_ALL, ImageInUse

HELD_BASE: Final = 100
UNSHARED_BASE: Final = 200
PERMISSION_NAMES: Final = ("consistent read", "write", "write unchanged", "resize")

_F_OFD_GETLK: Final = 36
_F_OFD_SETLK: Final = 37
_FLOCK: Final = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid


class ImageLocks:
    """The lock bytes that one descriptor holds."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self._locked: set[int] = set()

    def set(self, held: int, shared: int) -> None:
        """Lock for the permission masks. ``ImageInUse`` with everything as before if another opener conflicts;
        OSError (EINVAL, EOPNOTSUPP) where the file system has no such locks."""
        wanted = {HELD_BASE + n for n in _bits(held)} | {UNSHARED_BASE + n for n in _bits(PERM_ALL & ~shared)}
        added = wanted - self._locked
        try:
            for byte in sorted(added):
                self._lock(byte, fcntl.F_RDLCK)
            for n in _bits(held):
                self._refuse_if_taken(UNSHARED_BASE + n, f'Failed to get "{PERMISSION_NAMES[n]}" lock')
            for n in _bits(PERM_ALL & ~shared):
                self._refuse_if_taken(HELD_BASE + n, f'Failed to get shared "{PERMISSION_NAMES[n]}" lock')
        except OSError:
            for byte in added:
                self._lock(byte, fcntl.F_UNLCK)
            raise
        for byte in self._locked - wanted:
            self._lock(byte, fcntl.F_UNLCK)
        self._locked = wanted

    def take(self, other: ImageLocks) -> None:
        """Lock what another descriptor of the same image has locked; nobody is asked."""
        for byte in other._locked:
            self._lock(byte, fcntl.F_RDLCK)
        self._locked = set(other._locked)

    def move(self, fd: int) -> None:
        """Hold the locks through another descriptor of the file, which takes this one's number afterwards. With this
        one's own number: hold them here again, for that has not come about."""
        for byte in self._locked:
            fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        if fd != self._fd:
            for byte in self._locked:
                self._lock(byte, fcntl.F_UNLCK)  # the old opening may live on, in a request or a mapping

    def _lock(self, byte: int, kind: int) -> None:
        fcntl.fcntl(self._fd, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))

    def _refuse_if_taken(self, byte: int, message: str) -> None:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind = _FLOCK.unpack(fcntl.fcntl(self._fd, _F_OFD_GETLK, asked))[0]
        if kind == fcntl.F_UNLCK:
            return
        holders = sorted(set(_holders(self._path, self._fd, byte)))
        by = f" by {', '.join(holders)}" if holders else " by another process"
        raise ImageInUse(errno.EAGAIN, f"{message}: the image is in use{by}", self._path)


def _bits(mask: int) -> Iterator[int]:
    return (n for n in range(len(PERMISSION_NAMES)) if mask >> n & 1)


def _holders(path: str, own_fd: int, byte: int) -> Iterator[str]:
    """Processes that have a lock on the byte of the file, as far as /proc lets us see."""
    image = os.fstat(own_fd)
    own_pid = os.getpid()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # not ours to look at, or gone
        for number in descriptors:
            if int(pid) == own_pid and int(number) == own_fd:
                continue
            try:
                status = os.stat(f"/proc/{pid}/fd/{number}")
                if (status.st_dev, status.st_ino) != (image.st_dev, image.st_ino):
                    continue
                with open(f"/proc/{pid}/fdinfo/{number}") as info:
                    if any(_covers(line, byte) for line in info):
                        yield f"{process_name(int(pid))} (pid {pid})"
            except OSError:
                continue


def _covers(line: str, byte: int) -> bool:
    """Whether a "lock:" line of fdinfo covers the byte; the range is in its last two fields."""
    if not line.startswith("lock:"):
        return False
    first, last = line.split()[-2:]
    return int(first) <= byte and (last == "EOF" or byte <= int(last))
