# SPDX-License-Identifier: Apache-2.0
"""Check an image: count anew who refers to which cluster, and compare (and, if wished, repair).

A counter that is too high is a leak: space is lost, nothing else. One that is too low is corruption: the cluster may be
given to somebody else. What QEMU prints for each, scripts match on, so the findings are worded the same.

A repair goes in steps, each durable before the next: preallocated clusters at impossible places become zero clusters,
while counting; counters are set right, or, if that is not possible because their own tables are damaged or a cluster
that is in use has none, all of them are written anew (``rebuilding``); then the flags that say "mine alone"; then the
snapshot table, if an entry is incomplete. If nothing is left the image is not called dirty or corrupt any more. With
"leaks" only counters that are too high, and flags if nothing else is wrong.

What cannot be read or understood is an error of the check, never an exception: a check is for damaged images.

Clause: "Host cluster management"; the words are QEMU's.
Invariant: a repair that is cut off has lost nothing, and one that succeeds leaves an image in which QEMU finds nothing.
Test: tests/peers/test_qcow2_check.py
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import layout, overlap, rebuilding, refcounts, snapshots
from bottomhalf.drivers.qcow2.findings import FINDINGS_MAX
from bottomhalf.drivers.qcow2.findings import CheckResult as CheckResult
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from bottomhalf.drivers.qcow2.metadata import Metadata
from bottomhalf.drivers.qcow2.references import NONE, PAGE_ENTRIES, References, Unfinished

if TYPE_CHECKING:
    from bottomhalf.block import Node

# A repair that makes the file longer brings to light what was behind its end: counters, which are leaks.
REPAIRS_MAX: Final = 3
KNOWN_MAX: Final = 1 << 20  # L2 tables whose counters are remembered


async def co_check(file: Node, header: Header, repair: str | None = None) -> CheckResult:
    """Check the image in ``file``. ``repair`` is "leaks" or "all"; the node must be writable then, and ``header`` is
    changed with the image. What is wrong is in the result, I/O errors too."""
    found = CheckResult()
    for _ in range(REPAIRS_MAX):
        size = file.size
        found = _both(found, await _co_check(file, header, repair))
        longer = file.size != size
        if found.failure or not (found.corruptions_fixed or found.leaks_fixed or longer):
            return found
        if not longer:
            break
    return _both(found, await _co_check(file, header, None))


def _both(before: CheckResult, now: CheckResult) -> CheckResult:
    """What was repaired before, and what is found now."""
    now.corruptions_fixed += before.corruptions_fixed
    now.leaks_fixed += before.leaks_fixed
    now.findings = [*before.findings, *now.findings][:FINDINGS_MAX]
    return now


async def co_repair_dirty(file: Node, header: Header) -> None:
    """An image that was not closed properly is opened for writing: its counters may be too low. ImageError."""
    found = await _co_check(file, header, "all")
    if found.check_errors:
        raise ImageError(f"Could not repair dirty image: {found.failure or found.findings[-1]}")
    if header.incompatible & layout.DIRTY:  # something else is wrong, but the counters are right
        header.incompatible &= ~layout.DIRTY
        metadata = Metadata(lambda: file, header)
        await metadata.write_header()


async def _co_check(file: Node, header: Header, repair: str | None) -> CheckResult:
    metadata = Metadata(lambda: file, header)
    result = CheckResult(total_clusters=-(-header.size >> header.cluster_bits))
    try:
        await metadata.open()
        await _Checker(metadata, result, repair).run()
    except Unfinished:
        pass  # the result says why
    except OSError as error:
        result.give_up(os.strerror(error.errno) if error.errno else str(error))
    except ImageError as error:
        result.give_up(str(error))
    return result


class _Checker:
    def __init__(self, metadata: Metadata, result: CheckResult, repair: str | None) -> None:
        self._metadata = metadata
        self._header = metadata.header
        self._mapping = metadata.mapping
        self._result = result
        self._repair = repair
        self._broken_snapshots = 0  # corruptions of the snapshot table
        self._scan = snapshots.Scan([], 0, [], [], 0)
        self._references = References(metadata, result, fix=repair == "all")

    async def run(self) -> None:
        result, repair = self._result, self._repair
        await self._read_snapshots()
        await self._references.count(self._scan.entries, self._scan.length)
        corruptions, leaks = result.corruptions, result.leaks
        rebuild = await self._compare("")
        rebuild = rebuild or self._references.rebuild
        if rebuild and repair == "leaks":
            result.give_up("ERROR need to rebuild refcount structures")
            return
        if rebuild and repair:
            await self._rebuild()
        elif repair and (result.corruptions or result.leaks):
            result.corruptions, result.leaks = corruptions, leaks
            await self._compare(repair)
        await self._compare_copied(repair == "all" or (repair == "leaks" and not self._wrong))
        if repair == "all" and self._broken_snapshots:
            await self._write_snapshots()
        if repair:
            async with self._metadata.lock:
                await self._metadata.settle()
                if not self._wrong and self._header.incompatible & (layout.DIRTY | layout.CORRUPT):
                    self._header.incompatible &= ~(layout.DIRTY | layout.CORRUPT)
                    self._metadata.header_changed()
                    await self._metadata.settle()

    @property
    def _wrong(self) -> bool:
        result = self._result
        return bool(result.corruptions or result.leaks or result.check_errors)

    # -- snapshots ----------------------------------------------------------------------------------------------

    async def _read_snapshots(self) -> None:
        header, metadata, result = self._header, self._metadata, self._result
        if not header.snapshot_count:
            return
        self._scan = scan = snapshots.scan(await snapshots.co_table(metadata), header.snapshot_count, header.version)
        hint = "You can force-remove {} with qemu-img check -r all"
        failed = "ERROR failed to read the snapshot table"
        for number, length in scan.oversized:
            if self._repair != "all":
                text = f"{failed}: Too much extra metadata in snapshot table entry {number}"
                result.give_up(f"{text}\n{hint.format('this extra metadata')}")
                raise Unfinished
            most = snapshots.EXTRA_BYTES_MAX
            result.say(f"Discarding too much extra metadata in snapshot table entry {number} ({length} > {most})")
            self._broken_snapshots += 1
        if scan.overhanging:
            if self._repair != "all":
                what = f"all {scan.overhanging} overhanging snapshots"
                result.give_up(f"{failed}: Snapshot table is too big\n{hint.format(what)}")
                raise Unfinished
            result.say(f"Discarding {scan.overhanging} overhanging snapshots (snapshot table is too big)")
            self._broken_snapshots += scan.overhanging
        for number in scan.incomplete:
            kind = "Repairing" if self._repair == "all" else "ERROR"
            result.say(f"{kind} snapshot table entry {number} is incomplete")
            self._broken_snapshots += 1
        result.corruptions += self._broken_snapshots

    async def _write_snapshots(self) -> None:
        """A table in which every entry is what it should be. The counters are right."""
        metadata, header, result = self._metadata, self._header, self._result
        data = snapshots.pack(self._scan.entries, header.size)
        async with metadata.lock:
            where = 0
            if data:
                count = -(-len(data) >> header.cluster_bits)
                where = await metadata.allocate_together(count) << header.cluster_bits
                await metadata.write([(where, data)])
            old, length = header.snapshots_offset, self._scan.length
            if length and self._references.of(old >> header.cluster_bits):
                last = (old + length - 1) >> header.cluster_bits
                metadata.free_all(range(old >> header.cluster_bits, last + 1))
            header.snapshots_offset, header.snapshot_count = where, len(self._scan.entries)
            metadata.header_changed()
            await metadata.settle()
        result.corruptions -= self._broken_snapshots
        result.corruptions_fixed += self._broken_snapshots

    # -- counters -----------------------------------------------------------------------------------------------

    async def _compare(self, repair: str) -> bool:
        """Compare the counters with what was counted, block by block. Whether all have to be written anew."""
        metadata, references, result = self._metadata, self._references, self._result
        per_block = refcounts.entries_of_block(self._header.cluster_bits, self._header.refcount_order)
        step = min(per_block, PAGE_ENTRIES)
        clusters, rebuild, highest = references.end, False, 0
        table = metadata.refcount_table
        blocks = {n for n, entry in enumerate(table[: -(-clusters // per_block)]) if entry}
        blocks.update(first // per_block for first, _ in references.counted())
        seen: set[int] = set()
        for index in sorted(blocks):
            start = index * per_block
            place = metadata.block_offset(index) if index < len(table) else 0
            if place in seen and place and not references.counts_in(start, per_block):
                continue  # a block that counts other clusters, too, which has been said
            seen.add(place)
            try:
                block = await metadata.block(index)
            except (OSError, ImageError) as error:
                reason = os.strerror(getattr(error, "errno", 0) or errno.EIO)
                for cluster in range(start, min(start + per_block, clusters)):
                    result.check_errors += 1
                    result.say(f"Can't get refcount for cluster {cluster}: {reason}")
                continue
            for first in range(start, min(start + per_block, clusters), step):
                counts = references.some(first, step)
                stored = block[first - start : first - start + step] if block else NONE[:step]
                if any(counts) or any(stored):
                    for n in range(min(step, clusters - first)):
                        if stored[n] or counts[n]:
                            highest = first + n
                            if stored[n] != counts[n]:
                                rebuild = rebuild or not stored[n]
                                await self._differs(first + n, stored[n], counts[n], repair)
        if not repair:
            result.image_end_offset = (highest + 1) << self._header.cluster_bits
        return rebuild

    async def _differs(self, cluster: int, stored: int, count: int, repair: str) -> None:
        result, leaked = self._result, stored > count
        mended = repair == "all" or (repair == "leaks" and leaked)
        if mended:
            async with self._metadata.lock:
                await self._metadata.set_refcount(cluster, count)
                await self._metadata.make_room_for_changes()
            result.leaks_fixed += leaked
            result.corruptions_fixed += not leaked
        else:
            result.leaks += leaked
            result.corruptions += not leaked
        kind = "Repairing" if mended else ("Leaked" if leaked else "ERROR")
        result.say(f"{kind} cluster {cluster} refcount={stored} reference={count}")

    async def _rebuild(self) -> None:
        """Write all counters anew, then count once more: what held the old ones is free."""
        result = self._result
        result.say("Rebuilding refcount structure")
        async with self._metadata.lock:
            await rebuilding.co_rebuild(self._metadata, self._references)
        before = result.corruptions, result.leaks, result.corruptions_fixed
        again = CheckResult()
        self._references = References(self._metadata, again, fix=False)
        await self._references.count(self._scan.entries, self._scan.length)
        again.corruptions += self._broken_snapshots
        await self._compare_into(again)
        result.corruptions, result.leaks = again.corruptions, again.leaks
        result.check_errors = again.check_errors
        result.corruptions_fixed = before[2] + max(before[0] - again.corruptions, 0)
        result.leaks_fixed += max(before[1] - again.leaks, 0)

    async def _compare_into(self, again: CheckResult) -> None:
        """Free what held the old counters, as a part of the repair that is not counted."""
        result, self._result = self._result, again
        try:
            if await self._compare("all") or self._references.rebuild:
                again.give_up("ERROR need to rebuild refcount structures")
        finally:
            self._result = result
        for text in again.findings:
            if text.startswith("Repairing"):
                result.say(text)
        if again.failure:
            result.give_up(again.failure)
            raise Unfinished
        async with self._metadata.lock:
            await self._metadata.commit()

    # -- flags --------------------------------------------------------------------------------------------------

    async def _compare_copied(self, mend: bool) -> None:
        """COPIED stands at what has exactly one reference (as it is stored), in the active tables; and only there."""
        metadata, mapping = self._metadata, self._mapping
        if mend:
            await metadata.find_places()
        known: dict[int, int | None] = {}  # counters of L2 tables
        for l1_index, entry in enumerate(metadata.l1):
            offset = entry & OFFSET_MASK
            if not offset:
                continue
            first = offset not in known
            if first and len(known) < KNOWN_MAX:
                known[offset] = await self._stored(offset)
            stored = known[offset] if offset in known else await self._stored(offset)
            if stored is not None and (stored == 1) != bool(entry & COPIED):
                text = f"L2 cluster: l1_index={l1_index} l1_entry={entry:x}"
                if self._copied(mend, text, stored, metadata.header.l1_offset, overlap.ACTIVE_L1):
                    metadata.set_l1(l1_index, entry ^ COPIED)
            if not first or offset in self._references.empty:
                continue
            if offset & mapping.cluster_mask or offset >= metadata.file.size:
                continue
            if mend:
                async with metadata.lock:
                    await metadata.make_room_for_changes()
            table = await metadata.l2_table(l1_index)
            assert table is not None
            for at in range(0, len(table.entries), mapping.words):
                found = table.entries[at]
                if found & COMPRESSED or not found & OFFSET_MASK or mapping.external:
                    continue
                stored = await self._stored(found & OFFSET_MASK)
                if stored is None or (stored == 1) == bool(found & COPIED):
                    continue
                if self._copied(mend, f"data cluster: l2_entry={found:x}", stored, offset, overlap.ACTIVE_L2):
                    bitmap = table.entries[at + 1] if mapping.extended else 0
                    metadata.set_entry(table, at // mapping.words, found ^ COPIED, bitmap)

    async def _stored(self, offset: int) -> int | None:
        """The counter of a cluster; None if it cannot be told, which was said before."""
        with suppress(OSError, ImageError):
            return await self._metadata.refcount(offset >> self._mapping.cluster_bits)
        return None

    def _copied(self, mend: bool, where: str, refcount: int, table: int, own: int) -> bool:
        """A flag is wrong; whether it may be set right, in a table at that place."""
        result = self._result
        if mend:
            try:
                self._metadata.places.table(table, own, self._mapping.cluster_size)
            except overlap.Corruption as error:
                if not result.failure:
                    result.give_up(f"ERROR: Could not write L2 table; metadata overlap check failed: {error}")
                mend = False
        result.say(f"{'Repairing' if mend else 'ERROR'} OFLAG_COPIED {where} refcount={refcount}")
        if mend:
            result.corruptions_fixed += 1
        else:
            result.corruptions += 1
        return mend
