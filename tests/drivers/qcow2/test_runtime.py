# SPDX-License-Identifier: Apache-2.0
"""The options of a node: caches that stay within their size, discards, lazy refcounts; also by a reopen."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bottomhalf.block import BlockError
from bottomhalf.drivers.qcow2 import layout
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.runtime import CHANGEABLE, Settings
from bottomhalf.drivers.registry import reopen_nodes
from bottomhalf.host.sim import SimHost
from bottomhalf.qapi.block import BlockdevOptions, BlockdevOptionsQcow2
from bottomhalf.qapi.visit import from_json
from tests.drivers.qcow2.bench import Disk, Model, carry_out, check, disk, make, random_steps, replace

CLUSTER = 512
TABLE_SPAN = CLUSTER * CLUSTER // 8  # bytes of the guest's that a table maps
TABLES = 40
SIZE = TABLES * TABLE_SPAN


def settings(header: Header, **given: Any) -> Settings:
    named = {name.replace("_", "-"): value for name, value in given.items()}
    options = from_json(BlockdevOptions, {"driver": "qcow2", "file": "f", **named})
    assert isinstance(options.branch, BlockdevOptionsQcow2)
    return Settings.of(options.branch, header, unmap=False)


def test_defaults() -> None:
    """L2 tables: what the disk needs, 32 MiB at most, two at least. Refcounts: four blocks."""
    small = Header(size=1 << 30, cluster_bits=16)
    assert (settings(small).l2_tables, settings(small).refcount_blocks) == (2, 4)
    large = Header(size=1 << 40, cluster_bits=16)
    assert (settings(large).l2_tables, settings(large).refcount_blocks) == (512, 4)
    assert settings(large).clean_interval_s == 600
    assert settings(large, l2_cache_size=256 << 20).l2_tables == 2048  # no more than is needed
    assert settings(large, l2_cache_size=1).l2_tables == 2
    assert settings(large, refcount_cache_size=1 << 20).refcount_blocks == 16


@pytest.mark.parametrize("given, tables, blocks", [
    ({"cache_size": 1 << 20}, 12, 4),
    ({"cache_size": 1 << 10}, 2, 4),
    ({"cache_size": 1 << 30}, 2048, 14336),
    ({"cache_size": 1 << 20, "l2_cache_size": 1 << 19}, 8, 8),
    ({"cache_size": 1 << 20, "refcount_cache_size": 1 << 19}, 8, 8),
])
def test_cache_size_is_divided(given: dict[str, int], tables: int, blocks: int) -> None:
    """The disk needs 2,048 tables. Those come first, but four blocks of refcounts before them."""
    found = settings(Header(size=1 << 40, cluster_bits=16), **given)
    assert (found.l2_tables, found.refcount_blocks) == (tables, blocks)


@pytest.mark.parametrize("given, text", [
    ({"cache_size": 1, "l2_cache_size": 1, "refcount_cache_size": 1},
     "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"),
    ({"cache_size": 1, "l2_cache_size": 2}, "l2-cache-size may not exceed cache-size"),
    ({"cache_size": 1, "refcount_cache_size": 2}, "refcount-cache-size may not exceed cache-size"),
    ({"l2_cache_entry_size": 5000},
     r"L2 cache entry size must be a power of two between 512 and the cluster size \(65536\)"),
    ({"l2_cache_entry_size": 256}, "L2 cache entry size must be a power of two"),
    ({"l2_cache_entry_size": 1 << 17}, "L2 cache entry size must be a power of two"),
    ({"refcount_cache_size": 1 << 50}, "Refcount cache size too big"),
    ({"cache_clean_interval": 1 << 33}, "Cache clean interval too big"),
    ({"cache_size": -1}, "Value '-1' is out of range for parameter 'cache-size'"),
])
def test_what_cannot_be(given: dict[str, int], text: str) -> None:
    with pytest.raises(BlockError, match=text):
        settings(Header(size=1 << 40, cluster_bits=16), **given)


def test_version_2_cannot_everything() -> None:
    old = Header(size=1 << 20, cluster_bits=16, version=2)
    with pytest.raises(BlockError, match=r"Lazy refcounts require a qcow2 image with at least qemu 1\.1 compat"):
        settings(old, lazy_refcounts=True)
    with pytest.raises(BlockError, match="discard-no-unref is only supported since qcow2 version 3"):
        settings(old, discard_no_unref=True)


def full(host: SimHost) -> bytes:
    """A disk with data below each L2 table."""
    make(host, "disk.qcow2", size=SIZE, cluster_size=CLUSTER)
    with disk(host, "disk.qcow2") as opened:
        for n in range(TABLES):
            opened.run(opened.backend.co_pwrite(n * TABLE_SPAN, bytes([n + 1]) * CLUSTER))
        return opened.content()


def test_memory_is_bounded(seed: int) -> None:
    """However many tables are needed: reads never go beyond the size; writes by one table until they are committed."""
    host, chance = SimHost(seed), random.Random(seed)
    model = bytearray(full(host))
    options = {"l2-cache-size": 5 * CLUSTER, "refcount-cache-size": 4 * CLUSTER}
    with disk(host, "disk.qcow2", **options) as opened:
        metadata = opened.node.metadata
        for number in range(200):
            at = chance.randrange(0, SIZE // CLUSTER) * CLUSTER
            if chance.random() < 0.5:
                assert opened.run(opened.backend.co_pread(at, CLUSTER)) == model[at : at + CLUSTER]
            else:
                data = bytes([number % 255 + 1]) * CLUSTER
                opened.run(opened.backend.co_pwrite(at, data))
                model[at : at + CLUSTER] = data
            assert len(metadata.l2) <= 6
            assert len(metadata._blocks) <= 4 + 2
        assert opened.content() == model
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


def test_the_table_that_was_used_last_stays() -> None:
    """Not the one that was loaded last: a table that everybody uses outlives many that are used once."""
    host = SimHost(0)
    full(host)
    with disk(host, "disk.qcow2", **{"l2-cache-size": 4 * CLUSTER, "read-only": True}) as opened:
        for n in range(1, TABLES):
            opened.run(opened.backend.co_pread(0, 10))
            opened.run(opened.backend.co_pread(n * TABLE_SPAN, 10))
            assert 0 in opened.node.metadata.l2 and n in opened.node.metadata.l2
            assert n <= 4 or n - 4 not in opened.node.metadata.l2


def test_unused_tables_leave() -> None:
    """After the interval; one that is used stays; then nothing keeps the program awake."""
    host = SimHost(0)
    full(host)
    with disk(host, "disk.qcow2", **{"cache-clean-interval": 10, "read-only": True}) as opened:
        for n in range(5):
            opened.run(opened.backend.co_pread(n * TABLE_SPAN, 10))
        l2 = opened.node.metadata.l2
        assert len(l2) == 5
        opened.run(_sleep(opened, 11))
        opened.run(opened.backend.co_pread(3 * TABLE_SPAN, 10))
        opened.run(_sleep(opened, 11))
        assert list(l2) == [3]
        opened.run(_sleep(opened, 11))
        assert not l2
        assert opened.node._cleaner._timer is not None and not opened.node._cleaner._timer.armed
        opened.run(opened.backend.co_pread(3 * TABLE_SPAN, 10))
        assert opened.node._cleaner._timer.armed


async def _sleep(opened: Disk, seconds: int) -> None:
    from bottomhalf.aio import sleep_ns

    await sleep_ns(seconds * 1_000_000_000)


def reopen(opened: Disk, **more: Any) -> None:
    given = {"driver": "qcow2", "node-name": "disk", "discard": "unmap",
             "file": {"driver": "file", "filename": "disk.qcow2", "discard": "unmap"}, **more}
    reopen_nodes(opened.graph, [from_json(BlockdevOptions, given)])


def test_reopen_changes_all_of_them() -> None:
    host = SimHost(0)
    full(host)
    changes: dict[str, Any] = {
        "lazy-refcounts": True, "pass-discard-request": False, "pass-discard-snapshot": False,
        "pass-discard-other": True, "discard-no-unref": True, "overlap-check": "all", "cache-size": 16384,
        "l2-cache-size": 2048, "l2-cache-entry-size": 512, "cache-clean-interval": 5,
    }
    assert {name.replace("-", "_") for name in changes} | {"refcount_cache_size"} == CHANGEABLE
    with disk(host, "disk.qcow2") as opened:
        opened.run(opened.backend.co_pwrite(0, b"before"))
        reopen(opened, **changes)
        now = opened.node.metadata.settings
        assert (now.lazy, now.passes, now.keeps_discarded) == (True, (False, False, True), True)
        assert (now.l2_tables, now.refcount_blocks, now.clean_interval_s) == (4, 28, 5)
        opened.run(opened.backend.co_pwrite(TABLE_SPAN, b"meanwhile"))
        with pytest.raises(BlockError, match="l2-cache-size may not exceed cache-size"):
            reopen(opened, **{**changes, "l2-cache-size": 1 << 20})
        assert opened.node.metadata.settings == now
        reopen(opened)
        assert not opened.node.metadata.settings.lazy
        opened.run(opened.backend.co_flush())
        assert not Header.parse(host.content("disk.qcow2")).incompatible
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


def test_what_is_counted_late_is_counted_before_nothing_can_be_written() -> None:
    host = SimHost(0)
    full(host)
    with disk(host, "disk.qcow2", **{"lazy-refcounts": True}) as opened:
        opened.run(opened.backend.co_pwrite(512, b"x"))
        opened.run(opened.backend.co_flush())
        opened.backend.remove()
        with pytest.raises(BlockError, match=r"reopen with lazy-refcounts=off before"):
            reopen(opened, **{"lazy-refcounts": True, "read-only": True})
        reopen(opened)
        reopen(opened, **{"read-only": True})
        assert not Header.parse(host.content("disk.qcow2")).incompatible
    assert not check(host, "disk.qcow2").corruptions


def test_a_damaged_image_stays_read_only() -> None:
    """A reopen for writing is refused as an open would be."""
    host = SimHost(0)
    full(host)
    content = bytearray(host.content("disk.qcow2"))
    content[79] |= layout.CORRUPT
    replace(host, "disk.qcow2", content)
    opened = Disk(host, "disk.qcow2", **{"read-only": True})
    with pytest.raises(BlockError, match="Image is corrupt; cannot be opened read/write"):
        reopen(opened)
    opened.close()


@pytest.mark.parametrize("passes", [False, True])
def test_discarded_clusters_keep_their_place(passes: bool) -> None:
    """discard-no-unref: the image does not fragment; what the file system gets back is another matter."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=16 * 4096, cluster_size=4096)
    with disk(host, "disk.qcow2", **{"discard-no-unref": True, "pass-discard-request": passes}) as opened:
        opened.run(opened.backend.co_pwrite(0, b"d" * 8 * 4096))
        opened.run(opened.backend.co_flush())
        before, size = opened.node.allocated_size(), opened.node.file.size
        assert before is not None
        opened.run(opened.backend.co_discard(0, 4 * 4096))
        opened.run(opened.backend.co_write_zeroes(4 * 4096, 4096, 2))
        assert opened.content() == bytes(5 * 4096) + b"d" * 3 * 4096 + bytes(8 * 4096)
        after = opened.node.allocated_size()
        assert after is not None and before - after == (5 * 4096 if passes else 0)
        opened.run(opened.backend.co_pwrite(0, b"n" * 4096))
        assert opened.node.file.size == size
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks and found.allocated_clusters == 8, found.findings


@pytest.mark.parametrize("other", [False, True])
def test_what_is_freed_otherwise_is_discarded_if_asked(other: bool) -> None:
    """A compressed cluster that is written over is free, but nobody has discarded it."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=16 * 4096, cluster_size=4096)
    with disk(host, "disk.qcow2", **{"pass-discard-other": other}) as opened:
        data = b"".join(bytes([n]) + random.Random(n).randbytes(2000) + bytes(2095) for n in range(8))
        opened.run(opened.node.co_pwritev_compressed(0, len(data), memoryview(data)))
        opened.run(opened.backend.co_flush())
        opened.run(opened.backend.co_pwrite(0, b"p" * 8 * 4096))
        before = opened.node.allocated_size()
        opened.run(opened.backend.co_flush())
        opened.run(opened.backend.co_flush())
        after = opened.node.allocated_size()
        assert before is not None and after is not None and (after < before) == other


def test_lazy_refcounts_survive_a_crash(seed: int) -> None:
    """The image says that it is dirty before counters are missing; a repair counts them anew, and nothing is lost."""
    host = SimHost(seed)
    make(host, "disk.qcow2", size=64 * 512, cluster_size=512, lazy_refcounts=True)
    opened = Disk(host, "disk.qcow2")
    model, chance, dirty = Model(opened.size), random.Random(seed), 0
    for step in random_steps(seed, opened.size, 25, 512):
        opened.run(carry_out(opened, model, step))
        if chance.random() < 0.4:
            after = SimHost(seed)
            after.add_file("disk.qcow2", host.survivor("disk.qcow2"))
            if Header.parse(after.content("disk.qcow2")).incompatible & layout.DIRTY:
                dirty += 1
                check(after, "disk.qcow2", repair="all")
            found = check(after, "disk.qcow2")
            assert not found.corruptions and not found.check_errors, found.findings
            with disk(after, "disk.qcow2") as reopened:
                assert model.allows(reopened.content())
    opened.close()
    assert not Header.parse(host.content("disk.qcow2")).incompatible
    found = check(host, "disk.qcow2")
    assert not found.corruptions and not found.leaks, found.findings


def test_lazy_refcounts_are_lazy() -> None:
    """A flush writes no counters, and the image says so; closing writes them."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=64 * 512, cluster_size=512)
    with disk(host, "disk.qcow2", **{"lazy-refcounts": True}) as opened:
        before = host.content("disk.qcow2")
        opened.run(opened.backend.co_pwrite(0, b"x" * 5 * 512))
        opened.run(opened.backend.co_flush())
        now = host.content("disk.qcow2")
        assert Header.parse(now).incompatible & layout.DIRTY
        block = int.from_bytes(now[Header.parse(now).refcount_table_offset :][:8], "big")
        assert now[block : block + 512] == before[block : block + 512]
        assert check(host, "disk.qcow2").corruptions
    assert not Header.parse(host.content("disk.qcow2")).incompatible
    assert not check(host, "disk.qcow2").corruptions


def test_a_check_while_counters_are_late() -> None:
    """It counts what is in memory, too."""
    host = SimHost(0)
    make(host, "disk.qcow2", size=64 * 512, cluster_size=512)
    with disk(host, "disk.qcow2", **{"lazy-refcounts": True}) as opened:
        opened.run(opened.backend.co_pwrite(0, b"x" * 5 * 512))
        opened.run(opened.backend.co_flush())
        found = opened.run(opened.node.co_check())
        assert not found.corruptions and not found.leaks, found.findings
