# SPDX-License-Identifier: Apache-2.0
"""Hooks for observers of a context, which cost nothing while nobody observes.

    class Slow(Instrument):
        def before_callback(self, context, kind, name):
            self.began_ns = context.now_ns()

        def after_callback(self, context, kind, name):
            if context.now_ns() - self.began_ns > 10_000_000:
                print(f"{kind} {name} kept {context.name} for long")

    context.add_instrument(Slow())

A test for an observer on every callback would cost a tenth of it. So there is none: a context that is observed becomes
an ``ObservedContext``, which before each batch marks what is about to run. A mark stands in the place of the callback
for one call, tells the observers, and takes itself away. When the last observer goes, so does the class.

Observers run inside the loop: they must not poll, and what they raise is the loop's exception.
"""

from __future__ import annotations

from collections.abc import Coroutine as AbstractCoroutine
from typing import Any, Final

from bottomhalf.aio.bottom_half import name_of
from bottomhalf.aio.context import AioContext
from bottomhalf.aio.coroutine import Coroutine
from bottomhalf.aio.handlers import Handlers
from bottomhalf.aio.timer import TimerList

BOTTOM_HALF: Final = "bottom half"
HANDLER: Final = "handler"
TIMER: Final = "timer"
COROUTINE: Final = "coroutine"


class Instrument:
    """An observer. Override what you need; each is called in the context's home thread."""

    def before_poll(self, context: AioContext, blocking: bool) -> None:
        """A poll begins, perhaps inside another."""

    def after_poll(self, context: AioContext, progress: bool) -> None:
        """It ends; not called if an exception leaves it."""

    def before_wait(self, context: AioContext, timeout_ns: int) -> None:
        """The context looks for ready descriptors, and sleeps if ``timeout_ns`` is not 0 (-1: without end)."""

    def after_wait(self, context: AioContext, events: list[tuple[int, int]]) -> None:
        """It has looked: ready (descriptor, mask) pairs, its own event among them."""

    def before_callback(self, context: AioContext, kind: str, name: str) -> None:
        """A bottom half, handler, timer or coroutine is about to run; ``kind`` says which."""

    def after_callback(self, context: AioContext, kind: str, name: str) -> None:
        """It has returned, raised, or suspended."""


class ObservedContext(AioContext):
    """What an observed AioContext is. Never made directly."""

    __slots__ = ()

    def poll(self, blocking: bool) -> bool:
        for instrument in self._instruments:
            instrument.before_poll(self, blocking)
        progress = super().poll(blocking)
        for instrument in self._instruments:
            instrument.after_poll(self, progress)
        return progress

    def enter(self, coroutine: Coroutine | AbstractCoroutine[Any, Any, Any]) -> Coroutine:
        name = coroutine.name if isinstance(coroutine, Coroutine) else name_of(coroutine)
        entered: Coroutine = _observe(self, COROUTINE, name, super().enter, coroutine)
        return entered

    def wake(self, coroutine: Coroutine) -> None:
        _observe(self, COROUTINE, coroutine.name, super().wake, coroutine)

    def _run_bottom_halves(self) -> bool:
        for half in tuple(self._queue):
            _Mark.put(self, BOTTOM_HALF, half.name, half, "callback")
        return super()._run_bottom_halves()

    def _run_scheduled(self) -> None:
        for coroutine in tuple(self._scheduled):
            _Mark.put(self, COROUTINE, coroutine.name, coroutine, "send")
        super()._run_scheduled()

    def timer(self, *arguments: Any, **options: Any) -> Any:
        timer = super().timer(*arguments, **options)
        for timers in self._timers:
            timers.__class__ = _ObservedTimers
        return timer


class _ObservedTimers(TimerList):
    __slots__ = ()

    def run(self) -> bool:
        self.take_in()
        now_ns = self.now_ns()
        for deadline_ns, _, timer in tuple(self.heap):
            if deadline_ns <= now_ns:
                _Mark.put(self.context, TIMER, timer.name, timer, "callback")
        return super().run()


class _ObservedHandlers(Handlers):
    __slots__ = ()

    def dispatch(self, events: list[tuple[int, int]]) -> bool:
        for fd, _ in events:
            if (handler := self._by_fd.get(fd)) is not None:
                for callback in ("on_read", "on_write"):
                    if getattr(handler, callback) is not None:
                        _Mark.put(self._context, HANDLER, f"of descriptor {fd}", handler, callback)
        return super().dispatch(events)

    def serve_found(self) -> bool:
        for handler in self.found:
            _Mark.put(self._context, HANDLER, f"of descriptor {handler.fd}", handler, "poll_ready")
        return super().serve_found()


class _Mark:
    """Stands in the place of a callback for one call."""

    __slots__ = ("_attribute", "_context", "_kind", "_name", "_original", "_owner")

    def __init__(self, context: AioContext, kind: str, name: str, owner: Any, attribute: str) -> None:
        self._context = context
        self._kind = kind
        self._name = name
        self._owner = owner
        self._attribute = attribute
        self._original = getattr(owner, attribute)

    @classmethod
    def put(cls, context: AioContext, kind: str, name: str, owner: Any, attribute: str) -> None:
        if type(getattr(owner, attribute)) is not cls:
            setattr(owner, attribute, cls(context, kind, name, owner, attribute))

    def __call__(self, *arguments: Any) -> Any:
        if getattr(self._owner, self._attribute) is self:
            setattr(self._owner, self._attribute, self._original)
        return _observe(self._context, self._kind, self._name, self._original, *arguments)

    def __getattr__(self, attribute: str) -> Any:
        """What else is asked of a callback: its name, or the generator that a send method is bound to."""
        return getattr(self._original, attribute)


def _observe(context: AioContext, kind: str, name: str, callback: Any, *arguments: Any) -> Any:
    instruments = context._instruments
    for instrument in instruments:
        instrument.before_callback(context, kind, name)
    try:
        return callback(*arguments)
    finally:
        for instrument in instruments:
            instrument.after_callback(context, kind, name)


def add(context: AioContext, instrument: Instrument) -> None:
    """AioContext.add_instrument()."""
    context._instruments = (*context._instruments, instrument)
    if type(context) is AioContext:
        context.__class__ = ObservedContext
        context._handlers.__class__ = _ObservedHandlers
        for timers in context._timers:
            timers.__class__ = _ObservedTimers
        wait = context._poller.wait

        def observed_wait(timeout_ns: int) -> list[tuple[int, int]]:
            for instrument in context._instruments:
                instrument.before_wait(context, timeout_ns)
            events = wait(timeout_ns)
            for instrument in context._instruments:
                instrument.after_wait(context, events)
            return events

        context._wait = observed_wait


def remove(context: AioContext, instrument: Instrument) -> None:
    """AioContext.remove_instrument()."""
    context._instruments = tuple(other for other in context._instruments if other is not instrument)
    if not context._instruments and type(context) is ObservedContext:
        context.__class__ = AioContext  # type: ignore[assignment]
        context._handlers.__class__ = Handlers
        for timers in context._timers:
            timers.__class__ = TimerList
        context._wait = context._poller.wait
