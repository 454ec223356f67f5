# SPDX-License-Identifier: Apache-2.0
"""Several coroutines at a time, and coroutines that must not take for ever.

    sizes = await gather(read_header(a), read_header(b))        # all of them, results in order
    await gather(*(copy(block) for block in blocks), limit=16)  # sixteen at a time
    data = await cancel_after(fetch(), 5_000_000_000)           # TimedOut, and fetch() has ended
    data = await give_up_after(fetch(), 5_000_000_000)          # TimedOut, and fetch() goes on

Nothing is left behind by ``gather`` and ``cancel_after``: when they return or raise, all that they started has ended.
When one fails, the others are asked to end (``Coroutine.cancel``), which they do at a wait that can be given up; a
write that is on its way to a disk is waited for. ``give_up_after`` is QEMU's qemu_co_timeout: what takes too long goes
on by itself, and ``clean`` is called when it ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Coroutine as AbstractCoroutine
from typing import Any

from bottomhalf.aio.bottom_half import name_of
from bottomhalf.aio.coroutine import Coroutine, Waitable, current, named, shielded, suspend
from bottomhalf.aio.errors import AioError, Cancelled, TimedOut, WasCancelled
from bottomhalf.aio.sleep import Sleep

_Body = AbstractCoroutine[Any, Any, Any]


class _Group(Waitable):
    """The coroutines that a gather() has started."""

    __slots__ = ("failure", "parent", "running", "waiting")

    def __init__(self, parent: Coroutine) -> None:
        self.parent = parent
        self.running: set[Coroutine] = set()
        self.failure: BaseException | None = None
        self.waiting = False  # the parent does, until some have ended

    @property
    def what(self) -> str:
        return f"{len(self.running)} coroutines"

    def blockers(self) -> tuple[Waitable, ...]:
        return tuple(self.running)

    def take_back(self, waiter: Coroutine) -> bool:
        was_waiting, self.waiting = self.waiting, False
        return was_waiting

    def ended(self, coroutine: Coroutine) -> None:
        self.running.discard(coroutine)
        if self.waiting:
            self.waiting = False
            self.parent.context.wake(self.parent)

    def cancel(self) -> None:
        for coroutine in tuple(self.running):
            coroutine.cancel()

    async def wait(self) -> None:
        self.waiting = True
        await suspend(self)


async def gather(*bodies: _Body, limit: int | None = None) -> list[Any]:
    """Run coroutines at the same time, ``limit`` of them if that is given, in the caller's context; what they return,
    in order. The first exception cancels the others, and is raised when they have ended; so does a cancellation of the
    caller."""
    if limit is not None and limit < 1:
        for body in bodies:
            body.close()
        raise AioError(f"gather() of {limit} at a time")
    me = current()
    group = _Group(me)
    results: list[Any] = [None] * len(bodies)
    waiting = deque(enumerate(bodies))

    async def run(place: int, body: _Body) -> None:
        try:
            results[place] = await body
        except Exception as error:
            group.failure = group.failure or error
        except Cancelled:
            group.failure = group.failure or WasCancelled(f"{name_of(body)} was cancelled")
        finally:
            group.ended(current())

    try:
        while group.running or waiting:
            while waiting and (limit is None or len(group.running) < limit) and group.failure is None:
                place, body = waiting.popleft()
                child = Coroutine(named(run(place, body), name_of(body)), me.context)
                group.running.add(child)
                me.context.schedule(child)
            if group.failure is not None:
                break
            if group.running:
                await group.wait()
    except Cancelled as error:
        group.failure = error
    for _, body in waiting:
        body.close()
    if group.failure is not None:
        group.cancel()
        with shielded():
            while group.running:
                await group.wait()
        raise group.failure
    return results


class _Timeout(Waitable):
    """A coroutine, and another that waits for it until a timer fires."""

    __slots__ = ("failure", "left_behind", "sleep", "started")

    def __init__(self, body: _Body, me: Coroutine) -> None:
        self.sleep = Sleep()
        self.failure: Exception | None = None
        self.left_behind = False  # nobody will ask for its result
        self.started = Coroutine(named(self._run(body), name_of(body)), me.context)

    async def _run(self, body: _Body) -> Any:
        try:
            return await body
        except Exception as error:  # nobody awaits it, so the loop would raise it as well
            if self.left_behind:
                raise
            self.failure = error
        finally:
            self.sleep.wake()

    def result(self) -> Any:
        """What the coroutine returned; raises what it raised."""
        if self.failure is not None:
            raise self.failure
        return self.started.result()

    async def wait(self, timeout_ns: int) -> bool:
        """Whether it has ended in time."""
        me = current()
        me.context.schedule(self.started)
        await self.sleep.for_ns(timeout_ns)
        return self.started.done


async def give_up_after(body: _Body, timeout_ns: int, clean: Callable[[], object] | None = None) -> Any:
    """Run a coroutine for at most ``timeout_ns``; what it returns or raises, or TimedOut. Then it goes on by itself,
    and when it ends ``clean()`` is called, its result or exception being dropped; ``clean`` is called in no other case.
    0 is no limit. A cancellation of the caller leaves it behind in the same way."""
    if timeout_ns == 0:
        return await body
    left_behind = False

    async def tidy() -> Any:
        try:
            return await body
        except Exception:
            if not left_behind:
                raise
        finally:
            if left_behind and clean is not None:
                clean()

    timeout = _Timeout(named(tidy(), name_of(body)), current())
    try:
        if await timeout.wait(timeout_ns):
            return timeout.result()
    finally:
        left_behind = timeout.left_behind = not timeout.started.done
    raise TimedOut(f"{name_of(body)} took longer than {timeout_ns} ns; it goes on")


async def cancel_after(body: _Body, timeout_ns: int) -> Any:
    """Run a coroutine for at most ``timeout_ns``; what it returns or raises. Then it is cancelled, and TimedOut raised
    when it has ended, unless it returned all the same. A cancellation of the caller is passed on."""
    timeout = _Timeout(body, current())
    started = timeout.started
    try:
        in_time = await timeout.wait(timeout_ns)
    except Cancelled:
        started.cancel()
        with shielded():
            await _was_cancelled(started)
        raise
    if not in_time:
        started.cancel()
        with shielded():
            if await _was_cancelled(started):
                raise TimedOut(f"{started.name} took longer than {timeout_ns} ns")
    return timeout.result()


async def _was_cancelled(coroutine: Coroutine) -> bool:
    """Wait for its end; whether the cancellation was its end."""
    try:
        await coroutine
    except WasCancelled:
        return True
    return False

