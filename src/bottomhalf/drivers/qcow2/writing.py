# SPDX-License-Identifier: Apache-2.0
"""Writes that change tables: allocation, copying on write, zeroes, discards.

All of a batch is prepared first: clusters are allocated side by side, what a cluster held before is read for its parts
that are not written. Then the data go to the file as one list, and when they are there the tables are changed, in
memory; a flush makes it durable (see ``metadata``). A reader meanwhile finds the old content, which is right: nobody
has been told that the write is done. Two writes of a batch to one new cluster come one after the other.

A cluster that was never written needs no zeroes around the data: behind the end of a file there are zeroes.

Clause: "Cluster mapping".
Invariant: a reader finds the old content or the new, and no entry refers to a cluster whose data are not there.
Test: tests/drivers/qcow2/test_races.py
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.drivers.qcow2.counters import FREED_OTHER, FREED_REQUEST
from bottomhalf.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, SUBCLUSTERS, ZERO
from bottomhalf.drivers.qcow2.tables import UNALLOCATED, ZEROES
from bottomhalf.host.request import FUA, MAY_UNMAP, NO_FALLBACK, WRITE, Request

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.node import Qcow2Node

_ALL: Final = (1 << SUBCLUSTERS) - 1  # subclusters of a bitmap half


class _Batch:
    """Data that are ready to be written, and the entries to be set when they are."""

    __slots__ = ("clusters", "fresh", "guests", "links", "padded", "pieces")

    def __init__(self) -> None:
        self.pieces: list[tuple[int, Any]] = []
        self.guests: list[int] = []  # where the guest has them
        self.links: list[tuple[int, int, int]] = []  # guest cluster, entry, bitmap
        self.padded = False  # some have around them what was there before
        self.clusters: set[int] = set()  # guest clusters among the links
        self.fresh: set[int] = set()  # those of them whose places nothing refers to yet


class Writer:
    """The changes that guests make to an image. Everything that changes a table holds the tables' lock."""

    def __init__(self, node: Qcow2Node) -> None:
        self._node = node
        self._metadata = node.metadata
        self._mapping = node.mapping
        self.hides = 0  # bytes of a backing file that is yet to come, and must not be seen through zeroes

    # -- writes -------------------------------------------------------------------------------------------------

    async def co_write(self, requests: list[Request]) -> None:
        """Write all of a batch. OSError, ImageError."""
        metadata = self._metadata
        async with metadata.lock:
            await metadata.make_room_for_changes()
            batch = _Batch()
            try:
                for request in requests:
                    await self._prepare(request.offset, request.buffer, batch)
                await self._carry_out(batch)
            except BaseException:
                self._forget(batch)
                raise
            if any(request.flags & FUA for request in requests):
                await metadata.commit()

    async def _prepare(self, offset: int, data: memoryview, batch: _Batch) -> None:
        metadata, mapping = self._metadata, self._mapping
        at = 0
        while at < len(data):
            guest = offset + at
            cluster = guest >> mapping.cluster_bits
            if cluster in batch.clusters:
                await self._carry_out(batch)
            entry, bitmap = await self.entry(cluster)
            metadata.check_entries(guest >> mapping.l1_shift)
            inside = guest & mapping.cluster_mask
            length = min(mapping.cluster_size - inside, len(data) - at)
            owned = metadata.l1[guest >> mapping.l1_shift] & COPIED and entry & COPIED and not entry & COMPRESSED
            if owned and mapping.has_place(entry):
                await self._into(cluster, entry, bitmap, inside, data[at : at + length], batch)
                at += length
                continue
            old = await self._unowned(cluster, -(-(inside + len(data) - at) >> mapping.cluster_bits), batch)
            if mapping.external:  # a cluster lies there where the guest has it; what is there now, nobody knows
                first, got, virgin = cluster, len(old), False
            else:
                first, got, virgin = await metadata.allocate(len(old))
            batch_end = min(len(data) - at, (got << mapping.cluster_bits) - inside)
            await self._new(cluster, old[:got], first, virgin, inside, data[at : at + batch_end], batch)
            at += batch_end

    async def entry(self, cluster: int) -> tuple[int, int]:
        """The L2 entry of a guest cluster and its bitmap, checked."""
        mapping = self._mapping
        table = await self._metadata.l2_table(cluster << mapping.cluster_bits >> mapping.l1_shift)
        if table is None:
            return 0, 0
        at = (cluster & (mapping.entries - 1)) * mapping.words
        entry, bitmap = table.entries[at], table.entries[at + 1] if mapping.extended else 0
        mapping.check_entry(entry, bitmap)
        return entry, bitmap

    async def _unowned(self, cluster: int, most: int, batch: _Batch) -> list[tuple[int, int]]:
        """The entries of the guest clusters that need new places, from this one on, at most to the table's end."""
        mapping = self._mapping
        most = min(most, mapping.entries - (cluster & (mapping.entries - 1)))
        found = [await self.entry(cluster)]
        while len(found) < most and cluster + len(found) not in batch.clusters:
            entry, bitmap = await self.entry(cluster + len(found))
            if entry & COPIED and mapping.has_place(entry) and not entry & COMPRESSED:
                break
            found.append((entry, bitmap))
        return found

    async def _into(
        self, cluster: int, entry: int, bitmap: int, inside: int, data: memoryview, batch: _Batch
    ) -> None:
        """Write to a cluster that is the guest's own; parts of it may be without content yet."""
        mapping = self._mapping
        host = entry & OFFSET_MASK
        if not mapping.extended and not entry & ZERO:
            batch.pieces.append((host + inside, data))
            batch.guests.append((cluster << mapping.cluster_bits) + inside)
            return
        start, end = self._units(inside, len(data))
        whole = data
        touched = self._bits(start, end)
        if not mapping.extended or bitmap & touched != touched:
            if mapping.extended:
                # Nothing is put around the data where somebody may be writing: what has content already is written
                # without the lock.
                unit = 1 << mapping.subcluster_bits
                if bitmap & self._bits(start, start + unit):
                    start = inside
                if bitmap & self._bits(end - unit, end):
                    end = inside + len(data)
            whole = await self._filled(cluster, start, end, inside, data, zeroes=True)
            batch.padded = batch.padded or whole is not data
        else:
            start = inside
        batch.pieces.append((host + start, whole))
        batch.guests.append((cluster << mapping.cluster_bits) + start)
        if mapping.extended:
            link = entry, (bitmap | touched) & ~(touched << SUBCLUSTERS)
        else:
            link = entry & ~ZERO, 0
        if link != (entry, bitmap):
            batch.links.append((cluster, *link))
            batch.clusters.add(cluster)

    async def _new(
        self,
        cluster: int,
        entries: list[tuple[int, int]],
        first: int,
        virgin: bool,
        inside: int,
        data: memoryview,
        batch: _Batch,
    ) -> None:
        """Write to clusters that were just allocated, side by side; ``entries`` say what was there before."""
        mapping = self._mapping
        bits, size, count = mapping.cluster_bits, mapping.cluster_size, len(entries)
        for n, (old, bitmap) in enumerate(entries):
            if mapping.extended and not old & OFFSET_MASK and not old & COMPRESSED:
                part_start = inside if n == 0 else 0
                part_end = min(size, inside + len(data) - n * size)
                touched = self._bits(*self._units(part_start, part_end - part_start))
                bitmap = (bitmap | touched) & ~(touched << SUBCLUSTERS)
            else:
                bitmap = _ALL if mapping.extended else 0
            batch.links.append((cluster + n, (first + n) << bits | COPIED, bitmap))
            batch.clusters.add(cluster + n)
            batch.fresh.add(cluster + n)
        start, end = 0, count * size
        if mapping.extended:
            unit_start, unit_end = self._units(inside, len(data))
            if not entries[0][0] & (OFFSET_MASK | COMPRESSED):
                start = unit_start
            if not entries[-1][0] & (OFFSET_MASK | COMPRESSED):
                end = unit_end
        fill = not virgin or self._node.crypt is not None  # zeroes of the file, decrypted, are noise
        whole = await self._filled(cluster, start, end, inside, data, zeroes=fill)
        batch.padded = batch.padded or whole is not data
        at = start if len(whole) == end - start else inside
        batch.pieces.append(((first << bits) + at, whole))
        batch.guests.append((cluster << bits) + at)

    async def _filled(
        self, cluster: int, start: int, end: int, inside: int, data: memoryview, *, zeroes: bool
    ) -> memoryview:
        """The bytes ``start`` to ``end`` of a cluster, or of several, with ``data`` at ``inside`` and what was there
        before around it; just the data if there are zeroes around, and they need not be written."""
        stop = inside + len(data)
        if start == inside and end == stop:
            return data
        base = cluster << self._mapping.cluster_bits
        limit = self._node.size if base < self._node.size else base + end  # behind the disk is VM state
        around = [(start, inside), (stop, min(end, max(limit - base, stop)))]
        if not zeroes and all([await self._reads_as_zeroes(base + a, b - a) for a, b in around]):
            return data
        await self._metadata.at("cow_read")
        buffer = bytearray(end - start)
        with memoryview(buffer) as view:
            for a, b in around:
                if b > a:
                    await self._node.co_pread(base + a, view[a - start : b - start])
            view[inside - start : stop - start] = data
        return memoryview(buffer)

    async def _reads_as_zeroes(self, offset: int, length: int) -> bool:
        backing, end = self._node.backing, offset + length
        while offset < end:
            for run in await self._metadata.runs(offset, end - offset):
                if run.kind != ZEROES and (
                    run.kind != UNALLOCATED or (backing is not None and offset < backing.size)
                ):
                    return False
                offset += run.length
        return True

    def _units(self, inside: int, length: int) -> tuple[int, int]:
        """The whole subclusters (clusters, if there are none) that a range touches."""
        bits = self._mapping.subcluster_bits
        return inside >> bits << bits, -(-(inside + length) >> bits) << bits

    def _bits(self, start: int, end: int) -> int:
        """The subclusters of a range as bits."""
        bits = self._mapping.subcluster_bits
        first, stop = start >> bits, end >> bits
        return ((1 << (stop - first)) - 1) << first

    async def _carry_out(self, batch: _Batch) -> None:
        """Write the data, then set the entries."""
        crypt = self._node.crypt
        if crypt is not None:
            pairs = zip(batch.pieces, batch.guests, strict=True)
            batch.pieces = [
                (place, crypt.encrypted(guest if crypt.by_guest else place, data)) for (place, data), guest in pairs
            ]
        if batch.padded:
            await self._metadata.at("cow_write")
        await self._metadata.at("write_aio")
        await self._metadata.write_data(batch.pieces)
        batch.padded = False
        batch.pieces, batch.guests = [], []
        while batch.links:
            cluster, entry, bitmap = batch.links[0]
            await self.link(cluster, entry, bitmap)
            del batch.links[0]
            batch.clusters.discard(cluster)
            batch.fresh.discard(cluster)

    async def link(self, cluster: int, entry: int, bitmap: int, why: int = FREED_OTHER) -> None:
        """Let a guest cluster be what the entry says; what it was before is not referred to any more. With the lock
        held."""
        metadata, mapping = self._metadata, self._mapping
        index = cluster & (mapping.entries - 1)
        table = await metadata.writable_table(cluster << mapping.cluster_bits >> mapping.l1_shift)
        old = table.entries[index * mapping.words]
        # Two compressed clusters may lie in one sector.
        if (old ^ entry) & (OFFSET_MASK | COMPRESSED) or (old & COMPRESSED and old != entry):
            self._free_old(old, why)
        metadata.set_entry(table, index, entry, bitmap)

    def _free_old(self, old: int, why: int) -> None:
        metadata, mapping = self._metadata, self._mapping
        if old & COMPRESSED:
            offset, length = mapping.squeezed(old)
            last = (offset + length - 1) >> mapping.cluster_bits
            metadata.free_all(range(offset >> mapping.cluster_bits, last + 1), why)
            self._node.reader.forget_unpacked()
        elif old & OFFSET_MASK and not mapping.external:
            metadata.free((old & OFFSET_MASK) >> mapping.cluster_bits, why)

    def _forget(self, batch: _Batch) -> None:
        """It failed: new clusters that nothing refers to are free again."""
        if self._mapping.external:
            return
        for cluster, entry, _ in batch.links:
            if cluster in batch.fresh:
                self._metadata.free((entry & OFFSET_MASK) >> self._mapping.cluster_bits)

    # -- zeroes and discards ------------------------------------------------------------------------------------

    async def co_zero(
        self, offset: int, length: int, *, unmap: bool, discard: bool, behind: bool = False
    ) -> None:
        """Make a range read as zeroes; what of it is less than a cluster is written, or for a discard left alone.
        ``behind``: it lies behind the disk's end."""
        bits = self._mapping.cluster_bits
        end = offset + length
        first = -(-offset >> bits)
        stop = end >> bits if end < self._node.size else -(-end >> bits)
        if discard and self._node.header.version == 2 and self._node.backing is not None:
            return  # there is no entry that would hide what the backing file has
        by_writing = self._node.header.version == 2 and self._node.backing is not None
        if first >= stop or by_writing:
            if not discard:
                await self._write_zeroes(offset, length)
            return
        if not discard:
            await self._write_zeroes(offset, (first << bits) - offset)
        async with self._metadata.lock:
            size = self._node.header.size
            if not behind:  # the disk may have become smaller meanwhile; or larger, and the last cluster has more then
                end = min(end, size)
                stop = end >> bits if end < size else -(-end >> bits)
            outside = min(stop << bits, max(end, size)) if self._mapping.external else 0
            if not outside or await self._zero_outside(first << bits, outside, unmap=unmap, discard=discard):
                for cluster in range(first, stop):
                    await self._zero_cluster(cluster, unmap)
        if not discard:
            await self._write_zeroes(stop << bits, end - (stop << bits))

    async def _zero_outside(self, start: int, end: int, *, unmap: bool, discard: bool) -> bool:
        """Zero a range in the external data file, before the entries say so: whoever reads that file by itself has to
        find the zeroes, and space can be given back there. Whether the entries are to follow.

        Zeroing rather than discarding, so that at no moment anything else can be read than the old or zeroes. In a raw
        data file that is all: a write to the same place may be on its way without the lock, and of the two the file and
        the guest have to see the same one as the last."""
        node, metadata = self._node, self._metadata
        raw, passes = node.header.raw_data, metadata.settings.passes[FREED_REQUEST]
        if start >= end or (discard and raw and not passes):
            return False
        if raw or (unmap and passes):
            flags = (MAY_UNMAP if unmap and passes else 0) | (0 if raw else NO_FALLBACK)
            try:
                await node.data.co_write_zeroes(start, end - start, flags)
            except OSError as error:
                if raw or error.errno != errno.ENOTSUP:
                    raise
        return not raw

    async def _zero_cluster(self, cluster: int, unmap: bool) -> None:
        metadata, mapping, node = self._metadata, self._mapping, self._node
        entry, bitmap = await self.entry(cluster)
        has_content = mapping.has_place(entry) or entry & COMPRESSED
        below = max(node.backing.size if node.backing is not None else 0, self.hides)
        needs_hiding = cluster << mapping.cluster_bits < below
        if not has_content and not needs_hiding:
            return
        await metadata.make_room_for_changes()
        owned = entry & COPIED and mapping.has_place(entry) and not entry & COMPRESSED
        if owned and unmap and metadata.settings.keeps_discarded:
            if metadata.settings.passes[FREED_REQUEST] and not mapping.external:
                await self._give_back(entry & OFFSET_MASK)
            unmap = False
        if owned and not unmap and node.header.version > 2:
            link = (entry, _ALL << SUBCLUSTERS) if mapping.extended else (entry | ZERO, 0)
        elif mapping.extended:
            link = (0, _ALL << SUBCLUSTERS) if needs_hiding else (0, 0)
        else:
            link = (ZERO, 0) if needs_hiding else (0, 0)
        if link != (entry, bitmap):
            await self.link(cluster, *link, FREED_REQUEST)

    async def _give_back(self, host: int) -> None:
        """Let the file drop the content of a cluster that the image keeps. By zeroing: until the entry says so on the
        disk, it is read."""
        with suppress(OSError):  # it is a hint
            await self._metadata.file.co_write_zeroes(host, self._mapping.cluster_size, MAY_UNMAP | NO_FALLBACK)

    async def _write_zeroes(self, offset: int, length: int) -> None:
        if length > 0 and not await self._reads_as_zeroes(offset, length):
            step = 1 << 20
            for start in range(0, length, step):
                count = min(step, length - start)
                await self.co_write([Request(WRITE, offset + start, count, memoryview(bytes(count)))])
