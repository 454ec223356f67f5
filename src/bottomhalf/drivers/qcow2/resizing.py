# SPDX-License-Identifier: Apache-2.0
"""Another size of the disk.

A larger one needs a longer L1 table, perhaps, and takes effect with one write of the header, which comes last: until
then nobody can write to the new part, and whatever fails leaves the old size. Where a backing file is longer than the
disk was, its content must not come to light, not even by a power cut in between: the new part is zeroed before the
header says that it is there. So is the rest of the last cluster, and what may lie behind the disk's end is forgotten,
since a request that was on its way when the disk became smaller may have arrived there afterwards.

A smaller one gives back what lies behind the new end: whole L2 tables with all they lead to, and the rest of the last
one entry by entry. Not before the header tells the new size, or after a power cut the backing file would be seen where
entries are gone already. If the power goes then, they are left, and given back before the disk grows again. What is
left of the last cluster behind the end is zeroed before all that. Snapshots keep their own size, and everything in it.

Behind the disk's end lies VM state that no snapshot has yet (see ``vmstate``), and where that begins depends on the
size; it is forgotten.

Clause: "Header" (size), "Cluster mapping".
Invariant: nothing comes to light that was behind an end, and nothing before it is lost.
Test: tests/drivers/qcow2/test_resizing.py
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from bottomhalf.block.watching import unwatched
from bottomhalf.drivers.qcow2.counters import FREED_REQUEST
from bottomhalf.drivers.qcow2.layout import L1_BYTES_MAX
from bottomhalf.drivers.qcow2.metadata import refresh_sizes
from bottomhalf.drivers.qcow2.preallocation import co_preallocate

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.node import Qcow2Node


async def co_truncate(node: Qcow2Node, size: int, preallocation: str = "off") -> None:
    """Give the disk another size in bytes; ``preallocation`` of a new part as for a new image. OSError, ImageError."""
    check_size(node, size, node.header.version)
    try:
        if size < node.header.size:
            await _shrink(node, size)
        else:
            await _grow(node, size, preallocation)
    finally:
        node.refresh_size()


def check_size(node: Qcow2Node, size: int, version: int) -> None:
    """Whether the disk can have that size, where the image has that version by then. OSError, BlockError."""
    if size < 0 or size % 512:
        raise OSError(errno.EINVAL, "The new size must be a multiple of 512", node.name)
    if node.header.snapshot_count and version < 3:
        raise OSError(errno.ENOTSUP, "Can't resize a v2 image which has snapshots", node.name)
    entries = -(-size >> node.mapping.l1_shift)
    if entries * 8 > L1_BYTES_MAX:
        raise OSError(errno.EFBIG, f"the L1 table would be larger than {L1_BYTES_MAX} bytes", node.name)
    node.bitmap_keeper.check_resize()


async def _publish(node: Qcow2Node, size: int) -> None:
    """The disk has another size from now on. With the lock held. OSError, and it has the old one."""
    header, metadata, old = node.header, node.metadata, node.header.size
    header.size = size
    metadata.header_changed()
    try:
        await metadata.commit()
    except BaseException:
        header.size = old
        metadata.header_changed()
        raise


async def _shrink(node: Qcow2Node, size: int) -> None:
    metadata, mapping, header = node.metadata, node.mapping, node.header
    behind = min(-size & mapping.cluster_mask, header.size - size)
    if behind:
        # Nobody asked for that: not a write that a threshold or a bitmap would want to know of.
        await unwatched(node).co_write_zeroes(node, size, behind)
    async with metadata.lock:
        await metadata.find_places()
        await _publish(node, size)
        await metadata.at("l1_shrink_free_l2_clusters")
        await _forget_behind(node, size)
        await metadata.commit()
    if mapping.external:
        await node.data.co_truncate(size)


async def _grow(node: Qcow2Node, size: int, preallocation: str) -> None:
    metadata, mapping, header = node.metadata, node.mapping, node.header
    old = header.size
    if mapping.external:
        if header.raw_data:  # here, too, something may have arrived late
            refresh_sizes(node.data)
            if node.data.size > old:
                await node.data.co_truncate(old)
        await node.data.co_truncate(size)
    async with metadata.lock:
        await _forget_behind(node, old)
        entries = -(-size >> mapping.l1_shift)
        if entries > header.l1_size:
            await metadata.grow_l1(entries)
        await metadata.commit()
    await _zero_behind(node, old, size)
    if header.raw_data and preallocation == "off":
        preallocation = "metadata"  # others read the data file by itself, where every cluster is in its place
    await co_preallocate(node, old, size, preallocation)
    async with metadata.lock:
        await metadata.commit()  # a commit writes the header before entries, and here they have to be there first
        await _publish(node, size)


async def _zero_behind(node: Qcow2Node, old: int, size: int) -> None:
    """Zero what would come to light behind the end of the disk. OSError, ImageError."""
    backing = node.backing
    # Who made it smaller before may have left something in the last cluster (QEMU does).
    end = min(size, old + (-old & node.mapping.cluster_mask))
    if backing is not None:
        end = max(end, min(size, backing.size))
    if end > old:
        await node.writer.co_zero(old, end - old, unmap=False, discard=False, behind=True)


async def _forget_behind(node: Qcow2Node, size: int) -> None:
    """Give back what the guest has had behind the end, and VM state that lies there. With the lock held."""
    await node.metadata.find_places()
    await node.snapshots.forget_tables(-(-size >> node.mapping.l1_shift))
    await _unlink(node, -(-size >> node.mapping.cluster_bits))


async def _unlink(node: Qcow2Node, cluster: int) -> None:
    """Give back the guest's clusters from this one on, to the end of its L2 table. With the lock held."""
    metadata, mapping, writer = node.metadata, node.mapping, node.writer
    words, first = mapping.words, cluster & (mapping.entries - 1)
    index = cluster << mapping.cluster_bits >> mapping.l1_shift
    if not first or index >= len(metadata.l1):
        return
    table = await metadata.l2_table(index)
    if table is None:
        return
    used = [n for n in range(first, mapping.entries) if any(table.entries[n * words : (n + 1) * words])]
    for each in used:
        await metadata.make_room_for_changes()
        await writer.entry(index * mapping.entries + each)  # it is what it can be
        await writer.link(index * mapping.entries + each, 0, 0, FREED_REQUEST)
