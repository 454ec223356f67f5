# SPDX-License-Identifier: Apache-2.0
"""Random graphs, changed, drained and moved at random under random load, on a simulated host whose seed also decides
which thread runs: nothing hangs, no request is lost or told twice, every byte is where it belongs, and after each step
edges, permissions, contexts and drained sections agree.

    python -m pytest tests/block/test_explore.py --seeds 10000
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

from bottomhalf.aio import AioContext, IOThread, kick, sleep_ns, wait_while
from bottomhalf.block import BlockBackend, BlockError, Graph, Node, permissions
from bottomhalf.block.changes import below
from bottomhalf.block.edge import ROLE_COW, ROLE_DATA
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_RESIZE, PERM_WRITE
from bottomhalf.host.request import READ, WRITE, Request
from bottomhalf.host.sim import SimHost
from tests.block.bench import READ_WRITE, Bench, User
from tests.block.parts import Pass

SLOTS: Final = 8  # a user's own places on a disk
SLOT: Final = 64
USERS_MAX: Final = 5
NODES_MAX: Final = 14
STEPS: Final = 40
DISK: Final = USERS_MAX * 4 * SLOTS * SLOT
NESTED_MAX: Final = 2


class Ram(Node):
    """A disk in memory; some requests take their time. A request must not find it drained."""

    driver = "ram"

    def __init__(self, graph: Graph, name: str, chance: random.Random) -> None:
        super().__init__(graph, name)
        self.size = DISK
        self.content = bytearray(DISK)
        self.chance = chance

    def open_size(self) -> int:
        return DISK

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        await self._pass_time()
        buffer[:] = self.content[offset : offset + len(buffer)]

    async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        await self._pass_time()
        self.content[offset : offset + len(buffer)] = buffer

    async def co_flush(self) -> None:
        await self._pass_time()

    async def _pass_time(self) -> None:
        assert not self.closed and self.context.is_home
        if self.chance.random() < 0.7:
            await sleep_ns(self.chance.randrange(1000, 100_000))
        assert not self.closed and self.context.is_home, "the node went, or moved, under a request"


class Slow(Pass):
    """A filter of coroutines."""

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        await sleep_ns(500)
        assert not self.closed
        await self.children[0].node.co_pread(offset, buffer)

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        assert not self.closed and self.context.is_home
        if requests[0].op == READ:
            return Node.submit_batch(self, requests)
        return super().submit_batch(requests)


class Worker:
    """A user with places of his own, who knows what should be in each."""

    def __init__(self, it: Explorer, number: int, node: Node) -> None:
        self.it = it
        self.number = number
        self.backend = BlockBackend(it.graph, held=READ_WRITE, shared=PERM_ALL & ~PERM_RESIZE)
        self.backend.insert(node)
        self.user = User(self.backend)
        self.user.queue._on_complete = self.told
        self.disk = it.disk_of(node)
        self.busy: set[int] = set()
        self.submitted = 0
        self.coming = 0  # submissions on their way to the backend's thread

    def load(self) -> None:
        """Some requests, from the backend's own thread."""
        if self.backend.root is None:
            return
        chance = self.it.chance
        slots = [slot for slot in range(SLOTS) if slot not in self.busy]
        chance.shuffle(slots)
        op = chance.choice((READ, WRITE))
        requests = []
        for slot in slots[: chance.randrange(1, 4)]:
            self.busy.add(slot)
            offset = (self.number * SLOTS + slot) * SLOT
            data = self.it.expected[self.disk][offset : offset + SLOT]
            if op == WRITE:
                data = bytes([chance.randrange(256)]) * SLOT
            request = Request(op, offset, SLOT, memoryview(bytearray(data if op == WRITE else SLOT)))
            request.context = (offset, bytes(data), slot)
            requests.append(request)
        if requests:
            self.coming += 1
            self.backend.context.schedule_oneshot(lambda: self._submit(requests))

    def _submit(self, requests: list[Request]) -> None:
        if not self.backend.context.is_home:
            self.backend.context.schedule_oneshot(lambda: self._submit(requests))
            return
        self.coming -= 1
        self.submitted += len(requests)
        self.user.submit(*requests)
        kick()

    def told(self, requests: list[Request]) -> None:
        self.user._completed(requests)
        for request in requests:
            self.check(request)
        kick()

    def check(self, request: Request) -> None:
        (offset, data, slot), request.context = request.context, None
        self.busy.discard(slot)
        if request.result == -errno.ENOMEDIUM:
            assert self.backend.root is None
            return
        assert request.result == 0, request
        if request.op == WRITE:
            self.it.expected[self.disk][offset : offset + SLOT] = data
        else:
            assert request.buffer == data, "a read saw something else than was written there"

    def settle(self) -> None:
        """What was done in the submitting call is in ``told`` of the user, but nobody looked."""
        for request in self.user.told:
            if request.context is not None:
                self.check(request)


class Explorer(Bench):
    """One seed's graph and what is done to it."""

    def __init__(self, seed: int) -> None:
        super().__init__(SimHost(seed))
        self.chance = random.Random(seed)
        self.threads = [IOThread(f"io{n}", self.host, poll_max_ns=0) for n in range(self.chance.randrange(3))]
        self.contexts: list[AioContext] = [self.context, *(thread.context for thread in self.threads)]
        self.disks = [Ram(self.graph, f"disk{n}", self.chance) for n in range(self.chance.randrange(1, 3))]
        self.expected = {disk: bytearray(DISK) for disk in self.disks}
        self.workers: list[Worker] = []
        self.names = 0
        self.depth = 0
        self.changing = 0
        self.sections: list[list[Node]] = []  # plain sections that are going on
        self.coroutines = 0
        for disk in self.disks:
            disk.monitor_owned = True
        for _ in range(3):
            self.add_filter()
            self.add_worker()

    # -- what can be done ---------------------------------------------------------------------------------------

    def step(self) -> None:
        actions: list[Callable[[], object]] = [
            self.load, self.load, self.load, self.poll, self.insert, self.insert, self.remove, self.remove, self.move,
            self.drain, self.drain_all, self.co_drain, self.add_worker, self.drop_worker, self.later, self.spare,
            self.refused, self.replace, self.add_filter, self.freeze,
        ]  # fmt: skip
        self.chance.choice(actions)()
        self.check()

    def a_node(self) -> Node:
        return self.chance.choice(list(self.graph.nodes.values()))

    def disk_of(self, node: Node) -> Ram:
        while not isinstance(node, Ram):
            node = node.children[0].node
        return node

    def name(self) -> str:
        self.names += 1
        return f"n{self.names}"

    def load(self) -> None:
        if self.workers:
            self.chance.choice(self.workers).load()

    def poll(self) -> None:
        for _ in range(self.chance.randrange(1, 5)):
            self.context.poll(False)

    def make_filter(self, node: Node) -> Node:
        kind = self.chance.choice(("pass", "slow", "raw"))
        if kind == "raw":
            return RawNode(self.graph, self.name(), file=node)
        return (Pass if kind == "pass" else Slow)(self.graph, self.name(), node)

    def add_filter(self) -> None:
        if len(self.graph.nodes) < NODES_MAX:
            filter = self.make_filter(self.a_node())
            permissions.refresh(filter)
            filter.monitor_owned = True

    def insert(self) -> None:
        if len(self.graph.nodes) >= NODES_MAX:
            return
        filter = self.chance.choice((Pass, Slow))(self.graph, self.name(), self.a_node())
        filter.monitor_owned = self.chance.random() < 0.5
        with self.attempt(filter):
            self.graph.insert_node(filter)
        self.graph.release(filter)

    def remove(self) -> None:
        filters = [node for node in self.graph.nodes.values() if isinstance(node, Pass)]
        if filters:
            filter = self.chance.choice(filters)
            filter.monitor_owned = False
            with self.attempt(filter):
                self.graph.remove_filter(filter)
            if not filter.closed:
                self.graph.release(filter)

    def replace(self) -> None:
        """Another window of the same bytes in the place of a node."""
        node = self.a_node()
        if isinstance(node, Ram) or len(self.graph.nodes) >= NODES_MAX:
            return
        other = self.make_filter(node.children[0].node)
        node.monitor_owned = False
        with self.attempt(node, other):
            self.graph.replace_node(node, other)
        for each in (node, other):
            self.graph.release(each)

    def attempt(self, *nodes: Node) -> AbstractContextManager[None]:
        """A change that may be refused, because an edge is frozen or somebody was faster."""
        from contextlib import suppress

        return suppress(BlockError)

    def freeze(self) -> None:
        edges = [edge for node in self.graph.nodes.values() for edge in node.children]
        if edges:
            edge = self.chance.choice(edges)
            edge.frozen = not edge.frozen and self.chance.random() < 0.3

    def spare(self) -> None:
        """A side child comes, or goes."""
        parent = self.a_node()
        edge = parent.child("spare")
        if isinstance(parent, Ram):
            return
        with self.attempt(parent):
            if edge is None:
                self.graph.attach_child(parent, self.a_node(), "spare", self.chance.choice((ROLE_COW, ROLE_DATA)))
            else:
                self.graph.detach_child(edge)

    def refused(self) -> None:
        """Changes that cannot be: nothing of them is left."""
        node = self.a_node()
        upper = self.chance.choice([node, *_above(node)])
        try:
            edge = self.graph.attach_child(node, upper, "loop", ROLE_COW)
        except BlockError:
            pass
        else:  # while it waited, somebody has taken away what was in between
            assert node not in below(upper), "a cycle was made"
            with self.attempt():
                self.graph.detach_child(edge)
        node = self.a_node()
        greedy = BlockBackend(self.graph, held=PERM_CONSISTENT_READ, shared=PERM_CONSISTENT_READ)
        try:
            greedy.insert(node)
        except BlockError as error:
            assert "Permission conflict" in str(error), error
        else:
            assert not any(edge.held & PERM_WRITE for edge in node.parents)
        greedy.close()

    def move(self) -> None:
        self.graph.move(self.a_node(), self.chance.choice(self.contexts))

    def drain(self) -> None:
        nodes = [self.a_node() for _ in range(self.chance.randrange(1, 3))]
        subtree = self.chance.random() < 0.3
        covered = list(dict.fromkeys(each for node in nodes for each in (below(node) if subtree else [node])))
        with self.graph.drained(*nodes, subtree=subtree):
            self.inside(covered, covered)

    def drain_all(self) -> None:
        covered = list(self.graph.nodes.values())
        with self.graph.drained_all():
            self.inside([], covered)
            assert not any(worker.backend.in_flight for worker in self.workers)

    def inside(self, section: list[Node], quiet: list[Node]) -> None:
        self.sections.append(section)
        self.depth += 1
        assert not any(node.busy() for node in quiet), "a drained node is busy"
        if self.depth <= NESTED_MAX:
            for _ in range(self.chance.randrange(3)):
                self.step()
        assert not any(node.in_flight for node in quiet)
        self.depth -= 1
        self.sections.remove(section)

    def co_drain(self) -> None:
        node = self.a_node()
        context = self.chance.choice(self.contexts)
        self.coroutines += 1

        async def work() -> None:
            async with self.graph.co_drained(node):
                assert node.quiesce_counter or node.closed
                await sleep_ns(3000)
            if self.chance.random() < 0.5:
                await self.graph.co_run(self.insert)
            self.coroutines -= 1
            kick()

        context.schedule(work())

    def later(self) -> None:
        """The same from a bottom half: perhaps inside somebody's wait."""
        if self.depth <= NESTED_MAX:

            def run() -> None:
                self.depth += 1
                self.step()
                self.depth -= 1

            self.context.schedule_oneshot(run)

    def add_worker(self) -> None:
        free = set(range(USERS_MAX * 4)) - {worker.number for worker in self.workers}
        if len(self.workers) < USERS_MAX:
            before = len(self.graph.backends)
            with self.attempt():
                self.workers.append(Worker(self, self.chance.choice(sorted(free)), self.a_node()))
                return
            self.graph.backends.pop().close()
            assert len(self.graph.backends) == before

    def drop_worker(self) -> None:
        if len(self.workers) > 1:
            worker = self.workers.pop(self.chance.randrange(len(self.workers)))
            worker.backend.remove()
            self.finish(worker)

    def finish(self, worker: Worker) -> None:
        wait_while(None, lambda: worker.coming or worker.user.waiting, what="what a user still has to be told")
        worker.settle()
        assert worker.submitted == len(worker.user.told)
        worker.backend.close()
        assert worker.backend.in_flight == 0

    # -- what must hold -----------------------------------------------------------------------------------------

    def check(self) -> None:
        for worker in self.workers:
            if not self.threads:
                worker.settle()
        for node in self.graph.nodes.values():
            assert not node.closed and not any(node in below(edge.node) for edge in node.children), "a cycle"
            assert node.permissions == permissions.cumulative(node)
            for edge in node.parents:
                assert edge.node is node
                assert edge.quiesced_parent == (node.quiesce_counter > 0)
                for other in node.parents:
                    assert edge is other or not edge.held & ~other.shared, "permissions conflict"
                if isinstance(edge.parent, Node):
                    assert edge in edge.parent.children
                    assert edge.parent.context is node.context
                elif isinstance(edge.parent, BlockBackend):
                    assert edge.parent.root is edge and edge.parent.context is node.context
            held, shared = permissions.cumulative(node)
            for edge in node.children:
                assert edge in edge.node.parents
                assert (edge.held, edge.shared) == node.child_permissions(edge, held, shared)

    def end(self) -> None:
        wait_while(None, lambda: self.coroutines, what="coroutines that drain")
        for _ in range(50):
            if not self.context.poll(False):
                break
        wait_while(None, lambda: self.coroutines, what="coroutines that drain")
        while self.workers:
            worker = self.workers.pop()
            if self.chance.random() < 0.5:
                wait_while(None, lambda: worker.coming or worker.user.waiting, what="the last requests")  # noqa: B023
            worker.backend.remove()
            self.finish(worker)
        assert not self.sections
        for node in self.graph.nodes.values():
            assert node.quiesce_counter == 0 and node.in_flight == 0
            for edge in node.children:
                edge.frozen = False
        for disk in self.disks:
            assert disk.content == self.expected[disk]
            self.graph.move(disk, self.context)
        for thread in self.threads:
            thread.stop()
        self.close()
        self.host.end_threads()


def _above(node: Node) -> list[Node]:
    found: dict[Node, None] = {}
    open_ends: list[Any] = [node]
    while open_ends:
        for edge in open_ends.pop().parents:
            if isinstance(edge.parent, Node) and edge.parent not in found:
                found[edge.parent] = None
                open_ends.append(edge.parent)
    return list(found)


def test_explore(seed: int) -> None:
    explorer = Explorer(seed)
    for _ in range(STEPS):
        explorer.step()
    explorer.end()
