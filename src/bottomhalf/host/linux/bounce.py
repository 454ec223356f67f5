# SPDX-License-Identifier: Apache-2.0
"""Memory that O_DIRECT and the kernel's rings accept, for requests whose own they do not.

A fresh mapping costs two system calls and a page fault per page, and most requests that need one need it again. So
buffers are kept when their request is done: by size, a power of two, and no more than KEPT_BYTES_MAX altogether. A
larger one than BUFFER_BYTES_MAX is made and given back each time; copying that many bytes costs more.

Taken in one thread and given back in another, so there is a lock, held for a few instructions.
"""

from __future__ import annotations

import mmap
from threading import Lock
from typing import Final

from bottomhalf.host.linux.memory import LinuxArena

KEPT_BYTES_MAX: Final = 16 << 20  # idle buffers of the whole program; 32 requests of 512 KiB
BUFFER_BYTES_MAX: Final = 1 << 20


class BouncePool:
    """Buffers, kept for the next."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: dict[int, list[LinuxArena]] = {}
        self.kept_bytes = 0

    def take(self, length: int) -> LinuxArena:
        """A page-aligned buffer of at least ``length`` bytes, with whatever is in it. OSError: ENOMEM."""
        size = max(1 << max(length - 1, 0).bit_length(), mmap.PAGESIZE)
        if size > BUFFER_BYTES_MAX:
            return LinuxArena(length)
        with self._lock:
            same = self._kept.get(size)
            if same:
                self.kept_bytes -= size
                return same.pop()
        return LinuxArena(size)

    def give(self, arena: LinuxArena) -> None:
        """It is not used any more. Nobody may have a view of it."""
        size = arena.size
        with self._lock:
            if size <= BUFFER_BYTES_MAX and self.kept_bytes + size <= KEPT_BYTES_MAX:
                self.kept_bytes += size
                self._kept.setdefault(size, []).append(arena)
                return
        arena.close()


POOL: Final = BouncePool()
