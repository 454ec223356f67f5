# SPDX-License-Identifier: Apache-2.0
"""The event core without any disk: bottom halves, a timer, deferred calls, coroutines, another thread."""

from __future__ import annotations

from bottomhalf.aio import AioContext, CoQueue, IOThread, defer_call, deferred, kick, sleep_ns, wait_while

MILLISECOND = 1_000_000


def bottom_halves(context: AioContext) -> None:
    """However often it is scheduled, a bottom half runs once, in the next poll."""
    runs = []
    half = context.bottom_half(lambda: runs.append("ran"), name="count")
    for _ in range(3):
        half.schedule()
    context.poll(blocking=False)
    print(f"bottom half: scheduled 3 times, {runs[0]} {len(runs)} time")


def timers(context: AioContext) -> None:
    """A timer fires once and is armed again for the next time."""
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks < 3:
            timer.arm_ns(context.now_ns() + MILLISECOND)

    timer = context.timer(tick, name="tick")
    timer.arm_ns(context.now_ns() + MILLISECOND)
    wait_while(context, lambda: ticks < 3, what="three ticks")
    print(f"timer: {ticks} ticks")


def deferred_calls() -> None:
    """Code that sees one item at a time asks for a flush each time; inside a section there is one."""
    queue: list[int] = []
    flushed: list[list[int]] = []

    def flush(_: object) -> None:
        flushed.append(queue.copy())
        queue.clear()

    with deferred():
        for item in range(4):
            queue.append(item)
            defer_call(flush, None)
    print(f"deferred call: {len(flushed)} flush of {flushed[0]}")


def coroutines(context: AioContext) -> None:
    """Coroutines are ordinary ``async def`` code; a queue wakes those that wait in it."""
    bell = CoQueue("the bell")

    async def guest(name: str) -> str:
        await bell.wait()
        return name

    async def party() -> list[str]:
        guests = [context.enter(guest(name)) for name in ("Ada", "Grace")]
        await sleep_ns(MILLISECOND)
        bell.wake_all()
        return [await each for each in guests]

    print(f"coroutines: {' and '.join(context.run(party()))} heard the bell")


def another_thread(context: AioContext) -> None:
    """An iothread polls a context of its own; what is scheduled there runs there."""
    thread = IOThread("io0", context.host)
    squares: list[int] = []

    def work() -> None:
        squares.extend(number * number for number in range(5))
        kick()

    thread.context.schedule_oneshot(work)
    wait_while(thread.context, lambda: not squares, what="the squares")
    thread.stop()
    print(f"iothread {thread.name}: {squares}")


if __name__ == "__main__":
    main = AioContext()
    bottom_halves(main)
    timers(main)
    deferred_calls()
    coroutines(main)
    another_thread(main)
    main.close()
