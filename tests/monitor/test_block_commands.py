# SPDX-License-Identifier: Apache-2.0
"""Commands that change the graph, over QMP, while clients of an export read and write. What they refuse is compared
with QEMU's own words in tests/peers/test_same_as_qemu.py; here is what they do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import pytest

from bottomhalf.block import BlockBackend, Edge, Node
from bottomhalf.block.edge import ROLE_DATA
from bottomhalf.drivers import registry
from bottomhalf.drivers.registry import Opening, register_driver
from bottomhalf.host.protocol import PERM_ALL, PERM_WRITE
from bottomhalf.qapi.block import BlockdevDriver, BlockdevOptions, BlockdevRef
from bottomhalf.qapi.keyval import parse_options
from bottomhalf.qapi.objects import ObjectOptions
from bottomhalf.qapi.types import Doc, Struct
from tests.monitor.qmp_bench import NBD, QmpBench, QmpClient

DISK = 1 << 20


class OverlayOptions(Struct):
    """An overlay for tests: what was not written is read from below."""

    backing: Annotated[BlockdevRef | None, Doc("node below")] = None


class Overlay(Node):
    """Keeps what is written in memory, block by block."""

    driver = "test-overlay"
    supports_backing = True

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening.graph, **opening.common)
        self.size = DISK
        self.blocks: dict[int, bytes] = {}

    def open_size(self) -> int:
        return DISK

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        backing = self.child("backing")
        if backing is not None:
            await backing.node.co_pread(offset, buffer)
        for start, data in self.blocks.items():
            if start >= offset and start + len(data) <= offset + len(buffer):
                buffer[start - offset : start - offset + len(data)] = data

    async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.blocks[offset] = bytes(buffer)

    async def co_flush(self) -> None:
        pass


class Quorum(Node):
    """Any number of children, without doing anything with them."""

    driver = "test-quorum"

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening.graph, **opening.common)
        self.size = DISK

    def open_size(self) -> int:
        return DISK

    def add_child(self, node: Node) -> None:
        self.graph.attach_child(self, node, f"children.{len(self.children)}", ROLE_DATA)

    def remove_child(self, edge: Edge) -> None:
        self.graph.detach_child(edge)


@pytest.fixture(autouse=True)
def drivers() -> Iterator[None]:
    class Nothing(Struct):
        """No options."""

    made = {"test-overlay": (OverlayOptions, Overlay), "test-quorum": (Nothing, Quorum)}
    for name, (options, driver) in made.items():
        BlockdevOptions.register_branch(name, options)
        register_driver(name, driver)
    yield
    for name in made:
        del BlockdevOptions.branches[name]
        del BlockdevDriver.values[name]
        del registry._OPENERS[name]


@pytest.fixture
def bench(seed: int) -> Iterator[QmpBench]:
    with QmpBench(seed) as made:
        made.monitor()
        for name in ("a", "b"):
            made.host.add_file(f"/{name}.raw", name.encode() * DISK)
        yield made


@pytest.fixture
def client(bench: QmpBench) -> QmpClient:
    return bench.client()


def add(client: QmpClient, driver: str, name: str, **options: Any) -> None:
    client.call("blockdev-add", {"driver": driver, "node-name": name, **options})


def serve(client: QmpClient, name: str) -> None:
    client.call("nbd-server-start", {"addr": {"type": "unix", "data": {"path": NBD.path}}})
    client.call("block-export-add", {"type": "nbd", "id": "e", "node-name": name, "name": name, "writable": True})


def graph(client: QmpClient) -> dict[str, dict[str, str]]:
    """Node names by parent's name and edge."""
    told = client.call("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in told["nodes"]}
    found: dict[str, dict[str, str]] = {}
    for edge in told["edges"]:
        found.setdefault(names[edge["parent"]], {})[edge["name"]] = names[edge["child"]]
    return found


def test_reopen_under_a_client(bench: QmpBench, client: QmpClient) -> None:
    for name in ("a", "b"):
        add(client, "file", name, filename=f"/{name}.raw")
        bench.host.set_cached(f"/{name}.raw", "random")
    add(client, "raw", "disk", file="a")
    serve(client, "disk")
    peer = bench.nbd_client("disk")
    first = [peer.read(n * 4096, 4096) for n in range(8)]
    client.call("blockdev-reopen", {"options": [{"driver": "raw", "node-name": "disk", "file": "b"}]})
    second = [peer.read(n * 4096, 4096) for n in range(8)]
    bench.until(lambda: len(peer.done) >= 16, "the reads")
    assert {bytes(peer.done[cookie].data) for cookie in second} == {b"b" * 4096}
    assert {bytes(peer.done[cookie].data) for cookie in first} <= {b"a" * 4096, b"b" * 4096}
    assert graph(client)["disk"] == {"file": "b"}


def test_snapshot_under_a_client(bench: QmpBench, client: QmpClient) -> None:
    add(client, "file", "a", filename="/a.raw")
    add(client, "test-overlay", "top")
    serve(client, "a")
    peer = bench.nbd_client("a")
    before = peer.write(0, b"1" * 512)
    client.call("blockdev-snapshot", {"node": "a", "overlay": "top"})
    after = peer.write(512, b"2" * 512)
    bench.until(lambda: {before, after} <= set(peer.done), "the writes")
    cookie = peer.read(0, 1536)
    bench.until(lambda: cookie in peer.done, "the read")
    assert peer.done[cookie].data == b"1" * 512 + b"2" * 512 + b"a" * 512
    assert graph(client) == {"": {"root": "top"}, "top": {"backing": "a"}}
    add(client, "test-overlay", "other")
    assert client.fails("blockdev-snapshot", {"node": "other", "overlay": "top"}) == "The overlay is already in use"
    client.call("block-export-del", {"id": "e", "mode": "hard"})
    client.wait_event("BLOCK_EXPORT_DELETED")
    told = client.fails("blockdev-snapshot", {"node": "other", "overlay": "top"})
    assert told == "The overlay already has a backing image"
    told = client.fails("blockdev-snapshot", {"node": "top", "overlay": "a"})
    assert told == "The overlay does not support backing images"
    assert client.fails("blockdev-del", {"node-name": "a"}) == "Node 'a' is busy: node is used as backing hd of 'top'"


def test_children_come_and_go(client: QmpClient) -> None:
    add(client, "test-quorum", "q")
    for name in ("n0", "n1"):
        add(client, "null-co", name)
        client.call("x-blockdev-change", {"parent": "q", "node": name})
    assert graph(client) == {"q": {"children.0": "n0", "children.1": "n1"}}
    assert client.fails("x-blockdev-change", {"parent": "q", "node": "q"}) == (
        "Making 'q' a children.2 child of 'q' would create a cycle"
    )
    client.call("x-blockdev-change", {"parent": "q", "child": "children.1"})
    assert graph(client) == {"q": {"children.0": "n0"}}


def test_resize(client: QmpClient, bench: QmpBench) -> None:
    add(client, "file", "a", filename="/a.raw")
    client.call("block_resize", {"node-name": "a", "size": 4096})
    assert len(bench.host.content("/a.raw")) == 4096
    add(client, "null-co", "n")
    assert client.fails("block_resize", {"node-name": "n", "size": 4096}) == (
        "Image format driver does not support resize"
    )


def test_resize_is_alone(client: QmpClient, bench: QmpBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is on his way to what is cut off, and nobody new comes."""
    add(client, "file", "a", filename="/a.raw")
    node = bench.storage.graph.find("a")
    user = BlockBackend(bench.storage.graph, held=PERM_WRITE, shared=PERM_ALL)
    user.insert(node)
    seen = []

    async def co_resize(it: Node, size: int) -> None:
        seen.append((it, user.drained))
        await it.co_truncate(size)

    monkeypatch.setattr("bottomhalf.monitor.node_commands.co_resize", co_resize)
    client.call("block_resize", {"node-name": "a", "size": 4096})
    assert seen == [(node, True)] and not user.drained
    user.close()


def test_iothreads() -> None:
    """An export follows its node, and its clients follow it."""
    with QmpBench() as bench:
        bench.monitor()
        storage = bench.storage
        storage.add_object(
            parse_options(ObjectOptions, "iothread,id=t,poll-max-ns=0", implied_key="qom-type", loads=str)
        )
        client = bench.client()
        add(client, "null-co", "n", size=DISK)
        serve(client, "n")
        node, thread = storage.graph.find("n"), storage.iothread_context("t")
        move = {"node-name": "n", "iothread": "t", "force": True}
        client.call("x-blockdev-set-iothread", move)
        assert node.context is storage.exports.exports["e"].context is thread
        client.call("x-blockdev-set-iothread", {**move, "iothread": None})
        assert node.context is storage.loop.main
        peer = bench.nbd_client("n")
        cookie = peer.read(0, 512)
        bench.until(lambda: cookie in peer.done, "the read")
        client.call("x-blockdev-set-iothread", move)
        assert node.context is thread
        cookie = peer.read(0, 512)
        bench.until(lambda: cookie in peer.done, "the read")
