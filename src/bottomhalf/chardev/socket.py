# SPDX-License-Identifier: Apache-2.0
"""Sockets as character devices: one that listens and serves a client at a time, one that connects and, if it is told
to, connects again.

Making a connection can take as long as the network likes. The first one is made while the caller waits, who wants to
know whether it works; later ones in a worker thread, for then the loop has others to serve.

With TLS a peer counts as connected when the handshake is done and it may come in; until then nobody else is served. Of
what it says, some may lie decrypted in the stream where the loop does not see it, so we look there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import AioContext, wait_while
from bottomhalf.chardev.addresses import why_not_connected
from bottomhalf.chardev.base import Chardev
from bottomhalf.chardev.telnet import GREETING, TelnetDecoder, escape
from bottomhalf.host.protocol import Address, InetAddress, Listener, Socket, UnixAddress

if TYPE_CHECKING:
    from bottomhalf.tls.handshaking import Handshaking
    from bottomhalf.tls.policy import Security
    from bottomhalf.tls.stream import TlsStream

ACCEPT_PAUSE_NS: Final = 100_000_000  # after running out of descriptors


class SocketChardev(Chardev):
    """What both ends share."""

    kind = "socket"
    server = False

    def __init__(
        self,
        chardev_id: str,
        context: AioContext,
        address: Address,
        *,
        telnet: bool = False,
        security: Security | None = None,
        log: Callable[[str], object] | None = None,
    ) -> None:
        super().__init__(chardev_id, context)
        self.address = address
        self.telnet = telnet
        self.security = security
        self._decoder = TelnetDecoder()
        self._log_line = log or (lambda line: None)
        self._securing: Handshaking | None = None
        self._secure: TlsStream | None = None
        self._again_in: AioContext | None = None  # where a look at what is decrypted is scheduled

    def describe(self) -> str:
        prefix = "" if isinstance(self.address, UnixAddress) else "telnet:" if self.telnet else "tcp:"
        text = f"{prefix}{self.address}"
        if self.server:
            text += ",server=on"
        return text if self.connected else f"disconnected:{text}"

    def address_info(self) -> dict[str, object]:
        """The address as the schema's SocketAddress."""
        if isinstance(self.address, UnixAddress):
            return {"type": "unix", "path": self.address.path}
        assert isinstance(self.address, InetAddress)
        return {"type": "inet", "host": self.address.host, "port": str(self.address.port)}

    def write(self, data: bytes) -> None:
        super().write(escape(data) if self.telnet else data)

    # -- TLS ----------------------------------------------------------------------------------------------------

    def _take(self, stream: Socket) -> None:
        """A connection is made: it begins now, or after the TLS handshake."""
        if self.security is None:
            self._begin(stream)
            return
        from bottomhalf.tls.handshaking import Handshaking

        try:
            secure = self.security.wrap(stream)
        except OSError as error:
            self._refuse(stream, error)
            return
        self._securing = Handshaking(self.context, secure, self._secured)

    def _secured(self, error: OSError | None) -> None:
        assert self._securing is not None and self.security is not None
        stream, self._securing = self._securing.stream, None
        try:
            if error is not None:
                raise error
            self.security.admit(stream)
        except OSError as refusal:
            self._refuse(stream, refusal)
            return
        self._secure = stream
        self._begin(stream)

    def _refuse(self, stream: Socket, error: OSError) -> None:
        self._log_line(f"chardev {self.id}: {stream.peer_name()}: {error}")
        stream.shutdown()
        stream.close()
        self._missed()

    def _missed(self) -> None:
        """A connection has not come about."""

    def _watch(self) -> None:
        super()._watch()
        self._look_at_decrypted()

    def _readable(self) -> None:
        super()._readable()
        self._look_at_decrypted()

    def _look_at_decrypted(self) -> None:
        stream, context = self._secure, self.context
        if stream is None or not stream.buffered or stream is not self._stream or self._watched[0] is None:
            return

        def again() -> None:
            if self._again_in is context:
                self._again_in = None
            if self.context is context and self._watched[0] is not None:
                self._watched[0]()

        if self._again_in is not context:
            self._again_in = context
            context.schedule_oneshot(again)

    def _leave(self) -> None:
        super()._leave()
        if self._securing is not None:
            self._securing.leave()

    def _arrive(self) -> None:
        if self._securing is not None:
            self._securing.enter(self.context)
        super()._arrive()

    def _end(self) -> None:
        self._secure = None
        super()._end()

    def close(self) -> None:
        if self._securing is not None:
            self._securing.close()
            self._securing = None
        super().close()

    # -- telnet -------------------------------------------------------------------------------------------------

    def _begin(self, stream: Socket) -> None:
        if self.telnet and self._stream is not stream:
            self._decoder = TelnetDecoder()
            self._unsent.append(memoryview(GREETING))
            self._unsent_bytes += len(GREETING)
        super()._begin(stream)

    def _arrived(self, data: memoryview) -> None:
        if not self.telnet:
            super()._arrived(data)
            return
        plain = self._decoder.feed(bytes(data))
        if plain:
            super()._arrived(memoryview(plain))


class SocketServerChardev(SocketChardev):
    """Listens; serves one client at a time."""

    server = True

    def __init__(
        self,
        chardev_id: str,
        context: AioContext,
        address: Address,
        *,
        wait: bool,
        telnet: bool = False,
        security: Security | None = None,
        log: Callable[[str], object] | None = None,
    ) -> None:
        listener = context.host.listen(address)
        super().__init__(chardev_id, context, listener.address, telnet=telnet, security=security, log=log)
        self.wait = wait
        self._listener: Listener | None = listener
        self._pause = context.timer(self.start, name=f"accept pause of chardev {chardev_id}")

    def start(self) -> None:
        if self._listener is not None and self._stream is None and self._securing is None:
            self.context.set_fd_handler(self._listener.fileno(), self._accept)

    def _missed(self) -> None:
        self.start()

    def _leave(self) -> None:
        super()._leave()
        self._pause.cancel()
        if self._listener is not None and self._stream is None:
            self.context.set_fd_handler(self._listener.fileno())

    def _arrive(self) -> None:
        self._pause = self.context.timer(self.start, name=f"accept pause of chardev {self.id}")
        super()._arrive()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            stream = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:  # no descriptors, no memory: the client waits
            self.context.set_fd_handler(self._listener.fileno())
            self._pause.arm_ns(self.context.now_ns() + ACCEPT_PAUSE_NS)
            return
        self.context.set_fd_handler(self._listener.fileno())
        self._take(stream)

    def _end(self) -> None:
        super()._end()
        self.start()

    def close(self) -> None:
        listener, self._listener = self._listener, None
        self._pause.cancel()
        if listener is not None:
            if self._stream is None:
                self.context.set_fd_handler(listener.fileno())
            listener.close()
        super().close()


class SocketClientChardev(SocketChardev):
    """A connection that we make. ``reconnect_ns`` after its end, or a failure, it is made again; 0 for never."""

    def __init__(
        self,
        chardev_id: str,
        context: AioContext,
        address: Address,
        *,
        reconnect_ns: int = 0,
        telnet: bool = False,
        security: Security | None = None,
        log: Callable[[str], object] | None = None,
    ) -> None:
        super().__init__(chardev_id, context, address, telnet=telnet, security=security, log=log)
        self.reconnect_ns = reconnect_ns
        self._told = False  # why it does not connect; once per silence
        self._closing = False
        self._waiting: Socket | None = None if reconnect_ns else context.host.connect(address)
        self._retry = context.timer(self._connect, name=f"reconnection of chardev {chardev_id}")
        self._connecting = False

    def start(self) -> None:
        if self._waiting is not None:
            stream, self._waiting = self._waiting, None
            self._take(stream)
        elif self._stream is None and self._securing is None and self.reconnect_ns:
            self._connect()

    def _connect(self) -> None:
        """Try once more, in a worker thread."""
        if self._stream is not None or self._securing is not None or self._closing or self._connecting:
            return
        host, address = self.context.host, self.address
        self._connecting = True
        self.context.thread_pool.submit(lambda: host.connect(address), self._tried)

    def _tried(self, request: object) -> None:
        self._connecting = False
        try:
            stream: Socket = request.result()  # type: ignore[attr-defined]
        except OSError as error:
            if not self._told:
                self._told = True
                why = why_not_connected(self.address, error)
                self._log_line(f"Unable to connect character device {self.id}: {why}")
            self._again()
            return
        if self._closing or self._stream is not None:
            stream.close()
            return
        self._told = False
        self._take(stream)

    def _missed(self) -> None:
        self._again()

    def _again(self) -> None:
        if self.reconnect_ns and not self._closing:
            self._retry.arm_ns(self.context.now_ns() + self.reconnect_ns)

    def _leave(self) -> None:
        super()._leave()
        self._retry.cancel()
        wait_while(self.context, lambda: self._connecting, f"chardev {self.id} to have tried to connect")

    def _arrive(self) -> None:
        self._retry = self.context.timer(self._connect, name=f"reconnection of chardev {self.id}")
        super()._arrive()

    def _end(self) -> None:
        super()._end()
        self._again()

    def close(self) -> None:
        self._closing = True
        self._retry.cancel()
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None
        super().close()
