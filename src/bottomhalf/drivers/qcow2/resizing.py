# SPDX-License-Identifier: Apache-2.0
"""Another size of the disk.

A larger one needs a longer L1 table, perhaps, and takes effect with one write of the header. Where a backing file is
longer than the disk was, its content must not come to light, not even by a power cut in between: the new part is zeroed
before the header says that it is there.

A smaller one gives back what lies behind the new end: whole L2 tables with all they lead to, and the rest of the last
one entry by entry. Not before the header tells the new size, or after a power cut the backing file would be seen where
entries are gone already. If the power goes then, they are left, and given back before the disk grows again. What is
left of the last cluster behind the end is zeroed before all that. Snapshots keep their own size, and everything in it.

Behind the disk's end lies VM state that no snapshot has yet (see ``vmstate``), and where that begins depends on the
size; it is forgotten.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from bottomhalf.block.watching import unwatched
from bottomhalf.drivers.qcow2.counters import FREED_REQUEST
from bottomhalf.drivers.qcow2.layout import L1_BYTES_MAX, OFFSET_MASK
from bottomhalf.drivers.qcow2.preallocation import co_preallocate

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.node import Qcow2Node


async def co_truncate(node: Qcow2Node, size: int, preallocation: str = "off") -> None:
    """Give the disk another size in bytes; ``preallocation`` of a new part as for a new image. OSError, ImageError."""
    metadata, mapping, header = node.metadata, node.mapping, node.header
    old = header.size
    if size < 0 or size % 512:
        raise OSError(errno.EINVAL, "The new size must be a multiple of 512", node.name)
    if header.snapshot_count and header.version < 3:
        raise OSError(errno.ENOTSUP, "Can't resize a v2 image which has snapshots", node.name)
    entries = -(-size >> mapping.l1_shift)
    if entries * 8 > L1_BYTES_MAX:
        raise OSError(errno.EFBIG, f"the L1 table would be larger than {L1_BYTES_MAX} bytes", node.name)
    node.bitmap_keeper.check_resize()
    if size < old:
        behind = min(-size & mapping.cluster_mask, old - size)
        if behind:
            # Nobody asked for that: not a write that a threshold or a bitmap would want to know of.
            await unwatched(node).co_write_zeroes(node, size, behind)
        await _tell(node, size)
        async with metadata.lock:
            await _forget_behind(node, size)
            await metadata.commit()
        if mapping.external:
            await node.data.co_truncate(size)
        return
    if mapping.external:
        await node.data.co_truncate(size)
    async with metadata.lock:
        await _forget_behind(node, old)
        if entries > header.l1_size:
            clusters = -(-entries * 8 // mapping.cluster_size)
            first = await metadata.allocate_together(clusters)
            metadata.move_l1(clusters * mapping.cluster_size // 8, first)
    await _zero_behind(node, old, size)
    if metadata.dirty:
        async with metadata.lock:
            await metadata.commit()
    await _tell(node, size)
    if header.raw_data and preallocation == "off":
        preallocation = "metadata"  # others read the data file by itself, where every cluster is in its place
    await co_preallocate(node, old, size, preallocation)


async def _tell(node: Qcow2Node, size: int) -> None:
    """Let the header say the new size, durably. OSError, and it is the old one."""
    metadata, header, old = node.metadata, node.header, node.header.size
    async with metadata.lock:
        await metadata.find_places()
        header.size = size
        metadata.header_changed()
        try:
            await metadata.commit()
        except BaseException:  # the disk has its old size for whoever uses it; so it has to have that tomorrow
            header.size = old
            metadata.header_changed()
            raise
        finally:
            node.refresh_size()  # also if it is the old one: the file may have grown, and those above have looked


async def _zero_behind(node: Qcow2Node, old: int, size: int) -> None:
    """Zero what would come to light behind the end of the disk. OSError, ImageError."""
    backing = node.backing
    # Who made it smaller before may have left something in the last cluster (QEMU does).
    end = min(size, old + (-old & node.mapping.cluster_mask))
    if backing is not None:
        end = max(end, min(size, backing.size))
    if end > old:
        await node.writer.co_zero(old, end - old, unmap=False, discard=False)


async def _forget_behind(node: Qcow2Node, size: int) -> None:
    """Give back what the guest has had behind the end, and VM state that lies there. With the lock held."""
    await node.metadata.find_places()
    await node.snapshots.forget_tables(-(-size >> node.mapping.l1_shift))
    await _unlink(node, -(-size >> node.mapping.cluster_bits))


async def _unlink(node: Qcow2Node, cluster: int) -> None:
    """Give back the guest's clusters from this one on, to the end of its L2 table. With the lock held."""
    metadata, mapping, writer = node.metadata, node.mapping, node.writer
    index = cluster << mapping.cluster_bits >> mapping.l1_shift
    if not cluster & (mapping.entries - 1) or not metadata.l1[index] & OFFSET_MASK:
        return
    for each in range(cluster, (index + 1) * mapping.entries):
        entry, bitmap = await writer.entry(each)
        if entry or bitmap:
            await metadata.make_room_for_changes()
            await writer.link(each, 0, 0, FREED_REQUEST)
