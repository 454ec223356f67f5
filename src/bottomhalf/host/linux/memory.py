# SPDX-License-Identifier: Apache-2.0
"""Memory that requests point into.

A ``bytes`` per request makes the C library grow and shrink the heap per batch, which halves the throughput. A
mapping of its own is page-aligned (O_DIRECT wants that), has an address that a ring entry can name, and costs
nothing after the first touch.
"""

from __future__ import annotations

import mmap


class LinuxArena:
    """A host.protocol.Arena: an anonymous private mapping."""

    __slots__ = ("_map", "address", "size", "view")

    def __init__(self, size: int) -> None:
        from bottomhalf.host.linux.syscalls import address_of

        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.size = size
        self.view = memoryview(self._map)
        self.address = address_of(self.view)

    def close(self) -> None:
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            pass  # somebody still looks: the mapping goes when the last view does
