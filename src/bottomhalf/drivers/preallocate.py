# SPDX-License-Identifier: Apache-2.0
"""Driver ``preallocate``: a filter between a format and its file that allocates ahead of a growing image.

A format that allocates cluster by cluster makes the file longer with each, and a file system then allocates, and
writes metadata, each time. So the first write past the end zeroes ``prealloc-size`` bytes more than it needs, up to a
multiple of ``prealloc-align``, and what follows finds them there. The image does not get longer by that: its end is
where its parents have written or truncated to, and the file is cut back to it when nobody may write any more.

A file system that cannot zero by itself gets nothing ahead: writing zeroes would cost what is to be saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bottomhalf.aio import CoMutex, Coroutine, kick, wait_while
from bottomhalf.block import BlockError, permissions
from bottomhalf.block.filter import Filter
from bottomhalf.block.node import co_io
from bottomhalf.host.protocol import PERM_RESIZE, PERM_WRITE, PERM_WRITE_UNCHANGED
from bottomhalf.host.request import NO_FALLBACK, WRITE, WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block import Edge, Graph, Node

SIZE_DEFAULT: Final = 128 << 20  # QEMU's, like the next
ALIGN_DEFAULT: Final = 1 << 20
SECTOR_BYTES: Final = 512
WRITING: Final = PERM_WRITE | PERM_WRITE_UNCHANGED | PERM_RESIZE


class PreallocateNode(Filter):
    """A filter above ``file``."""

    driver = "preallocate"

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        file: Node,
        prealloc_size: int = SIZE_DEFAULT,
        prealloc_align: int = ALIGN_DEFAULT,
        read_only: bool = False,
        unmap: bool = False,
    ) -> None:
        if prealloc_align % SECTOR_BYTES:
            raise BlockError(f"prealloc-align parameter of preallocate filter is not aligned to {SECTOR_BYTES}")
        if file.request_alignment > 1 and prealloc_align % file.request_alignment:
            raise BlockError(
                "prealloc-align parameter of preallocate filter is not aligned to underlying node request alignment "
                f"({file.request_alignment})"
            )
        super().__init__(graph, name, file=file, read_only=read_only, unmap=unmap)
        self.prealloc_size = prealloc_size
        self.prealloc_align = max(prealloc_align, 1)
        self.data_end = self.file_end = file.size
        self._writers = False  # whether somebody above may write
        self._growing = CoMutex(f"another preallocation of {self.describe()}")
        self._storage = self._find_storage()  # what the two ends are of

    def open_size(self) -> int:
        return self.data_end

    def child_resized(self) -> None:
        """Ours is the say about the size; a file that others have resized while nobody wrote here is followed."""
        if not self._writers and self.data_end == self.file_end:
            self.data_end = self.file_end = self.below.size
        self.refresh_size()

    def refresh_limits(self) -> None:
        """Another file has an end of its own. Filters that come and go above the same one change nothing."""
        storage = self._find_storage()
        if storage is not self._storage:
            self._storage = storage
            storage.refresh_size()
            self.data_end = self.file_end = self.below.size
        super().refresh_limits()

    def _find_storage(self) -> Node:
        node = self.below
        while node.is_filter:
            node = node.children[0].node
        return node

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        if requests[0].op not in (WRITE, WRITE_ZEROES):
            return super().submit_batch(requests)
        end = max([request.offset + request.length for request in requests])
        if end <= self.data_end:
            return super().submit_batch(requests)
        if end <= self.file_end:
            self._grown(end)
            return super().submit_batch(requests)
        return [request for request in requests if self.start(request, self._co_growing(request))]

    def _grown(self, end: int) -> None:
        self.data_end = max(self.data_end, end)
        self.refresh_size()

    async def _co_growing(self, request: Request) -> None:
        end = request.offset + request.length
        async with self._growing:
            if end > self.file_end:
                await self._co_preallocate(end)
                self.file_end = max(self.file_end, end)  # what others zero begins behind what is on its way
        await self._co_io(request.op, request.offset, request.length, request.buffer, request.flags)
        self._grown(end)

    async def _co_preallocate(self, end: int) -> None:
        begin = self.file_end
        end = -(-(end + self.prealloc_size) // self.prealloc_align) * self.prealloc_align
        try:
            await self._co_io(WRITE_ZEROES, begin, end - begin, None, NO_FALLBACK)
        except OSError:
            return  # it was for speed only
        self.file_end = end

    async def _co_io(self, op: int, offset: int, length: int, buffer: memoryview | None, flags: int) -> None:
        await co_io(self.below, op, offset, length, buffer, flags, name=self.name)

    async def co_truncate(self, size: int) -> None:
        async with self._growing:
            # The file is shorter than it should be if a write that was to make it longer has failed.
            if size < self.data_end or size > min(self.file_end, self.below.open_size()):
                await self.below.co_truncate(size)
                self.file_end = size
            self.data_end = size
        self.refresh_size()

    # -- the end ------------------------------------------------------------------------------------------------

    def apply_permissions(self, held: int, shared: int) -> None:
        """When the last writer has gone, the file is cut back, soon: nothing may wait in here."""
        had, self._writers = self._writers, bool(held & WRITING)
        if had and not self._writers and self.file_end > self.data_end:
            self.context.schedule_oneshot(self._start_cutting)

    def _start_cutting(self) -> None:
        if self._is_to_be_cut() and self.graph.nodes.get(self.name) is self:
            self.in_flight += 1
            self.context.enter(self._co_cut_back())

    async def _co_cut_back(self) -> None:
        try:
            async with self._growing:
                if self._is_to_be_cut():
                    await self._co_cut()
        finally:
            self.in_flight -= 1
            kick()
        permissions.loosen(self)

    def _is_to_be_cut(self) -> bool:
        return self.active and not self._writers and self.file_end > self.data_end

    async def _co_cut(self) -> None:
        await self.below.co_truncate(self.data_end)
        self.file_end = self.data_end

    async def co_inactivate(self) -> None:
        """Later it is too late: others may have made the file longer by then."""
        async with self._growing:
            if self.file_end > self.data_end:
                await self._co_cut()
        await super().co_inactivate()

    def child_permissions(self, edge: Edge, held: int, shared: int) -> tuple[int, int]:
        """Who may write here makes the file longer, and nobody else may. That ends when the file is cut back."""
        if held & WRITING or self.file_end > self.data_end:
            held |= PERM_WRITE | PERM_RESIZE
        return held, shared & ~(PERM_WRITE | PERM_RESIZE)

    def close(self) -> None:
        """The node may still belong to an iothread, whose backend is just going."""
        if self.file_end <= self.data_end:
            return
        cutting = Coroutine(self.below.co_truncate(self.data_end), self.context)
        self.file_end = self.data_end
        self.context.schedule(self._co_tell(cutting))
        wait_while(self.context, lambda: not cutting.done, f"the end of {self.describe()}")
        cutting.result()

    async def _co_tell(self, cutting: Coroutine) -> None:
        self.context.enter(cutting)
        try:
            await cutting
        except OSError:
            pass  # close() raises it
        finally:
            kick()
