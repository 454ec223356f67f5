# SPDX-License-Identifier: Apache-2.0
"""What all filters have in common: one child that holds the data, whose bytes they do not move.

A filter that changes nothing is this class. What a subclass does not define goes to the child as it came, lists as
lists. It is told what the child knows (size, alignments, status, where the bytes are) and tells it on.

    class Counting(Filter):
        driver = "counting"
        def submit_batch(self, requests: list[Request]) -> list[Request]:
            self.count += len(requests)
            return super().submit_batch(requests)

A subclass that must see every read has to close the two ways by which reads leave without it: ``file_range`` and
``map_reads``, which tell where the stored bytes are.

Like every node, a filter whose ``discard`` option is not ``unmap`` lets no discard through and makes no hole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bottomhalf.block.node import Node
from bottomhalf.host.protocol import File
from bottomhalf.host.request import DISCARD, FLUSH, MAY_UNMAP, WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.resize import Preallocation


class Filter(Node):
    """A node above ``file`` that passes on what it does not handle. ``edge_name`` is what the child is called."""

    is_filter = True

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        file: Node,
        read_only: bool = False,
        unmap: bool = False,
        edge_name: str = "file",
    ) -> None:
        super().__init__(graph, name, read_only=read_only, unmap=unmap)
        self.context = file.context
        self.request_alignment = file.request_alignment
        self.memory_alignment = file.memory_alignment
        self.edge = self.attach(file, edge_name)
        self.size = file.size

    @property
    def below(self) -> Node:
        """The node that holds the data."""
        return self.edge.node

    @property
    def can_compress(self) -> bool:
        return self.edge.node.can_compress

    @property
    def cluster_bytes(self) -> int:
        return self.edge.node.cluster_bytes

    @property
    def has_backing(self) -> bool:
        return self.edge.node.has_backing

    def open_size(self) -> int:
        return self.edge.node.size

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        if not self.unmap and requests[0].op > FLUSH and self.ignores(requests):
            return self.finish(requests, 0)
        return self.edge.node.submit_batch(requests)

    def ignores(self, requests: list[Request]) -> bool:
        """For a node that may not unmap: whether the batch is of discards, with which there is nothing to do. Zero
        writes lose their permission to make holes."""
        op = requests[0].op
        if op == WRITE_ZEROES:
            for request in requests:
                request.flags &= ~MAY_UNMAP
        return op == DISCARD

    def block_status(self, offset: int, length: int) -> tuple[int, int] | None:
        return self.edge.node.block_status(offset, length)

    async def co_block_status(self, offset: int, length: int) -> tuple[int, int]:
        return await self.edge.node.co_block_status(offset, length)

    async def co_is_allocated(self, offset: int, length: int, bottom: Node | None = None) -> tuple[bool, int]:
        return await self.edge.node.co_is_allocated(offset, length, bottom)

    def is_allocated(self, offset: int, length: int, bottom: Node | None = None) -> tuple[bool, int] | None:
        return self.edge.node.is_allocated(offset, length, bottom)

    def file_range(self, offset: int, length: int) -> tuple[File, int] | None:
        return self.edge.node.file_range(offset, length)

    def map_reads(self, requests: list[Request], offsets: list[int]) -> File | None:
        return self.edge.node.map_reads(requests, offsets)

    def hold_bytes(self) -> Callable[[], object] | None:
        return self.edge.node.hold_bytes()

    def prefetch(self, offset: int, length: int) -> None:
        self.edge.node.prefetch(offset, length)

    def debug_event(self, event: str) -> None:
        self.edge.node.debug_event(event)

    async def co_debug_event(self, event: str) -> None:
        await self.edge.node.co_debug_event(event)

    async def co_truncate(self, size: int) -> None:
        await self.edge.node.co_truncate(size)

    async def co_grow(self, size: int, preallocation: Preallocation) -> None:
        """The child takes its space before anybody is told that there is more. A subclass that has its own way to
        another size goes that way."""
        if type(self).co_truncate is Filter.co_truncate:
            await self.edge.node.co_grow(size, preallocation)
        else:
            await super().co_grow(size, preallocation)
