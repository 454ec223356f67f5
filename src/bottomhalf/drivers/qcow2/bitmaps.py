# SPDX-License-Identifier: Apache-2.0
"""The directory of persistent bitmaps (chapter "Bitmaps" of the specification), as bytes and as objects.

The header extension names the directory, which lies in clusters of its own; an entry names a bitmap's table:

======  ====================================================================================
bytes   entry of the directory
======  ====================================================================================
0-7     offset of the bitmap table
8-11    its entries
12-15   flags: 1 in use, 2 auto (it is enabled), 4 extra data are compatible
16      type, 1: dirty tracking
17      granularity bits
18-19   length of the name
20-23   length of extra data
24-     extra data, name, zeroes up to a multiple of 8
======  ====================================================================================

An entry of a bitmap table has the offset of a cluster of bits, or 0 if they are alike: zeroes, or ones if bit 0 is set.

Clause: "Bitmaps", "Bitmaps extension".
Invariant: a directory that was packed is parsed as it was; what QEMU would refuse is refused.
Test: tests/drivers/qcow2/test_numbers.py
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Final

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2.layout import OFFSET_MASK

IN_USE: Final = 1  # somebody is writing to the image, or was when he vanished: the bits are not to be believed
AUTO: Final = 2  # it follows writes

# Limits; the format leaves them open, and these are QEMU's.
BITMAPS_MAX: Final = 65535
DIRECTORY_BYTES_MAX: Final = BITMAPS_MAX * 1024
TABLE_ENTRIES_MAX: Final = 0x8000000
BITS_BYTES_MAX: Final = 0x20000000  # of one bitmap
NAME_BYTES_MAX: Final = 1023
GRANULARITY_BITS_MIN: Final = 9
GRANULARITY_BITS_MAX: Final = 31

ALL_ONES: Final = 1  # an entry of a table
_TABLE_RESERVED: Final = 0xFF00_0000_0000_01FE
_FLAGS_KNOWN: Final = 7
_DIRTY_TRACKING: Final = 1

_EXTENSION: Final = struct.Struct(">IIQQ")  # bitmaps, reserved, directory's size and offset
_ENTRY: Final = struct.Struct(">QIIBBHI")  # table's offset and entries, flags, type, granularity bits, name, extra data


@dataclass(frozen=True)
class Bitmap:
    """One entry of the directory."""

    name: str
    table_offset: int
    table_size: int  # entries
    flags: int
    granularity_bits: int
    extra: bytes = b""

    @property
    def in_use(self) -> bool:
        return bool(self.flags & IN_USE)

    @property
    def auto(self) -> bool:
        return bool(self.flags & AUTO)

    @property
    def granularity(self) -> int:
        return 1 << self.granularity_bits

    def marked(self) -> Bitmap:
        """The same, in use."""
        return replace(self, flags=self.flags | IN_USE)


def parse_extension(data: bytes, cluster_size: int) -> tuple[int, int, int]:
    """(bitmaps, offset and size of the directory) from the header extension. ImageError."""
    if len(data) != _EXTENSION.size:
        raise ImageError("bitmaps_ext: Invalid extension length")
    count, reserved, size, offset = _EXTENSION.unpack(data)
    if reserved:
        raise ImageError("bitmaps_ext: Reserved field is not zero")
    if count > BITMAPS_MAX:
        raise ImageError(
            f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {BITMAPS_MAX}"
        )
    if not count:
        raise ImageError("found bitmaps extension with zero bitmaps")
    if offset % cluster_size or not offset or offset + size >= 1 << 63:
        raise ImageError("bitmaps_ext: invalid bitmap directory offset")
    if size > DIRECTORY_BYTES_MAX:
        raise ImageError(
            f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size ({DIRECTORY_BYTES_MAX})"
        )
    if not size:
        raise ImageError("Requested bitmap directory size is zero")
    return count, offset, size


def pack_extension(count: int, offset: int, size: int) -> bytes:
    """The header extension for a directory."""
    return _EXTENSION.pack(count, 0, size, offset)


def parse_directory(data: bytes | bytearray, count: int, cluster_size: int) -> list[Bitmap]:
    """The entries of a directory. ImageError."""
    found: list[Bitmap] = []
    at = 0
    while at < len(data):
        if len(found) == count:
            raise ImageError("More bitmaps found than specified in header extension")
        if at + _ENTRY.size > len(data):
            raise ImageError("Broken bitmap directory")
        offset, size, flags, kind, granularity, name_length, extra_length = _ENTRY.unpack_from(data, at)
        begin = at + _ENTRY.size
        end = begin + extra_length + name_length
        if end > len(data):
            raise ImageError("Broken bitmap directory")
        name = bytes(data[end - name_length : end]).decode("utf-8", "surrogateescape")
        if not (
            kind == _DIRTY_TRACKING
            and not flags & ~_FLAGS_KNOWN
            and GRANULARITY_BITS_MIN <= granularity <= GRANULARITY_BITS_MAX
            and 0 < name_length <= NAME_BYTES_MAX
            and offset
            and not offset % cluster_size
            and offset < 1 << 56
            and 0 < size <= TABLE_ENTRIES_MAX
            and size * cluster_size <= BITS_BYTES_MAX
        ):
            raise ImageError(f"Bitmap '{name}' doesn't satisfy the constraints")
        extra = bytes(data[begin : begin + extra_length])
        found.append(Bitmap(name, offset, size, flags, granularity, extra))
        at = -(-end // 8) * 8
    if len(found) < count:
        raise ImageError("Less bitmaps found than specified in header extension")
    return found


def pack_directory(entries: list[Bitmap]) -> bytes:
    """A directory with these entries."""
    made = []
    for entry in entries:
        name = entry.name.encode("utf-8", "surrogateescape")
        packed = (
            _ENTRY.pack(
                entry.table_offset,
                entry.table_size,
                entry.flags,
                _DIRTY_TRACKING,
                entry.granularity_bits,
                len(name),
                len(entry.extra),
            )
            + entry.extra
            + name
        )
        made.append(packed + bytes(-len(packed) % 8))
    return b"".join(made)


def entry_bytes(name: str) -> int:
    """How long an entry of the directory for a bitmap of that name is, without extra data."""
    return -(-(_ENTRY.size + len(name.encode("utf-8", "surrogateescape"))) // 8) * 8


def table_entries(size: int, granularity: int, cluster_size: int) -> int:
    """How many clusters of bits a disk of ``size`` bytes takes; one at least is written for an empty disk."""
    return max(-(-size // (granularity * cluster_size * 8)), 1)


def check_table_entry(entry: int, cluster_size: int) -> None:
    """ImageError for an entry of a bitmap table that cannot be."""
    offset = data_offset(entry)
    if entry & _TABLE_RESERVED or (offset and entry & ALL_ONES) or offset % cluster_size:
        raise ImageError(f"bitmap table entry {entry:#x} is invalid")


def data_offset(entry: int) -> int:
    """Where the bits of a bitmap table's entry lie; 0 if they are all alike."""
    return entry & OFFSET_MASK
