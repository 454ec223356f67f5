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

from bottomhalf.aio import AioContext, BottomHalf
from bottomhalf.exports.registry import why_not_listening
from bottomhalf.host.protocol import Address, Listener, Socket, UnixAddress
from bottomhalf.monitor.addresses import host_address, why_not_connected
from bottomhalf.qapi.char import (
    ChardevBackend,
    ChardevCommon,
    ChardevSocket,
    ChardevSocketWrapper,
    ChardevStdioWrapper,
)
from bottomhalf.qapi.errors import OptionError

RECEIVE_BYTES: Final = 65536
UNSENT_BYTES_MAX: Final = 64 << 20  # answers and events that a peer does not read
ACCEPT_PAUSE_NS: Final = 100_000_000  # after running out of descriptors


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
        self._file_half: BottomHalf | None = None  # reads where the poller refuses to look

    @property
    def connected(self) -> bool:
        return self._stream is not None

    @property
    def unsent_bytes(self) -> int:
        return self._unsent_bytes

    def attach(self, front_end: FrontEnd) -> None:
        """OptionError if somebody else has it."""
        if self.front_end is not None:
            raise OptionError(f"chardev '{self.id}' is already in use", key="chardev")
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
        if wanted == self._watched:
            return
        self._watched = wanted
        if self._file_half is None:
            try:
                self.context.set_fd_handler(self._stream.fileno(), *wanted)
                return
            except PermissionError:  # epoll does not take files and /dev/null; they never make one wait
                self._file_half = self.context.bottom_half(self._read_file, name=f"chardev {self.id}")
        if wanted[0] is not None:
            self._file_half.schedule()

    def _read_file(self) -> None:
        if self._watched[0] is not None:
            self._readable()
        if self._watched[0] is not None and self._file_half is not None:
            self._file_half.schedule()

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
        if self._file_half is None:
            self.context.set_fd_handler(stream.fileno())
        else:
            self._file_half.delete()
            self._file_half = None
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
        self._pause = context.timer(self.start, name=f"accept pause of chardev {chardev_id}")

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
        except (BlockingIOError, ConnectionError):
            return
        except OSError:  # no descriptors, no memory: the client waits
            self.context.set_fd_handler(self._listener.fileno())
            self._pause.arm_ns(self.context.now_ns() + ACCEPT_PAUSE_NS)
            return
        self.context.set_fd_handler(self._listener.fileno())
        self._begin(stream)

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


class ClientChardev(Chardev):
    """A stream that is there from the start: a connection that we made, or standard input and output."""

    def __init__(self, chardev_id: str, context: AioContext, stream: Socket, *, is_stdio: bool = False) -> None:
        super().__init__(chardev_id, context)
        self.is_stdio = is_stdio
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
    """Make a device from its options. OptionError says why not."""
    options = backend.branch
    assert isinstance(options, ChardevStdioWrapper | ChardevSocketWrapper)
    _refuse_what_is_missing(options.data)
    if isinstance(options, ChardevStdioWrapper):
        return ClientChardev(chardev_id, context, context.host.stdio(), is_stdio=True)
    data: ChardevSocket = options.data
    address = host_address(data.addr.flatten())
    try:
        if data.server is False:
            return ClientChardev(chardev_id, context, context.host.connect(address))
        return SocketServerChardev(chardev_id, context, address, wait=bool(data.wait))
    except OSError as error:
        why = why_not_connected if data.server is False else why_not_listening
        raise OptionError(why(address, error), key="addr") from error


_MISSING: Final = (
    *("logfile", "logappend"),
    *("tls_creds", "tls_authz", "telnet", "tn3270", "websocket", "reconnect", "reconnect_ms"),
)


def _refuse_what_is_missing(data: ChardevCommon) -> None:
    for name in _MISSING:
        if getattr(data, name, None):
            key = name.replace("_", "-")
            raise OptionError(f"Parameter '{key}' is not supported yet", key=key)
