# SPDX-License-Identifier: Apache-2.0
"""Waiting for exactly as long as asked, on the real clock."""

from __future__ import annotations

import errno
import time

import pytest

from bottomhalf.host.linux import epoll as module
from bottomhalf.host.linux.epoll import EpollPoller
from bottomhalf.host.linux.event import LinuxEvent
from bottomhalf.host.protocol import IN

MS = 1_000_000


@pytest.mark.parametrize("timeout_ns", [1, 1000, MS, MS + 1, 19 * MS + 1, 20 * MS + 1])
@pytest.mark.parametrize("exact", [True, False])
def test_never_early(timeout_ns: int, exact: bool) -> None:
    """T34: rounded up, in either system call."""
    poller = EpollPoller()
    poller._exact = exact
    begin_ns = time.monotonic_ns()
    assert poller.wait(timeout_ns) == []
    assert time.monotonic_ns() - begin_ns >= timeout_ns
    poller.close()


@pytest.mark.parametrize("timeout_ns", [2**31 * MS, 2**62, 2**63, 2**80])
def test_huge_timeouts(timeout_ns: int) -> None:
    """T34: they do not become negative, and do not overflow."""
    poller, event = EpollPoller(), LinuxEvent()
    poller.register(event.fileno(), IN)
    event.set()
    assert poller.wait(timeout_ns) == [(event.fileno(), IN)]
    event.close()
    poller.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_without_the_exact_call(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """An old kernel or a strict profile: milliseconds, rounded up, and no second attempt."""
    from bottomhalf.host.linux import syscalls

    attempts: list[int] = []

    def refuse(self: object, fd: int, timeout_ns: int) -> list[tuple[int, int]]:
        attempts.append(timeout_ns)
        raise OSError(number, "no")

    monkeypatch.setattr(syscalls.EpollBuffer, "wait", refuse)
    poller = EpollPoller()
    begin_ns = time.monotonic_ns()
    for _ in range(2):
        assert poller.wait(100_000) == []
    assert time.monotonic_ns() - begin_ns >= 200_000 and attempts == [100_000]
    poller.close()


def test_exact_answers() -> None:
    """The buffer of the exact call is read right, for several descriptors and again and again."""
    poller = EpollPoller()
    events = [LinuxEvent() for _ in range(5)]
    for event in events:
        poller.register(event.fileno(), IN)
    for ready in ([], [0], [0, 3], [1, 2, 4], [0, 1, 2, 3, 4]):
        for n in ready:
            events[n].set()
        answer = poller.wait(MS)
        assert sorted(answer) == sorted((events[n].fileno(), IN) for n in ready)
        for n in ready:
            assert events[n].clear()
    for event in events:
        event.close()
    poller.close()


def test_many_are_taken_in_turns() -> None:
    poller = EpollPoller()
    events = [LinuxEvent() for _ in range(2 * module.MAX_EVENTS)]
    for event in events:
        poller.register(event.fileno(), IN)
        event.set()
    seen: set[int] = set()
    for _ in range(4):
        answer = poller.wait(0)
        assert len(answer) == module.MAX_EVENTS
        seen.update(fd for fd, _ in answer)
    assert len(seen) == len(events)  # epoll begins with those that waited longest
    for event in events:
        event.close()
    poller.close()


def test_full_event() -> None:
    """A counter that can take no more is readable already."""
    import os

    event = LinuxEvent()
    os.eventfd_write(event.fileno(), 2**64 - 2)
    event.set()
    assert event.clear() is True
    assert event.clear() is False
    event.close()
    event.close()


def test_interrupted_waits_go_on() -> None:
    """T33: a signal ends neither kind of wait; its handler runs meanwhile, and may wake the loop by an event."""
    import os
    import signal
    import threading

    poller, event = EpollPoller(), LinuxEvent()
    poller.register(event.fileno(), IN)
    handled: list[int] = []
    wakes = False

    def handler(number: int, _frame: object) -> None:
        handled.append(number)
        if wakes:
            event.set()

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        for wakes in (False, True):
            handled.clear()
            sender = threading.Timer(0.003, os.kill, (os.getpid(), signal.SIGUSR1))
            begin_ns = time.monotonic_ns()
            sender.start()
            answer = poller.wait(15 * MS)
            if wakes:
                assert answer == [(event.fileno(), IN)] or (answer == [] and not handled)
            else:
                assert answer == [] and time.monotonic_ns() - begin_ns >= 15 * MS
            sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    event.close()
    poller.close()
