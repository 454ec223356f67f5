# SPDX-License-Identifier: Apache-2.0
"""Clocks that stand still, and what is armed on them."""

from __future__ import annotations

import gc
import weakref

import pytest

from bottomhalf.aio import AioContext, AioError, clocks_of, sleep_ns
from bottomhalf.aio.clock import CLOCKS
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import Host
from bottomhalf.host.sim import Deadlock, SimHost
from tests.aio.helpers import drain

SECOND_NS = 1_000_000_000


def test_all_contexts_of_a_host_see_the_same(sim: SimHost) -> None:
    one, two = AioContext(sim), AioContext(sim, "two", is_main=False)
    assert one.clocks is two.clocks is clocks_of(sim)
    sim.advance(SECOND_NS)
    assert one.now_ns("virtual") == two.now_ns("virtual") == one.now_ns("virtual_rt") == SECOND_NS
    for context in (one, two):
        context.close()


def test_clocks_do_not_keep_a_host_alive() -> None:
    host = SimHost(1)
    alive = weakref.ref(host)
    context = AioContext(host)
    context.close()
    del context, host
    gc.collect()
    assert alive() is None


def test_it_runs_from_the_start(context: AioContext) -> None:
    """T44: in QEMU the virtual clock stands until a machine is started, and a tool's time-outs on it never come.
    Ours runs until somebody stops it."""
    assert context.clocks.virtual.running
    context.run(sleep_ns(1000, "virtual"))


def test_stop_and_start(sim: SimHost) -> None:
    context = AioContext(sim)
    ran: list[str] = []
    timers = {name: context.timer(lambda name=name: ran.append(name), name) for name in CLOCKS}
    for name, timer in timers.items():
        timer.arm_ns(context.now_ns(name) + SECOND_NS)
    context.clocks.stop()
    context.clocks.stop()
    sim.advance(5 * SECOND_NS)
    drain(context)
    assert ran == ["realtime", "host"] and context.now_ns("virtual") == 0
    assert context.timeout_ns() == -1, "a clock that stands has no deadline"
    context.clocks.start()
    context.clocks.start()
    assert context.timeout_ns() == SECOND_NS
    while len(ran) < 4:
        context.poll(True)
    assert ran == ["realtime", "host", "virtual", "virtual_rt"] and context.now_ns("virtual") == SECOND_NS
    context.close()


def test_a_standing_clock_is_named_in_a_hang(sim: SimHost) -> None:
    context = AioContext(sim)
    context.clocks.stop()
    with pytest.raises(Deadlock, match="waits for the virtual clock"):
        context.run(sleep_ns(1000, "virtual"))
    context.close()


def test_start_wakes_a_sleeping_loop(sim: SimHost) -> None:
    context = AioContext(sim)
    context.clocks.stop()
    ran: list[int] = []
    context.timer(lambda: ran.append(1), "virtual").arm_ns(SECOND_NS)
    sim.at(1000, context.clocks.start)
    while not ran:
        context.poll(True)
    assert context.now_ns("virtual") == SECOND_NS
    context.close()


def test_a_timer_stops_its_own_clock(sim: SimHost) -> None:
    """T42: in QEMU that waits for itself. Here the pass ends, and those due behind it wait for the start."""
    context = AioContext(sim)
    ran: list[str] = []

    def first() -> None:
        ran.append("first")
        context.clocks.stop()

    context.timer(first, "virtual").arm_ns(1)
    context.timer(lambda: ran.append("second"), "virtual").arm_ns(2)
    sim.advance(SECOND_NS)
    drain(context)
    assert ran == ["first"]
    context.clocks.start()
    drain(context)
    assert ran == ["first", "second"]
    context.close()


def test_moved_forward(sim: SimHost) -> None:
    context = AioContext(sim)
    ran: list[int] = []
    context.timer(lambda: ran.append(1), "virtual").arm_ns(SECOND_NS)
    virtual = context.clocks.virtual
    with pytest.raises(AioError, match="moved forward while it stands"):
        virtual.advance_to_ns(SECOND_NS)
    virtual.stop()
    virtual.advance_to_ns(SECOND_NS)
    with pytest.raises(AioError, match="shows 1000000000"):
        virtual.advance_to_ns(1)
    drain(context)
    assert ran == [], "it stands"
    virtual.start()
    drain(context)
    assert ran == [1]
    context.close()


def test_anticipate(context: AioContext) -> None:
    """timer_mod_anticipate: only ever earlier."""
    timer = context.timer(lambda: None)
    timer.anticipate_ns(1000)
    assert timer.armed and timer.deadline_ns == 1000
    timer.anticipate_ns(2000)
    assert timer.deadline_ns == 1000
    timer.anticipate_ns(-5)
    assert timer.deadline_ns == 0
    timer.cancel()
    timer.anticipate_ns(2000)
    assert timer.deadline_ns == 2000
    timer.cancel()


def test_real_clocks_go_on() -> None:
    context = AioContext(LinuxHost())
    before_ns = {name: context.now_ns(name) for name in CLOCKS}
    context.run(sleep_ns(1_000_000))
    for name in ("realtime", "virtual", "virtual_rt"):
        assert context.now_ns(name) - before_ns[name] >= 1_000_000
    context.close()


def test_many_clocks_wait_for_the_next(host: Host) -> None:
    """A poll sleeps until the first of the timers of all clocks."""
    context = AioContext(host)
    order: list[str] = []
    for place, name in enumerate(reversed(CLOCKS)):
        timer = context.timer(lambda name=name: order.append(name), name)
        timer.arm_ns(context.now_ns(name) + (place + 1) * 200_000)
    while len(order) < 4:
        context.poll(True)
    assert set(order) == set(CLOCKS)
    context.close()
