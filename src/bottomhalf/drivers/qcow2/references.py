# SPDX-License-Identifier: Apache-2.0
"""Who refers to which cluster of an image: counted anew, from the header on.

Nothing that is read here is believed. An image may name one table a million times, name tables that overlap, or say
that a table lies a petabyte away; none of that may take longer, or more memory, than an honest image of that size:

* counts are kept in pages, which exist where something is counted;
* a table that several entries name is read once, and what is found there counts that many times;
* L1 tables of snapshots that together are much larger than what the file stores overlap, or are in holes, and so are
  bitmap tables: the check ends;
* tables that do not begin where a cluster does are read as QEMU reads them, but not more than a few.

What is found is worded as QEMU words it, because scripts match on that.

Clause: all, for it looks at everything.
Invariant: time and memory follow what the file stores, not what it says.
Test: tests/drivers/qcow2/test_hostile.py
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Final

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import bitmaps, layout, refcounts, tables
from bottomhalf.drivers.qcow2.keeping import co_read_directory
from bottomhalf.drivers.qcow2.layout import COMPRESSED, COPIED, L1_BYTES_MAX, OFFSET_MASK, SUBCLUSTERS, ZERO
from bottomhalf.host.protocol import ZERO as ZEROES

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.findings import CheckResult
    from bottomhalf.drivers.qcow2.metadata import Metadata
    from bottomhalf.drivers.qcow2.snapshots import Snapshot

PAGE_BITS: Final = 8  # of counts: 256 of them, 1 KiB
PAGE_ENTRIES: Final = 1 << PAGE_BITS
NONE: Final = array("I", [0]) * PAGE_ENTRIES
UNALIGNED_TABLES_MAX: Final = 64  # L2 tables that are read although they cannot be
CHUNK_BYTES: Final = 1 << 20  # of a table that are read at a time
# Of L1 tables of snapshots, and of bitmap tables, that are read, beside what the file really stores: four times that,
# as file systems compress. An honest disk of 64 TB has 1 MiB of L1 table, in clusters of 64 KiB. Where L2 tables take
# more than that it is asked whether they are in holes, before they are read.
TABLE_BYTES_FREE: Final = 8 << 20
TABLE_SHARE: Final = 4
BEYOND_MAX: Final = 1 << 16
_ALL: Final = (1 << SUBCLUSTERS) - 1


class Unfinished(Exception):
    """The check cannot go on; the result says why."""


class References:
    """The counts of one image's clusters, and the walk that finds them."""

    def __init__(self, metadata: Metadata, result: CheckResult, *, fix: bool) -> None:
        self._metadata = metadata
        self._header = header = metadata.header
        self._mapping = metadata.mapping
        self._result = result
        self._fix = fix  # preallocated clusters that are not aligned become zero clusters
        self._bits = header.cluster_bits
        self._file_bytes = metadata.file.size
        self._most = min(refcounts.refcount_max(header.refcount_order), (1 << 32) - 1)
        self._pages: dict[int, array[int]] = {}
        self._unaligned = 0
        self._room = 0
        self._l2_room = self._table_room()
        self.beyond: set[int] = set()  # clusters behind the end that something refers to nevertheless
        self.empty: set[int] = set()  # places of L2 tables without entries
        self.rebuild = False  # the counters on the disk cannot be mended one by one

    # -- counts -------------------------------------------------------------------------------------------------

    @property
    def clusters(self) -> int:
        """Of the file."""
        return -(-self._file_bytes >> self._bits)

    def of(self, cluster: int) -> int:
        page = self._pages.get(cluster >> PAGE_BITS)
        return 0 if page is None else page[cluster & (PAGE_ENTRIES - 1)]

    def counted(self) -> Iterator[tuple[int, array[int]]]:
        """(first cluster, counts) of all pages, in order."""
        for number in sorted(self._pages):
            yield number << PAGE_BITS, self._pages[number]

    def some(self, first: int, count: int) -> array[int]:
        """The counts of a page, or of a part of it."""
        page = self._pages.get(first >> PAGE_BITS, NONE)
        at = first & (PAGE_ENTRIES - 1)
        return page[at : at + count]

    def counts_in(self, first: int, count: int) -> bool:
        """Whether something is counted among so many clusters."""
        return any(number in self._pages for number in range(first >> PAGE_BITS, (first + count - 1 >> PAGE_BITS) + 1))

    @property
    def end(self) -> int:
        """Clusters that the file has or that are counted behind it (a last one that is there in part)."""
        last = max(self._pages, default=0)
        known = max((n + 1 for n, count in enumerate(self._pages.get(last, ())) if count), default=0)
        return max(self.clusters, (last << PAGE_BITS) + known)

    def set(self, cluster: int, count: int) -> None:
        page = self._pages.get(cluster >> PAGE_BITS)
        if page is None:
            page = self._pages[cluster >> PAGE_BITS] = NONE[:]
        page[cluster & (PAGE_ENTRIES - 1)] = count

    def _wrong(self, text: str, times: int = 1) -> None:
        self._result.corruptions += times
        self._result.say(text)

    def refer(self, offset: int, length: int, times: int = 1) -> bool:
        """So many references to bytes of the file; whether they can be. The last cluster of a file may be there in
        part."""
        size = 1 << self._bits
        if length <= 0:
            return True
        if offset + length - self._file_bytes >= size:
            self._wrong(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset "
                f"{offset:#x} size {length:#x}",
                times,
            )
            first = offset >> self._bits
            if first - self.clusters < BEYOND_MAX and len(self.beyond) < BEYOND_MAX:
                self.beyond.update(range(first, min((offset + length - 1 >> self._bits) + 1, first + BEYOND_MAX)))
            return False
        most = self._most
        for cluster in range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1):
            count = self.of(cluster) + times
            if count > most:
                self._wrong(f"ERROR: overflow cluster offset={cluster << self._bits:#x}", min(count - most, times))
                count = most
            self.set(cluster, count)
        return True

    # -- the walk -----------------------------------------------------------------------------------------------

    async def count(self, snapshots: list[Snapshot], snapshot_table_bytes: int) -> None:
        """Walk through everything that refers to clusters. Unfinished, OSError."""
        header, metadata = self._header, self._metadata
        size = 1 << self._bits
        self.refer(0, size)
        self.refer(header.l1_offset, len(metadata.l1) * 8)
        await self._count_tables(metadata.l1, snapshots)
        self.refer(header.snapshots_offset, snapshot_table_bytes)
        crypto = header.extension(layout.EXTENSION_CRYPTO)
        if crypto is not None and len(crypto) == 16:
            self.refer(int.from_bytes(crypto[:8], "big"), int.from_bytes(crypto[8:], "big"))
        await self._count_bitmaps()
        self.refer(header.refcount_table_offset, header.refcount_table_clusters * size)
        self._count_blocks()

    def _count_blocks(self) -> None:
        for index, entry in enumerate(self._metadata.refcount_table):
            if not entry:
                continue
            offset = entry & ~layout.REFCOUNT_TABLE_RESERVED
            if entry & layout.REFCOUNT_TABLE_RESERVED:
                self._wrong(f"ERROR refcount table entry {index} has reserved bits set")
                self.rebuild = True
            elif offset & ((1 << self._bits) - 1):
                self._wrong(f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted")
                self.rebuild = True
            elif offset >> self._bits >= self.clusters:
                self._wrong(f"ERROR refcount block {index} is outside image")
                self.rebuild = self.rebuild or self._fix
            else:
                self.refer(offset, 1 << self._bits)
                if self.of(offset >> self._bits) != 1:
                    self._wrong(f"ERROR refcount block {index} refcount={self.of(offset >> self._bits)}")
                    self.rebuild = True

    async def _count_tables(self, active: array[int], snapshots: list[Snapshot]) -> None:
        named = Counter(map(self._place_of, filter(None, active)))  # by how many L1 entries
        named.pop(0, None)
        actively = Counter(named) if snapshots else named
        inactive = array("Q")
        self._room = self._table_room()
        for snapshot in snapshots:
            if self._has_l1(snapshot):
                async for entry in self._entries(snapshot.l1_offset, snapshot.l1_size * 8):
                    offset = self._place_of(entry)
                    if not offset or not named[offset] or entry & layout.L1_RESERVED:
                        inactive.append(entry)
                    if offset:
                        named[offset] += 1
        seen: set[int] = set()
        for index, entry in enumerate((*active, *inactive) if inactive else active):
            if entry:
                offset = self._place_of(entry)
                if entry & layout.L1_RESERVED:
                    self._wrong(f"ERROR found L1 entry with reserved bits set: {entry:x}")
                if offset and offset not in seen:
                    seen.add(offset)
                    await self._count_table(offset, named[offset], actively.get(offset, 0))
                elif not offset and entry & OFFSET_MASK:
                    await self._count_table(entry & OFFSET_MASK, 1, int(index < len(active)))

    def _place_of(self, entry: int) -> int:
        """Where an L2 table lies, if one can; else 0."""
        offset = entry & OFFSET_MASK
        return 0 if offset & self._mapping.cluster_mask or offset >= self._file_bytes else offset

    def _table_room(self) -> int:
        """Bytes of tables that may be read."""
        stored = self._metadata.file.allocated_size()
        return TABLE_BYTES_FREE + TABLE_SHARE * (self._file_bytes if stored is None else stored)

    def _has_l1(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot's L1 table can be, and is not behind the end of the file, where there are zeroes."""
        which = f"ERROR snapshot {snapshot.id} ({snapshot.name})"
        if snapshot.l1_offset & ((1 << self._bits) - 1):
            self._wrong(
                f"{which} l1_offset={snapshot.l1_offset:#x}: L1 table is not cluster aligned; "
                "snapshot table entry corrupted"
            )
            return False
        if snapshot.l1_size * 8 > L1_BYTES_MAX:
            self._wrong(f"{which} l1_size={snapshot.l1_size:#x}: L1 table is too large; snapshot table entry corrupted")
            return False
        self._take_room(snapshot.l1_size * 8, "L1 tables of snapshots")
        return self.refer(snapshot.l1_offset, snapshot.l1_size * 8)

    def _take_room(self, length: int, what: str) -> None:
        self._room -= length
        if self._room < 0:
            self._result.give_up(f"ERROR: the {what} are larger than what the file stores")
            raise Unfinished

    async def _entries(self, offset: int, length: int) -> AsyncIterator[int]:
        """The numbers of a table that are not zero. Where the file has a hole nothing is read."""
        metadata, end = self._metadata, min(offset + length, self._file_bytes)
        while offset < end:
            status, count = await metadata.file.co_block_status(offset, min(CHUNK_BYTES, end - offset))
            whole = max(count & ~7, min(8, end - offset))
            if count < 8 or not status & ZEROES:
                for entry in filter(None, tables.unpack(await metadata.read(offset, -(-whole // 8) * 8))):
                    yield entry
            offset += whole

    async def _count_table(self, offset: int, times: int, active: int) -> None:
        """An L2 table that so many L1 entries name, some of them the disk's own."""
        if offset & self._mapping.cluster_mask:
            self._wrong(f"ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted")
            self._unaligned += 1
            if self._unaligned > UNALIGNED_TABLES_MAX:
                self._result.give_up("ERROR: too many L2 tables that are not aligned")
                raise Unfinished
        if not self.refer(offset, 1 << self._bits, times):
            return  # behind the end of the file there are zeroes
        size = self._mapping.cluster_size
        self._l2_room -= size
        if self._l2_room < 0:
            status, count = await self._metadata.file.co_block_status(offset, min(size, self._file_bytes - offset))
            if status & ZEROES and count >= min(size, self._file_bytes - offset):
                self.empty.add(offset)
                return
        table = tables.unpack(await self._metadata.read(offset, size))
        if not any(table):
            self.empty.add(offset)
        elif self._count_l2(table, times, active):
            await self._metadata.write([(offset, tables.pack(table))])

    def _count_l2(self, table: array[int], times: int, active: int) -> bool:
        """What an L2 table refers to, which is named so many times, some of them by the disk's own L1 table. Whether
        it has been mended."""
        mapping, result = self._mapping, self._result
        words, mask, mended, next_host = mapping.words, mapping.cluster_mask, False, 0
        for at in range(0, len(table), words):
            entry, bitmap = table[at], table[at + 1] if words > 1 else 0
            if not entry:
                if bitmap & _ALL:
                    self._wrong("ERROR: Unallocated cluster has non-zero subcluster allocation map", times)
                continue
            if entry & COMPRESSED:
                self._count_compressed(entry, bitmap, at // words, times, active)
                continue
            if entry & layout.L2_RESERVED or (mapping.extended and entry & ZERO):
                self._wrong(f"ERROR found l2 entry with reserved bits set: {entry:x}", times)
            offset = entry & OFFSET_MASK
            if not mapping.has_place(entry):
                if bitmap & _ALL:
                    self._wrong("ERROR: Unallocated cluster has non-zero subcluster allocation map", times)
                continue
            if bitmap & (bitmap >> SUBCLUSTERS) & _ALL:
                text = f"ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
                self._wrong(text, times)
            if offset & mask:
                has_data = bitmap & _ALL if mapping.extended else not entry & ZERO
                what = "Data" if has_data else "Preallocated"
                text = f"offset={offset:x}: {what} cluster is not properly aligned; L2 entry corrupted."
                if self._fix and not has_data:
                    result.say(f"Repairing {text}")
                    result.corruptions_fixed += 1
                    table[at] = 0 if mapping.extended else ZERO
                    if mapping.extended:
                        table[at + 1] = _ALL << SUBCLUSTERS
                    mended = True
                    continue
                self._wrong(f"ERROR {text}", times)
            if active:
                result.allocated_clusters += active
                if next_host and offset != next_host:
                    result.fragmented_clusters += active
                next_host = offset + mapping.cluster_size
            if not mapping.external:
                self.refer(offset, mapping.cluster_size, times)
        return mended

    def _count_compressed(self, entry: int, bitmap: int, index: int, times: int, active: int) -> None:
        result = self._result
        offset, length = self._mapping.squeezed(entry)
        if entry & COPIED:
            text = f"ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            self._wrong(text, times)
            entry &= ~COPIED
        if self._mapping.external:
            self._wrong(f"ERROR compressed cluster {index} with data file, entry={entry:#x}", times)
            return
        if bitmap:
            self._wrong(
                f"ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={entry:#x}", times
            )
            return
        self.refer(offset, length, times)
        result.compressed_clusters += active
        result.allocated_clusters += active
        result.fragmented_clusters += active  # by their nature

    async def _count_bitmaps(self) -> None:
        async def read(offset: int, length: int) -> bytearray:
            if not self.refer(offset, length):
                raise ImageError("the bitmap directory lies behind the end of the file")
            return await self._metadata.read(offset, length)

        try:
            directory = await co_read_directory(read, self._header)
        except ImageError as error:
            self._result.give_up(f"ERROR {error}")
            raise Unfinished from error
        if directory is None:
            return
        self._room = self._table_room()
        for bitmap in directory[0]:
            self._take_room(bitmap.table_size * 8, "bitmap tables")
            if self.refer(bitmap.table_offset, bitmap.table_size * 8):
                async for entry in self._entries(bitmap.table_offset, bitmap.table_size * 8):
                    if bitmaps.data_offset(entry):
                        self.refer(bitmaps.data_offset(entry), 1 << self._bits)
