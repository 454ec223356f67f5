# SPDX-License-Identifier: Apache-2.0
"""Every system call of the engines fails, in turn, with every errno that its manual page lists.

The same work is done again and again; the first time the first call of the kind fails, then the second, until all of it
is done without a failure. Whatever fails: no request is lost, none completes twice, nothing waits for ever, nothing is
left behind. (The limit of a wait is there for a broken engine; no good one reaches it.)
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bottomhalf.host.linux import LinuxHost, aio_ring, bounce, workers
from bottomhalf.host.linux import ring as ring_module
from bottomhalf.host.linux.file import LinuxFile
from bottomhalf.host.protocol import Engine
from bottomhalf.host.request import DISCARD, FLUSH, FUA, IN_PROGRESS, MAY_UNMAP, READ, WRITE, WRITE_ZEROES, Request

PAGE = 4096
PAGES = 64  # the first half of the file is read, the second is written
CALLS_MAX = 200  # no run makes more calls of a kind
HANG_MS = 20_000


class Call(NamedTuple):
    """A place where the kernel is called, and what its manual page says may come back."""

    engine: str
    where: Any
    name: str
    errnos: tuple[str, ...]
    returned: bool = False  # as a negative number; else it is raised


_BAD_ADDRESS = ("EFAULT", "EINVAL")
CALLS = (
    Call("io_uring", ring_module, "io_uring_setup", (*_BAD_ADDRESS, "EMFILE", "ENFILE", "ENOMEM", "EPERM", "ENOSYS")),
    Call("io_uring", ring_module, "io_uring_register_eventfd", ("EBADF", "EBUSY", *_BAD_ADDRESS, "ENOMEM", "EPERM")),
    Call(
        "io_uring",
        ring_module,
        "io_uring_enter",
        (
            *("EAGAIN", "EBADF", "EBADFD", "EBADR", "EBUSY", "EEXIST", "EINTR", "ENOMEM", "ENXIO"),
            *("EOPNOTSUPP", "EOWNERDEAD", *_BAD_ADDRESS),
        ),
        returned=True,
    ),
    Call("io_uring", mmap, "mmap", ("EACCES", "EAGAIN", "ENOMEM", "EPERM")),
    Call("io_uring", os, "eventfd", ("EINVAL", "EMFILE", "ENFILE", "ENODEV", "ENOMEM")),
    Call("io_uring", os, "eventfd_read", ("EAGAIN",)),
    Call("linux-aio", aio_ring, "io_setup", ("EAGAIN", *_BAD_ADDRESS, "ENOMEM", "ENOSYS", "EPERM")),
    Call("linux-aio", aio_ring, "io_submit", ("EAGAIN", "EBADF", *_BAD_ADDRESS, "ENOSYS", "EINTR"), returned=True),
    Call("linux-aio", aio_ring, "io_getevents", (*_BAD_ADDRESS, "EINTR", "ENOSYS"), returned=True),
    Call("linux-aio", aio_ring, "io_destroy", (*_BAD_ADDRESS, "ENOSYS")),
    Call("linux-aio", os, "eventfd", ("EINVAL", "EMFILE", "ENFILE", "ENODEV", "ENOMEM")),
    Call("linux-aio", os, "eventfd_read", ("EAGAIN",)),
    Call("linux-aio", workers, "fallocate", ("EBADF", "EFBIG", "EINTR", "EIO", "ENODEV", "ENOSPC", "EOPNOTSUPP")),
    Call("threads", os, "eventfd", ("EINVAL", "EMFILE", "ENFILE", "ENODEV", "ENOMEM")),
    Call("threads", os, "eventfd_read", ("EAGAIN",)),
    Call("threads", os, "preadv", ("EAGAIN", "EBADF", *_BAD_ADDRESS, "EINTR", "EIO", "EISDIR", "EOPNOTSUPP")),
    Call(
        "threads",
        os,
        "pwritev",
        ("EAGAIN", "EBADF", "EDQUOT", *_BAD_ADDRESS, "EFBIG", "EINTR", "EIO", "ENOSPC", "EPERM", "EOPNOTSUPP"),
    ),
    Call("threads", os, "fdatasync", ("EBADF", "EINTR", "EIO", "ENOSPC", "EROFS", "EINVAL", "EDQUOT")),
    Call(
        "threads",
        workers,
        "fallocate",
        ("EBADF", "EFBIG", "EINTR", "EINVAL", "EIO", "ENODEV", "ENOSPC", "ENOSYS", "EOPNOTSUPP", "EPERM", "ETXTBSY"),
    ),
    Call("threads", threading.Thread, "start", ("EAGAIN",)),
)


class Injected:
    """Makes the ``at``-th call fail."""

    def __init__(self, call: Call, number: int) -> None:
        self._call = call
        self._number = number
        self._real = getattr(call.where, call.name)
        self._lock = threading.Lock()
        self.at = 0
        self.calls = 0

    def replacement(self) -> Callable[..., Any]:
        def fail_at(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                self.calls += 1
                strikes = self.calls == self.at
            if not strikes:
                return self._real(*arguments, **named)
            if self._call.name == "io_uring_enter" and self._number in (errno.EBADF, errno.EOPNOTSUPP):
                os.close(arguments[0])  # what they mean has to be so: the engine does not close it again
            if self._call.name == "io_destroy":
                self._real(*arguments)  # the context has gone already
            if self._call.returned:
                return -self._number
            if self._call.name == "start":
                raise RuntimeError("can't start new thread")
            raise OSError(self._number, os.strerror(self._number))

        return fail_at


def work(engine: Engine, file: LinuxFile, allowed: Callable[[Exception], bool]) -> list[Request]:
    """Some of everything, in batches; every request comes back once."""
    half = PAGES // 2
    requests = [Request(READ, n * PAGE, PAGE, memoryview(bytearray(PAGE))) for n in range(10)]
    requests += [
        Request(WRITE, (half + n) * PAGE, PAGE, memoryview(bytearray(b"w" * PAGE)), FUA if n % 4 == 0 else 0)
        for n in range(10)
    ]
    requests += [Request(FLUSH), Request(DISCARD, 60 * PAGE, PAGE), Request(FLUSH)]
    requests += [
        Request(WRITE_ZEROES, 61 * PAGE, PAGE, flags=FUA),
        Request(WRITE_ZEROES, 62 * PAGE, PAGE, flags=MAY_UNMAP),
    ]
    done: list[Request] = []
    for n, request in enumerate(requests):
        try:
            engine.prepare(file, request)
        except OSError as failure:
            assert allowed(failure), failure
            request.result = -failure.errno
            done.append(request)
        if n % 7 == 6:
            attempt(engine.enter, allowed)
    attempt(engine.enter, allowed)
    poll = select.poll()
    poll.register(engine.fileno(), select.POLLIN)
    while engine.in_flight:
        assert engine.pending or poll.poll(HANG_MS), f"{engine.in_flight} requests hang"
        done += engine.reap()
    assert sorted(map(id, done)) == sorted(map(id, requests))
    assert engine.reap() == []
    return requests


def attempt(call: Callable[[], Any], allowed: Callable[[Exception], bool]) -> Any:
    try:
        return call()
    except (OSError, RuntimeError) as failure:
        assert allowed(failure), failure


def left_over() -> tuple[int, int]:
    """Open descriptors, and contexts of linux-aio (each is a mapping)."""
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum("[aio]" in line for line in maps)


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize(
    "call,number",
    [pytest.param(call, name, id=f"{call.engine}-{call.name}-{name}") for call in CALLS for name in call.errnos],
)
def test_in_turn(call: Call, number: str, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, number_ = tmp_path / "disk", getattr(errno, number)
    path.write_bytes(b"r" * PAGES * PAGE)
    host = LinuxHost()
    try:
        file = host.open_file(str(path), direct=direct)
        host.engine(call.engine).close()
    except OSError as refused:
        pytest.skip(f"cannot be had here: {refused}")
    if call.name == "io_getevents":
        monkeypatch.setattr(aio_ring, "_readable", lambda *_: False)
    injected = Injected(call, number_)
    monkeypatch.setattr(call.where, call.name, injected.replacement())
    monkeypatch.setattr(bounce, "KEPT_BYTES_MAX", 0)
    before = left_over()
    for injected.at in range(1, CALLS_MAX):
        injected.calls = 0
        run(call, number_, host, file)
        assert left_over() == before
        if injected.calls < injected.at:
            break
    else:
        pytest.fail("it never worked")
    monkeypatch.undo()
    file.close()
    assert injected.at > 1 and path.read_bytes()[: PAGE * PAGES // 2] == b"r" * (PAGE * PAGES // 2)


def run(call: Call, number: int, host: LinuxHost, file: LinuxFile) -> None:
    def allowed(failure: Exception) -> bool:
        if isinstance(failure, RuntimeError):  # the ring is lost, and says so
            return call.name == "io_uring_enter" and "cannot be used any more" in str(failure)
        return call.name == "mmap"

    try:
        engine = host.engine(call.engine)
    except OSError as failure:
        assert failure.errno == number
        return
    requests = work(engine, file, allowed)
    for request in requests:
        assert request.result != IN_PROGRESS
        assert request.result in (0, -number, -errno.EIO, -errno.ENOTSUP), request
        if request.op == READ and request.result == 0:
            assert request.buffer == b"r" * PAGE
        if request.op == WRITE and request.result == 0:
            assert os.pread(file.fileno(), PAGE, request.offset) == b"w" * PAGE if not file.direct else True
    engine.close()
