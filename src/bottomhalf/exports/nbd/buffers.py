# SPDX-License-Identifier: Apache-2.0
"""The memory of one connection: a few arenas, reused.

Fresh memory costs a page fault and a zeroed page per 4 KiB, more than reading the page from the cache. So arenas
are kept and handed out again, the most recently used first because it is still in the processor's cache; of the
big ones that a few large requests needed, no more are kept than the bound says.
"""

from __future__ import annotations

from typing import Final

from bottomhalf.exports.nbd.output import Buffer
from bottomhalf.host.protocol import Host

BUFFER_BYTES: Final = 1 << 20  # of an ordinary arena; larger copies fall out of the processor's cache
KEPT_BYTES_MAX: Final = 8 << 20  # of arenas that nobody uses, per connection


class BufferPool:
    """Arenas of one connection. Home thread only."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._free: list[Buffer] = []
        self._free_bytes = 0
        self.allocated_bytes = 0  # in use and kept

    def take(self, size: int) -> Buffer:
        """A buffer of at least ``size`` bytes with one user."""
        free = self._free
        for index in range(len(free) - 1, -1, -1):
            if free[index].size >= size:
                buffer = free.pop(index)
                self._free_bytes -= buffer.size
                buffer.users = 1
                return buffer
        rounded = BUFFER_BYTES
        while rounded < size:
            rounded *= 2
        buffer = Buffer(self._host.arena(rounded), self._give_back)
        self.allocated_bytes += rounded
        buffer.users = 1
        return buffer

    def _give_back(self, buffer: Buffer) -> None:
        self._free.append(buffer)
        self._free_bytes += buffer.size
        while self._free_bytes > KEPT_BYTES_MAX and len(self._free) > 1:
            largest = max(self._free, key=lambda each: each.size)
            self._free.remove(largest)
            self._free_bytes -= largest.size
            self.allocated_bytes -= largest.size
            largest.arena.close()

    def close(self) -> None:
        for buffer in self._free:
            buffer.arena.close()
        self._free.clear()
        self._free_bytes = 0
