# SPDX-License-Identifier: Apache-2.0
"""Compressed writes: packed, counted, freed, and done by worker threads. (Crashes and failing I/O: test_crash,
test_faults.)"""

from __future__ import annotations

import errno
import random

import pytest

from bottomhalf.aio import gather
from bottomhalf.block import BlockError
from bottomhalf.drivers.compress import CompressNode
from bottomhalf.drivers.qcow2.compression import compress, decompress
from bottomhalf.drivers.qcow2.layout import ZLIB, ZSTD
from bottomhalf.drivers.qcow2.tables import Mapping
from bottomhalf.host.request import COMPRESSED
from bottomhalf.host.sim import SimHost
from tests.drivers.qcow2.bench import Disk, check, disk, make, squeezable

CLUSTER = 4096


async def squeeze(opened: Disk, offset: int, data: bytes) -> None:
    await opened.node.co_pwritev_compressed(offset, len(data), memoryview(data))


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
@pytest.mark.parametrize("length", [1, 4095, 4096])
def test_what_is_compressed_comes_out_again(kind: int, length: int) -> None:
    """Less than a cluster counts as followed by zeroes; what does not become smaller is not compressed."""
    data = b"abc" * 2000
    small = compress(memoryview(data)[:length], CLUSTER, kind)
    assert small is not None and len(small) < CLUSTER
    assert decompress(small, CLUSTER, kind) == data[:length].ljust(CLUSTER, b"\0")
    assert compress(random.Random(1).randbytes(CLUSTER), CLUSTER, kind) is None


@pytest.mark.parametrize("cluster_bits", [9, 16, 21])
@pytest.mark.parametrize("offset", [0, 1, 511, 512, 12345678901])
@pytest.mark.parametrize("length", [1, 2, 511, 512, 513])
def test_entries(cluster_bits: int, offset: int, length: int) -> None:
    mapping = Mapping(cluster_bits, False)
    where, room = mapping.squeezed(mapping.squeezed_entry(offset, length))
    assert where == offset and length <= room < length + 512


def test_an_entry_has_not_room_for_every_offset() -> None:
    mapping = Mapping(21, False)  # 49 bits
    assert mapping.squeezed_entry((1 << 49) - 100, 99)
    with pytest.raises(BlockError, match="its entry has 49 bits"):
        mapping.squeezed_entry(1 << 49, 10)


def test_several_share_a_cluster_of_the_host() -> None:
    host = SimHost(0)
    make(host, "disk.qcow2", size=64 * CLUSTER, cluster_size=CLUSTER)
    data = b"".join(bytes([n + 1]) * CLUSTER for n in range(40))
    with disk(host, "disk.qcow2") as opened:
        before = opened.node.file.size
        opened.run(squeeze(opened, 0, data))
        assert opened.node.file.size - before <= 2 * CLUSTER  # forty of some twenty bytes, and an L2 table later
        counts = [opened.run(_refcount(opened, cluster)) for cluster in range(3, 12)]
        assert max(counts) == 40
        assert opened.content() == data + bytes(24 * CLUSTER)
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks and found.compressed_clusters == 40


async def _refcount(opened: Disk, cluster: int) -> int:
    async with opened.node.metadata.lock:
        return await opened.node.metadata.refcount(cluster)


@pytest.mark.parametrize("refcount_bits", [1, 2, 16])
def test_rewriting_frees(refcount_bits: int, seed: int) -> None:
    """The same clusters, over and over, compressed and not, also two in one sector: the file does not grow for ever."""
    host, chance = SimHost(seed), random.Random(seed)
    make(host, "disk.qcow2", size=16 * CLUSTER, cluster_size=CLUSTER, refcount_bits=refcount_bits)
    model = bytearray(16 * CLUSTER)
    with disk(host, "disk.qcow2") as opened:
        for number in range(60):
            offset = chance.randrange(0, 15) * CLUSTER
            data = squeezable(offset, chance.choice((1, 2)) * CLUSTER, number)
            data = data[: len(model) - offset]
            if chance.random() < 0.7:
                opened.run(squeeze(opened, offset, data))
            else:
                opened.run(opened.backend.co_pwrite(offset, data))
            model[offset : offset + len(data)] = data
            if chance.random() < 0.3:
                opened.run(opened.backend.co_flush())
            assert opened.content() == model
        assert opened.node.file.size <= 100 * CLUSTER
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


def test_alignment() -> None:
    """Whole clusters, or the end of the disk."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=3 * CLUSTER + 512, cluster_size=CLUSTER)
    with disk(host, "disk.qcow2") as opened:
        for offset, length in ((512, CLUSTER), (0, 512), (CLUSTER, CLUSTER + 512), (3 * CLUSTER, 100)):
            with pytest.raises(OSError) as failed:
                opened.run(opened.backend.co_pwrite(offset, bytes(length), COMPRESSED))
            assert failed.value.errno == errno.EINVAL
        opened.run(squeeze(opened, 2 * CLUSTER, b"e" * (CLUSTER + 512)))
        opened.run(squeeze(opened, 0, b""))
        assert opened.content() == bytes(2 * CLUSTER) + b"e" * (CLUSTER + 512)
    assert not check(host, "disk.qcow2").leaks


def test_at_the_same_time(seed: int) -> None:
    """Several users, each with clusters of his own, compressed and plain, and readers who find old or new content."""
    host = SimHost(seed)
    make(host, "disk.qcow2", size=32 * CLUSTER, cluster_size=CLUSTER)
    model = bytearray(32 * CLUSTER)
    with disk(host, "disk.qcow2") as opened:

        async def use(me: int) -> None:
            chance = random.Random(seed * 4 + me)
            for number in range(12):
                offset = (chance.randrange(0, 8) * 4 + me) * CLUSTER
                what = chance.randrange(4)
                if what == 0:
                    assert await opened.backend.co_pread(offset, CLUSTER) == model[offset : offset + CLUSTER]
                elif what == 1:
                    await opened.backend.co_discard(offset, CLUSTER)
                    model[offset : offset + CLUSTER] = bytes(CLUSTER)
                else:
                    data = squeezable(offset, CLUSTER, number * 4 + me)
                    await opened.backend.co_pwrite(offset, data, COMPRESSED if what == 2 else 0)
                    model[offset : offset + CLUSTER] = data
                if chance.random() < 0.3:
                    await opened.backend.co_flush()

        async def everybody() -> None:
            await gather(*(use(me) for me in range(4)))

        opened.run(everybody())
        assert opened.content() == model
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


def test_a_reader_does_not_keep_what_was_written_over() -> None:
    """A cluster is being unpacked when it is discarded, and its place gets other content under the same entry."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=16 * CLUSTER, cluster_size=CLUSTER)
    with disk(host, "disk.qcow2") as opened:

        async def entry() -> int:
            table = await opened.node.metadata.l2_table(0)
            assert table is not None
            return table.entries[1]

        async def play() -> None:
            await squeeze(opened, CLUSTER, b"a" * CLUSTER)
            await opened.backend.co_flush()
            old = await entry()
            await gather(opened.backend.co_pread(CLUSTER, 10), opened.backend.co_discard(CLUSTER, CLUSTER))
            await opened.backend.co_flush()
            await opened.backend.co_flush()
            await squeeze(opened, CLUSTER, b"b" * CLUSTER)
            assert await entry() == old, "the scene is not what it is meant to be"
            assert await opened.backend.co_pread(CLUSTER, CLUSTER) == b"b" * CLUSTER

        opened.run(play())


def test_a_reader_of_two_does_not_keep_the_second_if_it_was_written_over_meanwhile() -> None:
    """He looked both up; the second one is replaced while he unpacks the first."""

    def content(seed: int) -> bytes:
        return random.Random(seed).randbytes(3000) + bytes(CLUSTER - 3000)

    host = SimHost(0)
    make(host, "disk.qcow2", size=64 * CLUSTER, cluster_size=CLUSTER)
    with disk(host, "disk.qcow2") as opened:
        metadata, backend = opened.node.metadata, opened.backend

        async def entry(index: int) -> int:
            table = await metadata.l2_table(0)
            assert table is not None
            return table.entries[index]

        async def play() -> None:
            await squeeze(opened, 0, content(1))
            metadata.packing = 0  # the second one has a cluster of the host to itself
            second = content(2)
            await squeeze(opened, CLUSTER, second)
            await backend.co_flush()
            old = await entry(1)
            found, _ = await gather(backend.co_pread(0, 2 * CLUSTER), backend.co_pwrite(CLUSTER, b"n" * CLUSTER))
            assert found[CLUSTER:] == second, "the scene is not what it is meant to be"
            await backend.co_flush()
            await backend.co_flush()
            metadata.packing = 0
            other = 8
            while await entry(other - 1) != old:  # whoever comes there
                await squeeze(opened, other * CLUSTER, content(other))
                metadata.packing = 0
                other += 1
            assert await backend.co_pread((other - 1) * CLUSTER, CLUSTER) == content(other - 1)

        opened.run(play())


def test_the_loop_goes_on_while_threads_compress() -> None:
    """A cluster that is being compressed stops nobody: a read that begins later ends earlier."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=64 * CLUSTER, cluster_size=CLUSTER)
    with disk(host, "disk.qcow2") as opened:
        ended: list[str] = []

        async def write() -> None:
            await squeeze(opened, 0, bytes(20 * CLUSTER))
            ended.append("write")

        async def read() -> None:
            await opened.backend.co_pread(40 * CLUSTER, CLUSTER)
            ended.append("read")

        async def both() -> None:
            await gather(write(), read())

        opened.run(both())
        assert ended == ["read", "write"]


def test_the_filter_compresses(seed: int) -> None:
    """Whatever is written through it, at whatever offset."""
    host, chance = SimHost(seed), random.Random(seed)
    make(host, "disk.qcow2", size=20 * CLUSTER + 512, cluster_size=CLUSTER)
    model = bytearray(20 * CLUSTER + 512)
    with disk(host, "disk.qcow2") as opened:
        node = CompressNode(opened.graph, file=opened.node)
        node.monitor_owned = True
        opened.backend.remove()
        opened.backend.insert(node)
        for number in range(15):
            offset = chance.randrange(0, len(model))
            data = bytes([number + 1]) * min(chance.choice((1, 512, 5000)), len(model) - offset)
            opened.run(opened.backend.co_pwrite(offset, data))
            model[offset : offset + len(data)] = data
        assert opened.content() == model
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings
    assert found.compressed_clusters == found.allocated_clusters
