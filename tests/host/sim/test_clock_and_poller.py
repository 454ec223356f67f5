# SPDX-License-Identifier: Apache-2.0
"""Virtual time, readiness and the recognition of waits that nothing can end."""

from __future__ import annotations

import errno
import signal
from typing import Any

import pytest

from bottomhalf.host.protocol import IN, OUT
from bottomhalf.host.request import READ, Request
from bottomhalf.host.sim import Deadlock, Odds, SimHost


def test_time_stands_still_unless_the_program_waits() -> None:
    host = SimHost()
    before_ns = host.monotonic_ns()
    assert host.monotonic_ns() == before_ns
    assert host.poller().wait(5_000) == []
    assert host.monotonic_ns() == before_ns + 5_000


def test_ticking_clock() -> None:
    host = SimHost()
    host.tick_ns = 10
    before_ns = host.monotonic_ns()
    assert host.monotonic_ns() == before_ns + 10


def test_wall_clock_follows_and_jumps() -> None:
    host = SimHost()
    before_ns = host.realtime_ns()
    host.advance(7)
    assert host.realtime_ns() == before_ns + 7
    monotonic_ns = host.monotonic_ns()
    host.jump_realtime(-1_000_000)
    assert host.realtime_ns() == before_ns + 7 - 1_000_000
    assert host.monotonic_ns() == monotonic_ns


def test_wait_moves_time_to_the_next_event() -> None:
    host = SimHost()
    event, poller = host.event(), host.poller()
    poller.register(event.fileno(), IN)
    start_ns = host.monotonic_ns()
    host.at(3_000, event.set)
    assert poller.wait(1_000) == []
    assert host.monotonic_ns() == start_ns + 1_000
    assert poller.wait(1_000_000) == [(event.fileno(), IN)]
    assert host.monotonic_ns() == start_ns + 3_000
    assert poller.wait(-1) == [(event.fileno(), IN)]  # level-triggered
    assert event.clear() is True
    assert event.clear() is False
    assert poller.wait(0) == []


def test_cancelled_event_does_not_happen() -> None:
    host = SimHost()
    happened: list[int] = []
    host.at(10, lambda: happened.append(1)).cancel()
    host.at(10, lambda: happened.append(2))
    host.at(10, lambda: happened.append(3))
    host.advance(20)
    assert happened == [2, 3]


def test_action_may_wait_and_schedule() -> None:
    host = SimHost()
    event, poller = host.event(), host.poller()
    poller.register(event.fileno(), IN)
    seen: list[Any] = []
    host.at(10, lambda: seen.append(host.poller().wait(100)))
    host.at(50, event.set)
    assert poller.wait(-1) == [(event.fileno(), IN)]
    assert seen == [[]]


def test_error_in_an_action_loses_no_other() -> None:
    host = SimHost()
    happened: list[int] = []

    def fail() -> None:
        host.at(0, lambda: happened.append(1))
        raise KeyError("deliberate")

    host.at(10, fail)
    host.at(10, lambda: happened.append(2))
    with pytest.raises(KeyError):
        host.advance(10)
    host.advance(0)
    assert sorted(happened) == [1, 2]


def test_order_of_ready_descriptors_depends_on_the_seed() -> None:
    def order(seed: int) -> list[int]:
        host = SimHost(seed)
        poller = host.poller()
        for _ in range(8):
            event = host.event()
            event.set()
            poller.register(event.fileno(), IN)
        return [fd for _ in range(5) for fd, _ in poller.wait(-1)]

    orders = {tuple(order(seed)) for seed in range(10)}
    assert len(orders) == 10
    assert order(3) == order(3)


def test_part_of_what_is_ready_but_never_nothing(seed: int) -> None:
    host = SimHost(seed, odds=Odds(part_of_ready=0.5))
    poller, fds = host.poller(), set()
    for _ in range(5):
        event = host.event()
        event.set()
        poller.register(event.fileno(), IN)
        fds.add(event.fileno())
    counts = set()
    seen = set()
    for _ in range(50):
        ready = poller.wait(-1)
        assert ready
        counts.add(len(ready))
        seen |= {fd for fd, _ in ready}
    assert min(counts) < 5 and max(counts) == 5 and seen == fds


def test_early_empty_waits_where_asked_for() -> None:
    host = SimHost(odds=Odds(empty_wait=1.0))
    before_ns = host.monotonic_ns()
    assert host.poller().wait(1_000) == []
    assert host.monotonic_ns() == before_ns


def test_deadlock_is_recognised_and_explained() -> None:
    host = SimHost(seed=11)
    event, poller = host.event(), host.poller()
    poller.register(event.fileno(), IN)
    host.explain = lambda: "the drain of node0 waits for request 7"
    with pytest.raises(Deadlock) as caught:
        poller.wait(-1)
    text = str(caught.value)
    assert "nothing can end this wait" in text
    assert f"<SimEvent fd {event.fileno()}> for IN" in text
    assert "the drain of node0 waits for request 7" in text
    assert "seed 11" in text


def test_deadlock_names_held_and_forgotten_requests() -> None:
    host = SimHost()
    host.add_file("a.raw", 4096, cached="never")
    fault = host.fault(path="a.raw", op=READ, hold=True)
    engine, file, poller = host.engine(), host.open_file("a.raw"), host.poller()
    poller.register(engine.fileno(), IN)
    engine.prepare(file, Request(READ, 0, 512, bytearray(512)))
    with pytest.raises(Deadlock, match="1 prepared and enter\\(\\) not called"):
        poller.wait(-1)
    engine.enter()
    with pytest.raises(Deadlock, match=r"1 requests held by <Fault read of a\.raw, 1 hits>"):
        poller.wait(-1)
    fault.release()
    assert poller.wait(-1) == [(engine.fileno(), IN)]


def test_livelock_is_recognised() -> None:
    host = SimHost()
    host.world.spins_max = 1000
    event, poller = host.event(), host.poller()
    event.set()
    poller.register(event.fileno(), IN)
    with pytest.raises(Deadlock, match="1000 waits without time passing"):
        while True:
            poller.wait(-1)


def test_waiting_for_the_clock_without_waiting_is_recognised() -> None:
    host = SimHost()
    host.world.spins_max = 100
    end_ns = host.monotonic_ns() + 1
    with pytest.raises(Deadlock, match="looks at the clock"):
        while host.monotonic_ns() < end_ns:
            pass


def test_chain_of_immediate_actions_is_recognised() -> None:
    host = SimHost()
    host.world.spins_max = 1000

    def again() -> None:
        host.at(0, again)

    again()
    with pytest.raises(Deadlock):
        host.poller().wait(-1)


def test_busy_polling_lets_time_pass() -> None:
    host = SimHost()
    poller = host.poller()
    end_ns = host.monotonic_ns() + 100_000
    rounds = 0
    while host.monotonic_ns() < end_ns:
        poller.wait(0)
        rounds += 1
    assert 100 <= rounds <= 200


def test_nested_pollers() -> None:
    host = SimHost()
    inner, outer, event = host.poller(), host.poller(), host.event()
    inner.register(event.fileno(), IN)
    outer.register(inner.fileno(), IN)
    host.at(5, event.set)
    assert outer.wait(-1) == [(inner.fileno(), IN)]
    assert inner.wait(0) == [(event.fileno(), IN)]
    with pytest.raises(OSError) as caught:
        inner.register(outer.fileno(), IN)
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(OSError):
        inner.register(inner.fileno(), IN)


def test_closed_descriptor_leaves_the_poller_and_its_number_is_used_again() -> None:
    host = SimHost()
    event, poller = host.event(), host.poller()
    fd = event.fileno()
    poller.register(fd, IN)
    event.set()
    event.close()
    assert event.fileno() == -1
    other = host.event()
    assert other.fileno() == fd
    other.set()
    assert poller.wait(0) == []


def test_events_belong_to_what_the_mask_says() -> None:
    host = SimHost()
    near, far = host.socket_pair()
    poller = host.poller()
    poller.register(near.fileno(), OUT)
    assert poller.wait(-1) == [(near.fileno(), OUT)]
    poller.modify(near.fileno(), IN)
    assert poller.wait(0) == []
    far.send(b"x")
    assert poller.wait(0) == [(near.fileno(), IN)]
    poller.unregister(near.fileno())
    assert poller.wait(0) == []


def test_signals() -> None:
    host = SimHost()
    source, poller = host.signals([signal.SIGINT, signal.SIGTERM]), host.poller()
    poller.register(source.fileno(), IN)
    host.at(10, lambda: host.raise_signal(signal.SIGTERM))
    assert poller.wait(-1) == [(source.fileno(), IN)]
    assert source.take() == [signal.SIGTERM]
    assert source.take() == []
    with pytest.raises(RuntimeError, match="nobody asked"):
        host.raise_signal(signal.SIGHUP)


def test_threads_are_pretended() -> None:
    host = SimHost()
    poller = host.poller()
    poller.wait(0)
    assert host.thread_id() == 1
    with host.as_thread(2):
        assert host.thread_id() == 2
        with pytest.raises(RuntimeError, match="belongs to thread 1, used from thread 2"):
            poller.wait(0)
    assert host.thread_id() == 1


def test_random_bytes_and_shuffle_come_from_the_seed() -> None:
    def draw(seed: int) -> tuple[bytes, list[int]]:
        host, items = SimHost(seed), list(range(10))
        host.shuffle(items)
        return host.random_bytes(16), items

    assert draw(1) == draw(1)
    assert draw(1)[0] != draw(2)[0]
    assert sorted(draw(1)[1]) == list(range(10))


def test_arena() -> None:
    arena = SimHost().arena(8192)
    part = arena.view[4096:]
    part[:] = b"x" * 4096
    assert arena.size == len(arena.view) == 8192 and arena.address == 0
    arena.close()
    assert part[0] == ord("x")  # a leftover view only delays it
