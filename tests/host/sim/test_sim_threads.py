# SPDX-License-Identifier: Apache-2.0
"""Threads of the simulated host: one at a time, in an order that the seed decides."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bottomhalf.host.protocol import IN
from bottomhalf.host.sim import Deadlock, Odds, SimHost

SECOND_NS = 1_000_000_000


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(10)  # the last steps of one that has handed on its baton
    assert set(threading.enumerate()) <= before


def chatter(host: SimHost, log: list[str], name: str) -> None:
    for n in range(5):
        host.preempt()
        log.append(f"{name}{n}")


def talk(seed: int, switch: float = 0.5) -> tuple[list[str], list[tuple[Any, ...]]]:
    host = SimHost(seed, odds=Odds(switch=switch), trace=True)
    log: list[str] = []
    threads = [host.start_thread(lambda name=name: chatter(host, log, name), name) for name in "abc"]
    for thread in threads:
        thread.join()
    return log, host.trace


def test_the_seed_decides(seed: int) -> None:
    """The same seed gives the same run, to the last switch."""
    assert talk(seed) == talk(seed)


def test_other_seeds_give_other_orders() -> None:
    assert len({tuple(talk(seed)[0]) for seed in range(30)}) > 20


def test_without_switches_each_runs_to_its_end() -> None:
    for seed in range(5):
        log, _ = talk(seed, switch=0.0)
        assert ["".join(sorted(log))[::2]] and all(log.index(f"{n}4") - log.index(f"{n}0") == 4 for n in "abc")


def race(seed: int, locked: bool) -> int:
    """Two threads add to a number: look, be interrupted, store."""
    host = SimHost(seed)
    lock = host.lock()
    total = 0

    def add() -> None:
        nonlocal total
        for _ in range(3):
            if locked:
                lock.acquire()
            seen = total
            host.preempt()
            total = seen + 1
            if locked:
                lock.release()

    threads = [host.start_thread(add, f"adder {n}") for n in range(2)]
    for thread in threads:
        thread.join()
    return total


def test_a_race_is_found() -> None:
    """Within fifty seeds, with the usual odds; with the lock never."""
    assert min(race(seed, locked=False) for seed in range(50)) < 6
    assert {race(seed, locked=True) for seed in range(50)} == {6}


def test_time_passes_when_nobody_can_run(seed: int) -> None:
    """Three sleep; each wakes at its time."""
    host = SimHost(seed)
    woken: list[tuple[int, int]] = []
    start_ns = host.world.now_ns

    def sleep(n: int) -> None:
        poller = host.poller()
        while host.world.now_ns < start_ns + n * SECOND_NS:
            poller.wait(n * SECOND_NS)
        woken.append((n, host.world.now_ns - start_ns))
        poller.close()

    threads = [host.start_thread(lambda n=n: sleep(n), f"sleeper {n}") for n in (3, 1, 2)]
    for thread in threads:
        thread.join()
    assert woken == [(1, SECOND_NS), (2, 2 * SECOND_NS), (3, 3 * SECOND_NS)]


def test_events_between_threads(seed: int) -> None:
    """A hundred rounds of ping-pong, each thread with a number of its own."""
    host = SimHost(seed)
    ping, pong = host.event(), host.event()
    numbers: set[int] = set()

    def play(mine: Any, other: Any) -> None:
        poller = host.poller()
        poller.register(mine.fileno(), IN)
        for _ in range(100):
            while not poller.wait(-1):
                pass
            assert mine.clear()
            numbers.add(host.thread_id())
            other.set()
        poller.close()

    threads = [host.start_thread(lambda: play(ping, pong), "a"), host.start_thread(lambda: play(pong, ping), "b")]
    ping.set()
    for thread in threads:
        thread.join()
    assert numbers == {2, 3} and host.thread_id() == 1


def test_locks_wait_and_time_out(seed: int) -> None:
    host = SimHost(seed)
    lock = host.lock()
    got: list[bool] = []

    def impatient() -> None:
        got.append(lock.acquire(0))
        got.append(lock.acquire(SECOND_NS))

    def patient() -> None:
        got.append(lock.acquire())
        lock.release()

    assert lock.acquire()
    start_ns = host.world.now_ns
    first = host.start_thread(impatient, "impatient")
    first.join()
    assert got == [False, False] and host.world.now_ns == start_ns + SECOND_NS
    second = host.start_thread(patient, "patient")
    lock.release()
    second.join()
    assert got[2] is True
    with pytest.raises(RuntimeError, match="unlocked"):
        lock.release()


def test_deadlock_is_raised_in_the_main_thread(seed: int) -> None:
    """It names every thread and what each waits for; the others end, and their ``finally`` runs."""
    host = SimHost(seed)
    one, two = host.lock(), host.lock()
    cleaned: list[str] = []

    def grab(first: Any, second: Any, name: str) -> None:
        try:
            first.acquire()
            poller = host.poller()
            poller.wait(1000)
            second.acquire()
        finally:
            cleaned.append(name)

    host.start_thread(lambda: grab(one, two, "a"), "a")
    last = host.start_thread(lambda: grab(two, one, "b"), "b")
    with pytest.raises(Deadlock) as failure:
        last.join()
    text = str(failure.value)
    assert "thread main waits for the end of thread b" in text
    assert "thread a waits for a lock that thread 3 holds" in text
    assert "thread b waits for a lock that thread 2 holds" in text
    assert sorted(cleaned) == ["a", "b"]
    last.join()  # has ended


def test_main_thread_alone_in_a_deadlock() -> None:
    host = SimHost(0)
    lock = host.lock()
    lock.acquire()
    with pytest.raises(Deadlock, match="nothing can let any thread run"):
        lock.acquire()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_exceptions_end_their_thread(seed: int) -> None:
    """As on a real host: they are told to threading.excepthook, and others go on."""
    host = SimHost(seed)
    told: list[str] = []
    before, threading.excepthook = threading.excepthook, lambda told_of: told.append(str(told_of.exc_value))
    try:

        def fail() -> None:
            host.preempt()
            raise ValueError("mine")

        host.start_thread(fail, "fails").join()
    finally:
        threading.excepthook = before
    assert told == ["mine"]


@pytest.mark.parametrize("how", ["crash", "kill", "end_threads"])
def test_all_end(how: str) -> None:
    """With the power, with the program, or because a test is done with them; one that would not has to."""
    host = SimHost(3)
    stubborn: list[str] = []

    def wait_for_ever() -> None:
        event, poller = host.event(), host.poller()
        poller.register(event.fileno(), IN)
        while True:
            try:
                poller.wait(-1)
            except BaseException as error:
                stubborn.append(type(error).__name__)
                if len(stubborn) > 3:
                    raise

    host.start_thread(wait_for_ever, "waits")
    host.start_thread(wait_for_ever, "waits too")
    host.poller().wait(1000)
    getattr(host, how)()
    assert len(stubborn) >= 4 and not host.world.threads.many


def test_threads_start_threads(seed: int) -> None:
    host = SimHost(seed)
    order: list[int] = []

    def start(depth: int) -> None:
        if depth:
            host.start_thread(lambda: start(depth - 1), f"depth {depth}").join()
        order.append(depth)

    start(5)
    assert order == [0, 1, 2, 3, 4, 5]


def test_a_program_without_threads_is_as_before(seed: int) -> None:
    """No chance is drawn for switches that cannot be."""
    traces = []
    for switch in (0.0, 1.0):
        host = SimHost(seed, odds=Odds(switch=switch), trace=True)
        event, poller = host.event(), host.poller()
        poller.register(event.fileno(), IN)
        for _ in range(10):
            host.at(1000, event.set)
            poller.wait(-1)
            event.clear()
        traces.append(host.trace)
    assert traces[0] == traces[1]


def test_what_happens_by_itself_is_not_interrupted(seed: int) -> None:
    host = SimHost(seed, odds=Odds(switch=1.0))
    running = 0

    def act() -> None:
        nonlocal running
        running += 1
        host.event().set()
        host.monotonic_ns()
        assert running == 1
        running -= 1

    def wait() -> None:
        poller = host.poller()
        for _ in range(10):
            poller.wait(1000)

    for n in range(20):
        host.at(n * 500, act)
    threads = [host.start_thread(wait, f"waiter {n}") for n in range(3)]
    for thread in threads:
        thread.join()
