# SPDX-License-Identifier: Apache-2.0
"""Every system call of every kind of poller, refused in turn: no hang, no lost registration, and a word of what it was.

The numbers are those of the call's man page, and how a seccomp profile or a sysctl says no."""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bottomhalf.host.linux import LinuxHost, poll_ring, ring, syscalls
from bottomhalf.host.linux.event import LinuxEvent
from bottomhalf.host.linux.poll import PollPoller
from bottomhalf.host.linux.poller import POLLER_KINDS, make_poller
from bottomhalf.host.linux.uring_poller import UringPoller
from bottomhalf.host.protocol import ERR, IN, OUT

MS = 1_000_000


@pytest.fixture
def event() -> Iterator[LinuxEvent]:
    made = LinuxEvent()
    yield made
    made.close()


def refusing(number: int) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


ABSENT = (errno.EPERM, errno.ENOSYS, errno.EACCES, errno.EINVAL)


class Epoll:
    """select.epoll whose methods fail when told to."""

    failing: dict[str, int]

    def __init__(self) -> None:
        self.real = REAL_EPOLL()

    def __getattr__(self, name: str) -> Any:
        if name in self.failing:
            return refusing(self.failing[name])
        return getattr(self.real, name)


REAL_EPOLL = select.epoll


REFUSALS = [
    (call, number)
    for call in ("create", "register", "poll")
    for number in (*ABSENT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    if (call, number) != ("register", errno.EINVAL)  # what a working epoll says to the probe
]


@pytest.mark.parametrize("call, number", REFUSALS)
def test_epoll_is_refused(monkeypatch: pytest.MonkeyPatch, event: LinuxEvent, call: str, number: int) -> None:
    """T30: by whichever call. "auto" then polls, and says so; but a fault is not absence, and is not hidden."""
    monkeypatch.setattr(Epoll, "failing", {call: number}, raising=False)
    monkeypatch.setattr(select, "epoll", refusing(number) if call == "create" else Epoll)
    with pytest.raises(OSError) as caught:
        LinuxHost().poller("epoll")
    assert caught.value.errno == number
    if number not in ABSENT:
        with pytest.raises(OSError):
            LinuxHost().poller()
        return
    poller = LinuxHost().poller()
    assert poller.name == "poll"
    event.set()
    poller.register(event.fileno(), IN)
    assert poller.wait(-1) == [(event.fileno(), IN)]
    poller.close()


@pytest.mark.parametrize("kind", POLLER_KINDS)
def test_only_epoll_tells_what_can_be_polled(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Files of /proc can be, /dev/null cannot; where epoll is refused the kind of the file has to do."""
    poller = make_poller(kind)
    null, mounts = os.open("/dev/null", os.O_RDWR), os.open("/proc/self/mounts", os.O_RDONLY)
    with pytest.raises(PermissionError):
        poller.register(null, IN)
    poller.register(mounts, IN)
    assert poller.wait(0)
    poller.unregister(mounts)
    if poller.name != "epoll":
        monkeypatch.setattr(select, "epoll", refusing(errno.EPERM))
        with pytest.raises(PermissionError):
            poller.register(mounts, IN)
        poller.register(null, IN)
        poller.unregister(null)
    poller.close()
    for fd in (null, mounts):
        os.close(fd)


@pytest.mark.parametrize("kind", ["poll", "io_uring"])
def test_no_epoll_to_embed_with(monkeypatch: pytest.MonkeyPatch, event: LinuxEvent, kind: str) -> None:
    poller = make_poller(kind)
    poller.register(event.fileno(), IN)
    with monkeypatch.context() as patch:
        patch.setattr(select, "epoll", refusing(errno.EPERM))
        with pytest.raises(PermissionError, match="epoll, which is refused"):
            poller.fileno()
    with monkeypatch.context() as patch:
        patch.setattr(Epoll, "failing", {"register": errno.ENOSPC}, raising=False)
        patch.setattr(select, "epoll", Epoll)
        with pytest.raises(OSError):
            poller.fileno()
    event.set()
    assert poller.wait(0) == [(event.fileno(), IN)]
    with select.epoll() as outer:
        outer.register(poller.fileno(), IN)
        assert outer.poll(0) == [(poller.fileno(), IN)]
    poller.close()


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOMEM, errno.ENOSPC, errno.EPERM, errno.ELOOP, errno.EINVAL])
@pytest.mark.parametrize("kind", POLLER_KINDS)
def test_epoll_ctl_fails(monkeypatch: pytest.MonkeyPatch, event: LinuxEvent, kind: str, number: int) -> None:
    """Of the poller itself, or of what makes it embeddable: nothing has changed then, and it can be tried again."""
    monkeypatch.setattr(Epoll, "failing", {}, raising=False)
    monkeypatch.setattr(select, "epoll", Epoll)
    poller, other = make_poller(kind), LinuxEvent()
    poller.register(event.fileno(), IN)
    poller.fileno()
    for call, change in (("register", poller.register), ("modify", poller.modify)):
        Epoll.failing[call] = number
        fd = other.fileno() if call == "register" else event.fileno()
        with pytest.raises(OSError) as caught:
            change(fd, OUT)
        assert caught.value.errno == number
        other.set()
        event.set()
        assert poller.wait(0) == [(event.fileno(), IN)]
        Epoll.failing.clear()
    poller.register(other.fileno(), IN)
    assert sorted(poller.wait(0)) == sorted((one.fileno(), IN) for one in (event, other))
    poller.close()
    other.close()


@pytest.mark.parametrize("number", [errno.EFAULT, errno.EINVAL, errno.ENOMEM, errno.EBADF, errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("timeout_ns", [0, MS, 30 * MS, -1])
@pytest.mark.parametrize("kind", ["epoll", "poll"])
def test_wait_fails(
    monkeypatch: pytest.MonkeyPatch, event: LinuxEvent, kind: str, timeout_ns: int, number: int
) -> None:
    """epoll_wait, epoll_pwait2, poll and ppoll: an error goes to the caller, or another call is taken, never early; and
    the registrations stay."""
    poller: Any = make_poller(kind)
    poller.register(event.fileno(), IN)
    with monkeypatch.context() as patch:
        patch.setattr(syscalls.EpollBuffer, "wait", refusing(number))
        patch.setattr(syscalls.PollArray, "wait", refusing(number))
        if timeout_ns == MS:
            begin_ns = time.monotonic_ns()
            try:
                assert poller.wait(timeout_ns) == []
                assert time.monotonic_ns() - begin_ns >= timeout_ns
            except OSError as told:
                assert told.errno == number
        else:
            real = poller._poll
            if kind == "epoll":
                poller._poll = refusing(number)
            else:

                class Broken:
                    poll = staticmethod(refusing(number))

                poller._poll = Broken
            with pytest.raises(OSError) as caught:
                poller.wait(timeout_ns)
            assert caught.value.errno == number
            poller._poll = real
    event.set()
    assert poller.wait(timeout_ns) == [(event.fileno(), IN)]
    poller.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_poll_without_ppoll(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A strict profile: milliseconds, rounded up, and no second attempt."""
    attempts: list[int] = []

    def refuse(self: object, timeout_ns: int) -> int:
        attempts.append(timeout_ns)
        raise OSError(number, "no")

    monkeypatch.setattr(syscalls.PollArray, "wait", refuse)
    poller = PollPoller()
    begin_ns = time.monotonic_ns()
    for _ in range(2):
        assert poller.wait(100_000) == []
    assert time.monotonic_ns() - begin_ns >= 200_000 and attempts == [100_000]
    poller.close()


@pytest.mark.needs("io_uring")
@pytest.mark.parametrize("number", [*ABSENT, errno.EFAULT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENXIO])
@pytest.mark.parametrize("call", ["setup", "enter", "mmap"])
def test_io_uring_is_refused(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """By a profile, a sysctl, or for lack of something: an OSError that explains, no descriptor lost, and "auto" does
    not care."""
    if (call, number) == ("enter", errno.ENOMEM):
        return  # that may pass
    descriptors = len(os.listdir("/proc/self/fd"))
    if call == "setup":
        monkeypatch.setattr(ring, "io_uring_setup", refusing(number))
    elif call == "mmap":
        monkeypatch.setattr(ring.mmap, "mmap", refusing(number))
    else:
        monkeypatch.setattr(syscalls, "io_uring_enter", lambda *_: -number)
    with pytest.raises(OSError, match="no io_uring to poll with") as caught:
        make_poller("io_uring")
    assert caught.value.errno == number
    if number == errno.EPERM:
        assert "io_uring_disabled" in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    poller = make_poller()
    assert poller.name == "epoll"
    poller.close()


@pytest.mark.needs("io_uring")
def test_io_uring_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poll_ring, "_FEAT_RSRC_TAGS", 1 << 31)
    with pytest.raises(OSError, match=r"older than 5\.13") as caught:
        make_poller("io_uring")
    assert caught.value.errno == errno.ENOSYS


TRANSIENT = (errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EINTR, errno.ETIME)
HARD = (
    *(errno.EBADF, errno.EBADFD, errno.EBADR, errno.EEXIST, errno.EFAULT, errno.EINVAL),
    *(errno.ENXIO, errno.EOPNOTSUPP, errno.EOWNERDEAD, errno.EPERM, errno.ENOSYS),
)


@pytest.mark.needs("io_uring")
@pytest.mark.parametrize("number", TRANSIENT + HARD)
@pytest.mark.parametrize("timeout_ns", [0, MS, -1])
def test_enter_fails(monkeypatch: pytest.MonkeyPatch, event: LinuxEvent, timeout_ns: int, number: int) -> None:
    """For the lack of something it is tried again, by the next wait if need be; else the caller is told. No
    registration and no removal is lost."""
    poller, other = UringPoller(), LinuxEvent()
    removed = LinuxEvent()
    poller.register(event.fileno(), IN)
    poller.register(removed.fileno(), IN)
    assert poller.wait(0) == []
    failures = [number] * 3
    enter, enter_limited = syscalls.io_uring_enter, syscalls.EnterTimeout.enter

    def failing(real: Callable[..., int]) -> Callable[..., int]:
        return lambda *arguments: -failures.pop() if failures else real(*arguments)

    monkeypatch.setattr(syscalls, "io_uring_enter", failing(enter))
    monkeypatch.setattr(syscalls.EnterTimeout, "enter", failing(enter_limited))
    poller.unregister(removed.fileno())  # never fails for what the kernel says
    poller.register(other.fileno(), IN)
    failures[:] = [number] * 3
    for one in (event, other, removed):
        one.set()
    told = 0
    seen: set[tuple[int, int]] = set()
    for _ in range(10):
        try:
            seen.update(poller.wait(timeout_ns))
        except OSError as error:
            assert error.errno == number and number in HARD and "cannot be used" in str(error)
            told += 1
    assert seen == {(event.fileno(), IN), (other.fileno(), IN)}
    assert told == (3 if number in HARD else 0) and not failures
    assert removed.fileno() not in [one.fd for one in poller._in_kernel.values() if one.alive]
    for one in (event, other, removed):
        one.clear()
    assert poller.wait(0) == [] and poller.wait(MS) == []
    poller.close()
    for one in (other, removed):
        one.close()


@pytest.mark.needs("io_uring")
@pytest.mark.parametrize("fails", [True, False])
def test_part_of_a_submission(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """The kernel takes as many entries as it likes; the others go with the next call, be it in the same wait or not."""
    enter = syscalls.io_uring_enter
    turn = [0]

    def stingy(fd: int, to_submit: int, min_complete: int, flags: int) -> int:
        turn[0] += 1
        if fails and turn[0] % 3 == 0:
            return -errno.EAGAIN
        return enter(fd, min(to_submit, 3), min_complete if to_submit <= 3 else 0, flags)

    poller = UringPoller()
    monkeypatch.setattr(syscalls, "io_uring_enter", stingy)
    events = [LinuxEvent() for _ in range(300)]
    for one in events:
        poller.register(one.fileno(), IN)
        one.set()
    by_fd = {one.fileno(): one for one in events}
    while by_fd:
        for fd, mask in poller.wait(-1):
            assert mask == IN
            by_fd.pop(fd).clear()
    for one in events:
        poller.unregister(one.fileno())
        one.close()
    assert poller.wait(0) == []
    for _ in range(100):
        poller.wait(0)
    assert not poller._in_kernel and not poller._todo
    poller.close()


@pytest.mark.needs("io_uring")
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN, errno.ECANCELED, errno.EINVAL, errno.EIO])
def test_a_poll_fails(monkeypatch: pytest.MonkeyPatch, event: LinuxEvent, number: int) -> None:
    """A completion with an error: tried again if it may help; else the owner is told ERR, all the time."""
    poller = UringPoller()
    poller.register(event.fileno(), IN)
    event.set()
    reap = poll_ring.PollRing.reap

    def failing(self: poll_ring.PollRing) -> list[tuple[int, int]]:
        return [(name, 0x100000000 - number) for name, _ in reap(self)]

    lasting = number in (errno.EINVAL, errno.EIO)
    with monkeypatch.context() as patch:
        patch.setattr(poll_ring.PollRing, "reap", failing)
        for _ in range(2):
            assert poller.wait(0) == ([(event.fileno(), ERR)] if lasting else [])
    assert poller.wait(0) == [(event.fileno(), IN)]
    poller.unregister(event.fileno())
    assert poller.wait(0) == []
    poller.close()


@pytest.mark.needs("io_uring")
def test_a_quiet_ring_makes_no_system_call(monkeypatch: pytest.MonkeyPatch, event: LinuxEvent) -> None:
    poller = UringPoller()
    if not poller._ring.quiet:
        return  # a kernel before 5.19 does not tell
    poller.register(event.fileno(), IN)
    poller.wait(0)
    with monkeypatch.context() as patch:
        patch.setattr(syscalls, "io_uring_enter", lambda *_: pytest.fail("a system call"))
        assert poller.wait(0) == []
    event.set()
    assert poller.wait(0) == [(event.fileno(), IN)]
    poller.close()
