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
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from bottomhalf.aio import AioContext, CoQueue, Coroutine, current, kick, move_to, suspend, wait_while
from bottomhalf.block import changes, copying, permissions, written
from bottomhalf.block.edge import Edge, Parent
from bottomhalf.block.errors import BlockError, check
from bottomhalf.block.queue import BackendStatistics, Queue
from bottomhalf.block.resize import Preallocation, co_resize
from bottomhalf.block.transaction import Transaction
from bottomhalf.block.written import CHANGES_BYTES
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE, File
from bottomhalf.host.request import (
    COMPRESSED,
    DISCARD,
    FLUSH,
    FUA,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
    deliver,
)

if TYPE_CHECKING:
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.node import Node


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
        allow_inactive: bool = False,
        context: AioContext | None = None,
    ) -> None:
        """With ``allow_inactive`` its node may be inactivated though it writes; then writing fails with EPERM.
        ``context`` is where its requests are to be served, and its node comes there; None: where the node is."""
        self.graph = graph
        self.name = name
        self.held = held
        self.shared = shared
        self.writethrough = writethrough
        self.allow_context_change = allow_context_change
        self.allow_inactive = allow_inactive
        self._held_when_active = held
        self.context: AioContext = graph.context if context is None else context
        self._keeps_context = context is not None
        self._moved = False  # whether users may not know where it lives
        self.root: Edge | None = None
        self.size = 0
        self.noted = 0  # end of the highest write to the node as it is below; see ``written``
        self._limits = [0] * 5  # by op: up to where requests need no second look
        self.in_flight = 0
        self.on_resize: Callable[[], object] | None = None
        self.on_moving: Callable[[], AbstractContextManager[None]] | None = None  # see Parent.moving()
        self.on_drain: Callable[[], object] | None = None  # a drained section begins; must not wait
        self._quiesced = 0
        self._errands_begun = self._errands_done = 0  # see run_at_home()
        self._parked: deque[list[Request]] = deque()
        self._drain_ends = CoQueue(f"the end of a drained section of {self.describe()}")
        self._operations = [0] * 5
        self._bytes = [0] * 5
        self._failed = 0
        graph.backends.append(self)

    # -- the graph ----------------------------------------------------------------------------------------------

    def insert(self, node: Node) -> None:
        """Use a node. BlockError or ImageInUse if its other users or the image's other openers forbid it. Main
        thread."""
        assert self.root is None
        if self.allow_inactive and not node.active:
            self.held &= ~permissions.CHANGING
        if self._keeps_context and node.context is not self.context:
            try:
                self.graph.move(node, self.context)
            except BlockError:
                if not self.allow_context_change:
                    raise
        edge = Edge(self, node, "root", self.held, self.shared)
        self.root = edge
        try:
            with Transaction() as transaction:
                changes.link(transaction, edge)
                permissions.refresh(node, transaction=transaction)
        except BaseException:
            self.root = None
            raise
        self.context = node.context
        self._set_size(node.size)

    def remove(self) -> None:
        """Stop using the node, after what is in flight has ended: a request that looked at its node, and waits, finds
        it there when it goes on. Requests that wait because of a drain fail with ENOMEDIUM. Main thread."""
        edge = self.root
        if edge is None:
            return
        while True:
            node = edge.node
            with self.graph.holding(node):
                with self.graph.drained(node):
                    if self.root is not edge:
                        return  # the section has waited, and somebody else was faster
                    if edge.node is not node:
                        continue  # another was put in its place, and is not drained
                    self.settle_written()
                    self.root = None
                    self._set_size(0)
                    node.remove_parent(edge)
                    permissions.loosen(node)
                wait_while(
                    self.context,
                    lambda: self._parked or self._drain_ends or self.in_flight,
                    what=f"requests to {self.describe()} that find it without a medium",
                )
            break
        connected = self.graph.connected(node)
        self.graph.release(node)
        self.graph.bring_home(connected)

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
        return f"block device '{self.name}'" if self.name else "an unnamed block device"

    def drain(self) -> None:
        """Wait until nothing of this backend is in flight. Main thread."""
        if self.root is not None:
            with self.graph.drained(self.root.node):
                return
        wait_while(self.context, self.parent_drained_poll, what=f"requests to {self.describe()}")

    def check_inactive(self, edge: Edge) -> None:
        if not self.allow_inactive:
            super().check_inactive(edge)

    def child_active(self, edge: Edge, active: bool) -> None:
        if self.allow_inactive:
            self.held = self._held_when_active if active else self.held & ~permissions.CHANGING
            edge.held = self.held

    def check_move(self, context: AioContext) -> None:
        if not self.allow_context_change:
            raise BlockError("Cannot change iothread of active block backend")

    def moving(self) -> AbstractContextManager[None]:
        return nullcontext() if self.on_moving is None else self.on_moving()

    def move_to(self, context: AioContext) -> None:
        self.context = context
        self._moved = True

    def child_resized(self) -> None:
        if self.root is not None:
            self._set_size(self.root.node.size)
            if self.on_resize is not None:
                self.on_resize()

    def child_replaced(self, edge: Edge) -> None:
        self.settle_written()
        super().child_replaced(edge)

    def settle_written(self) -> None:
        if self.root is not None:
            written.note(self.root.node, self.noted)
        self.noted = 0
        self._set_size(self.size)

    def _set_size(self, size: int) -> None:
        self.size = size
        self._limits = [min(size, self.noted) if changes_bytes else size for changes_bytes in CHANGES_BYTES]

    # -- drain --------------------------------------------------------------------------------------------------

    def parent_drained_begin(self) -> None:
        self._quiesced += 1
        if self.on_drain is not None:
            self.on_drain()

    def parent_drained_poll(self) -> bool:
        return self.in_flight > 0 or self._errands_begun != self._errands_done

    def run_at_home(self, callback: Callable[[], object]) -> None:
        """For ``on_drain``: call something in the backend's own thread; a drained section waits for it too. (It is
        counted apart: two threads must not change one count.) Main thread."""
        context = self.context
        self._errands_begun += 1

        def run() -> None:
            try:
                callback()
            finally:
                self._errands_done += 1
                kick()

        context.schedule_oneshot(run)

    def parent_drained_end(self) -> None:
        self._quiesced -= 1
        if self._quiesced == 0 and (self._parked or self._drain_ends):
            self.context.schedule_oneshot(self._unpark)

    def _park(self, requests: list[Request]) -> list[Request]:
        """Keep a batch until the drained section ends. Who is in an iothread may find that it ended meanwhile."""
        self._parked.append(list(requests))
        self.request_ended(len(requests))
        if not self._quiesced:
            self.context.schedule_oneshot(self._unpark)
        return requests

    def _unpark(self) -> None:
        """A drained section ended: go on with what waits, in order. What comes meanwhile queues up behind it."""
        if not self.context.is_home:  # another section, in which the backend moved, was faster
            self.context.schedule_oneshot(self._unpark)
            return
        try:
            while self._parked:
                requests = self._parked[0]
                count = len(requests)
                self.in_flight += count
                if self._quiesced or not self.context.is_home:  # only now that it is counted it stays so
                    self.request_ended(count)
                    return
                try:
                    pending = self._dispatch(requests)
                except BaseException:
                    self.request_ended(len(requests))
                    raise
                finally:
                    self._parked.popleft()  # not before: what an owner submits meanwhile queues up behind it
                done = requests
                if pending:  # not by ``result``: an engine may have noted that of a pending one already
                    waiting = {id(request) for request in pending}
                    done = [request for request in requests if id(request) not in waiting]
                if done:
                    deliver(done)  # Queue.complete takes them out of in_flight
            if not self._quiesced and self.context.is_home:
                self._drain_ends.wake_all()
        finally:
            if (self._parked or self._drain_ends) and not self._quiesced:
                # It has moved, or an owner raised: the others must not wait for ever.
                self.context.schedule_oneshot(self._unpark)
            kick()

    def request_ended(self, count: int) -> None:
        """``count`` pending requests have been told to their owners."""
        self.in_flight -= count
        if self._quiesced or self.root is None:
            kick()

    # -- requests -----------------------------------------------------------------------------------------------

    def queue(self, on_complete: Callable[[list[Request]], object]) -> Queue:
        """A queue whose pending requests are given to ``on_complete`` in lists."""
        return Queue(self, on_complete)

    def submit(self, requests: list[Request]) -> list[Request]:
        """See Queue.submit; ``owner`` of every request must be a queue of this backend."""
        # First count, then look: a drain in another thread first closes, then looks at the count. In any other
        # order a request could slip into a drained section. Who looked where the backend lives before he came here
        # may find that it has moved; now that he is counted it stays. (No call between reading the count and writing
        # it: that is where the interpreter changes threads.)
        count = len(requests)
        self.in_flight += count
        if self._quiesced > 0 or self._parked or (self._moved and not self.context.is_home):
            return self._park(requests)
        try:
            pending = self._dispatch(requests)
        except BaseException:  # a mistake of a driver; it is heard, and a drain does not wait for ever
            self.request_ended(len(requests))
            raise
        self.in_flight -= len(requests) - len(pending)
        if self._quiesced:
            kick()  # a drain that began meanwhile waits for those that are done
        return pending

    def _dispatch(self, requests: list[Request]) -> list[Request]:
        """Check a batch and pass it on."""
        root = self.root
        if root is None:
            return self._fail(requests, errno.ENOMEDIUM)
        op = requests[0].op
        if op and not self._may_write(op):
            return self._fail(requests, errno.EPERM)
        limit, total = self._limits[op], 0
        for request in requests:
            length = request.length
            if request.offset + length > limit or request.offset < 0:
                end = request.offset + length
                if limit < end <= self.size and end >= length >= 0 and CHANGES_BYTES[op]:
                    self.noted = limit = self._limits[WRITE] = self._limits[WRITE_ZEROES] = end
                else:
                    requests = self._fail_out_of_bounds(requests)
                    if not requests:
                        return requests
                    total = sum(request.length for request in requests)
                    break
            total += length
        self._operations[op] += len(requests)
        self._bytes[op] += total
        if self.writethrough and op in (WRITE, WRITE_ZEROES):
            for request in requests:
                request.flags |= FUA
        return root.node.submit_batch(requests)

    def _fail(self, requests: list[Request], number: int) -> list[Request]:
        self._failed += len(requests)
        for request in requests:
            request.result = -number
        return []

    def _may_write(self, op: int) -> bool:
        return op == FLUSH or bool(self.held & PERM_WRITE)

    def _fail_out_of_bounds(self, requests: list[Request]) -> list[Request]:
        """Fail those that do not lie within the image; the others."""
        good = []
        for request in requests:
            if request.offset < 0 or request.length < 0 or request.offset + request.length > self.size:
                request.result = -errno.EIO
            else:
                good.append(request)
        self._failed += len(requests) - len(good)
        if good and CHANGES_BYTES[good[0].op]:
            self.noted = max(self.noted, *[request.offset + request.length for request in good])
            self._set_size(self.size)
        return good

    # -- one request at a time ----------------------------------------------------------------------------------

    async def co_request(self, op: int, offset: int, length: int, buffer: memoryview | None, flags: int) -> None:
        """One request from a coroutine. OSError if it fails."""
        me = current()
        request = Request(op, offset, length, buffer, flags)
        request.owner = self.queue(lambda _: self._wake(me))
        if me.context is not self.context:
            self._submit_at_home(request)
            await suspend(f"a request to {self.describe()}")
        elif self.submit([request]):
            await suspend(f"a request to {self.describe()}")
        check(request.result, self.name)

    def _submit_at_home(self, request: Request) -> None:
        """Submit for somebody in another thread; its owner is told in any case."""

        def submit() -> None:
            if not self.context.is_home:  # it has moved meanwhile
                self._submit_at_home(request)
            elif not self.submit([request]):
                self.in_flight += 1  # Queue.complete takes it out again
                deliver([request])

        self.context.schedule_oneshot(submit)

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

    async def co_pwrite_compressed(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """co_pwrite() that stores compressed, by clusters of the image. OSError: ENOTSUP if the image cannot."""
        buffer = memoryview(data).cast("B")
        able = self.root is not None and self.root.node.can_compress
        if not able and 0 <= offset <= self.size - len(buffer):
            raise OSError(errno.ENOTSUP, f"{self.describe()} cannot store compressed", self.name)
        await self.co_request(WRITE, offset, len(buffer), buffer, COMPRESSED)

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
        ended: list[Request] = []  # ``result`` does not tell: an engine may set it before it is done with the buffer

        def complete(requests: list[Request]) -> None:
            ended.extend(requests)
            kick()

        def submit() -> None:
            if not self.submit([request]):
                complete([request])

        request.owner = self.queue(complete)
        if self.context.is_home:
            submit()
        else:
            self._submit_at_home(request)
        wait_while(self.context, lambda: not ended, what=f"a request to {self.describe()}")
        check(request.result, self.name)

    # -- what is where ------------------------------------------------------------------------------------------

    def block_status(self, offset: int, length: int) -> tuple[int, int] | None:
        """(DATA or ZERO, count) from ``offset``; None if that takes a coroutine."""
        return self.node.block_status(offset, length)

    async def co_block_status(self, offset: int, length: int) -> tuple[int, int]:
        async with self._admitted():
            return await self.node.co_block_status(offset, length)

    async def co_copy_range(
        self, offset: int, target: BlockBackend, target_offset: int, length: int, flags: int = 0
    ) -> None:
        """Copy a range to another backend without reading it. OSError; ENOTSUP: the caller has to read and write. See
        ``copying``."""
        await copying.co_copy_range(self, offset, target, target_offset, length, flags)

    @property
    def drained(self) -> bool:
        """Whether a drained section keeps requests out."""
        return self._quiesced > 0

    async def co_wait_undrained(self) -> None:
        """Wait for the end of the section. Home thread."""
        if self._quiesced:
            await self._drain_ends.wait()

    async def co_truncate(self, size: int, preallocation: Preallocation = Preallocation.OFF) -> None:
        """Resize the image; takes the permission to. OSError, BlockError for what cannot be asked."""
        async with self._admitted():
            if not self.held & PERM_RESIZE:
                raise OSError(errno.EPERM, f"{self.describe()} may not resize", self.name)
            if preallocation == Preallocation.OFF:
                await self.node.co_truncate(size)
            else:
                await co_resize(self.node, size, preallocation)

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """Count a coroutine as in flight as soon as the backend is not drained, in the backend's own thread."""
        caller = current().context
        while True:
            await move_to(self.context)
            self.in_flight += 1
            if not self._quiesced and self.context is current().context:
                break
            self.request_ended(1)
            await self.co_wait_undrained()
        try:
            yield
        finally:
            self.request_ended(1)
            await move_to(caller)

    @property
    def memory_alignment(self) -> int:
        """What buffers should be aligned to in memory, so that they need no copy."""
        return self.root.node.memory_alignment if self.root is not None else 1

    def prefetch(self, offset: int, length: int) -> None:
        """The range will be read soon."""
        if self.root is not None and offset + length <= self.size:
            self.root.node.prefetch(offset, length)

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        """See Node.pread_nowait; within the image. None as well while the backend is drained. Home thread."""
        root = self.root
        self.in_flight += 1
        try:
            if self._quiesced or self._parked or root is None or (self._moved and not self.context.is_home):
                return None
            data = root.node.pread_nowait(length, offset)
        except OSError:
            self._failed += 1
            raise
        finally:
            self.request_ended(1)
        if data is not None:
            self._operations[READ] += 1
            self._bytes[READ] += length
        return data

    def file_range(self, offset: int, length: int) -> tuple[File, int] | None:
        """See Node.file_range. None as well while the backend is drained."""
        if self._quiesced or offset + length > self.size or self.root is None:
            return None
        return self.root.node.file_range(offset, length)

    def map_reads(self, requests: list[Request], offsets: list[int]) -> File | None:
        """See Node.map_reads. None as well while the backend is drained."""
        if self._quiesced or self.root is None:
            return None
        return self.root.node.map_reads(requests, offsets)

    def hold_bytes(self) -> Callable[[], object] | None:
        """See Node.hold_bytes."""
        return None if self.root is None else self.root.node.hold_bytes()

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
