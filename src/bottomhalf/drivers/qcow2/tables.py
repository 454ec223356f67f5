# SPDX-License-Identifier: Apache-2.0
"""Guest offset to host offset (chapter "Cluster mapping").

A guest offset has three parts: which L1 entry, which L2 entry of the table that it names, which byte of the cluster. An
L2 table in memory is an array of numbers of this machine, so that looking one up costs an index; with extended entries
it has two for each cluster, and the second says of each of 32 subclusters whether it is allocated (low half) or reads
as zeroes (high half).

    for kind, host, count in mapping.runs(table, first_entry, in_cluster, length): ...

Clause: "Cluster mapping".
Invariant: each guest byte is of exactly one kind, and a run is as long as it can be.
Test: tests/drivers/qcow2/test_numbers.py
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    SECTOR_BYTES,
    SUBCLUSTERS,
    ZERO,
)

# What a run of guest bytes is.
DATA: Final = 0  # stored as it is, at a host offset
UNALLOCATED: Final = 1  # reads from the backing file, or as zeroes
ZEROES: Final = 2  # reads as zeroes
SQUEEZED: Final = 3  # compressed; the host "offset" is the entry

_SWAP: Final = sys.byteorder == "little"
_LOW: Final = 0xFFFF_FFFF


class Run(NamedTuple):
    """Guest bytes of one kind that lie side by side, on the host too."""

    kind: int
    host: int  # offset for DATA, the entry for SQUEEZED, else 0
    length: int


def unpack(data: bytes | bytearray | memoryview) -> array[int]:
    """Big-endian 64-bit numbers, as tables store them."""
    table = array("Q")
    table.frombytes(data)
    if _SWAP:
        table.byteswap()
    return table


def pack(table: array[int]) -> bytes:
    """The opposite of unpack()."""
    if _SWAP:
        table = array("Q", table)
        table.byteswap()
    return table.tobytes()


class Mapping:
    """How offsets are divided in an image, and what entries say."""

    __slots__ = (
        "cluster_bits",
        "cluster_mask",
        "cluster_size",
        "entries",
        "extended",
        "external",
        "l1_shift",
        "subcluster_bits",
        "words",
    )

    def __init__(self, cluster_bits: int, extended: bool, external: bool = False) -> None:
        self.cluster_bits = cluster_bits
        self.cluster_size = 1 << cluster_bits
        self.cluster_mask = self.cluster_size - 1
        self.extended = extended
        self.external = external  # data lie in a file of their own, where offset 0 is a place like others
        self.words = 2 if extended else 1  # array items per L2 entry
        self.entries = self.cluster_size // (8 * self.words)  # per L2 table
        self.l1_shift = cluster_bits + self.entries.bit_length() - 1
        self.subcluster_bits = cluster_bits - 5 if extended else cluster_bits

    def check_entry(self, entry: int, bitmap: int = 0) -> None:
        """ImageError for an L2 entry that cannot be."""
        if entry & COMPRESSED:
            if self.external:
                raise ImageError(f"a cluster is compressed in an image with an external data file (entry {entry:#x})")
            if bitmap:
                raise ImageError(f"a compressed cluster has subclusters (L2 entry {entry:#x}, bitmap {bitmap:#x})")
            return
        if entry & L2_RESERVED or (self.extended and entry & ZERO):
            raise ImageError(f"reserved bits are set in L2 entry {entry:#x}")
        if entry & OFFSET_MASK & self.cluster_mask:
            raise ImageError(f"Cluster allocation offset {entry & OFFSET_MASK:#x} unaligned (L2 entry {entry:#x})")
        if bitmap & (bitmap >> SUBCLUSTERS) & _LOW:
            raise ImageError(f"a subcluster is allocated and zero at once (L2 bitmap {bitmap:#x})")
        if bitmap & _LOW and not self.has_place(entry):
            raise ImageError(f"a subcluster is allocated in a cluster that is not (L2 bitmap {bitmap:#x})")

    def has_place(self, entry: int) -> bool:
        """Whether a cluster that is not compressed is allocated. In an external data file it may be so at offset 0:
        then COPIED says it."""
        return bool(entry & (OFFSET_MASK | COPIED if self.external else OFFSET_MASK))

    def cluster(self, table: array[int], index: int) -> Iterator[Run]:
        """The runs of one whole cluster. ImageError for what cannot be."""
        if not self.extended:
            entry = table[index]
            self.check_entry(entry)
            yield self._plain(entry)
            return
        entry, bitmap = table[2 * index], table[2 * index + 1]
        self.check_entry(entry, bitmap)
        if entry & COMPRESSED:
            yield Run(SQUEEZED, entry, self.cluster_size)
            return
        size = 1 << self.subcluster_bits
        start = kind = 0
        for n in range(SUBCLUSTERS + 1):
            found = -1 if n == SUBCLUSTERS else self._subcluster(bitmap, n)
            if n == 0:
                kind = found
            elif found != kind:
                host = (entry & OFFSET_MASK) + start * size if kind == DATA else 0
                yield Run(kind, host, (n - start) * size)
                start, kind = n, found

    def _plain(self, entry: int) -> Run:
        if entry & COMPRESSED:
            return Run(SQUEEZED, entry, self.cluster_size)
        if entry & ZERO:
            return Run(ZEROES, 0, self.cluster_size)
        host = entry & OFFSET_MASK
        return Run(DATA if self.has_place(entry) else UNALLOCATED, host, self.cluster_size)

    @staticmethod
    def _subcluster(bitmap: int, n: int) -> int:
        if bitmap >> n & 1:
            return DATA
        return ZEROES if bitmap >> (SUBCLUSTERS + n) & 1 else UNALLOCATED

    def runs(self, table: array[int], offset: int, length: int) -> Iterator[Run]:
        """What the guest bytes from ``offset`` on are, as far as one L2 table says it; runs that go on are joined."""
        index = offset >> self.cluster_bits & (self.entries - 1)
        skip = offset & self.cluster_mask
        kind, host, count = -1, 0, 0
        while length and index < self.entries:
            for run in self.cluster(table, index):
                if skip >= run.length:
                    skip -= run.length
                    continue
                take = min(run.length - skip, length)
                at = run.host + skip if run.kind == DATA else run.host
                joins = run.kind == kind and run.kind != SQUEEZED and (run.kind != DATA or at == host + count)
                if joins:
                    count += take
                else:
                    if count:
                        yield Run(kind, host, count)
                    kind, host, count = run.kind, at, take
                length -= take
                skip = 0
                if not length:
                    break
            index += 1
        if count:
            yield Run(kind, host, count)

    def side_by_side(self, table: array[int], offset: int, length: int) -> int:
        """Where guest bytes are stored, if plain data lie in one piece; else 0. Quick; not for extended entries."""
        first, inside = offset >> self.cluster_bits & (self.entries - 1), offset & self.cluster_mask
        entries = table[first : first + (inside + length + self.cluster_mask >> self.cluster_bits)]
        place = start = entries[0] & OFFSET_MASK
        for entry in entries:
            if entry & ~COPIED != place:
                return 0
            place += self.cluster_size
        whole = not start & self.cluster_mask and place - start >= inside + length
        return start + inside if whole and start else 0

    def squeezed(self, entry: int) -> tuple[int, int]:
        """(host offset, bytes at most) of a compressed cluster's data."""
        bits = 62 - (self.cluster_bits - 8)
        offset = entry & ((1 << bits) - 1)
        sectors = (entry >> bits & ((1 << (62 - bits)) - 1)) + 1
        return offset, sectors * SECTOR_BYTES - offset % SECTOR_BYTES

    def squeezed_entry(self, offset: int, length: int) -> int:
        """The opposite: the entry for so many compressed bytes at a host offset. ImageError if it cannot say that."""
        bits = 62 - (self.cluster_bits - 8)
        if offset + length >> bits:
            raise ImageError(f"a compressed cluster cannot lie at {offset:#x}: its entry has {bits} bits for that")
        sectors = (offset + length - 1) // SECTOR_BYTES - offset // SECTOR_BYTES
        return COMPRESSED | sectors << bits | offset
