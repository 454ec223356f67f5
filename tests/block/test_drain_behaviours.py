# SPDX-License-Identifier: Apache-2.0
"""QEMU's behaviours of drained sections (test-bdrv-drain), each by its name."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from bottomhalf.aio import kick, sleep_ns, wait_while
from bottomhalf.block import BlockBackend, Edge, Node, Parent
from bottomhalf.host.protocol import PERM_CONSISTENT_READ, Host
from bottomhalf.host.request import FLUSH
from tests.block.bench import Bench, User, bench, read
from tests.block.parts import EIO, Counting, Job, drive, refresh, section, threads

WAYS = [
    pytest.param(everything, coroutine, id=f"{'co-' if coroutine else ''}{'drain_all' if everything else 'drain'}")
    for everything in (True, False)
    for coroutine in (False, True)
]


def chain(it: Bench, **options: Any) -> tuple[User, Counting, Counting]:
    backing = Counting(it.graph, "backing", **options)
    node = Counting(it.graph, "node", backing=backing)
    refresh(node)
    return it.user(node, held=PERM_CONSISTENT_READ), node, backing


def drains(*nodes: Counting) -> list[int]:
    return [node.drains for node in nodes]


def quiet(*nodes: Node) -> list[int]:
    return [node.quiesce_counter for node in nodes]


@pytest.mark.parametrize(("everything", "coroutine"), WAYS)
def test_driver_callbacks(host: Host, everything: bool, coroutine: bool) -> None:
    """/bdrv-drain/driver-cb/drain_all /bdrv-drain/driver-cb/drain /bdrv-drain/driver-cb/co/drain_all
    /bdrv-drain/driver-cb/co/drain: the driver is told once, its child only if everything is drained, and a read that
    was in flight is done when the section has begun."""
    with bench(host) as it:
        user, node, backing = chain(it)

        async def body() -> None:
            assert drains(node, backing) == [0, 0]
            async with section(it, everything, node):
                assert drains(node, backing) == [1, int(everything)]
            assert drains(node, backing) == [0, 0]
            request = read(0, 512)
            user.submit(request)
            assert user.waiting
            async with section(it, everything, node):
                assert not user.waiting and request.result == 0
                assert drains(node, backing) == [1, int(everything)]
            assert drains(node, backing) == [0, 0]

        drive(it, body(), coroutine=coroutine)


@pytest.mark.parametrize(("everything", "coroutine"), WAYS)
def test_quiesce_counters(host: Host, everything: bool, coroutine: bool) -> None:
    """/bdrv-drain/quiesce/drain_all /bdrv-drain/quiesce/drain /bdrv-drain/quiesce/co/drain_all
    /bdrv-drain/quiesce/co/drain: a node counts its own section and that of its child."""
    with bench(host) as it:
        _, node, backing = chain(it)

        async def body() -> None:
            async with section(it, everything, node):
                assert quiet(node, backing) == ([2, 1] if everything else [1, 0])
            assert quiet(node, backing) == [0, 0]

        drive(it, body(), coroutine=coroutine)


@pytest.mark.parametrize("coroutine", [False, True])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_nested(host: Host, outer: bool, inner: bool, coroutine: bool) -> None:
    """/bdrv-drain/nested: counters add up, the driver is told of the first and the last only."""
    with bench(host) as it:
        _, node, backing = chain(it)
        count = outer + inner

        async def body() -> None:
            async with section(it, outer, node), section(it, inner, node):
                assert quiet(node, backing) == [2 + (count > 0), count]
                assert drains(node, backing) == [1, int(count > 0)]
            assert quiet(node, backing) == drains(node, backing) == [0, 0]

        drive(it, body(), coroutine=coroutine)


def test_graph_change_during_drain_all(host: Host) -> None:
    """/bdrv-drain/graph-change/drain_all: a node that is made inside the section is born into it, and one that goes
    away takes nothing with it."""
    with bench(host) as it:
        first = Counting(it.graph, "a")
        user = it.user(first)
        with it.graph.drained_all():
            assert (quiet(first), drains(first)) == ([1], [1])
            second = Counting(it.graph, "b")
            other = it.user(second)
            assert (quiet(second), drains(second)) == ([1], [1])
            assert other.submit(read(0, 512)), "it waits"
            user.backend.close()
            assert first.closed
            assert (quiet(second), drains(second)) == ([1], [1])
        assert (quiet(second), drains(second)) == ([0], [0])
        other.wait()


@pytest.mark.parametrize("everything", [False, True])
def test_from_the_main_thread(host: Host, everything: bool) -> None:
    """/bdrv-drain/iothread/drain_all /bdrv-drain/iothread/drain: a section of nodes of another thread waits for a read
    that passes through a third one, and for work of the node itself."""
    with bench(host) as it, threads(it, "a", "b") as (a, b):
        node = Counting(it.graph, "node", context=a.context)
        user = it.user(node)
        node.bounce = b.context
        request = read(0, 512)
        submitted = False

        def start() -> None:
            nonlocal submitted
            node.in_flight += 1
            user.submit(request)
            submitted = True
            a.context.schedule_oneshot(finish)
            kick()

        def finish() -> None:
            node.in_flight -= 1
            kick()

        a.context.schedule_oneshot(start)
        wait_while(None, lambda: not submitted, what="the submission")
        with it.graph.drained_all() if everything else it.graph.drained(node):
            assert node.in_flight == user.backend.in_flight == 0
            assert request.result == 0 and not user.waiting
        user.backend.close()


def test_from_a_coroutine_of_another_thread(host: Host) -> None:
    """/bdrv-drain/iothread/drain: a coroutine of an iothread drains through the main thread, which waits for it."""
    with bench(host) as it, threads(it, "a", "b") as (a, b):
        node = Counting(it.graph, "node", context=a.context)
        user = it.user(node)
        node.bounce = b.context
        seen: list[int] = []

        async def work() -> None:
            request = read(0, 512)
            user.submit(request)
            async with it.graph.co_drained(node):
                seen.append(request.result)
                seen.append(node.quiesce_counter)
            seen.append(node.quiesce_counter)
            kick()

        a.context.schedule(work())
        wait_while(None, lambda: len(seen) < 3, what="the coroutine")
        assert seen == [0, 1, 0]
        user.backend.close()


# -- jobs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("results", [(0, 0), (EIO, 0), (0, EIO)])
def test_job(host: Host, everything: bool, in_thread: bool, results: tuple[int, int]) -> None:
    """/bdrv-drain/blockjob/drain_all /bdrv-drain/blockjob/drain /bdrv-drain/blockjob/error/drain_all
    /bdrv-drain/blockjob/error/drain /bdrv-drain/blockjob/iothread/drain_all /bdrv-drain/blockjob/iothread/drain
    /bdrv-drain/blockjob/iothread/error/drain_all /bdrv-drain/blockjob/iothread/error/drain: a job pauses once per edge
    while one of its nodes, or what that stands on, is drained; its end, which waits, is no obstacle."""
    with bench(host) as it, threads(it, "a") as (a,):
        base = Counting(it.graph, "source-backing")
        source = Counting(it.graph, "source", backing=base)
        overlay = Counting(it.graph, "overlay", backing=source)
        backend = it.backend(overlay, held=PERM_CONSISTENT_READ)
        target = Counting(it.graph, "target")
        target_backend = it.backend(target, held=PERM_CONSISTENT_READ)
        if in_thread:
            it.graph.move(overlay, a.context)
            it.graph.move(target, a.context)
        job = Job(it.graph, source, target, result=0, prepare_result=results[1])
        job.start()
        wait_while(None, lambda: not job.rounds and _let_run(it, in_thread), what="the job to run")
        for node in (source, base, target):
            assert (job.pause_count, job.paused, job.busy) == (0, False, True)
            with it.graph.drained_all() if everything else it.graph.drained(node):
                assert job.pause_count == (2 if everything else 1)
                assert (job.paused, job.busy) == (True, False)
                rounds = job.rounds
                it.context.poll(False)
                assert job.rounds == rounds
            assert job.pause_count == 0
            wait_while(None, lambda: job.paused and _let_run(it, in_thread), what="the job to go on")
        job.result = results[0]
        assert job.complete_sync() == (results[0] or results[1])
        assert not job.edges
        if in_thread:
            it.graph.move(overlay, it.context)
            it.graph.move(target, it.context)
            assert backend.context is target_backend.context is it.context
        backend.close()
        target_backend.close()


def _let_run(it: Bench, in_thread: bool) -> bool:
    """Look again soon, for the thread that we wait for does not kick."""
    if in_thread:
        it.context.notify()
    return True


def test_job_that_completes_in_the_end_of_a_section(host: Host) -> None:
    """/bdrv-drain/blockjob/commit_by_drained_end T94: what a parent does when it is told of the end takes other
    parents away, while the end is still walking them: none is told twice, none that is gone."""
    with bench(host) as it:
        child = Counting(it.graph, "child")
        parents = [Counting(it.graph, f"p{n}", backing=child) for n in range(3)]
        for parent in parents:
            parent.monitor_owned = True

        class Committing(Job):
            def parent_drained_end(self) -> None:
                super().parent_drained_end()
                if not self.pause_count and self.should_complete and parents[2].children:
                    for parent in (parents[2], parents[0]):
                        edge = parent.children.pop()
                        edge.node.remove_parent(edge)
                    self.graph.context.schedule_oneshot(self._exit)

        job = Committing(it.graph, parents[2])
        job.busy = True
        job.should_complete = True
        it.graph.context.schedule_oneshot(lambda: setattr(job, "busy", False))
        section = it.graph.drained(child)
        section.__enter__()
        assert not job.completed
        section.__exit__(None, None, None)
        it.context.poll(False)
        assert job.completed
        assert [edge.parent for edge in child.parents] == [parents[1]]
        assert quiet(child, *parents) == drains(child, *parents) == [0, 0, 0, 0]


def test_drop_intermediate_polls(host: Host) -> None:
    """/bdrv-drain/bdrv_drop_intermediate/poll: a parent that writes its new child down waits, and meanwhile a job that
    is about to end must not change the links that are being dropped: everything below is drained."""

    class Overlay(Counting):
        def backing_renamed(self, edge: Edge, node: Node) -> None:
            for _ in range(2):
                it.context.poll(False)
            assert not job.completed
            self.renamed = node.name

    with bench(host) as it:
        nodes: list[Counting] = [Counting(it.graph, "node0")]
        nodes.append(Counting(it.graph, "node1", backing=nodes[0]))
        nodes.append(Overlay(it.graph, "node2", backing=nodes[1]))
        job_node = Overlay(it.graph, "job-node", backing=nodes[1])
        backend = it.backend(nodes[2], held=PERM_CONSISTENT_READ)
        job_node.monitor_owned = True
        job = Job(it.graph, job_node)
        job.on_commit = lambda: it.graph.detach_child(job_node.children[0])
        job.start()
        it.context.poll(False)
        job.should_complete = True
        it.graph.drop_intermediate(nodes[1], nodes[0])
        assert not job.completed
        assert nodes[1].closed
        assert nodes[2].children[0].node is nodes[0]
        assert nodes[2].renamed == job_node.renamed == "node0"  # type: ignore[attr-defined]
        wait_while(it.context, lambda: not job.completed, what="the job")
        assert not job_node.children and [edge.parent for edge in nodes[0].parents] == [nodes[2]]
        backend.close()


# -- the graph changes while a section begins -----------------------------------------------------------------------


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_a_node_goes_while_its_child_is_drained(host: Host, everything: bool, delete: bool) -> None:
    """/bdrv-drain/deletion/drain /bdrv-drain/detach/drain_all /bdrv-drain/detach/drain T98 T99: a coroutine that was
    reading from the child drops the last use of the parent, or detaches all its children, in the middle of the drain.
    """
    with bench(host) as it:
        children = [Counting(it.graph, f"child{n}") for n in range(3)]
        for child in children:
            child.monitor_owned = True
        top = Counting(it.graph, "top")
        for n, child in enumerate(children):
            top.attach(child, f"child{n}")
        refresh(top)
        backend = BlockBackend(it.graph, held=PERM_CONSISTENT_READ)
        backend.insert(top)
        ended: list[str] = []

        async def work() -> None:
            top.in_flight += 1  # a request of the node's own
            await children[1].co_pread(0, memoryview(bytearray(512)))
            top.in_flight -= 1
            kick()
            if delete:
                await it.graph.co_run(backend.close)
            else:
                for edge in list(top.children):
                    await it.graph.co_run(lambda edge=edge: it.graph.detach_child(edge))
            ended.append("work")

        it.context.enter(work())
        with it.graph.drained_all() if everything else it.graph.drained(children[1]):
            assert children[1].reads == 1
            wait_while(it.context, lambda: not ended, what="the coroutine")
            assert top.closed == delete
            assert not any(child.parents for child in children)
            assert top.quiesce_counter == int(everything)
        assert quiet(top, *children) == [0] * 4
        backend.close()


class Watcher(Parent):
    """A user who notices when he is drained, and has requests of his own."""

    def __init__(self, node: Node) -> None:
        self.edge = Edge(self, node, "watched")
        self.on_begin: Any = None
        self.busy = False
        node.add_parent(self.edge)

    def describe(self) -> str:
        return "a watcher"

    def parent_drained_begin(self) -> None:
        if self.on_begin is not None:
            self.on_begin()

    def parent_drained_poll(self) -> bool:
        return self.busy

    def drop(self) -> None:
        self.edge.node.remove_parent(self.edge)


@pytest.mark.parametrize("by_driver", [False, True])
def test_detach_by_a_callback(host: Host, by_driver: bool) -> None:
    """/bdrv-drain/detach/parent_cb /bdrv-drain/detach/driver_cb T94: while a section begins, the graph changes, by what
    follows from the end of a request or from a callback of the drain itself. There is one wait, after all callbacks,
    and it sees the graph as it is then."""
    with bench(host) as it:
        a, b, c = (Counting(it.graph, name) for name in "ABC")
        for node in (a, b, c):
            node.monitor_owned = True
        pa, pb = Counting(it.graph, "PA"), Counting(it.graph, "PB")
        pa.read_from = pa.attach(a, "a")
        pb.attach(a, "a")
        edge = pb.attach(b, "b")
        pb.monitor_owned = True
        user = it.user(pa, held=PERM_CONSISTENT_READ)
        changed: list[bool] = []

        def change() -> None:
            if not changed:
                changed.append(True)
                it.graph.detach_child(edge)
                it.graph.attach_child(pb, c, "c")

        if by_driver:
            a.begin_ns = 50_000
            watcher = Watcher(a)
            watcher.on_begin = lambda: it.context.schedule_oneshot(change)
        else:
            request = read(0, 512)
            user.submit(request)
            user.queue._on_complete = lambda told: (user._completed(told), it.context.schedule_oneshot(change))
        with it.graph.drained(pb, a, b, c):
            it.context.poll(False)
            assert changed
            assert [edge.node for edge in pb.children] == [a, c]
            assert [edge.node for edge in pa.children] == [a]
            assert not b.parents and [edge.parent for edge in c.parents] == [pb]
            assert quiet(pa, pb, a, b, c) == [1, 3, 1, 1, 1]
            assert a.in_flight == 0 and not user.waiting
        assert quiet(pa, pb, a, b, c) == drains(pa, pb, a, b, c) == [0] * 5
        if by_driver:
            watcher.drop()


def test_append_to_a_drained_node(host: Host) -> None:
    """/bdrv-drain/attach/drain: what is put above a drained node is drained, until that section ends."""
    with bench(host) as it:
        base = Counting(it.graph, "base")
        user = it.user(base, held=PERM_CONSISTENT_READ)
        overlay = Counting(it.graph, "overlay")
        with it.graph.drained(base):
            assert (quiet(base), drains(base), base.in_flight) == ([1], [1], 0)
            it.graph.append(overlay, base)
            assert (quiet(base, overlay), drains(base, overlay)) == ([1, 1], [1, 1])
            assert base.in_flight == overlay.in_flight == 0
            assert user.backend.node is overlay
            assert user.submit(read(0, 512))
        assert quiet(base, overlay) == drains(base, overlay) == [0, 0]
        user.wait()
        assert (overlay.reads, base.reads) == (1, 0)


def test_move_inside_a_section(host: Host) -> None:
    """/bdrv-drain/set_aio_context: a drained node changes its thread, once and to and fro."""
    with bench(host) as it, threads(it, "a", "b") as (a, b):
        node = Counting(it.graph, "node")
        user = it.user(node, held=PERM_CONSISTENT_READ)
        with it.graph.drained(node):
            it.graph.move(node, a.context)
        with it.graph.drained(node):
            it.graph.move(node, b.context)
            it.graph.move(node, it.context)
        assert user.do(read(0, 512)) == [0]


@pytest.mark.parametrize("old_drained", [0, 1])
@pytest.mark.parametrize("new_drained", [0, 1])
def test_replace_a_child_inside_sections(host: Host, old_drained: int, new_drained: int) -> None:
    """/bdrv-drain/replace_child/mid-drain: afterwards the parent is as quiet as its new child. Here requests wait in
    the backend above, not in the parent's driver."""
    with bench(host) as it:
        old, new = Counting(it.graph, "old"), Counting(it.graph, "new")
        old.monitor_owned = new.monitor_owned = True
        parent = Counting(it.graph, "parent", backing=old)
        parent.read_from = parent.children[0]
        parent.monitor_owned = True
        user = it.user(parent, held=PERM_CONSISTENT_READ)
        with ExitStack() as olds, ExitStack() as news:
            if old_drained:
                olds.enter_context(it.graph.drained(old))
            if new_drained:
                news.enter_context(it.graph.drained(new))
            assert user.submit(read(0, 512))
            it.graph.replace_child(parent.children[0], new)
            assert parent.children[0].node is new and not old.parents
            assert parent.quiesce_counter == new.quiesce_counter == new_drained
            assert parent.drains == new_drained
            if new_drained:
                before = (old.reads, new.reads)
                assert user.submit(read(512, 512))
                for _ in range(3):
                    it.context.poll(False)
                assert (old.reads, new.reads) == before, "a drained child gets no request"
            else:
                user.wait()
        user.wait()
        assert old.reads + new.reads == len(user.told)
        assert user.do(read(0, 512)) == [0] and new.reads >= 1
        assert quiet(parent, old, new) == drains(parent, old, new) == [0, 0, 0]


# -- backends without a medium --------------------------------------------------------------------------------------


@pytest.mark.parametrize("everything", [False, True])
def test_drain_without_a_medium(host: Host, everything: bool) -> None:
    """/block-backend/drain_aio_error /block-backend/drain_all_aio_error: a flush of an empty backend fails with
    ENOMEDIUM; its owner is told later, never from inside the submission, and at the latest by a drain."""
    with bench(host) as it:
        backend = BlockBackend(it.graph)
        told: list[str] = []

        async def flush() -> None:
            await sleep_ns(0)
            try:
                await backend.co_flush()
            except OSError as error:
                told.append(error.strerror or "")

        request = read(0, 0)
        request.op = FLUSH
        user = User(backend)
        node = Counting(it.graph, "node")
        backend.insert(node)
        section = it.graph.drained(node)
        section.__enter__()
        assert user.submit(request) == [request], "it waits for the end of the section"
        backend.root, edge = None, backend.root  # as if the medium went while it waits
        assert edge is not None
        node.remove_parent(edge)
        section.__exit__(None, None, None)
        it.context.enter(flush())
        assert not user.told and not told
        it.context.poll(False)
        if everything:
            with it.graph.drained_all():
                assert backend.in_flight == 0
        else:
            backend.drain()
        assert [each.result for each in user.told] == [-123]
        wait_while(it.context, lambda: not told, what="the coroutine")
        assert told == ["No medium found"]
        it.graph.release(node)
        backend.close()
