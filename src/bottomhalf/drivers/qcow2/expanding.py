# SPDX-License-Identifier: Apache-2.0
"""Zero clusters become what reads as zeroes without saying so, as version 2 requires: unallocated ones, or, above a
backing file, written ones.

The disk's own are written like anything else; where a table is shared with a snapshot the disk gets its own. What then
is left are tables that snapshots alone have. Several may have the same one, and each counts all that it leads to. Such
a table is changed in place, for all of them at once: what its new entries refer to is durable and counted before they
are written, and what the old ones referred to is counted down after that. A power cut leaves some entries changed.

Clause: "Standard Cluster Descriptor", which in version 2 cannot say zeroes.
Invariant: the disk and each snapshot read the same, after each write.
Test: tests/drivers/qcow2/test_amend.py
"""

from __future__ import annotations

from array import array
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import snapshots, tables
from bottomhalf.drivers.qcow2.layout import COMPRESSED, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.node import Qcow2Node

L1_ENTRIES_MAX: Final = 8 << 20  # of all snapshots, those at the same place counted once; two of the largest


async def co_expand(node: Qcow2Node) -> None:
    """No cluster of the image is a zero cluster after that. Alone with the image. OSError, ImageError."""
    for index in range(len(node.metadata.l1)):
        await _expand_own(node, index)
    async with node.metadata.lock:
        await node.metadata.settle()
        known, _ = await snapshots.co_read(node.metadata)
        places = Counter((snapshot.l1_offset, snapshot.l1_size) for snapshot in known)
        if sum(entries for _, entries in places) > L1_ENTRIES_MAX:
            raise ImageError(f"the snapshots' L1 tables have more than {L1_ENTRIES_MAX} entries")
        paths: Counter[int] = Counter()  # how many snapshots have a table
        indices: dict[int, int] = {}  # where it is in their L1 tables
        for (l1_offset, entries), times in places.items():
            for index, entry in enumerate(tables.unpack(await node.metadata.read(l1_offset, entries * 8))):
                if entry & OFFSET_MASK:
                    paths[entry & OFFSET_MASK] += times
                    indices[entry & OFFSET_MASK] = index
        for offset, count in paths.items():
            await _expand_shared(node, offset, count, indices[offset] << node.mapping.l1_shift)
        await node.metadata.settle()


async def _expand_own(node: Qcow2Node, index: int) -> None:
    """Those in an L2 table of the disk."""
    metadata, mapping, size = node.metadata, node.mapping, node.mapping.cluster_size
    for at in range(mapping.entries):
        table = await metadata.l2_table(index)
        if table is None:
            return
        entry = table.entries[at]
        if entry & COMPRESSED or not entry & ZERO:
            continue
        cluster = (index << mapping.l1_shift >> mapping.cluster_bits) + at
        start = cluster << mapping.cluster_bits
        if node.header.backing_file is not None and start < node.size:
            await node.co_pwrite(start, memoryview(bytes(min(size, node.size - start))))
        else:
            async with metadata.lock:
                await metadata.make_room_for_changes()
                await node.writer.link(cluster, 0, 0)


async def _expand_shared(node: Qcow2Node, offset: int, paths: int, guest: int) -> None:
    """Those in an L2 table that so many snapshots have, from the guest's byte ``guest`` on, and the disk has not. With
    the lock held."""
    metadata, bits, size = node.metadata, node.mapping.cluster_bits, node.mapping.cluster_size
    entries = tables.unpack(await metadata.read(offset, size))
    zero = [n for n, entry in enumerate(entries) if entry & ZERO and not entry & COMPRESSED]
    if not zero:
        return
    assert all(entry & OFFSET_MASK != offset for entry in metadata.l1), "the disk has a table of its own by now"
    taken, gone = array("Q"), array("Q")
    try:
        for n in zero:
            if entries[n] & OFFSET_MASK:
                gone.extend([(entries[n] & OFFSET_MASK) >> bits] * paths)
            entries[n] = 0
            if node.header.backing_file is not None:
                cluster, _, _ = await metadata.allocate(1)
                taken.append(cluster)
                for _ in range(paths - 1):
                    await metadata.refer(cluster)
                    taken.append(cluster)
                zeroes: Any = bytes(size)
                if node.crypt is not None:  # what is stored in plain would be decrypted to noise
                    zeroes = node.crypt.encrypted(
                        guest + (n << bits) if node.crypt.by_guest else cluster << bits, zeroes
                    )
                await metadata.write_data([(cluster << bits, zeroes)])
                entries[n] = cluster << bits
        await metadata.commit(counters=True)
    except BaseException:
        metadata.free_all(taken)
        raise
    # From here on nobody knows whether the entries are on the disk: what fails leaks what they may refer to.
    await metadata.write([(offset, tables.pack(entries))])
    await metadata.file.co_flush()
    metadata.free_all(gone)
