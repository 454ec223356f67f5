# SPDX-License-Identifier: Apache-2.0
"""What the tests of the block layer stand on: a context, a graph and backends on a host, and a user of a backend
who notices when he is told twice or never."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from bottomhalf.aio import AioContext, wait_while
from bottomhalf.block import BlockBackend, Graph, Node
from bottomhalf.drivers.file import FileNode
from bottomhalf.host.protocol import PERM_ALL, PERM_CONSISTENT_READ, PERM_WRITE
from bottomhalf.host.request import DISCARD, FLUSH, IN_PROGRESS, READ, WRITE, WRITE_ZEROES, Request
from bottomhalf.host.sim import SimHost

READ_WRITE = PERM_CONSISTENT_READ | PERM_WRITE


class User:
    """Submits to a backend and keeps count of what he was told."""

    def __init__(self, backend: BlockBackend) -> None:
        self.backend = backend
        self.queue = backend.queue(self._completed)
        self.waiting: dict[int, Request] = {}
        self.told: list[Request] = []  # in the order in which the user learned it

    def submit(self, *requests: Request) -> list[Request]:
        for request in requests:
            request.owner = self.queue
            request.result = IN_PROGRESS
            assert id(request) not in self.waiting, f"{request!r} is on its way already"
            self.waiting[id(request)] = request
        pending = self.queue.submit(list(requests))
        pending_ids = {id(request) for request in pending}
        assert len(pending_ids) == len(pending)
        self._completed([request for request in requests if id(request) not in pending_ids])
        return pending

    def _completed(self, requests: list[Request]) -> None:
        for request in requests:
            assert self.waiting.pop(id(request), None) is request, f"{request!r} was told twice"
            assert request.result <= 0, f"{request!r} was told before its end"
            assert request.owner is self.queue, f"{request!r} came back with another owner"
            self.told.append(request)

    def wait(self) -> None:
        """Until everything has been told."""
        wait_while(self.backend.context, lambda: self.waiting, what="the requests of a test")

    def do(self, *requests: Request) -> list[int]:
        self.submit(*requests)
        self.wait()
        return [request.result for request in requests]


class Bench:
    """A graph in a context of its own."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.context = AioContext(host)
        self.graph = Graph(self.context)

    def file(self, filename: str, name: str = "", **options: Any) -> FileNode:
        return FileNode(self.graph, name, filename=filename, **options)

    def backend(self, node: Node, held: int = READ_WRITE, shared: int = PERM_ALL, **options: Any) -> BlockBackend:
        backend = BlockBackend(self.graph, held=held, shared=shared, **options)
        try:
            backend.insert(node)
        except BaseException:
            backend.close()
            raise
        return backend

    def user(self, node: Node, **options: Any) -> User:
        return User(self.backend(node, **options))

    def close(self) -> None:
        for backend in list(self.graph.backends):
            assert not backend.statistics().parked
            backend.close()
            assert backend.in_flight == 0, "the count of requests in flight is not exact"
        self.graph.close()
        assert not self.graph.nodes
        self.context.poll(False)
        self.context.close()


@contextmanager
def bench(host: Any) -> Iterator[Bench]:
    """A bench that is cleared, with checks, when the test has succeeded."""
    made = Bench(host)
    yield made
    made.close()


@contextmanager
def sim_bench(seed: int, **files: int | bytes) -> Iterator[Bench]:
    """A bench on a simulated host with files: ``sim_bench(seed, disk=1 << 20)``."""
    host = SimHost(seed)
    for name, content in files.items():
        host.add_file(name, content)
    with bench(host) as made:
        yield made


def read(offset: int, length: int) -> Request:
    return Request(READ, offset, length, memoryview(bytearray(b"\xee" * length)))


def write(offset: int, data: bytes, flags: int = 0) -> Request:
    return Request(WRITE, offset, len(data), memoryview(bytearray(data)), flags)


def flush() -> Request:
    return Request(FLUSH)


def discard(offset: int, length: int) -> Request:
    return Request(DISCARD, offset, length)


def zero(offset: int, length: int, flags: int = 0) -> Request:
    return Request(WRITE_ZEROES, offset, length, None, flags)


def results(requests: Iterable[Request]) -> list[int]:
    return [request.result for request in requests]
