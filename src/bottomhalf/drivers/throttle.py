# SPDX-License-Identifier: Apache-2.0
"""Driver ``throttle``: a filter whose requests share the limits of a throttle group with those of others.

Reads and writes (zero writes and discards are writes) are limited, flushes are not. A batch that the limits leave room
for goes on as it is. The others wait at the group's member of this node, see ``block.throttling.group``. Reads that
would leave without coming by, straight from the page cache, are asked for here as well and count like the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bottomhalf.block.filter import Filter
from bottomhalf.block.throttling import ThrottleGroup, ThrottleMember
from bottomhalf.block.throttling.state import READ_DIRECTION, WRITE_DIRECTION
from bottomhalf.host.protocol import File
from bottomhalf.host.request import FLUSH, READ, Request

if TYPE_CHECKING:
    from bottomhalf.block import Graph, Node


class ThrottleNode(Filter):
    """A member of ``group`` above ``file``."""

    driver = "throttle"

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        file: Node,
        group: ThrottleGroup,
        read_only: bool = False,
        unmap: bool = False,
    ) -> None:
        super().__init__(graph, name, file=file, read_only=read_only, unmap=unmap)
        self.throttle_group = group.name
        self.member = ThrottleMember(group, self.name, self.context, self._send)

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        op = requests[0].op
        if op >= FLUSH and (op == FLUSH or (not self.unmap and self.ignores(requests))):
            return super().submit_batch(requests)
        if self.member.may_pass(READ_DIRECTION if op == READ else WRITE_DIRECTION, requests):
            return self.edge.node.submit_batch(requests)
        return self.member.submit(requests)

    def _send(self, requests: list[Request]) -> list[Request]:
        return self.edge.node.submit_batch(requests)

    def file_range(self, offset: int, length: int) -> tuple[File, int] | None:
        where = self.edge.node.file_range(offset, length)
        if where is None or not self.member.may_pass(READ_DIRECTION, [Request(READ, offset, length)]):
            return None
        return where

    def map_reads(self, requests: list[Request], offsets: list[int]) -> File | None:
        places = list(offsets)
        file = self.edge.node.map_reads(requests, places)
        if file is None or (requests and not self.member.may_pass(READ_DIRECTION, requests)):
            return None
        offsets[:] = places
        return file

    def drain_begin(self) -> None:
        self.member.drain_begin()

    def drain_end(self) -> None:
        """The node may be in another context now."""
        if self.member.context is not self.context:
            self.member.detach()
            self.member.attach(self.context)
        self.member.drain_end()

    def close(self) -> None:
        self.member.close()
