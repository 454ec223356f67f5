# SPDX-License-Identifier: Apache-2.0
"""The page cache as memory: reads that cost no system call and no copy of ours.

Reading a cached block by preadv2(2) costs a microsecond, most of it a copy that the socket then copies again.
Through a shared mapping of the file a reply can point at the page cache itself and only the socket copies; that
is a third less work for the whole server. The price is that touching a page that is *not* in memory waits for the
disk, in the middle of the loop, where RWF_NOWAIT would have said so.

Therefore a file is read through its mapping only while it behaves as if it were all in memory: after many cached
reads in a row without a miss, and until the first major fault of this thread, which costs one wait and ends it
until as many cached reads have been seen again. File systems whose pages may take arbitrarily long (network, FUSE)
are never mapped. The views are given to the kernel alone (sendmsg), which answers a truncated file with EFAULT;
our own code must not touch them, for that would be SIGBUS.
"""

from __future__ import annotations

import mmap
import os
import resource
from typing import Final

from bottomhalf.host.request import Request

MAP_AFTER_HITS: Final = 4096  # cached reads in a row before the file counts as being in memory
FAULT_LOOKS: Final = 8  # batches between two looks at the thread's fault counter (a microsecond each)

# Magic numbers of statfs(2) of file systems on local disks or in memory: ext2-4, xfs, btrfs, f2fs, tmpfs.
_LOCAL: Final = frozenset({0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994})
# Of those where a question may take as long as somebody else likes: nfs, smb, smb2, cifs, fuse, 9p, ceph, afs, lustre.
_REMOTE: Final = frozenset(
    (0x6969, 0x517B, 0xFE534D42, 0xFF534D42, 0x65735546, 0x01021997, 0x00C36400, 0x5346414F, 0x0BD00BD0)
)


class PageCacheMap:
    """The mapping of one file, and whether it may be used now. One thread."""

    __slots__ = ("_batches", "_faults", "_fd", "_hits", "_usable", "_view", "active", "size")

    def __init__(self, fd: int, *, usable: bool) -> None:
        self._fd = fd
        self._usable = usable
        self._hits = 0
        self._faults = 0
        self._batches = 0
        self._view: memoryview | None = None
        self.size = 0
        self.active = False

    def hit(self, count: int) -> None:
        """``count`` reads were served from the cache, none missed."""
        if self._usable:
            self._hits += count
            if self._hits >= MAP_AFTER_HITS:
                self._begin()

    def missed(self) -> None:
        self._hits = 0

    def _begin(self) -> None:
        self._hits = 0
        size = os.fstat(self._fd).st_size
        if self._view is None and not _is_local(self._fd):
            self._usable = False
            return
        if size != self.size or self._view is None:
            self._view = None  # views that are still out keep the old mapping alive
            try:
                self._view = memoryview(mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))
            except (OSError, ValueError, OverflowError):
                self._usable = False  # no room in the address space, or an empty file
                return
            self.size = size
        self._faults = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
        self.active = True

    def point(self, requests: list[Request], offsets: list[int]) -> bool:
        """Let the buffers of READs be the file's bytes at these offsets; False if that cannot be now."""
        self._batches += 1
        if self._batches % FAULT_LOOKS == 0:
            faults = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
            if faults != self._faults:
                self.active = False
                return False
        view, size = self._view, self.size
        if view is None:
            return False
        for request, start in zip(requests, offsets, strict=True):
            end = start + request.length
            if end > size:
                return False
            request.buffer = view[start:end]
        return True

    def close(self) -> None:
        self.active = False
        self._usable = False
        self._view = None


def is_remote(fd: int) -> bool:
    """Whether a file is on a network or FUSE file system."""
    from bottomhalf.host.linux.syscalls import file_system_type

    try:
        return file_system_type(fd) in _REMOTE
    except OSError:
        return True


def _is_local(fd: int) -> bool:
    from bottomhalf.host.linux.syscalls import file_system_type

    try:
        return file_system_type(fd) in _LOCAL
    except OSError:
        return False
