# SPDX-License-Identifier: Apache-2.0
"""A context inside a loop that is not ours, as QEMU's contexts are GLib sources.

The loop here does what AioContext.fileno() asks of one: it embeds the context while it sleeps on its descriptor, asks
timeout_ns() after that, and releases it while it polls. ``iterate(may_block)`` is one turn of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bottomhalf.aio import AioContext
from bottomhalf.host.protocol import IN, Host
from bottomhalf.host.sim import SimHost
from tests.aio.helpers import Notifier
from tests.aio.test_bottom_half import Counted

SECOND_NS = 1_000_000_000


class OuterLoop:
    """Sleeps for a context, and polls it when it has something to do."""

    def __init__(self, context: AioContext, host: Host) -> None:
        self.context = context
        self._poller = host.poller()
        self._poller.register(context.fileno(), IN)
        context.embed()

    def iterate(self, may_block: bool) -> bool:
        timeout_ns = self.context.timeout_ns()
        ready = self._poller.wait(timeout_ns if may_block else 0)
        if not ready and timeout_ns != 0 and self.context.timeout_ns() != 0:
            return False
        return self.check()

    def check(self) -> bool:
        self.context.release()
        try:
            return self.context.poll(False)
        finally:
            self.context.embed()

    def drain(self) -> None:
        """Some waits of the simulated host leave ready things for later."""
        idle = 0
        while idle < 3:
            idle = 0 if self.iterate(False) else idle + 1

    def close(self) -> None:
        self.context.release()
        self._poller.close()


@pytest.fixture
def outer(context: AioContext, host: Host) -> Iterator[OuterLoop]:
    loop = OuterLoop(context, host)
    loop.drain()
    yield loop
    loop.close()


def test_flush(outer: OuterLoop) -> None:
    """/aio-gsource/flush: a notification alone keeps no loop busy."""
    assert outer.iterate(False) is False
    outer.context.notify()
    outer.drain()
    assert outer.iterate(False) is False


def test_schedule(outer: OuterLoop) -> None:
    """/aio-gsource/bh/schedule, /aio-gsource/bh/flush"""
    counted = Counted(outer.context)
    counted.schedule()
    assert counted.count == 0
    assert outer.iterate(True) is True and counted.count == 1
    outer.drain()
    assert outer.iterate(False) is False and counted.count == 1


def test_schedule10(outer: OuterLoop) -> None:
    """/aio-gsource/bh/schedule10"""
    counted = Counted(outer.context, 10)
    counted.schedule()
    assert outer.iterate(False) is True and counted.count == 1
    assert outer.iterate(True) is True and counted.count == 2
    outer.drain()
    assert counted.count == 10 and outer.iterate(False) is False


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_taken_back(outer: OuterLoop, how: str) -> None:
    """/aio-gsource/bh/cancel, /aio-gsource/bh/delete"""
    counted = Counted(outer.context)
    counted.schedule()
    getattr(counted.half, how)()
    outer.drain()
    assert counted.count == 0


def test_callback_delete_one(outer: OuterLoop) -> None:
    """/aio-gsource/bh/callback-delete/one: here the deletion is no event; in QEMU it makes one more iteration true."""
    counted = Counted(outer.context, 1, delete=True)
    counted.schedule()
    assert outer.iterate(True) is True
    assert counted.count == 1 and counted.half is None
    outer.drain()
    assert outer.iterate(False) is False and counted.count == 1


def test_callback_delete_many(outer: OuterLoop) -> None:
    """/aio-gsource/bh/callback-delete/many"""
    all_counted = [Counted(outer.context, most, delete=True) for most in (1, 3, 2, 4)]
    for counted in all_counted:
        counted.schedule()
    assert outer.iterate(True) is True
    assert [counted.count for counted in all_counted] == [1] * 4 and all_counted[0].half is None
    while any(counted.half for counted in all_counted):
        assert outer.iterate(True) is True
    assert [counted.count for counted in all_counted] == [1, 3, 2, 4]
    outer.drain()
    assert outer.iterate(False) is False


def test_event_add_remove(outer: OuterLoop, host: Host) -> None:
    """/aio-gsource/event/add-remove"""
    notifier = Notifier(outer.context, host)
    outer.drain()
    assert notifier.count == 0
    notifier.close()
    outer.drain()
    assert notifier.count == 0


def test_event_wait(outer: OuterLoop, host: Host) -> None:
    """/aio-gsource/event/wait"""
    notifier = Notifier(outer.context, host, active=1)
    outer.drain()
    assert notifier.count == 0 and notifier.active == 1
    notifier.event.set()
    outer.drain()
    assert notifier.count == 1 and notifier.active == 0
    notifier.close()
    outer.drain()
    assert notifier.count == 1


def test_event_wait_no_flush(outer: OuterLoop, host: Host) -> None:
    """/aio-gsource/event/wait/no-flush-cb: what another waits for is not waited for with it."""
    idle = Notifier(outer.context, host)
    idle.event.set()
    outer.drain()
    idle.count = 0
    waited_for = Notifier(outer.context, host, active=1)
    for expected in (1, 2):
        idle.event.set()
        outer.drain()
        assert idle.count == expected and waited_for.count == 0
        assert outer.iterate(False) is False
    waited_for.event.set()
    outer.drain()
    assert idle.count == 2 and waited_for.count == 1 and waited_for.active == 0
    idle.close()
    waited_for.close()
    outer.drain()
    assert outer.iterate(False) is False


def test_event_flush(outer: OuterLoop, host: Host) -> None:
    """/aio-gsource/event/flush"""
    notifier = Notifier(outer.context, host, active=10, auto_set=True)
    notifier.event.set()
    while notifier.count < 1:
        outer.iterate(False)
    assert notifier.active == 9
    while notifier.active:
        outer.iterate(True)
    assert notifier.count == 10
    outer.drain()
    assert outer.iterate(False) is False
    notifier.close()


def test_timer_schedule(sim: SimHost) -> None:
    """/aio-gsource/timer/schedule: nothing runs while nobody iterates; it arms itself once more."""
    context = AioContext(sim)
    outer = OuterLoop(context, sim)
    ran: list[int] = []

    def run() -> None:
        ran.append(context.now_ns())
        if len(ran) < 2:
            timer.arm_ns(context.now_ns() + SECOND_NS * 3 // 4)

    timer = context.timer(run)
    timer.arm_ns(context.now_ns() + SECOND_NS * 3 // 4)
    first_ns = context.now_ns() + SECOND_NS * 3 // 4
    outer.drain()
    sim.advance(SECOND_NS)
    assert ran == []
    assert outer.iterate(True) is True and len(ran) == 1
    while len(ran) < 2:
        outer.iterate(True)
    assert context.now_ns() >= first_ns + SECOND_NS * 3 // 4
    outer.drain()
    assert len(ran) == 2
    outer.close()
    context.close()


def test_prepared_without_a_check(outer: OuterLoop) -> None:
    """T14: a loop may ask how long it may sleep and then not sleep nor poll; nothing is lost by that."""
    counted = Counted(outer.context)
    counted.schedule()
    assert outer.context.timeout_ns() == 0
    assert outer.context.timeout_ns() == 0
    outer.close()  # the context is polled by itself now
    assert outer.context.poll(True) is True and counted.count == 1
    outer.context.embed()
    outer._poller = outer.context.host.poller()
    counted.schedule()  # writes the event, for somebody seems to sleep
    outer.context.release()
    assert outer.context.poll(True) is True and counted.count == 2
    outer.context.poll(False)
    assert outer.context.timeout_ns() == -1
    outer.context.embed()


@pytest.mark.parametrize("blocking", [False, True])
def test_polled_by_hand_while_embedded(outer: OuterLoop, blocking: bool) -> None:
    """A callback of the outer loop polls the context itself, and takes the wake-up that was meant for the outer loop.
    That one sleeps again afterwards, and later schedulers have to wake it."""
    context = outer.context
    first, second = Counted(context), Counted(context)
    first.schedule()
    assert not context.notify_me, "the announcement is taken; the event is written"
    while not first.count:
        context.poll(blocking)
    context.poll(False)
    context.poll(False)
    second.schedule()
    assert outer._poller.wait(0) or outer._poller.wait(0), "the outer loop is woken"
    outer.drain()
    assert second.count == 1
