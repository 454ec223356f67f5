# SPDX-License-Identifier: Apache-2.0
"""Growing a disk with space that is there already: ``preallocation`` of a truncate.

========  ==========================================================================================
off       the new part is a hole
falloc    it is allocated, and reads as zeroes; ENOTSUP where the file system cannot do that
full      zero bytes are written
========  ==========================================================================================

    await co_resize(node, new_size, Preallocation.FALLOC)

Node.co_grow() does it, in a driver's own way or with what every node has: truncate first, then zero the new part,
without holes. If that fails the disk gets its old size again. ``metadata`` is for formats that have some (qcow2): every
cluster of the new part gets its place.
"""

from __future__ import annotations

import errno
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from bottomhalf.block.errors import BlockError, check
from bottomhalf.host.request import NO_FALLBACK, WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block.node import Node

FILE_BYTES_MAX: Final = (1 << 63) - 1  # an offset of a file


class Preallocation(StrEnum):
    """PreallocMode."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


async def co_resize(node: Node, size: int, preallocation: Preallocation = Preallocation.OFF) -> None:
    """Give a node another size in bytes. BlockError for what cannot be asked, OSError for what fails; then the size is
    the old one, unless that fails as well. The caller holds the permission to resize."""
    old = node.size
    if size < 0:
        raise BlockError("Image size cannot be negative")
    if preallocation == Preallocation.METADATA and not node.preallocates_metadata:
        raise BlockError("Unsupported preallocation mode 'metadata'")
    if preallocation != Preallocation.OFF and size < old:
        raise BlockError("Preallocation can't be used for shrinking files")
    if preallocation == Preallocation.OFF or size == old:
        await node.co_truncate(size)
    else:
        await node.co_grow(size, preallocation)


async def grow_and_zero(node: Node, size: int, preallocation: Preallocation) -> None:
    """What Node.co_grow() is unless a driver knows better."""
    from bottomhalf.block.node import co_submit

    old = node.size
    await node.co_truncate(size)
    try:
        if preallocation == Preallocation.FULL:
            await node.write_zero_bytes(old, size - old, 0, node.submit_batch)
        else:
            request = Request(WRITE_ZEROES, old, size - old, None, NO_FALLBACK)
            await co_submit(node.submit_batch, request, node)
            check(request.result, f"Could not preallocate {size - old} bytes of {node.describe()}")
    except OSError as error:
        try:
            await node.co_truncate(old)
        except OSError as second:
            raise OSError(
                second.errno or errno.EIO, f"it cannot be given its old size again: {second.strerror}", node.name
            ) from error
        raise
