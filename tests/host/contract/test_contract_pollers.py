# SPDX-License-Identifier: Apache-2.0
"""What every kind of poller promises, on this machine and on the simulated one."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from bottomhalf.host.protocol import ERR, HUP, IN, OUT
from bottomhalf.host.sim import SimHost
from tests import seccomp
from tests.host.contract.conftest import WAIT_NS, Place

MS = 1_000_000


def test_kinds(place: Place) -> None:
    for kind in ("epoll", "poll", "io_uring"):
        if kind == "io_uring" and seccomp.missing(kind) and place.host.name != "sim":
            with pytest.raises(OSError):
                place.host.poller(kind)
            continue
        poller = place.host.poller(kind)
        assert poller.name == kind
        poller.close()
    with pytest.raises(ValueError, match="kqueue"):
        place.host.poller("kqueue")
    poller = place.host.poller()
    assert poller.name == ("sim" if place.host.name == "sim" else "epoll")
    poller.close()


def test_a_kind_that_is_refused() -> None:
    host = SimHost()
    host.poller_kinds.remove("io_uring")
    with pytest.raises(OSError) as caught:
        host.poller("io_uring")
    assert caught.value.errno == errno.ENOSYS
    assert host.poller("poll").name == "poll"


def test_what_is_over_is_not_reported(place: Place) -> None:
    """Readiness is what is so now: an event set and cleared between two waits is nothing, however the kernel was told
    of it. Here many, since a ring looks at some of them only per system call."""
    events, poller = [place.event() for _ in range(50)], place.poller()
    for event in events:
        poller.register(event.fileno(), IN)
    for real in (-1, 49, 0, 25):
        assert poller.wait(0) == []
        for event in events:
            event.set()
        for n, event in enumerate(events):
            if n != real:
                event.clear()
        assert poller.wait(0) == ([(events[real].fileno(), IN)] if real >= 0 else [])
        if real >= 0:
            events[real].clear()


def test_ready_before_it_is_registered(place: Place) -> None:
    event, poller = place.event(), place.poller()
    event.set()
    poller.register(event.fileno(), IN)
    assert poller.wait(0) == [(event.fileno(), IN)]
    assert poller.wait(0) == [(event.fileno(), IN)]


def test_number_used_again(place: Place) -> None:
    """T31: what was on the way for a descriptor is not told of the next one with its number."""
    poller = place.poller()
    for waits in (True, False):
        for _ in range(20):
            old = place.host.event()
            fd = old.fileno()
            poller.register(fd, IN)
            if waits:
                assert poller.wait(0) == []
            old.set()
            poller.unregister(fd)
            old.close()
            new = place.host.event()
            poller.register(new.fileno(), IN)
            assert new.fileno() == fd or place.host.name == "sim"
            assert poller.wait(0) == []
            new.set()
            assert poller.wait(WAIT_NS) == [(new.fileno(), IN)]
            poller.unregister(new.fileno())
            new.close()


def test_removed_and_added_again_without_a_wait(place: Place) -> None:
    """T31, with the same file: one report, and the mask of the last register()."""
    near, far = place.sockets()
    poller, fd = place.poller(), near.fileno()
    poller.register(fd, IN)
    assert poller.wait(0) == []
    far.send(b"x")
    for mask in (OUT, IN | OUT, IN, 0):
        poller.unregister(fd)
        poller.register(fd, mask)
        place.until_ready(fd)
        assert poller.wait(0) == ([(fd, mask)] if mask else [])
        poller.modify(fd, OUT)
        poller.modify(fd, mask)
        assert poller.wait(0) == ([(fd, mask)] if mask else [])


def test_closing_a_socket_reaches_its_peer(place: Place) -> None:
    """At once: a poller does not hold on to what was unregistered, nor to anything once it is closed."""
    buffer = bytearray(1)
    for closes in (False, True):
        near, far = place.sockets()
        poller = place.host.poller(place.poller_kind)
        poller.register(near.fileno(), IN)
        assert poller.wait(0) == []
        if not closes:
            poller.unregister(near.fileno())
        else:
            poller.close()
            poller.close()
        near.close()
        if place.host.name == "sim":
            place.until_ready(far.fileno())  # its connections take time
        assert far.recv_into(buffer) == 0
        poller.close()


def test_shutdown_of_the_peer_is_no_readiness_to_write(place: Place) -> None:
    """Nor to do nothing. Nobody asked for RDHUP, and a loop that is told of it all the time would spin."""
    if place.host.name == "sim":
        return  # its sockets shut down both directions at once
    near, far = socket.socketpair()
    poller, fd = place.poller(), near.fileno()
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        far.shutdown(socket.SHUT_WR)
        poller.register(fd, OUT)
        assert poller.wait(0) == [(fd, OUT)]
        fill(near)
        for _ in range(3):
            assert poller.wait(0) == []
            assert poller.wait(MS) == []
        for _ in range(2):
            drain(far)
            for _ in range(3):
                assert poller.wait(WAIT_NS) == [(fd, OUT)]
            fill(near)
            assert poller.wait(0) == []
        poller.modify(fd, 0)
        assert poller.wait(0) == []
        poller.modify(fd, IN)
        assert poller.wait(0) == [(fd, IN)]
        poller.modify(fd, 0)
        assert poller.wait(0) == []
        poller.unregister(fd)
        poller.register(fd, IN | OUT)
        assert poller.wait(0) == [(fd, IN)]
        poller.modify(fd, OUT)
        assert poller.wait(0) == []
        poller.unregister(fd)
        near.close()
        drain(far)
        assert far.recv(1) == b""


def fill(near: socket.socket) -> None:
    with pytest.raises(BlockingIOError):
        while True:
            near.send(bytes(1 << 16))


def drain(far: socket.socket) -> None:
    try:
        while far.recv(1 << 16):
            pass
    except BlockingIOError:
        pass


def test_the_end_is_always_reported(place: Place) -> None:
    near, far = place.sockets()
    poller = place.poller()
    poller.register(near.fileno(), 0)
    assert poller.wait(0) == []
    far.close()
    place.until_ready(near.fileno())
    for mask in (0, OUT, 0):
        poller.modify(near.fileno(), mask)
        for _ in range(2):
            ((fd, found),) = poller.wait(0)
            assert fd == near.fileno() and found & HUP and not found & IN


def test_error_is_always_reported(place: Place) -> None:
    if place.host.name == "sim":
        return  # it has no pipes
    ours, theirs = os.pipe()
    poller = place.poller()
    poller.register(theirs, 0)
    assert poller.wait(0) == []
    os.close(ours)
    assert poller.wait(WAIT_NS) == [(theirs, ERR)] == poller.wait(0)
    poller.unregister(theirs)
    os.close(theirs)


def test_a_change_that_fails_changes_nothing(place: Place) -> None:
    event, poller = place.event(), place.poller()
    file = place.open(place.file("a", 10))
    event.set()
    poller.register(event.fileno(), IN)
    for fd, number in ((event.fileno(), errno.EEXIST), (file.fileno(), errno.EPERM), (999_999, errno.EBADF)):
        with pytest.raises(OSError) as caught:
            poller.register(fd, OUT)
        assert caught.value.errno == number
        assert poller.wait(0) == [(event.fileno(), IN)]
    with pytest.raises(ValueError):
        poller.register(-1, IN)
    for fd in (file.fileno(), 999_999):
        for change in (lambda fd: poller.modify(fd, IN), poller.unregister):
            with pytest.raises(OSError) as caught:
                change(fd)
            assert caught.value.errno in (errno.ENOENT, errno.EBADF, errno.EPERM)
    assert poller.wait(0) == [(event.fileno(), IN)]


@pytest.mark.parametrize("timeout_ns", [1, 1000, MS, MS + 1, 21 * MS + 1])
def test_never_early(place: Place, timeout_ns: int) -> None:
    """T34. The unkind simulation may return for no reason, as signals make the others do."""
    event, poller = place.event(), place.poller()
    poller.register(event.fileno(), IN)
    unkind = isinstance(place.host, SimHost) and place.host.odds.empty_wait
    for _ in range(2):
        end_ns = place.host.monotonic_ns() + timeout_ns
        left_ns = timeout_ns
        while left_ns > 0:
            assert poller.wait(left_ns) == []
            left_ns = end_ns - place.host.monotonic_ns()
            assert left_ns <= 0 or unkind


@pytest.mark.parametrize("timeout_ns", [2**31 * MS, 2**62, 2**63, 2**80])
def test_huge_timeouts(place: Place, timeout_ns: int) -> None:
    """T34: they do not become negative, and do not overflow."""
    event, poller = place.event(), place.poller()
    poller.register(event.fileno(), IN)
    event.set()
    while not (ready := poller.wait(timeout_ns)):
        pass
    assert ready == [(event.fileno(), IN)]


@pytest.fixture
def thousands() -> Iterator[None]:
    """Let this process have enough descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("number", [64, 129, 1500])
def test_many(place: Place, number: int, thousands: None) -> None:
    """None of them is lost, whether few are ready or more than one wait, or one ring, takes; nor told too often."""
    events, poller = [place.event() for _ in range(number)], place.poller()
    by_fd = {event.fileno(): event for event in events}
    for fd in by_fd:
        poller.register(fd, IN)
    assert poller.wait(0) == []
    for ready in (events[-1:], events, events[::7], events):
        for event in ready:
            event.set()
        left = {event.fileno() for event in ready}
        while left:
            for fd, mask in poller.wait(WAIT_NS):
                assert mask == IN
                left.remove(fd)
                by_fd[fd].clear()
        assert poller.wait(0) == []
    for event in events[::2]:
        poller.unregister(event.fileno())
    for event in events:
        event.set()
    left = {event.fileno() for event in events[1::2]}
    seen: set[int] = set()
    for _ in range(200):  # nothing is read: those that were told last must not keep the others from their turn
        seen.update(fd for fd, _ in poller.wait(0))
    assert seen == left or (place.host.name == "sim" and seen <= left)


def test_embedded(place: Place) -> None:
    """fileno() is readable while something is ready, told or not, and then unreadable."""
    inner, outer = place.poller(), place.poller()
    first, second = place.event(), place.event()
    inner.register(first.fileno(), IN)
    outer.register(inner.fileno(), IN)
    assert outer.wait(0) == []
    for event, other in ((first, second), (second, first)):
        event.set()
        for _ in range(3):
            assert outer.wait(WAIT_NS) == [(inner.fileno(), IN)]
            assert inner.wait(0) == [(event.fileno(), IN)]
        event.clear()
        assert outer.wait(0) == []
        other.set()
        if event is first:
            inner.register(other.fileno(), IN)  # ready already
            assert outer.wait(WAIT_NS) == [(inner.fileno(), IN)]
            inner.modify(other.fileno(), OUT)
            inner.modify(other.fileno(), IN)
            assert outer.wait(WAIT_NS) == [(inner.fileno(), IN)]
            inner.unregister(other.fileno())
            assert outer.wait(0) == []
            inner.register(other.fileno(), IN)
            other.clear()


def test_not_in_itself(place: Place) -> None:
    poller = place.poller()
    with pytest.raises(OSError) as caught:
        poller.register(poller.fileno(), IN)
    assert caught.value.errno == errno.EINVAL
    assert poller.wait(0) == []
