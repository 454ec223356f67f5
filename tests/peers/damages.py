# SPDX-License-Identifier: Apache-2.0
"""Images damaged in named ways: one field of one table, so that a program can be compared with another in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
FAR: Final = 0x1000_0000  # behind the end of all images here
BITMAPS: Final = 0x23852875


class Damaged:
    """An image's bytes, and where things are in them. Clusters of 4 KiB."""

    def __init__(self, image: bytes) -> None:
        self.bytes = bytearray(image)
        self.l1 = self.u64(40)
        self.table = self.u64(48)  # of refcounts
        self.snapshots = self.u64(64)
        self.block = self.u64(self.table)
        self.l2 = [self.u64(self.l1 + 8 * n) & OFFSET for n in range(self.u32(36))]
        self.end = -(-len(image) // 4096)  # clusters

    def u64(self, at: int) -> int:
        return int.from_bytes(self.bytes[at : at + 8], "big")

    def u32(self, at: int) -> int:
        return int.from_bytes(self.bytes[at : at + 4], "big")

    def put(self, at: int, value: int, size: int = 8) -> None:
        self.bytes[at : at + size] = value.to_bytes(size, "big")

    def flip(self, at: int, bits: int) -> None:
        self.put(at, self.u64(at) ^ bits)

    def count(self, cluster: int, value: int) -> None:
        self.put(self.block + 2 * cluster, value, 2)

    def entry(self, guest: int) -> int:
        """Where the L2 entry of a guest's byte is."""
        return self.l2[guest >> 21] + 8 * (guest >> 12 & 511)

    def host(self, guest: int) -> int:
        """The cluster of a guest's byte."""
        return (self.u64(self.entry(guest)) & OFFSET) >> 12

    def extension(self, kind: int) -> int:
        """Where the data of a header extension are."""
        at = self.u32(100)
        while self.u32(at) != kind:
            at += 8 + -(-self.u32(at + 4) // 8) * 8
        return at + 8


Damage = Callable[[Damaged], object]


def directory(image: Damaged) -> int:
    return image.u64(image.extension(BITMAPS) + 16)


# Guest bytes 0..64k are shared with the snapshot but for 4k..12k; 1M..1M+16k are, too; 2M..2M+8k and the compressed
# 3M..3M+8k are the disk's own.
DAMAGES: Final[dict[str, Damage]] = {
    "nothing": lambda i: None,
    # counters
    "data not counted": lambda i: i.count(i.host(0), 0),
    "data counted too often": lambda i: i.count(i.host(0x100000), 7),
    "data counted too little": lambda i: i.count(i.host(0x100000), 1),
    "L1 not counted": lambda i: i.count(i.l1 >> 12, 0),
    "header not counted": lambda i: i.count(0, 0),
    "refcount table not counted": lambda i: i.count(i.table >> 12, 0),
    "refcount block not counted": lambda i: i.count(i.block >> 12, 0),
    "behind the end counted": lambda i: i.count(i.end + 3, 1),
    "too often and not": lambda i: (i.count(i.host(0), 0), i.count(i.host(0x100000), 7)),
    # flags
    "L2 entry without COPIED": lambda i: i.flip(i.entry(0x200000), COPIED),
    "L2 entry with COPIED": lambda i: i.flip(i.entry(0), COPIED),
    "L1 entry without COPIED": lambda i: i.flip(i.l1, COPIED),
    "compressed with COPIED": lambda i: i.flip(i.entry(0x300000), COPIED),
    # entries
    "data unaligned": lambda i: i.flip(i.entry(0x200000), 0x200),
    "zeroes unaligned": lambda i: i.flip(i.entry(0x200000), 0x201),
    "L2 entry reserved": lambda i: i.flip(i.entry(0x200000), 1 << 56),
    "L2 entry reserved low": lambda i: i.flip(i.entry(0x200000), 2),
    "L2 table unaligned": lambda i: i.flip(i.l1 + 8, 0x200),
    "L1 entry reserved": lambda i: i.flip(i.l1 + 8, 1 << 56),
    "L1 entry reserved low": lambda i: i.flip(i.l1 + 8, 1),
    "L2 table behind the end": lambda i: i.put(i.l1 + 8, COPIED | FAR),
    "data behind the end": lambda i: i.put(i.entry(0x200000), COPIED | FAR),
    "data right behind the end": lambda i: i.put(i.entry(0x200000), COPIED | i.end << 12),
    "compressed behind the end": lambda i: i.put(i.entry(0x300000), COMPRESSED | FAR),
    "compressed far away": lambda i: i.put(i.entry(0x300000), COMPRESSED | 0x3FFFFFFFFFF000),
    # overlaps
    "data twice": lambda i: i.put(i.entry(0x210000), i.u64(i.entry(0x200000))),
    "data on L2": lambda i: i.put(i.entry(0x210000), i.l2[0] | COPIED),
    "data on the header": lambda i: i.put(i.entry(0x210000), COPIED),
    "data on a refcount block": lambda i: i.put(i.entry(0x210000), COPIED | i.block),
    "L2 on L1": lambda i: i.put(i.l1 + 8, COPIED | i.l1),
    "L2 twice": lambda i: i.put(i.l1 + 8, i.u64(i.l1)),
    # refcount table and blocks
    "block unaligned": lambda i: i.flip(i.table, 0x200),
    "block reserved": lambda i: i.flip(i.table, 1),
    "no block": lambda i: i.put(i.table, 0),
    "block behind the end": lambda i: i.put(i.table, FAR),
    "another block behind the end": lambda i: i.put(i.table + 8, FAR),
    "another block nowhere": lambda i: i.put(i.table + 8, 0x1234),
    "block twice": lambda i: i.put(i.table + 8, i.block),
    "block on L1": lambda i: i.put(i.table + 8, i.l1),
    "block beyond all": lambda i: i.put(i.table + 16, 0x7FFFFFFFFFFFF000),
    "refcount table behind the end": lambda i: i.put(48, FAR),
    "refcount table too long": lambda i: i.put(56, 2, 4),
    # snapshots
    "snapshot's L1 unaligned": lambda i: i.flip(i.snapshots, 0x200),
    "snapshot's L1 behind the end": lambda i: i.put(i.snapshots, FAR),
    "snapshot's L1 too large": lambda i: i.put(i.snapshots + 8, 0x7FFFFFFF, 4),
    "snapshot's L1 on the header": lambda i: i.put(i.snapshots, 0),
    "snapshot's L2 unaligned": lambda i: i.flip(i.u64(i.snapshots), 0x200),
    "snapshot with much extra data": lambda i: i.put(i.snapshots + 36, 1025, 4),
    "snapshot with too much extra data": lambda i: i.put(i.snapshots + 36, 0xFFFFFFFF, 4),
    "snapshot without extra data": lambda i: i.put(i.snapshots + 36, 0, 4),
    "snapshot with a long name": lambda i: i.put(i.snapshots + 14, 0xFFFF, 2),
    "two snapshots": lambda i: i.put(60, 2, 4),
    "65536 snapshots": lambda i: i.put(60, 65536, 4),
    "snapshot table behind the end": lambda i: i.put(64, FAR),
    "snapshot table unaligned": lambda i: i.flip(64, 8),
    # bitmaps
    "bitmap directory behind the end": lambda i: i.put(i.extension(BITMAPS) + 16, FAR),
    "bitmap directory unaligned": lambda i: i.flip(i.extension(BITMAPS) + 16, 0x200),
    "bitmap directory too short": lambda i: i.put(i.extension(BITMAPS) + 8, 8),
    "two bitmaps": lambda i: i.put(i.extension(BITMAPS), 2, 4),
    "no bitmaps": lambda i: i.put(i.extension(BITMAPS), 0, 4),
    "bitmap extension too short": lambda i: i.put(i.extension(BITMAPS) - 4, 16, 4),
    "bitmap table behind the end": lambda i: i.put(directory(i), FAR),
    "bitmap table unaligned": lambda i: i.flip(directory(i), 0x200),
    "bitmap table too large": lambda i: i.put(directory(i) + 8, 0x7FFFFFF, 4),
    "bitmap data unaligned": lambda i: i.put(i.u64(directory(i)), 0x1234567),
    "bitmap data behind the end": lambda i: i.put(i.u64(directory(i)), FAR),
    "bitmap of another type": lambda i: i.put(directory(i) + 16, 9, 1),
    "bitmap with unknown flags": lambda i: i.put(directory(i) + 12, 0xF0, 4),
    "bitmap in use": lambda i: i.put(directory(i) + 12, 1, 4),
    "bitmaps that do not count": lambda i: i.put(88, 0),
    # the header's bits, sizes
    "dirty": lambda i: i.put(72, 1),
    "corrupt": lambda i: i.put(72, 2),
    "dirty, corrupt, leaked": lambda i: (i.put(72, 3), i.count(i.host(0x100000), 7)),
    "corrupt and reserved": lambda i: (i.put(72, 2), i.flip(i.entry(0x200000), 2)),
    "dirty and not counted": lambda i: (i.put(72, 1), i.count(i.host(0x200000), 0)),
    "unknown autoclear bits": lambda i: i.put(88, 0xF1),
    "unknown incompatible bits": lambda i: i.put(72, 1 << 20),
    "the end is missing": lambda i: i.bytes.__delitem__(slice(-8192, None)),
    "half is missing": lambda i: i.bytes.__delitem__(slice(len(i.bytes) // 2, None)),
    "more at the end": lambda i: i.bytes.extend(bytes(409600)),
    "L1 behind the end": lambda i: i.put(40, FAR),
    "L1 on data": lambda i: i.put(40, i.host(0) << 12),
    "L1 too short": lambda i: i.put(24, 1 << 34),
}

# With extended L2 entries: clusters of 16 KiB, guest bytes 0..64k are data.


def _extended(image: Damaged) -> int:
    return image.l2[0]


EXTENDED: Final[dict[str, Damage]] = {
    "allocated and zero": lambda i: i.put(_extended(i) + 8, 1 << 32 | 0xFFFFFFFF),
    "allocated nowhere": lambda i: i.put(_extended(i) + 16 * 100 + 8, 1),
    "data unaligned": lambda i: i.flip(_extended(i), 0x200),
    "preallocated unaligned": lambda i: (i.flip(_extended(i), 0x200), i.put(_extended(i) + 8, 0)),
    "compressed with a bitmap": lambda i: (i.put(_extended(i), COMPRESSED | 0x8000), i.put(_extended(i) + 8, 1)),
}
