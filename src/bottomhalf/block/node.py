# SPDX-License-Identifier: Apache-2.0
"""Nodes and edges: the graph of drivers that a request travels through.

A driver is a subclass of ``Node``. It has three doors, each falling back to the next, and its author opens as few
as he likes:

* ``submit_batch(requests)`` takes a list of requests of one op, sets ``result`` of those that it can serve now and
  returns the others, whose owners are told later. Raw, file and null are written so.
* ``try_pread(request)`` is a plain call that serves one read at once (True) or says "slow" (False).
* ``async def co_pread(offset, buffer)`` and its sisters are ordinary coroutines.

The base class bridges: a batch that finds only coroutines enters one per request, a coroutine that finds only a
batch submits a list of one and suspends until it is done.

A smallest driver::

    class Zeroes(Node):
        driver = "zeroes"
        def __init__(self, graph: Graph, name: str = "") -> None:
            super().__init__(graph, name, read_only=True)
            self.refresh_size()
        def open_size(self) -> int:
            return 1 << 30
        async def co_pread(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = bytes(len(buffer))
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from collections.abc import Coroutine as AbstractCoroutine
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from bottomhalf.aio import AioContext, current, suspend
from bottomhalf.aio.io import Waiter
from bottomhalf.block import changes, copying, drain, permissions, resize, written
from bottomhalf.block.edge import ROLE_FILTER, Edge, Parent
from bottomhalf.block.errors import BlockError, check
from bottomhalf.block.written import CHANGES_BYTES, note
from bottomhalf.host.protocol import (
    DATA,
    PERM_ALL,
    File,
)
from bottomhalf.host.request import DISCARD, FLUSH, FUA, IN_PROGRESS, READ, WRITE, WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block.copying import CopyTo
    from bottomhalf.block.dirty import BitmapKeeper, NamedBitmap
    from bottomhalf.block.graph import Graph
    from bottomhalf.block.resize import Preallocation
    from bottomhalf.block.transaction import Transaction

BOUNCE_BYTES_MAX: Final = 1 << 20  # of zero bytes written at a time where a file system cannot zero by itself


class _NodeType(type):
    """A node that is born into a drained section, or gets a drained child while it is made, is told when it is
    complete: before, its driver could not make anything of it."""

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        node = super().__call__(*arguments, **options)
        node.complete()
        return node


class Node(Parent, metaclass=_NodeType):
    """One driver instance in the graph. Everything runs in the home thread of ``context``.

    ``request_alignment`` is what offset and length of requests should be multiples of, and ``memory_alignment`` what
    buffers should be: others are welcome, but cost a copy, and writes a read before (see ``alignment``)."""

    driver: ClassVar[str]
    is_filter: ClassVar[bool] = False  # it shows its first child's data as its own
    is_protocol: ClassVar[bool] = False
    supports_backing: ClassVar[bool] = False  # what it has not got may be read from a child "backing"
    # Whether the coroutine doors honour FUA themselves. Else it is taken off, and a flush follows the write.
    handles_fua: ClassVar[bool] = False
    preallocates_metadata: ClassVar[bool] = False  # co_grow() knows the mode "metadata"

    def __init__(self, graph: Graph, name: str = "", *, read_only: bool = False, unmap: bool = False) -> None:
        self.graph = graph
        self.name = graph.claim_name(name, self)
        self.context: AioContext = graph.context
        self.read_only = read_only
        self.unmap = unmap  # whether discards and MAY_UNMAP mean anything (discard=unmap)
        self.size = 0
        self.request_alignment = 1
        self.memory_alignment = 1
        self.children: list[Edge] = []
        self.parents: list[Edge] = []
        self.quiesce_counter = graph.drained_all_sections
        self.in_flight = 0  # work of the node's own, beside the requests that its users count
        self.monitor_owned = False
        self.references = 0  # users who are no parents; see Graph.holding()
        self.implicit = False  # put in by a job: users are shown what is below it
        self.closed = False
        self.active = True  # it may be written to; see ``activation``
        self.turning_read_only = False  # in a reopen that is not final yet
        self.inherits_from: Node | None = None  # the parent in whose options its own were given
        self.options: Any = None
        self.bitmaps: dict[str, NamedBitmap] = {}  # the oldest first; see ``dirty``
        self.bitmap_keeper: BitmapKeeper | None = None  # stores persistent ones in the image, if it can
        self.written_end = 0  # bytes up to the end of the highest write; see ``written``
        self.noted = 0  # up to where it and those below it know
        self.permissions = (0, PERM_ALL)  # (held, shared) that were last applied
        self._complete = False  # the constructor is through
        self._has_submit_batch = type(self).submit_batch is not Node.submit_batch
        self._has_try_pread = type(self).try_pread is not Node.try_pread

    # -- what a driver may define -------------------------------------------------------------------------------

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        """Take requests of one op; returns those that are not done yet (their owners will be told)."""
        if self._has_try_pread and requests[0].op == READ:
            requests = [request for request in requests if not self.try_pread(request)]
        return self._start([(request, self._co_serve(request)) for request in requests])

    def try_pread(self, request: Request) -> bool:
        """Serve one read at once (set ``result``) and return True, or return False."""
        return False

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        await self._co_submit(READ, offset, len(buffer), buffer, 0)

    async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        await self._co_submit(WRITE, offset, len(buffer), buffer, flags)

    async def co_flush(self) -> None:
        if self._has_submit_batch:  # else there is nothing to make durable
            await self._co_submit(FLUSH, 0, 0, None, 0)

    async def co_discard(self, offset: int, length: int) -> None:
        if self._has_submit_batch:  # else the hint is of no use
            await self._co_submit(DISCARD, offset, length, None, 0)

    async def co_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._co_submit(WRITE_ZEROES, offset, length, None, flags)

    def block_status(self, offset: int, length: int) -> tuple[int, int] | None:
        """(DATA or ZERO bits, count) of the first bytes of the range, or None: ask co_block_status."""
        return DATA, length

    async def co_block_status(self, offset: int, length: int) -> tuple[int, int]:
        status = self.block_status(offset, length)
        assert status is not None, "a driver without a plain block_status defines co_block_status"
        return status

    def file_range(self, offset: int, length: int) -> tuple[File, int] | None:
        """The host file and offset where exactly these bytes are stored, for sending them without a copy; None
        if they are not stored so or not in memory."""
        return None

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        """The bytes, if they can be had at once: for one who has a single read, and would rather ask than wait. None:
        submit it. OSError."""
        return None

    def map_reads(self, requests: list[Request], offsets: list[int]) -> File | None:
        """Point the buffers of READs, which are for ``offsets`` of this node, at the stored bytes themselves, and turn
        ``offsets`` into the places in the host's file, which is returned; or None, with ``offsets`` as they were. The
        requests' own offsets do not count. See host.protocol.File.map_reads."""
        return None

    def hold_bytes(self) -> Callable[[], object] | None:
        """For a reader who was told a place by map_reads or file_range and goes on looking there after others have run:
        no other part of this node is stored there until the returned function is called, once. None: nor otherwise."""
        return None

    @property
    def can_compress(self) -> bool:
        """Whether writes with the flag COMPRESSED are understood."""
        return False

    @property
    def cluster_bytes(self) -> int:
        """What the image allocates at a time, 0 if it has no such thing."""
        return 0

    @property
    def has_backing(self) -> bool:
        """Whether bytes may be stored in a backing node instead of in this one."""
        return False

    def is_allocated(self, offset: int, length: int, bottom: Node | None = None) -> tuple[bool, int] | None:
        """Whether the first ``count`` bytes of the range are stored in this node rather than in a backing one below;
        None: ask co_is_allocated. With ``bottom``: whether in this node or in one below it, down to and with that."""
        return True, length

    async def co_is_allocated(self, offset: int, length: int, bottom: Node | None = None) -> tuple[bool, int]:
        allocated = self.is_allocated(offset, length, bottom)
        assert allocated is not None, "a driver without a plain is_allocated defines co_is_allocated"
        return allocated

    def debug_event(self, event: str) -> None:
        """A parent comes by a named point of its work (QEMU's blkdebug events); most nodes do not care. For plain
        code: what should wait at this point waits in the request that comes next."""

    async def co_debug_event(self, event: str) -> None:
        """debug_event for coroutines, which may be made to wait in it."""
        self.debug_event(event)

    def allocated_size(self) -> int | None:
        """Bytes that the node occupies on the host, None if unknown. A node without a say asks its first child."""
        return self.children[0].node.allocated_size() if self.children else None

    def written_below(self, end: int) -> list[tuple[Node, int]]:
        """Which children a write up to byte ``end`` goes on to as it is, and up to where there. See ``written``."""
        return [(self.children[0].node, end)] if self.is_filter and self.children else []

    def prefetch(self, offset: int, length: int) -> None:
        """The range will be read soon."""

    async def co_save_vmstate(self, offset: int, buffer: memoryview) -> None:
        """Store a piece of a virtual machine's state in the image, beside the disk. OSError: ENOTSUP if neither the
        driver nor what it stands on has a place for it."""
        await self._primary("VM state").co_save_vmstate(offset, buffer)

    async def co_load_vmstate(self, offset: int, buffer: memoryview) -> None:
        """Read a piece of a virtual machine's state again; zeroes where nothing was stored."""
        await self._primary("VM state").co_load_vmstate(offset, buffer)

    async def co_check(self) -> Any:
        """Look for damage in the image's tables; what the driver's own check finds. OSError: ENOTSUP if it has none."""
        raise OSError(errno.ENOTSUP, f"driver '{self.driver}' has nothing to check", self.name)

    def _primary(self, what: str) -> Node:
        """Where else an operation can go that the driver does not know."""
        if not self.children:
            raise OSError(errno.ENOTSUP, f"driver '{self.driver}' has no place for {what}", self.name)
        return self.children[0].node

    async def co_truncate(self, size: int) -> None:
        raise OSError(errno.ENOTSUP, f"driver {self.driver} cannot resize", self.name)

    async def co_grow(self, size: int, preallocation: Preallocation) -> None:
        """A larger size, with a new part that takes its space at once (``falloc`` or ``full``). Afterwards, or if it
        fails, the size is the new one or the old one."""
        await resize.grow_and_zero(self, size, preallocation)

    async def co_copy_range_from(self, offset: int, length: int, to: CopyTo) -> None:
        """Find the host file that the bytes are in and await ``to(file, offset in it)``; ENOTSUP if they are not in
        one, or not as they are. See ``copying``."""
        raise copying.not_supported(self)

    async def co_copy_range_to(self, offset: int, length: int, file: File, file_offset: int, flags: int) -> None:
        """Copy bytes of a host file to the range without reading them; ENOTSUP if that cannot be. See ``copying``."""
        raise copying.not_supported(self)

    def drain_begin(self) -> None:
        """The node becomes quiet: start nothing of your own. Must not wait."""

    def drain_end(self) -> None:
        """The node may be active again."""

    def detach_context(self) -> None:
        """The node leaves its context: take timers and handlers of your own out of it. Drained, in the main thread,
        as attach_context() is. Must not fail."""

    def attach_context(self) -> None:
        """``context`` is another one now. BlockError to refuse it: then the node goes back to the old one."""

    def apply_permissions(self, held: int, shared: int) -> None:
        """The sum of the parents' permissions changes. BlockError to refuse; must not change anything then, and
        must not refuse to hold less or to share more. Called more often than there is a change."""

    def child_permissions(self, edge: Edge, held: int, shared: int) -> tuple[int, int]:
        """What the node needs of and shares at a child, given its parents' sum. The default follows the edge's
        role; without one, or for a filter, both are passed through."""
        return permissions.for_role(self, edge, held, shared)

    def refresh_limits(self) -> None:
        """A child was replaced: take over again what was taken from it. A filter's alignments are its child's."""
        if self.is_filter and self.children:
            child = self.children[0].node
            self.request_alignment = child.request_alignment
            self.memory_alignment = child.memory_alignment

    def reopen(self, options: Any, transaction: Transaction) -> set[str]:
        """Take other options, in a drained section: do what is to be done at once or as a commit step of the
        transaction, and return the names of the driver's own options (attributes of ``options.branch``) that were
        taken over. The common ones and children are taken over already. BlockError to refuse."""
        return set()

    def add_child(self, node: Node) -> None:
        """x-blockdev-change: use another node. Graph.attach_child() does it."""
        raise BlockError(f"The node {self.name} does not support adding a child")

    def remove_child(self, edge: Edge) -> None:
        """x-blockdev-change: do without a child. Graph.detach_child() does it."""
        raise BlockError(f"The node {self.name} does not support removing a child")

    def check_inactive(self, edge: Edge) -> None:
        """A node above is inactive itself."""

    async def co_inactivate(self) -> None:
        """Write everything that is only in memory: others may have the image from now on. OSError."""
        await self.co_flush()

    async def co_activate(self) -> None:
        """The image is ours again. Forget what was read of it: others may have written. OSError, ImageError."""

    def close(self) -> None:
        """Give back what the driver holds. No request is in flight."""

    # -- for drivers --------------------------------------------------------------------------------------------

    def attach(self, node: Node, name: str, role: int = 0) -> Edge:
        """Add an edge to a child. Permissions follow when the graph refreshes them. Main thread.

        ``role`` is ROLE_* bits (see ``edge``); a filter's first child is filtered without being called so. A new
        node runs where its first child does; a further child has to come along."""
        if self.is_filter and not self.children and not role:
            role = ROLE_FILTER
        return changes.attach_new(self, node, name, role)

    def storage_permissions(self, held: int, shared: int) -> tuple[int, int]:
        """Child permissions of a format whose data and metadata live in the child."""
        return permissions.for_storage(self, held, shared)

    def finish(self, requests: list[Request], result: int) -> list[Request]:
        """Set one result for a whole batch; what submit_batch then returns."""
        for request in requests:
            request.result = result
        return []

    async def write_zero_bytes(
        self,
        offset: int,
        length: int,
        flags: int,
        submit: Callable[[list[Request]], list[Request]] | None = None,
    ) -> None:
        """Zero a range with plain writes, for storage that cannot do it itself; through ``submit`` if given."""
        zeroes = memoryview(bytearray(min(length, BOUNCE_BYTES_MAX)))
        while length:
            count = min(length, len(zeroes))
            if submit is None:
                await self.co_pwrite(offset, zeroes[:count], flags & FUA)
            else:
                await co_io(self, WRITE, offset, count, zeroes[:count], flags & FUA, submit=submit)
            offset += count
            length -= count

    # -- the bridges --------------------------------------------------------------------------------------------

    def start(self, request: Request, body: AbstractCoroutine[Any, Any, None]) -> bool:
        """Enter a coroutine that serves the request, OSError being its result; whether it is not done yet. Then its
        end is told to the owner. Any other exception is a mistake of the driver: it fails the request like an I/O
        error, so that nobody waits for ever, and comes out of the loop."""
        return bool(self._start([(request, body)]))

    def _start(self, work: list[tuple[Request, AbstractCoroutine[Any, Any, None]]]) -> list[Request]:
        """start() for several at once; those that are not done yet."""
        submitting = True

        async def serve(request: Request, body: AbstractCoroutine[Any, Any, None]) -> None:
            try:
                await body
            except OSError as error:
                request.result = -(error.errno or errno.EIO)
            except Exception as error:
                request.result = -errno.EIO
                self.context.schedule_oneshot(partial(_raise, error))
            else:
                request.result = 0
            if not submitting and request.owner is not None:
                request.owner.complete([request])

        self.context.enter_all([serve(request, body) for request, body in work])
        submitting = False
        return [request for request, _ in work if request.result == IN_PROGRESS]

    async def _co_serve(self, request: Request) -> None:
        op = request.op
        if op == READ:
            await self.co_pread(request.offset, request.buffer)
        elif op == WRITE:
            await self.co_pwrite(request.offset, request.buffer, self._own_flags(request))
        elif op == FLUSH:
            await self.co_flush()
        elif op == DISCARD:
            await self.co_discard(request.offset, request.length)
        else:
            await self.co_write_zeroes(request.offset, request.length, self._own_flags(request))
        if request.flags & FUA and not self.handles_fua and op in (WRITE, WRITE_ZEROES):
            await self.co_flush()

    def _own_flags(self, request: Request) -> int:
        return request.flags if self.handles_fua else request.flags & ~FUA

    async def _co_submit(self, op: int, offset: int, length: int, buffer: memoryview | None, flags: int) -> None:
        if not self._has_submit_batch:
            raise OSError(errno.ENOTSUP, f"driver {self.driver} does not support this request", self.name)
        await co_io(self, op, offset, length, buffer, flags)

    # -- parents, drain -----------------------------------------------------------------------------------------

    def describe(self) -> str:
        return f"node '{self.name}'"

    def add_parent(self, edge: Edge, place: int | None = None) -> None:
        """An edge to a drained node starts drained."""
        written.settle_above(edge)
        self.parents.insert(len(self.parents) if place is None else place, edge)
        if self.quiesce_counter and not edge.quiesced_parent:
            edge.quiesced_parent = True
            edge.parent.parent_drained_begin()

    def remove_parent(self, edge: Edge) -> None:
        written.settle_above(edge)
        self.parents.remove(edge)
        if edge.quiesced_parent:
            edge.quiesced_parent = False
            edge.parent.parent_drained_end()

    def complete(self) -> None:
        """The constructor is through: what it missed of drained sections is made up for."""
        self._complete = True
        if self.quiesce_counter and not self.closed:
            self.drain_begin()

    def quiesce(self) -> None:
        """Begin a drained section without waiting: parents first stop sending, then the driver is told."""
        self.quiesce_counter += 1
        if self.quiesce_counter == 1:
            for edge in list(self.parents):
                if not edge.quiesced_parent and edge.node is self:
                    edge.quiesced_parent = True
                    edge.parent.parent_drained_begin()
            if self._complete and not self.closed:
                self.drain_begin()

    def busy(self) -> bool:
        """Whether the node or anybody above it has something in flight."""
        return drain.in_flight_above([self])

    def unquiesce(self) -> None:
        """End a drained section."""
        assert self.quiesce_counter > 0
        self.quiesce_counter -= 1
        if self.quiesce_counter == 0:
            if self._complete and not self.closed:
                self.drain_end()
            for edge in list(self.parents):
                if edge.quiesced_parent and edge.node is self:
                    edge.quiesced_parent = False
                    edge.parent.parent_drained_end()

    def parent_drained_begin(self) -> None:
        self.quiesce()

    def parent_drained_poll(self) -> bool:
        return self.busy()

    def parent_drained_end(self) -> None:
        self.unquiesce()

    def child_replaced(self, edge: Edge) -> None:
        self.noted = 0
        self.refresh_limits()
        self.refresh_size()
        for above in list(self.parents):
            above.parent.child_replaced(above)

    def child(self, name: str) -> Edge | None:
        """The edge to the child of that name, if there is one."""
        return next((edge for edge in self.children if edge.name == name), None)

    def child_resized(self) -> None:
        self.refresh_size()

    def refresh_size(self) -> None:
        """Take the size from below again and tell the parents if it has changed."""
        size = self.open_size()
        if size != self.size:
            self.size = size
            for edge in list(self.parents):
                edge.parent.child_resized()

    def open_size(self) -> int:
        """The size in bytes that the driver gives the node."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


async def co_submit(submit: Callable[[list[Request]], list[Request]], request: Request, node: Node) -> None:
    """Give one request to a node's ``submit_batch`` (or another door of it) from a coroutine and wait for its end;
    ``request.result`` tells how it ended."""
    me = current()
    if CHANGES_BYTES[request.op]:
        note(node, request.offset + request.length)
    request.owner = waiter = Waiter(me, request, node.describe())
    request.result = IN_PROGRESS
    if submit([request]):
        await suspend(waiter)
        assert request.result != IN_PROGRESS, "woken by something else than the request"
    request.owner = None  # they name each other, and the buffer would stay until the next garbage collection


async def co_io(
    node: Node,
    op: int,
    offset: int,
    length: int,
    buffer: memoryview | None = None,
    flags: int = 0,
    *,
    submit: Callable[[list[Request]], list[Request]] | None = None,
    name: str = "",
) -> None:
    """A request of one's own to a node (through ``submit``, if another door is meant) from a coroutine, to its end.
    OSError, which says ``name`` or else the node's."""
    request = Request(op, offset, length, buffer, flags)
    await co_submit(submit or node.submit_batch, request, node)
    check(request.result, name or node.name)


def _raise(error: Exception) -> None:
    raise error
