# SPDX-License-Identifier: Apache-2.0
"""Nodes that are inactive, and active again."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from bottomhalf.aio import AioContext
from bottomhalf.block import BlockBackend, BlockError, Graph
from bottomhalf.drivers.qcow2.node import Qcow2Node
from bottomhalf.drivers.raw import RawNode
from bottomhalf.drivers.registry import open_node
from bottomhalf.host.protocol import PERM_ALL, PERM_RESIZE, PERM_WRITE
from bottomhalf.host.request import FLUSH, WRITE
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.block.bench import READ_WRITE, flush, read, sim_bench, write
from tests.drivers.qcow2.bench import check, make

SIZE = 65536


class Program:
    """One of the programs that have the image: a graph of its own on the same machine."""

    def __init__(self, host: SimHost, **options: Any) -> None:
        self.context = AioContext(host)
        self.graph = Graph(self.context)
        given = {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": "image"}, **options}
        self.node = open_node(self.graph, from_json(BlockdevOptions, given))
        self.node.monitor_owned = True
        shared = PERM_ALL & ~(PERM_WRITE | PERM_RESIZE)
        self.backend = BlockBackend(self.graph, held=READ_WRITE, shared=shared, allow_inactive=True)
        self.backend.insert(self.node)

    def write(self, offset: int, data: bytes) -> None:
        self.context.run(self.backend.co_pwrite(offset, data))

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.context.run(self.backend.co_pread(offset, length)))

    def close(self) -> None:
        self.backend.close()
        self.graph.close()
        self.context.close()


def test_an_image_changes_hands(seed: int) -> None:
    """Two programs have a qcow2 image open, and hand it to and fro; what one wrote the other reads."""
    host = SimHost(seed)
    make(host, "image", size=1 << 20, cluster_size=4096)
    here, there = Program(host), None
    try:
        here.write(0, b"from here")
        with pytest.raises(BlockError, match="lock"):
            Program(host, **{"node-name": "refused"})
        here.graph.inactivate(here.node)
        assert not here.node.active and not here.node.child("file").node.active  # type: ignore[union-attr]
        with pytest.raises(OSError) as caught:
            here.write(0, b"not now")
        assert caught.value.errno == errno.EPERM
        assert here.read(0, 9) == b"from here"
        there = Program(host)
        assert there.read(0, 9) == b"from here"
        there.write(0, b"from there, and more")
        there.write(500_000, b"a new cluster")
        with pytest.raises(BlockError, match="lock"):
            here.graph.activate(here.node)
        assert not here.node.active
        there.graph.inactivate(there.node)
        here.graph.activate(here.node)
        assert here.read(0, 20) == b"from there, and more"
        assert here.read(500_000, 13) == b"a new cluster"
        here.write(300_000, b"and back")
        here.graph.inactivate(None)
        there.graph.activate(None)
        assert there.read(300_000, 8) == b"and back"
        there.write(700_000, b"the end")
    finally:
        here.close()  # inactive: it writes nothing any more
        if there is not None:
            there.close()
    assert check(host, "image").corruptions == 0
    assert check(host, "image").leaks == 0
    last = Program(host)
    assert last.read(300_000, 8) + last.read(700_000, 7) == b"and backthe end"
    last.close()


def test_who_stands_on_whom(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        file = it.file("disk")
        left, right = RawNode(it.graph, "left", file=file), RawNode(it.graph, "right", file=file)
        left.monitor_owned = right.monitor_owned = True
        with pytest.raises(BlockError, match=r"^Node has active parent node$"):
            it.graph.inactivate(file)
        it.graph.inactivate(left)
        assert (left.active, right.active, file.active) == (False, True, True)
        with pytest.raises(BlockError, match=r"^Inactive 'left' can't be a file child of active 'top'$"):
            it.backend(RawNode(it.graph, "top", file=left))
        it.graph.inactivate(right)
        assert not file.active
        it.graph.activate(left)
        assert (left.active, right.active, file.active) == (True, False, True)
        it.graph.inactivate(None)
        assert not any(node.active for node in (left, right, file))
        it.graph.activate(None)
        assert all(node.active for node in (left, right, file))


def test_a_writer_who_does_not_allow_it(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        node = RawNode(it.graph, "raw", file=it.file("disk"))
        user = it.user(node)
        with pytest.raises(BlockError, match=r"^Failed to inactivate node: Operation not permitted$"):
            it.graph.inactivate(node)
        assert node.active
        assert user.do(write(0, b"x")) == [0]


def test_a_writer_who_comes_later(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        node = RawNode(it.graph, "raw", file=it.file("disk"))
        node.monitor_owned = True
        it.graph.inactivate(node)
        backend = BlockBackend(it.graph, held=READ_WRITE)
        with pytest.raises(BlockError, match=r"^Permission 'write.*' unavailable on inactive node$"):
            backend.insert(node)
        backend.close()
        backend = BlockBackend(it.graph, held=READ_WRITE, allow_inactive=True)
        backend.insert(node)
        with pytest.raises(OSError) as caught:
            backend.request(WRITE, 0, 1, memoryview(b"x"))
        assert caught.value.errno == errno.EPERM
        backend.request(FLUSH, 0, 0)
        it.graph.activate(node)
        backend.request(WRITE, 0, 1, memoryview(b"x"))
        backend.close()


def test_requests_meanwhile(seed: int) -> None:
    """What was sent before is done before; what comes later finds the node as it is then."""
    with sim_bench(seed, disk=SIZE) as it:
        node = RawNode(it.graph, "raw", file=it.file("disk"))
        user = it.user(node)
        user.backend.allow_inactive = True
        before = [write(n * 512, b"x" * 512) for n in range(8)]
        user.submit(*before)
        it.graph.inactivate(node)
        assert [request.result for request in before] == [0] * 8
        assert user.do(write(0, b"y")) == [-errno.EPERM] and user.do(read(0, 1)) == [0]
        assert user.do(flush()) == [0]
        it.graph.activate(node)
        assert user.do(write(0, b"y")) == [0]


def test_what_cannot_be_written_stays(seed: int) -> None:
    """A node that cannot write its tables does not let go."""
    host = SimHost(seed)
    make(host, "image", size=1 << 20, cluster_size=4096)
    here = Program(host)
    here.write(0, b"kept")
    fault = host.fault(path="image", op=WRITE, errno=errno.EIO)
    with pytest.raises(BlockError, match=r"^Failed to inactivate node: Input/output error$"):
        here.graph.inactivate(here.node)
    assert here.node.active
    fault.remove()
    here.graph.inactivate(here.node)
    there = Program(host)
    assert there.read(0, 4) == b"kept"
    there.close()
    here.graph.activate(here.node)
    here.close()


def test_damage_is_found_when_it_comes_back(seed: int) -> None:
    host = SimHost(seed)
    make(host, "image", size=1 << 20, cluster_size=4096)
    here = Program(host)
    here.graph.inactivate(here.node)
    inode = host.disk.files["image"]
    magic = inode.current.read(0, 4)
    inode.write(0, b"nope", True)
    with pytest.raises(BlockError, match=r"^Could not activate node: "):
        here.graph.activate(here.node)
    assert not here.node.active
    inode.write(0, magic, True)
    here.graph.activate(here.node)
    here.write(0, b"well again")
    here.close()


def test_born_inactive(seed: int) -> None:
    host = SimHost(seed)
    make(host, "image", size=1 << 20, cluster_size=4096)
    first = Program(host)
    file = {"driver": "file", "node-name": "file", "filename": "image", "active": False}
    second = Program(host, active=False, file=file)
    assert isinstance(second.node, Qcow2Node) and not second.node.active
    first.write(4096, b"written after the other had opened it")
    first.close()
    second.graph.activate(second.node)
    assert second.read(4096, 7) == b"written"
    second.write(0, b"mine now")
    second.close()
    assert check(host, "image").corruptions == 0
