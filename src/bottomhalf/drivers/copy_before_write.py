# SPDX-License-Identifier: Apache-2.0
"""Driver ``copy-before-write``: what is about to be overwritten is copied to ``target`` first, so that the disk can be
read as it was when the filter was put in (by ``snapshot-access``, or by a backup).

A disk is divided into clusters. A write that touches one that is to be saved and has not been yet copies it first.
Meanwhile nobody else may write there, and those who read the snapshot there, from the disk itself, have to be done:
copying serialises (``block.serialising``), reading the snapshot passes the same gate as an ordinary request. Writes
to what is saved already go on as a list.

``bitmap`` says which parts belong to the snapshot; others are neither saved nor to be read (EACCES). What its reader
has discarded is not saved any more either.

If copying fails, or takes longer than ``cbw-timeout``: ``break-guest-write`` fails the write, and the snapshot stays
good; ``break-snapshot`` lets the write go on, and from then on nobody can read the snapshot (EACCES) and nothing more
is saved. A copy that was given up goes on by itself; a drain waits for it.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import kick
from bottomhalf.aio.errors import TimedOut
from bottomhalf.aio.together import give_up_after
from bottomhalf.block import BlockError
from bottomhalf.block.bitmap import DirtyBitmap
from bottomhalf.block.filter import Filter
from bottomhalf.block.node import co_io
from bottomhalf.block.serialising import RangeGate
from bottomhalf.block.zeroes import is_zero
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE
from bottomhalf.host.request import FLUSH, READ, WRITE, WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block import Edge, Graph, Node

CLUSTER_BYTES_MIN: Final = 65536  # QEMU's
CLUSTER_BYTES_MAX: Final = 1 << 30  # a write waits for a whole cluster; QEMU ends with an assertion somewhere above
COPY_BYTES_MAX: Final = 1 << 20  # copied at a time, QEMU's


class CopyBeforeWriteNode(Filter):
    """A filter above ``file`` that saves to ``target``."""

    driver = "copy-before-write"

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        file: Node,
        target: Node,
        bitmap: DirtyBitmap | None = None,
        break_snapshot: bool = False,
        timeout_ns: int = 0,
        min_cluster: int = 0,
        read_only: bool = False,
        unmap: bool = False,
    ) -> None:
        cluster = max(CLUSTER_BYTES_MIN, target.cluster_bytes, _check_cluster(min_cluster))
        to_copy = DirtyBitmap(file.size, cluster, full=bitmap is None)
        if bitmap is not None:
            try:
                to_copy.merge(bitmap)
            except BlockError as error:
                raise BlockError(
                    "Cannot create block-copy-state: Failed to merge bitmap "
                    f"'{bitmap.name}' to internal copy-bitmap: {error}"
                ) from error
        super().__init__(graph, name, file=file, read_only=read_only, unmap=unmap)
        self.target = self.attach(target, "target")
        self.break_snapshot = break_snapshot
        self.timeout_ns = timeout_ns
        self.snapshot_error = 0  # why the snapshot is broken, an errno
        self._cluster = cluster
        self._to_copy = to_copy
        self._whole = bitmap is None
        self._done = DirtyBitmap(file.size, cluster)
        self._access = DirtyBitmap(file.size, cluster)  # what may be read in the snapshot
        self._access.merge(to_copy)
        self._gate = RangeGate(f"copies and reads of the snapshot of {self.describe()}")

    def refresh_size(self) -> None:
        """Before anybody uses the filter, the disk may get another size. Afterwards it has become another disk, of
        which nothing was saved."""
        super().refresh_size()
        old = self._to_copy.size
        if self.size == old:
            return
        if self.parents or self._done.any(0, old):
            self.snapshot_error = self.snapshot_error or errno.EIO
            return
        for bitmap in (self._to_copy, self._done, self._access):
            bitmap.truncate(self.size)
        if self._whole and self.size > old:
            for bitmap in (self._to_copy, self._access):
                bitmap.set(old, self.size - old)

    # -- the disk -----------------------------------------------------------------------------------------------

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        op = requests[0].op
        if op in (READ, FLUSH) or self.snapshot_error or (op > FLUSH and not self.unmap and self.ignores(requests)):
            return super().submit_batch(requests)
        to_copy, saved, others = self._to_copy, list[Request](), list[Request]()
        for request in requests:
            (others if to_copy.any(request.offset, request.length) else saved).append(request)
        pending = list(self.edge.node.submit_batch(saved)) if saved else []
        for request in others:
            if self.start(request, self._co_write(request)):
                pending.append(request)
        return pending

    async def _co_write(self, request: Request) -> None:
        begin = request.offset // self._cluster * self._cluster
        end = -(-(request.offset + request.length) // self._cluster) * self._cluster
        try:
            try:
                await give_up_after(self._co_save(begin, end), self.timeout_ns)
            except TimedOut:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), self.name) from None
        except OSError as error:
            if not self.break_snapshot:
                raise
            self.snapshot_error = self.snapshot_error or error.errno or errno.EIO
        await co_io(self.edge.node, request.op, request.offset, request.length, request.buffer, request.flags)

    async def _co_save(self, begin: int, end: int) -> None:
        """Copy those of the clusters that are not saved yet."""
        self.in_flight += 1  # it may be left behind
        try:
            place = await self._gate.enter(begin, end, alone=True)
            try:
                end = min(end, self._to_copy.size)
                for first, last in self._to_copy.dirty_ranges(begin, end - begin):
                    step = max(COPY_BYTES_MAX, self._cluster)
                    for offset in range(first, last, step):
                        length = min(last - offset, step)
                        for piece in range(offset, offset + length, COPY_BYTES_MAX):
                            await self._co_copy(piece, min(offset + length - piece, COPY_BYTES_MAX))
                        self._to_copy.reset(offset, length)
                        self._done.set(offset, length)
            finally:
                self._gate.leave(place)
        finally:
            self.in_flight -= 1
            kick()

    async def _co_copy(self, offset: int, length: int) -> None:
        arena = self.context.host.arena(length)
        bounce = arena.view[:length]
        try:
            await co_io(self.edge.node, READ, offset, length, bounce)
            if is_zero(bounce):
                await co_io(self.target.node, WRITE_ZEROES, offset, length)
            else:
                await co_io(self.target.node, WRITE, offset, length, bounce)
        finally:
            bounce.release()
            arena.close()

    async def co_truncate(self, size: int) -> None:
        raise OSError(errno.ENOTSUP, "The disk cannot be resized while its old content is being saved", self.name)

    # -- the snapshot, for snapshot-access ------------------------------------------------------------------------

    def _check_access(self, offset: int, length: int) -> None:
        if self.snapshot_error or not self._access.all(offset, length):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), self.name)

    async def co_snapshot_read(self, offset: int, buffer: memoryview) -> None:
        """Read the disk as it was. OSError with EACCES for what does not belong to the snapshot, or if it is broken."""
        begin, end = offset, offset + len(buffer)
        while begin < end:
            self._check_access(begin, end - begin)
            saved, count = self._done.run(begin, end - begin)
            piece = buffer[begin - offset : begin - offset + count]
            if saved:
                await co_io(self.target.node, READ, begin, count, piece)
            else:
                place = await self._gate.enter(begin, begin + count, alone=False)
                try:
                    if self._done.any(begin, count):
                        continue  # it was copied while we waited
                    await co_io(self.edge.node, READ, begin, count, piece)
                finally:
                    self._gate.leave(place)
            begin += count
        self._check_access(offset, len(buffer))  # it may have been broken meanwhile

    async def co_snapshot_status(self, offset: int, length: int) -> tuple[int, int]:
        """Like co_block_status, of the disk as it was."""
        self._check_access(offset, length)
        saved, count = self._done.run(offset, length)
        if not saved:
            place = await self._gate.enter(offset, offset + count, alone=False)
            try:
                saved, count = self._done.run(offset, count)  # as it is after the wait
                if not saved:
                    status = await self.edge.node.co_block_status(offset, count)
            finally:
                self._gate.leave(place)
        if saved:
            status = await self.target.node.co_block_status(offset, count)
        self._check_access(offset, status[1])  # it may have been broken meanwhile
        return status

    async def co_snapshot_discard(self, offset: int, length: int) -> None:
        """The reader needs the range no more. Clusters that lie within it are not saved any more."""
        size = self._access.size
        begin = -(-offset // self._cluster) * self._cluster
        end = size if offset + length >= size else (offset + length) // self._cluster * self._cluster
        if begin >= end:
            return
        place = await self._gate.enter(begin, end, alone=True)
        try:
            self._access.reset(begin, end - begin)
            self._to_copy.reset(begin, end - begin)
        finally:
            self._gate.leave(place)
        await self.target.node.co_discard(begin, end - begin)

    # -- permissions ----------------------------------------------------------------------------------------------

    def child_permissions(self, edge: Edge, held: int, shared: int) -> tuple[int, int]:
        """The target may be written by others, for the disk may be its backing image. The disk itself only through
        the filter, once somebody uses it."""
        if edge is not self.edge:
            return PERM_WRITE, PERM_ALL & ~PERM_RESIZE
        if held & PERM_WRITE:
            held |= PERM_CONSISTENT_READ
        if self.parents:
            shared &= ~(PERM_WRITE | PERM_RESIZE)
        return held, shared


def _check_cluster(size: int) -> int:
    if size & (size - 1):
        raise BlockError("Cannot create block-copy-state: min-cluster-size needs to be a power of 2")
    if size > CLUSTER_BYTES_MAX:
        raise BlockError(f"Cannot create block-copy-state: min-cluster-size too large: {size} > {CLUSTER_BYTES_MAX}")
    return size

