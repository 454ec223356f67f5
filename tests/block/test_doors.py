# SPDX-License-Identifier: Apache-2.0
"""The three doors of a driver (list, plain call, coroutine) and the bridges between them."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from bottomhalf.aio import sleep_ns
from bottomhalf.block import Graph, Node
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.request import Request
from bottomhalf.host.sim import SimHost
from tests.block.bench import bench, discard, flush, read, sim_bench, write, zero

SIZE = 4096


class Pattern(Node):
    """The smallest driver in coroutine form: every byte is its offset. Odd offsets take their time."""

    driver = "pattern"
    is_protocol = True

    def __init__(self, graph: Graph, name: str = "") -> None:
        super().__init__(graph, name)
        self.size = SIZE
        self.reads: list[tuple[str, int]] = []

    def open_size(self) -> int:
        return SIZE

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        self.reads.append(("coroutine", offset))
        if offset % 2:
            await sleep_ns(1000 - offset % 999)
        if offset == 666:
            raise OSError(errno.EIO, "on purpose")
        if offset == 667:
            raise KeyError("a mistake of the driver")
        buffer[:] = bytes((offset + n) % 256 for n in range(len(buffer)))


class Cached(Pattern):
    """With the plain door for what is at hand: the first half."""

    driver = "cached"

    def try_pread(self, request: Request) -> bool:
        if request.offset >= SIZE // 2:
            return False
        self.reads.append(("plain", request.offset))
        request.buffer[:] = bytes((request.offset + n) % 256 for n in range(request.length))
        request.result = 0
        return True


class Lists(Node):
    """A filter in list form."""

    driver = "lists"

    def __init__(self, graph: Graph, file: Node) -> None:
        super().__init__(graph)
        self.attach(file, "file")
        self.size = file.size
        self.batches: list[int] = []

    def open_size(self) -> int:
        return self.children[0].node.size

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        self.batches.append(len(requests))
        return self.children[0].node.submit_batch(requests)


class Plodding(Lists):
    """A filter in coroutine form, over lists, over coroutines."""

    driver = "plodding"

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        return Node.submit_batch(self, requests)

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        await self.children[0].node.co_pread(offset, buffer)


def expected(request: Request) -> bytes:
    return bytes((request.offset + n) % 256 for n in range(request.length))


def test_a_list_enters_one_coroutine_per_request(seed: int) -> None:
    with sim_bench(seed) as it:
        user = it.user(Pattern(it.graph))
        requests = [read(offset, 16) for offset in (0, 1, 2, 3, 5)]
        assert user.submit(*requests) == [requests[1], requests[3], requests[4]]
        user.wait()
        assert [bytes(request.buffer) for request in requests] == [expected(request) for request in requests]
        assert user.told[2:] == [requests[4], requests[3], requests[1]]  # as they end


def test_the_plain_door_comes_first(seed: int) -> None:
    with sim_bench(seed) as it:
        node = Cached(it.graph)
        user = it.user(node)
        requests = [read(7, 16), read(SIZE // 2, 16), read(9, 1), read(SIZE - 1, 1)]
        assert user.do(*requests) == [0] * 4
        assert node.reads == [("plain", 7), ("plain", 9), ("coroutine", SIZE // 2), ("coroutine", SIZE - 1)]
        assert [bytes(request.buffer) for request in requests] == [expected(request) for request in requests]


def test_towers_of_mixed_forms(seed: int) -> None:
    with sim_bench(seed) as it:
        bottom = Cached(it.graph)
        tower: Any = bottom
        for kind in (Lists, Plodding, Plodding, Lists, Plodding):
            tower = kind(it.graph, tower)
        user = it.user(RawNode(it.graph, file=tower))
        requests = [read(offset, 10) for offset in (0, SIZE // 2 + 1, 3, SIZE - 10)]
        assert user.do(*requests) == [0] * 4
        assert [bytes(request.buffer) for request in requests] == [expected(request) for request in requests]


def test_what_a_driver_does_not_define(seed: int) -> None:
    with sim_bench(seed) as it:
        user = it.user(Pattern(it.graph))
        for request in (write(0, b"x"), zero(0, 512)):
            assert user.do(request) == [-errno.ENOTSUP]
        for request in (flush(), discard(0, 512)):  # nothing to make durable, and a hint
            assert user.do(request) == [0]


def test_errors_of_one_request_are_its_own(seed: int) -> None:
    with sim_bench(seed) as it:
        user = it.user(Pattern(it.graph))
        assert user.do(read(0, 1), read(666, 1), read(1, 1)) == [0, -errno.EIO, 0]


@pytest.mark.parametrize("inside", [False, True])
def test_a_mistake_of_the_driver_is_heard_and_nobody_waits_for_ever(seed: int, inside: bool) -> None:
    heard: list[Exception] = []
    with bench(SimHost(seed)) as it:
        it.context.exception_handler = lambda context, error, where: heard.append(error)
        user = it.user(Pattern(it.graph))

        async def ask() -> None:
            with pytest.raises(OSError):
                await user.backend.co_pread(667, 1)

        if inside:
            it.context.run(ask())
        else:
            assert user.do(read(667, 1), read(5, 1)) == [-errno.EIO, 0]
        it.context.poll(False)
        with it.graph.drained(user.backend.node):
            pass
        assert [type(error) for error in heard] == [KeyError]


def test_submitting_from_a_coroutine(seed: int) -> None:
    """A coroutine that submits a list to a driver in coroutine form: nothing runs until it suspends."""
    with sim_bench(seed) as it:
        node = Pattern(it.graph)
        user = it.user(node)
        requests = [read(0, 4), read(2, 4)]
        order: list[str] = []

        async def ask() -> None:
            assert user.submit(*requests) == requests
            order.append(f"submitted, {len(node.reads)} reads")
            order.append(f"data {bytes(await user.backend.co_pread(4, 2))!r}")

        it.context.run(ask())
        user.wait()
        assert order == ["submitted, 0 reads", "data b'\\x04\\x05'"]
        assert [bytes(request.buffer) for request in requests] == [expected(request) for request in requests]


def test_a_mistake_in_list_form_does_not_hang_the_next_drain(seed: int) -> None:
    class Broken(Lists):
        broken = True

        def submit_batch(self, requests: list[Request]) -> list[Request]:
            if self.broken:
                raise KeyError("a mistake of the driver")
            return super().submit_batch(requests)

    with sim_bench(seed) as it:
        node = Broken(it.graph, Pattern(it.graph))
        queue, user = it.backend(node).queue(lambda _: None), it.user(node)
        request = read(0, 1)
        request.owner = queue
        with pytest.raises(KeyError):
            queue.submit([request])
        with it.graph.drained(node):
            queue.submit([request])
        with pytest.raises(KeyError):
            it.context.poll(False)
        node.broken = False
        with it.graph.drained(node):
            user.submit(read(0, 1))
        user.wait()
        assert queue.backend.in_flight == 0
