# SPDX-License-Identifier: Apache-2.0
"""What the event core costs per operation, beside asyncio and uvloop, in one process.

    PYTHONPATH=src python3 -m benchmarks.event_core [--rounds 41] [--only half] [--json]

Each operation is done COUNT times per round. In a round all contenders take their turn, each round another one first,
so that a noisy machine disturbs them alike.

Look at the ratio: it is what two machines, or two hours of one machine, have in common. Peers get the form
that their own documentation recommends. The garbage collector is as it is by default.

``make bench ONLY=aio`` runs this under every interpreter that it finds and puts the rows into its table.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

from bottomhalf.aio import AioContext, current, give_way, suspend, wait_while

COUNT: Final = 1000
FROM_THREAD: Final = 10_000  # so many that the one wake-up, tens of microseconds for everybody, does not count
DELAYS_NS: Final = tuple(5_000_000 + n * 7919 % COUNT * 1_000 for n in range(COUNT))  # no two alike, in no order
EVENTS: Final = 32
WAIT_READY: Final = "wait-while-ready"  # a wait for what is so already
FLAT: Final = (1, 10, 100, 1_000, 10_000, 100_000)

def _nothing() -> None:
    pass


async def _co_nothing() -> None:
    pass


async def _co_gives_way() -> None:
    await give_way()


def _until_due(begin_ns: int) -> None:
    """Wait until all that was armed since then is due."""
    while time.monotonic_ns() < begin_ns + max(DELAYS_NS) + 100_000:
        pass


async def _parent() -> None:
    for _ in range(COUNT):
        await _co_nothing()


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Ours:
    """The operations on an AioContext."""

    name = "bottomhalf"

    def __init__(self) -> None:
        self.context = context = AioContext()
        self.halves = [context.bottom_half(_nothing) for _ in range(COUNT)]
        self.timers = [context.timer(_nothing) for _ in range(COUNT)]
        self.waiters: list[Any] = []
        self.fds: list[int] = []

    def half(self) -> None:
        for half in self.halves:
            half.schedule()
        self.context.poll(False)

    def oneshot(self) -> None:
        schedule = self.context.schedule_oneshot
        for _ in range(COUNT):
            schedule(_nothing)
        self.context.poll(False)

    def from_thread(self, count: int) -> float:
        done = False

        def end() -> None:
            nonlocal done
            done = True

        last = self.context.bottom_half(end)
        many = [self.context.bottom_half(_nothing) for _ in range(count)]
        begun = 0.0
        go = threading.Event()

        def work() -> None:
            nonlocal begun
            go.wait()
            begun = time.perf_counter()
            for half in many:
                half.schedule()
            last.schedule()

        thread = threading.Thread(target=work)
        thread.start()
        self.context.schedule_oneshot(go.set)
        while not done:
            self.context.poll(True)
        ended = time.perf_counter()
        thread.join()
        return (ended - begun) * COUNT / count

    def timer_again(self) -> float:
        now_ns = self.context.now_ns()

        def arm() -> None:
            for timer, delay_ns in zip(self.timers, DELAYS_NS, strict=True):
                timer.arm_ns(now_ns + delay_ns)

        armed = _timed(arm)
        _until_due(now_ns)
        return armed + _timed(lambda: self.context.poll(False))

    def timer_made(self) -> float:
        now_ns = self.context.now_ns()

        def arm() -> None:
            make = self.context.timer
            for delay_ns in DELAYS_NS:
                make(_nothing).arm_ns(now_ns + delay_ns)

        armed = _timed(arm)
        _until_due(now_ns)
        return armed + _timed(lambda: self.context.poll(False))

    def timer_cancelled(self) -> None:
        timer, deadline_ns = self.timers[0], self.context.now_ns() + 10**12
        for _ in range(COUNT):
            timer.arm_ns(deadline_ns)
            timer.cancel()

    def gives_way(self) -> None:
        enter = self.context.enter
        for _ in range(COUNT):
            enter(_co_gives_way())
        self.context.poll(False)

    def give_way_together(self) -> None:
        self.context.enter_all([_co_gives_way() for _ in range(COUNT)])
        self.context.poll(False)

    async def _waits(self) -> None:
        self.waiters.append(current())
        await suspend("a wake-up")

    def _wakes(self) -> None:
        waiters, self.waiters = self.waiters, []
        wake = self.context.wake
        for waiter in waiters:
            wake(waiter)

    def woken(self) -> None:
        enter = self.context.enter
        for _ in range(COUNT):
            enter(self._waits())
        self.context.schedule_oneshot(self._wakes)
        self.context.poll(False)

    def ends_at_once(self) -> None:
        enter = self.context.enter
        for _ in range(COUNT):
            enter(_co_nothing())

    def awaits(self) -> None:
        self.context.enter(_parent())

    def watch(self, fds: list[int]) -> None:
        for fd in self.fds:
            self.context.set_fd_handler(fd)
        for fd in fds:
            self.context.set_fd_handler(fd, _nothing)
        self.fds = fds

    def ready(self) -> None:
        for _ in range(COUNT // EVENTS):
            self.context.poll(True)

    def wait_ready(self) -> None:
        for _ in range(COUNT):
            wait_while(self.context, _false, what="nothing")

    def pending(self, count: int) -> float:
        """Seconds for ``count`` bottom halves that are pending at the same time."""
        halves = [self.context.bottom_half(_nothing) for _ in range(count)]
        begin = time.perf_counter()
        for half in halves:
            half.schedule()
        self.context.poll(False)
        return time.perf_counter() - begin

    def armed(self, count: int) -> float:
        """The same for timers, armed in an order that is no order."""
        timers = [self.context.timer(_nothing) for _ in range(count)]
        deadlines = [(n * 7919) % count for n in range(count)]
        begin = time.perf_counter()
        for timer, deadline in zip(timers, deadlines, strict=True):
            timer.arm_ns(deadline)
        self.context.poll(False)
        return time.perf_counter() - begin

    def close(self) -> None:
        self.watch([])
        self.context.close()


def _false() -> bool:
    return False


class Loop:
    """The same on an asyncio loop, the standard library's or uvloop's."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.loop = loop
        self.futures: list[asyncio.Future[None]] = []
        self.turns = 0
        self.fds: list[int] = []

    def turn(self) -> None:
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def half(self) -> None:
        call_soon = self.loop.call_soon
        for _ in range(COUNT):
            call_soon(_nothing)
        self.turn()

    oneshot = half

    def from_thread(self, count: int) -> float:
        begun = 0.0
        go = threading.Event()

        def work() -> None:
            nonlocal begun
            go.wait()
            begun = time.perf_counter()
            call = self.loop.call_soon_threadsafe
            for _ in range(count):
                call(_nothing)
            call(self.loop.stop)

        thread = threading.Thread(target=work)
        thread.start()
        self.loop.call_soon(go.set)
        self.loop.run_forever()
        ended = time.perf_counter()
        thread.join()
        return (ended - begun) * COUNT / count

    def timer_again(self) -> float:
        """There is no timer to be armed again: a new one each time."""
        now_ns = time.monotonic_ns()
        delays = [delay_ns / 1e9 for delay_ns in DELAYS_NS]

        def arm() -> None:
            now = self.loop.time()
            call_at = self.loop.call_at
            for delay in delays:
                call_at(now + delay, _nothing)

        armed = _timed(arm)
        _until_due(now_ns)
        return armed + _timed(self.turn)

    timer_made = timer_again

    def timer_cancelled(self) -> None:
        call_later = self.loop.call_later
        for _ in range(COUNT):
            call_later(1000, _nothing).cancel()
        self.turn()

    def _tasks(self, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
        create_task = self.loop.create_task
        tasks = [create_task(body()) for _ in range(COUNT)]
        self.turn()
        del tasks

    def gives_way(self) -> None:
        self._tasks(_asyncio_gives_way)
        self.turn()

    give_way_together = gives_way

    async def _waits(self) -> None:
        future = self.loop.create_future()
        self.futures.append(future)
        await future

    def woken(self) -> None:
        self._tasks(self._waits)
        futures, self.futures = self.futures, []
        for future in futures:
            future.set_result(None)
        self.turn()

    def ends_at_once(self) -> None:
        self._tasks(_co_nothing)

    def awaits(self) -> None:
        self.loop.run_until_complete(_parent())

    def watch(self, fds: list[int]) -> None:
        for fd in self.fds:
            self.loop.remove_reader(fd)
        for fd in fds:
            self.loop.add_reader(fd, _nothing)
        self.fds = fds

    def ready(self) -> None:
        self.turns = COUNT // EVENTS
        self.loop.call_soon(self._next_turn)
        self.loop.run_forever()

    def _next_turn(self) -> None:
        self.turns -= 1
        if self.turns:
            self.loop.call_soon(self._next_turn)
        else:
            self.loop.stop()

    def close(self) -> None:
        self.watch([])
        self.loop.close()


async def _asyncio_gives_way() -> None:
    await asyncio.sleep(0)


@dataclass(frozen=True)
class Row:
    """One operation, and how many times cheaper than each peer it is meant to be."""

    name: str
    method: str
    about: str
    goals: dict[str, float] = field(default_factory=dict)
    argument: int | None = None  # of the method


ROWS: Final = (
    Row("half", "half", "schedule and run a bottom half; call_soon", {"asyncio": 4, "uvloop": 2}),
    Row("oneshot", "oneshot", "schedule and run a one-shot bottom half; call_soon"),
    Row(
        "from-thread",
        "from_thread",
        f"from another thread, {FROM_THREAD} in a row, the loop asleep",
        {"asyncio": 10, "uvloop": 2},
        FROM_THREAD,
    ),
    Row("from-thread-1000", "from_thread", "the same, 1000 in a row", argument=1_000),
    Row("from-thread-100", "from_thread", "the same, 100 in a row: mostly the wake-up", argument=100),
    Row("timer-again", "timer_again", "arm a timer that is there, and run it", {"asyncio": 2}),
    Row("timer-made", "timer_made", "make, arm and run a timer; for what is waited for once, a coroutine sleeps"),
    Row("timer-cancelled", "timer_cancelled", "arm and cancel"),
    Row("coroutine-gives-way", "gives_way", "enter, give way once, end; sleep(0)", {"asyncio": 6}),
    Row("coroutines-together", "give_way_together", "the same, entered as one list", {"asyncio": 6}),
    Row("coroutine-woken", "woken", "enter, wait, be woken by another, end; a future"),
    Row("coroutine-at-once", "ends_at_once", "enter one that does not wait"),
    Row("await", "awaits", "await an async def"),
    Row("ready-32", "ready", "a ready descriptor, 32 at a time"),
)


NAMES: Final = (*(row.name for row in ROWS), "pending-flat", "timers-log", WAIT_READY)


def contenders() -> dict[str, Any]:
    """Ours and the peers that this interpreter has."""
    found: dict[str, Any] = {"bottomhalf": Ours(), "asyncio": Loop("asyncio", asyncio.new_event_loop())}
    try:
        found["uvloop"] = Loop("uvloop", importlib.import_module("uvloop").new_event_loop())
    except ImportError:
        pass
    return found


def measure(row: Row, all_contenders: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Nanoseconds per operation, by contender, a figure per round."""
    fds = [os.eventfd(1) for _ in range(EVENTS)] if row.method == "ready" else []
    for contender in all_contenders.values():
        contender.watch(fds)
    taken: dict[str, list[float]] = {name: [] for name in all_contenders}
    order = list(all_contenders.items())
    arguments = () if row.argument is None else (row.argument,)
    for _ in range(rounds):
        for name, contender in order:
            begin = time.perf_counter()
            measured = getattr(contender, row.method)(*arguments)
            seconds = time.perf_counter() - begin if measured is None else measured
            taken[name].append(seconds / COUNT * 1e9)
        order.append(order.pop(0))
    for contender in all_contenders.values():
        contender.watch([])
    for fd in fds:
        os.close(fd)
    return taken


def by_pending(ours: Ours, which: str, counts: tuple[int, ...]) -> dict[int, float]:
    """Nanoseconds per event when so many are pending at the same time: the least of some tries."""
    method = getattr(ours, which)
    return {count: min(method(count) / count * 1e9 for _ in range(9 if count < 10_000 else 5)) for count in counts}


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.event_core")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help=" ".join(NAMES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    wanted = options.only or NAMES
    all_contenders = contenders()
    rows = [row for row in ROWS if row.name in wanted]
    taken = {row.name: measure(row, all_contenders, options.rounds) for row in rows}
    ours = all_contenders["bottomhalf"]
    flat = by_pending(ours, "pending", FLAT) if "pending-flat" in wanted else {}
    timers = by_pending(ours, "armed", FLAT[2:]) if "timers-log" in wanted else {}
    waits = [_timed(ours.wait_ready) / COUNT * 1e9 for _ in range(options.rounds if WAIT_READY in wanted else 0)]
    for contender in all_contenders.values():
        contender.close()
    python = platform.python_version()
    if options.json:
        print(json.dumps({"python": python, "rows": taken, "pending": flat, "timers": timers, "waits": waits}))
        return
    print(f"CPython {python}, ns per operation, medians of {options.rounds} rounds of {COUNT}")
    for row in rows:
        medians = {name: statistics.median(values) for name, values in taken[row.name].items()}
        print(f"{row.name:20} " + "  ".join(f"{name} {value:6.0f}" for name, value in medians.items()))
    for name, figures in (("pending halves", flat), ("armed timers", timers)):
        if figures:
            print(f"{name:20} " + "  ".join(f"{count}: {value:.0f}" for count, value in figures.items()))
    if waits:
        print(f"{WAIT_READY:20} {statistics.median(waits):.0f}")


if __name__ == "__main__":
    main()
