# SPDX-License-Identifier: Apache-2.0
"""Driver ``snapshot-access``: a disk as it was when a ``copy-before-write`` filter was put above it, as a node that can
be exported, read-only.

Above other nodes it opens as well, and every read fails with ENOTSUP. A discard tells the filter that the range has
been read and need not be saved any more.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from bottomhalf.block import Node
from bottomhalf.drivers.copy_before_write import CopyBeforeWriteNode
from bottomhalf.host.protocol import PERM_ALL
from bottomhalf.host.request import DISCARD, FLUSH, READ, Request

if TYPE_CHECKING:
    from bottomhalf.block import Edge, Graph


class SnapshotAccessNode(Node):
    """A view through ``file``, which is the filter."""

    driver = "snapshot-access"

    def __init__(
        self, graph: Graph, name: str = "", *, file: Node, read_only: bool = False, unmap: bool = False
    ) -> None:
        super().__init__(graph, name, read_only=read_only, unmap=unmap)
        self.context = file.context
        self._edge = self.attach(file, "file")
        self.size = file.size

    def open_size(self) -> int:
        return self._edge.node.size

    def _filter(self) -> CopyBeforeWriteNode:
        node = self._edge.node
        if not isinstance(node, CopyBeforeWriteNode):
            raise OSError(errno.ENOTSUP, f"{node.describe()} keeps no snapshot", self.name)
        return node

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        if requests[0].op == FLUSH:
            return self.finish(requests, 0)
        return [request for request in requests if self.start(request, self._co_request(request))]

    async def _co_request(self, request: Request) -> None:
        if request.op == READ:
            await self._filter().co_snapshot_read(request.offset, request.buffer)
        elif request.op == DISCARD:
            await self._filter().co_snapshot_discard(request.offset, request.length)
        else:
            raise OSError(errno.ENOTSUP, "what was cannot be written", self.name)

    def block_status(self, offset: int, length: int) -> tuple[int, int] | None:
        return None

    async def co_block_status(self, offset: int, length: int) -> tuple[int, int]:
        return await self._filter().co_snapshot_status(offset, length)

    def child_permissions(self, edge: Edge, held: int, shared: int) -> tuple[int, int]:
        """None are needed: the filter has those that its snapshot needs."""
        return 0, PERM_ALL
