# SPDX-License-Identifier: Apache-2.0
"""A context inside an asyncio loop, on the real host (asyncio knows no other)."""

from __future__ import annotations

import asyncio

import pytest

from bottomhalf.aio import AioContext, sleep_ns, wait_while
from bottomhalf.aio.asyncio_bridge import Embedded, from_asyncio
from bottomhalf.aio.asyncio_loop import AioEventLoop
from bottomhalf.host.linux import LinuxHost


async def _body(context: AioContext, event_fd: int) -> int:
    total = 0
    for n in range(20):
        await sleep_ns(50_000 if n % 2 else 0)
        total += n
    return total


def test_coroutines_and_tasks() -> None:
    """Several asyncio tasks await aio coroutines; asyncio's own work goes on."""

    async def main() -> list[int]:
        context = AioContext(LinuxHost())
        turns = 0

        async def tick() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        with Embedded(context) as embedded:
            ticking = asyncio.create_task(tick())
            results = await asyncio.gather(*(embedded.run(_body(context, 0)) for _ in range(5)))
            ticking.cancel()
        assert turns > 5
        context.close()
        return list(results)

    assert asyncio.run(main()) == [190] * 5


def test_exceptions() -> None:
    """An aio coroutine's exception reaches the task; one of a callback does not stop the serving."""

    async def main() -> None:
        context = AioContext(LinuxHost())
        told: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, what: told.append(str(what["exception"])))

        async def fails() -> None:
            await sleep_ns(1000)
            raise ValueError("mine")

        with Embedded(context) as embedded:
            with pytest.raises(ValueError, match="mine"):
                await embedded.run(fails())
            context.schedule_oneshot(lambda: 1 // 0)
            context.schedule_oneshot(lambda: None)
            assert await embedded.run(_body(context, 0)) == 190
        assert told == ["integer division or modulo by zero"]
        context.close()

    asyncio.run(main())


def test_scheduled_from_the_loops_own_thread() -> None:
    """From asyncio callbacks, between the context's polls: ordinary, idle, timers."""

    async def main() -> None:
        context = AioContext(LinuxHost())
        loop = asyncio.get_running_loop()
        with Embedded(context):
            for way in ("schedule", "schedule_idle", "timer"):
                ran: asyncio.Future[None] = loop.create_future()
                half = context.bottom_half(lambda: ran.set_result(None))  # noqa: B023
                await asyncio.sleep(0.001)
                if way == "timer":
                    context.timer(half.callback).arm_ns(context.now_ns() + 1_000_000)
                else:
                    getattr(half, way)()
                await asyncio.wait_for(ran, 10)
        context.close()

    asyncio.run(main())


def test_what_was_scheduled_before_it_is_embedded() -> None:
    async def main() -> None:
        context = AioContext(LinuxHost())
        ran = asyncio.Event()
        context.schedule_oneshot(ran.set)
        with Embedded(context):
            await asyncio.wait_for(ran.wait(), 10)
        context.close()

    asyncio.run(main())


@pytest.mark.parametrize("outer", ["embedded", "loop"])
def test_what_a_nested_poll_leaves_is_done_after_it(outer: str) -> None:
    """A nested poll takes the wake-up of what is scheduled during it, and ends before that runs. Not each poll looks at
    descriptors: so with any number of polls."""

    async def use(context: AioContext) -> None:
        for polls in range(1, 20):
            left = asyncio.Event()
            ran = 0

            def again() -> None:
                nonlocal ran
                ran += 1
                context.schedule_oneshot(again if ran < polls else left.set)  # noqa: B023

            context.schedule_oneshot(again)
            wait_while(context, lambda: ran < polls, what="the last")  # noqa: B023
            await asyncio.wait_for(left.wait(), 10)

    async def embedded() -> None:
        context = AioContext(LinuxHost())
        with Embedded(context):
            await use(context)
        context.close()

    async def loop() -> None:
        await use(asyncio.get_running_loop().context)  # type: ignore[attr-defined]

    if outer == "embedded":
        asyncio.run(embedded())
        return
    with asyncio.Runner(loop_factory=AioEventLoop) as runner:
        runner.run(loop())


def test_woken_by_somebody_else_it_goes_on_waiting() -> None:
    async def main() -> None:
        context = AioContext(LinuxHost())

        async def coroutine() -> str:
            return str(await from_asyncio(future))

        with Embedded(context):
            future = asyncio.get_running_loop().create_future()
            waiting = context.enter(coroutine())
            context.wake(waiting)
            assert not waiting.done
            future.set_result("the answer")
            await asyncio.sleep(0)
            assert waiting.result() == "the answer"
        context.close()

    asyncio.run(main())
