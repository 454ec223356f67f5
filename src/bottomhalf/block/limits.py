# SPDX-License-Identifier: Apache-2.0
"""Requests that are larger than a node takes, or zero writes and discards that do not fit its granularity.

    splitter = Splitter(node, node.submit_fitting, RequestLimits(max_transfer=65536))     # in a driver
    pending = splitter.submit(requests)

What fits goes on as a list. The others are cut by a coroutine each, piece after piece: reads and writes at
``max_transfer``; zero writes and discards into an unaligned head, aligned pieces, and an unaligned tail. If the node
cannot zero a piece (ENOTSUP), zero bytes are written there, unless the caller forbids it; a discard is a hint.

A write that is to be durable is so when all of its pieces are, so there is one flush behind the last: a durable write
per piece would cost the more, the smaller the pieces are.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from bottomhalf.block.errors import check
from bottomhalf.host.request import DISCARD, FLUSH, FUA, NO_FALLBACK, READ, WRITE, WRITE_ZEROES, Request

if TYPE_CHECKING:
    from bottomhalf.block.node import Node

Submit: TypeAlias = Callable[[list[Request]], list[Request]]


@dataclass(frozen=True)
class RequestLimits:
    """In bytes, 0 for none. A maximum is a multiple of its alignment, and that of a power of two or not."""

    max_transfer: int = 0
    zeroes_alignment: int = 0
    max_zeroes: int = 0
    discard_alignment: int = 0
    max_discard: int = 0

    def of(self, op: int) -> tuple[int, int]:
        """(alignment, maximum) for requests of an op."""
        if op in (READ, WRITE):
            return 1, self.max_transfer
        if op == WRITE_ZEROES:
            return self.zeroes_alignment or 1, self.max_zeroes
        return (self.discard_alignment or 1, self.max_discard) if op == DISCARD else (1, 0)


class Splitter:
    """What stands before a driver with limits. ``submit`` is the driver's own door."""

    def __init__(self, node: Node, submit: Submit, limits: RequestLimits) -> None:
        self._node = node
        self._submit = submit
        self.limits = limits

    def submit(self, requests: list[Request]) -> list[Request]:
        """Take requests of one op; returns those that are not done yet."""
        op = requests[0].op
        alignment, maximum = self.limits.of(op)
        if op == FLUSH or (alignment == 1 and not maximum):
            return self._submit(requests)
        fitting: list[Request] = []
        others: list[Request] = []
        for request in requests:
            length = request.length
            fits = not (maximum and length > maximum) and not (request.offset % alignment or length % alignment)
            (fitting if fits else others).append(request)
        pending = self._submit(fitting) if fitting else []
        if others:
            pending = list(pending)
        for request in others:
            if self._node.start(request, self._serve(request)):
                pending.append(request)
        return pending

    async def _serve(self, request: Request) -> None:
        op, offset, end, flags = request.op, request.offset, request.offset + request.length, request.flags
        alignment, maximum = self.limits.of(op)
        flags, durable = flags & ~FUA, flags & FUA
        while offset < end:
            length = _piece(offset, end - offset, alignment, maximum)
            buffer = None
            if op in (READ, WRITE):
                begin = offset - request.offset
                buffer = request.buffer[begin : begin + length]
            result = await self._io(op, offset, length, buffer, flags)
            if result == -errno.ENOTSUP and op == WRITE_ZEROES and not flags & NO_FALLBACK:
                await self._node.write_zero_bytes(offset, length, 0, self.submit)
            elif result != -errno.ENOTSUP or op != DISCARD:
                check(result, self._node.name)
            offset += length
        if durable:
            check(await self._io(FLUSH, 0, 0, None, 0), self._node.name)

    async def _io(self, op: int, offset: int, length: int, buffer: memoryview | None, flags: int) -> int:
        from bottomhalf.block.node import co_submit

        request = Request(op, offset, length, buffer, flags)
        await co_submit(self._submit, request, self._node)
        return request.result


def _piece(offset: int, length: int, alignment: int, maximum: int) -> int:
    """Length of the first piece of a range."""
    head = offset % alignment
    if head:
        return min(length, alignment - head)
    if length > alignment:
        length -= length % alignment
    return min(length, maximum) if maximum else length
