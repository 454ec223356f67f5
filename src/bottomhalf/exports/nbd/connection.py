# SPDX-License-Identifier: Apache-2.0
"""One client's connection: the handshake, then the transmission, then the end.

The handshake runs in the server's context; once the client has chosen an export, the connection moves to the
export's context. If the server has credentials, a TLS handshake lies in the midst of the first, and from then on the
socket is a stream of the same shape (``tls.stream``), with one difference: it may have bytes for us that the loop does
not see (``_read_again``).

Whatever ends it (the client says goodbye, vanishes, breaks the protocol, stalls the handshake; the export or the server
goes away), the socket is closed at once, requests that are still in the block layer finish into the void, and only then
is the memory given back and the server told.
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
    from bottomhalf.tls.handshaking import Handshaking
    from bottomhalf.tls.stream import TlsStream

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
        self.identity = ""  # the name in the client's certificate
        self._handshake: ServerHandshake | None = ServerHandshake(server, tls=server.security is not None)
        self.secure: TlsStream | None = None  # the socket, once the TLS handshake is done
        self._securing: Handshaking | None = None
        self._again_in: AioContext | None = None  # where _read_again() is scheduled
        self.output = Output(socket)
        self._transmission: Transmission | None = None
        self._gone = False
        self._leaving = False  # it is to leave its context for another; nothing new is begun
        self.left = False  # it has, and belongs to the main thread
        self._watched: tuple[Callable[[], None] | None, Callable[[], None] | None] = (None, None)
        self._timer: Timer | None = None
        if server.handshake_max_ns:
            self._timer = self.context.timer(self._too_slow, name="NBD handshake")
            self._timer.arm_ns(self.context.now_ns() + server.handshake_max_ns)

    def start(self) -> None:
        """Greet the client."""
        self._send_handshake()

    # -- handshake ----------------------------------------------------------------------------------------------

    def _send_handshake(self) -> None:
        assert self._handshake is not None
        data = self._handshake.take_output()
        try:
            if data:
                self.output.send(data)
        except OSError as error:
            self.lost(error)
            return
        self.progress()

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
        except Exception as error:
            self._broken(error)
            return
        if handshake.state is State.NEGOTIATED:
            self._negotiated(handshake)
            return
        self._send_handshake()

    def _negotiated(self, handshake: ServerHandshake) -> None:
        assert handshake.negotiated is not None
        self._cancel_timer()
        export = self.server.export_named(handshake.negotiated.export.name)
        if export is None or export.shutting_down:
            self.close()
            return
        self.export = export
        export.attach(self)
        # Nothing is watched until the export's context, perhaps another thread's, goes on.
        self._unwatch()
        self._transmission = Transmission(self, export, handshake.negotiated)
        if export.moving:
            self._leaving = self.left = True
        else:
            self.join(export.context)

    def _begin(self) -> None:
        """Go on, or begin with the transmission phase, in the export's context."""
        if not self.context.is_home or self.left:
            return  # it has left again, and will join again
        transmission = self._transmission
        if transmission is None:
            return  # closed and gone
        transmission.enter(self.context)
        if self.closed:
            self._finish()
        elif self._handshake is not None:
            self._send_handshake()  # the answer to GO or EXPORT_NAME
            self._handshake = None
        else:
            self.progress()

    # -- from one context to another ----------------------------------------------------------------------------

    def leave_soon(self) -> None:
        """Begin nothing new, and when all is answered belong to the main thread. Main thread."""
        context = self.context

        def leave() -> None:
            if self.context is context and not self.left:
                self._leaving = True
                self._unwatch()
                self.progress()

        context.schedule_oneshot(leave)

    def _leave(self) -> None:
        """Nothing is in flight: let go of everything that belongs to the thread. In its context."""
        assert self._transmission is not None
        self.keep_file_bytes()
        self._unwatch()
        self._transmission.leave()
        self.left = True
        kick()

    def join(self, context: AioContext) -> None:
        """Go on in a context. Main thread, to which the connection belongs now."""
        if self._gone:
            return
        self._leaving = self.left = False
        self.context = context
        if context.is_home:
            self._begin()
        else:
            context.schedule_oneshot(self._begin)

    # -- transmission -------------------------------------------------------------------------------------------

    def _on_requests(self) -> None:
        transmission = self._transmission
        assert transmission is not None
        try:
            alive = transmission.receive()
        except Exception as error:
            self._broken(error)
            return
        if not alive:
            self.close()
        elif self.output or self.closed or not transmission.wants_input:
            self.progress()

    def _on_writable(self) -> None:
        try:
            self.output.flush()
        except Exception as error:
            self._broken(error)
            return
        self.progress()

    def progress(self) -> None:
        """Something has changed: decide what to wait for now, or whether this is the end."""
        transmission = self._transmission
        if transmission is None:
            self._progress_handshake()
            return
        if transmission.busy:
            return  # whoever is serving comes here afterwards
        if self._leaving and not self.closed:
            if not transmission.in_flight and not self.left:
                self._leave()
            return
        if self._watched[0] is None and not self.closed and not transmission.finishing and transmission.has_room:
            try:
                transmission.serve()  # what was received before a bound was reached
            except Exception as error:
                self._broken(error)
                return
        if self.closed:
            self._finish()
        elif transmission.finishing and not transmission.in_flight and not self.output:
            self.close()
        else:
            self._watch(reading=transmission.wants_input)

    def _progress_handshake(self) -> None:
        if self.closed:
            self._finish()
            return
        assert self._handshake is not None
        if self._handshake.state is State.STARTTLS and not self.output:
            self._start_tls()
            return
        over = self._handshake.state in (State.ABORTED, State.FAILED, State.STARTTLS)
        if over and not self.output:  # not for STARTTLS, as above
            self.close()
        else:  # who does not read our answers may not ask more
            self._watch(reading=not over and not self.output)

    def _unwatch(self) -> None:
        self._watched = (None, None)
        self.context.set_fd_handler(self.socket.fileno())

    def _watch(self, *, reading: bool) -> None:
        if self._transmission is None:
            on_request = self._on_handshake
        else:
            on_request = self._on_requests if self.secure is None else self._on_secure_requests
        wanted = (on_request if reading else None, self._on_writable if self.output else None)
        if wanted != self._watched:
            self._watched = wanted
            self.context.set_fd_handler(self.socket.fileno(), *wanted)
        if reading and self.secure is not None and self.secure.buffered:
            self._read_again()

    # -- TLS ----------------------------------------------------------------------------------------------------

    def _start_tls(self) -> None:
        """The client has our word that TLS begins."""
        from bottomhalf.tls.handshaking import Handshaking

        security = self.server.security
        if self._securing is not None or security is None:
            return
        self._unwatch()
        try:
            stream = security.wrap(self.socket)
        except OSError as error:
            self.lost(error)
            return
        # The clock that bounds the whole negotiation runs.
        self._securing = Handshaking(self.context, stream, self._tls_ended, limit_ns=0)

    def _tls_ended(self, error: OSError | None) -> None:
        """The TLS handshake is over: ask whether the client may come in, and go on in private."""
        assert self._securing is not None and self.server.security is not None and self._handshake is not None
        stream, self._securing = self._securing.stream, None
        if error is None:
            self.socket = stream
            try:
                self.identity = self.server.security.admit(stream)
            except OSError as refusal:
                error = refusal
        if error is not None:
            self.lost(error)
            return
        self.secure = stream
        self.output = Output(stream)
        self._handshake.tls_started()
        self.progress()

    def _read_again(self) -> None:
        """Decrypted bytes lie in the stream, of which the poller does not know."""
        context = self.context

        def again() -> None:
            if self._again_in is context:
                self._again_in = None
            if self.context is context and not self.left and self._watched[0] is not None:
                self._watched[0]()

        if self._again_in is not context:
            self._again_in = context
            context.schedule_oneshot(again)

    def _on_secure_requests(self) -> None:
        self._on_requests()
        if not self.closed:
            self.progress()

    # -- the end ------------------------------------------------------------------------------------------------

    def complain(self, error: ProtocolError) -> None:
        """The client broke the protocol."""
        self.server.log(f"{self.peer}: {error}")

    def lost(self, error: Exception) -> None:
        """The connection broke."""
        if not self.closed:
            self.server.log(f"{self.peer}: connection lost: {error}")
        self.close()

    def _broken(self, error: Exception) -> None:
        """Serving failed. If it is our own fault, the client shall not wait for answers all the same."""
        self.lost(error)
        if not isinstance(error, (OSError, FileEnded)):
            raise error

    @property
    def in_flight(self) -> int:
        """Requests of this client that are in the block layer."""
        return self._transmission.in_flight if self._transmission is not None else 0

    def keep_file_bytes(self) -> None:
        """See Transmission.keep_file_bytes. Whoever drains the disk is not to blame if it cannot be read."""
        if self._transmission is not None and not self.closed and not self.left:
            try:
                self._transmission.keep_file_bytes()
            except OSError as error:
                self.lost(error)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def close_soon(self) -> None:
        """End the connection in its own context. Main thread."""
        context = self.server.context if self.left else self.context

        def close() -> None:
            if context is (self.server.context if self.left else self.context):
                self.close()
            else:
                self.close_soon()  # it has chosen an export meanwhile, or moves with it

        context.schedule_oneshot(close)

    def close(self) -> None:
        """End the connection now. Idempotent. In its context."""
        if not self.closed:
            self.closed = True
            self._cancel_timer()
            if self._securing is not None:
                self._securing.cancel()
                self._securing = None
            if not self.left:
                self._unwatch()
            self.socket.shutdown()
            self.output.drop()
            if self._transmission is not None:
                self._transmission.lending.end()
            else:
                self.socket.close()
        self._finish()

    def _finish(self) -> None:
        """Once nothing is in flight any more: memory back, server told."""
        transmission = self._transmission
        if self._gone or (transmission is not None and (transmission.in_flight or transmission.busy)):
            return
        self._gone = True
        if transmission is not None:
            transmission.close()
            self._transmission = None  # its memory goes even if somebody remembers us, like a cancelled timer
        if self.export is not None:
            self.export.detach(self)
        self.server.forget(self)
        kick()
