# SPDX-License-Identifier: Apache-2.0
"""Threads and locks: what every host promises."""

from __future__ import annotations

import pytest

from bottomhalf.host.protocol import IN
from tests.host.contract.conftest import Place

WAIT_NS = 1_000_000


def test_threads_run_and_are_joined(place: Place) -> None:
    host = place.host
    ids: list[int] = []
    threads = [host.start_thread(lambda: ids.append(host.thread_id()), f"thread {n}", daemon=n == 1) for n in range(3)]
    for thread in threads:
        thread.join()
        thread.join()
    assert len(ids) == 3 and host.thread_id() not in ids


def test_an_event_wakes_another_thread(place: Place) -> None:
    host = place.host
    ping, pong = place.event(), place.event()

    def answer() -> None:
        poller = host.poller()
        poller.register(ping.fileno(), IN)
        while not poller.wait(-1):
            pass
        ping.clear()
        poller.close()
        pong.set()

    poller = place.poller()
    poller.register(pong.fileno(), IN)
    thread = host.start_thread(answer, "answers")
    ping.set()
    while not poller.wait(-1):
        pass
    assert pong.clear()
    thread.join()


def test_locks(place: Place) -> None:
    """One holds it; another may release it; a wait may end by time; nobody releases what nobody holds."""
    host = place.host
    lock = host.lock()
    assert lock.acquire() is True
    before_ns = host.monotonic_ns()
    assert lock.acquire(0) is False and lock.acquire(WAIT_NS) is False
    assert host.monotonic_ns() - before_ns >= WAIT_NS
    thread = host.start_thread(lock.release, "releases")
    thread.join()
    with lock:
        assert lock.acquire(0) is False
    assert lock.acquire(WAIT_NS) is True
    lock.release()
    with pytest.raises(RuntimeError, match="unlocked"):
        lock.release()


def test_a_lock_is_handed_over(place: Place) -> None:
    host = place.host
    first, second = host.lock(), host.lock()
    first.acquire()
    second.acquire()
    steps: list[str] = []

    def work() -> None:
        first.acquire()
        steps.append("work")
        second.release()

    thread = host.start_thread(work, "works")
    steps.append("before")
    first.release()
    assert second.acquire() is True
    assert steps == ["before", "work"]
    thread.join()
