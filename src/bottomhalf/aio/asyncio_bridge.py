# SPDX-License-Identifier: Apache-2.0
"""An AioContext inside an asyncio loop.

    with Embedded(context) as embedded:
        result = await embedded.run(body())      # an aio coroutine, awaited by an asyncio task

asyncio watches one descriptor, the context's poller; when that is readable, or a timer of the context is due, or
something was scheduled from the loop's own thread, the context is polled without blocking. While embedded the
context counts as asleep except in its polls, so that whoever schedules from elsewhere writes its eventfd.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine as AbstractCoroutine
from types import TracebackType
from typing import Any

from bottomhalf.aio.context import AioContext

POLLS_PER_TURN_MAX = 16  # before asyncio's other tasks get their turn


class Embedded:
    """Keeps a context served by the running asyncio loop. Home thread of the context, which is the loop's."""

    def __init__(self, context: AioContext) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Embedded:
        self._context.notify_me += 1
        self._loop.add_reader(self._context.fileno(), self._poll)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.remove_reader(self._context.fileno())
        self._context.notify_me -= 1
        if self._timer is not None:
            self._timer.cancel()

    def _poll(self) -> None:
        self._context.notify_me -= 1  # it is awake
        try:
            for _ in range(POLLS_PER_TURN_MAX):
                if not self._context.poll(False):
                    break
        finally:
            self._context.notify_me += 1
            self.arrange()

    def arrange(self) -> None:
        """Make asyncio come back when the context next has something to do."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        timeout_ns = self._context.timeout_ns()
        if timeout_ns >= 0:
            self._timer = self._loop.call_later(timeout_ns / 1e9, self._poll)

    async def run(self, body: AbstractCoroutine[Any, Any, Any]) -> Any:
        """Run an aio coroutine to its end. If the asyncio task is cancelled, the coroutine goes on (a write that
        was started cannot be unmade) and its result is dropped."""
        future: asyncio.Future[Any] = self._loop.create_future()

        async def guarded() -> None:
            try:
                result = await body
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self._context.enter(guarded())
        if not future.done():
            self.arrange()
        return await future
