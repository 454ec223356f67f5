# SPDX-License-Identifier: Apache-2.0
"""Coroutines, driven by hand.

    async def copy() -> None:
        data = await backend.co_pread(0, 65536)
        ...

    context.enter(copy())

An asyncio Task costs several microseconds to make, suspend and wake; ``send(None)`` on a coroutine costs a tenth.
So the runner is a loop around ``send`` and a suspended coroutine is just an object that somebody remembers.

Who waits says so twice: first it leaves itself (``current()``) with whoever will wake it, then it awaits
``suspend(what)``. Who wakes calls ``context.wake(coroutine)``. A wake from inside another coroutine does not nest:
the woken one is queued on the waker and entered when the waker suspends or ends, before whatever was queued
earlier (depth first, as in QEMU), so that a chain of any length needs no stack.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Coroutine as AbstractCoroutine
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from bottomhalf.aio.errors import AioError, WrongContext
from bottomhalf.host.threads import Local

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext


class _Running(Local):
    """Which coroutine and which context this thread is in."""

    def __init__(self) -> None:
        self.coroutine: Coroutine | None = None
        self.context: AioContext | None = None


running = _Running()


class Coroutine:
    """An ``async def`` call that the event core drives. Awaitable by other coroutines."""

    __slots__ = (
        "_exception",
        "_result",
        "_send",
        "_throw",
        "_waiters",
        "_woken",
        "context",
        "done",
        "entered",
        "name",
        "queued",
        "waiting_for",
    )

    def __init__(self, body: AbstractCoroutine[Any, Any, Any], context: AioContext) -> None:
        if not hasattr(body, "send"):
            raise AioError(f"{body!r} is not what calling an async def gives")
        self._send = body.send
        self._throw = body.throw
        self.name: str = getattr(body, "__qualname__", "coroutine")
        self.context = context  # where it runs when woken
        self.done = False
        self.entered = False
        self.queued: str | None = None  # by whom it is about to be entered
        self.waiting_for: str | None = None
        self._woken: list[Coroutine] | None = None
        self._waiters: list[Coroutine] | None = None
        self._result: Any = None
        self._exception: BaseException | None = None

    def result(self) -> Any:
        """What the coroutine returned; raises what it raised. AioError if it has not ended."""
        if not self.done:
            raise AioError(f"{self!r} has not ended")
        if self._exception is not None:
            exception, self._exception = self._exception, None
            raise exception
        return self._result

    def __await__(self) -> Generator[None, None, Any]:
        if not self.done:
            waiter = running.coroutine
            assert waiter is not None
            if self._waiters is None:
                self._waiters = []
            self._waiters.append(waiter)
            yield from suspend(f"the end of {self.name}").__await__()
        return self.result()

    def __repr__(self) -> str:
        if self.done:
            state = "ended"
        elif self.entered:
            state = "running"
        else:
            state = f"waits for {self.waiting_for}" if self.waiting_for else "not started"
        return f"<Coroutine {self.name} {state}>"

    def _step(self) -> None:
        """Run until it suspends or ends. Exceptions of one that nobody awaits go out."""
        if self.done:
            raise AioError(f"{self!r} was entered again")
        if self.entered:
            raise AioError(f"{self!r} was entered while it runs")
        before = running.coroutine
        running.coroutine = self
        self.entered = True
        self.queued = None
        self.waiting_for = None
        try:
            self._send(None)
        except StopIteration as end:
            self._end(end.value, None)
        except BaseException as error:
            self._end(None, error)
            if self._waiters is None or not isinstance(error, Exception):
                raise
        finally:
            self.entered = False
            running.coroutine = before

    def _end(self, result: Any, exception: BaseException | None) -> None:
        self.done = True
        self._result = result
        self._exception = exception
        if self._waiters:
            for waiter in self._waiters:
                waiter.context.wake(waiter)


class suspend:  # a verb: it reads as one where it is awaited
    """Awaitable: give up control until somebody wakes this coroutine. ``what`` names what it waits for."""

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __await__(self) -> Generator[None, None, None]:
        coroutine = running.coroutine
        if coroutine is None:
            raise WrongContext("suspend() outside a coroutine that the event core drives")
        coroutine.waiting_for = self._what
        yield


def current() -> Coroutine:
    """The coroutine that is running. WrongContext outside."""
    coroutine = running.coroutine
    if coroutine is None:
        raise WrongContext("current() outside a coroutine that the event core drives")
    return coroutine


def in_coroutine() -> bool:
    return running.coroutine is not None


def enter(coroutine: Coroutine) -> None:
    """Run a suspended coroutine now, or after the running one if there is one. Home thread of its context."""
    by = running.coroutine
    if by is not None:
        if by is coroutine:
            raise AioError(f"{coroutine!r} enters itself")
        if coroutine.queued:
            raise AioError(f"{coroutine!r} was woken twice: by {coroutine.queued} and by {by.name}")
        coroutine.queued = by.name
        if by._woken is None:
            by._woken = []
        by._woken.append(coroutine)
        return
    coroutine._step()
    if coroutine._woken:
        _run_woken(coroutine)


def _run_woken(first: Coroutine) -> None:
    pending: deque[Coroutine] = deque(first._woken or ())
    first._woken = None
    while pending:
        coroutine = pending.popleft()
        try:
            coroutine._step()
        except BaseException:
            for left in pending:
                left.queued = None
                left.context.schedule(left)
            raise
        if coroutine._woken:
            pending.extendleft(reversed(coroutine._woken))
            coroutine._woken = None
