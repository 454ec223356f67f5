# SPDX-License-Identifier: Apache-2.0
"""Character devices: a byte stream that comes and goes, for whoever sits in front of it.

A ``Chardev`` has at most one peer at a time and at most one front end (a monitor). The front end is told when a
peer comes, what it says, and when it goes. A second client of a listening socket waits in the backlog until the
first has gone.

Whose loop serves a device decides who can speak while the program waits: a device is made for the I/O handler context,
which no nested poll serves, and a front end that has a thread of its own takes the device there (``attach``). From then
on everything but ``attach`` and ``end`` happens in that context.

What a peer does not take is kept up to a bound; a peer beyond it is disconnected: a monitor must never wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import ClassVar, Final, Protocol

from bottomhalf.aio import AioContext, BottomHalf, run_in
from bottomhalf.host.protocol import Socket
from bottomhalf.qapi.errors import OptionError

RECEIVE_BYTES: Final = 65536
UNSENT_BYTES_MAX: Final = 64 << 20  # answers and events that a peer does not read


class FrontEnd(Protocol):
    """Who uses a character device. Called in the device's context."""

    @property
    def has_user(self) -> bool:
        """Whether somebody takes what it is given: a device in between may have nobody behind it."""

    def opened(self, line: Line) -> None:
        """A peer is there; ``line`` reaches it."""

    def received(self, data: memoryview) -> None:
        """Bytes from the peer, to be used during the call."""

    def closed(self) -> None:
        """The peer has gone."""


class Line(Protocol):
    """What a front end has of its device. In the device's context only."""

    id: str
    context: AioContext

    def write(self, data: bytes) -> None:
        """Send to the peer, if there is one; never waits."""

    def set_reading(self, reading: bool) -> None:
        """Whether to take bytes from the peer now (back pressure)."""

    def set_echo(self, echo: bool) -> None:
        """Whether a terminal there shows what is typed by itself."""

    def rows(self) -> int | None:
        """Lines of the screen of a terminal there; None if there is none."""

    def hang_up(self) -> None:
        """Send the peer away."""


class Chardev:
    """A character device over a socket-like stream."""

    kind: ClassVar[str] = ""
    movable: ClassVar[bool] = True  # another context can serve it
    readable = True

    def __init__(self, chardev_id: str, context: AioContext) -> None:
        self.id = chardev_id
        self.context = context
        self.front_end: FrontEnd | None = None
        self.log_stream: Socket | None = None  # gets a copy of what is written
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
    def busy(self) -> bool:
        """Whether somebody uses it, so that it must stay."""
        return self.front_end is not None

    @property
    def has_user(self) -> bool:
        """Whether there is somebody to take what comes."""
        return self.front_end is not None and self.front_end.has_user

    @property
    def unsent_bytes(self) -> int:
        return self._unsent_bytes

    def describe(self) -> str:
        """What query-chardev calls its file name."""
        return self.kind

    # -- its front end ------------------------------------------------------------------------------------------

    def attach(self, front_end: FrontEnd, context: AioContext | None = None) -> Line:
        """Sit in front of it, served by ``context`` if that is given. Main thread. OptionError if somebody else has
        it."""
        if self.front_end is not None:
            raise OptionError(f"chardev '{self.id}' is already in use", key="chardev")
        if context is not None and context is not self.context:
            self.move(context)
        self.front_end = front_end
        run_in(self.context, self._attached, f"chardev {self.id} to have its user")
        return self

    def move(self, context: AioContext) -> None:
        """Be served by another context from now on. Main thread, while nobody sits in front of it."""
        run_in(self.context, self._leave, f"chardev {self.id} to stop")
        self.context = context
        run_in(context, self._arrive, f"chardev {self.id} to start")

    def _attached(self) -> None:
        if self._stream is not None:
            self._begin(self._stream)

    def _leave(self) -> None:
        """Have the context forget it."""
        if self._stream is not None:
            self._forget(self._stream)

    def _arrive(self) -> None:
        """It has a new context."""
        self.start()
        self._watch()

    def start(self) -> None:
        """Connect, or begin to listen."""

    # -- bytes --------------------------------------------------------------------------------------------------

    def set_reading(self, reading: bool) -> None:
        self._reading = reading
        self._watch()

    def set_echo(self, echo: bool) -> None:
        """Most devices are no terminals."""

    def rows(self) -> int | None:
        return None

    def write(self, data: bytes) -> None:
        if self.log_stream is not None:
            self._log(data)
        if self._stream is None or not data:
            return
        self._unsent.append(memoryview(data))
        self._unsent_bytes += len(data)
        if len(self._unsent) == 1:
            self._flush()
        if self._unsent_bytes > UNSENT_BYTES_MAX:
            self._end()

    def _log(self, data: bytes) -> None:
        assert self.log_stream is not None
        try:
            self.log_stream.send(data)
        except OSError:  # a full disk: the device works on without its log
            self.log_stream.close()
            self.log_stream = None

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
            self._readable if self._reading and self.readable and self.front_end is not None else None,
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
        else:
            self._arrived(memoryview(self._buffer)[:count])

    def _arrived(self, data: memoryview) -> None:
        """Bytes came from the peer."""
        if self.front_end is not None:
            self.front_end.received(data)

    # -- peers --------------------------------------------------------------------------------------------------

    def _begin(self, stream: Socket) -> None:
        self._stream = stream
        self._reading = True
        if self.front_end is not None:
            self.front_end.opened(self)
        self._watch()

    def _forget(self, stream: Socket) -> None:
        if self._watched != (None, None) and self._file_half is None:
            self.context.set_fd_handler(stream.fileno())
        if self._file_half is not None:
            self._file_half.delete()
            self._file_half = None
        self._watched = (None, None)

    def hang_up(self) -> None:
        self._end()

    def _end(self) -> None:
        """The peer has gone, or is sent away."""
        stream = self._stream
        if stream is None:
            return
        self._stream = None
        self._forget(stream)
        self._unsent.clear()
        self._unsent_bytes = 0
        stream.shutdown()
        stream.close()
        if self.front_end is not None:
            self.front_end.closed()

    def end(self) -> None:
        """Be gone when this returns. Main thread."""
        run_in(self.context, self.close, f"chardev {self.id} to close")

    def close(self) -> None:
        """Say the last words as far as the peer takes them at once, then end."""
        self.front_end = None
        self._flush()
        self._end()
        if self.log_stream is not None:
            self.log_stream.close()
            self.log_stream = None
