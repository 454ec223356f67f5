# SPDX-License-Identifier: Apache-2.0
"""The memory of one connection: a few arenas, reused.

Fresh memory costs a page fault and a zeroed page per 4 KiB, more than reading the page from the cache. So arenas
are kept and handed out again, the most recently used first because it is still in the processor's cache; of the
big ones that a few large requests needed, no more are kept than the bound says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bottomhalf.exports.nbd.output import Buffer
from bottomhalf.host.protocol import Host

BUFFER_BYTES: Final = 1 << 20  # of an ordinary arena; larger copies fall out of the processor's cache
KEPT_BYTES_MAX: Final = 8 << 20  # of arenas that nobody uses, per connection; a single one may be larger
TOO_BIG: Final = 4  # an arena so many times larger than needed is not used for it


class BufferPool:
    """Arenas of one connection. Home thread only."""

    def __init__(self, host: Host, forget_views: Callable[[], object]) -> None:
        """``forget_views`` is asked, before an arena is closed, to let go of views that nobody needs."""
        self._host = host
        self._forget_views = forget_views
        self._free: list[Buffer] = []
        self._free_bytes = 0
        self._closed = False
        self.used_bytes = 0  # of arenas that have users
        self.allocated_bytes = 0  # in use and kept

    def take(self, size: int) -> Buffer:
        """A buffer of at least ``size`` bytes, but not of many times that, with one user."""
        rounded = -(-size // BUFFER_BYTES) * BUFFER_BYTES
        free = self._free
        for index in range(len(free) - 1, -1, -1):
            if rounded <= free[index].size <= TOO_BIG * rounded:
                buffer = free.pop(index)
                self._free_bytes -= buffer.size
                break
        else:
            buffer = Buffer(self._host.arena(rounded), self._give_back)
            self.allocated_bytes += rounded
        self.used_bytes += buffer.size
        buffer.users = 1
        return buffer

    def _give_back(self, buffer: Buffer) -> None:
        self.used_bytes -= buffer.size
        self._free.append(buffer)
        self._free_bytes += buffer.size
        kept_max, least = (0, 0) if self._closed else (KEPT_BYTES_MAX, 1)
        while self._free_bytes > kept_max and len(self._free) > least:
            largest = max(self._free, key=lambda each: each.size)
            self._free.remove(largest)
            self._free_bytes -= largest.size
            self._close_arena(largest)

    def _close_arena(self, buffer: Buffer) -> None:
        self._forget_views()
        self.allocated_bytes -= buffer.size
        buffer.arena.close()

    def close(self) -> None:
        """Keep nothing any more; what still has users goes when they do."""
        self._closed = True
        for buffer in self._free:
            self._close_arena(buffer)
        self._free.clear()
        self._free_bytes = 0
