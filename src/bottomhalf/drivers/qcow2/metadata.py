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

With lazy refcounts (``lazy-refcounts=on``) step 1 leaves the counters out, as long as no block of them is new, and the
header says "dirty" on the disk before anything relies on that. Who opens an image that says so counts anew.

Clause: "Cluster mapping", "Host cluster management".
Invariant: after each write, in whatever order the disk has kept those since the last flush, the image has leaks at most
and all that was flushed.
Test: tests/drivers/qcow2/test_crash_states.py
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.aio import CoMutex, CoQueue
from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import overlap, tables
from bottomhalf.drivers.qcow2.counters import FREED_OTHER as FREED_OTHER
from bottomhalf.drivers.qcow2.counters import FREED_REQUEST as FREED_REQUEST
from bottomhalf.drivers.qcow2.counters import FREED_SNAPSHOT as FREED_SNAPSHOT
from bottomhalf.drivers.qcow2.counters import PAGE_BYTES, Counters, pages_of
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.heading import co_write_header
from bottomhalf.drivers.qcow2.layout import (
    COPIED,
    CORRUPT,
    DIRTY,
    OFFSET_MASK,
)
from bottomhalf.drivers.qcow2.overlap import co_find_places
from bottomhalf.drivers.qcow2.together import Passage, co_submit_all
from bottomhalf.host.request import WRITE, Request

if TYPE_CHECKING:
    from bottomhalf.block import Node

DROPPED_SHARE: Final = 16  # of the tables that memory has room for, as many are dropped at a time


class Table:
    """An L2 table in memory."""

    __slots__ = ("checked", "dirty", "entries", "fresh", "offset", "used")

    def __init__(self, entries: array[int], offset: int, fresh: bool = False) -> None:
        self.entries = entries
        self.offset = offset  # in the file
        self.dirty: set[int] = set()  # pages that differ from the disk
        self.fresh = fresh  # nothing on the disk refers to it
        self.checked = fresh  # its entries do not lead to tables (see ``overlap``)
        self.used = 0  # when it was last, in ticks of Metadata.tick


class Metadata(Counters):
    """The tables of one image. Everything in the home thread of the file's context."""

    def __init__(self, file: Callable[[], Node], header: Header, data: Callable[[], Node] | None = None) -> None:
        super().__init__(header)
        self._file = file  # what holds the image now: the graph may put something in between
        self._data = data  # what holds the guest's data, if that is another file
        self.header = header
        self.mapping = tables.Mapping(header.cluster_bits, header.extended_l2, header.external)
        self.l1: array[int] = array("Q")
        self.l2: dict[int, Table] = {}  # by L1 index
        self.lock = CoMutex(f"the tables of {file().name}")
        self.tick = 0  # grows with each table that is loaded, and each time the unused ones are dropped
        self.on_load: Callable[[], object] | None = None
        self.passage: Passage | None = None  # of those that are on their way; the latest
        self.broken = False  # the image was marked corrupt: nothing is written any more
        self._places_known = 0  # what was protected when ``places`` was filled
        self._marked_dirty = False  # by us, because counters are written late
        self._loading: dict[int, CoQueue] = {}
        self._outdated: set[int] = set()  # those of them whose L1 entries have changed since
        self._dirty_l1: set[int] = set()  # pages
        self._l1_moved = False
        self._header_dirty = False

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

    async def write_data(self, pieces: list[tuple[int, Any]]) -> None:
        """write() for the guest's data, which may have a file of their own."""
        await self.write(pieces, None if self._data is None else self._data())

    async def write(self, pieces: list[tuple[int, Any]], file: Node | None = None) -> None:
        """Write (offset, bytes) all at once; the file grows as needed. OSError."""
        file = file or self.file
        requests = [Request(WRITE, offset, len(data), memoryview(data)) for offset, data in pieces]
        if requests:
            await co_submit_all(file, requests)
            if max(request.offset + request.length for request in requests) > file.size:
                refresh_sizes(file)

    async def open(self) -> None:
        """Read what is always in memory: L1 and the refcount table. OSError, ImageError."""
        header = self.header
        self.l1 = tables.unpack(await self.read(header.l1_offset, header.l1_size * 8))
        size = header.refcount_table_clusters << header.cluster_bits
        await self.at("reftable_load")
        self.refcount_table = tables.unpack(await self.read(header.refcount_table_offset, size))
        self.virgin = (self.file.size + self.mapping.cluster_mask) >> header.cluster_bits

    async def find_places(self) -> None:
        """Learn where tables lie, before the first change, so that nothing else is written there. OSError."""
        wanted = self.places.protected | self._places_known
        if wanted != self._places_known:
            await co_find_places(self)
            self._places_known = wanted

    async def l2_table(self, index: int) -> Table | None:
        """The L2 table of an L1 entry, from memory or the disk; None if there is none. OSError, ImageError."""
        while (table := self.l2.get(index)) is None:
            if self.broken:
                raise OSError(errno.ENOMEDIUM, os.strerror(errno.ENOMEDIUM), self.file.name)
            waiting = self._loading.get(index)
            if waiting is not None:
                await waiting.wait()
            elif (offset := self.l1[index] & OFFSET_MASK) == 0:
                return None
            else:
                await self._load(index, offset)
        table.used = self.tick
        return table

    async def runs(self, offset: int, length: int) -> list[tables.Run]:
        """What a range of the guest's is, as far as one L2 table says it. OSError, ImageError."""
        index = offset >> self.mapping.l1_shift
        length = min(length, ((index + 1) << self.mapping.l1_shift) - offset)
        table = await self.l2_table(index)
        if table is None:
            return [tables.Run(tables.UNALLOCATED, 0, length)]
        return list(self.mapping.runs(table.entries, offset, length))

    async def _load(self, index: int, offset: int) -> None:
        """Read the table that lies there, unless the entry is another one in the end: then one has to look again."""
        if offset & self.mapping.cluster_mask:
            raise ImageError(f"L2 table offset {offset:#x} unaligned (L1 index: {index:#x})")
        queue = self._loading[index] = CoQueue(f"L2 table {index} of {self.file.name}")
        try:
            await self.at("l2_load")
            data = await self.read(offset, self.mapping.cluster_size)
            if index in self.l2 or index in self._outdated:  # it was copied meanwhile, and perhaps dropped again
                return
            table = Table(tables.unpack(data), offset)
            if self.header.raw_data:
                self._check_raw(table, index)
            self._make_room()
            self.tick += 1
            table.used = self.tick
            self.l2[index] = table
            if self.on_load is not None:
                self.on_load()
        finally:
            del self._loading[index]
            self._outdated.discard(index)
            queue.wake_all()

    def _check_raw(self, table: Table, index: int) -> None:
        """What others read as a raw image has every cluster in its place."""
        mapping = self.mapping
        first = index << mapping.l1_shift
        for n, entry in enumerate(table.entries[:: mapping.words]):
            guest = first + (n << mapping.cluster_bits)
            if mapping.has_place(entry) and entry & OFFSET_MASK != guest:
                raise ImageError(
                    f"External data file host cluster offset {entry & OFFSET_MASK:#x} does not match guest cluster "
                    f"offset: {guest:#x}, L2 index: {n:#x}"
                )

    def _make_room(self) -> None:
        """Drop the tables that were not used for the longest time, if there are too many; none that has to be
        written."""
        most = self.settings.l2_tables
        excess = len(self.l2) - most + 1
        if excess > 0:
            clean = [(table.used, index) for index, table in self.l2.items() if not table.dirty and not table.fresh]
            clean.sort()
            for _, index in clean[: max(excess, most // DROPPED_SHARE)]:
                del self.l2[index]

    def drop_unused(self, since: int) -> bool:
        """Drop tables that were last used before that tick, and blocks; whether some are left that may be dropped
        later. A new tick begins."""
        self.tick += 1
        left = False
        for index, table in list(self.l2.items()):
            if not table.dirty and not table.fresh:
                if table.used < since:
                    del self.l2[index]
                else:
                    left = True
        for number in [number for number in self._blocks if number not in self._dirty_blocks]:
            del self._blocks[number]
        return left

    # -- requests that are mapped -------------------------------------------------------------------------------

    def begin(self, count: int) -> int:
        """So many requests go to host offsets that were looked up now. Returns what end() wants to know."""
        self._active[self._epoch] = self._active.get(self._epoch, 0) + count
        return self._epoch

    def let_go(self) -> None:
        """Nobody in this program gets any more clusters: those that readers still hold (see Node.hold_bytes) can be
        counted down. Nothing is on its way."""
        self._active.clear()
        self.passage = None
        self._epoch += 1
        self._held_from = self._epoch

    def end(self, epoch: int, count: int) -> None:
        if epoch < self._held_from:
            return
        left = self._active[epoch] - count
        if left:
            self._active[epoch] = left
        else:
            del self._active[epoch]
            self.passage = None

    # -- changing -----------------------------------------------------------------------------------------------

    async def make_room_for_changes(self) -> None:
        """Before a change: tables that have to be written cannot be dropped, so there must not be too many of them; nor
        of clusters that wait to be free."""
        await self.find_places()
        counters = len(self._dirty_blocks) > self.settings.refcount_blocks
        if counters or self._is_full() or self._freed_lately >= self.freed_max:
            await self.commit(counters=counters)

    def _is_full(self) -> bool:
        """Whether as many tables have to be written as memory has room for."""
        droppable = len(self.l2) - self.settings.l2_tables + 1  # so many clean ones, and it is not
        if droppable <= 0:
            return False
        for table in self.l2.values():
            if not table.dirty and not table.fresh:
                droppable -= 1
                if not droppable:
                    return False
        return True

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
        self.places.add(overlap.ACTIVE_L2, offset)
        table.used = self.tick
        self.l2[index] = table
        self.set_l1(index, offset | COPIED)
        return table

    def check_entries(self, index: int) -> None:
        """Before a guest writes through an L2 table in memory: its entries do not lead to tables. Corruption."""
        table = self.l2.get(index)
        if table is not None and not table.checked:
            if not self.mapping.external:
                self.places.entries(table.entries, self.mapping.words)
            table.checked = True

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
        if index in self._loading:
            self._outdated.add(index)
        self._dirty_l1.add(index * 8 // PAGE_BYTES)

    async def grow_l1(self, entries: int) -> None:
        """Let the L1 table have so many entries at least, whole clusters of them, at a new place. With the lock held.
        OSError, ImageError."""
        await self.at("l1_grow_alloc_table")
        size = self.mapping.cluster_size
        clusters = -(-entries * 8 // size)
        self.move_l1(clusters * size // 8, await self.allocate_together(clusters))

    def move_l1(self, entries: int, cluster: int) -> None:
        """L1 has so many entries from now on, and lies at ``cluster``. With the lock held."""
        header = self.header
        old = -(-header.l1_size * 8 // self.mapping.cluster_size)
        self.free_all((header.l1_offset >> header.cluster_bits) + n for n in range(old))
        self.l1.extend([0] * (entries - len(self.l1)))
        self.places.add(overlap.ACTIVE_L1, cluster << header.cluster_bits, entries * 8)
        header.l1_offset = cluster << header.cluster_bits
        header.l1_size = entries
        self._header_dirty = self._l1_moved = True

    def replace_l1(self, l1: Iterable[int], entries: int, cluster: int) -> None:
        """L1 is another one from now on, of so many entries, and lies at ``cluster``. Nothing of the old one is in
        memory any more. With the lock held."""
        self.l1 = array("Q", l1)
        self._outdated.update(self._loading)
        self.move_l1(entries, cluster)

    def turn_to(self, l1: array[int], refcount_table: array[int], blocks: Iterable[int]) -> None:
        """The header on the disk names these, and the blocks of these indexes lie elsewhere (see ``switching``). What
        was in memory of the old ones is dropped. With the lock held."""
        self.l1, self.refcount_table = l1, refcount_table
        self._outdated.update(self._loading)
        self.l2.clear()
        for index in blocks:
            self._blocks.pop(index, None)
            self._dirty_blocks.pop(index, None)
            self.places.add(overlap.REFCOUNT_BLOCK, refcount_table[index])
        header, size = self.header, self.mapping.cluster_size
        self.places.add(overlap.REFCOUNT_TABLE, header.refcount_table_offset, header.refcount_table_clusters * size)
        self.places.add(overlap.ACTIVE_L1, header.l1_offset, header.l1_size * 8)
        for entry in l1:
            self.places.add(overlap.ACTIVE_L2, entry & OFFSET_MASK)

    async def use_counters(self, order: int, table: array[int], offset: int) -> None:
        """All counters have been written anew, with another width, below a table at ``offset``: let the header name
        that. Nothing else is waiting to be written. With the lock held. OSError, and the old ones are in use."""
        header, bits = self.header, self.header.cluster_bits
        before = header.refcount_order, header.refcount_table_offset, header.refcount_table_clusters
        header.refcount_order, header.refcount_table_offset = order, offset
        header.refcount_table_clusters = len(table) * 8 >> bits
        try:
            await self.write_header()
        except BaseException:  # what the disk says now is not known
            header.refcount_order, header.refcount_table_offset, header.refcount_table_clusters = before
            self._header_dirty = True
            raise
        self.refcount_table = table
        self._blocks.clear()
        self.places.add(overlap.REFCOUNT_TABLE, offset, len(table) * 8)
        for entry in table:
            self.places.add(overlap.REFCOUNT_BLOCK, entry)

    async def write_header(self) -> None:
        """Make the header durable; a power cut leaves the old one or the new one. OSError, ImageError."""
        await co_write_header(self)

    def header_changed(self) -> None:
        self._header_dirty = True

    # -- commit -------------------------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether a commit has something to do beside flushing."""
        return bool(self._freed or self._held) or self._unwritten

    @property
    def _unwritten(self) -> bool:
        """Whether something in memory differs from the disk."""
        return bool(
            (self._dirty_blocks and not (self._marked_dirty and self.settings.lazy))
            or (self._marked_dirty and not self.settings.lazy)
            or self._dirty_table
            or self._dirty_l1
            or self._header_dirty
            or any(table.dirty or table.fresh for table in self.l2.values())
        )

    async def commit(self, *, counters: bool = False) -> None:
        """Make everything durable, in steps; see above. With the lock held. OSError: what was not written is still to
        be written, by the next commit. ``counters``: also those that may be written late."""
        if self.broken:
            return
        late = self.settings.lazy and not (counters or self._dirty_table or self._table_moved or self._header_dirty)
        if late and self._dirty_blocks and not self._marked_dirty:
            await self._mark_dirty(True)
        changed = [table for table in self.l2.values() if table.dirty or table.fresh]
        if self._data is not None:
            await self._data().co_flush()
        self._check_places(changed)
        blocks = [] if late else list(self._block_pages())
        for event, happens in (
            ("refblock_update_part", blocks),
            ("reftable_grow", self._table_moved),
            ("l1_grow_write_table", self._l1_moved),
            ("l2_alloc_write", any(table.fresh for table in changed)),
        ):
            if happens:
                await self.at(event)
        await self.write([*blocks, *self._fresh_tables(changed), *self._moved_tables()])
        await self.file.co_flush()
        if not late:
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
            await self.at("l1_grow_activate_table")
            self._l1_moved = False
            self._dirty_l1.clear()
        if self._dirty_table:
            await self.at("reftable_update")
            packed = tables.pack(self.refcount_table)
            await self.write(list(pages_of(self.header.refcount_table_offset, packed, self._dirty_table)))
            await self.file.co_flush()
            self._dirty_table.clear()
        if self._header_dirty:
            await self.write_header()
            self._header_dirty = False
        pieces = list(pages_of(self.header.l1_offset, tables.pack(self.l1), self._dirty_l1))
        if pieces:
            await self.at("l1_update")
        if any(table.dirty for table in changed):
            await self.at("l2_update")
        for table in changed:
            pieces += pages_of(table.offset, tables.pack(table.entries), table.dirty)
        if pieces:
            await self.write(pieces)
            await self.file.co_flush()
            self._dirty_l1.clear()
            for table in changed:
                table.dirty.clear()
        await self.count_down()
        if self._marked_dirty and not self.settings.lazy and not self._dirty_blocks:
            await self._mark_dirty(False)

    @property
    def is_marked_dirty(self) -> bool:
        """Whether the header says "dirty" because counters are written late."""
        return self._marked_dirty

    async def settle(self) -> None:
        """Commit until nothing is left: what one commit frees, the next one writes. What somebody is on his way to, or
        holds, stays; and all of it in an image that is not written any more. With the lock held. OSError."""
        await self.commit(counters=True)
        while self.dirty and not self.broken:
            held = self.to_count_down
            await self.commit(counters=True)
            if held and self.to_count_down == held and not self._unwritten:
                break

    async def _mark_dirty(self, dirty: bool) -> None:
        """Say on the disk that counters are written late, before they are; or that all have been."""
        header = self.header
        self._marked_dirty = False
        header.incompatible = header.incompatible | DIRTY if dirty else header.incompatible & ~DIRTY
        try:
            await self.write_header()
        except BaseException:  # what the disk says now is not known
            header.incompatible &= ~DIRTY
            self._header_dirty = True
            raise
        self._marked_dirty = dirty

    def _check_places(self, changed: list[Table]) -> None:
        """What is about to be written lies where nothing else does."""
        size = self.mapping.cluster_size
        for table in changed:
            self.places.table(table.offset, overlap.ACTIVE_L2, size)
        for index in self._dirty_blocks:
            self.places.table(self.block_offset(index), overlap.REFCOUNT_BLOCK, size)
        if self._dirty_l1 or self._l1_moved:
            self.places.table(self.header.l1_offset, overlap.ACTIVE_L1, size)
        if self._dirty_table or self._table_moved:
            self.places.table(self.header.refcount_table_offset, overlap.REFCOUNT_TABLE, size)

    async def mark_corrupt(self) -> None:
        """Say on the disk that the image is damaged, and write nothing more. OSError."""
        self.broken = True
        self.l2.clear()
        for each in (self._dirty_blocks, self._dirty_table, self._dirty_l1, self._freed, self._held):
            each.clear()
        self._header_dirty = self._table_moved = self._l1_moved = False
        self.header.incompatible |= CORRUPT
        await self.write_header()

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
