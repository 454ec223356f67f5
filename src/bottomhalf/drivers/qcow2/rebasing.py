# SPDX-License-Identifier: Apache-2.0
"""Another backing file for an image whose content stays what it is (qemu-img rebase without -u).

Where the image has nothing of its own, what is read is the old backing file's. Each such piece is compared with what
the new one would show, and written into the image if it differs. Only when all of that is durable does the header name
the new file, so a crash on the way leaves an image with its old backing file and some clusters more.

    await co_rebase_safely(node, new, "base.raw", "raw")     # alone with the image; new: the opened backing file

Zeroes that are to hide something of the new file get zero entries (version 3), not clusters. What internal snapshots
have nothing of their own for is read from the new file from then on, as after QEMU's rebase.

Clause: "Header" (backing file); the rules are those of qemu-img rebase.
Invariant: the content is what it was, through whichever file the header names.
Test: tests/drivers/qcow2/test_rebasing.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from bottomhalf.block.errors import BlockError
from bottomhalf.drivers.qcow2 import amend
from bottomhalf.host import protocol

if TYPE_CHECKING:
    from bottomhalf.block import Node
    from bottomhalf.drivers.qcow2.node import Qcow2Node

PIECE_BYTES: Final = 2 << 20  # compared at a time; as much as the largest cluster

Progress = Callable[[int, int], object]


async def co_rebase_safely(
    node: Qcow2Node,
    new: Node | None,
    name: str | None,
    format: str | None,
    *,
    compress: bool = False,
    progress: Progress | None = None,
) -> None:
    """Copy what differs, then name the new backing file, or none. ``compress``: what is copied is stored compressed.
    ``progress`` is told the bytes that were looked at, and the disk's. BlockError, OSError, ImageError."""
    amend.check_backing(node, name, format)
    if compress and not node.can_compress:
        raise BlockError("Compression not supported for this file format")
    node.writer.hides = 0 if new is None else new.size
    offset = 0
    while offset < node.size:
        wanted = min(PIECE_BYTES - offset % PIECE_BYTES, node.size - offset)
        allocated, count = await node.co_is_allocated(offset, wanted)
        count = min(count, wanted)
        if not allocated:
            await _copy(node, new, offset, count, compress)
        offset += count
        if progress is not None:
            progress(offset, node.size)
    await node.co_flush()
    await amend.co_rebase(node, name, format)


async def _copy(node: Qcow2Node, new: Node | None, offset: int, length: int, compress: bool) -> None:
    """Write of a piece that is not allocated what the new file would not show."""
    if await _is_zero(node.backing, offset, length) and await _is_zero(new, offset, length):
        return
    old, shown = await _content(node.backing, offset, length), await _content(new, offset, length)
    if old == shown:
        return
    unit = 1 << node.mapping.subcluster_bits
    zeroes = bytes(unit)
    start, kind = 0, ""
    for at in range(0, length + unit, unit):
        part = old[at : at + unit]
        if at >= length or part == shown[at : at + unit]:
            found = ""
        else:
            found = "zeroes" if part == zeroes[: len(part)] else "data"
        if found != kind:
            if kind:
                await _write(node, offset + start, old[start:at], kind == "zeroes", compress)
            start, kind = at, found


async def _write(node: Qcow2Node, offset: int, data: bytes, zeroes: bool, compress: bool) -> None:
    """Write a run; its whole clusters as zero entries or compressed, if that is possible, and the rest as it is."""
    mask, end = node.mapping.cluster_mask, offset + len(data)
    first, stop = min(-(-offset & ~mask), end), end if end == node.size else end & ~mask
    if first >= stop or not (compress or (zeroes and node.header.version > 2)):
        first = stop = end
    with memoryview(data) as view:
        if offset < first:
            await node.co_pwrite(offset, view[: first - offset])
        if first < stop and zeroes and node.header.version > 2:
            await node.co_write_zeroes(first, stop - first)
        elif first < stop:
            await node.co_pwritev_compressed(first, stop - first, view[first - offset : stop - offset])
        if stop < end:
            await node.co_pwrite(stop, view[stop - offset :])


async def _is_zero(node: Node | None, offset: int, length: int) -> bool:
    """Whether all of it is known to read as zeroes; behind the end of a backing file are zeroes."""
    end = 0 if node is None else min(offset + length, node.size)
    while node is not None and offset < end:
        bits, count = await node.co_block_status(offset, end - offset)
        if not bits & protocol.ZERO:
            return False
        offset += count
    return True


async def _content(node: Node | None, offset: int, length: int) -> bytes:
    data = bytearray(length)
    known = 0 if node is None else max(min(length, node.size - offset), 0)
    if node is not None and known:
        await node.co_pread(offset, memoryview(data)[:known])
    return bytes(data)
