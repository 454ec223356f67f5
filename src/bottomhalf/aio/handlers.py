# SPDX-License-Identifier: Apache-2.0
"""The descriptors of a context: who is to be called when one is ready.

    context.set_fd_handler(socket.fileno(), on_read=connection.receive)

Readiness is level-triggered, so a list of ready descriptors need not be finished: what is left of it comes again.
It must not be finished when it may be out of date, because a nested poll has dispatched meanwhile or because a
number on it may belong to another descriptor now. Each such change leaves a new token; a dispatch goes on while
it finds its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from bottomhalf.aio.errors import AioError
from bottomhalf.host.protocol import ERR, HUP, IN, OUT, Event, Poller

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext

Callback: TypeAlias = Callable[[], object]

_READ: Final = IN | HUP | ERR
_WRITE: Final = OUT | ERR


class Handler:
    """What to call for one descriptor."""

    __slots__ = ("fd", "on_read", "on_write", "poll", "poll_ready")

    def __init__(
        self,
        fd: int,
        on_read: Callback | None,
        on_write: Callback | None,
        poll: Callable[[], bool] | None,
        poll_ready: Callback | None,
    ) -> None:
        self.fd = fd
        self.on_read = on_read
        self.on_write = on_write
        self.poll = poll
        self.poll_ready = poll_ready

    @property
    def mask(self) -> int:
        return (IN if self.on_read else 0) | (OUT if self.on_write else 0)


class Handlers:
    """All handlers of one context."""

    __slots__ = ("_by_fd", "_context", "_event", "_event_fd", "_pollable", "_poller", "_token", "found")

    def __init__(self, context: AioContext, poller: Poller, event: Event) -> None:
        self._context = context
        self._poller = poller
        self._event = event  # the context's own; ready, it only has to be cleared
        self._event_fd = event.fileno()
        self._by_fd: dict[int, Handler] = {}
        self._pollable: list[Handler] = []
        self._token = object()  # of the dispatch whose list of events is good
        self.found: Handler | None = None  # by busy polling, and not served yet

    def set(
        self,
        fd: int,
        on_read: Callback | None,
        on_write: Callback | None,
        poll: Callable[[], bool] | None,
        poll_ready: Callback | None,
    ) -> None:
        """AioContext.set_fd_handler() but for the notification."""
        old = self._by_fd.get(fd)
        if poll is not None and poll_ready is None:
            raise AioError("a poll callback needs a poll_ready callback")
        if on_read is None and on_write is None and poll is None:
            if old is not None:
                del self._by_fd[fd]
                self._forget_pollable(old)
                if old.mask:
                    self._poller.unregister(fd)
            return
        new = Handler(fd, on_read, on_write, poll, poll_ready)
        if old is None or not old.mask:
            if new.mask:
                self._poller.register(fd, new.mask)
            self._token = object()
        elif not new.mask:
            self._poller.unregister(fd)
        elif new.mask != old.mask:
            self._poller.modify(fd, new.mask)
        if old is not None:
            self._forget_pollable(old)
        self._by_fd[fd] = new
        if poll is not None:
            self._pollable.append(new)

    def clear(self) -> None:
        self._by_fd.clear()
        self._pollable.clear()

    def _forget_pollable(self, handler: Handler) -> None:
        if handler.poll is not None and handler in self._pollable:
            self._pollable.remove(handler)

    def dispatch(self, events: list[tuple[int, int]]) -> bool:
        """Call the handlers of what is ready; whether there was one."""
        handlers = self._by_fd
        self._token = mine = object()
        progress = False
        for fd, mask in events:
            handler = handlers.get(fd)
            if handler is None:
                if fd == self._event_fd:
                    self._event.clear()
                continue
            progress = True
            on_read, on_write = handler.on_read, handler.on_write
            try:
                if on_read is None:
                    if mask & HUP:
                        mask |= OUT  # there is nobody else to tell
                elif mask & _READ:
                    on_read()
                    if self._token is not mine:
                        break
                if on_write is not None and mask & _WRITE and handlers.get(fd) is handler:
                    on_write()
            except Exception as error:
                self._context.failed(error, f"handler of descriptor {fd}")
            if self._token is not mine:
                break
        return progress

    def ask(self) -> bool:
        """Whether a poll callback has found work, which ``found`` then remembers."""
        for handler in tuple(self._pollable):
            try:
                if handler.poll is None or not handler.poll():
                    continue
            except Exception as error:
                self._context.failed(error, f"poll handler of descriptor {handler.fd}")
            self.found = handler
            return True
        return False

    def serve_found(self) -> bool:
        """Call the ``poll_ready`` of what was found, unless it was removed or replaced since. A poll inside it does
        not ask it again."""
        handler, self.found = self.found, None
        if handler is None or handler.poll_ready is None or self._by_fd.get(handler.fd) is not handler:
            return False
        self._forget_pollable(handler)
        try:
            handler.poll_ready()
        except Exception as error:
            self._context.failed(error, f"poll handler of descriptor {handler.fd}")
        finally:
            if self._by_fd.get(handler.fd) is handler:
                self._pollable.append(handler)
        return True
