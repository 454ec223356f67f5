# SPDX-License-Identifier: Apache-2.0
"""Answers to BLOCK_STATUS: which parts of the export are data, holes, zeroes (context base:allocation), and which are
dirty in a bitmap (qemu:dirty-bitmap:NAME)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from bottomhalf.host.protocol import DATA, ZERO
from bottomhalf.host.request import Request
from bottomhalf.wire.nbd import replies
from bottomhalf.wire.nbd.batch import REQ_ONE
from bottomhalf.wire.nbd.constants import STATE_DIRTY, STATE_HOLE, STATE_ZERO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bottomhalf.block import BlockBackend
    from bottomhalf.block.bitmap import DirtyBitmap

EXTENTS_PER_REPLY_MAX: Final = 1024  # a client asks again for the rest
LOOKS_AT_ONCE_MAX: Final = 4096  # into the file, for the requests of one batch; then each gets one extent


def allocation_extents(
    backend: BlockBackend, offset: int, length: int, count_max: int, looks_max: int
) -> tuple[list[tuple[int, int]], int]:
    """(length, flags) of neighbouring extents from ``offset`` on, for base:allocation, at least one of them; and
    how many looks into the file it took, at most ``looks_max``."""
    extents: list[tuple[int, int]] = []
    looks = 0
    end = offset + length
    while offset < end and looks < looks_max:
        looks += 1
        status = backend.block_status(offset, end - offset) or (DATA, end - offset)
        bits, count = status
        flags = STATE_HOLE | STATE_ZERO if bits & ZERO and not bits & DATA else 0
        if extents and extents[-1][1] == flags:
            extents[-1] = (extents[-1][0] + count, flags)
        elif len(extents) == count_max:
            break
        else:
            extents.append((count, flags))
        offset += count
    return extents, looks


def dirty_extents(bitmap: DirtyBitmap, offset: int, length: int, count_max: int) -> list[tuple[int, int]]:
    """(length, flags) of neighbouring extents from ``offset`` on, for qemu:dirty-bitmap:NAME, at least one of them.
    What lies behind the bitmap's end is clean."""
    extents: list[tuple[int, int]] = []
    end = min(offset + length, bitmap.size)
    clean = offset + length - max(end, offset)
    while offset < end and len(extents) < count_max:
        dirty, count = bitmap.run(offset, end - offset)
        extents.append((count, STATE_DIRTY if dirty else 0))
        offset += count
    if clean and offset >= end:
        if extents and not extents[-1][1]:
            extents[-1] = extents[-1][0] + clean, 0
        elif len(extents) < count_max:
            extents.append((clean, 0))
    return extents


def block_status_reply(
    backend: BlockBackend,
    bitmaps: Mapping[str, DirtyBitmap],
    request: Request,
    contexts: dict[int, str],
    looks_max: int,
) -> tuple[bytes, int]:
    """All chunks of the answer, or one error chunk; and how many looks into the file it took. ``bitmaps`` are those of
    the export by context."""
    count_max = 1 if request.flags & REQ_ONE else EXTENTS_PER_REPLY_MAX
    offset, length, looks = request.offset, request.length, 1
    chunks = []
    last = max(contexts)
    for context, name in sorted(contexts.items()):
        if name in bitmaps:
            extents = dirty_extents(bitmaps[name], offset, length, count_max)
        else:
            try:
                extents, looks = allocation_extents(backend, offset, length, count_max, max(looks_max, 1))
            except OSError as error:
                number = error.errno or errno.EIO
                return replies.result_reply(request.cookie, -number, True, "block status failed"), 1
        chunks.append(replies.block_status(request.cookie, context, extents, done=context == last))
    return b"".join(chunks), looks
