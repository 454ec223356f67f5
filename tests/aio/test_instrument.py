# SPDX-License-Identifier: Apache-2.0
"""Observers of a context, its figures, and the guard that tells of re-entry."""

from __future__ import annotations

import dataclasses

import pytest

from bottomhalf.aio import AioContext, Instrument, IOThread, ReentrancyGuard, give_way, sleep_ns
from bottomhalf.aio.handlers import Handlers
from bottomhalf.aio.timer import TimerList
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import Host
from tests.aio.helpers import drain


class Log(Instrument):
    """Writes down everything."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def before_poll(self, context: AioContext, blocking: bool) -> None:
        self.lines.append("poll" if blocking else "look")

    def after_poll(self, context: AioContext, progress: bool) -> None:
        self.lines.append("progress" if progress else "no progress")

    def before_wait(self, context: AioContext, timeout_ns: int) -> None:
        self.lines.append("wait")

    def after_wait(self, context: AioContext, events: list[tuple[int, int]]) -> None:
        self.lines.append(f"{len(events)} ready")

    def before_callback(self, context: AioContext, kind: str, name: str) -> None:
        self.lines.append(f"> {kind} {name.rpartition('.')[2]}")

    def after_callback(self, context: AioContext, kind: str, name: str) -> None:
        self.lines.append(f"< {kind} {name.rpartition('.')[2]}")


def test_everything_is_told(host: Host) -> None:
    context = AioContext(host)
    log = Log()
    event = host.event()
    event.set()
    fd = event.fileno()
    context.set_fd_handler(fd, event.clear)
    context.timer(lambda: None, name="tick").arm_ns(0)
    context.add_instrument(log)
    context.timer(lambda: None, "host", name="tock").arm_ns(0)
    context.bottom_half(lambda: None, name="half").schedule()

    async def body() -> None:
        await give_way()

    context.enter(body())
    drain(context)
    for line in (
        *("look", "wait", "1 ready", "progress", "no progress"),
        *("> coroutine body", "< coroutine body"),
        *("> bottom half half", "< bottom half half"),
        *(f"> handler of descriptor {fd}", f"< handler of descriptor {fd}"),
        *("> timer tick", "< timer tick", "> timer tock", "< timer tock"),
    ):
        assert line in log.lines, (line, log.lines)
    assert log.lines.count("> coroutine body") == 2, "it was entered, and went on"
    for line in ("> bottom half half", "> timer tick", f"> handler of descriptor {fd}"):
        assert log.lines.count(line) == 1
    context.remove_instrument(log)
    context.set_fd_handler(fd)
    context.close()


def test_it_costs_nothing_unused(context: AioContext) -> None:
    """When the last observer goes, the context is what it was."""
    first, second = Log(), Log()
    wait = context._wait
    timer = context.timer(lambda: None)
    for log in (first, second):
        context.add_instrument(log)
    assert type(context) is not AioContext
    context.remove_instrument(first)
    context.remove_instrument(first)
    half = context.bottom_half(lambda: None)
    half.schedule()
    timer.arm_ns(0)
    context.poll(False)
    assert first.lines == [] and "> timer <lambda>" in second.lines
    half.schedule()
    context.remove_instrument(second)
    count = len(second.lines)
    assert type(context) is AioContext and type(context._handlers) is Handlers and context._wait == wait
    assert {type(timers) for timers in context._timers} == {TimerList}
    drain(context)
    assert len(second.lines) == count


def test_exceptions_are_seen_and_pass(context: AioContext) -> None:
    log = Log()
    context.add_instrument(log)

    def fail() -> None:
        raise ValueError("mine")

    async def body() -> None:
        await sleep_ns(1)
        raise KeyError("its")

    context.bottom_half(fail, name="fails").schedule()
    with pytest.raises(ValueError, match="mine"):
        context.poll(False)
    assert log.lines[-1] == "< bottom half fails"
    with pytest.raises(KeyError, match="its"):
        context.run(body())
    context.remove_instrument(log)


def test_busy_polling_is_told(sim: object) -> None:
    context = AioContext(sim)  # type: ignore[arg-type]
    log = Log()
    context.add_instrument(log)
    context.set_poll_params(10_000)
    context._poll_ns = 10_000
    served: list[int] = []
    event = context.host.event()
    context.set_fd_handler(event.fileno(), poll=lambda: not served, poll_ready=lambda: served.append(1))
    while not served:
        context.poll(True)
    assert f"> handler of descriptor {event.fileno()}" in log.lines
    context.set_fd_handler(event.fileno())
    context.close()


def test_statistics(context: AioContext) -> None:
    half, idle = context.bottom_half(lambda: None), context.bottom_half(lambda: None)
    half.schedule()
    idle.schedule_idle()
    context.timer(lambda: None).arm_ns(10**18)
    context.timer(lambda: None, "virtual").arm_ns(10**18)

    async def body() -> None:
        await give_way()

    kept = context.enter(body())
    before = context.statistics()
    assert (before.bottom_halves_queued, before.idle_bottom_halves, before.coroutines_queued) == (1, 1, 1)
    assert before.timers == {"realtime": 1, "virtual": 1} and before.name == "main" and not before.sleeping
    assert before.engine is None and before.thread_pool is None
    polls = before.polls
    context.poll(False)
    after = context.statistics()
    assert after.polls == polls + 1 and after.bottom_halves_run == before.bottom_halves_run + 1
    assert (after.bottom_halves_queued, after.idle_bottom_halves, after.coroutines_queued) == (0, 0, 0)
    assert context.engine.statistics().in_flight == 0
    assert context.statistics().engine == context.engine.statistics()
    assert kept.done
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.polls = 0  # type: ignore[misc]


def test_statistics_from_another_thread() -> None:
    thread = IOThread("io0", LinuxHost())
    for _ in range(100):
        thread.context.schedule_oneshot(lambda: None)
        assert thread.context.statistics().poller == "epoll"
    thread.stop()


def test_reentrancy_guard(context: AioContext) -> None:
    """T6: one that schedules itself and polls runs inside itself; the guard counts, tells, and is right afterwards."""
    told: list[int] = []
    guard = ReentrancyGuard(lambda: told.append(guard.reentries))
    depth = 0

    def run() -> None:
        nonlocal depth
        assert guard.engaged
        if depth < 3:
            depth += 1
            half.schedule()
            context.poll(False)
            assert guard.engaged

    half = context.bottom_half(run, guard=guard)
    assert "run" in half.name
    half.schedule()
    context.poll(False)
    assert told == [1, 2, 3] and guard.reentries == 3 and not guard.engaged


def test_guard_of_several_halves(context: AioContext) -> None:
    """All bottom halves of a device share one; an exception does not leave it engaged; a callback may delete itself."""
    guard = ReentrancyGuard()

    def fail() -> None:
        first.delete()
        raise ValueError("mine")

    first, second = context.bottom_half(fail, guard=guard), context.bottom_half(lambda: None, guard=guard)
    first.schedule()
    with pytest.raises(ValueError, match="mine"):
        context.poll(False)
    assert not guard.engaged
    second.schedule()
    assert context.poll(False) is True and guard.reentries == 0
