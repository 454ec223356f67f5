# SPDX-License-Identifier: Apache-2.0
"""All exports of a program by id, and the NBD server that serves most of them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from bottomhalf.aio import AioContext, wait_while
from bottomhalf.block import BlockError, Graph
from bottomhalf.block.graph import is_well_formed_id
from bottomhalf.exports.nbd.export import NbdExport
from bottomhalf.exports.nbd.server import NbdServer
from bottomhalf.host.protocol import Address, UnixAddress
from bottomhalf.qapi.export import (
    BlockExportInfo,
    BlockExportOptions,
    BlockExportOptionsNbd,
    BlockExportRemoveMode,
    BlockExportType,
)

if TYPE_CHECKING:
    from bottomhalf.tls.policy import Security


class ExportRegistry:
    """Exports that exist. Changed only by the main thread, outside coroutines.

    ``on_deleted(export_id)`` is called when an export is really gone."""

    def __init__(
        self,
        graph: Graph,
        find_iothread: Callable[[str], AioContext],
        on_deleted: Callable[[str], object],
        log: Callable[[str], object] | None = None,
    ) -> None:
        self._graph = graph
        self._find_iothread = find_iothread
        self._on_deleted = on_deleted
        self._log = log
        self.exports: dict[str, NbdExport] = {}
        self.nbd_server: NbdServer | None = None

    # -- the NBD server -----------------------------------------------------------------------------------------

    def start_nbd_server(
        self,
        address: Address,
        *,
        connections_max: int,
        handshake_seconds_max: int,
        security: Security | None = None,
    ) -> NbdServer:
        if self.nbd_server is not None:
            raise BlockError("NBD server already running")
        server = NbdServer(
            self._graph.context,
            connections_max=connections_max,
            handshake_seconds_max=handshake_seconds_max,
            security=security,
            log=self._log,
        )
        try:
            server.listen(address)
        except OSError as error:
            raise BlockError(why_not_listening(address, error)) from error
        self.nbd_server = server
        return server

    def stop_nbd_server(self) -> None:
        """Remove all NBD exports, send the clients away, stop listening. Waits until that is done."""
        server = self.nbd_server
        if server is None:
            raise BlockError("NBD server not running")
        self.nbd_server = None
        server.stop()
        for export in list(self.exports.values()):
            self._shut_down(export)
        wait_while(None, lambda: server.connections, what="clients of the NBD server to go")
        self._reap()

    # -- exports ------------------------------------------------------------------------------------------------

    def add(self, options: BlockExportOptions, *, exclusive: bool = False) -> NbdExport:
        """block-export-add. BlockError says why not. ``exclusive`` does not let others write to the image, in
        this program or another (QEMU's exports do)."""
        if not is_well_formed_id(options.id):
            raise BlockError("Invalid block export id")
        if options.id in self.exports:
            raise BlockError(f"Block export id '{options.id}' is already in use")
        branch = options.branch
        assert isinstance(branch, BlockExportOptionsNbd)
        node = self._graph.find(options.node_name)
        context = self._find_iothread(options.iothread) if options.iothread is not None else None
        if branch.allocation_depth:
            raise BlockError("qemu:allocation-depth is not supported yet; remove 'allocation-depth'")
        if options.writable and node.read_only:
            raise BlockError("Cannot export read-only node as writable")
        server = self.nbd_server
        if server is None:
            raise BlockError("NBD server not running")
        name = branch.name if branch.name is not None else options.node_name
        if name in server.exports:
            raise BlockError(f"NBD server already has export named '{name}'")
        if context is not None:
            try:
                self._graph.move(node, context)
            except BlockError:
                if options.fixed_iothread:
                    raise
        if not options.allow_inactive:
            self._graph.activate(node)
        try:
            export = NbdExport(
                self._graph,
                options.id,
                node,
                name=name,
                description=branch.description or "",
                writable=options.writable,
                writethrough=options.writethrough,
                multi_conn=server.connections_max != 1,
                exclusive=exclusive,
                fixed_iothread=options.fixed_iothread,
                allow_inactive=options.allow_inactive,
                bitmaps=branch.bitmaps or (),
            )
        except BaseException:
            self._graph.bring_home([node])
            raise
        server.add(export)
        self.exports[options.id] = export
        return export

    def remove(self, export_id: str, mode: BlockExportRemoveMode) -> None:
        """block-export-del: returns at once; on_deleted tells when the export is gone."""
        export = self.exports.get(export_id)
        if export is None:
            raise BlockError(f"Export '{export_id}' is not found")
        if export.shutting_down:
            raise BlockError(f"Export '{export_id}' is already shutting down")
        if mode == BlockExportRemoveMode.SAFE and export.connections:
            raise BlockError(f"export '{export_id}' still in use\nUse mode='hard' to force client disconnect")
        self._shut_down(export)
        self._graph.context.schedule_oneshot(self._reap)

    def _shut_down(self, export: NbdExport) -> None:
        if not export.shutting_down:
            export.on_idle = lambda: self._graph.context.schedule_oneshot(self._reap)
            export.disconnect()
            if self.nbd_server is not None:
                self.nbd_server.drop(export)

    def _reap(self) -> None:
        """Close the exports that are shutting down and have no clients left. Closing waits, and a wait may come
        here again: whoever takes an export from the table closes it."""
        for export_id, export in list(self.exports.items()):
            if export.shutting_down and not export.connections and self.exports.get(export_id) is export:
                del self.exports[export_id]
                export.close()
                self._on_deleted(export_id)

    def infos(self) -> list[BlockExportInfo]:
        """The newest first, as QEMU lists them."""
        return [
            BlockExportInfo(
                id=export.id,
                type=BlockExportType(export.kind),
                node_name=export.node_name,
                shutting_down=export.shutting_down,
            )
            for export in reversed(self.exports.values())
        ]

    def close(self) -> None:
        """Remove everything, waiting for what is in flight."""
        if self.nbd_server is not None:
            self.stop_nbd_server()
        for export in list(self.exports.values()):
            self._shut_down(export)
        self._reap()


def why_not_listening(address: Address, error: OSError) -> str:
    """QEMU's sentence for it, which scripts know."""
    reason = error.strerror or str(error)
    if isinstance(address, UnixAddress):
        return f"Failed to bind socket to {address.path}: {reason}"
    resolution = "address resolution failed"
    if reason.startswith(resolution):
        return f"{resolution} for {address}{reason.removeprefix(resolution)}"
    what = "Failed to find an available port" if error.errno == errno.EADDRINUSE else "Failed to bind socket"
    return f"{what}: {reason}"
