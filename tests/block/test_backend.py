# SPDX-License-Identifier: Apache-2.0
"""What the backend refuses, counts and adds; errors from below; requests of no bytes."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.block import BlockBackend
from bottomhalf.drivers.null import NullCoNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import PERM_CONSISTENT_READ
from bottomhalf.host.request import FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Request
from tests.block.bench import User, bench, discard, flush, read, sim_bench, write, zero

SIZE = 65536


def test_out_of_bounds(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        user = it.user(it.file("disk"))
        good = [read(0, SIZE), read(SIZE - 1, 1), read(SIZE, 0)]
        bad = [read(SIZE, 1), read(-1, 1), read(1, SIZE), read(1 << 62, 512), read(-5, 5)]
        mixed = [request for pair in zip(good, bad, strict=False) for request in pair] + bad[3:]
        user.do(*mixed)
        assert {request.result for request in good} == {0}
        assert {request.result for request in bad} == {-errno.EIO}
        statistics = user.backend.statistics()
        assert (statistics.operations[READ], statistics.bytes[READ], statistics.failed) == (3, SIZE + 1, 5)
        assert user.do(*[read(SIZE, 1)]) == [-errno.EIO]


def test_out_of_bounds_from_plain_code(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        backend = it.backend(it.file("disk"))
        with pytest.raises(OSError) as caught:
            backend.request(READ, SIZE, 1, memoryview(bytearray(1)))
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError):
            it.context.run(backend.co_pwrite(SIZE - 1, b"xx"))
        assert backend.in_flight == 0


def test_no_writing_without_the_permission(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        user = it.user(it.file("disk", read_only=True), held=PERM_CONSISTENT_READ)
        for request in (write(0, b"x"), discard(0, 1), zero(0, 1)):
            assert user.do(request) == [-errno.EPERM]
        assert user.do(flush()) == [0]
        assert user.do(read(0, 1)) == [0]


def test_no_medium(seed: int) -> None:
    with sim_bench(seed) as it:
        user = User(BlockBackend(it.graph))
        assert user.do(read(0, 1), read(1, 1)) == [-errno.ENOMEDIUM] * 2
        assert user.backend.file_range(0, 1) is None
        assert user.backend.memory_alignment == 1
        user.backend.prefetch(0, 1)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_errors_from_the_disk(seed: int, number: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.fault(path="disk", errno=number, start=4096, end=8192)
        user = it.user(RawNode(it.graph, file=it.file("disk", unmap=True), unmap=True))
        for make in (lambda o: read(o, 512), lambda o: write(o, b"x"), lambda o: discard(o, 512), lambda o: zero(o, 9)):
            assert user.do(make(0), make(5000), make(9000)) == [0, -number, 0]
        with pytest.raises(OSError) as caught:
            it.context.run(user.backend.co_pread(4096, 1))
        assert caught.value.errno == number


def test_the_disk_is_full(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.disk_free_bytes = 8192
        user = it.user(it.file("disk"))
        assert user.do(write(0, b"x" * 8192)) == [0]
        assert user.do(write(8192, b"x" * 4096), write(0, b"y")) == [-errno.ENOSPC, 0]
        assert it.host.content("disk")[:8192] == b"y" + b"x" * 8191


def test_a_failed_flush_is_told(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.fault(path="disk", op=FLUSH, errno=errno.EIO, times=1)
        user = it.user(RawNode(it.graph, file=it.file("disk")))
        assert user.do(write(0, b"x")) == [0]
        assert user.do(flush()) == [-errno.EIO]
        assert user.do(flush()) == [0]


def test_fua_is_durable(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        user = it.user(RawNode(it.graph, file=it.file("disk")))
        assert user.do(write(0, b"x" * 600, FUA), write(4096, b"y" * 512)) == [0, 0]
        assert user.do(zero(8192, 512, FUA)) == [0]
        assert it.host.survivor("disk")[:600] == b"x" * 600
        assert user.do(flush()) == [0]
        assert it.host.durable_content("disk") == it.host.content("disk")


@pytest.mark.parametrize("direct", [False, True])
def test_writethrough(seed: int, direct: bool) -> None:
    with sim_bench(seed, disk=b"z" * SIZE) as it:
        user = it.user(it.file("disk", direct=direct), writethrough=True)
        assert user.do(write(1, b"x" * 600), write(5000, b"y" * 512)) == [0, 0]
        assert it.host.disk.files["disk"].unsynced_changes() == 0
        assert user.do(zero(8190, 700)) == [0]
        assert it.host.disk.files["disk"].unsynced_changes() == 0
        assert it.host.durable_content("disk") == it.host.content("disk")


def test_no_flush_ignores_fua_and_flush(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.fault(path="disk", op=FLUSH, errno=errno.EIO)
        user = it.user(it.file("disk", no_flush=True), writethrough=True)
        assert user.do(write(0, b"x", FUA)) == [0]
        assert user.do(flush()) == [0]
        assert user.do(zero(0, 512, FUA)) == [0]
        assert it.host.durable_content("disk") == bytes(SIZE)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("cached", ["always", "never", "random"])
def test_requests_of_no_bytes(seed: int, direct: bool, cached: str) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", cached)
        user = it.user(RawNode(it.graph, file=it.file("disk", direct=direct, unmap=True), offset=1, unmap=True))
        for at in (0, 5, SIZE - 1):
            for request in (read(at, 0), write(at, b""), write(at, b"", FUA), discard(at, 0), zero(at, 0)):
                assert user.do(request) == [0]
        assert it.host.content("disk") == bytes(SIZE)


@pytest.mark.parametrize("kind", ["io_uring", "threads"])
@pytest.mark.parametrize("direct", [False, True])
def test_the_real_host_with_either_engine(
    tmp_path: Path, kind: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    host = LinuxHost()
    try:
        host.engine(kind).close()
        host.open_file(str(path), direct=direct).close()
    except OSError as error:
        pytest.skip(f"no {kind} or no O_DIRECT here: {error}")
    real_engine = host.engine
    monkeypatch.setattr(host, "engine", lambda _="": real_engine(kind))
    with bench(host) as it:
        user = it.user(RawNode(it.graph, file=it.file(str(path), direct=direct, unmap=True), unmap=True))
        expected = bytearray(SIZE)
        for round in range(3):
            batch = []
            for n in range(0, SIZE, 3000):
                data = bytes([round * 50 + n // 3000 + 1]) * min(2500, SIZE - n)
                expected[n : n + len(data)] = data
                batch.append(write(n, data, FUA if n % 2 else 0))
            user.submit(*batch)
            user.wait()
            user.submit(zero(round * 4096 + 1, 5000))
            user.wait()
            expected[round * 4096 + 1 : round * 4096 + 5001] = bytes(5000)
            assert user.do(flush()) == [0]
            for request in (read(100, 0), write(100, b"", FUA), discard(100, 0), zero(100, 0)):
                assert user.do(request) == [0]
        assert {request.result for request in user.told} == {0}
        requests = [read(n, 777) for n in range(0, SIZE - 777, 777)]
        assert user.do(*requests) == [0] * len(requests)
        for number, request in enumerate(requests):
            assert request.buffer == expected[number * 777 : number * 777 + 777]
        assert user.do(discard(0, 8192)) == [0]
    assert path.read_bytes()[8192:] == expected[8192:]


def test_statistics(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        user = it.user(it.file("disk"))
        user.do(read(0, 10), read(10, 20))
        user.do(write(0, b"abc"))
        user.do(flush())
        user.backend.account_read(2, 100)
        user.submit(read(0, 5))
        statistics = user.backend.statistics()
        assert statistics.operations == (5, 1, 1, 0, 0)
        assert statistics.bytes == (135, 3, 0, 0, 0)
        assert statistics.in_flight == len(user.waiting)
        user.wait()


def test_a_result_that_is_known_early_is_told_once(seed: int) -> None:
    """An engine may have set ``result`` of a pending request before it tells: a drain must not tell it too."""
    with sim_bench(seed) as it:

        class Early(NullCoNode):
            def submit_batch(self, requests: list[Request]) -> list[Request]:
                def tell() -> None:
                    for request in requests:
                        request.owner.complete([request])  # type: ignore[union-attr]

                self.finish(requests, 0)
                it.context.schedule_oneshot(tell)
                return requests

        node = Early(it.graph)
        user = it.user(node)
        with it.graph.drained(node):
            user.submit(read(0, 1), read(1, 1))
        user.wait()
        user.backend.request(READ, 0, 1, memoryview(bytearray(1)))
        assert user.backend.in_flight == 0


def test_file_range(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "always")
        file = it.file("disk")
        backend = it.backend(RawNode(it.graph, file=file, offset=512))
        assert backend.file_range(100, 50) == (file.file, 612)
        assert backend.file_range(SIZE - 512, 1) is None
        with it.graph.drained(file):
            assert backend.file_range(0, 1) is None
        it.host.set_cached("disk", "never")
        assert backend.file_range(0, 1) is None


def test_pread_nowait(seed: int) -> None:
    """Bytes that are in memory, or nothing; counted like other reads."""
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "always")
        file = it.file("disk")
        backend = it.backend(RawNode(it.graph, file=file, offset=512))
        it.context.run(backend.co_pwrite(100, b"here"))
        assert backend.pread_nowait(6, 99) == b"\0here\0"
        assert backend.statistics().operations[READ] == 1 and backend.statistics().bytes[READ] == 6
        with it.graph.drained(file):
            assert backend.pread_nowait(1, 0) is None
        it.host.fault(op=READ, errno=errno.EIO, times=1)
        with pytest.raises(OSError) as caught:
            backend.pread_nowait(1, 0)
        assert caught.value.errno == errno.EIO
        it.host.set_cached("disk", "never")
        assert backend.pread_nowait(1, 0) is None
        assert backend.in_flight == 0 and backend.statistics().failed == 1
        assert backend.statistics().operations[READ] == 1


def test_block_status(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        backend = it.backend(RawNode(it.graph, file=it.file("disk"), offset=4096))
        it.context.run(backend.co_pwrite(4096, b"x" * 4096))
        for status in (backend.block_status, lambda *a: it.context.run(backend.co_block_status(*a))):
            assert status(0, SIZE - 4096) == (2, 4096)
            assert status(4096, SIZE - 8192) == (1, 4096)


def test_ops_of_a_batch_come_in_lists(seed: int) -> None:
    """Whoever has several requests in flight is told about them together where they end together."""
    with sim_bench(seed) as it:
        lists: list[Any] = []
        from bottomhalf.drivers.null import NullAioNode

        backend = it.backend(NullAioNode(it.graph))
        queue = backend.queue(lists.append)
        for op in (WRITE, WRITE_ZEROES):
            requests = [Request(op, n, 1, memoryview(bytearray(1))) for n in range(5)]
            for request in requests:
                request.owner = queue
            assert queue.submit(requests) == requests
            it.context.poll(True)
            assert lists.pop() == requests
