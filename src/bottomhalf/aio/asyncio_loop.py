# SPDX-License-Identifier: Apache-2.0
"""An asyncio event loop made of an AioContext.

    with asyncio.Runner(loop_factory=AioEventLoop) as runner:
        runner.run(main())                     # aiohttp, asyncpg, ... and in the same thread loop.context

An asyncio loop asks its selector, in a loop of its own, which descriptors are ready. Ours answers by polling a context
once: what is ready was noted by the handlers of that poll, and the context's bottom halves, timers and coroutines have
run in it. An early answer with nothing in it is legal, and is how asyncio gets its turn when one of those has given it
something to do.

All of asyncio's loop, its transports, its subprocesses and signals, is the standard library's own.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from bottomhalf.aio.asyncio_bridge import bridges
from bottomhalf.aio.context import AioContext

EVENT_READ: Final = selectors.EVENT_READ
EVENT_WRITE: Final = selectors.EVENT_WRITE

_Ready = list[tuple[selectors.SelectorKey, int]]


class _Keys(Mapping[Any, selectors.SelectorKey]):
    """The registered keys by file object, as selectors' own give them."""

    def __init__(self, keys: dict[int, selectors.SelectorKey]) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)

    def __getitem__(self, fileobj: Any) -> selectors.SelectorKey:
        try:
            fd = _descriptor(fileobj)
        except ValueError:
            for key in self._keys.values():  # a file object that was closed meanwhile
                if key.fileobj is fileobj:
                    return key
            raise
        try:
            return self._keys[fd]
        except KeyError:
            raise KeyError(f"{fileobj!r} is not registered") from None


class ContextSelector(selectors.BaseSelector):
    """Readiness for an asyncio loop, from an AioContext. select() in one thread, the rest from any."""

    def __init__(self, context: AioContext) -> None:
        self.context = context
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._map = _Keys(self._keys)
        self._ready: _Ready = []
        self._timer = context.timer(_nothing, name="asyncio timers")

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if not events or events & ~(EVENT_READ | EVENT_WRITE):
            raise ValueError(f"Invalid events: {events!r}")
        fd = _descriptor(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} (FD {fd}) is already registered")
        return self._set(selectors.SelectorKey(fileobj, fd, events, data))

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = self._map[fileobj]
        del self._keys[key.fd]
        try:
            self.context.set_fd_handler(key.fd)
        except OSError:  # closed before it was unregistered: it has left the poller by itself
            pass
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._map[fileobj]
        if not events or events & ~(EVENT_READ | EVENT_WRITE):
            raise ValueError(f"Invalid events: {events!r}")
        return self._set(selectors.SelectorKey(key.fileobj, key.fd, events, data))

    def _set(self, key: selectors.SelectorKey) -> selectors.SelectorKey:
        note = self._note
        self.context.set_fd_handler(
            key.fd,
            note((key, EVENT_READ)) if key.events & EVENT_READ else None,
            note((key, EVENT_WRITE)) if key.events & EVENT_WRITE else None,
        )
        self._keys[key.fd] = key
        return key

    def _note(self, ready: tuple[selectors.SelectorKey, int]) -> Callable[[], None]:
        def note() -> None:
            self._ready.append(ready)

        return note

    def select(self, timeout: float | None = None) -> _Ready:
        """One poll of the context. It may return early with nothing."""
        context = self.context
        if not context.is_home:
            context.adopt()
        if timeout is None:
            context.poll(True)
        elif timeout <= 0:
            context.poll(False)
        else:
            timer = self._timer
            timer.arm_ns(context.now_ns() + int(timeout * 1e9) + 1)
            context.poll(True)
            timer.cancel()
        ready, self._ready = self._ready, []
        return ready

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._map

    def close(self) -> None:
        for key in tuple(self._keys.values()):
            self.unregister(key.fileobj)
        self._timer.cancel()


class AioEventLoop(asyncio.SelectorEventLoop):
    """An asyncio loop that serves ``context`` with everything that asyncio does.

    Without a context it makes one, and closes it at the end. Exceptions of the context's callbacks go to the loop's
    exception handler, unless the context has one of its own. ``functools.partial(AioEventLoop, context)`` is a
    ``loop_factory`` for a context that is there already."""

    def __init__(self, context: AioContext | None = None) -> None:
        self.context = context if context is not None else AioContext(name="asyncio")
        self._own = context is None
        super().__init__(ContextSelector(self.context))
        self._handles = self.context.exception_handler is None
        if self._handles:
            self.context.exception_handler = self._callback_failed
        bridges[self.context] = self

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """For the bridge."""
        return self

    def arrange(self) -> None:
        """For the bridge: a select() polls the context anyhow, and knows what it has to do."""

    def _callback_failed(self, context: AioContext, error: Exception, where: str) -> None:
        self.call_exception_handler({"message": f"Exception in {where} of {context.name}", "exception": error})

    def close(self) -> None:
        if self.is_closed() or self.is_running():
            super().close()  # which says what is wrong
            return
        super().close()
        bridges.pop(self.context, None)
        if self._handles:
            self.context.exception_handler = None
        if self._own:
            if not self.context.is_home:
                self.context.adopt()
            self.context.close()


def _descriptor(fileobj: Any) -> int:
    try:
        fd = fileobj if isinstance(fileobj, int) else int(fileobj.fileno())
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"Invalid file object: {fileobj!r}") from None
    if fd < 0:
        raise ValueError(f"Invalid file descriptor: {fd}")
    return fd


def _nothing() -> None:
    pass
