# SPDX-License-Identifier: Apache-2.0
"""Nodes take other options while requests are in flight: all of them or none, and no request notices."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from bottomhalf.block import BlockError, Node
from bottomhalf.drivers.describe import file_name
from bottomhalf.drivers.file import FileNode
from bottomhalf.drivers.registry import open_node, reopen_nodes
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_WRITE, ZERO
from bottomhalf.host.request import FLUSH
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.block.bench import READ_WRITE, Bench, bench, read, sim_bench, write
from tests.block.parts import Pass, threads

SIZE = 65536


def options(**members: Any) -> BlockdevOptions:
    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {name.replace("_", "-"): named(member) for name, member in value.items()}
        return value

    return from_json(BlockdevOptions, named(members))


def file(name: str | None = "file", filename: str = "disk", **members: Any) -> BlockdevOptions:
    named = {} if name is None else {"node_name": name}
    return options(driver="file", filename=filename, **named, **members)


def raw(child: Any, name: str = "raw", **members: Any) -> BlockdevOptions:
    return options(driver="raw", node_name=name, file=child, **members)


def add(it: Bench, given: BlockdevOptions) -> Node:
    node = open_node(it.graph, given)
    node.monitor_owned = True
    return node


def state(node: Node) -> Any:
    children = [(edge, edge.node, edge.held, edge.shared) for edge in node.children]
    return node.name, node.options, node.read_only, node.size, node.permissions, children


def refused(it: Bench, text: str, *given: BlockdevOptions) -> None:
    before = [state(node) for node in it.graph.nodes.values()]
    with pytest.raises(BlockError) as caught:
        reopen_nodes(it.graph, given)
    assert str(caught.value).partition("\n")[0] == text
    assert [state(node) for node in it.graph.nodes.values()] == before
    assert not any(node.quiesce_counter or node.references for node in it.graph.nodes.values())


def test_detect_zeroes(seed: int) -> None:
    """Turned on and off again; a change that is refused leaves it as it was."""
    with sim_bench(seed, disk=SIZE) as it:
        it.host.add_file("other", bytes(SIZE))
        disk = add(it, file(discard="unmap"))
        plain = raw("file", discard="unmap")
        detecting = raw("file", discard="unmap", detect_zeroes="unmap")
        user = it.user(add(it, plain))

        def makes_hole() -> bool:
            """Whether zero bytes that are written over data become a hole."""
            assert user.do(write(0, b"x" * 8192)) == [0]
            assert user.do(write(0, bytes(8192))) == [0]
            return disk.block_status(0, 8192) == (ZERO, 8192)

        assert not makes_hole()
        reopen_nodes(it.graph, [detecting])
        assert makes_hole()
        refused(it, "Cannot change the option 'driver'", plain, options(driver="null-co", node_name="file"))
        assert makes_hole()
        reopen_nodes(it.graph, [plain])
        assert not makes_hole()
        text = "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
        refused(it, text, raw("file", detect_zeroes="unmap"))


def test_read_only_and_back_under_load(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "random")
        node = add(it, file())
        assert isinstance(node, FileNode)
        reader = it.user(node, held=PERM_CONSISTENT_READ)
        for round in range(3):
            requests = [read(n * 512, 512) for n in range(20)]
            reader.submit(*requests)
            reopen_nodes(it.graph, [file(read_only=True)])
            assert node.read_only and node.file.read_only
            with pytest.raises(BlockError, match=r"^Block node is read-only$"):
                it.backend(node)
            reader.wait()
            reopen_nodes(it.graph, [file()])
            assert not node.read_only and not node.file.read_only
            writer = it.user(node)
            assert writer.do(write(0, bytes([round]))) == [0]
            writer.backend.close()
            assert {request.result for request in requests} == {0}
        assert it.host.content("disk")[:1] == bytes([2])


def test_a_writer_is_in_the_way(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        node = add(it, file())
        upper = add(it, raw("file"))
        it.backend(upper)
        refused(it, "Read-only block node 'file' cannot support read-write users", file(read_only=True))
        refused(it, "Read-only block node 'raw' cannot support read-write users", raw("file", read_only=True))
        assert isinstance(node, FileNode) and not node.file.closed and not node.file.read_only


def test_several_or_none(seed: int) -> None:
    """One that refuses keeps all where they were, whichever it is."""
    with sim_bench(seed, a=SIZE, b=SIZE) as it:
        for name in ("a", "b"):
            add(it, file(name, name))
        backend = it.backend(it.graph.find("b"))
        good, bad = file("a", "a", read_only=True), file("b", "b", read_only=True)
        for given in ([good, bad], [bad, good]):
            refused(it, "Read-only block node 'b' cannot support read-write users", *given)
        backend.close()
        reopen_nodes(it.graph, [good, bad])
        assert all(node.read_only for node in it.graph.nodes.values())


def test_another_child_under_load(seed: int) -> None:
    with sim_bench(seed, a=b"a" * SIZE, b=b"b" * (SIZE // 2)) as it:
        for name in ("a", "b"):
            it.host.set_cached(name, "random")
            add(it, file(name, name))
        node = add(it, raw("a"))
        user = it.user(node)
        before = [read(n, 1) for n in range(9)]
        user.submit(*before)
        reopen_nodes(it.graph, [raw("b")])
        assert user.backend.size == node.size == SIZE // 2
        after = [read(n, 1) for n in range(9)]
        user.submit(*after)
        user.wait()
        assert {bytes(request.buffer) for request in before} == {b"a"}
        assert {bytes(request.buffer) for request in after} == {b"b"}
        assert not it.graph.find("a").parents


def test_another_window(seed: int) -> None:
    content = bytes(range(256)) * 256
    with sim_bench(seed, disk=content) as it:
        add(it, file())
        node = add(it, raw("file"))
        user = it.user(node)
        reopen_nodes(it.graph, [raw("file", offset=512, size=4096)])
        assert user.backend.size == 4096
        request = read(3, 5)
        assert user.do(request) == [0]
        assert request.buffer == content[515:520]
        text = f"Offset ({SIZE + 1}) cannot be greater than size of the containing file ({SIZE})"
        refused(it, text, raw("file", offset=SIZE + 1))
        reopen_nodes(it.graph, [raw("file")])
        assert user.backend.size == SIZE


def test_a_child_given_by_options_follows(seed: int) -> None:
    with sim_bench(seed, disk=SIZE, other=SIZE) as it:
        child = {"driver": "file", "filename": "disk"}
        node = add(it, raw(child))
        inner = node.children[0].node
        reopen_nodes(it.graph, [raw(child, read_only=True)])
        assert node.read_only and inner.read_only
        reopen_nodes(it.graph, [raw(child)])
        assert not node.read_only and not inner.read_only
        refused(it, "Cannot change the option 'filename'", raw({**child, "filename": "other"}))
        add(it, file("other", "other"))
        reopen_nodes(it.graph, [raw("other")])
        assert inner.closed
        refused(it, "Cannot change the option 'file.driver'", raw(child))


def test_an_implicit_filter_is_not_the_users(seed: int) -> None:
    """What a job put in by itself is looked through: the child below may be named as before, and no other can be; the
    image is called by its own name."""
    with sim_bench(seed, disk=SIZE, other=SIZE) as it:
        below = add(it, file())
        add(it, file("other", "other"))
        node = add(it, raw("file"))
        filter = Pass(it.graph, "", below)
        filter.implicit = True
        it.graph.insert_node(filter)
        assert node.children[0].node is filter
        reopen_nodes(it.graph, [raw("file", read_only=True)])
        assert node.read_only and node.children[0].node is filter
        refused(it, "Cannot replace implicit file child of raw", raw("other"))
        assert file_name(node) == file_name(filter) == "disk"
        it.graph.remove_filter(filter)


class TestRefused:
    def test_options(self) -> None:
        with sim_bench(0, disk=SIZE, other=SIZE) as it:
            add(it, file())
            add(it, raw("file"))
            add(it, options(driver="null-co", node_name="null", size=4096))
            null = {"driver": "null-co", "node_name": "null"}
            for text, given in [
                ("node-name not specified", file(None)),
                ("Failed to find node with node-name='nope'", file("nope")),
                ("Cannot change the option 'driver'", options(driver="null-co", node_name="file")),
                ("Cannot change the option 'filename'", file(filename="other")),
                ("Cannot change the option 'locking'", file(locking="on")),
                ("Cannot change the option 'size'", options(**null, size=1)),
                ("Option 'size' cannot be reset to its default value", options(**null)),
                ("Cannot change the option 'read-zeroes'", options(**null, size=4096, read_zeroes=True)),
                ("Cannot change the option 'force-share'", file(read_only=True, force_share=True)),
                ("Making 'raw' a file child of 'raw' would create a cycle", raw("raw")),
                ("Cannot find device='' nor node-name='nope'", raw("nope")),
            ]:
                refused(it, text, given)
                refused(it, text, file(read_only=True), given) if "file" not in text else None

    def test_a_node_that_was_made_by_hand(self) -> None:
        with sim_bench(0, disk=SIZE) as it:
            it.file("disk", "file").monitor_owned = True
            refused(it, "Cannot change the option 'driver'", file())

    def test_a_frozen_child(self) -> None:
        with sim_bench(0, a=SIZE, b=SIZE) as it:
            for name in ("a", "b"):
                add(it, file(name, name))
            node = add(it, raw("a"))
            node.children[0].frozen = True
            refused(it, "Cannot change 'file' link to 'a'", raw("b"))

    def test_another_program_writes(self) -> None:
        """The lock that a writable user would need cannot be had: the file stays as it was opened."""
        with sim_bench(0, disk=SIZE) as it:
            node = add(it, file(read_only=True))
            other = it.host.other_process_lock("disk", PERM_WRITE, PERM_ALL, name="other", pid=7)
            it.backend(node, held=PERM_CONSISTENT_READ)
            reopen_nodes(it.graph, [file()])
            with pytest.raises(BlockError, match='Failed to get shared "write" lock'):
                it.backend(node, held=PERM_CONSISTENT_READ, shared=PERM_ALL & ~PERM_WRITE)
            other.release()

    def test_a_flush_that_fails(self) -> None:
        host = SimHost(0)
        host.add_file("disk", SIZE)
        with bench(host) as it:
            user = it.user(add(it, file()))
            assert user.do(write(0, b"x")) == [0]
            user.backend.close()
            host.fault(path="disk", op=FLUSH, errno=errno.EIO)
            refused(it, "Error flushing drive: Input/output error", file(read_only=True))

    def test_a_file_that_cannot_be_opened_again(self) -> None:
        host = SimHost(0)
        host.add_file("disk", SIZE)
        with bench(host) as it:
            add(it, file())
            host.disk.files["gone"] = host.disk.files.pop("disk")
            refused(it, "Could not open 'disk': No such file or directory", file(read_only=True))
            host.disk.files["disk"] = host.disk.files.pop("gone")


def test_caches_and_locks_of_a_real_file(tmp_path: Path) -> None:
    """O_DIRECT comes and goes with its alignment, and at no time is the image without the locks of its users."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    with bench(LinuxHost()) as it, threads(it, "io0") as (thread,):
        node = add(it, file(filename=str(path)))
        assert isinstance(node, FileNode)
        user = it.user(node, held=READ_WRITE, shared=PERM_ALL & ~PERM_WRITE)
        stranger = it.file(str(path))
        it.graph.move(node, thread.context)
        for direct in (True, False, True):
            try:
                reopen_nodes(it.graph, [file(filename=str(path), cache={"direct": direct})])
            except BlockError as error:
                pytest.skip(str(error))
            assert node.file.direct == direct
            user.backend.request(1, 100, 3, memoryview(bytearray(b"abc")))
            buffer = bytearray(3)
            user.backend.request(0, 100, 3, memoryview(buffer))
            assert buffer == b"abc"
            with pytest.raises(BlockError, match='Failed to get "write" lock'):
                it.backend(stranger)
        user.backend.close()
        it.backend(stranger).close()
