# SPDX-License-Identifier: Apache-2.0
"""What every host promises about files, locks, engines and arenas."""

from __future__ import annotations

import errno

import pytest

from bottomhalf.host.protocol import (
    DATA,
    IN,
    PERM_ALL,
    PERM_CONSISTENT_READ,
    PERM_RESIZE,
    PERM_WRITE,
    ZERO,
    Engine,
    File,
    ImageInUse,
)
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
)
from tests.host.contract.conftest import WAIT_NS, Place

PAGE = 4096


def read(place: Place, path: str) -> bytes:
    """All of a file, through whichever way there is."""
    file = place.open(path, read_only=True)
    request = Request(READ, 0, file.size(), memoryview(bytearray(file.size())))
    for slow in file.read_inline([request]):
        engine = place.engine()
        engine.prepare(file, slow)
        engine.enter()
        place.complete(engine)
    assert request.result == 0
    return bytes(request.buffer)


def test_opening(place: Place) -> None:
    with pytest.raises(FileNotFoundError):
        place.open(place.path("nowhere"))
    path = place.file("a", b"abc")
    file = place.open(path)
    assert (file.path, file.size(), file.read_only, file.direct) == (path, 3, False, False)
    assert (file.alignment, file.memory_alignment) == (1, 1)
    with pytest.raises(ValueError):
        place.open(path, locking="perhaps")


def test_inline_requests_are_served_or_left_alone(place: Place) -> None:
    path = place.file("a", b"x" * 10_000)
    file = place.open(path)
    for _ in range(20):
        requests = [Request(READ, n * 1000, 1000, memoryview(bytearray(1000))) for n in range(10)]
        slow = file.read_inline(requests)
        for request in requests:
            if request in slow:
                assert request.result == IN_PROGRESS
            else:
                assert request.result == 0 and request.buffer == b"x" * 1000
    for n in range(20):
        assert file.pread_nowait(10 + n, n * 100) in (None, b"x" * (10 + n))
    assert file.pread_nowait(20, 9_990) is None
    assert file.pread_nowait(10_000, 0) in (None, b"x" * 10_000)
    beyond = Request(READ, 9_990, 20, memoryview(bytearray(b"j" * 20)))
    assert file.read_inline([beyond]) == [beyond] or beyond.buffer == b"x" * 10 + bytes(10)
    changed = bytearray(b"x" * 10_000)
    for n in range(20):
        request = Request(WRITE, n * 100, 100, memoryview(bytes([n]) * 100), FUA if n == 3 else 0)
        if not file.write_inline([request]):
            assert request.result == 0
            changed[n * 100 : n * 100 + 100] = bytes([n]) * 100
    assert changed[300:400] == b"x" * 100  # durable writes are for the engine
    assert read(place, path) == changed


def test_pread_and_prefetch(place: Place) -> None:
    file = place.open(place.file("a", bytes(range(200))))
    file.prefetch(0, 200)
    assert file.pread(10, 100) == bytes(range(100, 110))
    assert file.pread(10, 195) == bytes(range(195, 200))
    assert file.pread(10, 1000) == b""


def test_engine_serves_every_op(place: Place) -> None:
    path = place.file("a", bytes(range(256)) * 64)
    file, engine = place.open(path), place.engine()
    assert engine.name and engine.in_flight == 0 and not engine.pending
    assert engine.reap() == []
    requests = [
        Request(READ, 100, 1000, memoryview(bytearray(1000))),
        Request(READ, 16_380, 10, memoryview(bytearray(b"junk junk!"))),
        Request(READ, 1 << 40, 10, memoryview(bytearray(b"junk junk!"))),
        Request(WRITE, 5000, 100, memoryview(b"w" * 100)),
        Request(WRITE, 6000, 100, memoryview(b"f" * 100), FUA),
        Request(WRITE_ZEROES, 8192, 4096),
        Request(WRITE_ZEROES, 12288, 2048, flags=MAY_UNMAP),
        Request(DISCARD, 1 << 20, 4096),
        Request(FLUSH),
    ]
    for request in requests:
        engine.prepare(file, request)
    assert engine.in_flight == len(requests)
    engine.enter()
    done = place.complete(engine)
    assert sorted(map(id, done)) == sorted(map(id, requests))
    assert [request.result for request in requests] == [0] * len(requests)
    original = bytes(range(256)) * 64
    assert requests[0].buffer == original[100:1100]
    assert requests[1].buffer == original[-4:] + bytes(6)
    assert requests[2].buffer == bytes(10)
    expected = bytearray(original)
    expected[5000:5100], expected[6000:6100] = b"w" * 100, b"f" * 100
    expected[8192 : 12288 + 2048] = bytes(6144)
    assert read(place, path) == expected


def test_completion_is_announced(place: Place) -> None:
    file, engine, poller = place.open(place.file("a", 1 << 20)), place.engine(), place.poller()
    poller.register(engine.fileno(), IN)
    for n in range(50):
        request = Request(READ, n * 4096, 4096, memoryview(bytearray(4096)))
        engine.prepare(file, request)
        engine.enter()
        assert engine.pending or poller.wait(WAIT_NS) == [(engine.fileno(), IN)]
        assert engine.reap() == [request] and not engine.pending


def test_writes_grow_the_file(place: Place) -> None:
    path = place.file("a", 10)
    file, engine = place.open(path), place.engine()
    engine.prepare(file, Request(WRITE, 100, 5, memoryview(b"hello")))
    engine.enter()
    place.complete(engine)
    assert file.size() == 105
    assert read(place, path) == bytes(100) + b"hello"


def test_failed_requests_carry_an_errno(place: Place) -> None:
    file, engine = place.open(place.file("a", 512), read_only=True), place.engine()
    requests = [
        Request(WRITE, 0, 1, memoryview(b"x")),
        Request(READ, 0, 1, memoryview(bytearray(1))),
        Request(DISCARD, 0, 512),
    ]
    for request in requests:
        engine.prepare(file, request)
    engine.enter()
    place.complete(engine)
    assert requests[0].result < 0 and requests[2].result < 0
    assert requests[1].result == 0


def test_many_requests_complete_once_each(place: Place) -> None:
    file, engine = place.open(place.file("a", 1 << 20)), place.engine()
    requests = [Request(WRITE, n * 512, 512, memoryview(bytes([n % 256]) * 512)) for n in range(2000)]
    for n, request in enumerate(requests):
        engine.prepare(file, request)
        if n % 300 == 0:
            engine.enter()
    engine.enter()
    done = place.complete(engine)
    assert len(done) == len({id(request) for request in done}) == 2000
    assert all(request.result == 0 for request in done)


def test_closing_an_engine_waits(place: Place) -> None:
    path = place.file("a", 4096)
    file, engine = place.open(path), place.host.engine(place.engine_kind)
    requests = [Request(WRITE, n * 512, 512, memoryview(b"x" * 512)) for n in range(8)]
    for request in requests:
        engine.prepare(file, request)
    engine.enter()
    engine.close()
    assert read(place, path) == b"x" * 4096


def test_truncate(place: Place) -> None:
    path = place.file("a", b"x" * 5000)
    file = place.open(path)
    file.truncate(100)
    file.truncate(200)
    assert file.size() == 200
    assert read(place, path) == b"x" * 100 + bytes(100)
    with pytest.raises(OSError):
        place.open(path, read_only=True).truncate(0)


def test_block_status(place: Place) -> None:
    file, engine = place.open(place.file("a", 1 << 20)), place.engine()
    assert file.block_status(0, 1 << 20)[0] in (ZERO, DATA)
    engine.prepare(file, Request(WRITE, 512 * 1024, 4096, memoryview(b"x" * 4096)))
    engine.enter()
    place.complete(engine)
    position = 0
    while position < 1 << 20:
        bits, count = file.block_status(position, (1 << 20) - position)
        assert bits in (ZERO, DATA) and 1 <= count <= (1 << 20) - position
        if position <= 512 * 1024 < position + count:
            assert bits == DATA
        position += count
    assert file.block_status(0, 100)[1] == 100
    assert file.block_status(2 << 20, 100) == (ZERO, 100)
    assert 4096 <= file.allocated_size() <= 1 << 20


def test_locks(place: Place) -> None:
    path = place.file("a", 1 << 20)
    first, second = place.open(path, locking="on"), place.open(path, locking="on")
    first.set_permissions(PERM_WRITE, PERM_ALL & ~PERM_WRITE)
    with pytest.raises(ImageInUse, match='Failed to get "write" lock'):
        second.set_permissions(PERM_WRITE, PERM_ALL)
    with pytest.raises(ImageInUse, match='Failed to get shared "write" lock'):
        second.set_permissions(0, PERM_ALL & ~PERM_WRITE)
    second.set_permissions(0, PERM_ALL)
    first.set_permissions(0, PERM_ALL)
    second.set_permissions(PERM_WRITE, PERM_ALL & ~PERM_WRITE)
    second.close()
    first.set_permissions(PERM_ALL, 0)


def test_locks_pass_to_another_opener_of_the_same_image(place: Place) -> None:
    path = place.file("a", 1 << 20)
    first, second, other = (place.open(path, locking="on") for _ in range(3))
    first.set_permissions(PERM_WRITE, PERM_ALL & ~PERM_WRITE)
    second.take_locks(first)
    first.close()
    with pytest.raises(ImageInUse, match='Failed to get "write" lock'):
        other.set_permissions(PERM_WRITE, PERM_ALL)
    second.set_permissions(PERM_WRITE | PERM_RESIZE, PERM_ALL & ~PERM_WRITE)
    second.set_permissions(0, PERM_ALL)
    other.set_permissions(PERM_WRITE, PERM_ALL & ~PERM_WRITE)
    with pytest.raises(ImageInUse, match='Failed to get "write" lock'):
        second.set_permissions(PERM_WRITE, PERM_ALL)


def test_arena(place: Place) -> None:
    arena = place.host.arena(3 * PAGE)
    assert arena.size >= 3 * PAGE and len(arena.view) >= 3 * PAGE and arena.address % PAGE == 0
    file, engine = place.open(place.file("a", b"y" * PAGE)), place.engine()
    request = Request(READ, 0, PAGE, arena.view[PAGE : 2 * PAGE])
    request.address = arena.address + PAGE if arena.address else 0
    engine.prepare(file, request)
    engine.enter()
    place.complete(engine)
    assert bytes(arena.view[:PAGE]) == bytes(PAGE)
    assert bytes(arena.view[PAGE : 2 * PAGE]) == b"y" * PAGE
    del request.buffer
    arena.close()


def run(place: Place, engine: Engine, file: File, *requests: Request) -> list[int]:
    """Have an engine serve requests, in order; their results."""
    for request in requests:
        engine.prepare(file, request)
        engine.enter()
        assert place.complete(engine) == [request]
    return [request.result for request in requests]


def test_truncating_with_preallocation(place: Place) -> None:
    path = place.file("a", b"x" * 5000)
    file, engine = place.open(path), place.engine()
    size = 5000
    for mode, new in (("off", 9000), ("falloc", 20_000), ("full", 40_000), ("off", 60_000), ("full", 60_000)):
        assert run(place, engine, file, Request(TRUNCATE, new, 0, mode)) == [0]
        assert file.size() == new
        if mode != "off" and new > size:
            assert file.allocated_size() >= new - size
        size = new
    for mode in ("off", "falloc", "full"):
        assert run(place, engine, file, Request(TRUNCATE, 4000, 0, mode)) == [0]
    assert read(place, path) == b"x" * 4000
    assert run(place, engine, place.open(path, read_only=True), Request(TRUNCATE, 1, 0, "off"))[0] < 0
    assert file.size() == 4000


def test_what_is_where_by_the_engine(place: Place) -> None:
    file, engine = place.open(place.file("a", 1 << 20)), place.engine()
    run(place, engine, file, Request(WRITE, 512 * 1024, 4096, memoryview(b"x" * 4096)))
    position = 0
    while position < 2 << 20:
        answer: list[int] = []
        assert run(place, engine, file, Request(BLOCK_STATUS, position, (2 << 20) - position, answer)) == [0]
        assert tuple(answer) == file.block_status(position, (2 << 20) - position)
        position += answer[1]
    assert file.status_waits in (False, True)


def test_copying_inside_the_kernel(place: Place) -> None:
    """All of it or ENOTSUP: from file to file, within one, at odd places; what has no source is not copied."""
    content = bytes(range(256)) * 128
    here, there = place.file("here", content), place.file("there", b"t" * len(content))
    source, target, engine = place.open(here, read_only=True), place.open(there), place.engine()
    expected = bytearray(b"t" * len(content))
    ranges = ((0, 0, 4096, 0), (8192, 16384, 8192, FUA), (1001, 30_003, 777, 0), (7, 32_700, 300, 0))
    for at, to, length, flags in ranges:
        request = Request(COPY_RANGE, to, length, (source, at), flags)
        result = run(place, engine, target, request)[0]
        assert result in (0, -errno.ENOTSUP) and file_system_copies(place) == (result == 0)
        if result == 0:
            expected[to : to + length] = content[at : at + length]
    assert read(place, there)[: len(expected)] == expected
    ended = Request(COPY_RANGE, 0, 4096, (source, len(content)))
    partly = Request(COPY_RANGE, 0, 4096, (source, len(content) - 100))
    overlapping = Request(COPY_RANGE, 100, 4096, (target, 0))
    refused = Request(COPY_RANGE, 0, 4096, (target, 0))
    assert run(place, engine, target, ended, partly, overlapping) == [-errno.ENOTSUP] * 3
    assert run(place, engine, source, refused) == [-errno.EBADF]


def file_system_copies(place: Place) -> bool:
    return True


def test_read_only_and_back(place: Place) -> None:
    """The same file, opened in another way, in its place: with its number, its locks, and what is under way."""
    path = place.file("a", b"x" * 65536)
    file, other, engine = place.open(path, locking="on", read_only=True), place.open(path, locking="on"), place.engine()
    number = file.fileno()
    file.set_permissions(PERM_CONSISTENT_READ, PERM_ALL & ~PERM_WRITE)
    for read_only in (False, False, True, False):
        requests = [Request(READ, n * 4096, 4096, memoryview(bytearray(4096))) for n in range(16)]
        for request in requests:
            engine.prepare(file, request)
        engine.enter()
        file.set_read_only(read_only)
        place.complete(engine)
        assert all(request.result == 0 and request.buffer == b"x" * 4096 for request in requests)
        assert (file.read_only, file.fileno()) == (read_only, number)
        with pytest.raises(ImageInUse, match='Failed to get "write" lock'):
            other.set_permissions(PERM_WRITE, PERM_ALL)
        written = run(place, engine, file, Request(WRITE, 0, 1, memoryview(b"x")))[0]
        assert written == (-errno.EBADF if read_only else 0)
    file.set_permissions(0, PERM_ALL)
    other.set_permissions(PERM_WRITE, PERM_ALL)


def test_no_device(place: Place) -> None:
    file = place.open(place.file("a", 512))
    assert not file.is_device and file.device_limits() is None
    assert not place.host.is_device(file.path) and not place.host.is_device(place.path("nowhere"))


def test_a_path_is_lent(place: Place) -> None:
    """For libraries of this process, which read the bytes by a name while the block lasts, and not longer."""
    data = bytes(range(256)) * 1000
    with place.host.lend_path(data) as path, place.host.lend_path(b"") as empty:
        for _ in range(2):
            with open(path, "rb") as file:
                assert file.read() == data
        assert path != empty
    with pytest.raises(OSError), open(path, "rb") as file:  # unless the number has been given to another
        assert file.read() != data
        raise OSError
