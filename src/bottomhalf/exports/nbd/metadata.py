# SPDX-License-Identifier: Apache-2.0
"""Answers to BLOCK_STATUS: which parts of the export are data, holes, zeroes (context base:allocation)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bottomhalf.host.protocol import DATA, ZERO
from bottomhalf.host.request import Request
from bottomhalf.wire.nbd import replies
from bottomhalf.wire.nbd.batch import REQ_ONE
from bottomhalf.wire.nbd.constants import STATE_HOLE, STATE_ZERO

if TYPE_CHECKING:
    from bottomhalf.block import BlockBackend

EXTENTS_PER_REPLY_MAX: Final = 1024  # a client asks again for the rest; each costs a look into the file


def allocation_extents(backend: BlockBackend, offset: int, length: int, count_max: int) -> list[tuple[int, int]]:
    """(length, flags) of neighbouring extents from ``offset`` on, for base:allocation."""
    extents: list[tuple[int, int]] = []
    end = offset + length
    while offset < end and len(extents) <= count_max:
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
    return extents


def block_status_reply(backend: BlockBackend, request: Request, contexts: dict[int, str]) -> bytes:
    """All chunks of the answer, or one error chunk."""
    count_max = 1 if request.flags & REQ_ONE else EXTENTS_PER_REPLY_MAX
    try:
        extents = allocation_extents(backend, request.offset, request.length, count_max)
    except OSError as error:
        return replies.result_reply(request.cookie, -(error.errno or 5), True, "block status failed")
    last = max(contexts)
    return b"".join(
        replies.block_status(request.cookie, context, extents, done=context == last)
        for context in sorted(contexts)
    )
