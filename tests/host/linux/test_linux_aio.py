# SPDX-License-Identifier: Apache-2.0
"""linux-aio by itself: what io_submit may do to a batch, the completion ring, contexts.

What every engine promises is in ``test_engines`` and in the contract tests; here stands what only this one can get
wrong. Where the kernel cannot be brought to it, the answer of the system call is put in its place.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.host.linux import LinuxHost, aio_ring
from bottomhalf.host.linux.aio_ring import AIO_ENTRIES
from bottomhalf.host.linux.linux_aio import LinuxAioEngine
from bottomhalf.host.protocol import File
from bottomhalf.host.request import DISCARD, FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Request

pytestmark = pytest.mark.needs("linux-aio")

PAGE = 4096
HANG_MS = 20_000  # a broken engine waits so long; no good one does


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[File]:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 64 * PAGE)
    host = LinuxHost()
    try:
        LinuxAioEngine().close()
        file: File = host.open_file(str(path), direct=True)
    except OSError as error:
        pytest.skip(f"no linux-aio with O_DIRECT here: {error}")
    yield file
    file.close()


@pytest.fixture
def engine(disk: File) -> Iterator[LinuxAioEngine]:
    made = LinuxAioEngine()
    yield made
    made.close()


def page(fill: bytes = b"j") -> memoryview:
    return memoryview(bytearray(fill * PAGE))


def reads(count: int) -> list[Request]:
    return [Request(READ, n % 64 * PAGE, PAGE, page()) for n in range(count)]


def prepare(engine: LinuxAioEngine, file: File, requests: list[Request]) -> None:
    for request in requests:
        engine.prepare(file, request)


def complete(engine: LinuxAioEngine) -> list[Request]:
    """As a loop would: woken by the descriptor, or because it is pending."""
    poll = select.poll()
    poll.register(engine.fileno(), select.POLLIN)
    done: list[Request] = []
    while engine.in_flight:
        assert engine.pending or poll.poll(HANG_MS), f"{engine.in_flight} requests hang"
        done += engine.reap()
    assert len(done) == len({id(request) for request in done})
    return done


class Submits:
    """Stands before io_submit: ``answer(call, count)`` is how many to pass on, or a negative errno."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Callable[[int, int], int]) -> None:
        real = aio_ring.io_submit
        self.asked: list[int] = []

        def submit(context: int, count: int, pointers: int) -> int:
            self.asked.append(count)
            wanted = answer(len(self.asked), count)
            return real(context, min(wanted, count), pointers) if wanted > 0 else wanted

        monkeypatch.setattr(aio_ring, "io_submit", submit)


def test_a_batch_is_one_call(engine: LinuxAioEngine, disk: File, monkeypatch: pytest.MonkeyPatch) -> None:
    submits = Submits(monkeypatch, lambda call, count: count)
    requests = reads(100)
    prepare(engine, disk, requests)
    assert submits.asked == []
    engine.enter()
    assert submits.asked == [100]
    assert len(complete(engine)) == 100 and all(request.buffer == b"x" * PAGE for request in requests)


@pytest.mark.parametrize("takes", [1, 3, 7])
def test_the_kernel_takes_fewer(
    engine: LinuxAioEngine, disk: File, monkeypatch: pytest.MonkeyPatch, takes: int
) -> None:
    """The rest is offered again at once: nobody would tell later that there is room."""
    submits = Submits(monkeypatch, lambda call, count: takes)
    requests = reads(20)
    prepare(engine, disk, requests)
    engine.enter()
    assert submits.asked == list(range(20, 0, -takes))
    assert len(complete(engine)) == 20 and all(request.buffer == b"x" * PAGE for request in requests)


def test_the_kernel_takes_some_and_then_none(
    engine: LinuxAioEngine, disk: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits goes on when something has finished."""
    submits = Submits(monkeypatch, lambda call, count: 2 if call % 2 else -errno.EAGAIN)
    requests = reads(30)
    prepare(engine, disk, requests)
    engine.enter()
    assert submits.asked == [30, 28] and not engine._workers.threads
    assert len(complete(engine)) == 30 and all(request.buffer == b"x" * PAGE for request in requests)


@pytest.mark.parametrize("times", [1, 2, 10**9])
def test_no_room_and_nothing_in_flight(
    engine: LinuxAioEngine, disk: File, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """T74: no completion will ever wake us. The threads do it, and nothing spins until the kernel changes its mind."""
    submits = Submits(monkeypatch, lambda call, count: -errno.EAGAIN if call <= times else count)
    requests = [*reads(5), Request(WRITE, 0, PAGE, page(b"x"), FUA), Request(FLUSH)]
    prepare(engine, disk, requests)
    engine.enter()
    assert len(complete(engine)) == 7 and [request.result for request in requests] == [0] * 7
    assert len(submits.asked) == 1


def test_a_bad_descriptor_in_the_middle(engine: LinuxAioEngine, disk: File, tmp_path: Path) -> None:
    """T74: three requests, the second of them impossible; and the first, and all. By the kernel itself."""
    closed = LinuxHost().open_file(disk.path, direct=True)
    number = closed.fileno()
    for files in ([disk, closed, disk], [closed, disk, disk], [closed, closed], [disk, closed, closed, disk, closed]):
        requests = reads(len(files))
        for file, request in zip(files, requests, strict=True):
            engine.prepare(file, request)
        if closed.fileno() >= 0:
            closed._fd = -1  # type: ignore[attr-defined]  # the jobs have its number
            os.close(number)
        engine.enter()
        assert len(complete(engine)) == len(files)
        for file, request in zip(files, requests, strict=True):
            assert request.result == (0 if file is disk else -errno.EBADF)


def test_one_bad_one_is_refused_alone(
    engine: LinuxAioEngine, disk: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    submits = Submits(monkeypatch, lambda call, count: -errno.EIO if call in (1, 3, 6) else 2)
    requests = reads(10)
    prepare(engine, disk, requests)
    engine.enter()
    assert submits.asked == [10, 9, 7, 6, 4, 2, 1]
    assert len(complete(engine)) == 10
    assert [request.result for request in requests].count(-errno.EIO) == 3


@pytest.mark.parametrize("drained", [False, True])
def test_more_than_the_context_takes(engine: LinuxAioEngine, disk: File, drained: bool) -> None:
    """T75: what waits for its turn goes on without any other wake-up than that of the completions."""
    requests = reads(4 * AIO_ENTRIES)
    prepare(engine, disk, requests)
    engine.enter()
    if drained:
        select.select([engine.fileno()], [], [], HANG_MS / 1000)
        os.eventfd_read(engine.fileno())
        done = engine.reap()
        assert done
    else:
        done = []
    assert len(done + complete(engine)) == 4 * AIO_ENTRIES
    assert all(request.buffer == b"x" * PAGE for request in requests)


def test_the_ring_goes_round(engine: LinuxAioEngine, disk: File) -> None:
    """Batches that end before, at and behind the end of the completion ring."""
    for count in (1, 100, 157, 255, 256, 3, 250, 11, 256, 256, 129):
        requests = reads(count)
        prepare(engine, disk, requests)
        engine.enter()
        assert len(complete(engine)) == count and all(request.buffer == b"x" * PAGE for request in requests)


@pytest.mark.parametrize("word,value", [(4, 0), (5, 2), (6, 1), (7, 64), (1, 8)])
def test_a_ring_that_looks_different_is_left_alone(
    disk: File, monkeypatch: pytest.MonkeyPatch, word: int, value: int
) -> None:
    """Then io_getevents reads it."""
    readable = aio_ring._readable
    header = [0, 383, 0, 0, 0xA10A10A1, 1, 0, 32]
    assert readable(header, AIO_ENTRIES) == (os.uname().machine == "x86_64")
    header[word] = value
    assert not readable(header, AIO_ENTRIES)
    monkeypatch.setattr(aio_ring, "_readable", lambda seen, entries: readable(header, entries))
    calls = []
    real = aio_ring.io_getevents
    monkeypatch.setattr(aio_ring, "io_getevents", lambda *rest: calls.append(1) or real(*rest))
    engine = LinuxAioEngine()
    requests = reads(2 * AIO_ENTRIES)
    prepare(engine, disk, requests)
    engine.enter()
    assert len(complete(engine)) == 2 * AIO_ENTRIES and calls
    assert all(request.buffer == b"x" * PAGE for request in requests)
    engine.close()


def test_completions_are_not_fetched_by_calls(
    engine: LinuxAioEngine, disk: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine._ring._header is None:
        pytest.skip("the ring cannot be read here")
    monkeypatch.setattr(aio_ring, "io_getevents", None)
    prepare(engine, disk, reads(10))
    engine.enter()
    assert len(complete(engine)) == 10


def test_no_sync_in_this_file_system(
    engine: LinuxAioEngine, disk: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first flush is refused and done by a thread; the next ones are not even tried."""
    real = aio_ring.AioRing.push
    pushed: list[int] = []

    def push(ring: Any, slot: int, command: int, *rest: int) -> None:
        pushed.append(command)
        real(ring, slot, 99 if command == aio_ring.CMD_FDSYNC else command, *rest)

    monkeypatch.setattr(aio_ring.AioRing, "push", push)
    for _ in range(3):
        requests = [Request(FLUSH), Request(READ, 0, PAGE, page())]
        prepare(engine, disk, requests)
        engine.enter()
        assert len(complete(engine)) == 2 and [request.result for request in requests] == [0, 0]
    assert pushed.count(aio_ring.CMD_FDSYNC) == 1


def test_no_durable_writes_in_this_file_system(
    engine: LinuxAioEngine, disk: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write whose RWF_DSYNC is refused is a write and a flush."""
    real = aio_ring.AioRing.push
    pushed: list[tuple[int, int]] = []

    def push(ring: Any, slot: int, command: int, fd: int, *rest: int) -> None:
        pushed.append((command, rest[-1]))
        flags = 1 << 30 if rest[-1] else 0  # a flag that no kernel knows
        real(ring, slot, command, fd, *rest[:-1], flags)

    monkeypatch.setattr(aio_ring.AioRing, "push", push)
    request = Request(WRITE, 0, PAGE, page(b"d"), FUA)
    prepare(engine, disk, [request])
    engine.enter()
    assert complete(engine) == [request] and request.result == 0
    assert pushed == [
        (aio_ring.CMD_PWRITE, os.RWF_DSYNC),
        (aio_ring.CMD_PWRITE, 0),
        (aio_ring.CMD_FDSYNC, 0),
    ]
    assert Path(disk.path).read_bytes()[:PAGE] == b"d" * PAGE


def test_what_it_cannot_do_itself(engine: LinuxAioEngine, disk: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what it can: the threads do it, and it is announced like the rest."""
    requests = [Request(DISCARD, PAGE, PAGE), Request(WRITE_ZEROES, 2 * PAGE, PAGE, flags=FUA), *reads(1)]
    prepare(engine, disk, requests)
    assert not engine._workers.threads, "it begins with enter()"
    engine.enter()
    assert len(complete(engine)) == 3 and requests[2].result == 0
    assert all(request.result in (0, -errno.ENOTSUP) for request in requests)


def contexts() -> int:
    with open("/proc/self/maps") as maps:
        return sum("[aio]" in line for line in maps)


@pytest.mark.parametrize("in_flight", [0, 1, 2 * AIO_ENTRIES])
def test_contexts_are_given_back(disk: File, in_flight: int) -> None:
    """Also with requests in flight, which end first."""
    before, descriptors = contexts(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        engine = LinuxAioEngine()
        assert contexts() == before + 1
        requests = reads(in_flight)
        prepare(engine, disk, requests)
        engine.enter()
        engine.close()
        assert all(request.buffer == b"x" * PAGE and request.result == 0 for request in requests)
    assert (contexts(), len(os.listdir("/proc/self/fd"))) == (before, descriptors)


def test_no_contexts_left(disk: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of the whole machine, by itself: a context for more than it has. Who must do what is in the text."""
    monkeypatch.setattr(aio_ring, "AIO_ENTRIES", 1 << 22)
    with open("/proc/sys/fs/aio-max-nr") as limit:
        if int(limit.read()) > 1 << 22:
            pytest.skip("this machine has so many")
    before = contexts(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"/proc/sys/fs/aio-max-nr \(\d+, of which \d+ are taken\)") as caught:
        LinuxHost().engine("linux-aio")
    assert caught.value.errno == errno.EAGAIN
    assert (contexts(), len(os.listdir("/proc/self/fd"))) == before


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_not_there(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(entries: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(aio_ring, "io_setup", refuse)
    with pytest.raises(OSError) as caught:
        LinuxHost().engine("linux-aio")
    assert caught.value.errno == number
    LinuxHost().engine("auto").close()


def test_full_eventfd(engine: LinuxAioEngine, disk: File) -> None:
    """A counter that cannot grow any more is readable, so nothing is missed."""
    os.eventfd_write(engine.fileno(), (1 << 64) - 2)
    requests = [*reads(3), Request(DISCARD, PAGE, PAGE)]
    prepare(engine, disk, requests)
    engine.enter()
    assert len(complete(engine)) == 4


def test_in_a_forked_child(engine: LinuxAioEngine, disk: File) -> None:
    """The context is the parent's. The child is told so, may close the engine, and harms nobody."""
    requests = reads(50)
    prepare(engine, disk, requests)
    engine.enter()
    pid = os.fork()
    if pid == 0:
        verdict = 1
        try:
            for call in (engine.enter, engine.reap):
                try:
                    call()
                except RuntimeError as error:
                    verdict = 0 if "make engines after fork" in str(error) else 2
                else:
                    verdict = 3
                    break
            engine.close()
        except BaseException:
            verdict = 4
        os._exit(verdict)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(complete(engine)) == 50 and all(request.buffer == b"x" * PAGE for request in requests)


def test_lists(engine: LinuxAioEngine, disk: File) -> None:
    """Whole transfers, one that ends at the end of the file, buffers that the device cannot reach, a closed file: each
    request ends once, as if it had been prepared by itself; what comes back whole has cost no job."""
    arena = LinuxHost().arena(8 * PAGE)
    aligned = []
    for n, offset in enumerate((0, PAGE, 63 * PAGE, 5 * PAGE)):
        request = Request(READ, offset, PAGE, arena.view[n * PAGE : (n + 1) * PAGE])
        request.address = arena.address + n * PAGE
        aligned.append(request)
    end = Request(READ, 63 * PAGE, 2 * PAGE, arena.view[4 * PAGE : 6 * PAGE])
    end.address = arena.address + 4 * PAGE
    elsewhere = Request(READ, 7 * PAGE, PAGE, page())
    batch = [*aligned, end, elsewhere]
    assert engine.prepare_batch(disk, batch) == [] and engine.in_flight == 6
    assert sum(job is not None for job in engine._jobs) == 1
    engine.enter()
    assert {id(request) for request in complete(engine)} == {id(request) for request in batch}
    assert [request.result for request in batch] == [0] * 6
    assert all(request.buffer[:PAGE] == b"x" * PAGE for request in batch) and end.buffer[PAGE:] == bytes(PAGE)
    closed = LinuxHost().open_file(disk.path, direct=True)
    closed.close()
    for request in aligned:
        request.result = 1
    assert engine.prepare_batch(closed, aligned[:2]) == [] == engine.prepare_batch(disk, aligned[2:])
    engine.enter()
    assert len(complete(engine)) == 4
    assert [request.result for request in aligned] == [-errno.EBADF] * 2 + [0] * 2
    assert not any(engine._jobs) and not any(engine._whole) and len(engine._free) == AIO_ENTRIES
