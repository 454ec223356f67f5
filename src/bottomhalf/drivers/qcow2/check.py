# SPDX-License-Identifier: Apache-2.0
"""Check an image: count anew who refers to which cluster, and compare (and, if wished, repair).

A counter that is too high is a leak: space is lost, nothing else. One that is too low is corruption: the cluster may be
given to somebody else. What QEMU prints for each, scripts match on, so the findings are worded the same.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import bitmaps, layout, snapshots, tables
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.keeping import co_read_directory
from bottomhalf.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, SNAPSHOT_TABLE_BYTES_MAX
from bottomhalf.drivers.qcow2.metadata import Metadata

if TYPE_CHECKING:
    from bottomhalf.block import Node

FINDINGS_MAX: Final = 1000  # that are kept as text; all are counted


@dataclass
class CheckResult:
    """What a check has found; clusters, unless named otherwise."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0  # tables that could not be read or understood
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    total_clusters: int = 0  # of the guest's disk
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    image_end_offset: int = 0  # bytes
    findings: list[str] = field(default_factory=list)

    def say(self, finding: str) -> None:
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(finding)


async def co_check(file: Node, header: Header, repair: str | None = None) -> CheckResult:
    """Check the image in ``file``. ``repair`` is "leaks" or "all"; the node must be writable then. OSError; ImageError
    for an image whose tables cannot even be found."""
    metadata = Metadata(lambda: file, header)
    await metadata.open()
    checker = _Checker(metadata)
    await checker.count()
    await checker.compare(repair)
    return checker.result


class _Checker:
    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._header = header = metadata.header
        self._mapping = metadata.mapping
        self._clusters = (metadata.file.size + header.cluster_size - 1) >> header.cluster_bits
        self._counts = array("I", [0]) * self._clusters
        self._next_host = 0
        self.result = CheckResult(total_clusters=-(-header.size >> header.cluster_bits))

    # -- counting -----------------------------------------------------------------------------------------------

    def _refer(self, offset: int, length: int, what: str) -> bool:
        """Bytes of the file are referred to; whether that can be."""
        header = self._header
        if length <= 0:
            return True
        first, last = offset >> header.cluster_bits, (offset + length - 1) >> header.cluster_bits
        if offset < 0 or last >= self._clusters:
            self.result.corruptions += 1
            self.result.say(f"ERROR: {what} at {offset:#x} lies behind the end of the image file")
            return False
        for cluster in range(first, last + 1):
            self._counts[cluster] += 1
        return True

    async def count(self) -> None:
        """Walk through everything that refers to clusters."""
        header, metadata = self._header, self._metadata
        size = header.cluster_size
        self._refer(0, size, "header")
        await self._count_l1(metadata.l1, header.l1_offset, active=True)
        await self._count_snapshots()
        await self._count_bitmaps()
        crypto = header.extension(layout.EXTENSION_CRYPTO)
        if crypto is not None and len(crypto) == 16:
            self._refer(int.from_bytes(crypto[:8], "big"), int.from_bytes(crypto[8:], "big"), "encryption header")
        self._refer(header.refcount_table_offset, header.refcount_table_clusters * size, "refcount table")
        for index, entry in enumerate(metadata.refcount_table):
            if entry & layout.REFCOUNT_TABLE_RESERVED or entry % size:
                self.result.corruptions += 1
                self.result.say(f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted")
            elif entry and entry >> header.cluster_bits >= self._clusters:
                self.result.corruptions += 1
                self.result.say(f"ERROR refcount block {index} is outside image")
            elif entry:
                self._refer(entry, size, f"refcount block {index}")

    async def _count_l1(self, l1: array[int], offset: int, *, active: bool) -> None:
        self._refer(offset, len(l1) * 8, "L1 table")
        for index, entry in enumerate(l1):
            table_offset = entry & OFFSET_MASK
            if entry & layout.L1_RESERVED or table_offset & self._mapping.cluster_mask:
                self.result.corruptions += 1
                self.result.say(f"ERROR l2_offset={entry:#x}: Table is not cluster aligned; L1 entry corrupted")
            elif table_offset and self._refer(table_offset, self._header.cluster_size, f"L2 table {index}"):
                table = tables.unpack(await self._metadata.read(table_offset, self._header.cluster_size))
                self._count_l2(table, index, active=active)

    def _count_l2(self, table: array[int], l1_index: int, *, active: bool) -> None:
        mapping, result, size = self._mapping, self.result, self._header.cluster_size
        for index in range(mapping.entries):
            entry = table[index * mapping.words]
            bitmap = table[index * mapping.words + 1] if mapping.extended else 0
            if not entry and not bitmap:
                continue
            try:
                mapping.check_entry(entry, bitmap)
            except ImageError as error:
                result.corruptions += 1
                result.say(f"ERROR l1_index={l1_index} l2_index={index}: {error}")
                continue
            if entry & COMPRESSED:
                if entry & COPIED:
                    result.corruptions += 1
                    result.say(f"ERROR: cluster {index}: copied flag must never be set for compressed clusters")
                offset, length = mapping.squeezed(entry)
                # The last sector may go beyond the end of the file, which nobody reads.
                end = min(offset + length, self._clusters << mapping.cluster_bits)
                self._refer(offset, max(end - offset, 1), "compressed cluster")
                if active:
                    result.compressed_clusters += 1
                    result.allocated_clusters += 1
                    result.fragmented_clusters += 1
            elif mapping.has_place(entry):
                host = entry & OFFSET_MASK
                if not mapping.external:
                    self._refer(host, size, "data cluster")
                if active:
                    result.allocated_clusters += 1
                    if self._next_host and host != self._next_host:
                        result.fragmented_clusters += 1
                    self._next_host = host + size

    async def _count_snapshots(self) -> None:
        header, metadata = self._header, self._metadata
        if not header.snapshot_count:
            return
        room = min(SNAPSHOT_TABLE_BYTES_MAX, max(metadata.file.size - header.snapshots_offset, 0))
        try:
            found, length = snapshots.parse(
                await metadata.read(header.snapshots_offset, room), header.snapshot_count, header.cluster_size
            )
        except ImageError as error:
            self.result.corruptions += 1
            self.result.say(f"ERROR {error}")
            return
        self._refer(header.snapshots_offset, length, "snapshot table")
        for snapshot in found:
            l1 = tables.unpack(await metadata.read(snapshot.l1_offset, snapshot.l1_size * 8))
            await self._count_l1(l1, snapshot.l1_offset, active=False)

    async def _count_bitmaps(self) -> None:
        header, metadata = self._header, self._metadata
        try:
            directory = await co_read_directory(metadata.read, header)
        except ImageError as error:
            self.result.corruptions += 1
            self.result.say(f"ERROR {error}")
            return
        if directory is None:
            return
        found, offset, length = directory
        self._refer(offset, length, "bitmap directory")
        for bitmap in found:
            if self._refer(bitmap.table_offset, bitmap.table_size * 8, "bitmap table"):
                for entry in tables.unpack(await metadata.read(bitmap.table_offset, bitmap.table_size * 8)):
                    if bitmaps.data_offset(entry):
                        self._refer(bitmaps.data_offset(entry), header.cluster_size, "bitmap data")

    # -- comparing ----------------------------------------------------------------------------------------------

    async def compare(self, repair: str | None) -> None:
        """Compare the counters with what was counted, then the flags that say "the only one"."""
        metadata, result = self._metadata, self.result
        fixes: list[tuple[int, int]] = []
        last = 0
        for cluster, counted in enumerate(self._counts):
            stored = await metadata.refcount(cluster)
            if stored or counted:
                last = cluster + 1
            if stored == counted:
                continue
            leaked = stored > counted
            kind = "Leaked" if leaked else "ERROR"
            if repair == "all" or (repair == "leaks" and leaked):
                fixes.append((cluster, counted))
                kind = "Repairing"
            elif leaked:
                result.leaks += 1
            else:
                result.corruptions += 1
            result.say(f"{kind} cluster {cluster} refcount={stored} reference={counted}")
            if repair and kind == "Repairing":
                result.leaks_fixed += leaked
                result.corruptions_fixed += not leaked
        result.image_end_offset = last << self._header.cluster_bits
        if fixes:
            async with metadata.lock:
                for cluster, counted in fixes:
                    await metadata.set_refcount(cluster, counted)
        await self._compare_copied(repair)
        if repair:
            async with metadata.lock:
                await metadata.commit()
                wrong = layout.DIRTY | (layout.CORRUPT if repair == "all" and not result.corruptions else 0)
                if self._header.incompatible & wrong:
                    self._header.incompatible &= ~wrong
                    metadata.header_changed()
                    await metadata.commit()

    async def _compare_copied(self, repair: str | None) -> None:
        """COPIED stands at what has exactly one reference (as it is stored), in the active tables; and only there."""
        metadata, mapping = self._metadata, self._mapping
        for l1_index, entry in enumerate(metadata.l1):
            offset = entry & OFFSET_MASK
            if not offset or offset >> mapping.cluster_bits >= self._clusters or offset & mapping.cluster_mask:
                continue
            stored = await metadata.refcount(offset >> mapping.cluster_bits)
            single = stored == 1
            if single != bool(entry & COPIED):
                self._copied(repair, f"L2 cluster: l1_index={l1_index} l1_entry={entry:x}", stored)
                if repair == "all":
                    metadata.set_l1(l1_index, entry & ~COPIED | (COPIED if single else 0))
            table = await metadata.l2_table(l1_index)
            assert table is not None
            for index in range(mapping.entries):
                found = table.entries[index * mapping.words]
                host = found & OFFSET_MASK
                if found & COMPRESSED or not host or mapping.external or host >> mapping.cluster_bits >= self._clusters:
                    continue
                stored = await metadata.refcount(host >> mapping.cluster_bits)
                single = stored == 1
                if single != bool(found & COPIED):
                    self._copied(repair, f"data cluster: l2_entry={found:x}", stored)
                    if repair == "all":
                        bitmap = table.entries[index * mapping.words + 1] if mapping.extended else 0
                        metadata.set_entry(table, index, found & ~COPIED | (COPIED if single else 0), bitmap)

    def _copied(self, repair: str | None, where: str, refcount: int) -> None:
        if repair == "all":
            self.result.corruptions_fixed += 1
        else:
            self.result.corruptions += 1
        kind = "Repairing" if repair == "all" else "ERROR"
        self.result.say(f"{kind} OFLAG_COPIED {where} refcount={refcount}")
