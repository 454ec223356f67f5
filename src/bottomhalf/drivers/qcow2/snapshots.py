# SPDX-License-Identifier: Apache-2.0
"""The snapshot table (chapter "Snapshots"): which other disks live in the image.

Clause: "Snapshots".
Invariant: a table that was packed is parsed as it was.
Test: tests/drivers/qcow2/test_numbers.py
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2.layout import L1_BYTES_MAX, SNAPSHOT_TABLE_BYTES_MAX

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.metadata import Metadata

EXTRA_BYTES_MAX: Final = 1024
FIRST_BYTES: Final = 65536  # of a table that are read at first
# L1 offset and size, lengths of id and name, date (s, ns), VM clock (ns), VM state size (32 bits), extra data's length
ENTRY: Final = struct.Struct(">QIHHIIQII")
_EXTRA: Final = struct.Struct(">QQ")  # VM state size, disk size
_ICOUNT: Final = struct.Struct(">Q")


@dataclass(frozen=True)
class Snapshot:
    """One entry of the table."""

    id: str
    name: str
    l1_offset: int
    l1_size: int  # entries
    date_s: int
    date_ns: int
    vm_clock_ns: int
    vm_state_bytes: int
    disk_bytes: int | None  # None: that of the active disk (version 2)
    icount: int | None


def pack(entries: list[Snapshot], disk_bytes: int) -> bytes:
    """The table. An entry that does not say the size of its disk, as version 2 allows, is given ``disk_bytes``."""
    table = bytearray()
    for each in entries:
        table += bytes(-len(table) % 8)
        id, name = (text.encode("utf-8", "surrogateescape") for text in (each.id, each.name))
        extra = _EXTRA.pack(each.vm_state_bytes, disk_bytes if each.disk_bytes is None else each.disk_bytes)
        if each.icount is not None:
            extra += _ICOUNT.pack(each.icount)
        state = min(each.vm_state_bytes, 0xFFFFFFFF)
        lengths = len(id), len(name), each.date_s, each.date_ns, each.vm_clock_ns, state, len(extra)
        table += ENTRY.pack(each.l1_offset, each.l1_size, *lengths) + extra + id + name
    return bytes(table)


async def co_read(metadata: Metadata, *, names: bool = True) -> tuple[list[Snapshot], int]:
    """The image's snapshots, the oldest first, and how many bytes their table takes. Without ``names``, which may take
    as much memory as the table, all are called "". OSError, ImageError."""
    header = metadata.header
    if not header.snapshot_count:
        return [], 0
    return parse(await co_table(metadata), header.snapshot_count, header.cluster_size, names=names)


async def co_table(metadata: Metadata) -> bytearray:
    """The table's bytes, and perhaps some behind it; as much of it as the file has. OSError.

    How long it is only its entries say, each where the next one begins. So it is read in steps: an image that says that
    a file of terabytes is its table does not cost more than the entries that it has."""
    header = metadata.header
    room = min(SNAPSHOT_TABLE_BYTES_MAX, max(metadata.file.size - header.snapshots_offset, 0))
    length = min(room, FIRST_BYTES + 2 * ENTRY.size * header.snapshot_count)
    while True:
        data = await metadata.read(header.snapshots_offset, length)
        if length == room or _end(data, header.snapshot_count) <= length:
            return data
        del data  # before there is a larger one
        length = min(room, 4 * length)


def _end(data: bytearray, count: int) -> int:
    """Where the table ends, if all of it is there; else something behind ``data``."""
    at = 0
    for _ in range(count):
        at = -(-at // 8) * 8
        if at + ENTRY.size > len(data):
            return len(data) + 1
        fields = ENTRY.unpack_from(data, at)
        at += ENTRY.size + fields[2] + fields[3] + fields[8]
    return at


@dataclass(frozen=True)
class Scan:
    """A table that may be damaged, as far as it can be understood."""

    entries: list[Snapshot]
    length: int  # bytes
    incomplete: list[int]  # entries without the extra data that version 3 requires
    oversized: list[tuple[int, int]]  # entries with more extra data than anybody has, and how much
    overhanging: int  # entries behind the largest table that there may be


def _entry(data: bytes | bytearray, at: int, names: bool = True) -> tuple[Snapshot, int, int]:
    """The entry at ``at``, where it ends, and the length of its extra data. Behind ``data`` there are zeroes."""

    def take(start: int, count: int) -> bytes:
        return bytes(data[start : start + count]).ljust(count, b"\0")

    fields = ENTRY.unpack(take(at, ENTRY.size))
    l1_offset, l1_size, id_length, name_length, s, ns, clock_ns, state, extra_length = fields
    extra = at + ENTRY.size
    disk_bytes = icount = None
    if extra_length >= _EXTRA.size:
        state, disk_bytes = _EXTRA.unpack(take(extra, _EXTRA.size))
    if extra_length >= _EXTRA.size + _ICOUNT.size:
        (icount,) = _ICOUNT.unpack(take(extra + _EXTRA.size, _ICOUNT.size))
    begin = extra + extra_length
    id = name = ""
    if names:
        id = take(begin, id_length).decode("utf-8", "surrogateescape")
        name = take(begin + id_length, name_length).decode("utf-8", "surrogateescape")
    found = Snapshot(id, name, l1_offset, l1_size, s, ns, clock_ns, state, disk_bytes, icount)
    return found, begin + id_length + name_length, extra_length


def scan(data: bytes | bytearray, count: int, version: int) -> Scan:
    """As parse(), but for a check, which wants to know all that is wrong and tells it. Behind ``data`` there are
    zeroes."""
    entries: list[Snapshot] = []
    incomplete: list[int] = []
    oversized: list[tuple[int, int]] = []
    length = 0
    for number in range(count):
        entry, end, extra_length = _entry(data, -(-length // 8) * 8)
        if extra_length > EXTRA_BYTES_MAX:
            oversized.append((number, extra_length))
        elif extra_length < _EXTRA.size and version > 2:
            incomplete.append(number)
        if end > SNAPSHOT_TABLE_BYTES_MAX:
            return Scan(entries, length, incomplete, oversized, count - number)
        length = end
        entries.append(entry)
    return Scan(entries, length, incomplete, oversized, 0)


def parse(
    data: bytes | bytearray, count: int, cluster_size: int, *, names: bool = True
) -> tuple[list[Snapshot], int]:
    """``count`` entries from the table's bytes, which may go on behind it; and how many bytes it takes. ImageError."""
    found: list[Snapshot] = []
    at = 0
    for number in range(count):
        at = -(-at // 8) * 8
        if at + ENTRY.size > len(data):
            raise ImageError(f"snapshot table ends within entry {number}")
        entry, end, extra_length = _entry(data, at, names)
        if extra_length > EXTRA_BYTES_MAX:
            raise ImageError(f"snapshot table entry {number} has {extra_length} bytes of extra data")
        if end > len(data):
            raise ImageError(f"snapshot table ends within entry {number}")
        if entry.l1_size * 8 > L1_BYTES_MAX or (entry.l1_size and entry.l1_offset % cluster_size):
            raise ImageError(f"snapshot table entry {number}: L1 table invalid")
        at = end
        found.append(entry)
    if at > SNAPSHOT_TABLE_BYTES_MAX:
        raise ImageError("Snapshot table too large")
    return found, at
