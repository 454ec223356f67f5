# SPDX-License-Identifier: Apache-2.0
"""What the kernel says and what a request's owner hears, with one set of tests for every engine.

The kernel's unusual answers cannot be had on demand, so they are put in its mouth where all its answers arrive.
The simulated engine joins in what does not depend on that.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bottomhalf.host.linux import LinuxHost, job, linux_aio, ring_engine, workers
from bottomhalf.host.linux import ring as ring_module
from bottomhalf.host.linux.file import LinuxFile
from bottomhalf.host.linux.job import Job
from bottomhalf.host.linux.ring import ENTRIES
from bottomhalf.host.linux.ring_engine import RingEngine
from bottomhalf.host.linux.thread_engine import ThreadEngine
from bottomhalf.host.linux.workers import WORKERS_MAX
from bottomhalf.host.protocol import Engine
from bottomhalf.host.request import DISCARD, FLUSH, FUA, MAY_UNMAP, OP_NAMES, READ, WRITE, WRITE_ZEROES, Request
from bottomhalf.host.sim import SimHost
from tests.host.contract.conftest import Place

PAGE = 4096
SHM = Path("/dev/shm")
Answers = Callable[..., list[int]]


@pytest.fixture(params=["linux", "linux-threads", "linux-aio", "sim"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    made = Place(request.param, tmp_path)
    yield made
    made.close()


@pytest.fixture(params=["linux", "linux-threads", "linux-aio"])
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    made = Place(request.param, tmp_path)
    yield made
    made.close()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """``answers(op, -EINTR, 100)``: what the kernel answers to the next operations of that kind; the result is
    the list of what it would have said."""
    wanted: list[tuple[int, int]] = []
    really: list[int] = []
    step = Job._step

    def lying_step(job: Job, result: int) -> bool:
        for n, (op, instead) in enumerate(wanted):
            if op == job.request.op:
                really.append(result)
                del wanted[n]
                return step(job, instead)
        return step(job, result)

    monkeypatch.setattr(Job, "_step", lying_step)

    def answer(op: int, *instead: int) -> list[int]:
        wanted.extend((op, one) for one in instead)
        return really

    return answer


def buffer(count: int, fill: bytes = b"j") -> memoryview:
    return memoryview(bytearray(fill * count))


def carry_out(place: Place, path: str, *requests: Request, direct: bool = False) -> Engine:
    """Do the requests, one entry for all, and wait for them."""
    file, engine = place.open(path, direct=direct), place.engine()
    for request in requests:
        engine.prepare(file, request)
    engine.enter()
    done = place.complete(engine)
    assert sorted(map(id, done)) == sorted(map(id, requests))
    assert engine.in_flight == 0 and not engine.pending and engine.reap() == []
    return engine


@pytest.mark.parametrize("start", [0, 900, 1000, 1 << 40])
def test_reads_beyond_the_end_are_zero_filled(place: Place, start: int) -> None:
    path = place.file("a", b"x" * 1000)
    request = Request(READ, start, 300, buffer(300))
    carry_out(place, path, request)
    there = max(0, min(300, 1000 - start))
    assert request.result == 0 and request.buffer == b"x" * there + bytes(300 - there)


def test_empty_requests(place: Place) -> None:
    path = place.file("a", b"x" * 1000)
    requests = [Request(READ, 10, 0, buffer(0)), Request(WRITE, 10, 0, buffer(0))]
    carry_out(place, path, *requests)
    assert [request.result for request in requests] in ([0, 0], [0, -errno.ENOSPC])


@pytest.mark.parametrize("count", [1, 2, ENTRIES, ENTRIES + 1, 4 * ENTRIES])
def test_more_requests_than_entries(place: Place, count: int) -> None:
    """T78: what does not fit waits its turn, in one entry or many."""
    path = place.file("a", count * 512)
    file, engine = place.open(path), place.engine()
    requests = [Request(WRITE, n * 512, 512, buffer(512, bytes([n % 251 + 1]))) for n in range(count)]
    done: list[Request] = []
    for n, request in enumerate(requests):
        engine.prepare(file, request)
        if n % 100 == 99:
            engine.enter()
        if n % 500 == 499:
            done += engine.reap()
    engine.enter()
    done += place.complete(engine)
    assert sorted(map(id, done)) == sorted(map(id, requests))
    assert all(request.result == 0 for request in requests)
    whole = Request(READ, 0, count * 512, buffer(count * 512))
    engine.prepare(file, whole)
    engine.enter()
    place.complete(engine)
    assert bytes(whole.buffer) == b"".join(bytes(request.buffer) for request in requests)


def test_errors_belong_to_their_requests(place: Place) -> None:
    """T74, T77: a bad descriptor in the middle of a batch harms nobody else."""
    path = place.file("a", b"x" * PAGE)
    good, engine = place.open(path), place.engine()
    bad = place.host.open_file(path, read_only=True)
    requests = [Request(WRITE, n * 512, 512, buffer(512, b"w")) for n in range(8)]
    for n, request in enumerate(requests):
        engine.prepare(bad if n % 3 == 1 else good, request)
    engine.enter()
    place.complete(engine)
    for n, request in enumerate(requests):
        assert (request.result < 0) == (n % 3 == 1), n
    bad.close()


def test_close_waits(place: Place) -> None:
    """With requests in flight, waiting for their turn, and not even entered."""
    path = place.file("a", 1 << 20)
    file, engine = place.open(path), place.host.engine(place.engine_kind)
    requests = [Request(WRITE, n * 512, 512, buffer(512, b"w")) for n in range(2 * ENTRIES)]
    for request in requests[:-10]:
        engine.prepare(file, request)
    engine.enter()
    for request in requests[-10:]:
        engine.prepare(file, request)
    engine.close()
    assert all(request.result == 0 for request in requests)
    engine.close() if isinstance(place.host, SimHost) else None


def test_addresses_are_found_out_each_time(real: Place) -> None:
    """A pooled request that comes back with another buffer must not carry the old one's address."""
    path = real.file("a", b"1" * 512 + b"2" * 512)
    first, second = buffer(512), buffer(512)
    request = Request(READ, 0, 512, first)
    carry_out(real, path, request)
    request.offset, request.buffer, request.result = 512, second, 1
    carry_out(real, path, request)
    assert (first, second) == (b"1" * 512, b"2" * 512) and request.address == 0


def test_read_only_buffers(real: Place) -> None:
    """bytes have no address that may be had: they are copied."""
    path = real.file("a", PAGE)
    carry_out(real, path, Request(WRITE, 0, 5, memoryview(b"bytes")))
    assert Path(path).read_bytes()[:5] == b"bytes"


@pytest.mark.parametrize("op", range(5))
@pytest.mark.parametrize("answer", [-errno.EINTR, -errno.EAGAIN])
def test_retries(real: Place, answers: Answers, op: int, answer: int) -> None:
    """T76"""
    path = real.file("a", b"x" * PAGE)
    request = Request(op, 0, PAGE, buffer(PAGE, b"w") if op <= WRITE else None)
    said = answers(op, answer, answer)
    carry_out(real, path, request)
    assert request.result in (0, -errno.ENOTSUP) and len(said) == 2
    if op == READ:
        assert request.buffer == b"x" * PAGE


@pytest.mark.parametrize("parts", [(1,), (100, 200, 300), (PAGE - 1,)])
def test_short_transfers_go_on(real: Place, answers: Answers, parts: tuple[int, ...]) -> None:
    """T76: at the right place, until all is there."""
    content = bytes(range(256)) * 16
    path = real.file("a", content)
    read = Request(READ, 0, PAGE, buffer(PAGE))
    answers(READ, *parts)
    carry_out(real, path, read)
    assert read.result == 0 and read.buffer == content
    write = Request(WRITE, 0, PAGE, memoryview(bytearray(reversed(content))))
    answers(WRITE, *parts)
    carry_out(real, path, write)
    assert write.result == 0 and Path(path).read_bytes() == content[::-1]


def test_short_transfers_by_the_kernel(real: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same when no more than so many bytes really move at a time."""
    for module in (ring_engine, linux_aio, job):
        monkeypatch.setattr(module, "OPERATION_BYTES_MAX", 700)
    preadv, pwritev = os.preadv, os.pwritev
    if real.engine_kind == "threads":
        monkeypatch.setattr(workers.os, "preadv", lambda fd, b, offset: preadv(fd, [b[0][:700]], offset))
        monkeypatch.setattr(workers.os, "pwritev", lambda fd, b, *rest: pwritev(fd, [b[0][:700]], *rest))
    content = bytes(range(256)) * 16
    path = real.file("a", PAGE)
    carry_out(real, path, Request(WRITE, 0, PAGE, memoryview(content)))
    assert Path(path).read_bytes() == content
    read = Request(READ, 100, PAGE, buffer(PAGE))
    carry_out(real, path, read)
    assert read.result == 0 and read.buffer == content[100:] + bytes(100)


def test_disk_full(real: Place, answers: Answers) -> None:
    """A write that gets no further is ENOSPC, after however many bytes; other errors are what they are."""
    path = real.file("a", PAGE)
    for said, expected in (
        ((0,), errno.ENOSPC),
        ((100, 0), errno.ENOSPC),
        ((100, -errno.ENOSPC), errno.ENOSPC),
        ((-errno.EIO,), errno.EIO),
        ((100, -errno.EIO), errno.EIO),
        ((-errno.EDQUOT,), errno.EDQUOT),
    ):
        request = Request(WRITE, 0, 512, buffer(512))
        answers(WRITE, *said)
        carry_out(real, path, request)
        assert request.result == -expected, said


@pytest.mark.parametrize("op", range(5))
def test_errors(place: Place, answers: Answers, op: int) -> None:
    path = place.file("a", b"x" * PAGE)
    request = Request(op, 0, 512, buffer(512) if op <= WRITE else None)
    other = Request(READ, 512, 512, buffer(512))
    if isinstance(place.host, SimHost):
        place.host.fault(path=path, op=op, errno=errno.EIO, times=1)
    else:
        answers(op, -errno.EIO)
    carry_out(place, path, request, other)
    results = [request.result, other.result]
    assert sorted(results) == [-errno.EIO, 0] and (op == READ or results[1] == 0), OP_NAMES[op]


def test_real_limit(real: Place) -> None:
    """A write across the limit of a file's size: a short one by the kernel, then its refusal."""
    path = real.file("a", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, before[1]))
    try:
        request = Request(WRITE, PAGE - 512, 1024, buffer(1024, b"w"))
        carry_out(real, path, request)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert request.result == -errno.EFBIG
    assert os.path.getsize(path) == PAGE


@pytest.mark.parametrize("op", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize("said", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV, errno.ENOSYS])
def test_fallocate_refused(real: Place, answers: Answers, op: int, said: int) -> None:
    """The block layer falls back on ENOTSUP, and only on that; it comes when every way was refused."""
    path = real.file("a", b"x" * PAGE)
    for flags in (0, MAY_UNMAP, FUA):
        ways = 1 if op == DISCARD else 3 if flags & MAY_UNMAP else 2
        request = Request(op, 0, PAGE, flags=flags)
        asked = answers(op, *[-said] * ways)
        carry_out(real, path, request)
        assert request.result == -errno.ENOTSUP and len(asked) == ways
        asked.clear()
    answers(op, -errno.EIO)
    request = Request(op, 0, PAGE)
    carry_out(real, path, request)
    assert request.result == -errno.EIO


@pytest.mark.parametrize("flags,refused", [(0, 1), (FUA, 1), (MAY_UNMAP, 1), (MAY_UNMAP, 2), (MAY_UNMAP | FUA, 2)])
def test_other_ways_to_zeroes(real: Place, monkeypatch: pytest.MonkeyPatch, flags: int, refused: int) -> None:
    """What a file system refuses is done in another way: tmpfs knows holes and no ZERO_RANGE."""
    path = str(SHM / f"bottomhalf-test-{os.getpid()}")
    try:
        Path(path).write_bytes(b"x" * 4 * PAGE)
        if refused == 2:
            monkeypatch.setattr(job, "_PUNCH", 0x40)  # no mode of any kernel
            monkeypatch.setattr(job, "_ZERO_RUNGS", ((16,), (3, 0)))
        request = Request(WRITE_ZEROES, PAGE, 2 * PAGE, flags=flags)
        carry_out(real, path, request)
        assert request.result == 0
        assert Path(path).read_bytes() == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE
        assert os.stat(path).st_blocks * 512 == (2 if flags & MAY_UNMAP and refused == 1 else 4) * PAGE
        beyond = Request(WRITE_ZEROES, 3 * PAGE, 3 * PAGE, flags=flags & ~MAY_UNMAP)
        carry_out(real, path, beyond)
        assert beyond.result == 0 and os.stat(path).st_size == 6 * PAGE
    finally:
        os.unlink(path)


def test_zeroing(real: Place) -> None:
    """Zeroes are zeroes, with their space or without; a discard does not change the size."""
    path = real.file("a", b"x" * 4 * PAGE)
    requests = [
        Request(WRITE_ZEROES, 0, PAGE),
        Request(WRITE_ZEROES, PAGE, PAGE, flags=MAY_UNMAP),
        Request(DISCARD, 3 * PAGE, 2 * PAGE),
    ]
    carry_out(real, path, *requests)
    if any(request.result == -errno.ENOTSUP for request in requests):
        pytest.skip("the file system here has no fallocate")
    assert Path(path).read_bytes() == bytes(2 * PAGE) + b"x" * PAGE + bytes(PAGE)


def test_durable_writes(real: Place) -> None:
    path = real.file("a", PAGE)
    requests = [Request(WRITE, 0, 512, buffer(512, b"d"), FUA), Request(FLUSH)]
    carry_out(real, path, *requests)
    assert [request.result for request in requests] == [0, 0]


def open_direct(place: Place, path: str) -> LinuxFile:
    try:
        file = place.open(path, direct=True)
    except OSError as error:
        pytest.skip(f"the file system here has no O_DIRECT: {error}")
    assert isinstance(file, LinuxFile)
    return file


@pytest.mark.parametrize("shift", [0, 1, 512])
def test_direct_with_unaligned_memory(real: Place, shift: int) -> None:
    """O_DIRECT wants aligned memory; what is not is copied through some that is."""
    content = os.urandom(4 * PAGE)
    path = real.file("a", content)
    file, engine = open_direct(real, path), real.engine()
    arena = real.host.arena(8 * PAGE)
    read = Request(READ, PAGE, 2 * PAGE, arena.view[shift : shift + 2 * PAGE])
    engine.prepare(file, read)
    engine.enter()
    real.complete(engine)
    assert read.result == 0 and read.buffer == content[PAGE : 3 * PAGE]
    read.buffer[:] = b"w" * 2 * PAGE
    write = Request(WRITE, 0, 2 * PAGE, read.buffer)
    engine.prepare(file, write)
    engine.enter()
    real.complete(engine)
    assert write.result == 0
    assert Path(path).read_bytes() == b"w" * 2 * PAGE + content[2 * PAGE :]


def test_direct_read_across_the_end(real: Place) -> None:
    """The size is no multiple of the alignment: the rest is zeroes."""
    path = real.file("a", b"x" * (PAGE + 100))
    file, engine = open_direct(real, path), real.engine()
    request = Request(READ, 0, 2 * PAGE, real.host.arena(2 * PAGE).view)
    engine.prepare(file, request)
    engine.enter()
    real.complete(engine)
    assert request.result == 0 and request.buffer == b"x" * (PAGE + 100) + bytes(PAGE - 100)


def test_file_closed_meanwhile(real: Place, answers: Answers) -> None:
    """Nobody should do that. The error that comes of it is the request's alone."""
    path = real.file("a", b"x" * PAGE)
    file, other, engine = real.host.open_file(path), real.open(path), real.engine()
    requests = [Request(READ, 0, PAGE, buffer(PAGE)) for _ in range(3)]
    answers(READ, 100, 100)  # now the size of the file matters
    engine.prepare(file, requests[0])
    engine.prepare(file, requests[1])
    file.close()
    engine.prepare(other, requests[2])
    engine.enter()
    assert len(real.complete(engine)) == 3
    assert requests[2].result == 0
    assert all(request.result < 0 for request in requests[:2])  # which error depends on who got the number since


def test_prepare_that_fails(real: Place) -> None:
    """Nothing is in flight that nobody will finish."""
    file, engine = real.open(real.file("a", PAGE)), real.engine()
    with pytest.raises((TypeError, AttributeError)):
        engine.prepare(file, Request(READ, 0, 10, None))
    assert engine.in_flight == 0


def test_after_fork(real: Place) -> None:
    """An engine that was made before a fork is of no use in the child, and says so."""
    file, engine = real.open(real.file("a", PAGE)), real.engine()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        verdict = b"silence"
        try:
            engine.prepare(file, Request(READ, 0, 10, buffer(10)))
            engine.enter()
        except RuntimeError as error:
            verdict = str(error).encode()
        finally:
            os.write(write_end, verdict)
            os._exit(0)
    os.close(write_end)
    verdict = os.read(read_end, 1000)
    os.close(read_end)
    os.waitpid(pid, 0)
    assert b"make engines after fork" in verdict
    carry_out(real, real.path("a"), Request(READ, 0, 10, buffer(10)))


def test_descriptors_are_given_back(real: Place) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    path = real.file("a", PAGE)
    before = count()
    for _ in range(3):
        engine = real.host.engine(real.engine_kind)
        file = real.host.open_file(path)
        engine.prepare(file, Request(READ, 0, 10, buffer(10)))
        engine.enter()
        engine.close()
        file.close()
    assert count() == before


def test_workers_are_bounded(tmp_path: Path) -> None:
    place = Place("linux-threads", tmp_path)
    engine = carry_out(place, place.file("a", PAGE), *[Request(READ, 0, 10, buffer(10)) for _ in range(200)])
    assert isinstance(engine, ThreadEngine) and len(engine._workers.threads) == WORKERS_MAX
    place.close()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.ENOMEM])
def test_io_uring_refused(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A container's profile, an old kernel: "auto" takes threads, whoever asks by name hears why."""

    def refuse(entries: int, params: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ring_module, "io_uring_setup", refuse)
    host = LinuxHost()
    engine = host.engine()
    assert isinstance(engine, ThreadEngine) and engine.name == "threads"
    engine.close()
    with pytest.raises(OSError) as caught:
        host.engine("io_uring")
    assert caught.value.errno == number
    with pytest.raises(ValueError, match="io_uring, linux-aio or threads"):
        host.engine("native")


@pytest.mark.needs("io_uring")
def test_old_flags_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kernel that does not know the newest set-up flags gets the same ring without them."""
    setup = ring_module.io_uring_setup
    asked: list[int] = []

    def old_kernel(entries: int, params) -> int:  # type: ignore[no-untyped-def]
        flags = int.from_bytes(params.raw[8:12], "little")
        asked.append(flags)
        if len(asked) < 3:
            raise OSError(errno.EINVAL, "flags")
        return setup(entries, params)

    monkeypatch.setattr(ring_module, "io_uring_setup", old_kernel)
    place = Place("linux", tmp_path)
    engine = place.host.engine()
    assert isinstance(engine, RingEngine)
    assert len(asked) == 3 and asked[0] > asked[1] > asked[2]
    file = place.open(place.file("a", b"x" * PAGE))
    requests = [Request(READ, 0, PAGE, buffer(PAGE)) for _ in range(10)]
    for request in requests:
        engine.prepare(file, request)
    engine.enter()
    assert len(place.complete(engine)) == 10 and all(request.buffer == b"x" * PAGE for request in requests)
    engine.close()
    place.close()


@pytest.mark.needs("io_uring")
def test_stops_at_a_bad_entry(tmp_path: Path) -> None:
    """T74: the kernel stops submitting at an entry that it does not like; the others go on in the same call."""
    place = Place("linux", tmp_path)
    engine = place.engine()
    assert isinstance(engine, RingEngine)
    file = place.open(place.file("a", b"x" * PAGE))
    requests = [Request(READ, 0, PAGE, buffer(PAGE)) for _ in range(5)]
    push = engine._ring.push
    pushed: list[int] = []

    def push_nonsense(slot: int, opcode: int, *rest: int) -> None:
        pushed.append(slot)
        push(slot, 255 if len(pushed) in (1, 3) else opcode, *rest)

    engine._ring.push = push_nonsense  # type: ignore[method-assign]
    for request in requests:
        engine.prepare(file, request)
    engine.enter()
    assert engine._ring.unsubmitted == 0
    place.complete(engine)
    assert [request.result for request in requests] == [-errno.EINVAL, 0, -errno.EINVAL, 0, 0]
    place.close()
