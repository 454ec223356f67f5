# SPDX-License-Identifier: Apache-2.0
"""The tables of an open image: read when needed, changed in memory, written so that every crash is safe.

What may be lost in a crash is what was not flushed, and what may be left over are clusters that nobody uses. Nothing
else. So a commit goes in steps, each durable before the next begins:

1. Counters that became greater, and tables that nobody refers to yet. (The data are written already.)
2. Entries of the refcount table, which refer to those; then the header, if a table has moved.
3. Entries of L2 tables and of L1: from now on the data are found.
4. Only now the counters of what the old entries referred to become smaller, in memory; they reach the disk with the
   next commit. A crash before that leaks them.

A cluster whose counter became zero is not given out while a request that was mapped to it is still on its way: a late
write would land in somebody else's data. Requests are counted by epochs, and freeing something ends an epoch.

Everything that changes tables holds ``lock``. Looking up needs no lock: tables in memory are always the truth.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio import CoMutex, CoQueue
from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import refcounts, tables
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.layout import (
    COPIED,
    L1_RESERVED,
    OFFSET_MASK,
    REFCOUNT_TABLE_BYTES_MAX,
    REFCOUNT_TABLE_RESERVED,
)
from bottomhalf.drivers.qcow2.together import co_submit_all
from bottomhalf.host.request import WRITE, Request

if TYPE_CHECKING:
    from bottomhalf.block import Node

PAGE_BYTES: Final = 4096  # of a table that are written together
L2_CACHE_BYTES_MAX: Final = 32 << 20
BLOCKS_CACHED_MIN: Final = 4


class Table:
    """An L2 table in memory."""

    __slots__ = ("dirty", "entries", "fresh", "offset")

    def __init__(self, entries: array[int], offset: int, fresh: bool = False) -> None:
        self.entries = entries
        self.offset = offset  # in the file
        self.dirty: set[int] = set()  # pages that differ from the disk
        self.fresh = fresh  # nothing on the disk refers to it


class Metadata:
    """The tables of one image. Everything in the home thread of the file's context."""

    def __init__(self, file: Callable[[], Node], header: Header) -> None:
        self._file = file  # what holds the image now: the graph may put something in between
        self.header = header
        self.mapping = tables.Mapping(header.cluster_bits, header.extended_l2)
        self.l1: array[int] = array("Q")
        self.l2: dict[int, Table] = {}  # by L1 index
        self.lock = CoMutex(f"the tables of {file().name}")
        table_bytes = header.cluster_size
        self.l2_cached_max = max(2, min(L2_CACHE_BYTES_MAX // table_bytes, header.l1_size))
        self._loading: dict[int, CoQueue] = {}
        self.refcount_table: array[int] = array("Q")  # of refcounts
        self._blocks: dict[int, array[int]] = {}
        self._dirty_blocks: dict[int, set[int]] = {}
        self._dirty_table: set[int] = set()  # pages
        self._dirty_l1: set[int] = set()  # pages
        self._table_moved = False  # the header does not refer to its place yet
        self._l1_moved = False
        self._header_dirty = False
        self._freed: list[tuple[int, int]] = []  # epoch, cluster: to be counted down after the next commit
        self._epoch = 0
        self._active: dict[int, int] = {}  # mapped requests that are on their way, by epoch
        self._closing = False
        self._hint = 0  # no free cluster below
        self.virgin = 0  # clusters from here on were never written
        self.pass_discards = False  # what is not used any more is discarded in the file

    @property
    def file(self) -> Node:
        """What holds the image."""
        return self._file()

    # -- reading ------------------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytearray:
        """Bytes of the file; zeroes behind its end. OSError."""
        buffer = bytearray(length)
        count = min(length, self.file.size - offset)
        if count > 0:
            with memoryview(buffer) as view:
                await self.file.co_pread(offset, view[:count])
        return buffer

    async def write(self, pieces: list[tuple[int, Any]]) -> None:
        """Write (offset, bytes) all at once; the file grows as needed. OSError."""
        requests = [Request(WRITE, offset, len(data), memoryview(data)) for offset, data in pieces]
        if requests:
            await co_submit_all(self.file, requests)
            if max(request.offset + request.length for request in requests) > self.file.size:
                refresh_sizes(self.file)

    async def open(self) -> None:
        """Read what is always in memory: L1 and the refcount table."""
        header = self.header
        self.l1 = tables.unpack(await self.read(header.l1_offset, header.l1_size * 8))
        for index, entry in enumerate(self.l1):
            if entry & L1_RESERVED or entry & OFFSET_MASK & self.mapping.cluster_mask:
                raise ImageError(f"L2 table offset {entry & OFFSET_MASK:#x} unaligned (L1 index: {index:#x})")
        size = header.refcount_table_clusters << header.cluster_bits
        self.refcount_table = tables.unpack(await self.read(header.refcount_table_offset, size))
        self.virgin = (self.file.size + self.mapping.cluster_mask) >> header.cluster_bits

    async def l2_table(self, index: int) -> Table | None:
        """The L2 table of an L1 entry, from memory or the disk; None if there is none. OSError, ImageError."""
        while (table := self.l2.get(index)) is None:
            waiting = self._loading.get(index)
            if waiting is None:
                return await self._load(index)
            await waiting.wait()
        return table

    async def runs(self, offset: int, length: int) -> list[tables.Run]:
        """What a range of the guest's is, as far as one L2 table says it. OSError, ImageError."""
        index = offset >> self.mapping.l1_shift
        length = min(length, ((index + 1) << self.mapping.l1_shift) - offset)
        table = await self.l2_table(index)
        if table is None:
            return [tables.Run(tables.UNALLOCATED, 0, length)]
        return list(self.mapping.runs(table.entries, offset, length))

    async def _load(self, index: int) -> Table | None:
        offset = self.l1[index] & OFFSET_MASK
        if not offset:
            return None
        queue = self._loading[index] = CoQueue(f"L2 table {index} of {self.file.name}")
        try:
            data = await self.read(offset, self.mapping.cluster_size)
            if (known := self.l2.get(index)) is not None:
                return known  # it was copied meanwhile
            table = Table(tables.unpack(data), offset)
            self._make_room()
            self.l2[index] = table
            return table
        finally:
            del self._loading[index]
            queue.wake_all()

    def _make_room(self) -> None:
        """Drop the table that was loaded first, if there are too many; not one that has to be written."""
        if len(self.l2) >= self.l2_cached_max:
            for index, table in self.l2.items():
                if not table.dirty and not table.fresh:
                    del self.l2[index]
                    return

    # -- requests that are mapped -------------------------------------------------------------------------------

    def begin(self, count: int) -> int:
        """So many requests go to host offsets that were looked up now. Returns what end() wants to know."""
        self._active[self._epoch] = self._active.get(self._epoch, 0) + count
        return self._epoch

    def let_go(self) -> None:
        """The image is being closed: what is still held by readers (see Node.hold_bytes) is not given to anybody."""
        self._active.clear()
        self._closing = True

    def end(self, epoch: int, count: int) -> None:
        if self._closing:
            return
        left = self._active[epoch] - count
        if left:
            self._active[epoch] = left
        else:
            del self._active[epoch]

    # -- refcounts ----------------------------------------------------------------------------------------------

    async def _block(self, index: int) -> array[int] | None:
        """A refcount block; None if there is none. With the lock held."""
        block = self._blocks.get(index)
        if block is not None:
            return block
        entry = self.refcount_table[index] if index < len(self.refcount_table) else 0
        if not entry:
            return None
        if entry & REFCOUNT_TABLE_RESERVED or entry & self.mapping.cluster_mask:
            raise ImageError(f"Refblock offset {entry:#x} unaligned (reftable index: {index:#x})")
        data = await self.read(entry, self.mapping.cluster_size)
        block = refcounts.unpack(data, self.header.refcount_order)
        if len(self._blocks) >= max(BLOCKS_CACHED_MIN, self.l2_cached_max // 4):
            for other in self._blocks:
                if other not in self._dirty_blocks:
                    del self._blocks[other]
                    break
        self._blocks[index] = block
        return block

    async def refcount(self, cluster: int) -> int:
        per_block = self._per_block
        block = await self._block(cluster // per_block)
        return 0 if block is None else block[cluster % per_block]

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
        page = (at << self.header.refcount_order >> 3) // PAGE_BYTES
        self._dirty_blocks.setdefault(index, set()).add(page)

    async def allocate(self, count: int) -> tuple[int, int, bool]:
        """Up to ``count`` clusters side by side, at least one: (the first one's number, how many, whether they were
        never written). Their counters are one. With the lock held. OSError, ImageError if the tables are damaged."""
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
        for n in range(at, at + got):
            self._set(index, block, n, 1)
        first = index * per_block + at
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
        header.refcount_table_offset = cluster << header.cluster_bits
        header.refcount_table_clusters = clusters
        self._header_dirty = self._table_moved = True

    def free(self, cluster: int) -> None:
        """One reference less, once nothing on the disk refers to it any more."""
        self._freed.append((self._epoch, cluster))

    def free_all(self, clusters: Iterable[int]) -> None:
        for cluster in clusters:
            self.free(cluster)

    # -- changing -----------------------------------------------------------------------------------------------

    async def make_room_for_changes(self) -> None:
        """Before a change: tables that have to be written cannot be dropped, so there must not be too many of them."""
        if len(self.l2) >= self.l2_cached_max and all(table.dirty or table.fresh for table in self.l2.values()):
            await self.commit()

    async def writable_table(self, index: int) -> Table:
        """The L2 table of an L1 entry for changing: made if there is none, copied if it is shared with a snapshot.
        With the lock held."""
        table = await self.l2_table(index)
        entry = self.l1[index]
        if table is not None and (entry & COPIED or table.fresh):
            return table
        self._make_room()
        cluster, _, _ = await self.allocate(1)
        offset = cluster << self.header.cluster_bits
        if table is None:
            table = Table(array("Q", [0]) * (self.mapping.entries * self.mapping.words), offset, fresh=True)
        else:
            entries = array("Q", table.entries)
            for at in range(0, len(entries), self.mapping.words):
                entries[at] &= ~COPIED
            self.free((entry & OFFSET_MASK) >> self.header.cluster_bits)
            table = Table(entries, offset, fresh=True)
        self.l2[index] = table
        self.set_l1(index, offset | COPIED)
        return table

    def set_entry(self, table: Table, index: int, entry: int, bitmap: int = 0) -> None:
        """Change one L2 entry, in memory."""
        at = index * self.mapping.words
        table.entries[at] = entry
        if self.mapping.extended:
            table.entries[at + 1] = bitmap
        table.dirty.add(at * 8 // PAGE_BYTES)

    def set_l1(self, index: int, entry: int) -> None:
        """Change an L1 entry, in memory."""
        self.l1[index] = entry
        self._dirty_l1.add(index * 8 // PAGE_BYTES)

    def move_l1(self, entries: int, cluster: int) -> None:
        """L1 has so many entries from now on, and lies at ``cluster``. With the lock held."""
        header = self.header
        old = -(-header.l1_size * 8 // self.mapping.cluster_size)
        self.free_all((header.l1_offset >> header.cluster_bits) + n for n in range(old))
        self.l1.extend([0] * (entries - len(self.l1)))
        header.l1_offset = cluster << header.cluster_bits
        header.l1_size = entries
        self._header_dirty = self._l1_moved = True

    def header_changed(self) -> None:
        self._header_dirty = True

    # -- commit -------------------------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether a commit has something to do beside flushing."""
        return bool(
            self._dirty_blocks
            or self._dirty_table
            or self._dirty_l1
            or self._header_dirty
            or self._freed
            or any(table.dirty or table.fresh for table in self.l2.values())
        )

    async def commit(self) -> None:
        """Make everything durable, in steps; see above. With the lock held. OSError: what was not written is still to
        be written, by the next commit."""
        changed = [table for table in self.l2.values() if table.dirty or table.fresh]
        await self.write([*self._block_pages(), *self._fresh_tables(changed), *self._moved_tables()])
        await self.file.co_flush()
        self._dirty_blocks.clear()
        # What was new is durable now, and from the next write on something may refer to it, even if that write fails:
        # its next change takes the way of all changes.
        for table in changed:
            if table.fresh:
                table.fresh = False
                table.dirty.clear()
        if self._table_moved:
            self._table_moved = False
            self._dirty_table.clear()
        if self._l1_moved:
            self._l1_moved = False
            self._dirty_l1.clear()
        if self._dirty_table:
            packed = tables.pack(self.refcount_table)
            await self.write(list(_pages(self.header.refcount_table_offset, packed, self._dirty_table)))
            await self.file.co_flush()
            self._dirty_table.clear()
        if self._header_dirty:
            await self.write([(0, self.header.to_bytes())])
            await self.file.co_flush()
            self._header_dirty = False
        pieces = list(_pages(self.header.l1_offset, tables.pack(self.l1), self._dirty_l1))
        for table in changed:
            pieces += _pages(table.offset, tables.pack(table.entries), table.dirty)
        if pieces:
            await self.write(pieces)
            await self.file.co_flush()
            self._dirty_l1.clear()
            for table in changed:
                table.dirty.clear()
        await self._count_down()

    async def _count_down(self) -> None:
        """Step 4: nothing on the disk refers to what was freed."""
        if not self._freed:
            return
        self._epoch += 1
        oldest = min(self._active, default=self._epoch)
        per_block = self._per_block
        freed, self._freed = self._freed, []
        unused: list[int] = []
        for epoch, cluster in freed:
            if oldest <= epoch:
                self._freed.append((epoch, cluster))  # somebody may still write there
                continue
            index, at = divmod(cluster, per_block)
            block = await self._block(index)
            if block is not None and block[at]:  # else the image was damaged before; a check will tell
                self._set(index, block, at, block[at] - 1)
                if block[at] == 0:
                    unused.append(cluster)
        if self.pass_discards:
            await self._discard(sorted(unused))
        self._hint = min([self._hint, *unused])

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
            yield from _pages(self.refcount_table[index], packed, pages)

    def _fresh_tables(self, changed: list[Table]) -> Iterable[tuple[int, bytes]]:
        return [(table.offset, tables.pack(table.entries)) for table in changed if table.fresh]

    def _moved_tables(self) -> Iterable[tuple[int, bytes]]:
        if self._table_moved:
            yield self.header.refcount_table_offset, tables.pack(self.refcount_table)
        if self._l1_moved:
            yield self.header.l1_offset, tables.pack(self.l1)


def refresh_sizes(node: Node) -> None:
    """A file below has grown: those above it learn that from the bottom up."""
    for edge in node.children:
        refresh_sizes(edge.node)
    node.refresh_size()


def _pages(offset: int, data: bytes, pages: set[int]) -> Iterable[tuple[int, bytes]]:
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
