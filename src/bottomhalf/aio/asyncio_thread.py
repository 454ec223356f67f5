# SPDX-License-Identifier: Apache-2.0
"""An asyncio loop in a thread of its own, for code that has no other: a driver that awaits asyncio's libraries.

    libraries = AsyncioThread(context.host)

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        data = await libraries.run(session.get_range(offset, len(buffer)))
        buffer[:] = data

Where asyncio is there already, around the context (``asyncio_bridge.Embedded``), ``from_asyncio`` is cheaper: nothing
changes threads. But a nested poll does not serve a loop around it, so a drain that waits for such a request is refused.
A loop in another thread runs on, whoever waits here. That is what a driver needs, which cannot know who will drain it.

The awaited coroutine runs in the other thread: objects of the library belong there, and are made there too, in
something that ``run`` awaits. Not on a simulated host, whose threads do not wait for real descriptors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine as AbstractCoroutine
from typing import Any

from bottomhalf.aio.bottom_half import name_of
from bottomhalf.aio.coroutine import Coroutine, Waitable, current, suspend
from bottomhalf.aio.errors import WasCancelled
from bottomhalf.host.protocol import Host


class _Task(Waitable):
    """What an aio coroutine waits for."""

    __slots__ = ("_waiter", "name", "task")

    def __init__(self, name: str, waiter: Coroutine) -> None:
        self.name = name
        self.task: asyncio.Task[Any] | None = None
        self._waiter = waiter

    @property
    def what(self) -> str:
        return f"asyncio's {self.name} in another thread"

    def start(self, body: AbstractCoroutine[Any, Any, Any]) -> None:
        self.task = asyncio.get_running_loop().create_task(body)
        self.task.add_done_callback(lambda _: self._waiter.context.wake(self._waiter))


class AsyncioThread:
    """The thread and its loop. close() ends it; a program that ends without does not wait for it."""

    def __init__(self, host: Host, name: str = "asyncio") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = host.start_thread(self._serve, name, daemon=True)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def run(self, body: AbstractCoroutine[Any, Any, Any]) -> Any:
        """In an aio coroutine of any context: what the asyncio coroutine returns or raises; WasCancelled if asyncio
        cancels it. A cancellation of the aio coroutine waits for its end."""
        task = _Task(name_of(body), current())
        self._loop.call_soon_threadsafe(task.start, body)
        await suspend(task)
        assert task.task is not None and task.task.done(), "woken by something else than the task"
        if task.task.cancelled():
            raise WasCancelled(f"asyncio's {task.name} was cancelled")
        return task.task.result()

    def close(self) -> None:
        """Cancel what still runs and end the thread. Nobody waits for run()."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._thread.join()
        self._loop.close()
