# SPDX-License-Identifier: Apache-2.0
"""QEMU's behaviours of graph changes (test-bdrv-graph-mod), each by its name, and what else changes must keep to."""

from __future__ import annotations

import re

import pytest

from bottomhalf.block import BlockError, Edge, Graph, Node
from bottomhalf.block.edge import ROLE_COW, ROLE_DATA, ROLE_IMAGE
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE, PERM_WRITE_UNCHANGED, Host
from tests.block.bench import READ_WRITE, bench, read, sim_bench, write
from tests.block.parts import Counting, Pass, refresh

NO_WRITERS = PERM_ALL & ~PERM_WRITE


class Modest(Node):
    """Asks nothing and shares everything."""

    driver = "modest"

    def __init__(self, graph: Graph, name: str) -> None:
        super().__init__(graph, name)
        self.size = 4096

    def open_size(self) -> int:
        return 4096

    def child_permissions(self, edge: Edge, held: int, shared: int) -> tuple[int, int]:
        return 0, PERM_ALL


class Greedy(Pass):
    """Writes, and shares no writing."""

    driver = "greedy"

    def child_permissions(self, edge: Edge, held: int, shared: int) -> tuple[int, int]:
        return PERM_WRITE, NO_WRITERS


class Selective(Node):
    """Writes to one of its children, alone."""

    driver = "selective"
    selected: Edge | None = None

    def __init__(self, graph: Graph, name: str, **children: Node) -> None:
        super().__init__(graph, name)
        for child, node in children.items():
            self.attach(node, child, ROLE_DATA)

    def open_size(self) -> int:
        return 4096

    def child_permissions(self, edge: Edge, held: int, shared: int) -> tuple[int, int]:
        return (PERM_WRITE, NO_WRITERS) if edge is self.selected else (0, PERM_ALL)


def test_a_second_writer_would_appear(host: Host) -> None:
    """/bdrv-graph-mod/update-perm-tree: a filter that uses the node already, and would come to stand above it, would
    write to it twice, and lets nobody else write. It is refused, and everything is as it was."""
    with bench(host) as it:
        node = Modest(it.graph, "node")
        backend = it.backend(node, shared=NO_WRITERS)
        filter = Pass(it.graph, "filter")
        filter.monitor_owned = True
        filter.attach(node, "child")
        with pytest.raises(BlockError, match=r"^Permission conflict on node 'node': permissions 'write' are both"):
            it.graph.append(filter, node)
        assert backend.node is node and not filter.parents
        assert [edge.name for edge in filter.children] == ["child"]
        assert [edge.parent for edge in node.parents] == [backend, filter]
        assert node.permissions == (READ_WRITE, NO_WRITERS)
        backend.close()


def test_what_the_new_node_stands_on_stays(host: Host) -> None:
    """/bdrv-graph-mod/should-update-child: a filter that stands on something which stands on the node takes the node's
    place for all but that."""
    with bench(host) as it:
        node = Counting(it.graph, "node")
        backend = it.backend(node, held=PERM_CONSISTENT_READ)
        target = Counting(it.graph, "target", backing=node)
        filter = Pass(it.graph, "filter")
        filter.attach(target, "target", ROLE_DATA)
        it.graph.append(filter, node)
        assert backend.node is filter
        assert [edge.node for edge in filter.children] == [target, node]
        assert [edge.node for edge in target.children] == [node]
        backend.close()


def test_parallel_permission_update(host: Host) -> None:
    """/bdrv-graph-mod/parallel-perm-update: permissions are worked out in topological order, so that a writer may
    change from one way to the base to another."""
    with bench(host) as it:
        base = Modest(it.graph, "base")
        first, second = Pass(it.graph, "fl1", base), Pass(it.graph, "fl2", base)
        selective = Selective(it.graph, "ws", one=first, two=second)
        top = Pass(it.graph, "top", selective)
        backend = it.backend(top, held=PERM_CONSISTENT_READ)
        for name in ("one", "two", "one"):
            selective.selected = selective.child(name)
            refresh(top)
            assert bool(first.children[0].held & PERM_WRITE) == (name == "one")
            assert bool(second.children[0].held & PERM_WRITE) == (name == "two")
        backend.close()


def test_parallel_exclusive_write(host: Host) -> None:
    """/bdrv-graph-mod/parallel-exclusive-write: what the removed way held does not stand in the way of the new one."""
    with bench(host) as it:
        base = Modest(it.graph, "base")
        first, second = Pass(it.graph, "fl1", base), Pass(it.graph, "fl2", base)
        top = Greedy(it.graph, "top", first)
        refresh(top)
        backend = it.backend(top, held=PERM_CONSISTENT_READ)
        with it.graph.drained(first), it.graph.drained(second):
            it.graph.replace_node(first, second)
        assert top.children[0].node is second
        assert (second.children[0].held, second.children[0].shared) == (PERM_WRITE, NO_WRITERS)
        assert first.closed and len(base.parents) == 1
        backend.close()


def test_append_greedy_filter(host: Host) -> None:
    """/bdrv-graph-mod/append-greedy-filter: all edges change first, then permissions are worked out: between an
    exclusive writer and its node there is room for another."""
    with bench(host) as it:
        base = Modest(it.graph, "base")
        top = Greedy(it.graph, "top", base)
        refresh(top)
        backend = it.backend(top, held=PERM_CONSISTENT_READ)
        filter = Greedy(it.graph, "filter")
        it.graph.append(filter, base)
        assert top.children[0].node is filter and filter.children[0].node is base
        assert [edge.parent for edge in base.parents] == [filter]
        backend.close()


# -- with requests in flight ----------------------------------------------------------------------------------------


def test_a_filter_comes_and_goes_under_load(seed: int) -> None:
    with sim_bench(seed, disk=65536) as it:
        it.host.set_cached("disk", "random")
        file = it.file("disk", "file")
        user = it.user(file)
        for round in range(6):
            requests = [write(n * 512, bytes([round + 1]) * 512) for n in range(20)]
            user.submit(*requests[:10])
            filter = Pass(it.graph, f"filter{round}", file)
            it.graph.insert_node(filter)
            assert user.backend.node is filter
            user.submit(*requests[10:])
            it.graph.remove_filter(filter)
            assert user.backend.node is file and filter.closed
            user.wait()
            assert {request.result for request in requests} == {0}
        assert it.host.content("disk")[: 20 * 512] == bytes([6]) * 20 * 512


def test_requests_that_arrive_meanwhile_take_the_new_way_in_order(seed: int) -> None:
    with sim_bench(seed) as it:
        old = Counting(it.graph, "old")
        user = it.user(old)
        new = Counting(it.graph, "new")
        user.submit(read(0, 1))
        late = [read(n, 1) for n in range(1, 9)]

        def more() -> None:
            for request in late:
                user.submit(request)

        it.context.schedule_oneshot(more)
        it.graph.replace_node(old, new)
        assert old.closed and user.backend.node is new
        user.wait()
        assert (old.reads, new.reads) == (1, 8)


class Refusing(Pass):
    """A driver that does not want to be written to."""

    def apply_permissions(self, held: int, shared: int) -> None:
        if held & PERM_WRITE:
            raise BlockError("not through me")


def test_a_driver_that_refuses_leaves_everything(seed: int) -> None:
    with sim_bench(seed) as it:
        node = Counting(it.graph, "node")
        user = it.user(node)
        user.submit(read(0, 1))
        filter = Refusing(it.graph, "filter", node)
        before = [(edge, edge.held, edge.shared) for edge in node.parents]
        with pytest.raises(BlockError, match=r"^not through me$"):
            it.graph.insert_node(filter)
        assert [(edge, edge.held, edge.shared) for edge in node.parents] == before
        assert user.backend.node is node and not filter.parents and not filter.closed
        assert filter.permissions == (0, PERM_ALL)
        assert node.quiesce_counter == filter.quiesce_counter == 0
        assert user.do(read(0, 1)) == [0]
        it.graph.release(filter)


# -- edges ----------------------------------------------------------------------------------------------------------


class TestEdges:
    def test_a_frozen_edge_stays(self) -> None:
        with sim_bench(0) as it:
            node, other = Counting(it.graph, "node"), Counting(it.graph, "other")
            other.monitor_owned = True
            top = Counting(it.graph, "top", backing=node)
            backend = it.backend(top, held=PERM_CONSISTENT_READ)
            edge = top.children[0]
            edge.frozen = True
            for change in (
                lambda: it.graph.replace_node(node, other),
                lambda: it.graph.replace_child(edge, other),
                lambda: it.graph.append(Pass(it.graph, "filter"), node),
            ):
                with pytest.raises(BlockError, match=r"^Cannot change 'backing' link to 'node'$"):
                    change()
                assert edge.node is node and node.parents == [edge]
            with pytest.raises(BlockError, match=r"^Cannot change 'backing' link from 'top' to 'node'$"):
                it.graph.detach_child(edge)
            edge.frozen = False
            it.graph.replace_child(edge, other)
            assert node.closed and edge.node is other
            it.graph.release(it.graph.find("filter"))
            backend.close()

    def test_no_node_stands_on_itself(self) -> None:
        with sim_bench(0) as it:
            base = Counting(it.graph, "base")
            middle = Counting(it.graph, "middle", backing=base)
            top = Counting(it.graph, "top", backing=middle)
            top.monitor_owned = True
            expected = re.escape("Making 'top' a loop child of 'base' would create a cycle")
            with pytest.raises(BlockError, match=f"^{expected}$"):
                it.graph.attach_child(base, top, "loop")
            with pytest.raises(BlockError, match="would create a cycle"):
                it.graph.attach_child(base, base, "loop")
            with pytest.raises(BlockError, match="would create a cycle"):
                it.graph.replace_child(middle.children[0], top)
            assert not base.children and middle.children[0].node is base

    def test_roles(self) -> None:
        """What a parent needs of a child, and shares, by what it is to it."""
        writable, reading = READ_WRITE | PERM_RESIZE, PERM_CONSISTENT_READ
        for role, parents, expected in [
            (0, (writable, NO_WRITERS), (writable, NO_WRITERS)),
            (ROLE_COW, (READ_WRITE, PERM_ALL), (PERM_CONSISTENT_READ, PERM_ALL)),
            (ROLE_COW, (reading, NO_WRITERS), (reading, PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED)),
            (ROLE_COW, (0, PERM_ALL), (0, PERM_ALL)),
            (ROLE_IMAGE, (0, PERM_ALL), (writable, PERM_ALL & ~(PERM_WRITE | PERM_RESIZE))),
            (ROLE_IMAGE, (PERM_WRITE, PERM_ALL), (writable, PERM_ALL & ~(PERM_WRITE | PERM_RESIZE))),
            (ROLE_DATA, (PERM_WRITE_UNCHANGED, PERM_ALL),
             (PERM_WRITE | PERM_WRITE_UNCHANGED | PERM_RESIZE, PERM_ALL & ~PERM_RESIZE)),
            (ROLE_DATA, (reading, PERM_ALL), (reading, PERM_ALL & ~PERM_RESIZE)),
        ]:  # fmt: skip
            with sim_bench(0) as it:
                node = Counting(it.graph, "node")
                top = Counting(it.graph, "top", backing=node, role=role)
                backend = it.backend(top, held=parents[0], shared=parents[1])
                assert (top.children[0].held, top.children[0].shared) == expected, (role, parents)
                backend.close()

    def test_a_child_comes_and_goes(self) -> None:
        with sim_bench(0) as it:
            top = Counting(it.graph, "top")
            user = it.user(top, held=PERM_CONSISTENT_READ)
            child = Counting(it.graph, "child")
            user.submit(read(0, 1))
            edge = it.graph.attach_child(top, child, "spare", ROLE_COW)
            assert not user.waiting and child.permissions[0] == PERM_CONSISTENT_READ
            with pytest.raises(BlockError, match=r"^Duplicate child name 'spare'$"):
                it.graph.attach_child(top, child, "spare")
            it.graph.detach_child(edge)
            assert child.closed and not top.children

    def test_who_is_held_is_not_closed(self) -> None:
        with sim_bench(0) as it:
            node = Counting(it.graph, "node")
            backend = it.backend(node, held=PERM_CONSISTENT_READ)
            with it.graph.holding(node):
                backend.close()
                assert not node.closed
                node.monitor_owned = True
                with pytest.raises(BlockError, match=r"^Block device node is in use$"):
                    it.graph.delete("node")
                node.monitor_owned = False
            assert node.closed

    def test_drop_intermediate_wants_a_base_below(self) -> None:
        with sim_bench(0) as it:
            node, other = Counting(it.graph, "node"), Counting(it.graph, "other")
            for each in (node, other):
                each.monitor_owned = True
            with pytest.raises(BlockError, match=r"^Node 'other' is not below 'node'$"):
                it.graph.drop_intermediate(node, other)
