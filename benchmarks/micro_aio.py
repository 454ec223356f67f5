# SPDX-License-Identifier: Apache-2.0
"""How many nanoseconds the event core takes per operation, beside asyncio in the same run.

    PYTHONPATH=src python3 benchmarks/micro_aio.py [words of a row]

The rounds of both alternate, so that a noisy machine disturbs both alike; the medians are printed. Look at the
ratio: it is what two machines, or two hours of one machine, have in common.
"""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

from bottomhalf.aio import AioContext, current, suspend

COUNT = 1000
ROUNDS = 41
EVENTS = 32
IN_FLIGHT = 125  # coroutines that wait at the same time

Operation = Callable[[], object]


class Ours:
    """The operations, each done COUNT times, on an AioContext."""

    def __init__(self) -> None:
        self.context = context = AioContext()
        self.halves = [context.bottom_half(_nothing) for _ in range(COUNT)]
        self.timer = context.timer(_nothing)
        self.waiters: list[Any] = []
        self.wake = context.bottom_half(self.wake_all)

    def schedule(self) -> None:
        for half in self.halves:
            half.schedule()
        self.context.poll(False)

    def oneshot(self) -> None:
        schedule = self.context.schedule_oneshot
        for _ in self.halves:
            schedule(_nothing)
        self.context.poll(False)

    def rearm(self) -> None:
        left = COUNT

        def again() -> None:
            nonlocal left
            left -= 1
            if left:
                half.schedule()

        half = self.context.bottom_half(again)
        half.schedule()
        while left:
            self.context.poll(True)

    def coroutine(self) -> None:
        enter = self.context.enter
        for _ in range(COUNT):
            enter(_co_nothing())

    def coroutine_woken(self) -> None:
        enter = self.context.enter
        for _ in range(COUNT // IN_FLIGHT):
            for _ in range(IN_FLIGHT):
                enter(self.wait())
            self.wake.schedule()
            self.context.poll(False)

    async def wait(self) -> None:
        self.waiters.append(current())
        await suspend("a wake-up")

    def wake_all(self) -> None:
        waiters, self.waiters = self.waiters, []
        wake = self.context.wake
        for waiter in waiters:
            wake(waiter)

    def await_child(self) -> None:
        self.context.enter(_parent())

    def timer_cancelled(self) -> None:
        timer, deadline_ns = self.timer, self.context.now_ns() + 10**12
        for _ in range(COUNT):
            timer.arm_ns(deadline_ns)
            timer.cancel()

    def timer_due(self) -> None:
        for _ in range(COUNT):
            self.context.timer(_nothing).arm_ns(0)
        self.context.poll(False)

    def handlers(self, fds: list[int], on: bool) -> None:
        for fd in fds:
            self.context.set_fd_handler(fd, _nothing if on else None)

    def events(self) -> None:
        for _ in range(COUNT // EVENTS):
            self.context.poll(True)


class Asyncio:
    """The same on an asyncio loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.futures: list[asyncio.Future[None]] = []
        self.turns = 0

    def turn(self) -> None:
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def schedule(self) -> None:
        call_soon = self.loop.call_soon
        for _ in range(COUNT):
            call_soon(_nothing)
        self.turn()

    def rearm(self) -> None:
        left = COUNT
        loop = self.loop

        def again() -> None:
            nonlocal left
            left -= 1
            if left:
                loop.call_soon(again)
            else:
                loop.stop()

        loop.call_soon(again)
        loop.run_forever()

    def tasks(self, body: Callable[[], Coroutine[Any, Any, None]], count: int) -> None:
        tasks = [self.loop.create_task(body()) for _ in range(count)]
        self.turn()
        del tasks

    def coroutine(self) -> None:
        self.tasks(_co_nothing, COUNT)

    def coroutine_woken(self) -> None:
        for _ in range(COUNT // IN_FLIGHT):
            self.tasks(self.wait, IN_FLIGHT)
            futures, self.futures = self.futures, []
            for future in futures:
                future.set_result(None)
            self.turn()

    async def wait(self) -> None:
        future = self.loop.create_future()
        self.futures.append(future)
        await future

    def await_child(self) -> None:
        self.loop.run_until_complete(_parent())

    def timer_cancelled(self) -> None:
        deadline = self.loop.time() + 1000
        for _ in range(COUNT):
            self.loop.call_at(deadline, _nothing).cancel()
        self.turn()

    def timer_due(self) -> None:
        for _ in range(COUNT):
            self.loop.call_at(0, _nothing)
        self.turn()

    def handlers(self, fds: list[int], on: bool) -> None:
        for fd in fds:
            if on:
                self.loop.add_reader(fd, _nothing)
            else:
                self.loop.remove_reader(fd)

    def events(self) -> None:
        self.turns = COUNT // EVENTS
        self.loop.call_soon(self.next_turn)
        self.loop.run_forever()

    def next_turn(self) -> None:
        self.turns -= 1
        if self.turns:
            self.loop.call_soon(self.next_turn)
        else:
            self.loop.stop()


def _nothing() -> None:
    pass


async def _co_nothing() -> None:
    pass


async def _parent() -> None:
    for _ in range(COUNT):
        await _co_nothing()


def medians_ns(operations: list[Operation]) -> list[float]:
    """Nanoseconds for one of the COUNT operations that each call does."""
    taken: list[list[float]] = [[] for _ in operations]
    for _ in range(ROUNDS):
        for operation, times in zip(operations, taken, strict=True):
            begin = time.perf_counter_ns()
            operation()
            times.append((time.perf_counter_ns() - begin) / COUNT)
    return [statistics.median(times) for times in taken]


def main() -> None:
    ours, theirs = Ours(), Asyncio()
    rows: list[tuple[str, Operation, Operation]] = [
        ("bottom half, schedule and run", ours.schedule, theirs.schedule),
        ("one-shot bottom half", ours.oneshot, theirs.schedule),
        ("bottom half that schedules itself", ours.rearm, theirs.rearm),
        ("coroutine that does not suspend", ours.coroutine, theirs.coroutine),
        ("coroutine: make, suspend, wake, end", ours.coroutine_woken, theirs.coroutine_woken),
        ("await of an async def", ours.await_child, theirs.await_child),
        ("timer, arm and cancel", ours.timer_cancelled, theirs.timer_cancelled),
        ("timer, make, arm and run", ours.timer_due, theirs.timer_due),
        (f"ready descriptor, {EVENTS} at a time", ours.events, theirs.events),
    ]
    print(f"CPython {platform.python_version()}, ns per operation, medians of {ROUNDS} rounds of {COUNT}")
    print(f"{'':36} {'bottomhalf':>10} {'asyncio':>8} {'ratio':>6}")
    fds = [os.eventfd(1) for _ in range(EVENTS)]
    for name, mine, other in rows:
        if not all(word in name for word in sys.argv[1:]):
            continue
        for side in (ours, theirs):
            side.handlers(fds, mine == ours.events)
        first, second = medians_ns([mine, other])
        print(f"{name:36} {first:>10.0f} {second:>8.0f} {first / second:>6.2f}")
    for side in (ours, theirs):
        side.handlers(fds, False)
    for fd in fds:
        os.close(fd)
    theirs.loop.close()
    ours.context.close()


if __name__ == "__main__":
    main()
