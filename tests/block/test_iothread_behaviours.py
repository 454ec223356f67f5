# SPDX-License-Identifier: Apache-2.0
"""QEMU's behaviours of nodes in other threads (test-block-iothread), each by its name."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from bottomhalf.aio import AioContext, IOThread, kick, wait_while
from bottomhalf.block import BlockBackend, BlockError, Node
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.protocol import DATA, PERM_CONSISTENT_READ, PERM_RESIZE, ZERO, Host
from bottomhalf.host.request import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES
from tests.block.bench import READ_WRITE, Bench, bench
from tests.block.parts import SIZE, Both, Counting, Job, Pass, threads

EVERYTHING = READ_WRITE | PERM_RESIZE


class Plain(Counting):
    """Everything works, at once."""

    driver = "plain"

    def __init__(self, *arguments: Any, read_only: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.read_only = read_only
        self.where: list[str] = []

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        self.where.append(_context_name())

    async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.where.append(_context_name())

    async def co_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.where.append(_context_name())

    async def co_discard(self, offset: int, length: int) -> None:
        self.where.append(_context_name())

    def block_status(self, offset: int, length: int) -> tuple[int, int]:
        return ZERO, length

    async def co_truncate(self, size: int) -> None:
        self.where.append(_context_name())
        if size < 0:
            raise OSError(errno.EINVAL, "negative size")


def _context_name() -> str:
    from bottomhalf.aio import current

    return current().context.name


@contextmanager
def moved(host: Host, held: int = EVERYTHING, **options: Any) -> Iterator[tuple[Bench, Plain, BlockBackend, IOThread]]:
    """A backend on a node that lives in an iothread, used from the main thread."""
    with bench(host) as it, threads(it, "io0") as (thread,):
        node = Plain(it.graph, "node", **options)
        backend = it.backend(node, held=held)
        it.graph.move(node, thread.context)
        yield it, node, backend, thread
        assert set(node.where) <= {"io0"}, "the work is done where the node lives"
        backend.close()
        assert node.closed


def outcome(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return -(error.errno or 0)
    return 0


OPERATIONS = [
    pytest.param(READ, id="pread"),
    pytest.param(WRITE, id="pwrite"),
    pytest.param(WRITE_ZEROES, id="pwrite-zeroes"),
    pytest.param(DISCARD, id="pdiscard"),
]


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("way", ["plain", "coroutine", "batch"])
def test_requests(host: Host, op: int, way: str) -> None:
    """/sync-op/pread /sync-op/pwrite /sync-op/preadv /sync-op/pwritev /sync-op/preadv_part /sync-op/pwritev_part
    /sync-op/pwrite_zeroes /sync-op/pdiscard: a request inside the disk succeeds, one before it fails with EIO. What is
    a vector elsewhere is a batch here, and each part has its own result."""
    with moved(host) as (it, node, backend, _thread):

        def ask(offset: int) -> int:
            buffer = memoryview(bytearray(512)) if op in (READ, WRITE) else None
            if way == "plain":
                return outcome(lambda: backend.request(op, offset, 512, buffer))
            if way == "coroutine":
                return outcome(lambda: it.context.run(backend.co_request(op, offset, 512, buffer, 0)))
            return batch(backend, op, offset)

        assert ask(0) == 0
        assert len(node.where) == 1
        assert ask(-2) == -errno.EIO
        assert ask(SIZE - 511) == -errno.EIO
        assert len(node.where) == 1
        backend.drain()  # the owner is told first, and then the count taken back
        assert backend.in_flight == 0


def batch(backend: BlockBackend, op: int, offset: int) -> int:
    """Two requests, the second good, in one list, from the backend's own thread."""
    from bottomhalf.aio import kick
    from bottomhalf.host.request import Request

    buffers = [memoryview(bytearray(512)) if op in (READ, WRITE) else None for _ in range(2)]
    requests = [Request(op, offset, 512, buffers[0])]
    if offset:
        requests.append(Request(op, 1024, 0, buffers[1][:0] if buffers[1] is not None else None))
    done: list[Request] = []

    def told(ended: list[Request]) -> None:
        done.extend(ended)
        kick()

    queue = backend.queue(told)
    for request in requests:
        request.owner = queue

    def submit() -> None:
        pending = queue.submit(requests)
        told([request for request in requests if not any(request is each for each in pending)])

    backend.context.schedule_oneshot(submit)
    wait_while(None, lambda: len(done) < len(requests), what="a batch")
    if offset:
        assert requests[1].result == 0
        node = backend.node
        assert isinstance(node, Plain)
        node.where.pop()
    return requests[0].result


def test_discard_that_nobody_wants(host: Host) -> None:
    """/sync-op/pdiscard: a node that does not unmap says that all is done, and does nothing."""
    with bench(host) as it, threads(it, "io0") as (thread,):
        node = Plain(it.graph, "node")
        raw = RawNode(it.graph, "raw", file=node, unmap=False)
        backend = it.backend(raw)
        it.graph.move(node, thread.context)
        assert outcome(lambda: backend.request(DISCARD, 0, 512)) == 0
        assert not node.where
        backend.close()


def test_truncate(host: Host) -> None:
    """/sync-op/truncate: to a size, to a negative one (EINVAL), and without the permission to (EPERM; QEMU's node says
    EACCES because it is read-only)."""
    with moved(host) as (it, _, backend, _):
        assert outcome(lambda: it.context.run(backend.co_truncate(SIZE))) == 0
        assert outcome(lambda: it.context.run(backend.co_truncate(-2))) == -errno.EINVAL
    with moved(host, held=PERM_CONSISTENT_READ, read_only=True) as (it, _, backend, _):
        assert outcome(lambda: it.context.run(backend.co_truncate(SIZE))) == -errno.EPERM


def test_block_status(host: Host) -> None:
    """/sync-op/block_status: what the driver says, or "data" if it says nothing; nothing about nothing."""
    with moved(host) as (it, node, backend, _):
        status = lambda offset, length: it.context.run(backend.co_block_status(offset, length))  # noqa: E731
        assert status(0, SIZE) == (ZERO, SIZE)
        assert status(0, 0) == (ZERO, 0)
        node.block_status = partial(Node.block_status, node)  # type: ignore[method-assign]
        assert status(0, SIZE) == (DATA, SIZE)


@pytest.mark.parametrize("read_only", [False, True])
def test_flush(host: Host, read_only: bool) -> None:
    """/sync-op/flush: also of a read-only image."""
    with moved(host, held=PERM_CONSISTENT_READ, read_only=read_only) as (_, node, backend, _):
        assert outcome(lambda: backend.request(FLUSH, 0, 0)) == 0
        assert node.flushes == 1


@pytest.mark.parametrize("way", ["coroutine", "own coroutine"])
def test_write_compressed(host: Host, way: str) -> None:
    """/sync-op/pwrite_compressed: a driver that cannot says so, but what is not within the disk is no question of the
    driver."""
    with moved(host) as (it, node, backend, thread):
        context = it.context if way == "coroutine" else thread.context

        def ask(offset: int) -> int:
            return outcome(lambda: _wait_for(context, backend.co_pwrite_compressed(offset, bytes(512))))

        assert ask(0) == -errno.ENOTSUP
        assert ask(-2) == -errno.EIO
        assert ask(SIZE - 511) == -errno.EIO
        assert not node.where
        backend.drain()
        assert backend.in_flight == 0


def _wait_for(context: AioContext, body: Any) -> Any:
    """Run a coroutine in a context, whose thread may be another, and wait for it in this one."""
    ended: list[Any] = []

    async def run() -> None:
        try:
            ended.append((await body, None))
        except OSError as error:
            ended.append((None, error))
        kick()

    context.schedule(run())
    wait_while(context if context.is_home else None, lambda: not ended, what="a coroutine")
    result, error = ended[0]
    if error is not None:
        raise error
    return result


def test_vmstate_and_check(host: Host) -> None:
    """/sync-op/load_vmstate /sync-op/save_vmstate /sync-op/check: a driver without them says ENOTSUP, also through what
    stands on it."""
    with bench(host) as it, threads(it, "io0") as (thread,):
        node = Plain(it.graph, "node")
        raw = RawNode(it.graph, "raw", file=node)
        backend = it.backend(raw)
        it.graph.move(node, thread.context)
        buffer = memoryview(bytearray(512))
        for each in (node, raw):
            for body in (each.co_load_vmstate(0, buffer), each.co_save_vmstate(0, buffer), each.co_check()):
                assert outcome(lambda body=body: _wait_for(thread.context, body)) == -errno.ENOTSUP
        backend.close()


def test_activate(host: Host) -> None:
    """/sync-op/activate: of a node that is active there is nothing to do; one that was not may be written again."""
    with moved(host) as (it, node, backend, _):
        it.graph.activate(node)
        it.graph.activate(None)
        assert node.active
        backend.allow_inactive = True
        it.graph.inactivate(node)
        assert not node.active
        assert outcome(lambda: backend.request(WRITE, 0, 512, memoryview(bytearray(512)))) == -errno.EPERM
        assert outcome(lambda: backend.request(READ, 0, 512, memoryview(bytearray(512)))) == 0
        it.graph.activate(node)
        assert outcome(lambda: backend.request(WRITE, 0, 512, memoryview(bytearray(512)))) == 0


# -- moving ---------------------------------------------------------------------------------------------------------


def test_job_moves_with_its_node(host: Host) -> None:
    """/attach/blockjob T100: a job's coroutine goes where its node goes, to and fro, and its end runs in the main
    thread."""
    with bench(host) as it, threads(it, "io0") as (thread,):
        node = Plain(it.graph, "node")
        backend = it.backend(node, held=PERM_CONSISTENT_READ)
        homes: list[bool] = []

        class Checked(Job):
            async def _pause_point(self) -> None:
                await super()._pause_point()
                homes.append(self.context.is_home)

            def _exit(self) -> None:
                assert it.context.is_home
                super()._exit()

        job = Checked(it.graph, node)
        job.start()
        for context in (thread.context, it.context, thread.context, it.context):
            it.graph.move(node, context)
            assert job.context is node.context is backend.context is context
            homes.clear()
            wait_while(None, lambda: len(homes) < 3 and it.context.notify() is None, what="the job to go on")
        assert job.complete_sync() == 0
        assert all(homes)
        backend.close()


def test_second_node(host: Host) -> None:
    """/attach/second_node: a node comes to its backend's thread, a filter that is opened above it is there too, and all
    move together."""
    with bench(host) as it, threads(it, "io0") as (thread,):
        backend = BlockBackend(it.graph, held=PERM_CONSISTENT_READ, context=thread.context)
        node = Plain(it.graph, "node")
        backend.insert(node)
        filter = RawNode(it.graph, "filter", file=node)
        filter.monitor_owned = True
        assert {backend.context, node.context, filter.context} == {thread.context}
        it.graph.move(node, it.context)
        assert {backend.context, node.context, filter.context} == {it.context}
        backend.close()


def test_backend_keeps_its_context(host: Host) -> None:
    """/attach/preserve_blk_ctx: a node that loses its last user goes home; the backend stays where it is, and takes the
    next one there."""
    with bench(host) as it, threads(it, "io0") as (thread,):
        backend = BlockBackend(it.graph, held=PERM_CONSISTENT_READ, context=thread.context)
        node = Plain(it.graph, "node")
        node.monitor_owned = True
        for _ in range(2):
            backend.insert(node)
            assert node.context is backend.context is thread.context
            backend.remove()
            assert node.context is it.context
            assert backend.context is thread.context
        backend.close()


def test_propagate(host: Host) -> None:
    """/propagate/basic: whatever is connected moves along."""
    with bench(host) as it, threads(it, "io0") as (thread,):
        a, b = Plain(it.graph, "a"), Plain(it.graph, "b")
        backend_a, backend_b = (it.backend(node, held=PERM_CONSISTENT_READ) for node in (a, b))
        verify = Both(it.graph, "verify", a, b)
        backend = it.backend(verify, held=PERM_CONSISTENT_READ)
        for context in (thread.context, it.context):
            it.graph.move(a, context)
            contexts = {each.context for each in (a, b, verify, backend, backend_a, backend_b)}
            assert contexts == {context}
        backend.close()


def test_propagate_through_a_diamond(host: Host) -> None:
    """/propagate/diamond: two ways to one node are no reason to go round for ever."""
    with bench(host) as it, threads(it, "io0") as (thread,):
        base = Plain(it.graph, "base")
        sides = [RawNode(it.graph, f"side{n}", file=base) for n in range(2)]
        verify = Both(it.graph, "verify", *sides)
        backend = it.backend(verify, held=PERM_CONSISTENT_READ)
        for context in (thread.context, it.context):
            it.graph.move(verify, context)
            assert {each.context for each in (base, *sides, verify, backend)} == {context}
        backend.close()


def test_propagate_through_a_job(host: Host) -> None:
    """/propagate/mirror: a job's nodes move together though no edge connects them; a user who may not move keeps all
    where they are."""
    with bench(host) as it, threads(it, "io0") as (thread,):
        source, target = Plain(it.graph, "source"), Plain(it.graph, "target")
        filter = Pass(it.graph, "filter", source)
        filter.monitor_owned = target.monitor_owned = True
        job = Job(it.graph, filter, target)
        everybody: list[Any] = [source, target, filter, job]
        for start in (source, target):
            for context in (thread.context, it.context):
                it.graph.move(start, context)
                assert {each.context for each in everybody} == {context}
        backend = it.backend(source, held=PERM_CONSISTENT_READ, allow_context_change=False)
        with pytest.raises(BlockError, match=r"^Cannot change iothread of active block backend$"):
            it.graph.move(target, thread.context)
        assert {each.context for each in (*everybody, backend)} == {it.context}
        assert source.quiesce_counter == target.quiesce_counter == 0
        backend.allow_context_change = True
        it.graph.move(target, thread.context)
        assert {each.context for each in (*everybody, backend)} == {thread.context}
        it.graph.move(target, it.context)
        job.drop_edges()
        backend.close()


def test_a_user_who_cannot_move_says_so(host: Host) -> None:
    """What knows nothing of moving is asked, and refuses."""

    class Rooted(Job):
        check_move = Node.__mro__[1].check_move  # the default of Parent

    with bench(host) as it, threads(it, "io0") as (thread,):
        node = Plain(it.graph, "node")
        node.monitor_owned = True
        job = Rooted(it.graph, node)
        with pytest.raises(BlockError, match=r"^Changing iothreads is not supported by a job$"):
            it.graph.move(node, thread.context)
        job.drop_edges()


@pytest.mark.parametrize("refusing", range(3))
def test_a_driver_that_cannot_enter_sends_all_back(host: Host, refusing: int) -> None:
    """The move is a transaction: those who have moved already go back, and each has left what it entered."""

    class Rooted(Plain):
        at: Any = None
        refuses = False

        def attach_context(self) -> None:
            if self.refuses and self.context.name == "io0":
                raise BlockError(f"{self.name} stays")
            assert self.at is None
            self.at = self.context

        def detach_context(self) -> None:
            assert self.at is self.context
            self.at = None

    with bench(host) as it, threads(it, "io0") as (thread,):
        nodes: list[Rooted] = []
        for n in range(3):
            nodes.append(Rooted(it.graph, f"n{n}", backing=nodes[-1] if nodes else None))
            nodes[-1].at = it.context
        backend = it.backend(nodes[-1], held=PERM_CONSISTENT_READ)
        nodes[refusing].refuses = True
        with pytest.raises(BlockError, match=f"^n{refusing} stays$"):
            it.graph.move(nodes[0], thread.context)
        assert {each.context for each in (*nodes, backend)} == {it.context}
        assert [each.at for each in nodes] == [it.context] * 3
        nodes[refusing].refuses = False
        it.graph.move(nodes[0], thread.context)
        assert [each.at for each in nodes] == [thread.context] * 3
        backend.close()
