# SPDX-License-Identifier: Apache-2.0
"""Character devices: a byte stream that comes and goes, for whoever sits in front of it.

A ``Chardev`` has at most one peer at a time and at most one front end (a monitor). The front end is told when a
peer comes, what it says, and when it goes. A second client of a listening socket waits in the backlog until the
first has gone.

What a peer does not take is kept up to a bound; a peer beyond it is disconnected: a monitor must never wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from bottomhalf.aio import AioContext
from bottomhalf.host.protocol import Address, Listener, Socket, UnixAddress
from bottomhalf.qapi.char import ChardevBackend, ChardevSocket, ChardevSocketWrapper, ChardevStdioWrapper
from bottomhalf.qapi.errors import OptionError
from bottomhalf.monitor.addresses import host_address

RECEIVE_BYTES: Final = 65536
UNSENT_BYTES_MAX: Final = 64 << 20  # answers and events that a peer does not read


class FrontEnd(Protocol):
    """Who uses a character device. Called in the device's context."""

    def opened(self) -> None:
        """A peer is there; write() reaches it."""

    def received(self, data: memoryview) -> None:
        """Bytes from the peer, to be used during the call."""

    def closed(self) -> None:
        """The peer has gone."""


class Chardev:
    """A character device over a socket-like stream. Home thread of ``context``."""

    def __init__(self, chardev_id: str, context: AioContext) -> None:
        self.id = chardev_id
        self.context = context
        self.front_end: FrontEnd | None = None
        self._stream: Socket | None = None
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._reading = True
        self._watched: tuple[Callable[[], None] | None, Callable[[], None] | None] = (None, None)
        self._buffer = bytearray(RECEIVE_BYTES)

    @property
    def connected(self) -> bool:
        return self._stream is not None

    @property
    def unsent_bytes(self) -> int:
        return self._unsent_bytes

    def attach(self, front_end: FrontEnd) -> None:
        """OptionError if somebody else has it."""
        if self.front_end is not None:
            raise OptionError(f"Device '{self.id}' is in use", key="chardev")
        self.front_end = front_end
        if self._stream is not None:
            self._begin(self._stream)

    def start(self) -> None:
        """Connect, or begin to listen."""

    def set_reading(self, reading: bool) -> None:
        """Whether to take bytes from the peer now (back pressure)."""
        self._reading = reading
        self._watch()

    def write(self, data: bytes) -> None:
        """Send to the peer, if there is one; never waits."""
        if self._stream is None or not data:
            return
        self._unsent.append(memoryview(data))
        self._unsent_bytes += len(data)
        if len(self._unsent) == 1:
            self._flush()
        if self._unsent_bytes > UNSENT_BYTES_MAX:
            self._end()

    def _flush(self) -> None:
        stream = self._stream
        if stream is None:
            return
        try:
            while self._unsent:
                sent = stream.send(self._unsent[0])
                self._unsent_bytes -= sent
                if sent < len(self._unsent[0]):
                    self._unsent[0] = self._unsent[0][sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._end()
            return
        self._watch()

    def _watch(self) -> None:
        if self._stream is None:
            return
        wanted = (
            self._readable if self._reading and self.front_end is not None else None,
            self._flush if self._unsent else None,
        )
        if wanted != self._watched:
            self._watched = wanted
            self.context.set_fd_handler(self._stream.fileno(), *wanted)

    def _readable(self) -> None:
        stream = self._stream
        assert stream is not None
        try:
            count = stream.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if count == 0:
            self._end()
        elif self.front_end is not None:
            self.front_end.received(memoryview(self._buffer)[:count])

    def _begin(self, stream: Socket) -> None:
        self._stream = stream
        self._reading = True
        if self.front_end is not None:
            self.front_end.opened()
        self._watch()

    def _end(self) -> None:
        """The peer has gone, or is sent away."""
        stream = self._stream
        if stream is None:
            return
        self._stream = None
        self.context.set_fd_handler(stream.fileno())
        self._watched = (None, None)
        self._unsent.clear()
        self._unsent_bytes = 0
        stream.shutdown()
        stream.close()
        if self.front_end is not None:
            self.front_end.closed()

    def close(self) -> None:
        """Say the last words as far as the peer takes them at once, then end."""
        self.front_end = None
        self._flush()
        self._end()


class SocketServerChardev(Chardev):
    """Listens; serves one client at a time."""

    def __init__(self, chardev_id: str, context: AioContext, address: Address, *, wait: bool) -> None:
        super().__init__(chardev_id, context)
        self.wait = wait
        self._listener: Listener | None = context.host.listen(address)
        self.address = self._listener.address

    def describe(self) -> str:
        prefix = "" if isinstance(self.address, UnixAddress) else "tcp:"
        return f"disconnected:{prefix}{self.address},server=on"

    def start(self) -> None:
        if self._listener is not None and self._stream is None:
            self.context.set_fd_handler(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            stream = self._listener.accept()
        except OSError:
            return
        self.context.set_fd_handler(self._listener.fileno())
        self._begin(stream)

    def _end(self) -> None:
        super()._end()
        self.start()

    def close(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            if self._stream is None:
                self.context.set_fd_handler(listener.fileno())
            listener.close()
        super().close()


class ClientChardev(Chardev):
    """A stream that is there from the start: a connection that we made, or standard input and output."""

    def __init__(self, chardev_id: str, context: AioContext, stream: Socket) -> None:
        super().__init__(chardev_id, context)
        self._waiting: Socket | None = stream

    def start(self) -> None:
        if self._waiting is not None:
            stream, self._waiting = self._waiting, None
            self._begin(stream)

    def close(self) -> None:
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None
        super().close()


def open_chardev(chardev_id: str, backend: ChardevBackend, context: AioContext) -> Chardev:
    """Make a device from its options. OptionError or OSError says why not."""
    options = backend.branch
    if isinstance(options, ChardevStdioWrapper):
        return ClientChardev(chardev_id, context, context.host.stdio())
    assert isinstance(options, ChardevSocketWrapper)
    data = options.data
    _refuse_what_is_missing(data)
    address = host_address(data.addr.flatten())
    if data.server is False:
        return ClientChardev(chardev_id, context, context.host.connect(address))
    return SocketServerChardev(chardev_id, context, address, wait=bool(data.wait))


def _refuse_what_is_missing(data: ChardevSocket) -> None:
    for name in ("tls_creds", "tls_authz", "telnet", "tn3270", "websocket", "reconnect", "reconnect_ms"):
        if getattr(data, name):
            key = name.replace("_", "-")
            raise OptionError(f"Parameter '{key}' is not supported yet", key=key)
