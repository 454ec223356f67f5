# SPDX-License-Identifier: Apache-2.0
"""Connected byte streams of the simulated host.

TCP and Unix stream sockets keep the order of bytes and nothing else: not where one send ended, not how much
is taken or given at a time. Tests on a quick machine nearly always see whole messages. Therefore a send here
often takes less than it was given, a receive gives less than there is, buffers can be a few bytes small, and
delivery can take time. How a connection ends follows Linux, where the two families differ:

* the peer closed: what it sent can still be read, then the stream ends; sending fails with EPIPE (Unix), or
  succeeds once and then brings ECONNRESET (TCP);
* the peer closed without having read everything: ECONNRESET after what it sent;
* ``shutdown()`` ends both directions of this side; the peer sees the end of the stream.

``send_file`` into a Unix socket does not copy on Linux: who reads from it sees what is in the file then. So it is
here.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import Any, Final

from bottomhalf.host.protocol import ERR, HUP, IN, OUT, File
from bottomhalf.host.sim.files import SimFile
from bottomhalf.host.sim.world import Descriptor, World, failure

BUFFERS_MAX: Final = 1024  # of one sendmsg: IOV_MAX
BUFFER_BYTES: Final = 212_992  # of one direction: net.core.wmem_default


class Stream:
    """One direction: bytes that flew off, bytes that have arrived, and the end."""

    __slots__ = (
        *("_delay_ns", "_flying", "_last_ns", "_shared", "_taken", "arrived", "capacity", "ended", "flying_bytes"),
        "world",
    )

    def __init__(self, world: World, capacity: int, delay_ns: tuple[int, int]) -> None:
        self.world = world
        self.capacity = capacity
        self.arrived = bytearray()
        self.ended = False  # the end has arrived, behind the bytes
        self.flying_bytes = 0
        self._flying: deque[bytes | None] = deque()  # None: the end
        self._delay_ns = delay_ns
        self._last_ns = 0
        self._taken = 0  # bytes so far
        self._shared: deque[tuple[int, int, SimFile, int]] = deque()  # parts of the stream: begin, end, where in a file

    @property
    def unread(self) -> int:
        return len(self.arrived) + self.flying_bytes

    def share(self, count: int, file: SimFile, offset: int) -> None:
        """The last bytes that were put are those of a file, whatever becomes of them there."""
        end = self._taken + self.unread
        self._shared.append((end - count, end, file, offset))

    def take(self, count: int) -> bytes:
        """Take bytes that have arrived."""
        taken = self.arrived[:count]
        del self.arrived[:count]
        begin, self._taken = self._taken, self._taken + count
        while self._shared and self._shared[0][0] < self._taken:
            first, end, file, offset = self._shared[0]
            start, stop = max(first, begin), min(end, self._taken)
            content = file.inode.current.read(offset + start - first, stop - start)
            taken[start - begin : start - begin + len(content)] = content
            if end > self._taken:
                break
            self._shared.popleft()
        return bytes(taken)

    def room(self) -> int:
        return self.capacity - self.unread

    def put(self, data: bytes | None) -> None:
        """Send bytes, or None for the end, on their way."""
        world = self.world
        least_ns, most_ns = self._delay_ns
        self._flying.append(data)
        self.flying_bytes += len(data or b"")
        if most_ns == 0 and len(self._flying) == 1:
            self._land()
            return
        due_ns = max(self._last_ns, world.now_ns + world.network.randint(least_ns, most_ns))
        self._last_ns = due_ns
        world.at(due_ns - world.now_ns, self._land)

    def land_all(self) -> None:
        while self._flying:
            self._land()

    def lose_flying(self) -> None:
        self._flying.clear()
        self.flying_bytes = 0

    def _land(self) -> None:
        if not self._flying:
            return  # lost or landed early
        data = self._flying.popleft()
        if data is None:
            self.ended = True
        else:
            self.flying_bytes -= len(data)
            self.arrived += data


class SimSocket(Descriptor):
    """A host.protocol.Socket. Its peer is another one, which a test or a part of the program holds."""

    peer: SimSocket

    def __init__(self, world: World, inbound: Stream, outbound: Stream) -> None:
        super().__init__(world)
        self.is_local = True  # a Unix socket or standard input and output
        self.name = "unknown peer"
        self._inbound = inbound
        self._outbound = outbound
        self.echo = True  # of a terminal
        self.screen_rows: int | None = None  # of a terminal
        self._error = 0  # to be told once, when the bytes that came before it are read
        self._is_dead = False  # reset
        self._is_shut = False  # by shutdown() of this side

    def readiness(self) -> int:
        mask = 0
        if self._inbound.arrived or self._inbound.ended or self._is_shut or self._is_dead:
            mask |= IN
        if self._outbound.room() > 0 or self._is_shut or self._is_dead or self._peer_is_gone():
            mask |= OUT
        if self._error:
            mask |= ERR
        if self._is_dead or self._is_shut or (self.is_local and self._inbound.ended):
            mask |= HUP
        return mask

    # Receiving

    def recv_into(self, buffer: Any, /) -> int:
        self.check_open()
        view = memoryview(buffer).cast("B")
        arrived = self._inbound.arrived
        if arrived:
            count = min(len(arrived), len(view))
            if count > 1 and self.world.network.random() < self.world.odds.short_recv:
                count = self.world.network.randint(1, count)
            view[:count] = self._inbound.take(count)
            self.world.note("recv", self._fd, count)
            return count
        self._raise_error()
        if self._inbound.ended or self._is_dead or self._is_shut or not len(view):
            return 0
        raise failure(errno.EAGAIN)

    def take(self) -> bytes:
        """For tests: everything that has arrived, b"" if nothing has. Not part of the protocol."""
        return self._inbound.take(len(self._inbound.arrived))

    # Sending

    def send(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        count = self._grant(len(view))
        self._outbound_put(bytes(view[:count]))
        return count

    def send_more(self, data: Any) -> int:
        return self.send(data)

    def sendmsg(self, buffers: Any, /) -> int:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        if len(views) > BUFFERS_MAX:
            raise failure(errno.EMSGSIZE)
        left = count = self._grant(sum(len(view) for view in views))
        pieces = []
        for view in views:
            if left <= 0:
                break
            pieces.append(bytes(view[:left]))
            left -= len(pieces[-1])
        self._outbound_put(b"".join(pieces))
        return count

    def send_file(self, file: File, offset: int, count: int) -> int:
        """Waits for the disk where the bytes are not in memory: virtual time passes in this call."""
        assert isinstance(file, SimFile), f"{file!r} is not a file of this host"
        count = self._grant(max(0, min(count, file.size() - offset)))
        if not count:
            return 0
        file.read_in_place(offset, count)
        self._outbound_put(file.inode.current.read(offset, count))
        if self.is_local and not self._peer_is_gone():
            self._outbound.share(count, file, offset)
        return count

    def unread(self) -> int | None:
        if not self.is_local:
            return None
        return 0 if self.peer.closed else self._outbound.unread

    def _grant(self, wanted: int) -> int:
        """How many of the bytes can be sent now; raises if none can."""
        self.check_open()
        if not self.is_local:
            self._raise_error()
        if self._is_shut or self._is_dead or (self.is_local and self._peer_is_gone()):
            raise failure(errno.EPIPE)
        if not wanted or self._peer_is_gone():
            return wanted
        count = min(wanted, self._outbound.room())
        if count <= 0:
            raise failure(errno.EAGAIN)
        if count > 1 and self.world.network.random() < self.world.odds.short_send:
            count = self.world.network.randint(1, count)
        return count

    def _outbound_put(self, data: bytes) -> None:
        if not data:
            return
        self.world.note("send", self._fd, len(data))
        if self._peer_is_gone():
            self._inbound.land_all()
            self.reset()  # nobody is there to take it
        else:
            self._outbound.put(data)

    def set_echo(self, echo: bool, signals: bool = True) -> None:
        """Of a terminal: noted for tests, which type and read what they please."""
        self.echo = echo

    def rows(self) -> int | None:
        """Of a terminal: what a test says."""
        return self.screen_rows

    # Ending

    def peer_name(self) -> str:
        return self.name

    def shutdown(self) -> None:
        self.check_open()
        if not self._is_shut:
            self._is_shut = True
            self._outbound.put(None)

    def close(self) -> None:
        if self.closed:
            return
        unread = bool(self._inbound.arrived or self._inbound.flying_bytes)
        if unread and not self.peer.closed and not self._is_dead:
            self._outbound.land_all()
            self.peer.reset()
        elif not self._is_shut:
            self._outbound.put(None)
        self._inbound.lose_flying()
        self._inbound.arrived.clear()
        super().close()

    def reset(self) -> None:
        """The connection is lost: what has arrived can be read, then comes ECONNRESET."""
        self._inbound.lose_flying()
        self._error = errno.ECONNRESET
        self._is_dead = True

    def _peer_is_gone(self) -> bool:
        return self.peer.closed or self.peer._is_shut

    def _raise_error(self) -> None:
        if self._error and not self._inbound.arrived:
            number, self._error = self._error, 0
            raise failure(number)
