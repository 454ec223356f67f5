# SPDX-License-Identifier: Apache-2.0
"""Requests that are not multiples of the node's alignment (O_DIRECT): pad reads, read-modify-write writes.

A read takes the larger, aligned range into a bounce buffer and copies out what was asked for. A write has to read
the blocks at its two ends first. Between that read and the write nobody else may write there, or one of the two
writes is lost. Therefore a node with an alignment has a gate: ordinary writes pass it together, a
read-modify-write passes it alone, and who finds it closed queues up in order. Zero writes and discards that do
not fit are cut: the aligned middle goes on as what it is, the ends are written as zeroes or, for a discard, left.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from bottomhalf.aio import CoQueue
from bottomhalf.host.request import DISCARD, IN_PROGRESS, READ, WRITE, WRITE_ZEROES, Owner, Request

if TYPE_CHECKING:
    from bottomhalf.block.node import Node


class WriteGate:
    """Who may write to a node now: many ordinary writers or one read-modify-write."""

    __slots__ = ("_exclusive", "_node", "_queue", "_shared")

    def __init__(self, node: Node) -> None:
        self._node = node
        self._shared = 0
        self._exclusive = False
        self._queue = CoQueue(f"other writes to {node.describe()}")

    @property
    def closed(self) -> bool:
        """Whether a writer has to queue up."""
        return self._exclusive or len(self._queue) > 0

    def submit(self, requests: list[Request]) -> list[Request]:
        """Submit ordinary writes while the gate is open."""
        assert not self.closed
        passages: dict[int, _Passage] = {}
        for request in requests:
            owner = request.owner
            request.owner = passages.setdefault(id(owner), _Passage(self, owner))
        self._shared += len(requests)
        pending = self._node.submit_batch(requests)
        for request in requests:
            if request.result != IN_PROGRESS:
                assert isinstance(request.owner, _Passage)
                request.owner = request.owner.owner
        self.leave_shared(len(requests) - len(pending))
        return pending

    def leave_shared(self, count: int) -> None:
        self._shared -= count
        if self._shared == 0:
            self._queue.wake_next()

    async def enter(self, *, alone: bool) -> None:
        """Pass the gate as a coroutine: alone, or together with the other ordinary writers."""
        if self.closed:
            await self._queue.wait()
        while self._exclusive or (alone and self._shared):
            await self._queue.wait()
        if alone:
            self._exclusive = True
        else:
            self._shared += 1
            self._queue.wake_next()

    def leave(self, *, alone: bool) -> None:
        if alone:
            self._exclusive = False
            self._queue.wake_next()
        else:
            self.leave_shared(1)


class _Passage:
    """Owner of a pending ordinary write: gives the place at the gate back, then tells the real owner."""

    __slots__ = ("_gate", "owner")

    def __init__(self, gate: WriteGate, owner: Owner | None) -> None:
        self._gate = gate
        self.owner = owner

    def complete(self, requests: list[Request]) -> None:
        for request in requests:
            request.owner = self.owner
        if self.owner is not None:
            self.owner.complete(requests)
        self._gate.leave_shared(len(requests))


def co_serve_unaligned(node: Node, gate: WriteGate, request: Request, pending: list[Request]) -> None:
    """Start a coroutine for one request; append it to ``pending`` if it does not end at once."""
    submitting = True
    owner = request.owner

    async def serve() -> None:
        try:
            await _serve(node, gate, request)
        except OSError as error:
            request.result = -(error.errno or errno.EIO)
        else:
            request.result = 0
        if not submitting and owner is not None:
            owner.complete([request])

    node.context.enter(serve())
    submitting = False
    if request.result == IN_PROGRESS:
        pending.append(request)


async def _serve(node: Node, gate: WriteGate, request: Request) -> None:
    alignment = node.request_alignment
    start, end = request.offset, request.offset + request.length
    outer_start = start - start % alignment
    outer_end = -(-end // alignment) * alignment
    if request.op == READ:
        bounce = memoryview(bytearray(outer_end - outer_start))
        await node.co_pread(outer_start, bounce)
        request.buffer[:] = bounce[start - outer_start : end - outer_start]
        return
    alone = bool((start | end) % alignment) and request.op != DISCARD
    await gate.enter(alone=alone)
    try:
        if request.op == WRITE:
            await _write(node, start, request.buffer, request.flags)
            return
        inner_start = min(-(-start // alignment) * alignment, end)
        inner_end = max(end - end % alignment, inner_start)
        if request.op == WRITE_ZEROES:
            if start < inner_start:
                await _write(node, start, memoryview(bytes(inner_start - start)), request.flags)
            if inner_start < inner_end:
                await node.co_write_zeroes(inner_start, inner_end - inner_start, request.flags)
            if inner_end < end:
                await _write(node, inner_end, memoryview(bytes(end - inner_end)), request.flags)
        elif inner_start < inner_end:
            await node.co_discard(inner_start, inner_end - inner_start)
    finally:
        gate.leave(alone=alone)


async def _write(node: Node, start: int, data: memoryview, flags: int) -> None:
    """Write any range: the blocks that it covers partly are read first."""
    alignment = node.request_alignment
    end = start + len(data)
    outer_start = start - start % alignment
    outer_end = -(-end // alignment) * alignment
    bounce = memoryview(bytearray(outer_end - outer_start))
    if outer_start < start:
        await node.co_pread(outer_start, bounce[:alignment])
    if end < outer_end and (outer_end - alignment > outer_start or outer_start == start):
        await node.co_pread(outer_end - alignment, bounce[-alignment:])
    bounce[start - outer_start : end - outer_start] = data
    await node.co_pwrite(outer_start, bounce, flags)
