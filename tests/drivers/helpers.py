# SPDX-License-Identifier: Apache-2.0
"""What the tests of filters share: opening a node from options as QMP has them, and a model of a disk's bytes."""

from __future__ import annotations

import random
from typing import Any

from bottomhalf.aio import sleep_ns
from bottomhalf.block import Edge, Graph, Node
from bottomhalf.drivers.registry import open_node
from bottomhalf.host.request import COMPRESSED, DISCARD, READ, WRITE, WRITE_ZEROES, Request
from bottomhalf.qapi.block import BlockdevOptions
from bottomhalf.qapi.visit import from_json
from tests.block.bench import Bench, User, flush, read, write, zero


def opened(it: Bench, options: dict[str, Any]) -> Node:
    """The node that ``blockdev-add`` would make."""
    return open_node(it.graph, from_json(BlockdevOptions, options))


class Ram(Node):
    """A disk in memory whose requests take their time, in coroutine form; notes what is written."""

    driver = "ram"
    is_protocol = True
    handles_fua = True

    def __init__(self, graph: Graph, content: bytes, name: str = "", *, delay_ns: int = 100) -> None:
        super().__init__(graph, name, unmap=True)
        self.content = bytearray(content)
        self.size = len(content)
        self.delay_ns = delay_ns
        self.flushes = 0
        self.fail: dict[str, int] = {}  # errno by what is asked
        self.compressed = 0

    def open_size(self) -> int:
        return len(self.content)

    async def _wait(self, what: str) -> None:
        if self.delay_ns:
            await sleep_ns(self.context.host.random_bytes(1)[0] * self.delay_ns // 128)
        if what in self.fail:
            raise OSError(self.fail[what], "as told")

    def _reach(self, end: int) -> None:
        if end > len(self.content):
            self.content.extend(bytes(end - len(self.content)))
            self.refresh_size()

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        await self._wait("read")
        buffer[:] = self.content[offset : offset + len(buffer)]

    async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        await self._wait("write")
        self._reach(offset + len(buffer))
        self.content[offset : offset + len(buffer)] = buffer
        self.compressed += bool(flags & COMPRESSED)

    async def co_flush(self) -> None:
        await self._wait("flush")
        self.flushes += 1

    async def co_discard(self, offset: int, length: int) -> None:
        await self._wait("discard")
        self.content[offset : offset + length] = bytes(length)

    async def co_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._wait("write-zeroes")
        self._reach(offset + length)
        self.content[offset : offset + length] = bytes(length)

    async def co_truncate(self, size: int) -> None:
        del self.content[size:]
        self._reach(size)
        self.refresh_size()


class Overlay(Ram):
    """A copy-on-write layer above ``backing``, cluster by cluster."""

    driver = "overlay"
    CLUSTER = 4096

    def __init__(self, graph: Graph, backing: Node, name: str = "") -> None:
        super().__init__(graph, bytes(backing.size), name)
        self.backing = self.attach(backing, "backing").node
        self.stored: set[int] = set()

    @property
    def has_backing(self) -> bool:
        return True

    @property
    def cluster_bytes(self) -> int:
        return self.CLUSTER

    def child_permissions(self, edge: Edge, held: int, shared: int) -> tuple[int, int]:
        return 1, 15

    def is_allocated(self, offset: int, length: int, bottom: Node | None = None) -> tuple[bool, int] | None:
        count = min(length, self.CLUSTER - offset % self.CLUSTER)
        if offset // self.CLUSTER in self.stored:
            return True, count
        if bottom is None or bottom is self:
            return False, count
        return self.backing.is_allocated(offset, count, bottom)

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        await self._wait("read")
        begin = offset
        while begin < offset + len(buffer):
            stored, count = await self.co_is_allocated(begin, offset + len(buffer) - begin)
            piece = buffer[begin - offset : begin - offset + count]
            if stored:
                piece[:] = self.content[begin : begin + count]
            else:
                await self.backing.co_pread(begin, piece)
            begin += count

    async def _store(self, offset: int, length: int) -> None:
        for cluster in range(offset // self.CLUSTER, -(-(offset + length) // self.CLUSTER)):
            if cluster not in self.stored:
                begin = cluster * self.CLUSTER
                old = memoryview(bytearray(min(self.CLUSTER, self.size - begin)))
                await self.backing.co_pread(begin, old)
                if cluster not in self.stored:
                    self.content[begin : begin + len(old)] = old
                    self.stored.add(cluster)

    async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        await self._store(offset, len(buffer))
        await super().co_pwrite(offset, buffer, flags)

    async def co_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._store(offset, length)
        await super().co_write_zeroes(offset, length, flags)


def random_requests(chance: random.Random, size: int, longest: int = 3000) -> list[Request]:
    """A list of one op whose ranges do not overlap, so that their order means nothing."""
    op = chance.choice([READ, READ, WRITE, WRITE, WRITE_ZEROES])
    cuts = sorted(chance.sample(range(size + 1), 2 * chance.randrange(1, 5)))
    made = []
    for begin, end in zip(cuts[::2], cuts[1::2], strict=True):
        length = min(end - begin, chance.randrange(longest))
        if op == READ:
            made.append(read(begin, length))
        elif op == WRITE:
            made.append(write(begin, chance.randbytes(length)))
        else:
            made.append(zero(begin, length))
    return made


def play(user: User, model: bytearray, chance: random.Random, steps: int, longest: int = 3000) -> None:
    """Random requests, batches and single ones; what is read is what the model has, after every step."""
    for _ in range(steps):
        requests = random_requests(chance, len(model), longest)
        expected = []
        for request in requests:
            begin, end = request.offset, request.offset + request.length
            if request.op == WRITE:
                model[begin:end] = request.buffer
            elif request.op != READ:
                assert request.op != DISCARD
                model[begin:end] = bytes(request.length)
            expected.append(bytes(model[begin:end]))
        assert user.do(*requests) == [0] * len(requests)
        if requests[0].op == READ:
            assert [bytes(request.buffer) for request in requests] == expected
        if chance.random() < 0.1:
            assert user.do(flush()) == [0]
    everything = read(0, len(model))
    assert user.do(everything) == [0]
    assert everything.buffer == model
