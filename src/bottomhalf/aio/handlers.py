# SPDX-License-Identifier: Apache-2.0
"""The descriptors of a context: who is to be called when one is ready.

    context.set_fd_handler(socket.fileno(), on_read=connection.receive)

Readiness is level-triggered, so a list of ready descriptors need not be finished: what is left of it comes again.
It must not be finished when it may be out of date, because a nested poll has dispatched meanwhile or because a
number on it may belong to another descriptor now. Each such change leaves a new token; a dispatch goes on while
it finds its own.

A handler may also be asked. A virtqueue, or a ring of completions, tells without a system call that there is work,
and its peer need not ring the bell while we look. So a context that polls busily asks every handler that has a
``poll`` callback, between ``poll_begin`` (the peer need not ring) and ``poll_end`` (it has to). Between the last look
and ``poll_end`` work may have come, so each is asked once more after it. One that had nothing to say for seconds is
asked no more until its descriptor fires: it has gone quiet, and asking it delays the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from bottomhalf.aio.errors import AioError
from bottomhalf.host.protocol import ERR, HUP, IN, OUT, Event, Poller

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext

Callback: TypeAlias = Callable[[], object]

ASKED_IN_VAIN_NS_MAX: Final = 7_000_000_000  # before a handler is not asked any more (QEMU: 7 s)

_READ: Final = IN | HUP | ERR
_WRITE: Final = OUT | ERR


class Handler:
    """What to call for one descriptor."""

    __slots__ = (
        "fd",
        "found_ns",
        "on_read",
        "on_write",
        "poll",
        "poll_begin",
        "poll_end",
        "poll_ns",
        "poll_ready",
    )

    def __init__(
        self,
        fd: int,
        on_read: Callback | None,
        on_write: Callback | None,
        poll: Callable[[], bool] | None,
        poll_ready: Callback | None,
        poll_begin: Callback | None,
        poll_end: Callback | None,
    ) -> None:
        self.fd = fd
        self.on_read = on_read
        self.on_write = on_write
        self.poll = poll
        self.poll_ready = poll_ready
        self.poll_begin = poll_begin
        self.poll_end = poll_end
        self.poll_ns = 0  # how long it is worth while to poll busily for it
        self.found_ns = 0  # when it last had work, 0: not looked at yet

    @property
    def mask(self) -> int:
        return (IN if self.on_read else 0) | (OUT if self.on_write else 0)


class Handlers:
    """All handlers of one context."""

    __slots__ = (
        "_by_fd",
        "_context",
        "_event_fd",
        "_poller",
        "_token",
        "asked",
        "found",
        "started",
    )

    def __init__(self, context: AioContext, poller: Poller, event: Event) -> None:
        self._context = context
        self._poller = poller
        self._event_fd = event.fileno()  # the context's own
        self._by_fd: dict[int, Handler] = {}
        self._token = object()  # of the dispatch whose list of events is good
        self.asked: list[Handler] = []  # those that busy polling asks
        self.found: list[Handler] = []  # to have work, by busy polling, and not served yet
        self.started: list[Handler] = []  # those between poll_begin and poll_end

    def __len__(self) -> int:
        return len(self._by_fd)

    def set(self, fd: int, new: Handler | None) -> None:
        """AioContext.set_fd_handler() but for the notification."""
        old = self._by_fd.get(fd)
        if new is None:
            if old is not None:
                del self._by_fd[fd]
                self._stop_asking(old)
                if old.mask:
                    self._poller.unregister(fd)
            return
        if (new.poll is None) != (new.poll_ready is None):
            raise AioError("a poll callback and a poll_ready callback need each other")
        if new.poll is None and (new.poll_begin is not None or new.poll_end is not None):
            raise AioError("poll_begin and poll_end are for a handler with a poll callback")
        if old is None or not old.mask:
            if new.mask:
                self._poller.register(fd, new.mask)
            self._token = object()
        elif not new.mask:
            self._poller.unregister(fd)
        elif new.mask != old.mask:
            self._poller.modify(fd, new.mask)
        if old is not None:
            self._stop_asking(old)
            new.poll_ns, new.found_ns = old.poll_ns, old.found_ns
        self._by_fd[fd] = new
        if new.poll is not None:
            self.asked.append(new)

    def clear(self) -> None:
        self._by_fd.clear()
        self.asked.clear()

    # -- ready descriptors --------------------------------------------------------------------------------------

    def dispatch(self, events: list[tuple[int, int]]) -> bool:
        """Call the handlers of what is ready; whether there was one."""
        handlers = self._by_fd
        self._token = mine = object()
        progress = False
        for fd, mask in events:
            handler = handlers.get(fd)
            if handler is None:
                if fd == self._event_fd:
                    self._context.take_event()
                continue
            progress = True
            on_read, on_write = handler.on_read, handler.on_write
            try:
                if on_read is None:
                    if mask & HUP:
                        mask |= OUT  # there is nobody else to tell
                elif mask & _READ:
                    if self.found and handler in self.found:
                        self.found.remove(handler)  # once is enough
                        handler.found_ns = 0
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

    def noticed(self, events: list[tuple[int, int]], blocked_ns: int) -> bool:
        """Learn from a wait that took ``blocked_ns`` how long to poll busily for the handlers that can be asked.
        Whether another descriptor was ready."""
        others = False
        for fd, _ in events:
            handler = self._by_fd.get(fd)
            if handler is None or handler.poll is None:
                others = True
                continue
            handler.poll_ns = self._context.adapted_ns(handler.poll_ns, blocked_ns)
            if handler not in self.asked:  # it had gone quiet
                handler.found_ns = 0
                self.asked.append(handler)
        return others

    # -- handlers that are asked --------------------------------------------------------------------------------

    def poll_ns_max(self) -> int:
        """The longest time that is worth while for one of them."""
        return max((handler.poll_ns for handler in self.asked), default=0)

    def forget_times(self) -> None:
        for handler in self._by_fd.values():
            handler.poll_ns = 0

    def start(self, now_ns: int) -> None:
        """Busy polling begins, or goes on: those who may tell their peers, and those who have gone quiet leave."""
        for handler in tuple(self.asked):
            if not handler.found_ns:
                handler.found_ns = now_ns
            elif now_ns - handler.found_ns > ASKED_IN_VAIN_NS_MAX:
                self._stop_asking(handler)
                self._ask(handler)  # once more, after its poll_end
                continue
            if handler not in self.started:
                self.started.append(handler)
                if handler.poll_begin is not None:
                    self._call(handler, handler.poll_begin)

    def stop(self) -> None:
        """Before the thread sleeps: peers have to ring again. What came at the last moment is found."""
        for handler in tuple(self.started):
            self._end(handler)
            if handler in self.asked and handler not in self.found:
                self._ask(handler)

    def ask(self) -> bool:
        """Whether a poll callback has found work, which ``found`` then remembers."""
        return bool(self.found) or any(self._ask(handler) for handler in tuple(self.asked))

    def serve_found(self) -> bool:
        """Call the ``poll_ready`` of those that were found, unless they were removed or replaced since; whether there
        was one. A poll inside it serves the others, and does not ask the one that is being served again."""
        progress = False
        while self.found:
            handler = self.found.pop(0)
            if handler.poll_ready is None or self._by_fd.get(handler.fd) is not handler:
                continue
            progress = True
            handler.found_ns = 0
            was_asked = handler in self.asked
            if was_asked:
                self.asked.remove(handler)
            try:
                handler.poll_ready()
            except Exception as error:
                self._context.failed(error, f"poll handler of descriptor {handler.fd}")
            finally:
                if was_asked and self._by_fd.get(handler.fd) is handler:
                    self.asked.append(handler)
        return progress

    def _ask(self, handler: Handler) -> bool:
        """Whether it says that it has work, which ``found`` then remembers."""
        if handler.poll is None:
            return False
        try:
            if not handler.poll():
                return False
        except Exception as error:
            self._context.failed(error, f"poll handler of descriptor {handler.fd}")
        self.found.append(handler)
        return True

    def _stop_asking(self, handler: Handler) -> None:
        if handler in self.asked:
            self.asked.remove(handler)
        self._end(handler)

    def _end(self, handler: Handler) -> None:
        if handler in self.started:
            self.started.remove(handler)
            if handler.poll_end is not None:
                self._call(handler, handler.poll_end)

    def _call(self, handler: Handler, callback: Callback) -> None:
        try:
            callback()
        except Exception as error:
            self._context.failed(error, f"poll handler of descriptor {handler.fd}")
