# SPDX-License-Identifier: Apache-2.0
"""Coroutines, driven by hand.

    async def copy() -> None:
        data = await backend.co_pread(0, 65536)
        ...

    context.enter(copy())

An asyncio Task costs several microseconds to make, suspend and wake; ``send(None)`` on a coroutine costs a tenth.
So the runner is a call of ``send`` and a suspended coroutine is just an object that somebody remembers. The end of
a coroutine would cost as much again, for ``send`` tells it by an exception; a generator that delegates to the
coroutine learns of it without one, and serves the next coroutine afterwards. So each coroutine borrows such a
generator from a pool, and what comes out of it says what happened: a string is what the coroutine waits for, a
tuple holds what it returned, anything else means that it awaits something that is not ours.

Who waits says so twice: first it leaves itself (``current()``) with whoever will wake it, then it awaits
``suspend(what)``. Who wakes calls ``context.wake(coroutine)``. A wake from inside another coroutine does not nest:
the woken one is queued on the waker and entered when the waker suspends or ends, before whatever was queued
earlier (depth first, as in QEMU), so that a chain of any length needs no stack.

A coroutine's exception goes to those who await it. If nobody does, it goes to whoever entered it, for he knows it;
never to one who merely woke it, who does not: then it is the context's to report.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Coroutine as AbstractCoroutine
from types import coroutine as awaitable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio.errors import AioError, WrongContext
from bottomhalf.aio.thread import ThreadState, own

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext

RUNNERS_IDLE_MAX: Final = 256  # kept for the next coroutines (QEMU's pool holds two batches of 128 per thread)

_ENDED: Final = "it has ended"

_Body = AbstractCoroutine[Any, Any, Any]


@awaitable
def _runner() -> Generator[Any, Any, None]:
    """Takes coroutines one after the other; yields what each yields, and at its end what it returned."""
    body = yield None
    while True:
        body = yield ((yield from body),)


_idle_runners: list[Callable[[Any], Any]] = []  # their bound send methods


def _new_runner() -> Callable[[Any], Any]:
    send: Callable[[Any], Any] = _runner().send
    send(None)
    return send


class Coroutine:
    """An ``async def`` call that the event core drives. Awaitable by other coroutines."""

    __slots__ = (
        "__weakref__",
        "_body",
        "_exception",
        "_result",
        "_send",
        "_waiters",
        "context",
        "done",
        "queued",
        "waiting_for",
        "woken",
    )

    def __init__(self, body: _Body, context: AioContext) -> None:
        try:
            if body.cr_suspended:  # type: ignore[attr-defined]
                raise AioError(
                    f"{_name_of(body)} was entered before; to continue it, give the Coroutine that enter() returned"
                )
        except AttributeError:
            if not hasattr(body, "send"):
                raise AioError(f"{body!r} is not what calling an async def gives")
        self._body = body
        self._send: Callable[[Any], Any] | None = None  # of its runner, once it has started
        self.context = context  # where it runs when woken
        self.done = False
        self.queued: str | None = None  # why nobody may enter it now; mostly because somebody is about to
        self.waiting_for: str | None = None
        self.woken: list[Coroutine] | None = None
        self._waiters: list[Coroutine] | None = None
        self._exception: BaseException | None

    @property
    def name(self) -> str:
        return _name_of(self._body)

    def result(self) -> Any:
        """What the coroutine returned; raises what it raised. AioError if it has not ended."""
        if not self.done:
            raise AioError(f"{self!r} has not ended")
        if self._exception is not None:
            raise self._exception
        return self._result

    def __await__(self) -> Generator[str, None, Any]:
        if not self.done:
            waiter = own.state.coroutine
            if waiter is None:
                raise WrongContext(f"{self!r} is awaited outside a coroutine that the event core drives")
            if waiter is self:
                raise AioError(f"{self!r} awaits itself")
            if self._waiters is None:
                self._waiters = []
            waiters = self._waiters
            waiters.append(waiter)
            if not _has_ended(self) or not _taken_back(waiters, waiter):
                yield f"the end of {self.name}"
        return self.result()

    def __repr__(self) -> str:
        if self.done:
            state = "ended"
        elif getattr(self._body, "cr_running", False):
            state = "running"
        else:
            state = f"waits for {self.waiting_for}" if self.waiting_for else "not started"
        return f"<Coroutine {self.name} {state}>"

    def step(self, state: ThreadState) -> Exception | None:
        """Run until it suspends or ends; the exception that ended it if nobody awaits it."""
        state.coroutine = self
        self.queued = None
        depth = state.depth
        argument: Any = None
        send = self._send
        if send is None:
            argument = self._body
            try:
                send = self._send = _idle_runners.pop()
            except IndexError:
                send = self._send = _new_runner()
        try:
            said = send(argument)
            while type(said) is not tuple:
                if type(said) is str and state.depth == depth:
                    self.waiting_for = said
                    state.coroutine = None
                    return None
                said = send.__self__.throw(self._refusal(said))  # type: ignore[attr-defined]
        except BaseException as error:
            return self._failed(error, state)
        self._result = said[0]
        self._exception = None
        self._send = None
        self.done = True
        self.queued = _ENDED
        if self._waiters is not None:
            self._wake_waiters(self._waiters)
        state.coroutine = None
        if len(_idle_runners) < RUNNERS_IDLE_MAX:
            _idle_runners.append(send)
        return None

    def _refusal(self, said: Any) -> AioError:
        if type(said) is str:
            return AioError(
                f"{self.name} would wait for {said} inside a deferred section, which would hold back everybody's "
                "calls meanwhile; end the section first"
            )
        what = "something" if said is None else repr(said)
        return AioError(f"{self.name} awaits {what} that is not the event core's (asyncio's, perhaps?)")

    def _failed(self, error: BaseException, state: ThreadState) -> Exception | None:
        awaited = bool(self._waiters)
        self._exception = error
        self._result = self._send = None
        self.done = True
        self.queued = _ENDED
        if self._waiters is not None:
            self._wake_waiters(self._waiters)
        state.coroutine = None
        if isinstance(error, Exception):
            return None if awaited else error
        woken, self.woken = self.woken, None
        _leave_to_the_loop(woken or ())
        raise error

    def _wake_waiters(self, waiters: list[Coroutine]) -> None:
        while waiters:
            waiter = waiters.pop(0)
            try:
                waiter.context.wake(waiter)
            except AioError as error:  # somebody else has woken it
                self.context.report(error, f"the end of {self.name}")


@awaitable
def suspend(what: str) -> Generator[str, None, None]:
    """Awaitable: give up control until somebody wakes this coroutine. ``what`` names what it waits for."""
    yield what


def current() -> Coroutine:
    """The coroutine that is running. WrongContext outside."""
    coroutine = own.state.coroutine
    if coroutine is None:
        raise WrongContext("current() outside a coroutine that the event core drives")
    return coroutine


def in_coroutine() -> bool:
    """Whether this thread is in a coroutine that the event core drives."""
    return own.state.coroutine is not None


def queue_on(coroutine: Coroutine, by: Coroutine | None) -> None:
    """Have it entered when ``by``, the running one, suspends; AioError if somebody else is to enter it."""
    if coroutine.queued is not None:
        who = "plain code" if by is None else by.name
        raise AioError(f"{coroutine!r} cannot be entered by {who}: {coroutine.queued}")
    assert by is not None
    if by is coroutine:
        raise AioError(f"{coroutine!r} enters itself")
    coroutine.queued = f"{by.name} has woken it"
    if by.woken is None:
        by.woken = [coroutine]
    else:
        by.woken.append(coroutine)


def run_woken(first: Coroutine, state: ThreadState) -> None:
    """Enter those that a coroutine has woken, and those that they wake."""
    pending = deque(first.woken or ())
    first.woken = None
    try:
        while pending:
            coroutine = pending.popleft()
            error = coroutine.step(state)
            if coroutine.woken is not None:
                pending.extendleft(reversed(coroutine.woken))
                coroutine.woken = None
            if error is not None:
                coroutine.context.report(error, f"coroutine {coroutine.name}")
    except BaseException:
        _leave_to_the_loop(pending)
        raise


def _leave_to_the_loop(coroutines: Any) -> None:
    """Somebody interrupts the program: nobody's wake-up is lost by it."""
    for coroutine in coroutines:
        coroutine.queued = None
        coroutine.context.schedule(coroutine)


def _has_ended(coroutine: Coroutine) -> bool:
    """Looked at once more: it may have ended in another thread just now."""
    return coroutine.done


def _taken_back(waiters: list[Coroutine], waiter: Coroutine) -> bool:
    """Take a waiter out again; False if another thread has taken it already, and wakes it."""
    try:
        waiters.remove(waiter)
    except ValueError:
        return False
    return True


def _name_of(body: Any) -> str:
    return getattr(body, "__qualname__", None) or "coroutine"
