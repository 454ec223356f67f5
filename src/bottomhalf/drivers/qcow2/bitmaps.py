# SPDX-License-Identifier: Apache-2.0
"""The directory of persistent bitmaps (chapter "Bitmaps"): where in the image they lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2.layout import OFFSET_MASK

BITMAPS_MAX: Final = 65535
DIRECTORY_BYTES_MAX: Final = 64 << 20
TABLE_ENTRIES_MAX: Final = 0x8000000
NAME_BYTES_MAX: Final = 1023

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


def parse_extension(data: bytes, cluster_size: int) -> tuple[int, int, int]:
    """(bitmaps, offset and size of the directory) from the header extension. ImageError."""
    if len(data) != _EXTENSION.size:
        raise ImageError(f"bitmaps_ext: Invalid extension length {len(data)}")
    count, reserved, size, offset = _EXTENSION.unpack(data)
    if reserved:
        raise ImageError("bitmaps_ext: Reserved field is not zero")
    if not count or count > BITMAPS_MAX or not size or size > DIRECTORY_BYTES_MAX or offset % cluster_size:
        raise ImageError(f"bitmaps_ext: {count} bitmaps in a directory of {size} bytes at {offset} cannot be")
    return count, offset, size


def parse_directory(data: bytes | bytearray, count: int, cluster_size: int) -> list[Bitmap]:
    """The entries of a directory. ImageError."""
    found: list[Bitmap] = []
    at = 0
    for number in range(count):
        if at + _ENTRY.size > len(data):
            raise ImageError(f"bitmap directory ends within entry {number}")
        offset, size, flags, kind, granularity, name_length, extra = _ENTRY.unpack_from(data, at)
        end = at + _ENTRY.size + extra + name_length
        if end > len(data) or name_length > NAME_BYTES_MAX or kind != 1 or offset % cluster_size:
            raise ImageError(f"bitmap directory entry {number} is invalid")
        if size > TABLE_ENTRIES_MAX:
            raise ImageError(f"bitmap directory entry {number} has a table of {size} entries")
        name = bytes(data[end - name_length : end]).decode("utf-8", "surrogateescape")
        found.append(Bitmap(name, offset, size, flags, granularity))
        at = -(-end // 8) * 8
    return found


def data_offset(entry: int) -> int:
    """Where the bits of a bitmap table's entry lie; 0 if they are all alike."""
    return entry & OFFSET_MASK
