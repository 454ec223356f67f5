# SPDX-License-Identifier: Apache-2.0
"""A load on a backend: every request once, at the right place, never too many at a time; flushes where they belong."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bottomhalf.block import BlockError, Node
from bottomhalf.block.load import BUFFER_BYTES_MAX, PIECE, Load, steps
from bottomhalf.drivers.null import NullAioNode, NullCoNode
from bottomhalf.drivers.raw import RawNode
from bottomhalf.host.linux import LinuxHost
from bottomhalf.host.request import FLUSH, READ, WRITE, Request
from tests.block.bench import Bench, bench, sim_bench

SIZE = 1 << 20


class Watched(RawNode):
    """Notes what passes, and how much is under way."""

    def __init__(self, graph: object, file: Node) -> None:
        super().__init__(graph, file=file)  # type: ignore[arg-type]
        self.seen: list[tuple[int, int]] = []  # op, offset
        self.batches: list[int] = []
        self.most = 0
        self.at_flush: list[int] = []  # requests in flight when a flush was sent
        self.beside: list[int] = []  # flushes in flight when requests were sent

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        if requests[0].op == FLUSH:
            self.at_flush.append(self.load._in_flight)
        else:
            self.batches.append(len(requests))
            self.beside.append(self.load._flushes)
            self.most = max(self.most, self.load._in_flight)
        self.seen += [(request.op, request.offset) for request in requests]
        return super().submit_batch(requests)

    load: Load


@contextmanager
def watched(seed: int) -> Iterator[tuple[Bench, Watched]]:
    with sim_bench(seed, disk=SIZE) as it:
        yield it, Watched(it.graph, it.file("disk"))


def run(it: Bench, node: Watched, **options: object) -> Load:
    load = node.load = Load(it.backend(node), **options)  # type: ignore[arg-type]
    load.run()
    assert load.done and load._in_flight == 0 and load._backend.in_flight == 0
    return load


@pytest.mark.parametrize(
    ("start", "step", "size", "expected"),
    [
        (0, 4096, 1 << 30, [0, 4096, 8192, 12288]),
        (512, 4096, 8192, [512, 4608, 512, 4608]),
        (0, 4096, 10240, [0, 4096, 8192, 2048]),
        (0, 3 * 4096, 4096, [0, 0, 0, 0]),
        (7, 0, 100, [7, 7, 7, 7]),
        (0, 10, 0, [0, 10, 20, 30]),
    ],
)
def test_steps(start: int, step: int, size: int, expected: list[int]) -> None:
    assert list(itertools.islice(steps(start, step, size), 4)) == expected


def test_every_request_once_and_never_too_many(seed: int) -> None:
    chance = random.Random(seed)
    with watched(seed) as (it, node):
        it.host.set_cached("disk", chance.choice(["never", "always"]))
        count, depth = chance.randrange(1, 400), chance.choice([1, 2, 7, 32, 64])
        op = chance.choice([READ, WRITE])
        run(it, node, op=op, count=count, depth=depth, length=512, pattern=0x5A)
        places = itertools.islice(steps(0, 512, SIZE), count)
        assert sorted(node.seen) == sorted((op, offset) for offset in places)
        assert node.most <= depth
        if op == WRITE:
            assert it.host.content("disk")[: count * 512] == b"\x5a" * (count * 512)


def test_lists_stay_lists(seed: int) -> None:
    """What came back together goes together: that is what the loop is for."""
    with watched(seed) as (it, node):
        it.host.set_cached("disk", "always")
        run(it, node, count=640, depth=64, length=512)
        assert node.batches == [64] * 10


def test_an_idle_device_gets_its_work_in_pieces() -> None:
    """While it works on the first the second is prepared."""
    with sim_bench(0) as it:
        null = NullAioNode(it.graph)
        node = Watched(it.graph, null)
        run(it, node, count=128, depth=64, length=512)
        assert node.batches == [64] + [PIECE] * 4


def test_own_offsets(seed: int) -> None:
    with watched(seed) as (it, node):
        chance = random.Random(seed)
        offsets = [chance.randrange(SIZE // 512) * 512 for _ in range(100)]
        run(it, node, count=100, depth=8, length=512, offsets=iter(offsets))
        assert sorted(offset for _, offset in node.seen) == sorted(offsets)


@pytest.mark.parametrize("drain", [True, False])
def test_flushes(seed: int, drain: bool) -> None:
    chance = random.Random(seed)
    with watched(seed) as (it, node):
        it.host.set_cached("disk", chance.choice(["never", "always"]))
        interval = chance.randrange(8, 20)
        count = chance.randrange(1, 100)
        run(it, node, op=WRITE, count=count, depth=8, length=512, flush_interval=interval, drain=drain)
        writes = 0
        flushes = []
        for op, _ in node.seen:
            if op == FLUSH:
                flushes.append(writes)
            else:
                writes += 1
        assert writes == count and flushes == list(range(interval, count + 1, interval))
        if drain:
            assert not any(node.at_flush) and not any(node.beside)


def test_a_failure_ends_it(seed: int) -> None:
    with watched(seed) as (it, node):
        it.host.set_cached("disk", "never")
        it.host.fault(path="disk", op=READ, errno=errno.EIO, after=20, times=1)
        load = Load(it.backend(node), count=1000, depth=8, length=512)
        node.load = load
        with pytest.raises(OSError, match="read of 512 bytes at ") as caught:
            load.run()
        assert caught.value.errno == errno.EIO and load._backend.in_flight == 0
        assert 20 < len(node.seen) < 1000


def test_a_failed_flush_ends_it(seed: int) -> None:
    with watched(seed) as (it, node):
        it.host.fault(path="disk", op=FLUSH, errno=errno.ENOSPC, times=1)
        node.load = Load(it.backend(node), op=WRITE, count=1000, depth=8, length=512, flush_interval=10)
        with pytest.raises(OSError, match="flush") as caught:
            node.load.run()
        assert caught.value.errno == errno.ENOSPC and len(node.seen) < 1000


def test_stopped(seed: int) -> None:
    """It ends, with everything back that was sent."""
    with watched(seed) as (it, node):
        it.host.set_cached("disk", random.Random(seed).choice(["never", "always"]))
        node.load = load = Load(it.backend(node), count=1 << 30, depth=8, length=512)
        it.context.timer(load.stop).arm_ns(it.context.now_ns() + 1_000_000)
        load.run()
        assert load.done and load._backend.in_flight == 0 and 0 < len(node.seen) < 1 << 30


def test_beyond_the_end() -> None:
    with sim_bench(0, disk=SIZE) as it:
        load = Load(it.backend(it.file("disk")), count=2, depth=1, length=4096, offset=SIZE - 512)
        with pytest.raises(OSError, match=f"the image ends at {SIZE}") as caught:
            load.run()
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"depth": 0},
        {"length": 0},
        {"op": FLUSH},
        {"flush_interval": -1},
        {"length": BUFFER_BYTES_MAX + 1},
    ],
)
def test_numbers_that_make_no_sense(wrong: dict[str, int]) -> None:
    with sim_bench(0) as it:
        backend = it.backend(NullCoNode(it.graph))
        with pytest.raises(BlockError):
            Load(backend, **{"count": 10, "depth": 4, "length": 512, **wrong})  # type: ignore[arg-type]


def test_a_depth_beyond_the_count_needs_no_memory() -> None:
    with sim_bench(0) as it:
        load = Load(it.backend(NullCoNode(it.graph)), count=2, depth=(1 << 31) - 1, length=4096)
        load.run()
        assert load.seconds >= 0


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", ["io_uring", "threads"])
def test_on_this_machine(tmp_path: Path, kind: str, direct: bool) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    with bench(LinuxHost()) as it:
        it.context.engine_kind = kind
        assert it.context.engine.name == kind
        backend = it.backend(it.file(str(path), direct=direct))
        load = Load(backend, op=WRITE, count=SIZE // 4096, depth=32, length=4096, pattern=7, flush_interval=64)
        load.run()
        assert load.seconds > 0
    assert path.read_bytes() == b"\7" * SIZE
