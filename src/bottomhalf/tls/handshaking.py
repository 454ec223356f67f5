# SPDX-License-Identifier: Apache-2.0
"""The handshake of a stream in a context, while the loop serves others.

    Handshaking(context, stream, done)  # done(None), or done(error), in a later turn of the loop

It has a limit of time, since a peer that connects and says nothing would otherwise keep a place for ever. It can leave
its context for another, as the devices that it is for do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bottomhalf.aio import AioContext, Timer
from bottomhalf.tls.errors import TlsError
from bottomhalf.tls.stream import TlsStream

HANDSHAKE_NS_MAX: Final = 10_000_000_000  # as long as QEMU gives to an NBD client's whole negotiation


class Handshaking:
    """One handshake under way. In its context."""

    def __init__(
        self,
        context: AioContext,
        stream: TlsStream,
        done: Callable[[OSError | None], object],
        *,
        limit_ns: int = HANDSHAKE_NS_MAX,
    ) -> None:
        """``limit_ns`` 0: somebody else looks at the clock."""
        self.stream = stream
        self._done = done
        self._limit_ns = limit_ns
        self._over = False
        self._writing = False
        self._context: AioContext | None = None
        self._timer: Timer | None = None
        self.enter(context)

    def enter(self, context: AioContext) -> None:
        """Be served by a context from now on."""
        self._context = context
        self._writing = False
        context.set_fd_handler(self.stream.fileno(), self._go_on)
        if self._limit_ns:
            self._timer = context.timer(self._too_slow, name="TLS handshake")
            self._timer.arm_ns(context.now_ns() + self._limit_ns)
        context.schedule_oneshot(self._go_on)  # a client speaks first

    def leave(self) -> None:
        """Be served nowhere: ``enter`` goes on with it elsewhere. Idempotent."""
        context, self._context = self._context, None
        if context is not None:
            context.set_fd_handler(self.stream.fileno())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go_on(self) -> None:
        if self._over or self._context is None or not self._context.is_home:
            return  # it was scheduled here, and has left since
        try:
            done = self.stream.handshake()
        except OSError as error:
            self._end(error)
            return
        if done:
            self._end(None)
        elif self.stream.unsent != self._writing:
            self._writing = self.stream.unsent
            self._context.set_fd_handler(self.stream.fileno(), self._go_on, self._go_on if self._writing else None)

    def _too_slow(self) -> None:
        self._end(TlsError(f"TLS handshake failed: not done within {self._limit_ns // 1_000_000_000} s"))

    def _end(self, error: OSError | None) -> None:
        self.leave()
        if not self._over:
            self._over = True
            self._done(error)

    def cancel(self) -> None:
        """Give it up; ``done`` is not called."""
        self._over = True
        self.leave()

    def close(self) -> None:
        """Give it up, and the stream with it."""
        self.cancel()
        self.stream.socket.shutdown()
        self.stream.close()
