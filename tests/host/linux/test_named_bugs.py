# SPDX-License-Identifier: Apache-2.0
"""Bugs that other programs have had with the kernel's engines, each by its name; docs/host.md lists them.

Those that are about linux-aio alone have their tests in ``test_linux_aio``, those of pollers in ``test_pollers``.
"""

from __future__ import annotations

import errno
import os
import random
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from bottomhalf.host.linux import LinuxHost, aio_ring
from bottomhalf.host.linux import ring as ring_module
from bottomhalf.host.linux.ring import ENTRIES, Ring
from bottomhalf.host.protocol import ENGINE_KINDS, Engine, File
from bottomhalf.host.request import COPY_RANGE, DISCARD, READ, TRUNCATE, WRITE, Request
from tests import seccomp
from tests.host.contract.workload import HANG_MS, collect

PAGE = 4096
PAGES = 64
OP_NOP = 0


@pytest.fixture(params=ENGINE_KINDS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = LinuxHost().engine(request.param)
    yield made
    made.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[File]:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * PAGES * PAGE)
    try:
        file = LinuxHost().open_file(str(path), direct=True)
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")
    yield file
    file.close()


def reads(count: int) -> list[Request]:
    return [Request(READ, n % PAGES * PAGE, PAGE, memoryview(bytearray(PAGE))) for n in range(count)]


def prepare(engine: Engine, file: File, requests: list[Request]) -> None:
    for request in requests:
        engine.prepare(file, request)


def test_wake_ups_are_not_lost(engine: Engine, disk: File) -> None:
    """A ring whose eventfd is registered with IORING_REGISTER_EVENTFD_ASYNC is silent about what an interrupt
    completes, and a loop that sleeps then sleeps for ever. What comes to be pending outside enter() has to be
    announced; here it is watched for, and then the announcement."""
    chance, announced = random.Random(1), 0
    poll = select.poll()
    poll.register(engine.fileno(), select.POLLIN)
    for _ in range(150):
        requests = reads(chance.choice((1, 1, 1, 7)))
        if chance.random() < 0.2:
            requests.append(Request(DISCARD, 0, 0))
            requests[-1].length = PAGE
            requests[-1].offset = PAGES * PAGE * 2  # beyond the end: changes nothing, and a thread may do it
        prepare(engine, disk, requests)
        engine.enter()
        done: list[Request] = []
        while engine.in_flight:
            if not engine.pending:
                while not engine.pending:
                    os.sched_yield()
                assert poll.poll(HANG_MS), "it is there, and nobody was told"
                announced += 1
            done += engine.reap()
        assert len(done) == len(requests)
    assert announced > 0


@pytest.mark.needs("io_uring")
@pytest.mark.parametrize("takes", [1, 3, 7])
def test_a_ring_that_takes_fewer_than_it_is_offered(
    disk: File, monkeypatch: pytest.MonkeyPatch, takes: int
) -> None:
    real = ring_module.io_uring_enter
    asked: list[int] = []

    def enter(fd: int, count: int, wait_for: int, flags: int) -> int:
        asked.append(count)
        return real(fd, min(count, takes), wait_for, flags)

    engine = LinuxHost().engine("io_uring")
    monkeypatch.setattr(ring_module, "io_uring_enter", enter)
    requests = reads(40)
    prepare(engine, disk, requests)
    engine.enter()
    assert asked[:3] == [40, 40 - takes, 40 - 2 * takes]
    assert len(collect(engine)) == 40 and all(request.buffer == b"x" * PAGE for request in requests)
    engine.close()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize(
    "kind,where,name", [("io_uring", ring_module, "io_uring_setup"), ("linux-aio", aio_ring, "io_setup")]
)
def test_refusal_is_absence_whatever_it_is_called(
    monkeypatch: pytest.MonkeyPatch, kind: str, where: object, name: str, number: int
) -> None:
    """Containers say EPERM where old kernels say ENOSYS; both have threads."""

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(where, name, refuse)
    with pytest.raises(OSError) as caught:
        LinuxHost().engine(kind)
    assert caught.value.errno == number
    auto = LinuxHost().engine("auto")
    assert auto.name == ("threads" if kind == "io_uring" or seccomp.missing("io_uring") else "io_uring")
    auto.close()


@pytest.mark.parametrize("entered", [False, True])
@pytest.mark.parametrize("kind", ENGINE_KINDS)
def test_closed_with_requests_in_flight(kind: str, entered: bool, disk: File, tmp_path: Path) -> None:
    """Whoever unmaps a ring or frees a buffer that the kernel still writes to has memory that changes by itself.
    Closing waits, for what threads do as well; and nothing is left behind."""
    (tmp_path / "other").write_bytes(bytes(PAGES * PAGE))
    other = LinuxHost().open_file(str(tmp_path / "other"))
    before = len(os.listdir("/proc/self/fd"))
    engine = LinuxHost().engine(kind)
    requests = reads(2 * ENTRIES)
    prepare(engine, disk, requests)
    errands = [
        Request(COPY_RANGE, 0, PAGE, (disk, 0)),
        Request(TRUNCATE, 2 * PAGES * PAGE, 0, "off"),
        Request(WRITE, PAGE, PAGE, memoryview(b"w" * PAGE)),
    ]
    prepare(engine, other, errands)
    if entered:
        engine.enter()
    engine.close()
    assert engine.in_flight == 0
    assert all(request.result == 0 and request.buffer == b"x" * PAGE for request in requests)
    assert all(request.result == 0 for request in errands)
    assert len(os.listdir("/proc/self/fd")) == before
    other.close()


@pytest.mark.needs("io_uring")
def test_more_completions_than_the_ring_holds() -> None:
    """The kernel keeps those for which there is no room until somebody enters, and shows a flag meanwhile. (The
    engine never has more in flight than fit; a ring has to be right all the same.)"""
    ring = Ring(2)
    room = ring._cq_entries
    count = room + 5
    for _ in range(count):
        ring.push(0, OP_NOP, -1, 0, 0, 0, 0)
        ring.enter()
    assert ring.pending
    found = 0
    while ring.pending or ring.needs_entering:
        slots, results = ring.completions()
        assert set(slots) <= {0} and set(results) <= {0}
        found += len(slots)
        if ring.needs_entering:
            ring.enter()
    assert found == count
    ring.close()


def test_a_bad_descriptor_in_the_middle_of_a_batch(engine: Engine, disk: File, tmp_path: Path) -> None:
    """It fails alone; nothing behind it is forgotten. (QEMU's linux-aio forgets it, see the facts on io_submit.)"""
    arena = LinuxHost().arena(9 * PAGE)
    closed = LinuxHost().open_file(disk.path, direct=True)
    requests = []
    for n in range(9):
        request = Request(READ, n * PAGE, PAGE, arena.view[n * PAGE : (n + 1) * PAGE])
        request.address = arena.address + n * PAGE
        requests.append(request)
    for n, request in enumerate(requests):
        engine.prepare(closed if n % 4 == 1 else disk, request)
    number = closed.fileno()
    os.close(number)
    closed._fd = -1  # type: ignore[attr-defined]  # the jobs have its number
    engine.enter()
    assert len(collect(engine)) == 9
    for n, request in enumerate(requests):
        assert request.result == (-errno.EBADF if n % 4 == 1 else 0)
        request.buffer = None
    arena.close()


@pytest.mark.parametrize("kind", ENGINE_KINDS)
def test_a_fork_with_threads_at_work(kind: str, disk: File, tmp_path: Path) -> None:
    """The child has neither the threads nor the ring; it is told so, may close the engine, and harms nobody."""
    engine = LinuxHost().engine(kind)
    (tmp_path / "other").write_bytes(bytes(PAGE))
    other = LinuxHost().open_file(str(tmp_path / "other"))
    prepare(engine, other, [Request(COPY_RANGE, n * PAGE, PAGE, (disk, 0)) for n in range(20)])
    engine.enter()
    prepare(engine, other, [Request(COPY_RANGE, n * PAGE, PAGE, (disk, 0)) for n in range(20)])
    pid = os.fork()
    if pid == 0:
        verdict = 1
        try:
            try:
                engine.enter()
            except RuntimeError as error:
                verdict = 0 if "make engines after fork" in str(error) else 2
            engine.close()
        except BaseException:
            verdict = 3
        os._exit(verdict)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    engine.enter()
    assert len(collect(engine)) == 40
    engine.close()
    assert (tmp_path / "other").read_bytes() == b"x" * PAGE * 20
    other.close()
