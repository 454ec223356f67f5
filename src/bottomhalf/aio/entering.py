# SPDX-License-Identifier: Apache-2.0
"""How coroutines are entered: by plain code, by a wake, by the loop.

    coroutine = context.enter(copy())       # runs now, up to its first wait
    context.schedule(copy())                # runs in the next poll
    context.wake(coroutine)                 # from any thread, when what it waited for has happened

Three ways in, one rule: at any time one coroutine of a thread runs, and it was entered by plain code. A coroutine
that enters or wakes another only queues it; it is entered when the first suspends. From another thread it is the
context's next poll that does it.

The ways that a busy program takes, entering a new coroutine and going on with one, are written out here for speed and
leave all that is rare to ``Coroutine``. (Functions that lie in an attribute are called through a local variable, which
is twice as fast on CPython 3.11.) An object of eleven attributes costs as much to make, and to collect, as the rest of
a short coroutine's life, so those that have ended and that nobody holds any more are used again. Whether somebody does
is what the reference count tells: what the loop itself holds is a known number. Without the global lock the count is
not exact, and there nothing is used again.
"""

# The methods' self is an AioContext, which is made of this class: mypy has no other word for that.
# mypy: disable-error-code="misc"

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Coroutine as AbstractCoroutine
from collections.abc import Iterable
from sys import getrefcount
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio.bottom_half import name_of
from bottomhalf.aio.coroutine import ENDED_MAX, GIVE_WAY, Coroutine, current, named, suspend
from bottomhalf.aio.errors import AioError, WrongContext
from bottomhalf.aio.thread import ThreadState, own
from bottomhalf.aio.wait import waiting, who_polls

if TYPE_CHECKING:
    from bottomhalf.aio.context import AioContext

_GAVE_WAY: Final = "it goes on in the next poll"


class Entering:
    """The coroutine side of an AioContext."""

    __slots__ = ()

    def enter(self: AioContext, coroutine: Coroutine | AbstractCoroutine[Any, Any, Any]) -> Coroutine:
        """Start a coroutine, or continue a suspended one, in this context.

        In the home thread it runs now, up to its first suspension; from inside another coroutine, when that one
        suspends; from another thread, in the next poll. An exception in it goes to whoever awaits it, else out
        of this call (or to the exception handler when the loop entered it)."""
        state = self._state
        at_home = self._at_home
        body: Any = coroutine
        try:
            goes_on = body.cr_suspended
        except AttributeError:  # a Coroutine that goes on, or nothing for us
            goes_on = True
        if goes_on or state.coroutine is not None or not at_home():
            return self._enter(coroutine)
        idle = self._idle_coroutines
        entered = idle.pop() if idle else self._idle_coroutine()
        entered._body = body
        state.coroutine = entered
        depth = state.depth
        failure = None
        send = entered.send
        try:
            said = send(body)
        except BaseException as error:
            failure = entered.failed(error, state)
        else:
            if said is GIVE_WAY and state.depth == depth:
                state.coroutine = None
                entered.queued = _GAVE_WAY
                append = self.append_scheduled
                append(entered)
                if self.notify_me:
                    self.wake_up()
                if not state.woken:
                    return entered
            elif type(said) is str and state.depth == depth:
                entered.waits_for = said
                state.coroutine = None
            elif type(said) is tuple:
                entered.ended(said[0], state)
            else:
                failure = entered.settle(said, state, depth)
        if state.woken:
            run_woken(state)
        if failure is not None:
            raise failure
        return entered

    def enter_all(self: AioContext, bodies: Iterable[AbstractCoroutine[Any, Any, Any]]) -> list[Coroutine]:
        """enter() for each, in order, for a fifth less: what a batch of requests that have to wait should take.

        Each runs, and those that it wakes, before the next. If one raises what nobody awaits, the others are entered
        all the same; then the first exception goes out, and further ones go to the exception handler."""
        state = self._state
        at_home = self._at_home
        left = iter(list(bodies))
        if state.coroutine is not None or not at_home():
            return [self._enter(body) for body in left]
        idle, append, depth = self._idle_coroutines, self.append_scheduled, state.depth
        entered: list[Coroutine] = []
        failures: list[tuple[Exception, str]] = []
        try:
            for body in left:
                try:
                    goes_on = body.cr_suspended  # type: ignore[attr-defined]
                except AttributeError:
                    goes_on = True
                if goes_on:
                    state.coroutine = None
                    entered.append(self._enter(body))
                    continue
                coroutine = idle.pop() if idle else self._idle_coroutine()
                entered.append(coroutine)
                coroutine._body = body
                state.coroutine = coroutine
                send = coroutine.send
                try:
                    said = send(body)
                except BaseException as error:
                    failure = coroutine.failed(error, state)
                else:
                    if said is GIVE_WAY and state.depth == depth:
                        coroutine.queued = _GAVE_WAY
                        append(coroutine)
                        if not state.woken:
                            continue
                        state.coroutine = failure = None
                    else:
                        failure = coroutine.settle(said, state, depth)
                if state.woken:
                    run_woken(state)
                if failure is not None:
                    failures.append((failure, f"coroutine {coroutine.name}"))
        except BaseException:
            for body in left:  # somebody interrupts the program, or one was no coroutine: the others go on
                self.schedule(body)
            raise
        finally:
            state.coroutine = None
            if self.notify_me:
                self.wake_up()
        for failure, where in failures[1:]:
            self.report(failure, where)
        if failures:
            raise failures[0][0]
        return entered

    def _idle_coroutine(self: AioContext) -> Coroutine:
        """One without a body: used before, if among those that have ended is one that nobody holds any more."""
        idle, ended = self._idle_coroutines, self.ended_coroutines
        while ended:
            coroutine = ended.pop()
            if getrefcount(coroutine) == _ALONE_HERE:
                coroutine.prepare(self)
                idle.append(coroutine)
            else:
                coroutine.give_up_runner()
        return idle.pop() if idle else Coroutine.blank(self)

    def _enter(self: AioContext, coroutine: Coroutine | AbstractCoroutine[Any, Any, Any]) -> Coroutine:
        """All that enter() does not do itself."""
        if not isinstance(coroutine, Coroutine):
            coroutine = Coroutine(coroutine, self)
        state = self._state
        if coroutine.context is not self or not self._at_home():
            self.schedule(coroutine)
        elif state.coroutine is None and coroutine.queued is None:
            failure = coroutine.step(state)
            if state.woken:
                run_woken(state)
            if failure is not None:
                raise failure
        else:
            _queue_on(coroutine, state)
        return coroutine

    def wake(self: AioContext, coroutine: Coroutine) -> None:
        """Continue a suspended coroutine in its own context, as enter() does. From any thread.

        For those who do not know what they wake: an exception in it that nobody awaits goes to the exception
        handler of its context or out of the context's poll, never out of here."""
        context = coroutine.context
        state = context._state
        at_home = context._at_home
        if not at_home():
            context.schedule(coroutine)
        elif state.coroutine is None and coroutine.queued is None:
            if coroutine.first is None:
                state.coroutine = coroutine
                depth = state.depth
                failure = None
                send = coroutine.send
                try:
                    said = send(None)
                except BaseException as error:
                    failure = coroutine.failed(error, state)
                else:
                    if type(said) is tuple:
                        coroutine.ended(said[0], state)
                    else:
                        failure = coroutine.settle(said, state, depth)
            else:
                failure = coroutine.step(state)
            if state.woken:
                run_woken(state)
            if failure is not None:
                context.report(failure, f"coroutine {coroutine.name}")
        else:
            _queue_on(coroutine, state)

    def schedule(self: AioContext, coroutine: Coroutine | AbstractCoroutine[Any, Any, Any]) -> Coroutine:
        """Enter the coroutine in the next poll of this context, first come first served. From any thread.

        This is also how a coroutine moves: it schedules itself in another context and suspends; see move_to()."""
        if not isinstance(coroutine, Coroutine):
            coroutine = Coroutine(coroutine, self)
        if coroutine.queued is not None:
            raise AioError(f"{coroutine!r} cannot be scheduled in {self.name}: {coroutine.queued}")
        coroutine.queued = f"it is scheduled in {self.name}"
        if coroutine.context is not self and own.state.coroutine is coroutine:
            # Another thread must not enter it before it has suspended: its old context hands it over then.
            coroutine.context.schedule_oneshot(lambda: self._take(coroutine))
        else:
            self._take(coroutine)
        return coroutine

    def _take(self: AioContext, coroutine: Coroutine) -> None:
        coroutine.context = self
        self.append_scheduled(coroutine)
        if self.notify_me:
            self.wake_up()

    def queue_again(self: AioContext, coroutine: Coroutine) -> None:
        """It gave way: its next turn is in the next poll. Home thread only."""
        coroutine.queued = _GAVE_WAY
        self.append_scheduled(coroutine)
        if self.notify_me:
            self.wake_up()

    def _run_scheduled(self: AioContext) -> None:
        """Enter all that is scheduled now, and first what is left of the batches of polls around this one."""
        queue, batches, state = self._scheduled, self._scheduled_slices, self._state
        idle = self._idle_coroutines
        count = len(queue)
        if count:
            batches.append(iter(queue[:count]))
            del queue[:count]
        while batches:
            batch_left = batches[0]
            for coroutine in batch_left:
                if coroutine.first is None:
                    state.coroutine = coroutine
                    coroutine.queued = None
                    send = coroutine.send
                    try:
                        said = send(None)
                    except BaseException as error:
                        failure = coroutine.failed(error, state)
                    else:
                        if type(said) is tuple and getrefcount(coroutine) == _ALONE and coroutine._cancellation is None:
                            idle.append(coroutine)
                            if not state.woken:
                                continue
                            failure = None
                        else:
                            failure = coroutine.settle(said, state, 0)
                else:
                    failure = coroutine.step(state)
                if state.woken:
                    state.coroutine = None
                    run_woken(state)
                if failure is not None:
                    self.failed(failure, f"coroutine {coroutine.name}")
            state.coroutine = None
            if batches and batches[0] is batch_left:
                batches.popleft()
        del idle[ENDED_MAX:]

    def run(self: AioContext, body: AbstractCoroutine[Any, Any, Any], what: str = "") -> Any:
        """Run a coroutine from plain code until it ends; what it returns or raises. Home thread only.

        An exception of another callback that goes out of the poll goes out of here too; the coroutine goes on in
        the next polls."""
        what = what or name_of(body)
        if not self.is_home or self._state.coroutine is not None:
            body.close()
            where = "another thread" if not self.is_home else f"coroutine {self._state.coroutine!r}"
            raise WrongContext(f"{self.name} is to run {what} to its end, from {where}; enter it and await it")

        async def guarded() -> tuple[Any, Exception | None]:
            try:
                return await body, None
            except Exception as error:
                return None, error

        polling = who_polls(self, what)
        with waiting(polling, what, None) as wait:
            wait.on = coroutine = self.enter(named(guarded(), name_of(body)))
            while not coroutine.done:
                polling.poll(True)
        result, error = coroutine.result()
        if error is not None:
            raise error
        return result


async def move_to(context: AioContext) -> None:
    """Go on in another context, in its thread. Nothing happens if the coroutine is there already.

    What belongs to a thread (its deferred section, its current context) is another one afterwards."""
    me = current()
    if me.context is not context:
        context.schedule(me)
        await suspend(f"its turn in {context.name}")


def run_woken(state: ThreadState) -> None:
    """Enter those that a coroutine has woken, and those that they wake, before the ones that are waiting already."""
    pending = deque(state.woken)
    state.woken = []
    try:
        while pending:
            coroutine = pending.popleft()
            failure = coroutine.step(state)
            if state.woken:
                pending.extendleft(reversed(state.woken))
                state.woken = []
            if failure is not None:
                coroutine.context.report(failure, f"coroutine {coroutine.name}")
    except BaseException:
        for coroutine in pending:  # somebody interrupts the program: nobody's wake-up is lost by it
            coroutine.queued = None
            coroutine.context.schedule(coroutine)
        raise


def _queue_on(coroutine: Coroutine, state: ThreadState) -> None:
    """Have it entered when the running one suspends; AioError if somebody else is to enter it."""
    by = state.coroutine
    if coroutine.queued is not None:
        who = "plain code" if by is None else by.name
        raise AioError(f"{coroutine!r} cannot be entered by {who}: {coroutine.queued}")
    assert by is not None
    if by is coroutine:
        raise AioError(f"{coroutine!r} enters itself")
    coroutine.queued = f"{by.name} has woken it"
    state.woken.append(coroutine)


def _counts_of_alone() -> tuple[int, int]:
    """The reference counts, as _run_scheduled() and _idle_coroutine() see them, of a coroutine that nobody else
    holds: measured by the same few steps, for interpreters differ."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return -1, -1
    state = ThreadState()
    count = count_here = 0
    batch = iter([Coroutine.__new__(Coroutine)])
    for coroutine in batch:
        state.coroutine = coroutine
        count = getrefcount(coroutine)
    ended = [Coroutine.__new__(Coroutine)]
    del coroutine, batch, state
    while ended:
        coroutine = ended.pop()
        count_here = getrefcount(coroutine)
    return count, count_here


_ALONE, _ALONE_HERE = _counts_of_alone()
