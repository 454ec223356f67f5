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
generator from a pool, and what comes out of it says what happened: a tuple holds what it returned, ``GIVE_WAY`` says
that it wants to go on in the next poll, a string or a ``Waitable`` is what it waits for, and anything else means that
it awaits something that is not ours.

Who waits says so twice: first it leaves itself (``current()``) with whoever will wake it, then it awaits
``suspend(what)``. Who wakes calls ``context.wake(coroutine)``. A wake from inside another coroutine does not nest:
the woken one is queued and entered when the waker suspends or ends, before whatever was queued earlier (depth first,
as in QEMU), so that a chain of any length needs no stack.

A coroutine's exception goes to those who await it. If nobody does, it goes to whoever entered it, for he knows it;
never to one who merely woke it, who does not: then it is the context's to report.

``cancel()`` is a request. A coroutine that waits for a disk has lent it a buffer, one that waits for a lock may stand
in the middle of a change; neither can be torn out. So only a wait that can be taken back is ended, by ``Cancelled``
raised at the await, and in a ``shielded()`` section none is. A request that finds no such wait stays until the
coroutine comes to one.

What must live here: the object and its life. How the loop enters it: ``entering``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Coroutine as AbstractCoroutine
from itertools import repeat
from types import TracebackType
from types import coroutine as awaitable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio.errors import AioError, Cancelled, WasCancelled, WrongContext
from bottomhalf.aio.thread import ThreadState, own

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext

ENDED_MAX: Final = 4096  # coroutines of a context that have ended and may be used again
RUNNERS_IDLE_MAX: Final = 256  # kept for the next coroutines (QEMU's pool holds two batches of 128 per thread)

ASLEEP: Final = "it sleeps, and only its timer may wake it"  # in ``queued``
_ENDED: Final = "it has ended"

_Body = AbstractCoroutine[Any, Any, Any]


class Waitable:
    """What a coroutine can wait for: it can be named, and perhaps explained and given up."""

    __slots__ = ()

    outer = ""  # the loop that delivers it, if only one around the context does

    @property
    def what(self) -> str:
        """Completes the sentence "X waits for ..."."""
        raise NotImplementedError

    def blockers(self) -> tuple[Waitable, ...]:
        """What has to happen first, as far as it is known: who holds a lock, which coroutine has to end."""
        return ()

    def take_back(self, waiter: Coroutine) -> bool:
        """Forget a waiting coroutine, which is cancelled; False if it cannot be forgotten, or is woken already."""
        return False


@awaitable
def _runner() -> Generator[Any, Any, None]:
    """Takes coroutines one after the other; yields what each yields, and at its end what it returned."""
    body = yield None
    while True:
        try:
            body = yield ((yield from body),)
        except ValueError:
            if getattr(body, "cr_running", False):
                return  # thrown away half done: the collector closes the body, whose frame held us
            raise


_idle_runners: list[Callable[[Any], Any]] = []  # their bound send methods


def _take_runner() -> Callable[[Any], Any]:
    if _idle_runners:
        try:
            return _idle_runners.pop()
        except IndexError:  # another thread took the last one
            pass
    send: Callable[[Any], Any] = _runner().send
    send(None)
    return send


class _Cancellation:
    """What a coroutine that was cancelled, or has ever been shielded, needs besides."""

    __slots__ = ("requested", "shields")

    def __init__(self) -> None:
        self.requested = False
        self.shields = 0


class Coroutine(Waitable):
    """An ``async def`` call that the event core drives. Awaitable by other coroutines."""

    __slots__ = (
        "_body",
        "_cancellation",
        "_exception",
        "_result",
        "_waiters",
        "context",
        "done",
        "first",
        "queued",
        "send",
        "waits_for",
    )

    _exception: BaseException | None

    def __init__(self, body: _Body, context: AioContext) -> None:
        check_body(body)
        self.send = _take_runner()
        self.prepare(context)
        self._body: Any = body
        self.first: Any = body  # what the next step sends: the body, then None; a Cancelled is thrown

    @classmethod
    def blank(cls, context: AioContext) -> Coroutine:
        """One without a body. For ``entering``, which gives it one."""
        made = cls.__new__(cls)
        made.send = _take_runner()
        made.prepare(context)
        return made

    def prepare(self, context: AioContext) -> None:
        """A new life begins; it keeps its runner."""
        self.context = context  # where it runs when woken
        self.done = False
        self.queued: str | None = None  # why nobody may enter it now; mostly because somebody is about to
        self.waits_for: str | Waitable | None = None
        self.first = None
        self._waiters: list[Coroutine] | None = None
        self._cancellation: _Cancellation | None = None

    def give_up_runner(self) -> None:
        """It has ended and will not be used again, but somebody holds it."""
        if len(_idle_runners) < RUNNERS_IDLE_MAX:
            _idle_runners.append(self.send)
        self.send = _send_to_nobody

    @property
    def name(self) -> str:
        return getattr(self._body, "__qualname__", None) or "coroutine"

    @property
    def what(self) -> str:
        return f"the end of {self.name}"

    def waits_now_for(self) -> str | Waitable | None:
        """What it waits for; None if it has not started, is about to go on, or has ended. (``waits_for`` is what it
        waited for last: forgetting it at every step would cost as much as the step's bookkeeping.)"""
        return self.waits_for if self.queued is None or self.queued is ASLEEP else None

    @property
    def waiting_for(self) -> str | None:
        """What it waits for, in words; None if it does not."""
        waits_for = self.waits_now_for()
        return waits_for.what if isinstance(waits_for, Waitable) else waits_for

    @property
    def cancelling(self) -> bool:
        """Whether it was asked to end and has not come to a wait that can be given up."""
        return self._cancellation is not None and self._cancellation.requested

    def result(self) -> Any:
        """What the coroutine returned; raises what it raised. AioError if it has not ended, WasCancelled."""
        if not self.done:
            raise AioError(f"{self!r} has not ended")
        if self._exception is None:
            return self._result
        if isinstance(self._exception, Cancelled):
            raise WasCancelled(f"{self.name} was cancelled")
        raise self._exception

    def __await__(self) -> Generator[Coroutine, None, Any]:
        if not self.done:
            waiter = own.state.coroutine
            if waiter is None:
                raise WrongContext(f"{self!r} is awaited outside a coroutine that the event core drives")
            if waiter is self:
                raise AioError(f"{self!r} awaits itself")
            if self._waiters is None:
                self._waiters = []
            self._waiters.append(waiter)
            if not _has_ended(self) or not self.take_back(waiter):
                yield self
        return self.result()

    def blockers(self) -> tuple[Waitable, ...]:
        waits_for = self.waits_now_for()
        return (waits_for,) if isinstance(waits_for, Waitable) else ()

    def take_back(self, waiter: Coroutine) -> bool:
        waiters = self._waiters
        try:
            if waiters is None:
                return False
            waiters.remove(waiter)
        except ValueError:  # another thread has taken it already, and wakes it
            return False
        return True

    def cancel(self) -> None:
        """Ask it to end: ``Cancelled`` is raised at its wait, or, if that cannot be given up or it is shielded, at
        the next one that can. So one that has not started does start. From any thread; does not wait: await it."""
        context = self.context
        if not context.is_home:
            context.schedule_oneshot(self.cancel)
            return
        if self.done:
            return
        if self._cancellation is None:
            self._cancellation = _Cancellation()
        self._cancellation.requested = True
        waits_for = self.waits_now_for()
        if own.state.coroutine is self or not isinstance(waits_for, Waitable) or self._cancellation.shields:
            return
        if waits_for.take_back(self):
            self._cancellation.requested = False
            self.first = Cancelled()
            context.wake(self)

    def __repr__(self) -> str:
        waiting_for = self.waiting_for
        if self.done:
            state = "ended"
        elif getattr(self._body, "cr_running", False):
            state = "running"
        elif waiting_for:
            state = f"waits for {waiting_for}"
        else:
            state = "about to go on" if self.queued is not None and self.first is None else "not started"
        return f"<Coroutine {self.name} {state}>"

    # -- its life, as seen by ``entering`` ----------------------------------------------------------------------

    def step(self, state: ThreadState) -> Exception | None:
        """Run until it suspends or ends; the exception that ended it if nobody awaits it."""
        state.coroutine = self
        self.queued = None
        depth = state.depth
        first = self.first
        try:
            if first is None:
                said = self.send(None)
            elif first.__class__ is Cancelled:
                self.first = None
                said = self.throw(first)
            else:
                self.first = None
                said = self.send(first)
        except BaseException as error:
            return self.failed(error, state)
        return self.settle(said, state, depth)

    def throw(self, error: BaseException) -> Any:
        return self.send.__self__.throw(error)  # type: ignore[attr-defined]

    def settle(self, said: Any, state: ThreadState, depth: int) -> Exception | None:
        """It has said ``said``: note what it waits for, or that it has ended."""
        try:
            while type(said) is not tuple:
                if state.depth != depth:
                    said = self.throw(self._inside_a_section(said))
                elif said is GIVE_WAY:
                    state.coroutine = None
                    self.context.queue_again(self)
                    return None
                elif type(said) is str:
                    self.waits_for = said
                    state.coroutine = None
                    return None
                elif isinstance(said, Waitable):
                    self.waits_for = said
                    cancellation = self._cancellation
                    if cancellation is None or not cancellation.requested or cancellation.shields:
                        state.coroutine = None
                        return None
                    if not said.take_back(self):
                        state.coroutine = None
                        return None
                    cancellation.requested = False
                    said = self.throw(Cancelled())
                else:
                    said = self.throw(self._not_ours(said))
        except BaseException as error:
            return self.failed(error, state)
        self.ended(said[0], state)
        return None

    def ended(self, result: Any, state: ThreadState) -> None:
        """It has returned ``result``."""
        self._result = result
        self._exception = None
        self._finish(state)
        ended = self.context.ended_coroutines
        if result is None and len(ended) < ENDED_MAX:
            ended.append(self)  # nobody may hold it any more soon; a result would be kept alive by this
        else:
            self.give_up_runner()

    def failed(self, error: BaseException, state: ThreadState) -> Exception | None:
        """It has raised ``error``: that, if nobody awaits it and it is nobody's wish."""
        awaited = bool(self._waiters)
        self._exception = error
        self._result = None
        self.send = _send_to_nobody  # its runner has ended with it
        self._finish(state)
        if isinstance(error, Exception):
            return None if awaited else error
        if isinstance(error, Cancelled):
            return None
        woken, state.woken = state.woken, []
        for coroutine in woken:  # somebody interrupts the program: nobody's wake-up is lost by it
            coroutine.queued = None
            coroutine.context.schedule(coroutine)
        raise error

    def _finish(self, state: ThreadState) -> None:
        self.waits_for = None
        self.done = True
        self.queued = _ENDED
        if self._waiters:
            self._wake_waiters(self._waiters)
        state.coroutine = None

    def _wake_waiters(self, waiters: list[Coroutine]) -> None:
        while waiters:
            waiter = waiters.pop(0)
            try:
                waiter.context.wake(waiter)
            except AioError as error:  # somebody else has woken it
                self.context.report(error, f"the end of {self.name}")

    def _inside_a_section(self, said: Any) -> AioError:
        what = said.what if isinstance(said, Waitable) else said if type(said) is str else "its next turn"
        return AioError(
            f"{self.name} would wait for {what} inside a deferred section, which would hold back everybody's "
            "calls meanwhile; end the section first"
        )

    def _not_ours(self, said: Any) -> AioError:
        what = "something" if said is None else repr(said)
        return AioError(f"{self.name} awaits {what} that is not the event core's (asyncio's, perhaps?)")


class _GiveWay:
    """Awaitable: a C iterator that yields GIVE_WAY once costs less than a generator."""

    __slots__ = ()


GIVE_WAY: Final = _GiveWay()
_GiveWay.__await__ = staticmethod((GIVE_WAY,).__iter__)  # type: ignore[attr-defined]


give_way: Final[Callable[[], Any]] = repeat(GIVE_WAY).__next__
"""``await give_way()``: go on in the next poll, so that others get their turn. (A function that does nothing but return
would be a twentieth of what it costs.)"""


@awaitable
def suspend(what: str | Waitable) -> Generator[str | Waitable, None, None]:
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


class shielded:
    """A section of a coroutine in which it is not cancelled; the request waits for the section's end.

        with shielded():
            await write_table()
            await publish_table()
    """

    __slots__ = ("_cancellation",)

    def __enter__(self) -> None:
        coroutine = current()
        if coroutine._cancellation is None:
            coroutine._cancellation = _Cancellation()
        self._cancellation = coroutine._cancellation
        self._cancellation.shields += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancellation.shields -= 1


def check_body(body: Any) -> None:
    """AioError unless it is what calling an ``async def`` gives, not started yet."""
    try:
        if not body.cr_suspended:
            return
    except AttributeError:
        if hasattr(body, "send"):
            return
        raise AioError(f"{body!r} is not what calling an async def gives")
    name = getattr(body, "__qualname__", None) or "coroutine"
    raise AioError(f"{name} was entered before; to continue it, give the Coroutine that enter() returned")


def named(outer: _Body, name: str) -> _Body:
    """A coroutine that only wraps another is called by that one's name, which people know."""
    outer.__qualname__ = name  # type: ignore[attr-defined]
    return outer


def _has_ended(coroutine: Coroutine) -> bool:
    """Looked at once more: it may have ended in another thread just now."""
    return coroutine.done


def _send_to_nobody(argument: Any) -> Any:
    """In the place of an ended coroutine's runner."""
    raise AioError("a coroutine that has ended was entered")
