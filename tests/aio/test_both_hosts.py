# SPDX-License-Identifier: Apache-2.0
"""Behaviours whose main test is about one host, on the other as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bottomhalf.aio import AioContext
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import Notifier, drain, until
from tests.aio.test_outer_loop import OuterLoop

MS = 1_000_000


def let_time_pass(host: Host, until_ns: int) -> None:
    """Without a poll."""
    if isinstance(host, SimHost):
        host.advance(max(until_ns - host.world.now_ns, 0))
    while host.monotonic_ns() < until_ns:
        pass


def timer_twice(context: AioContext, host: Host, poll: Callable[[bool], bool]) -> None:
    """It fires when somebody polls, not before, and arms itself once more."""
    fired: list[int] = []

    def fire() -> None:
        fired.append(context.now_ns())
        if len(fired) < 2:
            timer.arm_ns(context.now_ns() + 3 * MS)

    timer = context.timer(fire)
    first_ns = context.now_ns() + 3 * MS
    timer.arm_ns(first_ns)
    drain(context)
    let_time_pass(host, first_ns)
    assert fired == []
    while not fired:
        poll(False)
    assert len(fired) == 1 and fired[0] >= first_ns
    while len(fired) < 2:
        poll(True)
    assert fired[1] >= fired[0] + 3 * MS and not timer.armed


def test_timer_schedule(context: AioContext, host: Host) -> None:
    """/aio/timer/schedule"""
    notifier = Notifier(context, host)
    timer_twice(context, host, context.poll)
    notifier.close()


def test_timer_schedule_in_an_outer_loop(context: AioContext, host: Host) -> None:
    """/aio-gsource/timer/schedule"""
    outer = OuterLoop(context, host)
    timer_twice(context, host, outer.iterate)
    outer.close()


def test_nested_aio_poll() -> None:
    """/nested-aio-poll, on the real host."""
    host = LinuxHost()
    context = AioContext(host)
    context.set_poll_params(100 * MS, 2, 2)
    polled, inner = host.event(), host.event()
    seen: list[str] = []
    nested = False

    def poll_ready() -> None:
        nonlocal nested
        assert not nested
        nested = True
        inner.set()
        while "inner" not in seen:
            context.poll(True)
        nested = False
        seen.append("poll_ready")

    context.set_fd_handler(
        polled.fileno(), lambda: (seen.append("read"), polled.clear()), poll=lambda: True, poll_ready=poll_ready
    )
    context.set_fd_handler(
        inner.fileno(), lambda: (seen.append("inner"), inner.clear()), poll=lambda: False, poll_ready=pytest.fail
    )
    polled.set()
    assert context.poll(False) is True and seen == ["read"]
    polled.set()
    until(context, lambda: context.statistics().poll_ns)  # a wait for it was worth while
    for _ in range(3):
        seen.clear()
        until(context, lambda: "poll_ready" in seen)
        assert seen.index("inner") < seen.index("poll_ready")
    for event in (polled, inner):
        context.set_fd_handler(event.fileno())
        event.close()
    context.close()


@pytest.mark.parametrize("how", ["enter", "schedule"])
def test_from_a_worker_thread(host: Host, how: str) -> None:
    """/aio/coroutine/worker-thread-co-enter"""
    context = AioContext(host)
    ran_in: list[int] = []

    async def body() -> None:
        ran_in.append(host.thread_id())

    thread = host.start_thread(lambda: getattr(context, how)(body()), "worker")
    thread.join()
    assert ran_in == []
    assert context.poll(True) is True and ran_in == [host.thread_id()]
    context.close()
