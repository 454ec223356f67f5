# SPDX-License-Identifier: Apache-2.0
"""What an image must be to be written, and what is done to it before it is.

An image that is marked corrupt is for reading only, until it is repaired. One that was not closed properly may have
counters that are too low, so it is repaired first; reading it needs none. Bits and bitmaps that we do not know how to
keep up to date are not true any more after the first write, and so are taken away before it.

Clause: "Header" (incompatible and autoclear features).
Invariant: nothing is written to an image before what it says of itself is true.
Test: tests/peers/test_qcow2_dirty.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bottomhalf.block.errors import ImageError
from bottomhalf.drivers.qcow2 import layout
from bottomhalf.drivers.qcow2.check import co_repair_dirty
from bottomhalf.drivers.qcow2.header import Header

if TYPE_CHECKING:
    from bottomhalf.drivers.qcow2.node import Qcow2Node


def check_writable(header: Header) -> None:
    """ImageError if the image must not be written."""
    if header.incompatible & layout.CORRUPT:
        raise ImageError("qcow2: Image is corrupt; cannot be opened read/write")


async def co_make_writable(node: Qcow2Node) -> None:
    """Before the tables are read. OSError, ImageError."""
    check_writable(node.header)
    if node.header.incompatible & layout.DIRTY:
        await co_repair_dirty(node.file, node.header)


def clear_unknown(node: Qcow2Node) -> bool:
    """Take away what we do not know; whether there was such a thing, and the header is to be written."""
    header = node.header
    unknown = node.bitmap_keeper.forget_unknown() or bool(header.autoclear & ~layout.AUTOCLEAR_KNOWN)
    if unknown:
        header.autoclear &= layout.AUTOCLEAR_KNOWN
        node.metadata.header_changed()
    return unknown
