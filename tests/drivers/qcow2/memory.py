# SPDX-License-Identifier: Apache-2.0
"""A file that is only memory, done at once, and counts: what an image costs is asked of it, not of a clock."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from bottomhalf.block import Node
from bottomhalf.host.protocol import DATA, ZERO
from bottomhalf.host.request import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, Request
from bottomhalf.host.sim.store import Store

if TYPE_CHECKING:
    from bottomhalf.block import Graph

FILE_BYTES_MAX: Final = 1 << 62  # as file systems have a limit


class Overwork(BaseException):
    """More was asked than any honest image asks. Not an Exception: nobody may take it for one of his own."""


class MemoryNode(Node):
    """``requests_max`` and ``bytes_max`` bound what may be asked before it is Overwork."""

    driver = "memory"
    is_protocol = True
    handles_fua = True

    def __init__(self, graph: Graph, name: str, store: Store, *, requests_max: int, bytes_max: int) -> None:
        super().__init__(graph, name, unmap=True)
        self.store = store
        self.requests = self.bytes = self.changes = 0
        self._requests_max = requests_max
        self._bytes_max = bytes_max
        self.monitor_owned = True
        self.refresh_size()

    def open_size(self) -> int:
        return self.store.size

    def allocated_size(self) -> int:
        return len(self.store.pages) * 4096

    def block_status(self, offset: int, length: int) -> tuple[int, int]:
        data, count = self.store.extent(offset, length)
        return (DATA if data else ZERO), max(min(count, length), 1)

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        for request in requests:
            request.result = self._serve(request)
        return []

    def _serve(self, request: Request) -> int:
        op, offset, length = request.op, request.offset, request.length
        self.requests += 1
        if op in (READ, WRITE):
            self.bytes += length
        if self.requests > self._requests_max or self.bytes > self._bytes_max:
            raise Overwork(f"{self.requests} requests, {self.bytes} bytes")
        if op == READ:
            if offset + length > self.store.size:
                return -errno.EIO
            self.store.read_into(offset, request.buffer)
            return 0
        if op == FLUSH:
            return 0
        self.changes += 1
        if offset + length > FILE_BYTES_MAX:
            return -errno.EFBIG
        if op == WRITE:
            self.store.write(offset, request.buffer)
        elif op == WRITE_ZEROES:
            self._zero(offset, length)
        elif op == DISCARD:
            self._zero(offset, min(length, max(self.store.size - offset, 0)))
        self.refresh_size()
        return 0

    def _zero(self, offset: int, length: int) -> None:
        if length > 0:
            self.store.zero(offset, length, unmap=True, grow=True)

    async def co_truncate(self, size: int) -> None:
        if size > FILE_BYTES_MAX:
            raise OSError(errno.EFBIG, "too large", self.name)
        self.changes += 1
        self.store.resize(size)
        self.refresh_size()
