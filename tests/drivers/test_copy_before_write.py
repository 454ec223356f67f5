# SPDX-License-Identifier: Apache-2.0
"""copy-before-write and snapshot-access: the disk as it was, whatever is written meanwhile."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

from bottomhalf.aio import sleep_ns, wait_while
from bottomhalf.block import BlockError
from bottomhalf.block.bitmap import DirtyBitmap
from bottomhalf.block.dirty import add_bitmap
from bottomhalf.drivers.copy_before_write import CopyBeforeWriteNode
from bottomhalf.drivers.snapshot_access import SnapshotAccessNode
from bottomhalf.host.protocol import DATA, PERM_CONSISTENT_READ, ZERO
from tests.block.bench import Bench, User, discard, read, sim_bench, write, zero
from tests.drivers.helpers import Overlay, Ram, opened, random_requests
from tests.drivers.test_filters import content

CLUSTER = 65536
SIZE = 6 * CLUSTER + 1000


class Setup:
    def __init__(self, it: Bench, seed: int, **options: Any) -> None:
        self.old = content(seed, SIZE)
        self.disk = Ram(it.graph, self.old)
        self.target = Ram(it.graph, bytes(SIZE))
        self.node = CopyBeforeWriteNode(it.graph, "cbw", file=self.disk, target=self.target, unmap=True, **options)
        self.user = it.user(self.node)
        self.snapshot = it.user(SnapshotAccessNode(it.graph, file=self.node, unmap=True), held=PERM_CONSISTENT_READ | 2)

    def look(self, offset: int = 0, length: int = SIZE) -> bytes | int:
        request = read(offset, length)
        (result,) = self.snapshot.do(request)
        return bytes(request.buffer) if result == 0 else result


def test_the_snapshot_does_not_change(seed: int) -> None:
    chance = random.Random(seed)
    with sim_bench(seed) as it:
        setup = Setup(it, seed)
        model = bytearray(setup.old)
        for _ in range(15):
            looks = []
            requests = random_requests(chance, SIZE, 100_000)
            for request in requests:
                begin, end = request.offset, request.offset + request.length
                if request.op == 1:
                    model[begin:end] = request.buffer
                elif request.op == 4:
                    model[begin:end] = bytes(end - begin)
            for request in requests:
                setup.user.submit(request)
                begin = chance.randrange(SIZE)
                look = read(begin, chance.randrange(min(SIZE - begin, 90_000)))
                looks.append((begin, look))
                setup.snapshot.submit(look)
                if chance.random() < 0.3:
                    it.context.poll(False)
            setup.user.wait()
            setup.snapshot.wait()
            for begin, look in looks:
                assert look.result == 0
                assert look.buffer == setup.old[begin : begin + look.length]
        assert setup.look() == setup.old
        assert setup.disk.content == model
        assert setup.user.do(discard(0, SIZE)) == [0]
        assert setup.look() == setup.old, "discards destroy as well"


def test_writes_to_what_is_saved_pass_as_a_list(seed: int) -> None:
    with sim_bench(seed, disk=SIZE) as it:
        it.host.set_cached("disk", "always")
        options = {
            "driver": "copy-before-write",
            "file": {"driver": "file", "filename": "disk"},
            "target": {"driver": "null-co", "size": SIZE},
        }
        user = it.user(opened(it, options))
        user.do(*(write(n * CLUSTER, b"x") for n in range(7)))
        assert user.submit(*(write(n * 512, b"y" * 512) for n in range(32))) == []


def test_only_what_the_bitmap_says(seed: int) -> None:
    with sim_bench(seed) as it:
        bitmap = DirtyBitmap(SIZE, 512)
        bitmap.set(CLUSTER + 5, 10)
        setup = Setup(it, seed, bitmap=bitmap)
        assert setup.user.do(write(0, b"x"), write(2 * CLUSTER - 1, b"yy")) == [0, 0]
        assert setup.look(CLUSTER, CLUSTER) == setup.old[CLUSTER : 2 * CLUSTER]
        assert setup.look(0, 1) == setup.look(CLUSTER, CLUSTER + 1) == -errno.EACCES
        assert not any(setup.target.content[:CLUSTER]) and not any(setup.target.content[2 * CLUSTER :])


@pytest.mark.parametrize("where", ["read", "write"])
def test_break_guest_write(seed: int, where: str) -> None:
    with sim_bench(seed) as it:
        setup = Setup(it, seed)
        (setup.disk if where == "read" else setup.target).fail[where] = errno.ENOSPC
        assert setup.user.do(write(100, b"x")) == [-errno.ENOSPC]
        assert setup.disk.content == setup.old
        setup.disk.fail.clear()
        assert setup.look() == setup.old
        setup.target.fail.clear()
        assert setup.user.do(write(100, b"x")) == [0], "it is tried again"
        assert setup.look() == setup.old


def test_break_snapshot(seed: int) -> None:
    with sim_bench(seed) as it:
        setup = Setup(it, seed, break_snapshot=True)
        assert setup.user.do(write(0, b"x")) == [0]
        assert setup.look() == setup.old
        setup.target.fail["write"] = errno.ENOSPC
        assert setup.user.do(write(CLUSTER, b"x"), write(2 * CLUSTER, b"y")) == [0, 0]
        assert setup.look(0, 10) == -errno.EACCES, "also what had been saved"
        assert setup.node.snapshot_error == errno.ENOSPC
        assert setup.user.do(write(3 * CLUSTER, b"z")) == [0]


@pytest.mark.parametrize("break_snapshot", [False, True])
def test_a_copy_that_fails_in_time(seed: int, break_snapshot: bool) -> None:
    with sim_bench(seed) as it:
        setup = Setup(it, seed, break_snapshot=break_snapshot, timeout_ns=10**9)
        setup.target.fail["write"] = errno.ENOSPC
        assert setup.user.do(write(0, b"x")) == [0 if break_snapshot else -errno.ENOSPC]


@pytest.mark.parametrize("break_snapshot", [False, True])
def test_timeout(seed: int, break_snapshot: bool) -> None:
    with sim_bench(seed) as it:
        setup = Setup(it, seed, break_snapshot=break_snapshot, timeout_ns=10**9)
        setup.target.delay_ns = 10**12
        begin_ns = it.context.now_ns()
        expected = 0 if break_snapshot else -errno.ETIMEDOUT
        assert setup.user.do(write(0, b"x")) == [expected]
        assert it.context.now_ns() - begin_ns <= 2 * 10**9
        if not break_snapshot:
            assert setup.node.in_flight == 1, "the copy goes on by itself"
            setup.target.delay_ns = 0
            with it.graph.drained(setup.node):
                assert setup.node.in_flight == 0
            assert setup.user.do(write(0, b"x")) == [0]
            assert setup.look() == setup.old
        else:
            assert setup.look(0, 1) == -errno.EACCES
            wait_while(it.context, lambda: setup.node.in_flight, what="the copy that was left behind")


def test_what_was_read_need_not_be_saved(seed: int) -> None:
    with sim_bench(seed) as it:
        setup = Setup(it, seed)
        assert setup.snapshot.do(discard(100, 2 * CLUSTER)) == [0]
        assert setup.look(CLUSTER, 1) == -errno.EACCES
        assert setup.look(0, CLUSTER) == setup.old[:CLUSTER], "not wholly within the discard"
        assert setup.user.do(write(CLUSTER, b"x")) == [0]
        assert not any(setup.target.content)
        assert setup.snapshot.do(discard(SIZE - 1000, 1000)) == [0]
        assert setup.look(SIZE - 1, 1) == -errno.EACCES, "the last cluster is short"


def test_status(seed: int) -> None:
    with sim_bench(seed) as it:
        setup = Setup(it, seed)
        setup.user.do(write(0, b"x"))
        backend = setup.snapshot.backend
        assert it.context.run(backend.co_block_status(0, SIZE)) == (1, CLUSTER)
        assert it.context.run(backend.co_block_status(CLUSTER, SIZE - CLUSTER)) == (1, SIZE - CLUSTER)


def test_status_of_what_is_zeroed_meanwhile(seed: int) -> None:
    """The disk is asked for it, and answers when it has been zeroed, unless that waits."""

    class Slow(Ram):
        driver = "slow"

        def block_status(self, offset: int, length: int) -> tuple[int, int] | None:
            return None

        async def co_block_status(self, offset: int, length: int) -> tuple[int, int]:
            await sleep_ns(10**9)
            return (DATA if any(self.content[offset : offset + length]) else ZERO), length

    with sim_bench(seed) as it:
        disk = Slow(it.graph, b"x" * SIZE)
        node = CopyBeforeWriteNode(it.graph, file=disk, target=Ram(it.graph, bytes(SIZE)), unmap=True)
        user, snapshot = it.user(node), it.backend(SnapshotAccessNode(it.graph, file=node), held=PERM_CONSISTENT_READ)
        asking = it.context.enter(snapshot.co_block_status(0, SIZE))
        user.submit(zero(0, SIZE))
        wait_while(it.context, lambda: not asking.done, what="the status")
        assert asking.result() == (DATA, SIZE)
        user.wait()


def test_a_disk_that_grows_before_the_filter_is_put_in(seed: int) -> None:
    with sim_bench(seed) as it:
        disk, target = Ram(it.graph, content(seed, SIZE)), Ram(it.graph, bytes(SIZE + CLUSTER))
        node = CopyBeforeWriteNode(it.graph, file=disk, target=target)
        it.context.run(disk.co_truncate(SIZE + CLUSTER))
        old = bytes(disk.content)
        user = it.user(node)
        assert user.do(write(SIZE, b"x"), write(SIZE + CLUSTER - 1, b"x"), write(0, b"x")) == [0] * 3
        snapshot = it.user(SnapshotAccessNode(it.graph, file=node), held=PERM_CONSISTENT_READ)
        request = read(0, SIZE + CLUSTER)
        assert snapshot.do(request) == [0] and request.buffer == old


def test_another_disk_breaks_the_snapshot(seed: int) -> None:
    """Nothing of it was saved; its user goes on."""
    with sim_bench(seed) as it:
        setup = Setup(it, seed)
        assert setup.user.do(write(0, b"x")) == [0]
        it.graph.replace_child(setup.node.edge, Ram(it.graph, bytes(2 * SIZE)))
        assert setup.user.do(write(2 * SIZE - 1, b"x")) == [0]
        assert setup.look(0, 1) == -errno.EACCES


def test_fleecing(seed: int) -> None:
    """The target is an overlay whose backing image is the disk itself: what is not saved is read from there."""
    with sim_bench(seed) as it:
        old = content(seed, SIZE)
        disk = Ram(it.graph, old)
        target = Overlay(it.graph, disk)
        user = it.user(CopyBeforeWriteNode(it.graph, file=disk, target=target))
        reader = it.user(target, held=PERM_CONSISTENT_READ)
        assert user.do(write(10, b"new"), write(SIZE - 5, b"new")) == [0, 0]
        everything = read(0, SIZE)
        assert reader.do(everything) == [0]
        assert everything.buffer == old


def test_above_other_nodes_and_writing(seed: int) -> None:
    with sim_bench(seed) as it:
        user = User(it.backend(SnapshotAccessNode(it.graph, file=Ram(it.graph, bytes(100)))))
        assert user.do(read(0, 1)) == [-errno.ENOTSUP]
        setup = Setup(it, seed)
        assert setup.snapshot.do(write(0, b"x")) == [-errno.ENOTSUP]
        with pytest.raises(OSError, match="cannot be resized"):
            it.context.run(setup.node.co_truncate(0))


def test_options() -> None:
    with sim_bench(1) as it:
        disk, other = Ram(it.graph, bytes(1 << 20), "z"), Ram(it.graph, bytes(1 << 21), "y")
        options = {"driver": "copy-before-write", "file": "z", "target": "y"}
        add_bitmap(other, "c")
        for more, text in (
            ({"min-cluster-size": 3}, "min-cluster-size needs to be a power of 2"),
            ({"min-cluster-size": 2**63}, "min-cluster-size too large: 9223372036854775808 > "),
            ({"min-cluster-size": 2**62}, "min-cluster-size too large"),
            ({"bitmap": {"node": "z", "name": "b"}}, "Dirty bitmap 'b' not found"),
            ({"bitmap": {"node": "zz", "name": "b"}}, "Node 'zz' not found"),
            ({"bitmap": {"node": "y", "name": "c"}}, "Failed to merge bitmap 'c' to internal copy-bitmap: Bitmaps are"),
        ):
            with pytest.raises(BlockError, match=text):
                opened(it, options | more)
        bitmap = add_bitmap(disk, "b")
        bitmap.set(0, 1)
        for granularity, name, text in (
            (3, "d", "Granularity must be power of 2 and at least 512"),
            (512, "b", "Bitmap already exists: b"),
            (512, "", "Bitmap name cannot be empty"),
            (512, "x" * 1024, "Bitmap name too long"),
        ):
            with pytest.raises(BlockError, match=text):
                add_bitmap(disk, name, granularity)
        node = opened(
            it,
            options
            | {
                "bitmap": {"node": "z", "name": "b"},
                "on-cbw-error": "break-snapshot",
                "cbw-timeout": 5,
                "min-cluster-size": 1 << 17,
            },
        )
        assert isinstance(node, CopyBeforeWriteNode)
        assert (node.break_snapshot, node.timeout_ns) == (True, 5 * 10**9)
        it.graph.release(node)


def test_a_bitmap_beside_a_set(seed: int) -> None:
    chance = random.Random(seed)
    size, granularity = chance.randrange(1, 100_000), chance.choice([512, 1024, 4096])
    bitmap = DirtyBitmap(size, granularity, full=seed % 2 == 0)
    bits = set(range(-(-size // granularity))) if seed % 2 == 0 else set()
    for _ in range(200):
        offset = chance.randrange(size)
        length = chance.randrange(size - offset + 1)
        touched = range(offset // granularity, -(-(offset + length) // granularity)) if length else range(0)
        match chance.randrange(5):
            case 0:
                bitmap.set(offset, length)
                bits |= set(touched)
            case 1:
                bitmap.reset(offset, length)
                whole = {bit for bit in touched if bit * granularity >= offset}
                bits -= {bit for bit in whole if min((bit + 1) * granularity, size) <= offset + length}
            case 2:
                other = DirtyBitmap(size, 2048)
                other.set(offset, length)
                bitmap.merge(other)
                for begin, end in other.dirty_ranges(0, size):
                    bits |= set(range(begin // granularity, -(-end // granularity)))
            case 3:
                size = chance.randrange(1, 100_000)
                bits = {bit for bit in bits if bit < -(-size // granularity)}
                bitmap.truncate(size)
                continue
        assert bitmap.any(offset, length) == any(bit in bits for bit in touched)
        assert bitmap.all(offset, length) == all(bit in bits for bit in touched)
        assert bitmap.count == sum(min((bit + 1) * granularity, size) - bit * granularity for bit in bits)
        found: set[int] = set()
        for begin, end in bitmap.dirty_ranges(0, size):
            found |= set(range(begin // granularity, -(-end // granularity)))
        assert found == bits
        if length:
            dirty, count = bitmap.run(offset, length)
            assert dirty == (offset // granularity in bits) and 0 < count <= length
            assert all((place // granularity in bits) == dirty for place in range(offset, offset + count))
            assert count == length or ((offset + count) // granularity in bits) != dirty
