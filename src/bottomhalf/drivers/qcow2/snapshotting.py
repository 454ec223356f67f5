# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots: other disks that live in the image, made, put in the disk's place, and taken away.

A snapshot is a copy of the L1 table. Everything below is shared with the disk, and so each cluster that the L1 table
leads to, L2 tables and data, is counted once more, and the disk's entries lose their flag COPIED: the next write to
such a cluster goes elsewhere. Nothing of the guest's is copied, however large the disk is.

Each of the three ends with one write of the header, and is there or not there after a crash:

* make: count everything once more and take the flags away, durably; write the L1 copy and the new snapshot table; let
  the header name that table. A crash before leaks the counts. (Between the two halves of the first step check tells of
  flags that do not fit the counts; that is what it does to QEMU's images too, and no write can go wrong there.)
* apply: count what the snapshot has once more; write its L1 table to a new place; let the header name that, with the
  snapshot's size of the disk; then count down what the disk had.
* delete: write a snapshot table without it; let the header name that; then count down. Where a count has become one the
  disk's entry gets its flag back.

Nothing may be on its way to the image meanwhile: a write that was looked up before would land in the snapshot. So these
are called in a drained section, and hold the tables' lock. (QEMU: qcow2_snapshot_create, _goto, _delete.)
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import layout, overlap, refcounts, snapshots, tables
from bottomhalf.drivers.qcow2.counters import FREED_SNAPSHOT
from bottomhalf.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from bottomhalf.drivers.qcow2.snapshots import Snapshot

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
            await self._check_room(metadata.l1)
            taken: list[int] = []
            counted = array("Q")
            try:
                l1_clusters = self._clusters(len(metadata.l1) * 8)
                first = await metadata.allocate_together(l1_clusters)
                taken += range(first, first + l1_clusters)
                made = Snapshot(
                    id=id,
                    name=name,
                    l1_offset=first << mapping.cluster_bits,
                    l1_size=len(metadata.l1),
                    date_s=date_ns // 1_000_000_000 & 0xFFFFFFFF,
                    date_ns=date_ns % 1_000_000_000,
                    vm_clock_ns=vm_clock_ns,
                    vm_state_bytes=vm_state_bytes,
                    disk_bytes=header.size,
                    icount=None,
                )
                where, table_clusters = await self._place_table([*known, made], taken)
                await self._share_disk(counted)
                copy = array("Q", [entry & ~COPIED for entry in metadata.l1])
                await metadata.write([(made.l1_offset, tables.pack(copy)), (where, table_clusters)])
                await metadata.commit(counters=True)
            except BaseException:
                metadata.free_all(taken)
                metadata.free_all(counted)
                with suppress(OSError, ImageError):  # the one that is on its way says enough
                    await metadata.count_down()  # nothing on the disk refers to the snapshot
                    await self._own_again()
                raise
            self._name_table(len(known) + 1, where, known_bytes)
            metadata.places.add(overlap.INACTIVE_L1, made.l1_offset, made.l1_size * 8)
            await metadata.commit(counters=True)
            await self.forget_tables(-(-header.size >> mapping.l1_shift))  # VM state: the snapshot has it now
            await metadata.settle()
            return made

    async def _check_room(self, l1: Iterable[int]) -> None:
        """OSError if what an L1 table leads to cannot be counted once more. To a cluster of several compressed ones it
        leads as often."""
        most = refcounts.refcount_max(self._node.header.refcount_order)
        more: dict[int, int] = {}
        async for cluster in self._clusters_of(l1):
            count = await self._metadata.refcount(cluster)
            if 2 * count > most:  # else there is room for as many as there are already
                more[cluster] = more.get(cluster, 0) + 1
                if count + more[cluster] > most:
                    text = f"a cluster would be used more than {most} times, which cannot be counted"
                    raise OSError(errno.EINVAL, text, self._node.name)

    async def _share_disk(self, counted: array[int]) -> None:
        """Count everything of the disk once more, and note that nothing is its own. In memory, as far as there is
        room."""
        metadata, mapping = self._metadata, self._mapping
        for index, l1_entry in enumerate(metadata.l1):
            if not l1_entry & OFFSET_MASK:
                continue
            await metadata.make_room_for_changes()
            table = await metadata.l2_table(index)
            assert table is not None
            for cluster in self._of_table(table.entries):
                await metadata.refer(cluster)
                counted.append(cluster)
            for n in range(mapping.entries):
                entry = table.entries[n * mapping.words]
                if entry & COPIED:
                    bitmap = table.entries[n * mapping.words + 1] if mapping.extended else 0
                    metadata.set_entry(table, n, entry & ~COPIED, bitmap)
            cluster = (l1_entry & OFFSET_MASK) >> mapping.cluster_bits
            await metadata.refer(cluster)
            counted.append(cluster)
            metadata.set_l1(index, l1_entry & ~COPIED)

    async def forget_tables(self, first: int) -> None:
        """Give back all L2 tables from this one on and what they lead to. With the lock held."""
        metadata, mapping = self._metadata, self._mapping
        for index in range(first, len(metadata.l1)):
            entry = metadata.l1[index] & OFFSET_MASK
            if entry:
                table = await metadata.l2_table(index)
                assert table is not None
                metadata.free_all(self._of_table(table.entries))
                metadata.free(entry >> mapping.cluster_bits)
                metadata.l2.pop(index, None)
                metadata.set_l1(index, 0)

    # -- applying -----------------------------------------------------------------------------------------------

    async def apply(self, snapshot: Snapshot) -> None:
        """Let the disk be what the snapshot is, with its size and its VM state. OSError, ImageError."""
        node, metadata, mapping, header = self._node, self._metadata, self._mapping, self._node.header
        async with metadata.lock:
            await metadata.find_places()
            await metadata.settle()
            size = header.size if snapshot.disk_bytes is None else snapshot.disk_bytes
            if size % layout.SECTOR_BYTES or size < 0:
                raise ImageError(f"snapshot '{snapshot.name}': the disk has {size} bytes")
            wanted = await self._l1_of(snapshot)
            await self._check_room(wanted)
            length = max(len(wanted), -(-size >> mapping.l1_shift), 1)
            clusters = self._clusters(length * 8)
            length = clusters * mapping.cluster_size // 8
            if length * 8 > layout.L1_BYTES_MAX:
                length = layout.L1_BYTES_MAX // 8
            counted = array("Q")
            first = await metadata.allocate_together(clusters)
            try:
                await self._share(wanted, counted)
                before = [cluster async for cluster in self._clusters_of(metadata.l1)]
            except BaseException:
                metadata.free_all(range(first, first + clusters))
                metadata.free_all(counted)
                raise
            metadata.l2.clear()
            node.reader.forget_unpacked()
            metadata.replace_l1([entry & OFFSET_MASK for entry in wanted], length, first)
            metadata.free_all(before)
            header.size = size
            metadata.header_changed()
            await metadata.settle()
        node.refresh_size()

    async def _share(self, l1: Iterable[int], counted: array[int]) -> None:
        """Count everything below an L1 table once more; no entry says that it is its own."""
        metadata, mapping = self._metadata, self._mapping
        for l1_entry in l1:
            offset = l1_entry & OFFSET_MASK
            if not offset:
                continue
            await metadata.make_room_for_changes()
            entries = tables.unpack(await metadata.read(offset, mapping.cluster_size))
            for cluster in [*self._of_table(entries), offset >> mapping.cluster_bits]:
                await metadata.refer(cluster)
                counted.append(cluster)
            flagged = [at for at in range(0, len(entries), mapping.words) if entries[at] & COPIED]
            if flagged:  # it does not matter to a snapshot, but it will to the disk
                for at in flagged:
                    entries[at] &= ~COPIED
                await metadata.write([(offset, tables.pack(entries))])

    # -- deleting -----------------------------------------------------------------------------------------------

    async def delete(self, snapshot: Snapshot) -> None:
        """Take a snapshot away. OSError, ImageError."""
        metadata = self._metadata
        async with metadata.lock:
            known, known_bytes = await self._read()
            await metadata.find_places()
            await metadata.settle()
            l1 = await self._l1_of(snapshot)
            unused = [cluster async for cluster in self._clusters_of(l1)]
            first = snapshot.l1_offset >> self._mapping.cluster_bits
            unused += range(first, first + self._clusters(snapshot.l1_size * 8))
            left = [each for each in known if each.id != snapshot.id]
            taken: list[int] = []
            try:
                where, data = await self._place_table(left, taken)
                if left:
                    await metadata.write([(where, data)])
            except BaseException:
                metadata.free_all(taken)
                raise
            self._name_table(len(left), where, known_bytes)
            metadata.free_all(unused, FREED_SNAPSHOT)
            await metadata.commit(counters=True)
            await self._own_again()
            await metadata.settle()

    async def _own_again(self) -> None:
        """Entries of the disk that lead to what nobody else uses get their flag."""
        metadata, mapping = self._metadata, self._mapping
        for index, l1_entry in enumerate(metadata.l1):
            offset = l1_entry & OFFSET_MASK
            if not offset:
                continue
            await metadata.make_room_for_changes()
            table = await metadata.l2_table(index)
            assert table is not None
            for n in range(mapping.entries):
                entry = table.entries[n * mapping.words]
                if entry & (COPIED | COMPRESSED) or not mapping.has_place(entry):
                    continue
                if await metadata.refcount((entry & OFFSET_MASK) >> mapping.cluster_bits) == 1:
                    bitmap = table.entries[n * mapping.words + 1] if mapping.extended else 0
                    metadata.set_entry(table, n, entry | COPIED, bitmap)
            if not l1_entry & COPIED and await metadata.refcount(offset >> mapping.cluster_bits) == 1:
                metadata.set_l1(index, l1_entry | COPIED)

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

    async def _clusters_of(self, l1: Iterable[int]) -> AsyncIterator[int]:
        """Every cluster that an L1 table leads to, L2 tables too. What is written counts, so settle before."""
        metadata, mapping = self._metadata, self._mapping
        for entry in l1:
            offset = entry & OFFSET_MASK
            if offset & mapping.cluster_mask:
                raise ImageError(f"L2 table offset {offset:#x} unaligned")
            if offset:
                yield offset >> mapping.cluster_bits
                for cluster in self._of_table(tables.unpack(await metadata.read(offset, mapping.cluster_size))):
                    yield cluster

    async def _place_table(self, entries: list[Snapshot], taken: list[int]) -> tuple[int, bytes]:
        """Room for a snapshot table, noted in ``taken``: its offset (0 for an empty one), and its bytes."""
        if not entries:
            return 0, b""
        data = snapshots.pack(entries, self._node.header.size)
        if len(data) > layout.SNAPSHOT_TABLE_BYTES_MAX:
            raise OSError(errno.EFBIG, "the snapshot table would be too large", self._node.name)
        count = self._clusters(len(data))
        first = await self._metadata.allocate_together(count)
        taken += range(first, first + count)
        return first << self._mapping.cluster_bits, data

    def _name_table(self, count: int, where: int, old_bytes: int) -> None:
        """From the next commit on the header names this table, and the old one is not used."""
        header, metadata = self._node.header, self._metadata
        if old_bytes:
            first = header.snapshots_offset >> self._mapping.cluster_bits
            metadata.free_all(range(first, first + self._clusters(old_bytes)))
        header.snapshot_count, header.snapshots_offset = count, where
        if where:
            metadata.places.add(overlap.SNAPSHOT_TABLE, where)
        metadata.header_changed()
