# SPDX-License-Identifier: Apache-2.0
"""Counters of clusters in memory: give clusters out, take them back, find room for more counters.

The part of ``metadata`` that knows who uses which cluster of the file. A counter that grows does so at once, in memory,
and is written before anything refers to the cluster; one that shrinks waits until nothing on the disk refers to the
cluster any more (``free``), and until nobody is on his way to it (epochs).

Clause: "Host cluster management".
Invariant: on the disk a counter is never lower than what the disk refers to, and nobody is given a cluster that the
disk refers to, or that somebody is on his way to.
Test: tests/drivers/qcow2/test_crash_scenarios.py
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import overlap, refcounts
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.layout import REFCOUNT_TABLE_BYTES_MAX, REFCOUNT_TABLE_RESERVED
from bottomhalf.drivers.qcow2.overlap import Places
from bottomhalf.drivers.qcow2.runtime import Settings
from bottomhalf.drivers.qcow2.tables import Mapping

if TYPE_CHECKING:
    from bottomhalf.block import Node

PAGE_BYTES: Final = 4096  # of a table that are written together

# Why a cluster is free: whether that is passed on to the file as a discard depends on it.
FREED_REQUEST: Final = 0  # the guest discarded it
FREED_SNAPSHOT: Final = 1  # a snapshot was deleted
FREED_OTHER: Final = 2  # it was written elsewhere, a table moved, ...


class Freed(NamedTuple):
    """Clusters that have a reference less, and in which epoch; ``why`` is one of FREED_*."""

    epoch: int
    why: int
    clusters: array[int]


class Counters:
    """What ``Metadata`` knows of the clusters of one file. Home thread."""

    header: Header
    mapping: Mapping
    _header_dirty: bool
    freed_max: ClassVar[int] = 1 << 16  # references that wait to be counted down before the next change commits them

    def __init__(self, header: Header) -> None:
        self.places = Places(header.cluster_bits)
        self.settings = Settings.default(header)
        self.refcount_table: array[int] = array("Q")  # of refcounts
        self._blocks: dict[int, array[int]] = {}  # the one that was used last is the last
        self._dirty_blocks: dict[int, set[int]] = {}
        self._dirty_table: set[int] = set()  # pages
        self._table_moved = False  # the header does not refer to its place yet
        self._freed: list[Freed] = []  # to be counted down after the next commit
        self._freed_lately = 0  # how many clusters that are
        self._held: list[Freed] = []  # when those are done that were on the way to them
        self._epoch = 0
        self._active: dict[int, int] = {}  # mapped requests that are on their way, by epoch
        self._held_from = 0  # the epochs from here on; those before were let go
        self._hint = 0  # no free cluster below
        self.virgin = 0  # clusters from here on were never written
        self.packing = 0  # where the next compressed bytes go, in a cluster that has room for them; 0: nowhere

    @property
    def file(self) -> Node:
        raise NotImplementedError

    async def read(self, offset: int, length: int) -> bytearray:
        raise NotImplementedError

    async def at(self, event: str) -> None:
        """The work comes by a point that QEMU has a name for: blkdebug may have the next request fail, or wait here."""
        file = self.file
        if file.graph.debugged:
            await file.co_debug_event(event)

    # -- refcounts ----------------------------------------------------------------------------------------------

    def block_offset(self, index: int) -> int:
        """Where a block lies; 0: there is none."""
        return self.refcount_table[index] & ~REFCOUNT_TABLE_RESERVED

    async def _block(self, index: int) -> array[int] | None:
        """A refcount block; None if there is none. With the lock held."""
        block = self._blocks.pop(index, None)
        if block is not None:
            self._blocks[index] = block  # the one that was used last is the last
            return block
        entry = self.block_offset(index) if index < len(self.refcount_table) else 0
        if not entry:
            return None
        if entry & self.mapping.cluster_mask:
            raise ImageError(f"Refblock offset {entry:#x} unaligned (reftable index: {index:#x})")
        await self.at("refblock_load")
        data = await self.read(entry, self.mapping.cluster_size)
        block = refcounts.unpack(data, self.header.refcount_order)
        excess = len(self._blocks) - self.settings.refcount_blocks + 1
        if excess > 0:
            clean = [other for other in self._blocks if other not in self._dirty_blocks]
            for other in clean[:excess]:
                del self._blocks[other]
        self._blocks[index] = block
        return block

    async def block(self, index: int) -> array[int]:
        """The counters of a block as they are; empty if there is none. OSError, ImageError."""
        return await self._block(index) or array("B")

    async def refcount(self, cluster: int) -> int:
        per_block = self._per_block
        block = await self._block(cluster // per_block)
        return 0 if block is None else block[cluster % per_block]

    async def counts(self, first: int, count: int) -> list[int]:
        """The counters of so many clusters. With the lock held."""
        found: list[int] = []
        while len(found) < count:
            index, at = divmod(first + len(found), self._per_block)
            take = min(self._per_block - at, count - len(found))
            block = await self._block(index)
            found += [0] * take if block is None else block[at : at + take]
        return found

    async def refer(self, cluster: int) -> None:
        """One reference more to a cluster that has some. With the lock held. ImageError if it has none, or as many as
        can be counted, which who asks has made sure of, unless the image is damaged."""
        index, at = divmod(cluster, self._per_block)
        block = await self._block(index)
        if block is None or not block[at]:
            raise ImageError(f"cluster {cluster} is in use and not counted; the image has to be repaired")
        if block[at] >= refcounts.refcount_max(self.header.refcount_order):
            raise ImageError(f"cluster {cluster} is referred to more often than its counter can say")
        self._set(index, block, at, block[at] + 1)

    async def set_refcount(self, cluster: int, count: int) -> None:
        """Repair a counter. With the lock held. ImageError if there is no place for it."""
        index, at = divmod(cluster, self._per_block)
        block = await self._block(index)
        if block is None:
            raise ImageError("the refcount structure would have to be built anew, which is not supported yet")
        self._set(index, block, at, min(count, refcounts.refcount_max(self.header.refcount_order)))

    @property
    def _per_block(self) -> int:
        return refcounts.entries_of_block(self.header.cluster_bits, self.header.refcount_order)

    def _set(self, index: int, block: array[int], at: int, value: int) -> None:
        block[at] = value
        if not value:
            cluster = index * self._per_block + at
            self.places.remove(cluster)
            if cluster == self.packing >> self.header.cluster_bits:
                self.packing = 0
        page = (at << self.header.refcount_order >> 3) // PAGE_BYTES
        self._dirty_blocks.setdefault(index, set()).add(page)

    async def allocate(self, count: int) -> tuple[int, int, bool]:
        """Up to ``count`` clusters side by side, at least one: (the first one's number, how many, whether they were
        never written). Their counters are one. With the lock held. OSError, ImageError if the tables are damaged."""
        await self.at("cluster_alloc")
        await self.at("refblock_alloc")
        per_block = self._per_block
        index, at = divmod(self._hint, per_block)
        while True:
            block = await self._block(index)
            if block is None:
                self._new_region(index, 0)
                block = self._blocks[index]
            try:
                at = block.index(0, at)
            except ValueError:
                index, at = index + 1, 0
                continue
            break
        got = 1
        while got < count and at + got < per_block and block[at + got] == 0:
            got += 1
        first = index * per_block + at
        self.places.allocation(first, got)
        for n in range(at, at + got):
            self._set(index, block, n, 1)
        self._hint = first + got
        virgin = first >= self.virgin
        self.virgin = max(self.virgin, self._hint)
        return first, got, virgin

    async def allocate_together(self, count: int) -> int:
        """So many clusters side by side, for a table: the first one's number. With the lock held."""
        while count <= self._per_block // 2:
            first, got, _ = await self.allocate(count)
            if got == count:
                return first
            self.free_all(range(first, first + got))
        used = len(self.refcount_table)
        while used and not self.refcount_table[used - 1]:
            used -= 1
        return self._new_region(used, count)

    def _new_region(self, index: int, count: int) -> int:
        """Nobody has counted these clusters yet: make blocks from the given one on, as many as it takes for ``count``
        clusters side by side, and for the blocks themselves and a larger refcount table if there is no room for them.
        The first of the ``count``. With the lock held."""
        per_block, cluster_size = self._per_block, self.mapping.cluster_size
        ranges, table_clusters = 1, 0
        while True:
            if index + ranges > len(self.refcount_table):
                table_clusters = -(-max((index + ranges) * 3 // 2, 1) * 8 // cluster_size)
                if table_clusters * cluster_size > REFCOUNT_TABLE_BYTES_MAX:
                    raise ImageError("the image cannot grow: its reference count table is full")
            total = ranges + table_clusters + count
            if total <= ranges * per_block:
                break
            ranges = -(-total // per_block)
        first = index * per_block
        self.places.allocation(first, total)
        self.places.add(overlap.REFCOUNT_BLOCK, first * cluster_size, ranges * cluster_size)
        pages = range(-(-cluster_size // PAGE_BYTES))
        for n in range(ranges):
            self._blocks[index + n] = refcounts.empty(self.header.cluster_bits, self.header.refcount_order)
            self._dirty_blocks[index + n] = set(pages)
        for n in range(total):
            self._set(index + n // per_block, self._blocks[index + n // per_block], n % per_block, 1)
        if table_clusters:
            self._move_table(first + ranges, table_clusters)
        for n in range(ranges):
            self.refcount_table[index + n] = (first + n) << self.header.cluster_bits
            self._dirty_table.add((index + n) * 8 // PAGE_BYTES)
        self.virgin = max(self.virgin, first + total)
        return first + ranges + table_clusters

    def _move_table(self, cluster: int, clusters: int) -> None:
        """Give the refcount table a larger place."""
        header = self.header
        old = header.refcount_table_offset >> header.cluster_bits
        self.free_all(range(old, old + header.refcount_table_clusters))
        self.refcount_table.extend([0] * (clusters * self.mapping.cluster_size // 8 - len(self.refcount_table)))
        self.places.add(overlap.REFCOUNT_TABLE, cluster << header.cluster_bits, clusters << header.cluster_bits)
        header.refcount_table_offset = cluster << header.cluster_bits
        header.refcount_table_clusters = clusters
        self._header_dirty = self._table_moved = True

    def free(self, cluster: int, why: int = FREED_OTHER) -> None:
        """One reference less, once nothing on the disk refers to it any more. ``why`` is one of FREED_*."""
        self.free_all((cluster,), why)

    def free_all(self, clusters: Iterable[int], why: int = FREED_OTHER) -> None:
        """As free(), for each of them."""
        run = array("Q", clusters)
        self._freed_lately += len(run)
        _put(self._freed, self._epoch, why, run)

    @property
    def to_count_down(self) -> int:
        """How many references; those too that a commit had to leave, because somebody was on the way there."""
        return sum(len(each.clusters) for each in [*self._freed, *self._held])

    async def count_down(self) -> None:
        """Step 4: nothing on the disk refers to what was freed. OSError, ImageError: the next commit goes on."""
        if not self._freed and not self._held:
            return
        await self.at("cluster_free")
        self._epoch += 1
        oldest = min(self._active, default=self._epoch)
        runs = [each for each in self._held if each.epoch < oldest] + self._freed
        self._held, self._freed = [each for each in self._held if each.epoch >= oldest], []
        unused, discarded = self._hint, array("Q")
        try:
            while runs:
                epoch, why, run = runs[-1]
                while run:
                    index, at = divmod(run[-1], self._per_block)
                    block = await self._block(index)
                    cluster, count = run.pop(), 0 if block is None else block[at]
                    if count == 1 and oldest <= epoch:
                        _put(self._held, epoch, why, (cluster,))  # somebody may still write there
                    elif count and block is not None:  # else the image was damaged before; a check will tell
                        self._set(index, block, at, count - 1)
                        if count == 1:
                            unused = min(unused, cluster)
                            if self.settings.passes[why]:
                                discarded.append(cluster)
                runs.pop()
        finally:
            self._freed = runs + self._freed
            self._freed_lately = sum(len(each.clusters) for each in self._freed)
            self._hint = min(self._hint, unused)
        if discarded:
            await self._discard(sorted(discarded))

    async def _discard(self, clusters: list[int]) -> None:
        """Give the file's space back, before anybody can be given the clusters."""
        bits = self.header.cluster_bits
        start = end = -1
        for cluster in [*clusters, -1]:
            if cluster != end:
                if end > start:
                    with suppress(OSError):  # it is a hint
                        await self.file.co_discard(start << bits, (end - start) << bits)
                start = cluster
            end = cluster + 1

    def _block_pages(self) -> Iterable[tuple[int, bytes]]:
        for index, pages in self._dirty_blocks.items():
            packed = refcounts.pack(self._blocks[index], self.header.refcount_order)
            yield from pages_of(self.block_offset(index), packed, pages)


def _put(runs: list[Freed], epoch: int, why: int, clusters: Sequence[int]) -> None:
    if not clusters:
        return
    if not runs or runs[-1][:2] != (epoch, why):
        runs.append(Freed(epoch, why, array("Q")))
    runs[-1].clusters.extend(clusters)


def pages_of(offset: int, data: bytes, pages: set[int]) -> Iterable[tuple[int, bytes]]:
    """The given pages of a table, those side by side as one piece."""
    start = end = -1
    for page in sorted(pages):
        if page != end:
            if end > start:
                yield offset + start * PAGE_BYTES, data[start * PAGE_BYTES : end * PAGE_BYTES]
            start = page
        end = page + 1
    if end > start >= 0:
        yield offset + start * PAGE_BYTES, data[start * PAGE_BYTES : end * PAGE_BYTES]
