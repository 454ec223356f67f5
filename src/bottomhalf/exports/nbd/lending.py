# SPDX-License-Identifier: Apache-2.0
"""Places in an image that replies share with a client until it has read them.

sendfile(2) into a Unix socket does not copy: the client's receive queue refers to the pages of the page cache, and what
is written there later is what the client reads. For a raw image that is a write to the same bytes as a read that is not
over, and either result is right. In an image with clusters the place may be somebody else's by then. So the node holds
the place (``Node.hold_bytes``) and we give it back when the client has read that far. The kernel tells how much is
unread, at least; it does not tell when that changes. Therefore a timer looks, seldom: what a late look costs is a freed
cluster that is used again a little later.

Over TCP nobody can tell (what the other side has acknowledged may still lie in a receive queue of this machine), and
such replies are copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from bottomhalf.aio import AioContext
    from bottomhalf.aio.timer import Timer
    from bottomhalf.exports.nbd.output import Output
    from bottomhalf.host.protocol import Socket

FIRST_LOOK_NS: Final = 5_000_000  # after that long a client has read what it waits for
LOOK_NS_MAX: Final = 1_000_000_000
LINGER_NS_MAX: Final = 30_000_000_000  # a connection that we have ended keeps its places no longer


class Lending:
    """What one connection has been lent. In the context of the connection."""

    def __init__(self, socket: Socket, output: Output) -> None:
        self._context: AioContext | None = None
        self._socket = socket
        self._output = output
        self._lent: deque[tuple[int, Callable[[], object]]] = deque()  # (bytes of the stream, what gives it back)
        self._timer: Timer | None = None
        self._delay_ns = FIRST_LOOK_NS
        self._ends_ns = 0  # the connection is over; no later than then its socket is closed

    @property
    def possible(self) -> bool:
        """Whether it can be seen how far the client has read."""
        return self._socket.unread() is not None

    def lend(self, give_back: Callable[[], object]) -> None:
        """Call ``give_back`` when everything that the output has been given so far is read."""
        self._lent.append((self._output.sent_bytes + self._output.unsent_bytes, give_back))
        self._delay_ns = FIRST_LOOK_NS
        self._wait()

    def _wait(self) -> None:
        assert self._context is not None
        if self._timer is None:
            self._timer = self._context.timer(self._look, name="NBD client that reads shared pages")
        if not self._timer.armed:
            self._timer.arm_ns(self._context.now_ns() + self._delay_ns)

    def enter(self, context: AioContext) -> None:
        """Look in a context from now on. In it."""
        self._context = context
        if self._lent:
            self._wait()

    def leave(self) -> None:
        """Look nowhere. In the context."""
        self._context = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _settle(self) -> bool:
        """Give back what was read; whether that is all."""
        lent = self._lent
        if lent:
            read = self._output.sent_bytes - (self._socket.unread() or 0)
            while lent and lent[0][0] <= read:
                lent.popleft()[1]()
        return not lent

    def _look(self) -> None:
        assert self._context is not None
        now_ns = self._context.now_ns()
        if self._settle() or 0 < self._ends_ns <= now_ns:
            if self._ends_ns:
                self._close()
            return
        self._delay_ns = min(2 * self._delay_ns, LOOK_NS_MAX)
        self._wait()

    def end(self) -> None:
        """The connection is over, the output is dropped: close the socket, when the client has read what it shares."""
        self._lent = deque((min(place, self._output.sent_bytes), give_back) for place, give_back in self._lent)
        if self._settle() or self._context is None:
            self._close()
        else:
            self._ends_ns = self._context.now_ns() + LINGER_NS_MAX

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        while self._lent:
            self._lent.popleft()[1]()
        self._socket.close()
