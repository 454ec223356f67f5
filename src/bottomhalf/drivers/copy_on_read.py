# SPDX-License-Identifier: Apache-2.0
"""Driver ``copy-on-read``: what is read from a backing image is stored in the image itself, so that it need not be
fetched again.

With ``bottom``, only what is stored in nodes down to and with that one is copied; what lies deeper stays there.

Whether there is anything to copy is a question to the image below. One without a backing image (``has_backing`` is
false) has all there is, and lists pass as they are. Above one that has, a read asks piece by piece where its bytes are
stored. Copying takes whole clusters, and between the read from below and the write nobody may write there, or the copy
would overwrite what is newer: copying serialises (``block.serialising``), and whether it is still needed is asked
again behind the gate. The image itself has the gate (``block.watching``): others may write to it without the filter.

The copy changes no byte that anybody can read. So it needs the permission "write unchanged" only, and always: also
when nobody above may write.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

from bottomhalf.block import BlockError
from bottomhalf.block.filter import Filter
from bottomhalf.block.node import co_io
from bottomhalf.block.serialising import RangeGate
from bottomhalf.block.watching import behind_gate, drop_gate, share_gate
from bottomhalf.block.zeroes import is_zero
from bottomhalf.host.protocol import PERM_WRITE_UNCHANGED, File
from bottomhalf.host.request import FLUSH, READ, WRITE, WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block import Edge, Graph, Node

BOUNCE_BYTES_MAX: Final = 16 << 20  # QEMU's, per step


class CopyOnReadNode(Filter):
    """A filter above ``file``."""

    driver = "copy-on-read"

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        file: Node,
        bottom: Node | None = None,
        read_only: bool = False,
        unmap: bool = False,
    ) -> None:
        if bottom is not None and bottom.is_filter:
            raise BlockError(f"Bottom node '{bottom.name}' is a filter")
        self.bottom = bottom
        self._gate: RangeGate | None = None
        self._gated: Node | None = None  # whose gate it is
        with graph.holding(file), graph.drained(file) if file.has_backing else nullcontext():
            super().__init__(graph, name, file=file, read_only=read_only, unmap=unmap)
            self._take_gate()  # what is on its way already would not pass it: so the image is drained

    def refresh_limits(self) -> None:
        super().refresh_limits()
        self._take_gate()

    def _take_gate(self) -> None:
        """That of an image to which something may have to be copied. It is drained, and the one before."""
        node = self.edge.node if self.edge.node.has_backing else None
        if node is self._gated:
            return
        self._drop_gate()
        if node is not None:
            self._gated, self._gate = node, share_gate(node)

    def _drop_gate(self) -> None:
        if self._gated is not None:
            drop_gate(self._gated)
        self._gated = self._gate = None

    def close(self) -> None:
        while (node := self._gated) is not None:
            with self.graph.drained(node):
                if self._gated is node:  # else another has come in its place meanwhile
                    self._drop_gate()

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        op, child = requests[0].op, self.edge.node
        if not child.has_backing or op == FLUSH:
            return child.submit_batch(requests) if op <= FLUSH else super().submit_batch(requests)
        if op == READ:
            return self._submit_reads(requests)
        return super().submit_batch(requests)

    def _submit_reads(self, requests: list[Request]) -> list[Request]:
        """Those whose bytes are all stored above go on as a list."""
        child = self.edge.node
        stored, others = list[Request](), list[Request]()
        for request in requests:
            allocated = child.is_allocated(request.offset, request.length)
            whole = allocated is not None and allocated[0] and allocated[1] >= request.length
            (stored if whole else others).append(request)
        pending = list(child.submit_batch(stored)) if stored else []
        for request in others:
            if self.start(request, self._co_read(request)):
                pending.append(request)
        return pending

    async def _co_read(self, request: Request) -> None:
        begin, end = request.offset, request.offset + request.length
        while begin < end:
            length = min(end - begin, BOUNCE_BYTES_MAX)
            to_copy, count = await self._co_wants_copy(begin, length)
            buffer = request.buffer[begin - request.offset : begin - request.offset + count]
            if to_copy:
                await self._co_copy(begin, count)
            await self._co_io(READ, begin, count, buffer, 0)
            begin += count

    async def _co_wants_copy(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether the first ``count`` bytes are to be copied."""
        child = self.edge.node
        allocated, count = await child.co_is_allocated(offset, length)
        if allocated:
            return False, count
        if self.bottom is None:
            return True, count
        return await child.co_is_allocated(offset, count, self.bottom)

    async def _co_copy(self, offset: int, length: int) -> None:
        """Store the clusters that the range touches, as far as they are not stored yet."""
        child = self.edge.node
        cluster = max(child.cluster_bytes, self.request_alignment)
        begin = offset // cluster * cluster
        end = min(-(-(offset + length) // cluster) * cluster, child.size)
        gate = self._gate
        assert gate is not None, "the image had no backing image when the filter came to it"
        place = await gate.enter(begin, end, alone=True)
        try:
            while begin < end:
                to_copy, count = await self._co_wants_copy(begin, min(end - begin, BOUNCE_BYTES_MAX))
                if to_copy:
                    await self._co_copy_piece(begin, count)
                begin += count
        finally:
            gate.leave(place)

    async def _co_copy_piece(self, offset: int, length: int) -> None:
        arena = self.context.host.arena(length)
        bounce = arena.view[:length]
        try:
            await self._co_io(READ, offset, length, bounce, 0)
            await self.edge.node.co_debug_event("cor_write")
            if is_zero(bounce):
                await self._co_io(WRITE_ZEROES, offset, length, None, 0)
            else:
                await self._co_io(WRITE, offset, length, bounce, 0)
        finally:
            bounce.release()
            arena.close()

    async def _co_io(self, op: int, offset: int, length: int, buffer: memoryview | None, flags: int) -> None:
        node = self.edge.node
        submit = behind_gate(node) if op in (WRITE, WRITE_ZEROES) else None
        await co_io(node, op, offset, length, buffer, flags, submit=submit, name=self.name)

    def file_range(self, offset: int, length: int) -> tuple[File, int] | None:
        return None if self.edge.node.has_backing else super().file_range(offset, length)

    def map_reads(self, requests: list[Request], offsets: list[int]) -> File | None:
        return None if self.edge.node.has_backing else super().map_reads(requests, offsets)

    def child_permissions(self, edge: Edge, held: int, shared: int) -> tuple[int, int]:
        return held | PERM_WRITE_UNCHANGED, shared | PERM_WRITE_UNCHANGED
