# SPDX-License-Identifier: Apache-2.0
"""The header is written so that a power cut leaves the old one or the new one.

Only a sector is left whole. The first one has all fields, and where the name of the backing file lies; what does not
fit into it (the end of the extensions, that name) lies behind it. So that is written first, where the old first sector
does not look, and then the first sector refers to it. Three things may be in the way, and go out of it before, each
with one sector that still is the old header:

* the old name, where the extensions have become longer: it moves behind them;
* a new name: it goes behind the old one, which stays until nothing refers to it;
* the table of feature names, which is for people alone and so long that the list of extensions does not end in the
  first sector: it is left out meanwhile.

In a cluster that is too small for that the rest is written in place. Most changes are of fields alone, and one sector.

Clause: "Header", "Header extensions".
Invariant: after each write of a sector there is a header, with the old name or the new one.
Test: tests/drivers/qcow2/test_heading.py
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import layout
from bottomhalf.drivers.qcow2.header import Header
from bottomhalf.drivers.qcow2.layout import SECTOR_BYTES

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.metadata import Metadata


async def co_write_header(metadata: Metadata) -> None:
    """Make the header as it is in memory durable. OSError, ImageError if it does not fit."""
    data = metadata.header.to_bytes()
    if len(data) > SECTOR_BYTES:
        before = await metadata.read(0, metadata.mapping.cluster_size)
        data = _beside(metadata.header, before)
        if before[SECTOR_BYTES : len(data)] != data[SECTOR_BYTES:]:
            await _co_make_way(metadata, before)
            data = _beside(metadata.header, before)
            await metadata.write([(SECTOR_BYTES, data[SECTOR_BYTES:])])
            await metadata.file.co_flush()
    await metadata.write([(0, data[:SECTOR_BYTES])])
    await metadata.file.co_flush()


async def _co_make_way(metadata: Metadata, before: bytearray) -> None:
    """Let the old header look at nothing that the new one will write over, as far as there is room. ``before`` is the
    first cluster, and is kept up to date. OSError."""
    offset, length = Header.name_of(before)
    behind = _extensions_end(metadata.header)
    if offset + length > SECTOR_BYTES and offset < behind:
        place = _aligned(max(behind, offset + length))
        if place + length <= metadata.mapping.cluster_size:
            before[place : place + length] = before[offset : offset + length]
            await metadata.write([(place, before[place : place + length])])
            await metadata.file.co_flush()
            before[:SECTOR_BYTES] = Header.with_name_at(before[:SECTOR_BYTES], place)
            await metadata.write([(0, before[:SECTOR_BYTES])])
            await metadata.file.co_flush()
    with suppress(ImageError):
        first = _without_feature_names(before)
        if first is not None:
            before[:SECTOR_BYTES] = first
            await metadata.write([(0, first)])
            await metadata.file.co_flush()


def _beside(header: Header, before: bytearray) -> bytes:
    """The new header, laid out so that the old name stays where it is, if there is room for that."""
    offset, length = Header.name_of(before)
    end = offset + length
    if end <= SECTOR_BYTES or offset < _extensions_end(header):
        return header.to_bytes()
    name = bytes(before[offset:end])
    same = header.backing_file is not None and header.backing_file.encode("utf-8", "surrogateescape") == name
    try:
        made = bytearray(header.to_bytes(offset if same else _aligned(end)))
    except ImageError:
        return header.to_bytes()
    made.extend(bytes(max(end - len(made), 0)))
    made[max(offset, SECTOR_BYTES) : end] = name[max(SECTOR_BYTES - offset, 0) :]
    return bytes(made)


def _without_feature_names(before: bytearray) -> bytes | None:
    """The old first sector, in which the list of extensions ends; None if it does already, or does not fit. ImageError
    if it is none."""
    old = Header.parse(bytes(before))
    offset, _ = Header.name_of(before)
    room = min(offset or SECTOR_BYTES, SECTOR_BYTES) - old.header_bytes
    if len(Header.pack_extensions(old.extensions)) <= room:
        return None
    kept = [(kind, data) for kind, data in old.extensions if kind != layout.EXTENSION_FEATURE_NAMES]
    packed = Header.pack_extensions(kept)
    if len(packed) > room:
        return None
    first = bytearray(before[:SECTOR_BYTES])
    first[old.header_bytes : old.header_bytes + room] = packed.ljust(room, b"\0")
    return bytes(first)


def _extensions_end(header: Header) -> int:
    return len(replace(header, backing_file=None).to_bytes())


def _aligned(offset: int) -> int:
    return -(-offset // 8) * 8
