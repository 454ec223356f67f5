# SPDX-License-Identifier: Apache-2.0
"""The kinds of pollers on this machine: signals, threads, forks, descriptors that are gone."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bottomhalf.host.linux.event import LinuxEvent
from bottomhalf.host.linux.poll import PollPoller
from bottomhalf.host.linux.poller import POLLER_KINDS, make_poller
from bottomhalf.host.linux.uring_poller import UringPoller
from bottomhalf.host.protocol import IN, Poller
from tests.host.contract.conftest import forget_new_kernels

MS = 1_000_000
WAIT_NS = 10_000 * MS


@pytest.fixture(params=[*POLLER_KINDS, "io_uring, old"])
def poller(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Poller]:
    if request.param == "io_uring, old":
        forget_new_kernels(monkeypatch)
    made = make_poller(request.param.split(",")[0])
    yield made
    made.close()


@pytest.fixture
def event() -> Iterator[LinuxEvent]:
    made = LinuxEvent()
    yield made
    made.close()


@pytest.fixture
def storm() -> Iterator[list[int]]:
    """Signals, at least one per millisecond, until the test is over; the list grows by each."""
    handled: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _frame: handled.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    yield handled
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_signal_storm(poller: Poller, event: LinuxEvent, storm: list[int]) -> None:
    """T33: a wait goes on, neither early nor for ever, its handlers run meanwhile, and no descriptor is lost."""
    poller.register(event.fileno(), IN)
    for timeout_ns in (15 * MS, 25 * MS):
        del storm[:]
        begin_ns = time.monotonic_ns()
        assert poller.wait(timeout_ns) == []
        assert time.monotonic_ns() - begin_ns >= timeout_ns
        assert len(storm) > 2
    del storm[:]
    thread = threading.Thread(target=lambda: (wait_for(lambda: len(storm) > 10), event.set()))
    thread.start()
    assert poller.wait(-1) == [(event.fileno(), IN)]
    thread.join()
    assert len(storm) > 10
    event.clear()
    assert poller.wait(0) == []


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        os.sched_yield()


def test_handler_that_wakes(poller: Poller, event: LinuxEvent) -> None:
    """What a signal handler makes ready ends the wait that it interrupts."""
    poller.register(event.fileno(), IN)
    before = signal.signal(signal.SIGALRM, lambda _number, _frame: event.set())
    try:
        for timeout_ns in (WAIT_NS, -1):
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            assert poller.wait(timeout_ns) == [(event.fileno(), IN)]
            event.clear()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_handler_that_raises(poller: Poller, event: LinuxEvent) -> None:
    """An exception goes out of the wait, wherever in it the signal comes, and every registration stays."""
    events = [event, LinuxEvent(), LinuxEvent()]
    for one in events:
        poller.register(one.fileno(), IN)

    class Interrupted(Exception):
        pass

    raises = False

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal raises
        if raises:
            raises = False
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for turn in range(150):
            ready = events[turn % 3]
            ready.set()
            raises = True
            with pytest.raises(Interrupted):
                # Again and again: the first may come just before a wait goes to sleep.
                signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + turn % 50), 0.001)
                for _ in range(3):
                    poller.wait(0)
                ready.clear()
                poller.wait(-1)
            signal.setitimer(signal.ITIMER_REAL, 0)
            ready.clear()
            for one in events:
                one.set()
                assert poller.wait(WAIT_NS) == [(one.fileno(), IN)]
                one.clear()
            assert poller.wait(0) == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        for one in events[1:]:
            one.close()


class Sleeper:
    """A thread that makes a poller, and waits in it for a wake-up and for what others register."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.wake = LinuxEvent()
        self.seen: list[int] = []
        self.ready = threading.Event()
        self.turns = 0
        self.running = True
        self.thread = threading.Thread(target=self.work)
        self.thread.start()
        self.ready.wait()

    def work(self) -> None:
        self.poller = make_poller(self.kind)
        self.poller.register(self.wake.fileno(), IN)
        self.poller.wait(0)
        self.ready.set()
        while self.running:
            for fd, _ in self.poller.wait(-1):
                if fd == self.wake.fileno():
                    self.wake.clear()
                else:
                    self.seen.append(fd)
            self.turns += 1
        self.poller.close()

    def notify(self) -> None:
        """Wake it, and come back when it has gone through a wait that began afterwards."""
        turns = self.turns + 2
        while self.turns < turns:
            self.wake.set()
            os.sched_yield()

    def close(self) -> None:
        self.running = False
        self.wake.set()
        self.thread.join()
        self.wake.close()


@pytest.mark.parametrize("kind", POLLER_KINDS)
def test_changes_from_another_thread(kind: str) -> None:
    """They work at the latest when the sleeper is woken afterwards, and what was removed may be closed and its number
    used again."""
    sleeper = Sleeper(kind)
    try:
        for _ in range(30):
            near, far = socket.socketpair()
            with near, far:
                far.send(b"x")
                sleeper.poller.register(near.fileno(), 0)
                sleeper.notify()
                assert near.fileno() not in sleeper.seen
                sleeper.poller.modify(near.fileno(), IN)
                while near.fileno() not in sleeper.seen:
                    sleeper.wake.set()
                    os.sched_yield()
                sleeper.poller.unregister(near.fileno())
                sleeper.notify()
                sleeper.seen.clear()
                sleeper.notify()
                assert sleeper.seen == []
                near.close()
                far.setblocking(False)
                with pytest.raises(ConnectionResetError):  # of unread data: the file is really closed
                    far.recv(1)
            fresh = os.eventfd(0)
            sleeper.poller.register(fresh, IN)
            sleeper.notify()
            assert sleeper.seen == []
            sleeper.poller.unregister(fresh)
            os.close(fresh)
    finally:
        sleeper.close()


def test_poll_drops_what_changed_meanwhile(event: LinuxEvent) -> None:
    """What a sleeping poll(2) comes back with may be about the file that had the number before."""
    poller, fd = PollPoller(), event.fileno()
    poller.register(fd, IN)
    real: Any = poller._poll
    changes = [lambda: poller.modify(fd, IN), lambda: (poller.unregister(fd), poller.register(fd, IN))]

    class Sleeping:
        """select.poll() during whose system call another thread makes a change."""

        register, unregister, modify = real.register, real.unregister, real.modify

        def poll(self, *timeout: int) -> list[tuple[int, int]]:
            found: list[tuple[int, int]] = real.poll(*timeout)
            if changes:
                changes.pop()()
            return found

    poller._poll = Sleeping()  # type: ignore[assignment]
    event.set()
    assert poller.wait(0) == []
    assert poller.wait(0) == []
    assert poller.wait(0) == [(fd, IN)]
    poller.close()


@pytest.mark.parametrize("kind", POLLER_KINDS)
def test_closed_without_unregister(kind: str) -> None:
    """No kind reports it, is stuck on it, or knows it in the end. A ring holds the file until it is ready."""
    poller, other = make_poller(kind), LinuxEvent()
    poller.register(other.fileno(), IN)
    near, far = socket.socketpair()
    fd = near.fileno()
    poller.register(fd, IN)
    assert poller.wait(0) == []
    near.close()
    if kind == "io_uring":
        far.send(b"x")
    assert poller.wait(0) == []
    other.set()
    for _ in range(3):
        assert poller.wait(-1) == [(other.fileno(), IN)]
    with pytest.raises(OSError) as caught:
        poller.unregister(fd)
    assert caught.value.errno in (errno.ENOENT, errno.EBADF)
    far.close()
    fresh = os.eventfd(1)
    poller.register(fresh, IN)
    assert sorted(poller.wait(0)) == sorted([(fresh, IN), (other.fileno(), IN)])
    poller.close()
    os.close(fresh)
    other.close()


@pytest.mark.needs("io_uring")
def test_a_ring_does_not_spin_on_a_shutdown() -> None:
    """Of the peer, when nobody asked for input: the request that would complete at once for ever is left armed."""
    poller = UringPoller()
    near, far = socket.socketpair()
    with near, far:
        far.shutdown(socket.SHUT_WR)
        poller.register(near.fileno(), 0)
        assert poller.wait(0) == []
        assert [one.multi and one.armed for one in poller._in_kernel.values()] == [True]
        assert not poller._todo
        poller.unregister(near.fileno())
        assert not poller._in_kernel
    poller.close()


@pytest.mark.needs("io_uring")
def test_another_process(event: LinuxEvent) -> None:
    """A forked child is told that the ring is not its own, does not disturb it, and can close it."""
    poller = make_poller("io_uring")
    poller.register(event.fileno(), IN)
    assert poller.wait(0) == []
    child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                poller.wait(0)
            except RuntimeError as told:
                status = 0 if "after fork" in str(told) else 2
            poller.unregister(event.fileno())
            poller.close()
        except BaseException:
            status = 3
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    event.set()
    assert poller.wait(WAIT_NS) == [(event.fileno(), IN)]
    poller.close()


@pytest.mark.needs("io_uring")
def test_another_thread(event: LinuxEvent) -> None:
    """Only its own may wait with a ring; the others are told so."""
    poller = make_poller("io_uring")
    poller.register(event.fileno(), IN)
    told: list[OSError] = []

    def wait() -> None:
        try:
            poller.wait(0)
        except OSError as error:
            told.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert told[0].errno == errno.EEXIST and "thread that made it" in str(told[0])
    event.set()
    assert poller.wait(0) == [(event.fileno(), IN)]
    poller.close()


@pytest.mark.needs("io_uring")
def test_lost_ring(event: LinuxEvent) -> None:
    poller = UringPoller()
    poller.register(event.fileno(), IN)
    os.close(poller._ring._fd)
    with pytest.raises(OSError, match="closed by somebody else") as caught:
        poller.wait(-1)
    assert caught.value.errno == errno.EBADF
    poller._ring._fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(OSError, match="another file"):
        poller.wait(-1)
    poller.unregister(event.fileno())
    poller.close()
    with pytest.raises(ValueError, match="closed"):
        poller.wait(0)
