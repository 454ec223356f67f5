# SPDX-License-Identifier: Apache-2.0
"""Work for an engine, and what must be true of it afterwards: the same for every engine, with and without failures.

The contract tests have each engine do it where nothing goes wrong; ``linux/test_syscall_faults`` where every system
call fails in turn. Either way a request ends once, a successful one has done what it says, and one that was not
successful has an errno.

    files = make_files(directory)
    requests = do(engine, opened, WORK["transfers"](opened))
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.linux.memory import LinuxArena
from bottomhalf.host.protocol import DATA, ZERO, Engine, File
from bottomhalf.host.request import (
    BLOCK_STATUS,
    COPY_RANGE,
    DISCARD,
    FLUSH,
    FUA,
    IN_PROGRESS,
    MAY_UNMAP,
    READ,
    TRUNCATE,
    WRITE,
    WRITE_ZEROES,
    Request,
    prepare_each,
)

PAGE: Final = 4096
PAGES: Final = 64  # the first half of the file is read, the second is written
HANG_MS: Final = 20_000  # a broken engine; no good one reaches it


class Opened(NamedTuple):
    """The files that the work is about, and memory that a device can reach."""

    file: File
    source: File
    sized: File
    arena: LinuxArena


def make_files(directory: Path) -> None:
    """Files "disk" to read and write, "source" to copy from, "sized" to truncate."""
    (directory / "disk").write_bytes(b"r" * PAGES * PAGE)
    (directory / "source").write_bytes(bytes(range(256)) * (PAGES * PAGE // 256))
    (directory / "sized").write_bytes(b"s" * PAGE)


def open_files(host: LinuxHost, directory: Path, direct: bool) -> Opened:
    """OSError where there is no O_DIRECT."""
    disk = host.open_file(str(directory / "disk"), direct=direct)
    source = host.open_file(str(directory / "source"), read_only=True)
    return Opened(disk, source, host.open_file(str(directory / "sized")), host.arena(PAGES * PAGE))


def close_files(opened: Opened) -> None:
    for each in opened[:3]:
        each.close()
    opened.arena.close()


class InlineFirst:
    """An engine as a driver uses one: what can be done where it stands is, and ``engine`` gets the rest."""

    def __init__(self, engine: Engine) -> None:
        self.name = f"inline, then {engine.name}"
        self._engine = engine
        self._done: list[Request] = []

    @property
    def in_flight(self) -> int:
        return self._engine.in_flight + len(self._done)

    @property
    def pending(self) -> bool:
        return bool(self._done) or self._engine.pending

    def fileno(self) -> int:
        return self._engine.fileno()

    def prepare(self, file: File, request: Request) -> None:
        slow = [request]
        if request.op == READ:
            slow = file.read_inline(slow)
        elif request.op == WRITE:
            slow = file.write_inline(slow)
        if slow:
            self._engine.prepare(file, request)
        else:
            self._done.append(request)

    def enter(self) -> None:
        self._engine.enter()

    def reap(self) -> list[Request]:
        done, self._done = self._done, []
        return done + self._engine.reap()

    def close(self) -> None:
        self._engine.close()


def make_engine(host: LinuxHost, kind: str) -> Engine:
    """One of ENGINE_KINDS, or "inline". OSError."""
    return InlineFirst(host.engine("threads")) if kind == "inline" else host.engine(kind)


# -- what there is to do --------------------------------------------------------------------------------------------


def transfers(opened: Opened) -> Iterator[tuple[File, list[Request]]]:
    """Reads and writes, in lists and alone, of memory that the device reaches and of other memory, durable ones too."""
    arena, half = opened.arena, PAGES // 2
    for op, first in ((READ, 0), (WRITE, half)):
        batch = []
        for n in range(6):
            at = (first + n) * PAGE
            request = Request(op, at, PAGE, arena.view[at : at + PAGE])
            request.buffer[:] = b"w" * PAGE
            request.address = arena.address + at
            batch.append(request)
        yield opened.file, batch
    for n in range(4):
        yield opened.file, [Request(READ, n * PAGE, PAGE, memoryview(bytearray(PAGE)))]
        data = memoryview(bytearray(b"w" * PAGE))
        yield opened.file, [Request(WRITE, (half + 10 + n) * PAGE, PAGE, data, FUA if n % 2 else 0)]


def ranges(opened: Opened) -> Iterator[tuple[File, list[Request]]]:
    """Flushes, discards and zeroes."""
    for request in (
        Request(FLUSH),
        Request(DISCARD, 58 * PAGE, PAGE),
        Request(FLUSH),
        Request(WRITE_ZEROES, 61 * PAGE, PAGE, flags=FUA),
        Request(WRITE_ZEROES, 62 * PAGE, PAGE, flags=MAY_UNMAP),
    ):
        yield opened.file, [request]


def errands(opened: Opened) -> Iterator[tuple[File, list[Request]]]:
    """What no ring does."""
    yield opened.file, [Request(COPY_RANGE, 52 * PAGE, PAGE, (opened.source, 0), FUA)]
    yield opened.file, [Request(COPY_RANGE, 53 * PAGE, 2 * PAGE, (opened.source, 2 * PAGE))]
    yield opened.file, [Request(BLOCK_STATUS, 0, PAGES * PAGE, [])]
    yield opened.file, [Request(FLUSH), Request(FLUSH)]
    for size, mode in ((2 * PAGE, "falloc"), (4 * PAGE, "full"), (PAGE, "off")):
        yield opened.sized, [Request(TRUNCATE, size, 0, mode)]
        yield opened.sized, []  # and wait: each begins where the last has ended


WORK: Final[dict[str, Callable[[Opened], Iterator[tuple[File, list[Request]]]]]] = {
    "transfers": transfers,
    "ranges": ranges,
    "errands": errands,
}


def do(
    engine: Engine,
    work: Iterator[tuple[File, list[Request]]],
    allowed: Callable[[Exception], bool] = lambda failure: False,
) -> list[Request]:
    """Have it done, some at a time; every request comes back once. ``allowed`` says what prepare() and enter() may
    raise."""
    prepare: Any = getattr(engine, "prepare_batch", None)
    requests: list[Request] = []
    done: list[Request] = []
    for n, (file, batch) in enumerate(work):
        requests += batch
        if prepare is not None and len(batch) > 1:
            refused = prepare(file, batch)
        else:
            refused = prepare_each(engine, file, batch)
        for request in refused:
            assert allowed(OSError(-request.result, "refused")), request
        done += refused
        if n % 5 == 4 or not batch:
            attempt(engine.enter, allowed)
        if not batch:
            done += collect(engine)
    attempt(engine.enter, allowed)
    done += collect(engine)
    assert sorted(map(id, done)) == sorted(map(id, requests)), "each ends once"
    assert engine.reap() == []
    return requests


def attempt(call: Callable[[], Any], allowed: Callable[[Exception], bool]) -> None:
    try:
        call()
    except (OSError, RuntimeError) as failure:
        assert allowed(failure), failure


def collect(engine: Engine) -> list[Request]:
    """What is in flight, woken as a loop would be."""
    poll = select.poll()
    poll.register(engine.fileno(), select.POLLIN)
    done: list[Request] = []
    while engine.in_flight:
        assert engine.pending or poll.poll(HANG_MS), f"{engine.in_flight} requests hang"
        done += engine.reap()
    return done


def check(requests: list[Request], directory: Path, results: set[int]) -> None:
    """Every request has one of the results, and 0 is true."""
    disk = (directory / "disk").read_bytes()
    source = (directory / "source").read_bytes()
    for request in requests:
        assert request.result != IN_PROGRESS and request.result in results, request
        if request.result:
            continue
        op, begin, end = request.op, request.offset, request.offset + request.length
        if op == READ:
            assert request.buffer == b"r" * PAGE
        elif op == WRITE:
            assert disk[begin:end] == b"w" * PAGE
        elif op == WRITE_ZEROES:
            assert not any(disk[begin:end])
        elif op == COPY_RANGE:
            start = request.buffer[1]
            assert disk[begin:end] == source[start : start + request.length]
        elif op == BLOCK_STATUS:
            assert request.buffer[0] in (DATA, ZERO) and 1 <= request.buffer[1] <= request.length
    assert disk[: PAGE * PAGES // 2] == b"r" * (PAGE * PAGES // 2)
    size = PAGE
    for request in requests:
        if request.op == TRUNCATE and request.result == 0:
            size = request.offset
    if any(request.op == TRUNCATE for request in requests):
        sized = (directory / "sized").read_bytes()
        assert sized == b"s" * PAGE + bytes(size - PAGE), "what failed left the size as it was"
