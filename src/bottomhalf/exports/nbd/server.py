# SPDX-License-Identifier: Apache-2.0
"""The NBD server: a listening socket, the exports behind it, the clients in front.

    server = NbdServer(context)
    server.listen(UnixAddress("/run/disk.sock"))
    server.add(NbdExport(graph, "e0", node, name="disk", writable=True))
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import AioContext
from bottomhalf.block import BlockError
from bottomhalf.exports.nbd.connection import Connection
from bottomhalf.exports.nbd.export import NbdExport
from bottomhalf.host.protocol import Address, Listener
from bottomhalf.wire.nbd.export import ExportInfo

if TYPE_CHECKING:
    from bottomhalf.tls.policy import Security

CONNECTIONS_MAX_DEFAULT: Final = 100  # QEMU's max-connections
HANDSHAKE_SECONDS_MAX_DEFAULT: Final = 10  # QEMU's handshake-max-seconds
ACCEPT_PAUSE_NS: Final = 100_000_000  # after running out of descriptors


class NbdServer:
    """Serves exports over one listening socket. Home thread of ``context``."""

    def __init__(
        self,
        context: AioContext,
        *,
        connections_max: int = CONNECTIONS_MAX_DEFAULT,
        handshake_seconds_max: int = HANDSHAKE_SECONDS_MAX_DEFAULT,
        security: Security | None = None,
        log: Callable[[str], object] | None = None,
    ) -> None:
        """``connections_max`` 0 is no limit; beyond it clients wait in the backlog. ``handshake_seconds_max`` 0
        lets a client take its time. ``security``: clients must use TLS, and which of them may come in. ``log`` gets a
        line for each thing that an operator may want to know."""
        self.context = context
        self.security = security
        self.connections: list[Connection] = []
        self.exports: dict[str, NbdExport] = {}
        self.connections_max = connections_max
        self.handshake_max_ns = handshake_seconds_max * 1_000_000_000
        self.log: Callable[[str], object] = log or (lambda line: None)
        self.clients_seen = 0
        self.on_empty: Callable[[], object] | None = None  # the last client has gone
        self._listener: Listener | None = None
        self._accepting = False
        self._pause = context.timer(self._accept_if_room, name="NBD accept pause")

    @property
    def address(self) -> Address | None:
        """Where clients find us, with the real port."""
        return self._listener.address if self._listener is not None else None

    def listen(self, address: Address) -> None:
        """OSError if the address cannot be had."""
        assert self._listener is None
        self._listener = self.context.host.listen(address)
        self._accept_if_room()

    # -- exports ------------------------------------------------------------------------------------------------

    def add(self, export: NbdExport) -> None:
        if export.name in self.exports:
            raise BlockError(f"NBD server already has export named '{export.name}'")
        self.exports[export.name] = export

    def drop(self, export: NbdExport) -> None:
        """The name leads nowhere any more."""
        self.exports.pop(export.name, None)

    def list_exports(self) -> list[ExportInfo]:
        return [export.info for export in self.exports.values() if not export.shutting_down]

    def find_export(self, name: str) -> ExportInfo | None:
        export = self.export_named(name)
        return export.info if export is not None and not export.shutting_down else None

    def export_named(self, name: str) -> NbdExport | None:
        """The export of that name; "" is the only one if there is just one."""
        if name == "" and "" not in self.exports and len(self.exports) == 1:
            return next(iter(self.exports.values()))
        return self.exports.get(name)

    # -- clients ------------------------------------------------------------------------------------------------

    def _accept_if_room(self) -> None:
        if self._listener is None:
            return
        room = not self.connections_max or len(self.connections) < self.connections_max
        if room != self._accepting:
            self._accepting = room
            self.context.set_fd_handler(self._listener.fileno(), self._accept if room else None)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            socket = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            self.log(f"cannot accept a client: {error.strerror}")
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                self._accepting = False
                self.context.set_fd_handler(self._listener.fileno())
                self._pause.arm_ns(self.context.now_ns() + ACCEPT_PAUSE_NS)
            return
        self.clients_seen += 1
        connection = Connection(self, socket)
        self.connections.append(connection)
        connection.start()  # which may end it already
        self._accept_if_room()

    def forget(self, connection: Connection) -> None:
        """A client is gone, from whichever context it was served."""
        if connection in self.connections:
            self.connections.remove(connection)
        if not self.connections and self.on_empty is not None:
            self.on_empty()
        if self._listener is None:
            return
        if connection.context is self.context:
            self._accept_if_room()
        else:
            self.context.schedule_oneshot(self._accept_if_room)

    def stop(self) -> None:
        """Stop listening and send all clients away; wait for ``connections`` to become empty afterwards."""
        self._pause.cancel()
        if self._listener is not None:
            if self._accepting:
                self.context.set_fd_handler(self._listener.fileno())
                self._accepting = False
            self._listener.close()
            self._listener = None
        for connection in list(self.connections):
            connection.close_soon()
