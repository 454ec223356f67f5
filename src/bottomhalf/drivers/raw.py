# SPDX-License-Identifier: Apache-2.0
"""Driver ``raw``: the bytes of another node as they are, or a window of them (``offset``, ``size``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bottomhalf.block import BlockError, Node
from bottomhalf.host.protocol import File
from bottomhalf.host.request import DISCARD, FLUSH, MAY_UNMAP, WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block import Graph


class RawNode(Node):
    """A window on ``file`` from byte ``offset`` on, ``size`` bytes long (None: up to the end)."""

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
        unmap: bool = False,
    ) -> None:
        super().__init__(graph, name, read_only=read_only or file.read_only, unmap=unmap)
        self.offset = offset
        self.fixed_size = size
        self.context = file.context
        self._edge = self.attach(file, "file")
        self.memory_alignment = file.memory_alignment
        self.request_alignment = file.request_alignment
        try:
            if offset < 0:
                raise BlockError("Parameter 'offset' is negative")
            if size is not None and size < 0:
                raise BlockError("Parameter 'size' is negative")
            if offset % self.request_alignment:
                raise BlockError(f"offset {offset} is not a multiple of the {self.request_alignment} byte alignment")
            if offset + (size or 0) > file.size:
                raise BlockError(
                    f"The window from offset {offset}, {size or 0} bytes, ends beyond the end of the file "
                    f"({file.size} bytes)"
                )
            self.size = self.open_size()
        except BaseException:
            graph.forget(self)
            raise

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
        if self.offset:
            offset = self.offset
            for request in requests:
                request.offset += offset
        return self._edge.node.submit_batch(requests)

    def block_status(self, offset: int, length: int) -> tuple[int, int] | None:
        return self._edge.node.block_status(offset + self.offset, length)

    async def co_block_status(self, offset: int, length: int) -> tuple[int, int]:
        return await self._edge.node.co_block_status(offset + self.offset, length)

    def file_range(self, offset: int, length: int) -> tuple[File, int] | None:
        return self._edge.node.file_range(offset + self.offset, length)

    def prefetch(self, offset: int, length: int) -> None:
        self._edge.node.prefetch(offset + self.offset, length)
