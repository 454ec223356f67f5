# SPDX-License-Identifier: Apache-2.0
"""asyncio and the event core in one thread; ``await`` reaches both ways.

    with Embedded(context):                                 # a context inside a running asyncio loop
        result = await run_in_aio(context, body())          # an aio coroutine, awaited by an asyncio task

    async def co_pread(...):                                # in an aio coroutine: asyncio's libraries
        reply = await from_asyncio(session.get(url))

Either loop can be the outer one. ``Embedded`` puts a context into an asyncio loop that is there already: asyncio
watches one descriptor, the context's poller; when that is readable, or a timer of the context is due, or something was
scheduled from the loop's own thread, the context is polled without blocking. While embedded the context counts as
asleep except in its polls, so that whoever schedules from elsewhere writes its eventfd. ``AioEventLoop``
(``asyncio_loop``) is an asyncio loop that is made of a context. Both say here which loop goes with which context.

asyncio's callbacks run in its loop and nowhere else. So while plain code waits in a nested poll they do not run, and a
coroutine that would wait for one of them then gets an error that says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from collections.abc import Coroutine as AbstractCoroutine
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from bottomhalf.aio.bottom_half import name_of
from bottomhalf.aio.context import AioContext
from bottomhalf.aio.coroutine import Coroutine, Waitable, current, named, suspend
from bottomhalf.aio.errors import Cancelled, WasCancelled, WrongContext
from bottomhalf.aio.wait import needs_outer_loop

POLLS_PER_TURN_MAX = 16  # before asyncio's other tasks get their turn


class Bridge(Protocol):
    """What connects a context with an asyncio loop."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    def arrange(self) -> None:
        """Make asyncio come back when the context next has something to do."""


bridges: WeakKeyDictionary[AioContext, Bridge] = WeakKeyDictionary()


class Embedded:
    """Keeps a context served by the running asyncio loop. Home thread of the context, which is the loop's."""

    def __init__(self, context: AioContext) -> None:
        self._context = context
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Embedded:
        self._context.embed()
        self.loop.add_reader(self._context.fileno(), self._poll)
        bridges[self._context] = self
        self.arrange()  # for what was scheduled before
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del bridges[self._context]
        self.loop.remove_reader(self._context.fileno())
        self._context.release()
        if self._timer is not None:
            self._timer.cancel()

    def _poll(self) -> None:
        self._context.release()
        try:
            for _ in range(POLLS_PER_TURN_MAX):
                if not self._context.poll(False):
                    break
        finally:
            self._context.embed()
            self.arrange()

    def arrange(self) -> None:
        """Make asyncio come back when the context next has something to do."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        timeout_ns = self._context.timeout_ns()
        if timeout_ns >= 0:
            self._timer = self.loop.call_later(timeout_ns / 1e9, self._poll)

    async def run(self, body: AbstractCoroutine[Any, Any, Any]) -> Any:
        """run_in_aio() in this context."""
        return await run_in_aio(self._context, body)


async def run_in_aio(context: AioContext, body: AbstractCoroutine[Any, Any, Any]) -> Any:
    """In an asyncio task: run an aio coroutine to its end; what it returns or raises.

    If the task is cancelled, so is the coroutine; where it cannot be (a write that was started cannot be unmade) it
    goes on and its result is dropped. WrongContext if this asyncio loop does not serve the context."""
    bridge = bridges.get(context)
    loop = asyncio.get_running_loop()
    if bridge is None or bridge.loop is not loop:
        body.close()
        raise WrongContext(
            f"the running asyncio loop does not serve {context.name}: put it into the loop with "
            "asyncio_bridge.Embedded, or run asyncio on it with asyncio_loop.AioEventLoop"
        )
    future: asyncio.Future[Any] = loop.create_future()

    async def guarded() -> None:
        try:
            result = await body
        except Exception as error:
            if not future.done():
                future.set_exception(error)
        except Cancelled:
            if not future.done():
                future.set_exception(WasCancelled(f"{name_of(body)} was cancelled"))
            raise
        else:
            if not future.done():
                future.set_result(result)

    coroutine = context.enter(named(guarded(), name_of(body)))
    if not future.done():
        bridge.arrange()
    try:
        return await future
    except asyncio.CancelledError:
        coroutine.cancel()
        raise


class _AsyncioTask(Waitable):
    """What an aio coroutine waits for: something of asyncio's."""

    __slots__ = ("_task", "_waiter")

    outer = "the asyncio loop"

    def __init__(self, task: asyncio.Future[Any], waiter: Coroutine) -> None:
        self._task = task
        self._waiter: Coroutine | None = waiter
        task.add_done_callback(self._done)

    @property
    def what(self) -> str:
        name = self._task.get_name() if isinstance(self._task, asyncio.Task) else repr(self._task)
        return f"asyncio's {name}"

    def _done(self, _: asyncio.Future[Any]) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.context.wake(waiter)

    def take_back(self, waiter: Coroutine) -> bool:
        was_waiting, self._waiter = self._waiter is not None, None
        return was_waiting


async def from_asyncio(awaitable: Awaitable[Any]) -> Any:
    """In an aio coroutine: wait for what asyncio awaits (a coroutine, a task, a future); its result or exception.

    It runs as a task of the asyncio loop that serves this context. A cancellation of the aio coroutine cancels it; if
    asyncio cancels it, that is a WasCancelled here. WrongContext if no asyncio loop serves the context, or if plain
    code of this thread is waiting, for then asyncio's callbacks do not run."""
    me = current()
    bridge = bridges.get(me.context)
    what = name_of(awaitable)
    try:
        if bridge is None:
            raise WrongContext(
                f"{me.name} awaits asyncio's {what}, and no asyncio loop serves {me.context.name}: put it into a "
                "running one with asyncio_bridge.Embedded, or run asyncio on it with asyncio_loop.AioEventLoop"
            )
        needs_outer_loop(f"asyncio's {what}", "the asyncio loop")
    except WrongContext:
        if isinstance(awaitable, AbstractCoroutine):
            awaitable.close()
        raise
    task = asyncio.ensure_future(awaitable, loop=bridge.loop)
    waiting = _AsyncioTask(task, me)
    try:
        while not task.done():  # somebody else may have woken it
            await suspend(waiting)
    except BaseException:  # cancelled, or thrown away half done
        task.cancel()
        raise
    if task.cancelled():
        raise WasCancelled(f"asyncio's {what} was cancelled")
    return task.result()
