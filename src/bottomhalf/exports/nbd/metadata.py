# SPDX-License-Identifier: Apache-2.0
"""Answers to BLOCK_STATUS: which parts of the export are data, holes, zeroes (context base:allocation)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from bottomhalf.host.protocol import DATA, ZERO
from bottomhalf.host.request import Request
from bottomhalf.wire.nbd import replies
from bottomhalf.wire.nbd.batch import REQ_ONE
from bottomhalf.wire.nbd.constants import STATE_HOLE, STATE_ZERO

if TYPE_CHECKING:
    from bottomhalf.block import BlockBackend

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


def block_status_reply(
    backend: BlockBackend, request: Request, contexts: dict[int, str], looks_max: int
) -> tuple[bytes, int]:
    """All chunks of the answer, or one error chunk; and how many looks into the file it took."""
    count_max = 1 if request.flags & REQ_ONE else EXTENTS_PER_REPLY_MAX
    try:
        extents, looks = allocation_extents(
            backend, request.offset, request.length, count_max, max(looks_max, 1)
        )
    except OSError as error:
        number = error.errno or errno.EIO
        return replies.result_reply(request.cookie, -number, True, "block status failed"), 1
    last = max(contexts)
    chunks = [
        replies.block_status(request.cookie, context, extents, done=context == last)
        for context in sorted(contexts)
    ]
    return b"".join(chunks), looks
