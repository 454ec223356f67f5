# SPDX-License-Identifier: Apache-2.0
"""Driver ``raw``: the bytes of another node as they are, or a window of them (``offset``, ``size``)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block import BlockError, Node
from bottomhalf.host.protocol import File
from bottomhalf.host.request import DISCARD, FLUSH, MAY_UNMAP, WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block import Graph, Transaction
    from bottomhalf.block.copying import CopyTo
    from bottomhalf.block.resize import Preallocation

SECTOR_BYTES: Final = 512  # what QEMU counts image sizes in


class RawNode(Node):
    """A window on ``file`` from byte ``offset`` on, ``size`` bytes long (None: up to the end).

    It can be opened over a read-only node like over any other, who wants to write is refused then; with
    ``auto_read_only`` it says itself that it is read-only. The window may begin anywhere: a file with an alignment
    pads what does not fit."""

    driver = "raw"

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        file: Node,
        offset: int = 0,
        size: int | None = None,
        read_only: bool = False,
        auto_read_only: bool = False,
        unmap: bool = False,
    ) -> None:
        _check_window(file.size, offset, size)
        super().__init__(graph, name, read_only=read_only or (auto_read_only and file.read_only), unmap=unmap)
        self.offset = offset
        self.fixed_size = size
        self.context = file.context
        self.memory_alignment = file.memory_alignment
        self.request_alignment = file.request_alignment
        self._edge = self.attach(file, "file")
        self.size = self.open_size()

    def reopen(self, options: Any, transaction: Transaction) -> set[str]:
        """Another window, and perhaps another child."""
        file, branch = self._edge.node, options.branch
        offset = branch.offset or 0
        _check_window(file.size, offset, branch.size)
        old = (self.offset, self.fixed_size)
        transaction.add(abort=lambda: self._set_window(*old))
        self._set_window(offset, branch.size)
        if options.auto_read_only and file.read_only:
            self.read_only = True
        return {"offset", "size"}

    def _set_window(self, offset: int, size: int | None) -> None:
        self.offset, self.fixed_size = offset, size

    def refresh_limits(self) -> None:
        self.memory_alignment = self._edge.node.memory_alignment
        self.request_alignment = self._edge.node.request_alignment

    def open_size(self) -> int:
        if self.fixed_size is not None:
            return self.fixed_size
        return max(self._edge.node.size - self.offset, 0)

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        op = requests[0].op
        if not self.unmap and op > FLUSH:
            if op == DISCARD:
                return self.finish(requests, 0)
            if op == WRITE_ZEROES:
                for request in requests:
                    request.flags &= ~MAY_UNMAP
        if self.fixed_size is not None and op != FLUSH:
            requests = self._inside(requests, self.fixed_size)
            if not requests:
                return requests
        if self.offset and op != FLUSH:
            offset = self.offset
            for request in requests:
                request.offset += offset
        child = self._edge.node
        if op < FLUSH:
            child.debug_event("write_aio" if op else "read_aio")
        return child.submit_batch(requests)

    def _inside(self, requests: list[Request], size: int) -> list[Request]:
        """Fail those that do not end within the window: a format on top may try to grow, and would write into what lies
        behind it."""
        beyond = [request for request in requests if request.offset + request.length > size]
        if not beyond:
            return requests
        self.finish(beyond, -errno.ENOSPC if beyond[0].op else -errno.EIO)
        failed = {id(request) for request in beyond}
        return [request for request in requests if id(request) not in failed]

    def block_status(self, offset: int, length: int) -> tuple[int, int] | None:
        return self._edge.node.block_status(offset + self.offset, length)

    async def co_block_status(self, offset: int, length: int) -> tuple[int, int]:
        return await self._edge.node.co_block_status(offset + self.offset, length)

    def file_range(self, offset: int, length: int) -> tuple[File, int] | None:
        return self._edge.node.file_range(offset + self.offset, length)

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        child = self._edge.node
        child.debug_event("read_aio")
        return child.pread_nowait(length, offset + self.offset)

    def map_reads(self, requests: list[Request], offsets: list[int]) -> File | None:
        shifted = [offset + self.offset for offset in offsets] if self.offset else offsets
        file = self._edge.node.map_reads(requests, shifted)
        if file is not None:
            offsets[:] = shifted
        return file

    def hold_bytes(self) -> Callable[[], object] | None:
        return self._edge.node.hold_bytes()

    def written_below(self, end: int) -> list[tuple[Node, int]]:
        return [(self._edge.node, end + self.offset)]

    def prefetch(self, offset: int, length: int) -> None:
        self._edge.node.prefetch(offset + self.offset, length)

    async def co_truncate(self, size: int) -> None:
        if self.fixed_size is not None:
            raise OSError(errno.ENOTSUP, "Cannot resize fixed-size raw disks", self.name)
        await self._edge.node.co_truncate(self.offset + size)

    async def co_grow(self, size: int, preallocation: Preallocation) -> None:
        if self.fixed_size is not None:
            raise OSError(errno.ENOTSUP, "Cannot resize fixed-size raw disks", self.name)
        await self._edge.node.co_grow(self.offset + size, preallocation)

    async def co_copy_range_from(self, offset: int, length: int, to: CopyTo) -> None:
        await self._edge.node.co_copy_range_from(offset + self.offset, length, to)

    async def co_copy_range_to(self, offset: int, length: int, file: File, file_offset: int, flags: int) -> None:
        await self._edge.node.co_copy_range_to(offset + self.offset, length, file, file_offset, flags)


def _check_window(file_size: int, offset: int, size: int | None) -> None:
    for name, value in (("offset", offset), ("size", size or 0)):
        if value < 0:
            raise BlockError(f"Value '{value}' is out of range for parameter '{name}'")
    if size is None:
        if offset > file_size:
            raise BlockError(f"Offset ({offset}) cannot be greater than size of the containing file ({file_size})")
        return
    if offset + size > file_size:
        raise BlockError(
            f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the "
            f" actual size of the containing file ({file_size})"
        )
    if size % SECTOR_BYTES:
        raise BlockError("Specified size is not multiple of 512")
