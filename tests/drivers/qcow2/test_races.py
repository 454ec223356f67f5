# SPDX-License-Identifier: Apache-2.0
"""What was looked up before somebody waited may be another thing afterwards. Each of these lost data once.

First by name, with the one order of events that it takes; then by chance: users who write sectors of their own in
clusters that they share, while tables leave memory and the file is slow."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

from bottomhalf.aio import gather, sleep_ns
from bottomhalf.drivers.qcow2.layout import OFFSET_MASK
from bottomhalf.drivers.qcow2.resizing import co_truncate
from bottomhalf.host.request import COMPRESSED, READ, WRITE
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import Disk, check, disk, make

IMAGE = "disk.qcow2"
MS = 1_000_000
SMALL = 512  # bytes of a cluster, 64 to a table


def whole(host: SimHost) -> None:
    found = check(host, IMAGE)
    assert not found.corruptions and not found.leaks, found.findings[:5]


def entry_of(opened: Disk, table: int, index: int) -> int:
    return opened.node.metadata.l2[table].entries[index]


# -- by name ----------------------------------------------------------------------------------------------------------


def test_a_write_beside_one_that_gives_a_subcluster_its_content() -> None:
    """A write ends in a subcluster that is new and begins in one that is not. Meanwhile somebody writes the other half
    of that one, which needs no lock. (The first one wrote that half, too, as it had read it.)"""
    size, part = 65536, 65536 // 32
    host = SimHost(0)
    make(host, IMAGE, size=16 * size, cluster_size=size, extended_l2=True)
    with disk(host, IMAGE) as opened:
        backend = opened.backend
        opened.run(backend.co_pwrite(0, b"a" * part))
        opened.run(backend.co_pwrite(3 * part, b"d" * part))
        where = entry_of(opened, 0, 0) & OFFSET_MASK
        held = host.fault(path=IMAGE, op=WRITE, start=where + part, end=where + size, hold=True, times=1)

        async def neighbours() -> None:
            await sleep_ns(MS)
            assert held.hits == 1
            await backend.co_pwrite(0, b"X" * 512)
            await backend.co_pwrite(4 * part - 512, b"Y" * 512)
            held.release()

        async def both() -> None:
            await gather(backend.co_pwrite(1024, b"b" * (3 * part)), neighbours())

        opened.run(both())
        expected = b"X" * 512 + b"a" * 512 + b"b" * 3 * part + b"d" * (part - 1024 - 512) + b"Y" * 512
        assert opened.content()[: 4 * part] == expected
    whole(host)


def test_a_failed_write_gives_back_only_what_it_took() -> None:
    """It goes to a cluster that reads as zeroes and has a place; its table leaves memory while the data are written."""
    host = SimHost(0)
    far = 64 * SMALL  # bytes of a table
    make(host, IMAGE, size=16 * far, cluster_size=SMALL)
    with disk(host, IMAGE, **{"l2-cache-size": 2 * SMALL}) as opened:
        backend, metadata = opened.backend, opened.node.metadata
        for table in range(8):
            opened.run(backend.co_pwrite(table * far, b"a" * SMALL))
        opened.run(backend.co_write_zeroes(0, SMALL))
        opened.run(backend.co_flush())
        opened.run(backend.co_flush())
        opened.run(backend.co_pread(0, 1))
        where = entry_of(opened, 0, 0) & OFFSET_MASK
        held = host.fault(
            path=IMAGE, op=WRITE, start=where, end=where + SMALL, hold=True, errno=errno.EIO, times=1
        )

        async def write() -> None:
            with pytest.raises(OSError):
                await backend.co_pwrite(0, b"n" * 256)

        async def others() -> None:
            await sleep_ns(MS)
            for table in range(1, 6):
                await backend.co_pread(table * far, 1)
            assert held.hits == 1 and 0 not in metadata.l2, "the scene is not what it is meant to be"
            held.release()

        async def play() -> None:
            await gather(write(), others())
            await backend.co_flush()
            await backend.co_flush()
            await backend.co_pwrite(0, b"n" * 256)
            for table in range(9, 12):
                await backend.co_pwrite(table * far, b"Z" * SMALL)
            assert await backend.co_pread(0, 512) == b"n" * 256 + bytes(256)

        opened.run(play())
    whole(host)


@pytest.mark.parametrize(("flags", "data_file"), [(0, False), (0, True), (COMPRESSED, False)])
def test_the_last_cluster_of_a_disk_that_grows(flags: int, data_file: bool) -> None:
    """It has less than a cluster, and all of it is zeroed, or stored compressed. Before it comes to that the disk has
    grown, and somebody has written the rest of that cluster."""
    size = 4096
    host, end = SimHost(0), 600 * size + 512
    make(host, IMAGE, size=end, cluster_size=size, **({"data_file": "data"} if data_file else {}))
    with disk(host, IMAGE, **({"data-file": {"driver": "file", "filename": "data"}} if data_file else {})) as opened:
        backend, metadata = opened.backend, opened.node.metadata
        opened.run(backend.co_pwrite(0, b"a" * size))
        opened.run(backend.co_pwrite(600 * size, b"e" * 512))
        opened.run(backend.co_flush())
        opened.run(backend.co_flush())
        del metadata.l2[0]  # the head waits for it
        at = metadata.l1[0] & OFFSET_MASK
        held = host.fault(path=IMAGE, op=READ, start=at, end=at + size, hold=True, times=1)

        async def grow() -> None:
            await sleep_ns(1 if flags else MS)
            await backend.co_truncate(604 * size)
            await backend.co_pwrite(end, b"N" * 1024)
            held.remove()

        async def both() -> None:
            if flags:
                await gather(backend.co_pwrite(568 * size, b"q" * (32 * size + 512), flags), grow())
            else:
                await gather(backend.co_write_zeroes(100, end - 100), grow())

        opened.run(both())
        expected = (b"q" if flags else b"\0") * 512 + b"N" * 1024
        assert opened.content()[600 * size : 601 * size] == expected.ljust(size, b"\0")
    whole(host)


def test_a_table_that_was_copied_while_it_was_read() -> None:
    """A reader asks the disk for an L2 table at its old place. When the answer comes the table has been copied, written
    and dropped from memory: what he has read is not the table any more."""
    host = SimHost(0)
    far = 64 * SMALL
    make(host, IMAGE, size=16 * far, cluster_size=SMALL)
    with disk(host, IMAGE, **{"l2-cache-size": 2 * SMALL}) as opened:
        backend, metadata = opened.backend, opened.node.metadata
        for table in range(8):
            opened.run(backend.co_pwrite(table * far, b"a" * 2 * SMALL))
        made = opened.run(opened.node.snapshots.create("one", date_ns=0))
        opened.run(opened.node.snapshots.apply(made))  # the disk's tables are the snapshot's, too
        opened.run(backend.co_flush())
        opened.run(backend.co_flush())

        async def play() -> None:
            for table in (0, 1, 0):
                await backend.co_pread(table * far, 1)
            metadata.l2[0].used = metadata.l2[1].used = metadata.tick
            old = metadata.l1[0] & OFFSET_MASK
            metadata._blocks.clear()  # as the cleaner does: the allocation has to wait for one
            block = metadata.block_offset(metadata._hint // 256)
            allocation = host.fault(path=IMAGE, op=READ, start=block, end=block + SMALL, hold=True, times=1)
            load = host.fault(path=IMAGE, op=READ, start=old, end=old + SMALL, hold=True, times=1)

            async def reader() -> None:
                await sleep_ns(MS)
                assert allocation.hits == 1 and 0 not in metadata.l2, "the scene is not what it is meant to be"
                await backend.co_pread(SMALL, 2)

            async def events() -> None:
                await sleep_ns(2 * MS)
                assert load.hits == 1
                allocation.release()
                await sleep_ns(3 * MS)
                await backend.co_flush()
                await backend.co_flush()
                for table in range(2, 6):
                    await backend.co_pread(table * far, 1)
                assert metadata.l1[0] & OFFSET_MASK != old and 0 not in metadata.l2
                load.release()

            await gather(backend.co_write_zeroes(0, SMALL), reader(), events())
            assert await backend.co_pread(0, SMALL) == bytes(SMALL)
            assert metadata.l2[0].offset == metadata.l1[0] & OFFSET_MASK
            await backend.co_pwrite(SMALL, b"W" * SMALL)
            await backend.co_flush()
            await backend.co_flush()
            for table in range(2, 6):
                await backend.co_pread(table * far, 1)
            assert await backend.co_pread(SMALL, SMALL) == b"W" * SMALL

        opened.run(play())
    whole(host)


def test_a_preallocation_that_fails_leaks_nothing() -> None:
    host = SimHost(0)
    make(host, IMAGE, size=64 * SMALL, cluster_size=SMALL)
    with disk(host, IMAGE) as opened:
        opened.run(opened.backend.co_pwrite(0, b"a"))
        opened.run(opened.backend.co_flush())
        fault = host.fault(path=IMAGE, errno=errno.ENOSPC, times=1)
        with pytest.raises(OSError):
            opened.run(co_truncate(opened.node, 128 * SMALL, "full"))
        assert fault.hits == 1
        opened.run(opened.backend.co_flush())
        opened.run(opened.backend.co_pwrite(SMALL, b"b"))  # behind those that are leaked, if any are
    whole(host)


# -- by chance --------------------------------------------------------------------------------------------------------

SHAPES: list[dict[str, Any]] = [
    {"cluster_size": 65536, "extended_l2": True},
    {"cluster_size": 4096},
    {"cluster_size": 512},
    {"cluster_size": 4096, "version": 2},
    {"cluster_size": 4096, "data_file": "data"},
    {"cluster_size": 512, "refcount_bits": 1},
]
USERS = 4
STEPS = 25


class Neighbours:
    """Every user has sectors of his own, next to others'; what he wrote last is there."""

    def __init__(self, seed: int, shape: dict[str, Any]) -> None:
        chance = self.chance = random.Random(seed)
        self.seed, self.host = seed, SimHost(seed)
        cluster = shape["cluster_size"]
        self.sectors = 512 if cluster == 512 else min(8 * cluster, 1 << 16) // 512 + 3
        make(self.host, IMAGE, size=self.sectors * 512, **shape)
        options: dict[str, Any] = {"pass-discard-other": True}
        if "data_file" in shape:
            options["data-file"] = {"driver": "file", "filename": "data"}
        backed = (self.sectors - 2) * 512 * chance.randrange(2) * ("data_file" not in shape)
        if backed:
            self.host.add_file("base", b"w" * backed)
            options["backing"] = {"driver": "raw", "file": {"driver": "file", "filename": "base"}, "read-only": True}
        if cluster == 512:
            options["l2-cache-size"] = 1024
        if shape.get("version") != 2 and chance.randrange(2):
            options["discard-no-unref"] = True
        self.disk = Disk(self.host, IMAGE, **options)
        self.known = [{ord("w") if n * 512 < backed else 0} for n in range(self.sectors)]
        self.side_by_side = chance.choice((1, 3, min(cluster // 512, self.sectors // USERS)))

    def mine(self, me: int) -> list[int]:
        return [n for n in range(self.sectors) if n // self.side_by_side % USERS == me]

    async def use(self, me: int) -> None:
        chance, mine = random.Random(f"{self.seed} {me}"), self.mine(me)
        backend, metadata = self.disk.backend, self.disk.node.metadata
        for step in range(STEPS):
            first, count = chance.choice(mine), 1
            while count < chance.choice((1, 2, 4)) and first + count in mine:
                count += 1
            where, length, byte = first * 512, count * 512, 1 + me + USERS * step
            match chance.choice(("write",) * 5 + ("zero", "zero", "discard", "flush", "forget")):
                case "write":
                    await backend.co_pwrite(where, bytes([byte]) * length)
                    self.known[first : first + count] = [{byte}] * count
                case "zero":
                    await backend.co_write_zeroes(where, length, chance.choice((0, 2)))
                    self.known[first : first + count] = [{0}] * count
                case "discard":
                    await backend.co_discard(where, length)
                    self.known[first : first + count] = [known | {0} for known in self.known[first : first + count]]
                case "flush":
                    await backend.co_flush()
                case "forget":
                    metadata.drop_unused(metadata.tick + 1)
            if chance.randrange(2):
                await self.see(chance.choice(mine))

    async def see(self, sector: int) -> None:
        found = {*await self.disk.backend.co_pread(sector * 512, 512)}
        assert len(found) == 1 and found <= self.known[sector], f"sector {sector}: {found}, not {self.known[sector]}"
        self.known[sector] = found  # of what was discarded one of the two is seen, and stays

    def play(self) -> None:
        for _ in range(12):
            op, after = self.chance.choice((READ, WRITE, WRITE)), self.chance.randrange(60)
            self.host.fault(path=IMAGE, op=op, delay_ns=self.chance.randrange(1000, 3 * MS), after=after, times=2)

        async def everybody() -> None:
            await gather(*(self.use(me) for me in range(USERS)))
            for sector in range(self.sectors):
                await self.see(sector)

        self.disk.run(everybody())
        self.disk.run(self.disk.backend.co_flush())
        self.disk.close()
        whole(self.host)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_neighbours(shape: dict[str, Any]) -> None:
    for seed in range(60):
        Neighbours(seed, shape).play()


@pytest.mark.soak
@pytest.mark.hang_seconds(3600)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_neighbours(shape: dict[str, Any]) -> None:
    for seed in range(1000):
        Neighbours(seed, shape).play()
