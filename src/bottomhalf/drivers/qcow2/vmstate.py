# SPDX-License-Identifier: Apache-2.0
"""VM state: what a machine's memory and devices were, stored behind the disk's end for a snapshot to keep.

The L1 table may be longer than the disk needs. What its further entries lead to is no part of the disk; QEMU puts the
state of a machine there before it makes a snapshot, which then has it, and the disk has not (see ``snapshotting``).

Clause: "Snapshots" (VM state).
Invariant: it is no part of the disk, and a snapshot gives it back as it was saved.
Test: tests/drivers/qcow2/test_snapshots.py
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from bottomhalf.block.node import co_io
from bottomhalf.block.zeroes import fill_zeroes
from bottomhalf.drivers.qcow2.layout import L1_BYTES_MAX
from bottomhalf.host.request import WRITE, Request

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.node import Qcow2Node


def _base(node: Qcow2Node) -> int:
    shift = node.mapping.l1_shift
    return -(-node.header.size >> shift) << shift


async def co_save(node: Qcow2Node, offset: int, buffer: memoryview) -> None:
    """Store a piece of the state. OSError, ImageError."""
    metadata, mapping, header = node.metadata, node.mapping, node.header
    if header.external:
        raise OSError(errno.ENOTSUP, "an image with an external data file has no place for VM state", node.name)
    start = _base(node) + offset
    entries = -(-(start + len(buffer)) >> mapping.l1_shift)
    if offset < 0 or entries * 8 > L1_BYTES_MAX:
        raise OSError(errno.EFBIG, "the VM state is too large for the image", node.name)
    if entries > header.l1_size:
        async with metadata.lock:
            await metadata.grow_l1(entries)
            await metadata.commit()
    await metadata.at("vmstate_save")
    if node.crypt is not None:
        await co_io(node, WRITE, start, len(buffer), buffer)  # in whole sectors
    else:
        await node.writer.co_write([Request(WRITE, start, len(buffer), buffer)])


async def co_load(node: Qcow2Node, offset: int, buffer: memoryview) -> None:
    """Read a piece of the state; zeroes where nothing was stored. OSError, ImageError."""
    await node.metadata.at("vmstate_load")
    start = _base(node) + offset
    known = max(min((len(node.metadata.l1) << node.mapping.l1_shift) - start, len(buffer)), 0)
    if known:
        await node.co_pread(start, buffer[:known])
    fill_zeroes(buffer[known:])
