# SPDX-License-Identifier: Apache-2.0
"""The three monitors of descriptors, beyond the contract: limits, signals, threads, refusals, reused numbers."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.linux import poller as epoll_module
from bottomhalf.host.linux import ring as ring_module
from bottomhalf.host.linux.poll_poller import PollPoller
from bottomhalf.host.linux.uring_poller import UringPoller
from bottomhalf.host.protocol import HUP, IN, OUT, Poller

KINDS = ("epoll", "poll", "io_uring")


@pytest.fixture(params=KINDS)
def poller(request: pytest.FixtureRequest) -> Iterator[Poller]:
    made = LinuxHost().poller(request.param)
    assert made.name == request.param
    yield made
    made.close()


def test_many_descriptors(poller: Poller) -> None:
    """A thousand, all ready, then one; more than a ring has entries, more than a wait takes at once."""
    wanted = 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    fds = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(wanted)]
    try:
        for fd in fds:
            poller.register(fd, IN)
        seen: set[int] = set()
        while len(seen) < wanted:
            for fd, mask in poller.wait(-1):
                assert mask == IN
                seen.add(fd)
                os.eventfd_read(fd)
        assert seen == set(fds) and poller.wait(0) == []
        os.eventfd_write(fds[777], 1)
        assert poller.wait(-1) == [(fds[777], IN)]
        assert poller.wait(-1) == [(fds[777], IN)], "level-triggered"
        for fd in fds:
            poller.unregister(fd)
        assert poller.wait(0) == []
    finally:
        for fd in fds:
            os.close(fd)


def test_a_number_is_used_again(poller: Poller) -> None:
    """T31: removed and registered anew at once, with the old one's event under way: nothing of the old is told."""
    for _ in range(100):
        old = os.eventfd(0, os.EFD_NONBLOCK)
        poller.register(old, IN)
        poller.wait(0)
        os.eventfd_write(old, 1)
        poller.unregister(old)
        os.close(old)
        new = os.eventfd(0, os.EFD_NONBLOCK)
        assert new == old
        poller.register(new, IN)
        assert poller.wait(0) == []
        os.eventfd_write(new, 1)
        assert poller.wait(-1) == [(new, IN)]
        poller.unregister(new)
        os.close(new)


def test_modified_while_ready(poller: Poller) -> None:
    one, two = socket.socketpair()
    two.send(b"x")
    poller.register(one.fileno(), IN)
    assert poller.wait(-1) == [(one.fileno(), IN)]
    poller.modify(one.fileno(), OUT)
    assert poller.wait(-1) == [(one.fileno(), OUT)]
    poller.modify(one.fileno(), IN | OUT)
    assert poller.wait(-1) == [(one.fileno(), IN | OUT)]
    two.close()
    found = poller.wait(-1)
    assert found[0][1] & HUP
    poller.modify(one.fileno(), 0)
    assert poller.wait(-1)[0][1] & HUP, "told whether asked for or not"
    poller.unregister(one.fileno())
    one.close()


@pytest.mark.parametrize("timeout_ns", [1, 50_000, 1_000_001, 19_999_999, 21_000_000])
def test_never_early(poller: Poller, timeout_ns: int) -> None:
    """T34: rounded up, to the nanosecond or the millisecond."""
    fd = os.eventfd(0)
    poller.register(fd, IN)
    for _ in range(3):
        begin = time.monotonic_ns()
        assert poller.wait(timeout_ns) == []
        assert time.monotonic_ns() - begin >= timeout_ns
    poller.unregister(fd)
    os.close(fd)


@pytest.mark.parametrize("timeout_ns", [2**31 * 10**6, 2**62, 2**63 - 1])
def test_huge_timeouts(poller: Poller, timeout_ns: int) -> None:
    """T34: they do not become negative, or an error."""
    fd = os.eventfd(1)
    poller.register(fd, IN)
    assert poller.wait(timeout_ns) == [(fd, IN)]
    poller.unregister(fd)
    os.close(fd)


def test_registered_by_another_thread(poller: Poller) -> None:
    """T13: while the home thread sleeps; it takes effect at the latest when the event, as a context has one, wakes
    the sleeper."""
    wake_up, fd = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(1, os.EFD_NONBLOCK)
    poller.register(wake_up, IN)

    def elsewhere() -> None:
        poller.register(fd, IN)
        os.eventfd_write(wake_up, 1)

    for _ in range(20):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        seen: set[int] = set()
        while fd not in seen:
            seen |= {ready for ready, _ in poller.wait(-1)}
            if wake_up in seen:
                try:
                    os.eventfd_read(wake_up)
                except BlockingIOError:
                    pass
        thread.join()
        poller.unregister(fd)
        poller.wait(0)
    poller.unregister(wake_up)
    for open_fd in (wake_up, fd):
        os.close(open_fd)


def test_signals_during_a_wait(poller: Poller) -> None:
    """T33: handlers run; the wait goes on or returns nothing, and never fails."""
    got: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: got.append(number))
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    poller.register(fd, IN)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        end = time.monotonic_ns() + 30_000_000
        while time.monotonic_ns() < end:
            assert poller.wait(5_000_000) == []
        threading.Timer(0.01, os.eventfd_write, (fd, 1)).start()
        while not (found := poller.wait(-1)):
            pass
        assert found == [(fd, IN)] and got
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        poller.unregister(fd)
        os.close(fd)


def test_misuse_changes_nothing(poller: Poller) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    poller.register(fd, IN)
    with pytest.raises(FileExistsError):
        poller.register(fd, OUT)
    with pytest.raises(ValueError, match="negative"):
        poller.register(-1, IN)
    stranger = os.eventfd(0)
    with pytest.raises(FileNotFoundError):
        poller.modify(stranger, IN)
    os.close(stranger)
    with pytest.raises(OSError) as failure:
        poller.register(999_999, IN)
    assert failure.value.errno == errno.EBADF
    assert poller.wait(0) == []
    os.eventfd_write(fd, 1)
    assert poller.wait(-1) == [(fd, IN)]
    poller.unregister(fd)
    with pytest.raises(FileNotFoundError):
        poller.unregister(fd)
    os.close(fd)


def test_in_another_loop(poller: Poller) -> None:
    """fileno() is readable while a wait would return something; also for what was ready and told before."""
    outer = select.epoll()
    first, second = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    poller.register(first, IN)
    outer.register(poller.fileno(), IN)
    poller.register(second, IN)

    def readable() -> bool:
        return bool(outer.poll(0))

    poller.wait(0)
    assert not readable()
    for fd in (first, second):
        os.eventfd_write(fd, 1)
        assert outer.poll(10) and readable()
        assert poller.wait(0) == [(fd, IN)]
        assert readable(), "it is ready still"
        os.eventfd_read(fd)
        assert poller.wait(0) == []
        assert not readable()
    poller.unregister(first)
    poller.unregister(second)
    os.eventfd_write(first, 1)
    poller.wait(0)
    assert poller.wait(0) == [] and not readable()
    outer.close()
    for fd in (first, second):
        os.close(fd)


def test_closed_with_registrations(poller: Poller) -> None:
    """Nothing is left behind; what was watched is as it was."""
    one, two = socket.socketpair()
    poller.register(one.fileno(), IN | OUT)
    poller.wait(0)
    poller.close()
    two.send(b"x")
    assert one.recv(1) == b"x"
    one.close()
    two.close()


# -- refusals -------------------------------------------------------------------------------------------------------


def refusing(number: int) -> object:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EACCES])
def test_without_epoll(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A sandbox refuses it: "auto" falls back, and its name says so; by name it is an error."""
    monkeypatch.setattr(epoll_module.select, "epoll", refusing(number))
    host = LinuxHost()
    made = host.poller()
    assert isinstance(made, PollPoller) and made.name == "poll"
    with pytest.raises(OSError):
        host.poller("epoll")
    with pytest.raises(OSError):
        made.fileno()
    made.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_no_descriptor_left_is_no_refusal(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """It is not hidden by a fallback."""
    monkeypatch.setattr(epoll_module.select, "epoll", refusing(number))
    with pytest.raises(OSError) as failure:
        LinuxHost().poller()
    assert failure.value.errno == number


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.ENOMEM, errno.EMFILE])
def test_without_io_uring(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(ring_module, "io_uring_setup", refusing(number))
    with pytest.raises(OSError) as failure:
        LinuxHost().poller("io_uring")
    assert failure.value.errno == number
    assert LinuxHost().poller().name == "epoll"


def test_too_old_for_time_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "_FEAT_EXT_ARG", 1 << 31)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as failure:
        UringPoller()
    assert failure.value.errno == errno.ENOSYS and len(os.listdir("/proc/self/fd")) == before


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="not 'kqueue'"):
        LinuxHost().poller("kqueue")


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EBUSY, errno.EINTR])
def test_enter_refuses_for_a_while(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The kernel takes nothing now: no registration is lost."""
    poller = UringPoller()
    fd = os.eventfd(1, os.EFD_NONBLOCK)
    poller.register(fd, IN)
    real, refusals = ring_module.io_uring_enter, [number] * 3

    def enter(*arguments: int) -> int:
        return -refusals.pop() if refusals else real(*arguments)

    monkeypatch.setattr(ring_module, "io_uring_enter", enter)
    found: list[tuple[int, int]] = []
    for _ in range(5):
        found = found or poller.wait(0)
    assert found == [(fd, IN)]
    poller.close()
    os.close(fd)


def test_enter_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An errno that will not go away is an error, not a loop."""
    poller = UringPoller()
    monkeypatch.setattr(ring_module, "io_uring_enter", lambda *_: -errno.EBADFD)
    monkeypatch.setattr(ring_module, "io_uring_enter_until", lambda *_: -errno.EBADFD)
    for timeout_ns in (0, -1):
        with pytest.raises(OSError) as failure:
            poller.wait(timeout_ns)
        assert failure.value.errno == errno.EBADFD
    poller.close()


def test_ring_of_another_process() -> None:
    """After fork(2) the child has no ring; it is told so."""
    poller = UringPoller()
    child = os.fork()
    if child == 0:
        try:
            poller.wait(0)
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    poller.close()
