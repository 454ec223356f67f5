# SPDX-License-Identifier: Apache-2.0
"""Names, lives and deaths of nodes, and sizes that change below them."""

from __future__ import annotations

import errno

import pytest

from bottomhalf.aio import wait_while
from bottomhalf.block import BlockBackend, BlockError
from bottomhalf.block.changes import DEPTH_MAX
from bottomhalf.drivers.null import NullCoNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.protocol import PERM_RESIZE
from bottomhalf.host.sim import TRUNCATE
from tests.block.bench import READ_WRITE, read, sim_bench, write


class TestNames:
    @pytest.mark.parametrize("name", ["a", "disk0", "a.b-c_d", "Z" * 31])
    def test_good_ones(self, name: str) -> None:
        with sim_bench(0) as it:
            assert NullCoNode(it.graph, name).name == name
            assert it.graph.find(name).name == name

    @pytest.mark.parametrize("name", ["1a", "#block001", "-a", "a b", "a/b", "ä", "a\n", ".x"])
    def test_bad_ones(self, name: str) -> None:
        with sim_bench(0) as it:
            with pytest.raises(BlockError) as caught:
                NullCoNode(it.graph, name)
            assert str(caught.value) == f"Invalid node-name: '{name}'"
            assert not it.graph.nodes

    def test_too_long(self) -> None:
        with sim_bench(0) as it, pytest.raises(BlockError, match=r"^Node name too long$"):
            NullCoNode(it.graph, "a" * 32)

    def test_duplicate(self) -> None:
        with sim_bench(0) as it:
            first = NullCoNode(it.graph, "disk")
            with pytest.raises(BlockError, match=r"^Duplicate nodes with node-name='disk'$"):
                NullCoNode(it.graph, "disk")
            assert it.graph.find("disk") is first

    def test_generated(self) -> None:
        with sim_bench(0) as it:
            names = [NullCoNode(it.graph).name for _ in range(20)]
            assert len(set(names)) == 20 and all(name.startswith("#block") for name in names)

    def test_unknown(self) -> None:
        with sim_bench(0) as it:
            with pytest.raises(BlockError, match=r"^Cannot find device='' nor node-name='x'$"):
                it.graph.find("x")
            with pytest.raises(BlockError, match=r"^Cannot find device='x' nor node-name='x'$"):
                it.graph.find("x", device="x")


class TestLife:
    def test_blockdev_del(self) -> None:
        with sim_bench(0, disk=4096) as it:
            file = it.file("disk", "file")
            file.monitor_owned = True
            raw = RawNode(it.graph, "raw", file=file)
            raw.monitor_owned = True
            inner = RawNode(it.graph, "inner", file=raw)
            for name, text in [
                ("nothing", "Failed to find node with node-name='nothing'"),
                ("inner", "Node inner is not owned by the monitor"),
                ("raw", "Block device raw is in use"),
                ("file", "Block device file is in use"),
            ]:
                with pytest.raises(BlockError, match=f"^{text}$"):
                    it.graph.delete(name)
            it.graph.release(inner)
            assert sorted(it.graph.nodes) == ["file", "raw"]
            it.graph.delete("raw")
            assert not file.parents and not file.file.closed
            it.graph.delete("file")
            assert file.file.closed and not it.graph.nodes

    def test_children_that_nobody_named_go_with_their_parent(self) -> None:
        with sim_bench(0, disk=4096) as it:
            file = it.file("disk")
            raw = RawNode(it.graph, "raw", file=RawNode(it.graph, file=file))
            raw.monitor_owned = True
            backend = it.backend(raw)
            with pytest.raises(BlockError, match="in use"):
                it.graph.delete("raw")
            backend.close()
            assert len(it.graph.nodes) == 3
            it.graph.delete("raw")
            assert not it.graph.nodes and file.file.closed

    def test_a_shared_child_stays_for_its_other_parent(self) -> None:
        with sim_bench(0, disk=4096) as it:
            file = it.file("disk")
            one, two = it.backend(RawNode(it.graph, file=file)), it.backend(RawNode(it.graph, file=file))
            one.close()
            assert len(file.parents) == 1
            two.request(0, 0, 1, memoryview(bytearray(1)))
            two.close()
            assert not it.graph.nodes

    def test_release_twice(self) -> None:
        with sim_bench(0) as it:
            node = NullCoNode(it.graph, "disk")
            it.graph.release(node)
            other = NullCoNode(it.graph, "disk")
            it.graph.release(node)  # of the same name, but not the same
            assert it.graph.nodes == {"disk": other}

    def test_towers_have_a_limit(self) -> None:
        with sim_bench(0) as it:
            node = NullCoNode(it.graph, size=512)
            for _ in range(DEPTH_MAX):
                node = RawNode(it.graph, file=node)
            with pytest.raises(BlockError, match=f"More than {DEPTH_MAX} block nodes"):
                RawNode(it.graph, "top", file=node)
            assert "top" not in it.graph.nodes
            user = it.user(node)  # the highest tower works
            with it.graph.drained(node.children[0].node):
                user.submit(read(0, 512))
            user.wait()


class TestSize:
    def test_a_resize_is_seen_by_all_above(self) -> None:
        with sim_bench(0, disk=8192) as it:
            file = it.file("disk")
            raw, window = RawNode(it.graph, file=file, offset=512), RawNode(it.graph, file=file, size=1024)
            backends = [it.backend(node) for node in (file, raw, window)]
            resized: list[BlockBackend] = []
            for backend in backends:
                backend.on_resize = lambda backend=backend: resized.append(backend)
            it.context.run(file.co_truncate(16384))
            assert [backend.size for backend in backends] == [16384, 16384 - 512, 1024]
            assert set(resized) == set(backends[:2])
            it.context.run(file.co_truncate(16384))
            assert len(resized) == 2
            it.context.run(file.co_truncate(100))
            assert [backend.size for backend in backends] == [100, 0, 1024]

    def test_through_a_backend(self) -> None:
        with sim_bench(0, disk=8192) as it:
            file = it.file("disk")
            backend = it.backend(RawNode(it.graph, file=file, offset=512), held=READ_WRITE | PERM_RESIZE)
            it.context.run(backend.co_truncate(1024))
            assert (backend.size, file.size) == (1024, 1536)
            fixed = it.backend(RawNode(it.graph, file=file, size=512), held=READ_WRITE | PERM_RESIZE)
            with pytest.raises(OSError) as caught:
                it.context.run(fixed.co_truncate(1024))
            assert caught.value.errno == errno.ENOTSUP
            with pytest.raises(OSError) as caught:
                it.context.run(it.backend(file).co_truncate(1024))
            assert caught.value.errno == errno.EPERM
            it.host.fault(path="disk", op=TRUNCATE, errno=errno.EFBIG)
            with pytest.raises(OSError) as caught:
                it.context.run(backend.co_truncate(1 << 60))
            assert caught.value.errno == errno.EFBIG
            assert (backend.size, file.size) == (1024, 1536)

    def test_a_resize_waits_for_the_end_of_a_drain(self) -> None:
        with sim_bench(0, disk=8192) as it:
            file = it.file("disk")
            backend = it.backend(file, held=READ_WRITE | PERM_RESIZE)
            with it.graph.drained(file):
                coroutine = it.context.enter(backend.co_truncate(512))
                it.context.poll(False)
                assert file.size == 8192
            wait_while(it.context, lambda: not coroutine.done, what="the resize")
            assert backend.size == 512

    def test_what_lies_beyond_the_new_end_is_refused(self) -> None:
        with sim_bench(0, disk=8192) as it:
            file = it.file("disk")
            user = it.user(file)
            it.context.run(file.co_truncate(4096))
            assert user.do(read(4095, 1), read(4096, 1)) == [0, -errno.EIO]
            assert user.do(write(4000, b"x" * 97)) == [-errno.EIO]
