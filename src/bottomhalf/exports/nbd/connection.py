# SPDX-License-Identifier: Apache-2.0
"""One client's connection: the handshake, then the transmission, then the end.

The handshake runs in the server's context; once the client has chosen an export, the connection moves to the
export's context. Whatever ends it (the client says goodbye, vanishes, breaks the protocol, stalls the handshake;
the export or the server goes away), the socket is closed at once, requests that are still in the block layer
finish into the void, and only then is the memory given back and the server told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import AioContext, Timer, kick
from bottomhalf.exports.nbd.output import FileEnded, Output
from bottomhalf.exports.nbd.transmission import Transmission
from bottomhalf.host.protocol import Socket
from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd.server_handshake import ServerHandshake, State

if TYPE_CHECKING:
    from bottomhalf.exports.nbd.export import NbdExport
    from bottomhalf.exports.nbd.server import NbdServer

HANDSHAKE_RECEIVE_BYTES: Final = 65536


class Connection:
    """A client. Home thread of ``context``."""

    def __init__(self, server: NbdServer, socket: Socket) -> None:
        self.server = server
        self.socket = socket
        self.context: AioContext = server.context
        self.export: NbdExport | None = None
        self.closed = False
        self.peer = socket.peer_name()
        self._handshake: ServerHandshake | None = ServerHandshake(server)
        self._output = Output(socket)
        self._transmission: Transmission | None = None
        self._gone = False
        self._watched: tuple[Callable[[], None] | None, Callable[[], None] | None] = (None, None)
        self._timer: Timer | None = None
        if server.handshake_max_ns:
            self._timer = self.context.timer(self._too_slow, name="NBD handshake")
            self._timer.arm_ns(self.context.now_ns() + server.handshake_max_ns)
        self._send_handshake()

    # -- handshake ----------------------------------------------------------------------------------------------

    def _send_handshake(self) -> None:
        assert self._handshake is not None
        data = self._handshake.take_output()
        try:
            if data:
                self._output.send(data)
        except OSError as error:
            self.lost(error)
            return
        self._watch(reading=True)

    def _too_slow(self) -> None:
        self.server.log(f"{self.peer}: no export chosen within the handshake limit")
        self.close()

    def _on_handshake(self) -> None:
        handshake = self._handshake
        assert handshake is not None
        buffer = bytearray(HANDSHAKE_RECEIVE_BYTES)
        try:
            count = self.socket.recv_into(buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self.lost(error)
            return
        if count == 0:
            self.close()
            return
        try:
            handshake.receive(memoryview(buffer)[:count])
        except ProtocolError as error:
            self.complain(error)
        if handshake.state is State.NEGOTIATED:
            self._negotiated(handshake)
            return
        self._send_handshake()
        if handshake.state in (State.ABORTED, State.FAILED):
            self.close()

    def _negotiated(self, handshake: ServerHandshake) -> None:
        assert handshake.negotiated is not None
        self._cancel_timer()
        self._handshake = None
        export = self.server.export_named(handshake.negotiated.export.name)
        if export is None or export.shutting_down:
            self.close()
            return
        self.export = export
        export.connections.append(self)
        transmission = Transmission(self, export, handshake.negotiated)
        self._transmission = transmission
        answer = handshake.take_output()

        def begin() -> None:
            if self.closed:
                self._finish()
                return
            self._output = transmission.output
            try:
                if answer:
                    self._output.send(answer)
                transmission.serve()
            except (OSError, FileEnded) as error:
                self.lost(error)
                return
            self.progress()

        if export.context is self.context:
            begin()
        else:
            self._watch(reading=False)
            self.context = export.context
            self.context.schedule_oneshot(begin)

    # -- transmission -------------------------------------------------------------------------------------------

    def _on_requests(self) -> None:
        assert self._transmission is not None
        try:
            alive = self._transmission.receive()
        except BlockingIOError:
            return
        except (OSError, FileEnded) as error:
            self.lost(error)
            return
        if not alive:
            self.close()
            return
        if self._output or self._transmission.finishing or not self._transmission.has_room:
            self.progress()

    def _on_writable(self) -> None:
        try:
            self._output.flush()
            if self._transmission is not None and not self.closed:
                self._transmission.serve()
        except (OSError, FileEnded) as error:
            self.lost(error)
            return
        self.progress()

    def progress(self) -> None:
        """Something has changed: decide what to wait for now, or whether this is the end."""
        if self.closed:
            self._finish()
            return
        transmission = self._transmission
        if transmission is None:
            self._watch(reading=True)
            return
        if transmission.finishing:
            if not transmission.in_flight and not self._output:
                self.close()
            else:
                self._watch(reading=False)
            return
        if transmission.has_room and self._watched[0] is None:
            try:
                transmission.serve()  # what was received before the bound was reached
            except (OSError, FileEnded) as error:
                self.lost(error)
                return
        self._watch(reading=transmission.has_room and not transmission.finishing)
        if transmission.finishing and not transmission.in_flight and not self._output:
            self.close()

    def _watch(self, *, reading: bool) -> None:
        on_request = self._on_handshake if self._transmission is None else self._on_requests
        wanted = (on_request if reading else None, self._on_writable if self._output else None)
        if wanted != self._watched:
            self._watched = wanted
            self.context.set_fd_handler(self.socket.fileno(), *wanted)

    # -- the end ------------------------------------------------------------------------------------------------

    def complain(self, error: ProtocolError) -> None:
        """The client broke the protocol."""
        self.server.log(f"{self.peer}: {error}")

    def lost(self, error: Exception) -> None:
        """The connection broke."""
        if not self.closed:
            self.server.log(f"{self.peer}: connection lost: {error}")
            self.close()

    @property
    def in_flight(self) -> int:
        """Requests of this client that are in the block layer."""
        return self._transmission.in_flight if self._transmission is not None else 0

    def keep_file_bytes(self) -> None:
        """See Transmission.keep_file_bytes."""
        if self._transmission is not None:
            self._transmission.keep_file_bytes()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        """End the connection now. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._cancel_timer()
        self.context.set_fd_handler(self.socket.fileno())
        self.socket.shutdown()
        self.socket.close()
        self._output.drop()
        self._finish()

    def _finish(self) -> None:
        """Once nothing is in flight any more: memory back, server told."""
        transmission = self._transmission
        if self._gone or (transmission is not None and transmission.in_flight):
            return
        self._gone = True
        if transmission is not None:
            transmission.close()
        if self.export is not None and self in self.export.connections:
            self.export.connections.remove(self)
            if not self.export.connections and self.export.on_idle is not None:
                self.export.on_idle()
        self.server.forget(self)
        kick()
