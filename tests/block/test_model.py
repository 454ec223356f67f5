# SPDX-License-Identifier: Apache-2.0
"""Whatever is asked, in batches, in coroutines or in plain code: the bytes are those of a bytearray."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bottomhalf.block import Node
from bottomhalf.drivers.null import NullAioNode, NullCoNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.request import DISCARD, FLUSH, FUA, MAY_UNMAP, READ, WRITE, WRITE_ZEROES, Request
from bottomhalf.host.sim import SimHost, files
from tests.block.bench import Bench, User, bench

SIZE = 32768
FILE_SIZE = 65536
WINDOWS = [(0, None), (0, SIZE), (512, SIZE), (4096, SIZE), (100, SIZE), (FILE_SIZE - SIZE, None)]

part = st.tuples(st.integers(0, SIZE), st.integers(0, 9000), st.integers(1, 255), st.sampled_from([0, FUA, MAY_UNMAP]))
step = st.tuples(
    st.sampled_from([READ, READ, WRITE, WRITE, FLUSH, DISCARD, WRITE_ZEROES]),
    st.sampled_from(["batch", "coroutine", "plain"]),
    st.lists(part, min_size=1, max_size=6),
)


class Model:
    """The bytes that the disk should have, and what a request should do to them."""

    def __init__(self, content: bytes, alignment: int, phase: int, unmap: bool) -> None:
        self.content = bytearray(content)
        self.alignment = alignment
        self.phase = phase  # of the window's first byte in the file
        self.unmap = unmap

    def apply(self, request: Request) -> None:
        start, end = request.offset, request.offset + request.length
        if request.op == WRITE:
            self.content[start:end] = request.buffer
        elif request.op == WRITE_ZEROES:
            self.content[start:end] = bytes(request.length)
        elif request.op == DISCARD and self.unmap:
            first = -(-(start + self.phase) // self.alignment) * self.alignment - self.phase
            last = (end + self.phase) // self.alignment * self.alignment - self.phase
            if first < last:
                self.content[first:last] = bytes(last - first)


def requests_of(op: int, parts: list[tuple[int, int, int, int]], size: int) -> list[Request]:
    """Requests that lie within the disk and do not overlap, so that their order means nothing."""
    made: list[Request] = []
    for offset, length, fill, flags in parts:
        length = min(length, size - offset)
        if any(offset < r.offset + r.length and r.offset < offset + length for r in made) and op != READ:
            continue
        if length < 0:
            continue
        buffer = None
        if op in (READ, WRITE):
            buffer = memoryview(bytearray(bytes([fill]) * length))
        made.append(Request(op, *((0, 0) if op == FLUSH else (offset, length)), buffer, flags if op != READ else 0))
    return made


def play(bench: Bench, node: Node, steps: list[Any], model: Model) -> None:
    user = bench.user(node)
    for op, way, parts in steps:
        requests = requests_of(op, parts, node.size)
        if not requests:
            continue
        expected = []  # noted now: layers map a request's offset in place
        for request in requests:
            model.apply(request)
            expected.append(bytes(model.content[request.offset : request.offset + request.length]))
        if way == "batch":
            assert user.do(*requests) == [0] * len(requests)
        else:
            for request in requests:
                arguments = (request.op, request.offset, request.length, request.buffer, request.flags)
                if way == "plain":
                    user.backend.request(*arguments)
                else:
                    bench.context.run(user.backend.co_request(*arguments))
        if op == READ:
            assert [bytes(request.buffer) for request in requests] == expected
        assert user.backend.in_flight == 0
    everything = bench.context.run(user.backend.co_pread(0, node.size))
    assert everything == model.content


@pytest.mark.parametrize("alignment", [1, 512, 4096])
@given(
    seed=st.integers(0, 10_000), window=st.sampled_from(WINDOWS), unmap=st.booleans(), steps=st.lists(step, max_size=8)
)
def test_raw_over_file(alignment: int, seed: int, window: tuple[int, int | None], unmap: bool, steps: Any) -> None:
    host = SimHost(seed)
    content = host.random_bytes(FILE_SIZE)
    host.add_file("disk", content)
    usual, files.DIRECT_ALIGNMENT = files.DIRECT_ALIGNMENT, alignment
    try:
        with bench(host) as it:
            file = it.file("disk", direct=alignment > 1, unmap=True)
            assert file.request_alignment == alignment
            offset, size = window
            raw = RawNode(it.graph, file=file, offset=offset, size=size, unmap=unmap)
            end = offset + raw.size
            model = Model(content[offset:end], alignment, offset, unmap)
            play(it, raw, steps, model)
            assert host.content("disk") == content[:offset] + bytes(model.content) + content[end:]
    finally:
        files.DIRECT_ALIGNMENT = usual


class RamNode(Node):
    """A driver in coroutine form that keeps its bytes, some of them only after a while."""

    driver = "ram"
    is_protocol = True

    def __init__(self, graph: Any) -> None:
        super().__init__(graph, unmap=True)
        self.bytes = bytearray(SIZE)
        self.size = SIZE

    def open_size(self) -> int:
        return SIZE

    async def _pass_time(self, offset: int) -> None:
        from bottomhalf.aio import sleep_ns

        if offset % 3:
            await sleep_ns(offset)

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        await self._pass_time(offset)
        buffer[:] = self.bytes[offset : offset + len(buffer)]

    async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        await self._pass_time(offset)
        self.bytes[offset : offset + len(buffer)] = buffer

    async def co_flush(self) -> None:
        await self._pass_time(1)

    async def co_discard(self, offset: int, length: int) -> None:
        self.bytes[offset : offset + length] = bytes(length)

    async def co_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self.write_zero_bytes(offset, length, flags)


@given(seed=st.integers(0, 10_000), steps=st.lists(step, max_size=8))
def test_a_driver_in_coroutine_form(seed: int, steps: Any) -> None:
    with bench(SimHost(seed)) as it:
        node = RamNode(it.graph)
        play(it, RawNode(it.graph, file=node, unmap=True), steps, Model(bytes(SIZE), 1, 0, True))


@pytest.mark.parametrize("kind", [NullCoNode, NullAioNode])
@pytest.mark.parametrize("latency_ns", [0, 1000])
@given(seed=st.integers(0, 10_000), steps=st.lists(step, max_size=8))
def test_null_answers_everything(kind: Any, latency_ns: int, seed: int, steps: Any) -> None:
    with bench(SimHost(seed)) as it:
        node = kind(it.graph, size=SIZE, latency_ns=latency_ns, read_zeroes=True)
        user = User(it.backend(RawNode(it.graph, file=node)))
        for op, way, parts in steps:
            requests = requests_of(op, parts, SIZE)
            if way == "batch" and requests:
                assert user.do(*requests) == [0] * len(requests)
            else:
                for r in requests:
                    user.backend.request(r.op, r.offset, r.length, r.buffer, r.flags)
            if op == READ:
                assert not any(any(request.buffer) for request in requests)
