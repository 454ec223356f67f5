# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots: other disks that live in the image, made, put in the disk's place, and taken away.

A snapshot is an L1 table of its own. The data below it are shared with the disk, and so each of their clusters is
counted once more, and the disk's entries lose their flag COPIED: the next write to such a cluster goes elsewhere.
Nothing of the guest's is copied, however large the disk is.

Each of the three ends with one write of the header, and is there or not there after a crash, which leaks clusters at
worst:

* make: the snapshot gets the disk's L1 and L2 tables as they are; the disk gets new ones, without the flags, and new
  refcount blocks, all named by that write (see ``switching``).
* apply: count what the snapshot has once more; write its L1 table to a new place; let the header name that, with the
  snapshot's size of the disk; then count down what the disk had.
* delete: write a snapshot table without it, refcount blocks in which what it shared is counted once less, and L2 tables
  and L1 of the disk in which entries have got their flag back where the count has become one; let the header name all
  of these. Then count down what it had alone.

L2 tables are not shared with the disk: one more is written for each when a snapshot is made, 8 bytes for each cluster.
(They were, until a crash between the counters and the flags was found to leave entries that check complains of.) Those
in images of others may be.

Nothing may be on its way to the image meanwhile: a write that was looked up before would land in the snapshot. So these
are called in a drained section, and hold the tables' lock. (QEMU: qcow2_snapshot_create, _goto, _delete.)

Clause: "Snapshots".
Invariant: the disk and each snapshot read as they should, after whatever fails and whenever the power goes.
Test: tests/drivers/qcow2/test_snapshots.py
"""

from __future__ import annotations

import errno
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import give_way
from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import layout, overlap, refcounts, snapshots, tables
from bottomhalf.drivers.qcow2.counters import FREED_OTHER, FREED_SNAPSHOT
from bottomhalf.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from bottomhalf.drivers.qcow2.snapshots import Snapshot
from bottomhalf.drivers.qcow2.switching import Switch
from bottomhalf.drivers.qcow2.tally import Tally

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.node import Qcow2Node

ID_BYTES_MAX: Final = 127  # QEMU's
NAME_BYTES_MAX: Final = 255


class Snapshots:
    """The snapshots of one open image. Home thread; all but ``read`` in a drained section."""

    def __init__(self, node: Qcow2Node) -> None:
        self._node = node
        self._metadata = node.metadata
        self._mapping = node.mapping

    # -- looking ------------------------------------------------------------------------------------------------

    async def read(self) -> list[Snapshot]:
        """All snapshots, the oldest first. OSError, ImageError."""
        return (await self._read())[0]

    async def _read(self) -> tuple[list[Snapshot], int]:
        """The snapshots, and how many bytes their table takes."""
        return await snapshots.co_read(self._metadata)

    # -- making -------------------------------------------------------------------------------------------------

    async def create(
        self, name: str, *, id: str | None = None, date_ns: int, vm_clock_ns: int = 0, vm_state_bytes: int = 0
    ) -> Snapshot:
        """Make a snapshot of the disk as it is, and of the VM state that was saved before; that is not the disk's any
        more then. OSError: EEXIST for an id that is there, EINVAL for a name that is too long, and where a cluster
        cannot be counted once more, EFBIG for one snapshot too many."""
        node, metadata, mapping, header = self._node, self._metadata, self._mapping, self._node.header
        if len(name.encode("utf-8", "surrogateescape")) > NAME_BYTES_MAX:
            raise OSError(errno.EINVAL, f"the name of a snapshot has at most {NAME_BYTES_MAX} bytes", node.name)
        if header.external:
            raise OSError(errno.ENOTSUP, "an image with an external data file has no place for snapshots", node.name)
        async with metadata.lock:
            known, known_bytes = await self._read()
            if id is None:
                id = str(max([int(each.id) for each in known if each.id.isdecimal()], default=0) + 1)
            if not 0 < len(id.encode()) <= ID_BYTES_MAX or any(each.id == id for each in known):
                raise OSError(errno.EEXIST, f"a snapshot with the id {id} is there already", node.name)
            if len(known) >= layout.SNAPSHOTS_MAX:
                raise OSError(errno.EFBIG, f"an image has at most {layout.SNAPSHOTS_MAX} snapshots", node.name)
            await metadata.find_places()
            await metadata.settle()
            made = Snapshot(
                id=id,
                name=name,
                l1_offset=header.l1_offset,
                l1_size=header.l1_size,
                date_s=date_ns // 1_000_000_000 & 0xFFFFFFFF,
                date_ns=date_ns % 1_000_000_000,
                vm_clock_ns=vm_clock_ns,
                vm_state_bytes=vm_state_bytes,
                disk_bytes=header.size,
                icount=None,
            )
            # VM state lies behind the disk's end: the snapshot has it from now on, and the disk has not.
            disk = metadata.l1[: -(-header.size >> mapping.l1_shift)]
            blocks = await self._blocks_of(disk)
            switch = Switch(metadata)
            try:
                where = await self._write_table([*known, made], switch)
                first_l1 = await switch.take(self._clusters(len(metadata.l1) * 8)) if metadata.l1 else 0
                places = [await switch.take(1) if entry & OFFSET_MASK else 0 for entry in disk]
                await switch.reserve(blocks)
                l1 = array("Q", [0]) * len(metadata.l1)
                for index, place in enumerate(places):
                    if place:
                        await self._split(disk[index] & OFFSET_MASK, place, switch)
                        l1[index] = place << mapping.cluster_bits | COPIED
                fields = {"snapshot_count": len(known) + 1, "snapshots_offset": where}
                await switch.turn(l1, first_l1, fields, self._old_table(known_bytes), forward=True)
            except BaseException:
                switch.give_up()
                raise
            metadata.places.add(overlap.SNAPSHOT_TABLE, where)
            metadata.places.add(overlap.INACTIVE_L1, made.l1_offset, made.l1_size * 8)
            await metadata.settle()
            return made

    async def _blocks_of(self, l1: Iterable[int]) -> set[int]:
        """The refcount blocks of the data below an L1 table. OSError, ImageError as in _check_room()."""
        header = self._node.header
        found: set[int] = set()
        per_block = refcounts.entries_of_block(header.cluster_bits, header.refcount_order)
        more: Counter[int] = Counter()
        for entry in l1:
            if entry & OFFSET_MASK:
                clusters = self._of_table(await self._read_table(entry & OFFSET_MASK))
                await self._check_room(clusters, more)
                found.update(cluster // per_block for cluster in clusters)
        return found

    async def _check_room(self, clusters: Iterable[int], more: Counter[int]) -> None:
        """OSError if what a table leads to cannot be counted once more; ImageError if it is not counted. To a cluster
        of several compressed ones tables lead as often: ``more`` is how often they did so far."""
        most = refcounts.refcount_max(self._node.header.refcount_order)
        for cluster in clusters:
            count = await self._metadata.refcount(cluster)
            if not count:
                raise ImageError(f"cluster {cluster} is in use and not counted; the image has to be repaired")
            if 2 * count > most:  # else there is room for as many as there are already
                more[cluster] += 1
                if count + more[cluster] > most:
                    text = f"a cluster would be used more than {most} times, which cannot be counted"
                    raise OSError(errno.EINVAL, text, self._node.name)

    async def _split(self, offset: int, place: int, switch: Switch) -> None:
        """The disk gets a copy of the L2 table, which is the snapshot's: all below belongs to both."""
        entries = await self._read_table(offset)
        for cluster in self._of_table(entries):
            await switch.count(cluster, 1)
        for at in range(0, len(entries), self._mapping.words):
            entries[at] &= ~COPIED
        await switch.write(place, tables.pack(entries))

    async def forget_tables(self, first: int) -> None:
        """Give back all L2 tables from this one on and what they lead to. With the lock held. OSError, ImageError."""
        metadata, mapping = self._metadata, self._mapping
        seen: set[int] = set()
        for index in range(first, len(metadata.l1)):
            entry = metadata.l1[index] & OFFSET_MASK
            if entry in seen:
                raise ImageError(f"L2 table offset {entry:#x} is there twice (L1 index: {index:#x})")
            if entry:
                seen.add(entry)
                await metadata.make_room_for_changes()
                table = await metadata.l2_table(index)
                assert table is not None
                metadata.free_all(self._of_table(table.entries))
                metadata.free(entry >> mapping.cluster_bits)
                metadata.l2.pop(index, None)
                metadata.set_l1(index, 0)
                self._node.reader.forget_unpacked()  # its place may get other content

    # -- applying -----------------------------------------------------------------------------------------------

    async def apply(self, snapshot: Snapshot) -> None:
        """Let the disk be what the snapshot is, with its size and its VM state. OSError, ImageError."""
        node, metadata, mapping, header = self._node, self._metadata, self._mapping, self._node.header
        if node.bitmaps:  # they could not say what has changed
            raise OSError(errno.EBUSY, "Device has active dirty bitmaps", node.name)
        async with metadata.lock:
            await metadata.find_places()
            await metadata.settle()
            size = header.size if snapshot.disk_bytes is None else snapshot.disk_bytes
            if size % layout.SECTOR_BYTES or size < 0:
                raise ImageError(f"snapshot '{snapshot.name}': the disk has {size} bytes")
            wanted = await self._l1_of(snapshot)
            more: Counter[int] = Counter()
            async for clusters in self._clusters_of(wanted):
                await self._check_room(clusters, more)
            length = max(len(wanted), -(-size >> mapping.l1_shift), 1)
            if length * 8 > layout.L1_BYTES_MAX:
                raise ImageError(f"snapshot '{snapshot.name}': a disk of {size} bytes needs too large an L1 table")
            places = self._clusters(length * 8)
            length = min(places * mapping.cluster_size, layout.L1_BYTES_MAX) // 8
            counted = Tally()
            first = await metadata.allocate_together(places)
            try:
                await self._share(wanted, counted)
                before = await self._tally(metadata.l1)
            except BaseException:
                metadata.free_all(range(first, first + places))
                metadata.free_all(counted)
                raise
            metadata.l2.clear()
            node.reader.forget_unpacked()
            metadata.replace_l1([entry & OFFSET_MASK for entry in wanted], length, first)
            header.size = size
            metadata.header_changed()
            try:
                await self._forget(before, FREED_OTHER)
            finally:  # in memory it is so, and the next commit goes on
                node.refresh_size()

    async def _share(self, l1: Iterable[int], counted: Tally) -> None:
        """Count everything below an L1 table once more; no entry says that it is its own."""
        metadata, mapping = self._metadata, self._mapping
        for l1_entry in l1:
            offset = l1_entry & OFFSET_MASK
            if not offset:
                continue
            await metadata.make_room_for_changes()
            entries = await self._read_table(offset)
            for cluster in [*self._of_table(entries), offset >> mapping.cluster_bits]:
                await metadata.refer(cluster)
                counted.add([cluster])
            flagged = [at for at in range(0, len(entries), mapping.words) if entries[at] & COPIED]
            if flagged:  # it does not matter to a snapshot, but it will to the disk
                for at in flagged:
                    entries[at] &= ~COPIED
                await metadata.write([(offset, tables.pack(entries))])

    # -- deleting -----------------------------------------------------------------------------------------------

    async def delete(self, snapshot: Snapshot) -> None:
        """Take a snapshot away. OSError (ENOENT: it is not there any more), ImageError."""
        metadata, mapping, header = self._metadata, self._mapping, self._node.header
        async with metadata.lock:
            known, known_bytes = await self._read()
            # In a damaged image others may have its id, and they stay.
            same = [(each.id, each.name, each.l1_offset) for each in known]
            try:
                place = same.index((snapshot.id, snapshot.name, snapshot.l1_offset))
            except ValueError:
                text = f"there is no snapshot '{snapshot.name}' with the id {snapshot.id}"
                raise OSError(errno.ENOENT, text, self._node.name) from None
            await metadata.find_places()
            await metadata.settle()
            wanted = await self._l1_of(snapshot)
            gone = await self._tally(wanted)
            first = snapshot.l1_offset >> mapping.cluster_bits
            gone.add(range(first, first + self._clusters(snapshot.l1_size * 8)))
            per_block = refcounts.entries_of_block(header.cluster_bits, header.refcount_order)
            unused, shared, single, blocks = Tally(), Tally(), Tally(), set[int]()
            for piece in gone.pieces():
                await give_way()
                for cluster, times in piece:
                    others = await metadata.refcount(cluster) - times
                    (shared if others > 0 else unused).add([cluster] * times)
                    if others > 0:
                        blocks.add(cluster // per_block)
                    if others == 1:
                        single.add([cluster])
            left = list(known)
            left.pop(place)
            switch = Switch(metadata)
            try:
                where = await self._write_table(left, switch)
                l1, replaced, owned = await self._own_again(single, switch)
                changed = l1 != metadata.l1
                first_l1 = await switch.take(self._clusters(len(l1) * 8)) if changed else 0
                await switch.reserve(blocks)
                for piece in shared.pieces():
                    await give_way()
                    for cluster, times in piece:
                        await switch.count(cluster, -times)
                before = [*self._old_table(known_bytes), *replaced]
                if changed:
                    first = header.l1_offset >> mapping.cluster_bits
                    before += range(first, first + self._clusters(header.l1_size * 8))
                fields = {"snapshot_count": len(left), "snapshots_offset": where}
                await switch.turn(l1, first_l1, fields, before, forward=False)
            except BaseException:
                switch.give_up()
                raise
            metadata.places.add(overlap.SNAPSHOT_TABLE, where)
            for offset in owned:
                metadata.places.own(offset)
            await self._forget(unused, FREED_SNAPSHOT)

    async def _own_again(self, single: Tally, switch: Switch) -> tuple[array[int], list[int], list[int]]:
        """Entries of the disk that lead to clusters which nobody else uses from then on get their flag, in new tables.
        The L1 table that leads to those, the places of the old ones, and the offsets of tables that are the disk's
        alone from then on."""
        metadata, mapping = self._metadata, self._mapping
        l1, replaced, owned = array("Q", metadata.l1), [], []
        for index, l1_entry in enumerate(metadata.l1):
            offset = l1_entry & OFFSET_MASK
            if not offset:
                continue
            entries, changed = await self._read_table(offset), False
            for at in range(0, len(entries), mapping.words):
                entry = entries[at]
                if entry & (COPIED | COMPRESSED) or not mapping.has_place(entry):
                    continue
                cluster = (entry & OFFSET_MASK) >> mapping.cluster_bits
                if cluster in single:
                    entries[at] |= COPIED
                    changed = True
            cluster = offset >> mapping.cluster_bits
            if changed:
                place = await switch.take(1)
                await switch.write(place, tables.pack(entries))
                replaced.append(cluster)
                l1[index] = place << mapping.cluster_bits | COPIED
            elif cluster in single:
                l1[index] = l1_entry | COPIED
                owned.append(offset)
        return l1, replaced, owned

    # -- parts --------------------------------------------------------------------------------------------------

    def _clusters(self, length: int) -> int:
        return -(-length >> self._mapping.cluster_bits)

    async def _l1_of(self, snapshot: Snapshot) -> array[int]:
        """The snapshot's L1 table, checked."""
        l1 = tables.unpack(await self._metadata.read(snapshot.l1_offset, snapshot.l1_size * 8))
        for index, entry in enumerate(l1):
            if entry & layout.L1_RESERVED or entry & OFFSET_MASK & self._mapping.cluster_mask:
                raise ImageError(
                    f"snapshot '{snapshot.name}': L2 table offset {entry & OFFSET_MASK:#x} unaligned "
                    f"(L1 index: {index:#x})"
                )
        for one, next in pairwise(sorted(entry & OFFSET_MASK for entry in l1)):
            if one == next != 0:  # a small image would lead to billions of clusters
                raise ImageError(f"snapshot '{snapshot.name}': L2 table offset {one:#x} is there twice")
        return l1

    def _of_table(self, entries: array[int]) -> list[int]:
        """The clusters of the image that an L2 table leads to, as often as it does. ImageError."""
        if self._mapping.external:
            return []  # they are another file's
        mapping = self._mapping
        found: list[int] = []
        for at in range(0, len(entries), mapping.words):
            entry = entries[at]
            if not entry:
                continue
            mapping.check_entry(entry, entries[at + 1] if mapping.extended else 0)
            if entry & COMPRESSED:
                offset, length = mapping.squeezed(entry)
                found += range(offset >> mapping.cluster_bits, ((offset + length - 1) >> mapping.cluster_bits) + 1)
            elif entry & OFFSET_MASK:
                found.append((entry & OFFSET_MASK) >> mapping.cluster_bits)
        return found

    async def _tally(self, l1: Iterable[int]) -> Tally:
        """Every cluster that an L1 table leads to. What is written counts, so settle before. OSError, ImageError."""
        found = Tally()
        async for clusters in self._clusters_of(l1):
            found.add(clusters)
        return found

    async def _forget(self, clusters: Tally, why: int) -> None:
        """Count them down, as often as they are there, and make all durable, many at a time. OSError: in memory it is
        so, and the next commit goes on."""
        metadata = self._metadata
        rest = iter(clusters)
        try:
            while some := array("Q", islice(rest, metadata.freed_max)):
                metadata.free_all(some, why)
                await metadata.commit(counters=True)
            await metadata.settle()
        finally:
            metadata.free_all(rest, why)

    async def _clusters_of(self, l1: Iterable[int]) -> AsyncIterator[list[int]]:
        """The clusters that each L2 table of an L1 table leads to, and its own."""
        for entry in l1:
            offset = entry & OFFSET_MASK
            if offset:
                entries = await self._read_table(offset)
                yield [offset >> self._mapping.cluster_bits, *self._of_table(entries)]

    async def _read_table(self, offset: int) -> array[int]:
        """An L2 table as it is written. OSError, ImageError."""
        if offset & self._mapping.cluster_mask:
            raise ImageError(f"L2 table offset {offset:#x} unaligned")
        return tables.unpack(await self._metadata.read(offset, self._mapping.cluster_size))

    async def _write_table(self, entries: list[Snapshot], switch: Switch) -> int:
        """Write a snapshot table to a new place: its offset, 0 for an empty one."""
        if not entries:
            return 0
        data = snapshots.pack(entries, self._node.header.size)
        if len(data) > layout.SNAPSHOT_TABLE_BYTES_MAX:
            raise OSError(errno.EFBIG, "the snapshot table would be too large", self._node.name)
        first = await switch.take(self._clusters(len(data)))
        await switch.write(first, data)
        return first << self._mapping.cluster_bits

    def _old_table(self, length: int) -> range:
        """The clusters of the snapshot table that the header names now, which has so many bytes."""
        first = self._node.header.snapshots_offset >> self._mapping.cluster_bits
        return range(first, first + self._clusters(length))
