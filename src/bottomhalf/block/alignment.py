# SPDX-License-Identifier: Apache-2.0
"""Requests that are not multiples of a node's alignment (O_DIRECT): pad reads, read-modify-write writes.

A read takes the larger, aligned range into a bounce buffer and copies out what was asked for. A write has to read
the blocks at its two ends first. Between that read and the write nobody else may write there, or one of the two
writes is lost. Nobody means nobody: not another user of the node, not one who comes through another window onto
it. Therefore the node that has the alignment pads, not the backend above, and it has a gate: ordinary writes pass
it together, a read-modify-write has its blocks for itself (see ``serialising``).

    aligner = Aligner(node, node.submit_aligned)       # in a driver
    pending = aligner.submit(requests)                 # any offsets and lengths; not for FLUSH

Zero writes and discards that do not fit are cut: the aligned middle goes on as what it is, the ends are written as
zeroes or, for a discard, left.

An image whose size is not a multiple of the alignment can be read to its end, the padded read ends there. A write
to the last block would make the file longer. Therefore it takes the permission to resize (see ``permissions``), and
then the node has a new, round size.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

from bottomhalf.block.serialising import RangeGate
from bottomhalf.host.request import (
    DISCARD,
    FUA,
    NO_FALLBACK,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)

if TYPE_CHECKING:
    from bottomhalf.block.node import Node

Submit: TypeAlias = Callable[[list[Request]], list[Request]]


class Aligner:
    """What stands before a driver that takes aligned requests only. ``submit`` is the driver's own door."""

    def __init__(self, node: Node, submit: Submit) -> None:
        alignment = node.request_alignment
        assert alignment & (alignment - 1) == 0, "alignments are powers of two"
        self._node = node
        self._alignment = alignment
        self._submit = submit
        self._gate = RangeGate(f"other writes to {node.describe()}")

    def submit(self, requests: list[Request]) -> list[Request]:
        """Take requests of one op; returns those that are not done yet. A request of no bytes is done."""
        mask = self._alignment - 1
        fitting, others = requests, []
        if not _all_fit(requests, mask):
            fitting = []
            for request in requests:
                if not request.length:
                    request.result = 0
                elif (request.offset | request.length) & mask:
                    others.append(request)
                else:
                    fitting.append(request)
        pending: list[Request] = []
        if fitting:
            if requests[0].op == READ:
                pending += self._submit(fitting)
            else:
                clear = self._gate.clear(fitting)
                if clear:
                    pending += self._gate.submit(clear, self._submit)
                if len(clear) < len(fitting):  # a read-modify-write is going on there: they wait their turn
                    passed = {id(request) for request in clear}
                    others += [request for request in fitting if id(request) not in passed]
        for request in others:
            if self._node.start(request, self._serve(request)):
                pending.append(request)
        return pending

    @asynccontextmanager
    async def passage(self, offset: int, length: int) -> AsyncIterator[None]:
        """Inside, a coroutine of the driver's own may write the range. ENOTSUP if it is not one of whole blocks."""
        if (offset | length) & (self._alignment - 1):
            raise OSError(errno.ENOTSUP, "the ends of the range would have to be written", self._node.name)
        place = await self._gate.enter(offset, offset + length, alone=False)
        try:
            yield
        finally:
            self._gate.leave(place)

    async def _serve(self, request: Request) -> None:
        op, start, end = request.op, request.offset, request.offset + request.length
        if op == READ:
            await self._read(request)
            return
        unaligned = bool((start | end) & (self._alignment - 1))
        if unaligned and op == WRITE_ZEROES and request.flags & NO_FALLBACK:
            raise OSError(errno.ENOTSUP, "the ends of the range would have to be written")
        alone = unaligned and op != DISCARD
        place = await self._gate.enter(*self._round(start, end), alone=alone)
        try:
            if not unaligned:
                await self._io(op, start, request.length, request.buffer, request.flags)
            elif op == WRITE:
                await self._write(start, request.buffer, request.flags)
            else:
                await self._cut(op, start, end, request.flags)
        finally:
            self._gate.leave(place)

    async def _read(self, request: Request) -> None:
        start, end = request.offset, request.offset + request.length
        outer_start, outer_end = self._round(start, end)
        arena = self._node.context.host.arena(outer_end - outer_start)
        bounce = arena.view[: outer_end - outer_start]
        try:
            await self._io(READ, outer_start, len(bounce), bounce, 0)
            request.buffer[:] = bounce[start - outer_start : end - outer_start]
        finally:
            bounce.release()
            arena.close()

    async def _write(self, start: int, data: memoryview, flags: int) -> None:
        """Write any range: the blocks that it covers in part are read first."""
        alignment, end = self._alignment, start + len(data)
        outer_start, outer_end = self._round(start, end)
        length = outer_end - outer_start
        arena = self._node.context.host.arena(length)
        bounce = arena.view[:length]
        try:
            if outer_start < start:
                await self._read_block("head", outer_start, bounce[:alignment])
            if end < outer_end and (length > alignment or outer_start == start):
                await self._read_block("tail", outer_end - alignment, bounce[-alignment:])
            bounce[start - outer_start : end - outer_start] = data
            await self._io(WRITE, outer_start, length, bounce, flags)
        finally:
            bounce.release()
            arena.close()
        if outer_end > self._node.size:
            self._node.refresh_size()

    async def _read_block(self, which: str, offset: int, block: memoryview) -> None:
        await self._node.co_debug_event(f"pwritev_rmw_{which}")
        await self._io(READ, offset, len(block), block, 0)
        await self._node.co_debug_event(f"pwritev_rmw_after_{which}")

    async def _cut(self, op: int, start: int, end: int, flags: int) -> None:
        """Zero or discard a range whose ends do not fit."""
        alignment = self._alignment
        inner_start = min(-(-start // alignment) * alignment, end)
        inner_end = max(end - end % alignment, inner_start)
        if op == WRITE_ZEROES and start < inner_start:
            await self._write(start, memoryview(bytes(inner_start - start)), flags & FUA)
        if inner_start < inner_end:
            await self._io(op, inner_start, inner_end - inner_start, None, flags)
        if op == WRITE_ZEROES and inner_end < end:
            await self._write(inner_end, memoryview(bytes(end - inner_end)), flags & FUA)

    def _round(self, start: int, end: int) -> tuple[int, int]:
        return start - start % self._alignment, -(-end // self._alignment) * self._alignment

    async def _io(self, op: int, offset: int, length: int, buffer: memoryview | None, flags: int) -> None:
        from bottomhalf.block.node import co_io

        await co_io(self._node, op, offset, length, buffer, flags, submit=self._submit)


def _all_fit(requests: list[Request], mask: int) -> bool:
    """Whether all are of whole blocks, and of one at least."""
    bits = 0
    for request in requests:
        length = request.length
        if not length:
            return False
        bits |= request.offset | length
    return not bits & mask
