# SPDX-License-Identifier: Apache-2.0
"""A context inside an asyncio loop, on the real host (asyncio knows no other)."""

from __future__ import annotations

import asyncio

import pytest

from bottomhalf.aio import AioContext, sleep_ns
from bottomhalf.aio.asyncio_bridge import Embedded
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
