# SPDX-License-Identifier: Apache-2.0
"""Drivers and users that the tests of drain and graph changes are built of: a driver that counts how often it was
drained, one that only passes on, and a job, as far as the graph knows jobs."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from bottomhalf.aio import AioContext, CoQueue, IOThread, kick, move_to, sleep_ns, wait_while
from bottomhalf.block import BlockBackend, Edge, Graph, Node, Parent, permissions
from bottomhalf.block.edge import ROLE_COW, ROLE_DATA, ROLE_FILTER
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ
from bottomhalf.host.request import FLUSH, Request
from tests.block.bench import Bench

SIZE = 65536
READ_NS = 100_000


class Counting(Node):
    """Reads take their time, perhaps also through another context. ``drains`` is what the driver was told."""

    driver = "counting"
    supports_backing = True

    def __init__(
        self, graph: Graph, name: str = "", *, backing: Node | None = None, context: AioContext | None = None,
        role: int = ROLE_COW,
    ) -> None:
        super().__init__(graph, name)
        self.drains = 0
        self.reads = 0
        self.flushes = 0
        self.bounce: AioContext | None = None
        self.begin_ns = 0  # how long it is busy of its own accord when it is drained
        self.on_begin: Callable[[], object] | None = None
        self.read_from: Edge | None = None
        self.size = SIZE
        if context is not None:
            self.context = context
        if backing is not None:
            self.attach(backing, "backing", role)

    def open_size(self) -> int:
        return SIZE

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        if self.read_from is not None:
            await self.read_from.node.co_pread(offset, buffer)
            return
        await sleep_ns(READ_NS)
        if self.bounce is not None:
            home = self.context
            await move_to(self.bounce)
            await move_to(home)
        buffer[:] = b"r" * len(buffer)

    async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        await sleep_ns(READ_NS)

    async def co_flush(self) -> None:
        self.flushes += 1

    def drain_begin(self) -> None:
        self.drains += 1
        if self.on_begin is not None:
            self.on_begin()
        if self.begin_ns:
            self.in_flight += 1
            self.context.schedule(self._calm_down())

    async def _calm_down(self) -> None:
        await sleep_ns(self.begin_ns)
        self.in_flight -= 1
        kick()

    def drain_end(self) -> None:
        self.drains -= 1

    def close(self) -> None:
        assert self.drains > 0, "closing happens drained"


class Pass(Node):
    """A filter."""

    driver = "pass"
    is_filter = True

    def __init__(self, graph: Graph, name: str = "", file: Node | None = None) -> None:
        super().__init__(graph, name)
        self.size = SIZE
        if file is not None:
            self.attach(file, "file")
            self.size = file.size

    def open_size(self) -> int:
        edge = self.child("file")
        return edge.node.size if edge is not None else SIZE

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        return self.children[0].node.submit_batch(requests)


class Both(Node):
    """Shows the first of two nodes and needs both (blkverify)."""

    driver = "both"

    def __init__(self, graph: Graph, name: str, first: Node, second: Node) -> None:
        super().__init__(graph, name)
        self.size = SIZE
        self.attach(first, "first", ROLE_FILTER)
        self.attach(second, "second", ROLE_DATA)

    def open_size(self) -> int:
        return SIZE


class Job(Parent):
    """Works on nodes in the background until it is told to complete; pauses while one of them is drained."""

    stay_at_node = True

    def __init__(self, graph: Graph, *nodes: Node, result: int = 0, prepare_result: int = 0) -> None:
        self.graph = graph
        self.context = nodes[0].context
        self.edges = [Edge(self, node, f"job {n}", 0, PERM_ALL) for n, node in enumerate(nodes)]
        self.pause_count = 0
        self.paused = self.busy = self.should_complete = self.completed = False
        self.rounds = 0
        self.result = result
        self.prepare_result = prepare_result
        self.on_commit: Callable[[], object] | None = None
        self._resumed = CoQueue("the end of the pause of a job")
        for edge in self.edges:
            edge.node.add_parent(edge)

    def describe(self) -> str:
        return "a job"

    def start(self) -> None:
        self.busy = True
        self.context.schedule(self._run())

    async def _run(self) -> None:
        while not self.should_complete and not self.result:
            self.rounds += 1
            await sleep_ns(READ_NS)
            await self._pause_point()
        self.graph.context.schedule_oneshot(self._exit)

    async def _pause_point(self) -> None:
        await move_to(self.context)
        while self.pause_count:
            self.paused, self.busy = True, False
            kick()
            await self._resumed.wait()
            await move_to(self.context)  # it may have moved more than once while it slept
        self.paused, self.busy = False, True

    def _exit(self) -> None:
        """What ends the job runs in the main thread, and waits."""
        self.busy = False
        self.result = self.result or self.prepare_result
        for edge in list(self.edges):
            backend = BlockBackend(self.graph, held=PERM_CONSISTENT_READ)
            backend.insert(edge.node)
            backend.request(FLUSH, 0, 0)  # prepare, commit or abort: a nested wait
            backend.close()
        self.drop_edges()
        if self.on_commit is not None:
            self.on_commit()
        self.completed = True
        kick()

    def drop_edges(self) -> None:
        edges, self.edges = self.edges, []
        for edge in edges:
            edge.node.remove_parent(edge)

    def complete_sync(self) -> int:
        self.should_complete = True
        wait_while(None, lambda: not self.completed, what="the end of a job")
        return self.result

    def parent_drained_begin(self) -> None:
        self.pause_count += 1

    def parent_drained_poll(self) -> bool:
        return self.busy and not self.completed

    def parent_drained_end(self) -> None:
        self.pause_count -= 1
        if not self.pause_count:
            self.context.schedule_oneshot(self._resumed.wake_all)

    def check_move(self, context: AioContext) -> None:
        pass

    def move_to(self, context: AioContext) -> None:
        self.context = context

    def linked_nodes(self) -> list[Node]:
        return [edge.node for edge in self.edges]


@contextmanager
def threads(it: Bench, *names: str) -> Iterator[list[IOThread]]:
    """Iothreads that end with the test, when it has succeeded."""
    made = [IOThread(name, it.host) for name in names]
    yield made
    for thread in made:
        thread.stop()


def drive(it: Bench, body: Coroutine[Any, Any, None], *, coroutine: bool) -> None:
    """Run a test's body as a coroutine of the main context, or as plain code, which it is if it awaits nothing."""
    if coroutine:
        it.context.run(body)
        return
    try:
        body.send(None)
    except StopIteration:
        return
    raise AssertionError("plain code has awaited something")


class section:
    """``async with section(it, everything, nodes...)``: a drained section of plain code or of a coroutine, whichever
    runs it."""

    def __init__(self, it: Bench, everything: bool, *nodes: Node) -> None:
        self.it = it
        self.everything = everything
        self.nodes = nodes

    async def __aenter__(self) -> None:
        from bottomhalf.aio.coroutine import in_coroutine

        graph = self.it.graph
        self.co: Any = None
        if in_coroutine():
            self.co = graph.co_drained_all() if self.everything else graph.co_drained(*self.nodes)
            await self.co.__aenter__()
        else:
            self.plain: Any = graph.drained_all() if self.everything else graph.drained(*self.nodes)
            self.plain.__enter__()

    async def __aexit__(self, *error: Any) -> None:
        if self.co is not None:
            await self.co.__aexit__(*error)
        else:
            self.plain.__exit__(*error)


def refresh(*nodes: Node) -> None:
    permissions.refresh(*nodes)


ENOTSUP, EIO = -errno.ENOTSUP, -errno.EIO
