# SPDX-License-Identifier: Apache-2.0
"""BlockBackend: a user's handle on the graph (an export, a tool, the library's face).

It is the gate that every request passes once, in a batch: permission, bounds, alignment, quiescence and the
in-flight count are checked or paid per batch, so that the nodes below need not. Because every request is counted
here until its owner knows the result, a drain of any node finds all requests by asking the backends above it.

    queue = backend.queue(on_complete)
    request.owner = queue
    pending = queue.submit([request])     # [] when it is done already
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import AioContext, Coroutine, current, kick, suspend, wait_while
from bottomhalf.block import permissions
from bottomhalf.block.alignment import co_serve_unaligned
from bottomhalf.block.errors import BlockError, check
from bottomhalf.block.node import Edge, Node, Parent
from bottomhalf.host.protocol import DATA, PERM_ALL, PERM_CONSISTENT_READ, PERM_WRITE, ZERO, File
from bottomhalf.host.request import (
    DISCARD,
    FLUSH,
    FUA,
    IN_PROGRESS,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
    deliver,
)

if TYPE_CHECKING:
    from bottomhalf.block.graph import Graph

REQUEST_BYTES_MAX: Final = 0x7FFFFE00  # INT_MAX rounded down to a sector, as QEMU's BDRV_REQUEST_MAX_BYTES


@dataclass(frozen=True)
class BackendStatistics:
    """Counts since the backend was made, of requests that were admitted (indexed by op), and what is under way."""

    operations: tuple[int, ...]
    bytes: tuple[int, ...]
    failed: int
    in_flight: int
    parked: int


class Queue:
    """One user's way into a backend: who submits here is told here. Home thread of the backend's context."""

    __slots__ = ("_on_complete", "backend")

    def __init__(self, backend: BlockBackend, on_complete: Callable[[list[Request]], object]) -> None:
        self.backend = backend
        self._on_complete = on_complete

    def submit(self, requests: list[Request]) -> list[Request]:
        """Start requests of one op whose ``owner`` is this queue. Returns those that are not done yet;
        ``on_complete`` gets them later. The others have their ``result``."""
        return self.backend.submit(requests)

    def complete(self, requests: list[Request]) -> None:
        backend = self.backend
        try:
            self._on_complete(requests)
        finally:
            backend.request_ended(len(requests))


class BlockBackend(Parent):
    """A root edge with permissions, an in-flight count and a place where requests wait while drained."""

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        held: int = PERM_CONSISTENT_READ,
        shared: int = PERM_ALL,
        writethrough: bool = False,
        allow_context_change: bool = True,
    ) -> None:
        self.graph = graph
        self.name = name
        self.held = held
        self.shared = shared
        self.writethrough = writethrough
        self.allow_context_change = allow_context_change
        self.context: AioContext = graph.context
        self.root: Edge | None = None
        self.size = 0
        self.in_flight = 0
        self.on_resize: Callable[[], object] | None = None
        self.on_drain: Callable[[], object] | None = None  # a drained section begins; must not wait
        self._quiesced = 0
        self._parked: deque[list[Request]] = deque()
        self._operations = [0] * 5
        self._bytes = [0] * 5
        self._failed = 0
        self._alignment = 1
        graph.backends.append(self)

    # -- the graph ----------------------------------------------------------------------------------------------

    def insert(self, node: Node) -> None:
        """Use a node. BlockError or ImageInUse if its other users or the image's other openers forbid it."""
        assert self.root is None
        edge = Edge(self, node, "root", self.held, self.shared)
        self.root = edge
        node.add_parent(edge)
        try:
            permissions.refresh(node)
        except BaseException:
            self.root = None
            node.remove_parent(edge)
            raise
        self.context = node.context
        self._alignment = node.request_alignment
        self.size = node.size

    def remove(self) -> None:
        """Stop using the node, after what is in flight has ended. Main thread."""
        if self.root is None:
            return
        edge, node = self.root, self.root.node
        with self.graph.drained(node):
            self.root = None
            node.remove_parent(edge)
        if not node.parents and node.context is not self.graph.context:
            self.graph.move(node, self.graph.context)
        self.graph.release(node)

    def close(self) -> None:
        self.remove()
        if self in self.graph.backends:
            self.graph.backends.remove(self)

    @property
    def node(self) -> Node:
        if self.root is None:
            raise BlockError(f"{self.describe()} has no medium")
        return self.root.node

    def describe(self) -> str:
        return f"block device '{self.name}'" if self.name else "unnamed block device"

    def child_resized(self) -> None:
        if self.root is not None:
            self.size = self.root.node.size
            if self.on_resize is not None:
                self.on_resize()

    # -- drain --------------------------------------------------------------------------------------------------

    def parent_drained_begin(self) -> None:
        self._quiesced += 1
        if self.on_drain is not None:
            self.on_drain()

    def parent_drained_poll(self) -> bool:
        return self.in_flight > 0

    def parent_drained_end(self) -> None:
        self._quiesced -= 1
        if self._quiesced == 0 and self._parked:
            self.context.schedule_oneshot(self._unpark)

    def _unpark(self) -> None:
        while self._parked and not self._quiesced:
            requests = self._parked.popleft()
            waiting = self.submit(requests)
            done = [request for request in requests if request.result != IN_PROGRESS] if waiting else requests
            if done:
                self.in_flight += len(done)  # Queue.complete takes them off again
                deliver(done)

    def request_ended(self, count: int) -> None:
        """``count`` pending requests have been told to their owners."""
        self.in_flight -= count
        if self._quiesced:
            kick()

    # -- requests -----------------------------------------------------------------------------------------------

    def queue(self, on_complete: Callable[[list[Request]], object]) -> Queue:
        """A queue whose pending requests are given to ``on_complete`` in lists."""
        return Queue(self, on_complete)

    def submit(self, requests: list[Request]) -> list[Request]:
        """See Queue.submit; ``owner`` of every request must be a queue of this backend."""
        if self._quiesced:
            self._parked.append(requests)
            return requests
        root = self.root
        if root is None:
            return self._fail(requests, errno.ENOMEDIUM)
        op = requests[0].op
        if op and not self._may_write(op):
            return self._fail(requests, errno.EPERM)
        size, total = self.size, 0
        for request in requests:
            length = request.length
            if request.offset + length > size or request.offset < 0:
                return self._submit_in_bounds(requests)
            total += length
        self._operations[op] += len(requests)
        self._bytes[op] += total
        if self.writethrough and op in (WRITE, WRITE_ZEROES):
            for request in requests:
                request.flags |= FUA
        node = root.node
        self.in_flight += len(requests)
        if self._alignment > 1 and op in (READ, WRITE, WRITE_ZEROES, DISCARD):
            pending = self._submit_aligned(node, requests)
        else:
            pending = node.submit_batch(requests)
        self.in_flight -= len(requests) - len(pending)
        return pending

    def _fail(self, requests: list[Request], number: int) -> list[Request]:
        self._failed += len(requests)
        for request in requests:
            request.result = -number
        return []

    def _may_write(self, op: int) -> bool:
        return op == FLUSH or bool(self.held & PERM_WRITE)

    def _submit_in_bounds(self, requests: list[Request]) -> list[Request]:
        """The slow way for a batch with a bad request in it: fail the bad, submit the good."""
        good = []
        for request in requests:
            if request.offset < 0 or request.length < 0 or request.offset + request.length > self.size:
                request.result = -errno.EIO
            else:
                good.append(request)
        self._failed += len(requests) - len(good)
        return self.submit(good) if good else []

    def _submit_aligned(self, node: Node, requests: list[Request]) -> list[Request]:
        """Split off the requests that are not multiples of the node's alignment; coroutines pad them."""
        mask = self._alignment - 1
        fitting = [r for r in requests if not (r.offset | r.length) & mask]
        gate = node.write_gate
        if requests[0].op != READ and gate.closed:
            fitting = []  # a read-modify-write is going on: everything that writes waits its turn
        pending = []
        if fitting:
            if fitting[0].op != READ:
                pending = gate.submit(fitting)
            else:
                pending = node.submit_batch(fitting)
        for request in requests:
            if (request.offset | request.length) & mask or (not fitting and request.op != READ):
                co_serve_unaligned(node, gate, request, pending)
        return pending

    # -- one request at a time ----------------------------------------------------------------------------------

    async def co_request(self, op: int, offset: int, length: int, buffer: memoryview | None, flags: int) -> None:
        """One request from a coroutine. OSError if it fails."""
        me = current()
        request = Request(op, offset, length, buffer, flags)
        request.owner = self.queue(lambda _: self._wake(me))
        if self.submit([request]):
            await suspend(f"a request to {self.describe()}")
        check(request.result, self.name)

    @staticmethod
    def _wake(coroutine: Coroutine) -> None:
        coroutine.context.wake(coroutine)

    async def co_pread(self, offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        await self.co_request(READ, offset, length, memoryview(buffer), 0)
        return buffer

    async def co_pwrite(self, offset: int, data: bytes | bytearray | memoryview, flags: int = 0) -> None:
        buffer = memoryview(data).cast("B")
        await self.co_request(WRITE, offset, len(buffer), buffer, flags)

    async def co_flush(self) -> None:
        await self.co_request(FLUSH, 0, 0, None, 0)

    async def co_discard(self, offset: int, length: int) -> None:
        await self.co_request(DISCARD, offset, length, None, 0)

    async def co_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.co_request(WRITE_ZEROES, offset, length, None, flags)

    def request(self, op: int, offset: int, length: int, buffer: memoryview | None = None, flags: int = 0) -> None:
        """One request from plain code: waits for its end. OSError if it fails. In the home thread of the
        backend's context, or in the main thread, which lets the other do the work."""
        request = Request(op, offset, length, buffer, flags)
        request.owner = self.queue(lambda _: kick())
        if self.context.is_home:
            self.submit([request])
        else:

            def submit() -> None:
                self.submit([request])
                kick()

            self.context.schedule_oneshot(submit)
        wait_while(
            self.context, lambda: request.result == IN_PROGRESS, what=f"a request to {self.describe()}"
        )
        check(request.result, self.name)

    # -- what is where ------------------------------------------------------------------------------------------

    def block_status(self, offset: int, length: int) -> tuple[int, int] | None:
        """(DATA or ZERO, count) from ``offset``; None if that takes a coroutine."""
        return self.node.block_status(offset, length)

    async def co_block_status(self, offset: int, length: int) -> tuple[int, int]:
        self.in_flight += 1
        try:
            return await self.node.co_block_status(offset, length)
        finally:
            self.request_ended(1)

    @property
    def memory_alignment(self) -> int:
        """What buffers should be aligned to in memory, so that they need no copy."""
        return self.root.node.memory_alignment if self.root is not None else 1

    def prefetch(self, offset: int, length: int) -> None:
        """The range will be read soon."""
        if self.root is not None and offset + length <= self.size:
            self.root.node.prefetch(offset, length)

    def file_range(self, offset: int, length: int) -> tuple[File, int] | None:
        """See Node.file_range. None as well while the backend is drained."""
        if self._quiesced or offset + length > self.size or self.root is None:
            return None
        return self.root.node.file_range(offset, length)

    def account_read(self, count: int, length: int) -> None:
        """Count reads that were served through file_range."""
        self._operations[READ] += count
        self._bytes[READ] += length

    def statistics(self) -> BackendStatistics:
        return BackendStatistics(
            operations=tuple(self._operations),
            bytes=tuple(self._bytes),
            failed=self._failed,
            in_flight=self.in_flight,
            parked=sum(len(batch) for batch in self._parked),
        )


__all__ = ["DATA", "ZERO", "BackendStatistics", "BlockBackend", "Queue"]
