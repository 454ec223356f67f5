# SPDX-License-Identifier: Apache-2.0
"""Every system call of the engines fails, in turn, with every errno that its manual page lists.

The work of the contract tests (``contract/workload``) is done again and again; the first time the first call of the
kind fails, then the second, until all of it is done without a failure. Whatever fails: no request is lost, none
completes twice, nothing waits for ever, nothing is left behind, and what is said to be done is done. What the kernel
answers later, in a completion, fails in the same way.

``python -m tests.host.linux.test_syscall_faults`` prints the table of docs/testing.md.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

from bottomhalf.host.linux import LinuxHost, aio_ring, bounce, device, workers
from bottomhalf.host.linux import ring as ring_module
from bottomhalf.host.protocol import PERM_ALL, PERM_WRITE, Engine
from tests.host.contract.workload import WORK, Opened, check, close_files, do, make_engine, make_files, open_files
from tests.loop_devices import loop_device

PAGE = 4096
CALLS_MAX = 200  # no run makes more calls of a kind


class Call(NamedTuple):
    """A place where the kernel is called, for which work, and what its manual page says may come back."""

    engine: str
    where: Any
    name: str
    errnos: tuple[str, ...]
    work: str = "transfers ranges"
    returned: bool = False  # as a negative number; else it is raised


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# The manual pages' lists; beside them EPERM and ENOSYS where filters and old kernels say so.
EVENTFD = words("EINVAL EMFILE ENFILE ENODEV ENOMEM")
EVENTFD_READ = words("EAGAIN")
EVENTFD_WRITE = words("EAGAIN")
CLONE = words("EAGAIN")
MMAP = words("EACCES EAGAIN EBADF EEXIST EINVAL ENFILE ENODEV ENOMEM EOVERFLOW EPERM ETXTBSY")
SETUP = words("EACCES EFAULT EINVAL EMFILE ENFILE ENOMEM ENOSYS ENXIO EPERM")
REGISTER = words("EACCES EBADF EBADFD EBUSY EEXIST EFAULT EINVAL ENOMEM ENXIO EOPNOTSUPP EPERM")
ENTER = words(
    "EAGAIN EBADF EBADFD EBADR EBUSY EEXIST EFAULT EINTR EINVAL ENOMEM ENXIO EOPNOTSUPP EOWNERDEAD EPERM ETIME"
)
IO_SETUP = words("EAGAIN EFAULT EINVAL ENOMEM ENOSYS EPERM")
IO_SUBMIT = words("EAGAIN EBADF EFAULT EINTR EINVAL ENOSYS EPERM")
IO_GETEVENTS = words("EFAULT EINTR EINVAL ENOSYS")
IO_DESTROY = words("EFAULT EINVAL ENOSYS")
PREADV = words("EAGAIN EBADF EFAULT EINTR EINVAL EIO EISDIR ENXIO EOPNOTSUPP EOVERFLOW ESPIPE")
PWRITEV = words("EAGAIN EBADF EDQUOT EFAULT EFBIG EINTR EINVAL EIO ENOSPC EOPNOTSUPP EPERM EPIPE ESPIPE")
FDATASYNC = words("EBADF EDQUOT EINTR EINVAL EIO ENOSPC EROFS")
FALLOCATE = words(
    "EBADF EFBIG EFAULT EINTR EINVAL EIO ENODEV ENOSPC ENOSYS EOPNOTSUPP EPERM ESPIPE ETXTBSY"
)
FTRUNCATE = words("EACCES EBADF EFBIG EINTR EINVAL EIO EISDIR EPERM EROFS ETXTBSY")
COPY = words("EBADF EFBIG EINTR EINVAL EIO EISDIR ENOMEM ENOSPC ENOSYS EOPNOTSUPP EOVERFLOW EPERM ETXTBSY EXDEV")
LSEEK = words("EBADF EINVAL ENXIO EOVERFLOW ESPIPE")
IOCTL = words("EBADF EFAULT EINVAL EIO ENOTTY EOPNOTSUPP EPERM EROFS")

CALLS = (
    Call("io_uring", ring_module, "io_uring_setup", SETUP),
    Call("io_uring", ring_module, "io_uring_register_eventfd", REGISTER),
    Call("io_uring", ring_module, "io_uring_enter", ENTER, returned=True),
    Call("io_uring", mmap, "mmap", MMAP),
    Call("io_uring", os, "eventfd", EVENTFD),
    Call("io_uring", os, "eventfd_read", EVENTFD_READ),
    Call("io_uring", os, "eventfd_write", EVENTFD_WRITE, "errands"),
    Call("io_uring", threading.Thread, "start", CLONE, "errands"),
    Call("linux-aio", aio_ring, "io_setup", IO_SETUP),
    Call("linux-aio", aio_ring, "io_submit", IO_SUBMIT, returned=True),
    Call("linux-aio", aio_ring, "io_getevents", IO_GETEVENTS, returned=True),
    Call("linux-aio", aio_ring, "io_destroy", IO_DESTROY),
    Call("linux-aio", os, "eventfd", EVENTFD),
    Call("linux-aio", os, "eventfd_read", EVENTFD_READ),
    Call("linux-aio", os, "eventfd_write", EVENTFD_WRITE, "ranges"),
    Call("linux-aio", workers, "fallocate", FALLOCATE, "ranges"),
    Call("linux-aio", threading.Thread, "start", CLONE, "ranges"),
    Call("threads", os, "eventfd", EVENTFD),
    Call("threads", os, "eventfd_read", EVENTFD_READ),
    Call("threads", os, "eventfd_write", EVENTFD_WRITE, "ranges"),
    Call("threads", threading.Thread, "start", CLONE),
    Call("threads", os, "preadv", PREADV, "transfers"),
    Call("threads", os, "pwritev", PWRITEV, "transfers"),
    Call("threads", os, "fdatasync", FDATASYNC, "ranges"),
    Call("threads", workers, "fallocate", FALLOCATE, "ranges"),
    Call("threads", os, "copy_file_range", COPY, "errands"),
    Call("threads", os, "ftruncate", FTRUNCATE, "errands"),
    Call("threads", workers, "fallocate", FALLOCATE, "errands"),
    Call("threads", os, "fsync", FDATASYNC, "errands"),
    Call("threads", os, "pwrite", PWRITEV, "errands"),
    Call("threads", os, "lseek", LSEEK, "errands"),
    Call("inline", os, "preadv", PREADV, "transfers"),
    Call("inline", os, "pwritev", PWRITEV, "transfers"),
)
# What a completion says, by engine: of reads, writes, syncs and fallocate alike.
ANSWERS = (*sorted({*PREADV, *PWRITEV, *FDATASYNC}), "ECANCELED")
COMPLETIONS = (
    Call("io_uring", ring_module.Ring, "completions", tuple(sorted({*ANSWERS, *FALLOCATE}))),
    Call("linux-aio", aio_ring.AioRing, "completions", ANSWERS, "transfers"),
)

# What is about a request leaves the engine as it is, so one serves for all turns: to make a context of linux-aio, or
# sixteen threads, takes longer than to use them.
OF_A_REQUEST = words("completions copy_file_range fallocate fdatasync fsync ftruncate lseek preadv pwrite pwritev")


class Injected:
    """Makes the ``at``-th call, or the ``at``-th completion, fail."""

    def __init__(self, call: Call, number: int) -> None:
        self._call = call
        self._number = number
        self._real = getattr(call.where, call.name)
        self._lock = threading.Lock()
        self.at = 0
        self.calls = 0

    def replacement(self) -> Callable[..., Any]:
        return self._completions() if self._call.name == "completions" else self._failing()

    def _completions(self) -> Callable[..., Any]:
        def lie(ring: Any) -> tuple[list[int], list[int]]:
            slots, results = self._real(ring)
            for n in range(len(results)):
                self.calls += 1
                if self.calls == self.at:
                    results[n] = -self._number
            return slots, results

        return lie

    def _failing(self) -> Callable[..., Any]:
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
            if self._call.name == "eventfd_write":
                self._real(*arguments)  # it says EAGAIN because the counter is full, and so readable
            raise OSError(self._number, os.strerror(self._number))

        return fail_at


@pytest.fixture(scope="module")
def in_memory() -> Iterator[Path]:
    """A directory whose files are never on a disk: thousands of flushes of a disk take minutes."""
    with TemporaryDirectory(prefix="bottomhalf-test-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as made:
        yield Path(made)


def left_over() -> tuple[int, int]:
    """Open descriptors, and contexts of linux-aio (each is a mapping)."""
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum("[aio]" in line for line in maps)


def cases(calls: tuple[Call, ...]) -> list[Any]:
    """With O_DIRECT too where transfers are the work; the others are no different then, and inline there are none."""
    return [
        pytest.param(call, work, name, direct, id=f"{call.engine}-{call.name}-{work}-{name}{'-direct' * direct}")
        for call in calls
        for work in call.work.split()
        for name in call.errnos
        for direct in ((False, True) if work == "transfers" and call.engine != "inline" else (False,))
    ]


@pytest.mark.parametrize("call,work,number,direct", cases(CALLS + COMPLETIONS))
def test_in_turn(
    call: Call,
    work: str,
    number: str,
    direct: bool,
    tmp_path: Path,
    in_memory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not direct and call.engine != "inline":
        tmp_path = in_memory
    host = LinuxHost()
    make_files(tmp_path)
    try:
        opened = open_files(host, tmp_path, direct)
        make_engine(host, call.engine).close()
    except OSError as refused:
        pytest.skip(f"cannot be had here: {refused}")
    if call.name == "io_getevents":
        monkeypatch.setattr(aio_ring, "_readable", lambda *_: False)
    injected = Injected(call, getattr(errno, number))
    monkeypatch.setattr(call.where, call.name, injected.replacement())
    monkeypatch.setattr(bounce, "KEPT_BYTES_MAX", 0)
    kept = make_engine(host, call.engine) if call.name in OF_A_REQUEST else None
    before = left_over()
    for injected.at in range(1, CALLS_MAX):
        os.truncate(tmp_path / "sized", PAGE)
        injected.calls = 0
        run(call, work, getattr(errno, number), host, opened, tmp_path, kept)
        assert left_over() == before
        if injected.calls < injected.at:
            break
    else:
        pytest.fail("it never worked")
    if kept is not None:
        kept.close()
    monkeypatch.undo()
    close_files(opened)
    assert injected.at > 1 or (direct and call.engine == "io_uring" and call.name == "eventfd_read")


def run(
    call: Call, work: str, number: int, host: LinuxHost, opened: Opened, directory: Path, kept: Engine | None
) -> None:
    def allowed(failure: Exception) -> bool:
        if isinstance(failure, RuntimeError):  # the ring is lost, and says so
            return call.name == "io_uring_enter" and "cannot be used any more" in str(failure)
        return call.name == "mmap"

    try:
        engine = kept or make_engine(host, call.engine)
    except OSError as failure:
        assert failure.errno == number
        return
    requests = do(engine, WORK[work](opened), allowed)
    if kept is None:
        engine.close()
    check(requests, directory, {0, -number, -errno.EIO, -errno.ENOTSUP})


@pytest.mark.parametrize("engine", ["io_uring", "linux-aio", "threads"])
@pytest.mark.parametrize("number", IOCTL)
def test_ioctls_of_a_device(engine: str, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = LinuxHost()
    make_files(tmp_path)
    with loop_device(tmp_path / "disk") as path:
        try:
            host.engine(engine).close()
        except OSError as refused:
            pytest.skip(f"cannot be had here: {refused}")
        opened = open_files(host, tmp_path, False)._replace(file=host.open_file(path))
        call = Call(engine, device, "ioctl", (number,))
        injected = Injected(call, getattr(errno, number))
        monkeypatch.setattr(device, "ioctl", injected.replacement())
        before = left_over()
        for injected.at in range(1, CALLS_MAX):
            injected.calls = 0
            made = host.engine(engine)
            requests = do(made, WORK["ranges"](opened))
            made.close()
            for request in requests:
                assert request.result in (0, -getattr(errno, number), -errno.ENOTSUP), request
            assert left_over() == before
            if injected.calls < injected.at:
                break
        assert injected.at > 2
        monkeypatch.undo()
        close_files(opened)


REOPENING = (
    (os, "open", words("EACCES EBUSY EDQUOT EINTR EINVAL EISDIR ELOOP EMFILE ENAMETOOLONG ENFILE ENODEV ENOMEM")),
    (os, "open", words("ENOSPC ENOTDIR ENXIO EOPNOTSUPP EOVERFLOW EPERM EROFS ETXTBSY")),
    (os, "dup2", words("EBADF EBUSY EINTR EMFILE")),
)


@pytest.mark.parametrize(
    "where,name,number", [(where, name, each) for where, name, listed in REOPENING for each in listed]
)
def test_opening_in_another_way(
    where: Any, name: str, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read-only and back: what fails has changed nothing, locks included."""
    make_files(tmp_path)
    host = LinuxHost()
    file, other = (host.open_file(str(tmp_path / "disk"), read_only=True, locking="on") for _ in range(2))
    file.set_permissions(PERM_WRITE, PERM_ALL & ~PERM_WRITE)
    injected = Injected(Call("", where, name, ()), getattr(errno, number))
    injected.at = 1
    before = left_over()
    with monkeypatch.context() as patched:
        patched.setattr(where, name, injected.replacement())
        with pytest.raises(OSError) as caught:
            file.set_read_only(False)
    assert caught.value.errno == getattr(errno, number)
    assert file.read_only and left_over() == before and file.pread(4, 0) == b"rrrr"
    with pytest.raises(OSError, match="lock"):
        other.set_permissions(PERM_WRITE, PERM_ALL)
    file.set_read_only(False)
    assert os.pwrite(file.fileno(), b"w", 0) == 1
    file.close()
    other.close()


def table() -> str:
    """What is tried, for docs/testing.md."""
    rows: dict[str, tuple[list[str], tuple[str, ...]]] = {}
    names = {
        "start": "clone (a thread)",
        "completions": "(completions)",
        "io_uring_register_eventfd": "io_uring_register",
    }
    for call in (*CALLS, *COMPLETIONS):
        name = names.get(call.name, call.name)
        name = f"{name} of {call.engine}" if call.name == "completions" else name
        engines, _ = rows.setdefault(name, ([], call.errnos))
        if call.engine not in engines:
            engines.append(call.engine)
    rows["ioctl (BLK*)"] = (["io_uring", "linux-aio", "threads"], IOCTL)
    rows["open, again"] = (["(files)"], (*REOPENING[0][2], *REOPENING[1][2]))
    rows["dup2"] = (["(files)"], REOPENING[2][2])
    lines = ["| call | engine | errnos |", "|---|---|---|"]
    for name, (engines, errnos) in rows.items():
        lines.append(f"| {name} | {', '.join(engines)} | {', '.join(errnos)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
