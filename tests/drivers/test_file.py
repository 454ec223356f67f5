# SPDX-License-Identifier: Apache-2.0
"""Driver file: what cannot be opened and why, read-only, discards, zeroes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bottomhalf.block import BlockError
from bottomhalf.block.resize import Preallocation
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import DATA, PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE, ZERO
from bottomhalf.host.request import (
    BLOCK_STATUS,
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    NO_FALLBACK,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bottomhalf.host.sim import OPEN, SimHost
from tests.block.bench import bench, discard, read, sim_bench, zero

SIZE = 65536


@contextmanager
def nobody_special() -> Iterator[None]:
    """Without the rights of root, who may open everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)


class TestOpening:
    def test_nothing_there(self) -> None:
        with sim_bench(0) as it:
            with pytest.raises(BlockError, match=r"^Could not open 'nothing': No such file or directory$"):
                it.file("nothing", "disk")
            assert not it.graph.nodes

    def test_a_directory(self) -> None:
        with sim_bench(0) as it:
            it.host.add_directory("dir")
            with pytest.raises(BlockError, match=r"^Could not open 'dir': Is a directory$"):
                it.file("dir")

    def test_no_permission(self) -> None:
        host = SimHost(0)
        host.add_file("secret", 512, readable=False)
        host.add_file("fixed", 512, writable=False)
        with bench(host) as it:
            for name in ("secret", "fixed"):
                with pytest.raises(BlockError, match=f"^Could not open '{name}': Permission denied$"):
                    it.file(name)
            with pytest.raises(BlockError, match="Permission denied"):
                it.file("secret", auto_read_only=True)
            assert not it.graph.nodes
            file = it.file("fixed", auto_read_only=True)
            assert not file.read_only and file.file.read_only
            with pytest.raises(BlockError, match=r"^Could not open 'fixed': Permission denied$"):
                it.backend(file)
            assert not file.read_only and file.file.read_only
            assert it.user(file, held=PERM_CONSISTENT_READ).do(read(0, 512)) == [0]
            assert it.file("fixed", read_only=True).read_only

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM, errno.EMFILE])
    def test_auto_read_only(self, number: int, seed: int) -> None:
        """The file is open for writing as long as somebody may write, and the node is never read-only."""
        with sim_bench(seed, disk=b"x" * 4096) as it:
            file = it.file("disk", auto_read_only=True)
            reader = it.user(file, held=PERM_CONSISTENT_READ)
            assert (file.read_only, file.file.read_only) == (False, True)
            it.host.fault(path="disk", op=OPEN, errno=number, times=1)
            with pytest.raises(BlockError, match=f"^Could not open 'disk': {os.strerror(number)}$"):
                it.backend(file)
            assert (file.read_only, file.file.read_only) == (False, True)
            reads = [Request(READ, n * 512, 512, memoryview(bytearray(512))) for n in range(8)]
            reader.submit(*reads)
            writer = it.user(file)
            assert (file.read_only, file.file.read_only) == (False, False)
            reader.wait()
            assert all(request.buffer == b"x" * 512 for request in reads)
            assert writer.do(Request(WRITE, 0, 512, memoryview(b"w" * 512))) == [0]
            writer.backend.close()
            assert (file.read_only, file.file.read_only) == (False, True)
            fixed = it.file("disk", read_only=True, auto_read_only=True)
            with pytest.raises(BlockError, match=r"^Block node is read-only$"):
                it.backend(fixed)

    def test_a_lock_refused_leaves_it_open_for_reading(self) -> None:
        with sim_bench(0, disk=512) as it:
            other = it.host.other_process_lock("disk", held=PERM_CONSISTENT_READ, shared=PERM_ALL & ~PERM_WRITE)
            file = it.file("disk", auto_read_only=True)
            reader = it.user(file, held=PERM_CONSISTENT_READ)
            with pytest.raises(BlockError, match='Failed to get "write" lock'):
                it.backend(file)
            assert file.file.read_only and reader.do(read(0, 512)) == [0]
            other.release()
            it.backend(file)
            assert not file.file.read_only

    def test_other_errors_are_not_about_read_only(self) -> None:
        with sim_bench(0, disk=512) as it:
            it.host.fault(path="disk", op=OPEN, errno=errno.EMFILE, times=1)
            with pytest.raises(BlockError, match=r"^Could not open 'disk': Too many open files$"):
                it.file("disk", auto_read_only=True)

    def test_no_direct_io(self) -> None:
        with sim_bench(0, disk=512) as it:
            it.host.fault(path="disk", op=OPEN, errno=errno.EINVAL)
            with pytest.raises(BlockError, match="does not support O_DIRECT"):
                it.file("disk", direct=True)

    def test_a_name_that_is_taken_leaves_no_open_file(self) -> None:
        with sim_bench(0, disk=512) as it:
            it.file("disk", "name")
            before = len(it.host.world.descriptors)
            with pytest.raises(BlockError, match="Duplicate"):
                it.file("disk", "name")
            assert len(it.host.world.descriptors) == before

    def test_the_real_host(self, tmp_path: Path) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        with bench(LinuxHost()) as it:
            for path, reason in [
                (tmp_path / "nothing", f"Could not open '{tmp_path}/nothing': No such file or directory"),
                (tmp_path, f"Could not open '{tmp_path}': Is a directory"),
                (fifo, f"'file' driver requires '{fifo}' to be a regular file"),  # and the open does not wait
                ("/dev/null", "'file' driver requires '/dev/null' to be a regular file"),
            ]:
                for read_only in (False, True):
                    with pytest.raises(BlockError) as caught:
                        it.file(str(path), read_only=read_only)
                    assert str(caught.value) == reason
            assert not it.graph.nodes

    def test_no_permission_on_the_real_host(self) -> None:
        with TemporaryDirectory() as directory:
            path = Path(directory) / "fixed"
            path.write_bytes(bytes(512))
            path.chmod(0o444)
            Path(directory).chmod(0o755)
            with nobody_special(), bench(LinuxHost()) as it:
                with pytest.raises(BlockError, match=r"Permission denied"):
                    it.file(str(path))
                file = it.file(str(path), auto_read_only=True)
                assert not file.read_only
                with pytest.raises(BlockError, match=r"Permission denied"):
                    it.backend(file)
                assert it.user(file, held=PERM_CONSISTENT_READ).do(read(0, 512)) == [0]


class TestDiscard:
    @pytest.mark.parametrize("raw_unmap", [False, True])
    @pytest.mark.parametrize("file_unmap", [False, True])
    def test_both_layers_must_want_it(self, seed: int, raw_unmap: bool, file_unmap: bool) -> None:
        with sim_bench(seed, disk=b"x" * SIZE) as it:
            file = it.file("disk", unmap=file_unmap)
            user = it.user(RawNode(it.graph, file=file, unmap=raw_unmap))
            assert user.do(discard(0, SIZE), discard(0, 1)) == [0, 0]
            wanted = raw_unmap and file_unmap
            assert it.host.content("disk") == (bytes(SIZE) if wanted else b"x" * SIZE)
            assert user.backend.block_status(0, SIZE) == (ZERO if wanted else DATA, SIZE)

    @pytest.mark.parametrize("unmap", [False, True])
    def test_zeroes_become_holes_only_if_they_may(self, seed: int, unmap: bool) -> None:
        with sim_bench(seed, disk=b"x" * SIZE) as it:
            file = it.file("disk", unmap=unmap)
            user = it.user(RawNode(it.graph, file=file, unmap=True))
            assert user.do(zero(0, 4096)) == [0]
            assert file.allocated_size() == SIZE
            assert user.do(zero(4096, 4096, MAY_UNMAP)) == [0]
            assert file.allocated_size() == (SIZE - 4096 if unmap else SIZE)
            assert it.host.content("disk") == bytes(8192) + b"x" * (SIZE - 8192)

    def test_a_file_system_that_cannot(self, seed: int) -> None:
        """A discard is a hint; the file system is not asked again."""
        host = SimHost(seed)
        host.add_file("disk", b"x" * SIZE, can_discard=False)
        fault = host.fault(path="disk", op=DISCARD, errno=errno.ENOTSUP)
        with bench(host) as it:
            user = it.user(it.file("disk", unmap=True))
            assert user.do(discard(0, 4096)) == [0]
            assert user.do(discard(0, 4096)) == [0]
            assert fault.hits == 1
            assert host.content("disk") == b"x" * SIZE

    def test_real_errors_are_told(self, seed: int) -> None:
        with sim_bench(seed, disk=SIZE) as it:
            it.host.fault(path="disk", op=DISCARD, errno=errno.EIO)
            assert it.user(it.file("disk", unmap=True)).do(discard(0, 1)) == [-errno.EIO]


class TestZeroes:
    @pytest.mark.parametrize("length", [1, 4096, 3 << 20])
    @pytest.mark.parametrize("flags", [0, FUA, MAY_UNMAP])
    def test_written_where_fallocate_is_refused(self, seed: int, length: int, flags: int) -> None:
        size = 4 << 20
        with sim_bench(seed, disk=b"x" * size) as it:
            it.host.fault(path="disk", op=WRITE_ZEROES, errno=errno.ENOTSUP)
            user = it.user(it.file("disk", unmap=True))
            assert user.do(zero(100, length, flags)) == [0]
            assert it.host.content("disk") == b"x" * 100 + bytes(length) + b"x" * (size - 100 - length)
            if flags & FUA:
                assert it.host.disk.files["disk"].unsynced_changes() == 0
            assert user.do(zero(100, length, flags | NO_FALLBACK)) == [-errno.ENOTSUP]

    def test_a_failing_write_ends_it(self, seed: int) -> None:
        with sim_bench(seed, disk=b"x" * SIZE) as it:
            it.host.fault(path="disk", op=WRITE_ZEROES, errno=errno.ENOTSUP)
            it.host.fault(path="disk", op=WRITE, errno=errno.ENOSPC)
            assert it.user(it.file("disk")).do(zero(0, SIZE)) == [-errno.ENOSPC]

    def test_other_errors_are_no_reason_to_write(self, seed: int) -> None:
        with sim_bench(seed, disk=b"x" * SIZE) as it:
            it.host.fault(path="disk", op=WRITE_ZEROES, errno=errno.EIO)
            assert it.user(it.file("disk")).do(zero(0, SIZE)) == [-errno.EIO]
            assert it.host.content("disk") == b"x" * SIZE


def test_zeroes_and_discards_on_the_real_host(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * SIZE)
    with bench(LinuxHost()) as it:
        file = it.file(str(path), unmap=True)
        user = it.user(RawNode(it.graph, file=file, unmap=True))
        requests = [zero(0, 5000), zero(8192, 8192, MAY_UNMAP | FUA), discard(32768, 16384)]
        for request in requests:
            assert user.do(request) == [0]
    content = path.read_bytes()
    assert content[:5000] + content[8192:16384] == bytes(5000 + 8192)
    assert content[5000:8192] + content[16384:32768] + content[49152:] == b"x" * (3192 + 16384 + 16384)


@pytest.mark.parametrize(("aio", "kind"), [("io_uring", "io_uring"), ("native", "linux-aio"), ("threads", "threads")])
def test_the_engine_that_aio_names(tmp_path: Path, aio: str, kind: str) -> None:
    """It carries out the requests, beside the context's usual one, and its name is in the statistics."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    with bench(LinuxHost()) as it:
        usual = it.file(str(path), "usual", direct=True)
        named = it.file(str(path), "named", direct=True, aio=aio)
        assert usual.engine is it.context.engine and named.engine is it.context.engine_of(kind)
        user = it.user(named)
        data = bytes(range(256)) * 32
        requests = [Request(WRITE, n * 8192, 8192, memoryview(bytearray(data))) for n in range(40)]
        assert user.do(*requests) == [0] * 40
        assert user.do(Request(FLUSH)) == [0]
        read = Request(READ, 8192, 8192, memoryview(bytearray(8192)))
        assert user.do(read) == [0] and read.buffer == data
        assert path.read_bytes()[: 40 * 8192] == data * 40
        assert kind in [each.name for each in it.context.statistics().engines] or it.context.engine.name == kind


def test_an_engine_that_is_not_to_be_had(seed: int) -> None:
    """It is said when the node is opened, and nothing of it is left."""
    host = SimHost(seed)
    host.engine_kinds = {"threads"}
    host.add_file("a.raw", 4096)
    with bench(host) as it:
        with pytest.raises(BlockError, match="aio=native was specified, but it is not available here"):
            it.file("a.raw", "a", aio="native")
        assert not it.graph.nodes
        assert it.file("a.raw", "a", aio="threads").engine.name == "threads"


def test_what_is_where_on_a_network_file_system(seed: int) -> None:
    """The question may take long there, so the engine asks it, and the loop goes on meanwhile."""
    with sim_bench(seed, disk=SIZE) as it:
        it.host.disk.files["disk"].status_waits = True
        file = it.file("disk")
        user = it.user(RawNode(it.graph, file=file))
        assert user.do(Request(WRITE, 8192, 4096, memoryview(b"w" * 4096))) == [0]
        assert user.backend.block_status(0, SIZE) is None
        found = []
        position = 0
        while position < SIZE:
            bits, count = it.context.run(user.backend.co_block_status(position, SIZE - position))
            found.append((position, bits, count))
            position += count
        assert found == [(0, ZERO, 8192), (8192, DATA, 4096), (12288, ZERO, SIZE - 12288)]
        it.host.fault(path="disk", op=BLOCK_STATUS, errno=errno.EIO, times=1)
        with pytest.raises(OSError, match="Input/output error"):
            it.context.run(user.backend.co_block_status(0, SIZE))


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_preallocation_is_the_engines(seed: int, mode: str) -> None:
    """Whole or not at all, at a node and at a window onto it."""
    with sim_bench(seed, disk=b"x" * SIZE) as it:
        file = it.file("disk")
        window = RawNode(it.graph, file=file, offset=4096)
        backend = it.backend(window, held=PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE)
        it.context.run(backend.co_truncate(2 * SIZE, Preallocation(mode)))
        assert (file.size, window.size) == (2 * SIZE + 4096, 2 * SIZE)
        assert file.allocated_size() >= 2 * SIZE
        it.host.disk_free_bytes = 8192
        with pytest.raises(OSError, match="No space left"):
            it.context.run(backend.co_truncate(4 * SIZE, Preallocation(mode)))
        assert (file.size, window.size) == (2 * SIZE + 4096, 2 * SIZE)
        assert it.host.content("disk") == b"x" * SIZE + bytes(SIZE + 4096)
