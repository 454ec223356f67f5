# SPDX-License-Identifier: Apache-2.0
"""Files of the simulated host: content against a model, page cache, space, locks, opening."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.host.protocol import DATA, PERM_ALL, PERM_RESIZE, PERM_WRITE, ZERO, ImageInUse
from bottomhalf.host.request import (
    DISCARD,
    FLUSH,
    FUA,
    IN_PROGRESS,
    MAY_UNMAP,
    NO_FALLBACK,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bottomhalf.host.sim import OPEN, TRUNCATE, SimHost
from bottomhalf.host.sim.files import SimFile

PAGE = 4096


def make(
    content: int | bytes = 0, cached: str = "always", seed: int = 0, direct: bool = False
) -> tuple[SimHost, SimFile]:
    host = SimHost(seed)
    host.add_file("x.raw", content, cached=cached)
    return host, host.open_file("x.raw", direct=direct)


def do(host: SimHost, file: SimFile, op: int, offset: int, length: int, fill: int = 0, flags: int = 0) -> int:
    """One request through an engine; its result."""
    buffer = bytearray([fill]) * length if op in (READ, WRITE) else None
    request = Request(op, offset, length, buffer, flags)
    engine = host.engine()
    engine.prepare(file, request)
    engine.enter()
    while not engine.pending:
        host.world.step()
    assert engine.reap() == [request]
    engine.close()
    return request.result


def test_opening() -> None:
    host = SimHost()
    host.add_file("a", 10)
    host.add_file("hidden", 10, readable=False)
    host.add_file("frozen", 10, writable=False)
    host.add_directory("folder")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        host.open_file("nowhere")
    with pytest.raises(PermissionError):
        host.open_file("hidden", read_only=True)
    with pytest.raises(PermissionError):
        host.open_file("frozen")
    with pytest.raises(IsADirectoryError):
        host.open_file("folder")
    with pytest.raises(ValueError):
        host.open_file("a", locking="perhaps")
    with pytest.raises(FileExistsError):
        host.add_file("a", 1)
    assert host.open_file("frozen", read_only=True).size() == 10
    host.fault(path="a", op=OPEN, errno=errno.EMFILE, times=1)
    with pytest.raises(OSError) as caught:
        host.open_file("a")
    assert caught.value.errno == errno.EMFILE
    assert host.open_file("a").path == "a"


def test_closed_file_says_so() -> None:
    _, file = make(10)
    file.close()
    file.close()
    with pytest.raises(OSError) as caught:
        file.size()
    assert caught.value.errno == errno.EBADF


def test_file_cannot_be_polled() -> None:
    host, file = make(10)
    with pytest.raises(PermissionError):
        host.poller().register(file.fileno(), 1)


def test_read_beyond_the_end_is_zeroes() -> None:
    _, file = make(b"x" * 100)
    request = Request(READ, 90, 20, bytearray(b"junk" * 5))
    assert file.read_inline([request]) == []
    assert request.result == 0
    assert request.buffer == b"x" * 10 + bytes(10)


def test_holes_and_data() -> None:
    host, file = make(10 * PAGE)
    assert file.block_status(0, 10 * PAGE) == (ZERO, 10 * PAGE)
    assert file.allocated_size() == 0
    assert do(host, file, WRITE, 3 * PAGE + 5, 10, fill=1) == 0
    assert file.block_status(0, 10 * PAGE) == (ZERO, 3 * PAGE)
    assert file.block_status(3 * PAGE + 100, 10 * PAGE) == (DATA, PAGE - 100)
    assert file.block_status(4 * PAGE, 10 * PAGE) == (ZERO, 10 * PAGE)
    assert file.allocated_size() == PAGE
    assert do(host, file, WRITE_ZEROES, 4 * PAGE, PAGE) == 0  # allocated, never written
    assert file.block_status(4 * PAGE, PAGE) == (ZERO, PAGE)
    assert file.allocated_size() == 2 * PAGE
    assert do(host, file, WRITE_ZEROES, 3 * PAGE, 2 * PAGE, flags=MAY_UNMAP) == 0
    assert file.allocated_size() == 0


def test_huge_holes_cost_nothing() -> None:
    host, file = make(1 << 50)
    assert do(host, file, WRITE, 1 << 49, 1, fill=1) == 0
    assert file.block_status(0, 1 << 50) == (ZERO, 1 << 49)
    assert do(host, file, DISCARD, 0, 1 << 50) == 0
    assert file.block_status(0, 1 << 50) == (ZERO, 1 << 50)


def test_read_only_and_refused_requests() -> None:
    host, _ = make(PAGE)
    file = host.open_file("x.raw", read_only=True)
    assert do(host, file, READ, 0, 10) == 0
    assert do(host, file, WRITE, 0, 10) == -errno.EBADF
    assert do(host, file, READ, -1, 10) == -errno.EINVAL
    with pytest.raises(OSError):
        file.truncate(0)


def test_direct_files_are_aligned_and_never_inline() -> None:
    host, file = make(bytes(PAGE), direct=True)
    assert file.alignment == 512
    requests = [Request(READ, 0, 512, bytearray(512))]
    assert file.read_inline(requests) == requests
    assert requests[0].result == IN_PROGRESS
    assert not file.is_cached(0, 512)
    assert do(host, file, READ, 512, 512) == 0
    assert do(host, file, READ, 1, 512) == -errno.EINVAL
    assert do(host, file, READ, 0, 100) == -errno.EINVAL


def test_file_system_without_allocation_calls() -> None:
    host = SimHost()
    host.add_file("x.raw", b"x" * PAGE, can_zero=False, can_discard=False)
    file = host.open_file("x.raw")
    assert do(host, file, DISCARD, 0, PAGE) == -errno.EOPNOTSUPP
    assert do(host, file, WRITE_ZEROES, 0, PAGE, flags=NO_FALLBACK) == -errno.ENOTSUP
    assert host.content("x.raw") == b"x" * PAGE
    assert do(host, file, WRITE_ZEROES, 0, PAGE) == 0
    assert host.content("x.raw") == bytes(PAGE)
    assert file.block_status(0, PAGE) == (DATA, PAGE)


def test_truncate() -> None:
    host, file = make(b"x" * 5000)
    file.truncate(4100)
    file.truncate(6000)
    assert file.size() == 6000
    assert host.content("x.raw") == b"x" * 4100 + bytes(1900)
    host.fault(op=TRUNCATE, errno=errno.EFBIG)
    with pytest.raises(OSError) as caught:
        file.truncate(1 << 60)
    assert caught.value.errno == errno.EFBIG


# Page cache


def test_never_cached() -> None:
    _, file = make(b"x" * PAGE, cached="never")
    requests = [Request(READ, 0, 10, bytearray(10))]
    assert file.read_inline(requests) == requests
    assert file.write_inline([Request(WRITE, 0, 1, b"y")])[0].result == IN_PROGRESS
    assert not file.is_cached(0, 10)


def test_explicit_pages() -> None:
    host, file = make(b"x" * 4 * PAGE, cached="explicit")
    assert not file.is_cached(0, 1)
    host.load("x.raw", 0, 2 * PAGE)
    assert file.is_cached(0, 2 * PAGE) and not file.is_cached(0, 2 * PAGE + 1)
    assert do(host, file, READ, 3 * PAGE, 10) == 0  # brings it into memory
    assert file.is_cached(3 * PAGE, PAGE)
    host.evict("x.raw", 0, PAGE)
    assert not file.is_cached(0, 1) and file.is_cached(PAGE, PAGE)
    assert file.is_cached(4 * PAGE, PAGE)  # beyond the end there is nothing to wait for


def test_pread_waits_in_place() -> None:
    host, file = make(b"abc" * 100, cached="explicit")
    before_ns = host.monotonic_ns()
    assert file.pread(5, 297) == b"abc"
    assert host.monotonic_ns() > before_ns
    before_ns = host.monotonic_ns()
    assert file.pread(3, 0) == b"abc"
    assert file.pread(10, 1 << 20) == b""
    assert host.monotonic_ns() == before_ns
    host.fault(path="x.raw", op=READ, errno=errno.EIO, times=1)
    with pytest.raises(OSError) as caught:
        file.pread(1, 0)
    assert caught.value.errno == errno.EIO


def test_prefetch_brings_pages_in_later() -> None:
    host, file = make(b"x" * 3 * PAGE, cached="explicit")
    file.prefetch(PAGE, PAGE)
    file.prefetch(1 << 30, PAGE)
    assert not file.is_cached(PAGE, PAGE)
    host.advance(10**9)
    assert file.is_cached(PAGE, PAGE) and not file.is_cached(0, 1)


def test_random_pages_hit_and_miss(seed: int) -> None:
    _, file = make(b"x" * 64 * PAGE, cached="random", seed=seed)
    hits = sum(not file.read_inline([Request(READ, n % 64 * PAGE, 10, bytearray(10))]) for n in range(200))
    assert 20 < hits < 180


def test_inline_write_with_fua_goes_to_the_engine() -> None:
    _, file = make(PAGE)
    plain, forced = Request(WRITE, 0, 1, b"a"), Request(WRITE, 1, 1, b"b", FUA)
    assert file.write_inline([plain, forced]) == [forced]
    assert (plain.result, forced.result) == (0, IN_PROGRESS)


# Space


def test_full_disk_takes_what_fits() -> None:
    host, file = make(8 * PAGE)
    host.disk_free_bytes = 2 * PAGE
    assert do(host, file, WRITE, 100, 4 * PAGE, fill=1) == -errno.ENOSPC
    assert host.content("x.raw")[: 3 * PAGE] == bytes(100) + b"\1" * (2 * PAGE - 100) + bytes(PAGE)
    assert host.disk_free_bytes == 0
    assert do(host, file, WRITE, 0, 2 * PAGE, fill=2) == 0  # space it has already
    assert do(host, file, WRITE_ZEROES, 4 * PAGE, PAGE) == -errno.ENOSPC
    assert do(host, file, DISCARD, 0, PAGE) == 0
    assert host.disk_free_bytes == PAGE
    file.truncate(0)
    assert host.disk_free_bytes == 2 * PAGE


# Locks


def test_locks_between_openers() -> None:
    host, first = make(10)
    second = host.open_file("x.raw")
    first.set_permissions(PERM_WRITE, PERM_ALL & ~PERM_WRITE)
    with pytest.raises(ImageInUse, match='Failed to get "write" lock: the image is in use by this process'):
        second.set_permissions(PERM_WRITE, PERM_ALL)
    with pytest.raises(ImageInUse, match='Failed to get shared "write" lock'):
        second.set_permissions(0, PERM_ALL & ~PERM_WRITE)
    second.set_permissions(PERM_RESIZE, PERM_ALL)
    host.open_file("x.raw", locking="off").set_permissions(PERM_WRITE, 0)
    first.set_permissions(0, PERM_ALL)
    second.set_permissions(PERM_WRITE, PERM_ALL)
    second.close()
    first.set_permissions(PERM_ALL, 0)


def test_locks_of_other_processes() -> None:
    host, file = make(10)
    lock = host.other_process_lock("x.raw", PERM_WRITE, PERM_ALL & ~PERM_WRITE)
    with pytest.raises(ImageInUse) as caught:
        file.set_permissions(PERM_WRITE, PERM_ALL)
    assert caught.value.errno == errno.EAGAIN
    assert caught.value.strerror is not None
    assert caught.value.strerror.startswith('Failed to get "write" lock: ')
    assert "qemu-system-x86_64 (pid 1234)" in caught.value.strerror
    lock.release()
    file.set_permissions(PERM_WRITE, PERM_ALL & ~PERM_WRITE)
    with pytest.raises(ImageInUse):
        host.other_process_lock("x.raw", PERM_WRITE, PERM_ALL)


# Model

SIZE = 5 * PAGE + 77
operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "unmap", "discard", "truncate", "flush"]),
        st.integers(0, SIZE + 5000),
        st.integers(0, 3 * PAGE),
        st.integers(1, 255),
    ),
    max_size=25,
)


@given(operations, st.integers(0, 5), st.booleans())
def test_content_is_that_of_a_bytearray(
    todo: list[tuple[str, int, int, int]], seed: int, through_engine: bool
) -> None:
    host, file = make(SIZE, cached="random", seed=seed)
    model = bytearray(SIZE)

    def grow(end: int) -> None:
        model.extend(bytes(max(0, end - len(model))))

    for name, offset, length, fill in todo:
        if name == "write":
            request = Request(WRITE, offset, length, bytes([fill]) * length)
            if through_engine or file.write_inline([request]):
                assert do(host, file, WRITE, offset, length, fill) == 0
            if length:
                grow(offset + length)
                model[offset : offset + length] = bytes([fill]) * length
        elif name == "discard":
            assert do(host, file, DISCARD, offset, length) == 0
            end = max(offset, min(len(model), offset + length))
            model[offset:end] = bytes(len(model[offset:end]))
        elif name == "truncate":
            file.truncate(offset)
            grow(offset)
            del model[offset:]
        elif name == "flush":
            assert do(host, file, FLUSH, 0, 0) == 0
            assert host.durable_content("x.raw") == host.survivor("x.raw") == model
        else:
            flags = MAY_UNMAP if name == "unmap" else 0
            assert do(host, file, WRITE_ZEROES, offset, length, flags=flags) == 0
            if length:
                grow(offset + length)
                model[offset : offset + length] = bytes(length)
        assert file.size() == len(model)
    assert host.content("x.raw") == model
    position = 0
    while position < len(model):
        bits, count = file.block_status(position, len(model) - position)
        assert 1 <= count <= len(model) - position
        if bits == ZERO:
            assert not any(model[position : position + count])
        position += count
