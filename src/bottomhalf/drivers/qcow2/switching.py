# SPDX-License-Identifier: Apache-2.0
"""Many counters, the disk's tables and the list of snapshots change at once, with one sector of the header.

An entry of the disk's tables says "the only one" (COPIED) if its counter is one, and check compares the two. They lie
in different sectors. So when a counter goes from one to two, or back, there is no order of writes in place at every
moment of which they fit. (At first there were moments in which they did not, as there are in QEMU's images.)

But the first sector of the header names both the refcount table and L1, and a sector is what a power cut leaves whole.
So what changes is written anew beside the old: the refcount blocks concerned, a refcount table that names them, the L2
tables concerned, L1. Then the header names the new ones, and the old ones are free. Before that the new clusters are
leaked, after that the old ones are, until the next commit.

    switch = Switch(metadata)                        # settled, with the lock held
    try:
        first = await switch.take(1)                 # for what is written anew
        await switch.reserve(blocks)                 # the refcount blocks in which counters will change
        for cluster in counted_once_more:
            await switch.count(cluster, 1)
        await switch.turn(l1, first, {"snapshot_count": 1, "snapshots_offset": where}, unused, forward=True)
    except BaseException:
        switch.give_up()
        raise

Cost: the refcount blocks that are concerned are in memory, 2 MiB for each 64 GiB in use (clusters of 64 KiB, 16 bits),
and as much is written as would be in place.

Clause: "Header", whose first sector it writes.
Invariant: the image is the old one or the new one, and good.
Test: tests/drivers/qcow2/test_crash_states.py
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from bottomhalf.drivers.qcow2 import refcounts, tables

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.metadata import Metadata

PIECES_MAX: Final = 64  # clusters that are written with one batch


class Switch:
    """One change. With the tables' lock held; nothing waits to be written when it begins."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._bits = metadata.header.cluster_bits
        self._taken: list[int] = []  # clusters that nobody uses without the change
        self._places: dict[int, int] = {}  # of new blocks, by their index: clusters
        self._blocks: dict[int, array[int]] = {}  # with the counters as they will be
        self._table = 0  # where the new refcount table will be: a cluster
        self._pieces: list[tuple[int, bytes]] = []
        self._turned = False

    async def take(self, count: int) -> int:
        """So many clusters side by side: the first one. OSError, ImageError."""
        first = await self._metadata.allocate_together(count)
        self._taken += range(first, first + count)
        return first

    def give_up(self) -> None:
        """It failed: what was taken is free, once the header on the disk is known to be the old one."""
        if not self._turned:
            self._metadata.free_all(self._taken)

    async def reserve(self, blocks: Iterable[int]) -> None:
        """Take room for these refcount blocks and for the refcount table, and make durable that all that was taken is
        in use. Counters may be changed from now on, nothing more is taken. OSError, ImageError."""
        metadata = self._metadata
        for index in sorted(set(blocks)):
            self._places[index] = await self.take(1)
        if self._places:
            clusters = 0
            while clusters != metadata.header.refcount_table_clusters:  # it may grow for that
                metadata.free_all(range(self._table, self._table + clusters))
                clusters = metadata.header.refcount_table_clusters
                self._table = await metadata.allocate_together(clusters)
            self._taken += range(self._table, self._table + clusters)
        await metadata.commit(counters=True)

    async def count(self, cluster: int, change: int) -> None:
        """Let a counter be another one, from the turn on. OSError, ImageError."""
        header = self._metadata.header
        per_block = refcounts.entries_of_block(header.cluster_bits, header.refcount_order)
        index, at = divmod(cluster, per_block)
        block = self._blocks.get(index)
        if block is None:
            assert index in self._places, "the block was not reserved"
            known = await self._metadata.counts(index * per_block, per_block)
            block = self._blocks[index] = refcounts.of(known, header.refcount_order)
        block[at] += change
        assert block[at], "what nobody uses is freed in the usual way, afterwards"

    async def write(self, cluster: int, data: bytes) -> None:
        """A new table, soon. OSError."""
        self._pieces.append((cluster << self._bits, data))
        if len(self._pieces) >= PIECES_MAX:
            await self._write_pieces()

    async def _write_pieces(self) -> None:
        pieces, self._pieces = self._pieces, []
        await self._metadata.write(pieces)

    async def turn(
        self, l1: array[int], l1_cluster: int, fields: dict[str, int], unused: Iterable[int], *, forward: bool
    ) -> None:
        """Write what is new, then the header. ``l1`` lies at ``l1_cluster`` then, or where it was if that is 0;
        ``fields`` are others of the header's first sector; ``unused`` are clusters that nobody uses any more then.

        OSError: it is as it was. But if it was the header that failed, nobody knows which one the disk has. The next
        commit writes it again: with ``forward`` the new one, otherwise the old. The one has to be chosen in which fewer
        clusters are said to be the disk's alone, for a write into those would change what the other one has."""
        metadata, header, bits = self._metadata, self._metadata.header, self._bits
        table = array("Q", metadata.refcount_table)
        for index, block in self._blocks.items():
            table[index] = self._places[index] << bits
            await self.write(self._places[index], refcounts.pack(block, header.refcount_order))
        fields = dict(fields)
        if self._blocks:
            await self.write(self._table, tables.pack(table))
            fields["refcount_table_offset"] = self._table << bits
        if l1_cluster:
            await self.write(l1_cluster, tables.pack(l1))
            fields |= {"l1_offset": l1_cluster << bits, "l1_size": len(l1)}
        await self._write_pieces()
        await metadata.file.co_flush()
        before = {name: getattr(header, name) for name in fields}
        for name, value in fields.items():
            setattr(header, name, value)
        try:
            await metadata.write_header()
        except BaseException:
            metadata.header_changed()
            if forward:
                self._turn_memory(l1, table, before, unused)
            else:
                for name, value in before.items():
                    setattr(header, name, value)
            raise
        self._turn_memory(l1, table, before, unused)

    def _turn_memory(
        self, l1: array[int], table: array[int], before: dict[str, int], unused: Iterable[int]
    ) -> None:
        """What the header names is true; the old blocks and the old refcount table are free soon."""
        metadata, bits = self._metadata, self._bits
        self._turned = True
        metadata.free_all(metadata.block_offset(index) >> bits for index in self._blocks)
        if self._blocks:
            first = before["refcount_table_offset"] >> bits
            metadata.free_all(range(first, first + metadata.header.refcount_table_clusters))
        metadata.free_all(unused)
        metadata.turn_to(l1, table, self._blocks)
