# SPDX-License-Identifier: Apache-2.0
"""Space that is taken before it is written (``preallocation=metadata``, ``falloc``, ``full``).

All modes give every cluster of the disk its place, so that later writes change no table. They differ in what the file
system is asked for: ``metadata`` leaves holes, ``falloc`` reserves blocks, ``full`` writes zeroes. With extended L2
entries a cluster gets its place, but its subclusters stay unallocated: a backing file can still be seen through them.

Clusters are linked one L2 table at a time, each with its data behind it in the file, and committed when the tables in
memory are too many: a crash in between leaves an image of which less is preallocated.

Clause: "Cluster mapping"; the modes are QEMU's.
Invariant: at each moment a good image, of which less may be preallocated.
Test: tests/peers/test_qcow2_forms.py
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from bottomhalf.drivers.qcow2.layout import COMPRESSED, COPIED, ZERO
from bottomhalf.drivers.qcow2.metadata import refresh_sizes
from bottomhalf.drivers.qcow2.together import co_submit_all
from bottomhalf.host.request import WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block import Node
    from bottomhalf.drivers.qcow2.node import Qcow2Node

MODES: Final = ("off", "metadata", "falloc", "full")


async def co_preallocate(node: Qcow2Node, start: int, end: int, mode: str) -> None:
    """Give the guest's bytes from ``start`` to ``end`` their places, as far as they have none. OSError, ImageError."""
    if mode == "off" or start >= end:
        return
    metadata, mapping = node.metadata, node.mapping
    bits = mapping.cluster_bits
    cluster, stop = start >> bits, -(-end >> bits)
    if mapping.external and mode != "metadata":
        await _take(node.data, start, end, mode)
    while cluster < stop:
        async with metadata.lock:
            await metadata.make_room_for_changes()
            last = min(stop, (cluster | mapping.entries - 1) + 1)
            while cluster < last:
                cluster += await _give_places(node, cluster, last - cluster, mode)
    if mapping.external and node.data.size < end:
        await node.data.co_truncate(end)
        refresh_sizes(node.data)


async def _give_places(node: Qcow2Node, cluster: int, most: int, mode: str) -> int:
    """Clusters of one L2 table, from this one on; how many were looked at. With the lock held."""
    metadata, mapping = node.metadata, node.mapping
    bits, words, of_table = mapping.cluster_bits, mapping.words, cluster << mapping.cluster_bits >> mapping.l1_shift
    at = (cluster & mapping.entries - 1) * words
    table = await metadata.writable_table(of_table)
    if table.entries[at] & COMPRESSED or mapping.has_place(table.entries[at]):
        return 1
    count = _alike(table.entries, at, words, most)
    first = cluster
    if not mapping.external:
        first, count, virgin = await metadata.allocate(count)
        try:
            # What was used before must not be seen again; where subclusters stay unallocated it is not.
            await _take(node.file, first << bits, (first + count) << bits, mode, clean=virgin or mapping.extended)
            table = await metadata.writable_table(of_table)  # it may have been dropped meanwhile
        except BaseException:
            metadata.free_all(range(first, first + count))
            raise
    for n in range(count):
        index = (cluster + n) & mapping.entries - 1
        entry = (first + n) << bits | COPIED | table.entries[index * words] & ZERO
        metadata.set_entry(table, index, entry, table.entries[index * words + 1] if mapping.extended else 0)
    return count


def _alike(entries: array[int], at: int, words: int, most: int) -> int:
    """How many entries from this one on say the same."""
    same, count = entries[at : at + words], 1
    while count < most and entries[at + count * words : at + (count + 1) * words] == same:
        count += 1
    return count


async def _take(file: Node, start: int, end: int, mode: str, *, clean: bool = True) -> None:
    """Make the file that long, with what the mode asks for; what is not ``clean`` is zeroed."""
    if mode == "full":
        await file.write_zero_bytes(start, end - start, 0)
    elif mode == "falloc" or not clean:
        await co_submit_all(file, [Request(WRITE_ZEROES, start, end - start)])
    elif file.size < end:
        await file.co_truncate(end)
    refresh_sizes(file)
