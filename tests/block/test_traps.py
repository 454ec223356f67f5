# SPDX-License-Identifier: Apache-2.0
"""What goes wrong when block graphs are drained, changed and waited for: each trap once."""

from __future__ import annotations

import errno
import gc

import pytest

from bottomhalf.aio import AioContext, IOThread, WrongContext, explain, kick, run_in, sleep_ns, wait_while, waits
from bottomhalf.block import BlockBackend, Graph, Node
from bottomhalf.drivers.file import FileNode
from bottomhalf.drivers.registry import open_node
from bottomhalf.host.protocol import PERM_CONSISTENT_READ, Host
from bottomhalf.host.request import FLUSH, READ, Request
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.block.bench import Bench, bench, flush, read, sim_bench
from tests.block.parts import Counting, Job, Pass, threads


class Flushing(Node):
    """A flush takes its time, and looks at its node afterwards."""

    driver = "flushing"

    def __init__(self, graph: Graph, name: str = "") -> None:
        super().__init__(graph, name)
        self.size = 4096
        self.flushed_closed: list[bool] = []

    def open_size(self) -> int:
        return 4096

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        await sleep_ns(10_000)

    async def co_flush(self) -> None:
        for _ in range(3):
            await sleep_ns(100_000)
        self.flushed_closed.append(self.closed or not self.parents)


@pytest.mark.parametrize("way", ["remove", "replace", "in-a-bottom-half"])
def test_the_root_goes_under_a_flush_that_waits(host: Host, way: str) -> None:
    """A backend looks at its root, starts a flush there, and the flush waits. Whoever takes the root away meanwhile
    (QEMU has crashed so) waits for it; requests that come later find the new one, or none."""
    with bench(host) as it:
        node = Flushing(it.graph, "node")
        user = it.user(node, held=PERM_CONSISTENT_READ)
        request, late = flush(), flush()
        user.submit(request)
        assert user.waiting
        if way == "remove":
            user.backend.remove()
        elif way == "replace":
            it.graph.replace_node(node, Flushing(it.graph, "other"))
        else:
            it.context.schedule_oneshot(user.backend.remove)
            user.submit(late)
            wait_while(it.context, lambda: user.backend.root is not None, what="the removal")
        assert node.flushed_closed and not any(node.flushed_closed), "the node went away under the flush"
        assert request.result == 0 and node.closed
        user.wait()
        assert user.do(flush()) == [0 if way == "replace" else -errno.ENOMEDIUM]


def test_a_filter_goes_under_a_flush_that_waits(host: Host) -> None:
    """The same in the middle of the graph: the filter that a flush passed through is there until it is done."""

    class SlowPass(Pass):
        async def co_flush(self) -> None:
            await self.children[0].node.co_flush()
            assert not self.closed and self.children, "the filter is gone while a flush is in it"

        def submit_batch(self, requests: list[Request]) -> list[Request]:
            if requests[0].op == FLUSH:
                return Node.submit_batch(self, requests)
            return super().submit_batch(requests)

    with bench(host) as it:
        node = Flushing(it.graph, "node")
        filter = SlowPass(it.graph, "filter", node)
        user = it.user(filter, held=PERM_CONSISTENT_READ)
        request = flush()
        user.submit(request)
        it.graph.remove_filter(filter)
        assert request.result == 0 and filter.closed and user.backend.node is node
        assert user.do(flush()) == [0]


@pytest.mark.parametrize("kicks", [False, True])
def test_a_drain_that_nobody_kicks_hangs_and_says_so(seed: int, kicks: bool) -> None:
    """T90: work of a node that ends in another thread without kick() leaves the drain waiting, and the simulated host
    names what for; with kick() it ends."""
    host = SimHost(seed)
    it = Bench(host)
    thread = IOThread("io0", host, poll_max_ns=0)
    node = Counting(it.graph, "node", context=thread.context)
    backend = it.backend(node, held=PERM_CONSISTENT_READ)
    node.in_flight = 1

    async def work() -> None:
        await sleep_ns(50_000)
        node.in_flight = 0
        if kicks:
            kick()

    thread.context.schedule(work())
    if kicks:
        with it.graph.drained(node):
            pass
        backend.close()
        thread.stop()
        it.close()
    else:
        with pytest.raises(Exception, match="requests in flight at node 'node'"):
            it.graph.drained(node).__enter__()
    host.end_threads()


def test_only_the_main_thread_drains_by_waiting(host: Host) -> None:
    """T91 T92: plain code of an iothread may not drain: it would have to wait for others. The error says what it may
    do."""
    with bench(host) as it, threads(it, "io0") as (thread,):
        node = Counting(it.graph, "node", context=thread.context)
        backend = it.backend(node, held=PERM_CONSISTENT_READ)

        def work() -> None:
            for call in (
                it.graph.drained(node).__enter__,
                it.graph.drained_all().__enter__,
                lambda: it.graph.replace_node(node, node),
                lambda: it.graph.move(node, it.context),
            ):
                with pytest.raises(WrongContext, match=r"only the main thread may .*graph\.co_run"):
                    call()

        run_in(thread.context, work)
        assert node.quiesce_counter == 0
        backend.close()


def test_a_coroutine_that_would_drain_is_told_how(seed: int) -> None:
    with sim_bench(seed) as it:
        node = Counting(it.graph, "node")
        backend = it.backend(node, held=PERM_CONSISTENT_READ)

        async def work() -> None:
            with pytest.raises(WrongContext, match=r"would drain, which may wait; await graph\.co_run"):
                it.graph.drained(node).__enter__()
            with pytest.raises(WrongContext, match=r"would change the block graph"):
                it.graph.remove_filter(node)

        it.context.run(work())
        assert node.quiesce_counter == 0
        backend.close()


def test_what_ends_a_job_may_drain_its_nodes(host: Host) -> None:
    """T93: the job's edge is still there when its completion code drains; it is not busy any more, so nobody waits for
    himself."""
    with bench(host) as it:
        node = Counting(it.graph, "node")
        backend = it.backend(node, held=PERM_CONSISTENT_READ)

        class Draining(Job):
            def _exit(self) -> None:
                self.busy = False
                assert self.edges
                with self.graph.drained(node):
                    pass
                super()._exit()

        job = Draining(it.graph, node)
        job.start()
        assert job.complete_sync() == 0
        backend.close()


def test_the_end_of_a_section_meets_a_request_that_parks(sim: SimHost) -> None:
    """T95: a request of another thread that parks just while the section ends is found by somebody: none is lost, none
    is told twice, in whatever order the threads run."""
    with bench(sim) as it, threads(it, "io0") as (thread,):
        node = Counting(it.graph, "node", context=thread.context)
        user = it.user(node, held=PERM_CONSISTENT_READ)
        count = 12

        async def work() -> None:
            for n in range(count):
                user.submit(read(n, 1))
                await sleep_ns(20_000)
            kick()

        thread.context.schedule(work())
        while len(user.told) < count:
            with it.graph.drained(node):
                assert user.backend.in_flight == 0
            it.context.poll(False)
        assert len(user.told) == count and not user.waiting
        user.backend.close()


def test_a_wait_in_a_drain_has_a_name(seed: int) -> None:
    with sim_bench(seed) as it:
        node = Counting(it.graph, "node")
        user = it.user(node, held=PERM_CONSISTENT_READ)
        seen: list[str] = []
        user.submit(read(0, 1))
        it.context.schedule_oneshot(lambda: seen.extend(wait.what for wait in waits()))

        async def drain() -> None:
            async with it.graph.co_drained(node):
                pass

        coroutine = it.context.enter(drain())
        assert "waits for a drained section, by the main thread" in explain()
        with it.graph.drained(node):
            pass
        assert set(seen) == {"requests in flight at node 'node'"}
        wait_while(it.context, lambda: not coroutine.done, what="the coroutine")
        user.backend.close()


# -- opening where one would not expect it --------------------------------------------------------------------------

OPTIONS = {"driver": "raw", "file": {"driver": "file", "filename": "disk"}}


def test_open_inside_a_coroutine(seed: int) -> None:
    """A node that is opened by a coroutine, directly or through the main thread, is as good as any other."""
    with sim_bench(seed, disk=4096) as it:

        async def work() -> None:
            options = from_json(BlockdevOptions, OPTIONS)
            direct = open_node(it.graph, options)
            for node in (direct, await it.graph.co_run(lambda: open_node(it.graph, options))):
                backend = BlockBackend(it.graph, held=PERM_CONSISTENT_READ)
                backend.insert(node)
                assert await backend.co_pread(0, 16) == bytes(16)
                await it.graph.co_run(backend.close)
                assert node.closed

        it.context.run(work())


def test_open_in_a_coroutine_of_another_thread(host: Host) -> None:
    with bench(host) as it, threads(it, "io0") as (thread,):
        opened: list[Node] = []

        async def work() -> None:
            opened.append(await it.graph.co_run(lambda: Counting(it.graph, "node")))
            kick()

        thread.context.schedule(work())
        wait_while(None, lambda: not opened, what="the node")
        it.graph.release(opened[0])


def test_open_inside_a_nested_wait(seed: int) -> None:
    """Somebody waits, and what runs meanwhile opens, uses and closes a node, and waits as well."""
    with sim_bench(seed, disk=4096) as it:
        it.host.set_cached("disk", "never")
        done: list[bool] = []

        def open_and_use() -> None:
            node = open_node(it.graph, from_json(BlockdevOptions, OPTIONS))
            user = it.user(node, held=PERM_CONSISTENT_READ)
            assert user.do(read(0, 16)) == [0]
            user.backend.close()
            done.append(True)

        it.context.schedule_oneshot(open_and_use)
        node = Counting(it.graph, "other")
        user = it.user(node, held=PERM_CONSISTENT_READ)
        user.submit(read(0, 1))
        with it.graph.drained(node):
            wait_while(it.context, lambda: not done, what="the other node")
        user.backend.close()


def test_a_driver_that_waits_while_it_is_opened(seed: int) -> None:
    """Its constructor waits for I/O: it works in plain code and through co_run(); inside a coroutine it explains
    itself, and leaves nothing behind."""

    class Header(Node):
        driver = "header"

        def __init__(self, graph: Graph, file: Node) -> None:
            super().__init__(graph, "header")
            edge = self.attach(file, "file")
            try:
                buffer = memoryview(bytearray(4))
                self.context.run(edge.node.co_pread(0, buffer))
            except BaseException:
                graph.forget(self)
                raise
            self.size = int.from_bytes(buffer, "big")

        def open_size(self) -> int:
            return self.size

    with sim_bench(seed, disk=(4096).to_bytes(4, "big")) as it:
        it.host.set_cached("disk", "never")
        file = it.file("disk", "file")
        file.monitor_owned = True

        async def work() -> None:
            with pytest.raises(WrongContext, match="enter it and await it"):
                Header(it.graph, file)
            assert not file.parents and list(it.graph.nodes) == ["file"]
            node = await it.graph.co_run(lambda: Header(it.graph, file))
            assert node.size == 4096
            it.graph.release(node)

        it.context.run(work())
        it.context.poll(False)
        assert list(it.graph.nodes) == ["file"]
        node = Header(it.graph, file)
        it.graph.release(node)


def test_what_is_released_in_a_coroutine_is_closed_soon(seed: int) -> None:
    """T98: closing may wait, so a coroutine leaves it to the main loop."""
    with sim_bench(seed, disk=4096) as it:
        file = it.file("disk", "file")

        async def work() -> None:
            it.graph.release(file)
            assert not file.closed

        it.context.run(work())
        it.context.poll(False)
        assert file.closed


def test_own_work_of_a_node_ends_before_it_is_closed(seed: int) -> None:
    with sim_bench(seed) as it:
        node = Counting(it.graph, "node")
        backend = it.backend(node, held=PERM_CONSISTENT_READ)
        node.begin_ns = 100_000
        ended: list[int] = []
        node.close = lambda: ended.append(node.in_flight)  # type: ignore[method-assign]
        backend.close()
        assert ended == [0]


def test_a_write_waits_out_two_moves(host: Host) -> None:
    """A coroutine of the main context uses a backend that moves away and back while its requests wait."""
    with bench(host) as it, threads(it, "io0") as (thread,):
        node = Counting(it.graph, "node")
        user = it.user(node)
        backend = user.backend
        with it.graph.drained(node):
            coroutine = it.context.enter(backend.co_pwrite(0, b"x"))
            status = it.context.enter(backend.co_block_status(0, 512))
            it.graph.move(node, thread.context)
            it.graph.move(node, it.context)
            it.graph.move(node, thread.context)
        wait_while(None, lambda: not (coroutine.done and status.done), what="the coroutines")
        coroutine.result()
        assert status.result()[1] == 512
        assert status.context is it.context
        backend.drain()
        assert backend.in_flight == 0
        backend.close()


class AtHome(Counting):
    """Notices who comes from another thread."""

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        assert self.context.is_home, "a request was started in a thread where its node does not live"
        return super().submit_batch(requests)


def test_a_request_of_one_who_does_not_know_that_the_backend_moved(host: Host) -> None:
    """Who looked where the backend lives, and submits there, may find that it has moved in between."""
    with bench(host) as it, threads(it, "io0") as (thread,):
        node = AtHome(it.graph, "node")
        user = it.user(node, held=PERM_CONSISTENT_READ)
        it.graph.move(node, thread.context)
        it.graph.move(node, it.context)
        request = read(0, 512)
        run_in(thread.context, lambda: user.submit(request))
        user.wait()
        assert request.result == 0
        user.backend.close()


def test_parked_requests_meet_a_move(sim: SimHost) -> None:
    """A section ends, and before the old thread has gone on with what waited, the backend moves: it goes on in the new
    one, once."""
    with bench(sim) as it, threads(it, "io0") as (thread,):
        node = AtHome(it.graph, "node")
        user = it.user(node, held=PERM_CONSISTENT_READ)
        for _ in range(5):
            it.graph.move(node, thread.context)
            with it.graph.drained(node):
                requests = [read(n, 1) for n in range(3)]
                run_in(thread.context, lambda: [user.submit(request) for request in requests])  # noqa: B023
            it.graph.move(node, it.context)
            user.wait()
            assert {request.result for request in requests} == {0}
        user.backend.close()


def test_a_buffer_is_given_back_when_its_request_is_done() -> None:
    """Not at the next garbage collection: a request and who waits for it named each other."""
    host = SimHost(0)
    host.add_file("disk.raw", 4096)
    context = AioContext(host)
    graph = Graph(context)
    node = FileNode(graph, filename="disk.raw")
    node.monitor_owned = True
    buffer = bytearray(512)
    gc.disable()
    try:
        context.run(node.co_pread(0, memoryview(buffer)))
        context.run(context.engine.co_submit(node.file, Request(READ, 0, 512, memoryview(buffer))))
        buffer.append(0)  # BufferError while anybody has a view of it
    finally:
        gc.enable()
    graph.close()
    context.close()
