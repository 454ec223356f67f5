# SPDX-License-Identifier: Apache-2.0
"""One NBD export: a backend on a node, what a client is told of it, and its clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bottomhalf.aio import AioContext, wait_while
from bottomhalf.block import BlockBackend, BlockError, Graph, Node
from bottomhalf.exports.nbd.dirty_bitmaps import ShownBitmaps
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE
from bottomhalf.host.request import FLUSH
from bottomhalf.wire.nbd.constants import CONTEXT_BASE_ALLOCATION, FLAG_CAN_MULTI_CONN, MAX_REQUEST, MAX_STRING
from bottomhalf.wire.nbd.export import READ_ONLY_FLAGS, WRITABLE_FLAGS, ExportInfo

if TYPE_CHECKING:
    from bottomhalf.block.dirty import NamedBitmap
    from bottomhalf.exports.nbd.connection import Connection
    from bottomhalf.qapi.common import BlockDirtyBitmap


@dataclass
class ExportStatistics:
    """Counts since the export was made; bytes of payload, ``latency_ns`` summed over answered requests."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    write_bytes: int = 0
    others: int = 0
    failed: int = 0
    rejected: int = 0
    answered: int = 0
    latency_ns: int = 0


class NbdExport:
    """A node that clients of the NBD server can open by name."""

    kind = "nbd"

    def __init__(
        self,
        graph: Graph,
        export_id: str,
        node: Node,
        *,
        name: str | None = None,
        description: str = "",
        writable: bool = False,
        writethrough: bool = False,
        multi_conn: bool = True,
        exclusive: bool = False,
        fixed_iothread: bool = False,
        allow_inactive: bool = False,
        bitmaps: Sequence[str | BlockDirtyBitmap] = (),
    ) -> None:
        if writable and node.read_only:
            raise BlockError("Cannot export read-only node as writable")
        self.id = export_id
        self.name = node.name if name is None else name
        if len(self.name.encode()) > MAX_STRING:
            raise BlockError(f"export name '{self.name[:20]}...' too long")
        if len(description.encode()) > MAX_STRING:
            raise BlockError(f"description '{description[:20]}...' too long")
        self.description = description
        self.writable = writable
        self._node_name = node.name  # the last one
        self.shutting_down = False
        self.on_idle: Callable[[], object] | None = None  # the last client has gone; must not wait
        self.connections: list[Connection] = []
        self.statistics = ExportStatistics()
        self._multi_conn = multi_conn
        self._fixed_iothread = fixed_iothread
        self.backend = BlockBackend(
            graph,
            held=PERM_CONSISTENT_READ | (PERM_WRITE if writable else 0),
            shared=PERM_ALL & ~(PERM_RESIZE | (PERM_WRITE if exclusive else 0)),
            writethrough=writethrough,
            allow_context_change=not fixed_iothread,
            allow_inactive=allow_inactive,
        )
        try:
            self.backend.insert(node)
            self._bitmaps = ShownBitmaps(graph, node, bitmaps, writable=writable)
        except BaseException:
            self.backend.close()
            raise
        self.backend.on_drain = self._drained
        self.backend.on_moving = self._move
        self.moving = False  # clients who come meanwhile wait
        self.alignment = node.request_alignment

    @property
    def node_name(self) -> str:
        """The node that it exports now: another one takes its place when an overlay is put above it."""
        if self.backend.root is not None:
            self._node_name = self.backend.root.node.name
        return self._node_name

    @property
    def context(self) -> AioContext:
        return self.backend.context

    @property
    def info(self) -> ExportInfo:
        """What a client that connects now is told."""
        flags = WRITABLE_FLAGS if self.writable else READ_ONLY_FLAGS
        return ExportInfo(
            name=self.name,
            size=self.backend.size,
            flags=flags | (FLAG_CAN_MULTI_CONN if self._multi_conn else 0),
            description=self.description,
            minimum_block_size=self.alignment,
            preferred_block_size=max(4096, self.alignment),
            maximum_block_size=MAX_REQUEST,
            contexts=(CONTEXT_BASE_ALLOCATION, *self.bitmaps),
        )

    @property
    def bitmaps(self) -> Mapping[str, NamedBitmap]:
        """Those that clients may ask for, by metadata context."""
        return self._bitmaps.by_context

    def attach(self, connection: Connection) -> None:
        """A client has chosen this export. Main thread."""
        self.connections.append(connection)

    def detach(self, connection: Connection) -> None:
        """A client has gone. In the connection's context."""
        self.connections.remove(connection)
        if not self.connections and self.on_idle is not None:
            self.on_idle()

    @contextmanager
    def _move(self) -> Iterator[None]:
        """The node moves to another thread, and the clients' sockets with it. Meanwhile they belong to the main thread,
        which touches them no more than it has to."""
        if self.backend.drained and any(connection.in_flight for connection in self.connections):
            raise BlockError(f"Export '{self.id}' cannot change its iothread while it is drained")
        assert not self.moving
        self.moving = True
        try:
            for connection in list(self.connections):
                connection.leave_soon()
            what = f"clients of export '{self.id}' to leave their thread"
            wait_while(None, lambda: not all(each.left for each in self.connections), what=what)
            yield
        finally:
            self.moving = False
            for connection in list(self.connections):
                connection.join(self.context)

    def _drained(self) -> None:
        if self.context.is_home:
            self._keep_file_bytes()
        elif self.connections:  # they belong to another thread, which has to have been there first
            self.backend.run_at_home(self._keep_file_bytes)

    def _keep_file_bytes(self) -> None:
        for connection in list(self.connections):
            connection.keep_file_bytes()

    def disconnect(self) -> None:
        """Accept no new clients and send the present ones away. They are gone when ``connections`` is empty."""
        self.shutting_down = True
        for connection in list(self.connections):
            connection.close_soon()

    def close(self) -> None:
        """Make everything durable and give the node back. All clients are gone. Main thread."""
        assert not self.connections
        if self.writable:
            try:
                self.backend.request(FLUSH, 0, 0)
            except OSError:
                pass  # the disk failed; whoever cared has flushed, and was told
        self._bitmaps.release(self.backend.graph)
        self.backend.close()
