# SPDX-License-Identifier: Apache-2.0
"""Drivers ``null-co`` and ``null-aio``: a disk that stores nothing, to measure what is above it.

Both take ``size`` (default 1 GiB), ``latency-ns`` and ``read-zeroes`` (else reads leave the buffer as it is). The
difference is in how they finish: null-co is a coroutine and, without latency, is done when it returns; null-aio is
a callback driver and never finishes inside the submitting call: a bottom half or, with latency, a timer completes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bottomhalf.aio import deferred, sleep_ns
from bottomhalf.block import BlockError, Node
from bottomhalf.host.protocol import DATA, ZERO
from bottomhalf.host.request import READ, Request, deliver

if TYPE_CHECKING:
    from bottomhalf.block import Graph

SIZE_DEFAULT: Final = 1 << 30


class _NullNode(Node):
    is_protocol = True
    handles_fua = True  # nothing is stored, so everything is safe

    def __init__(
        self,
        graph: Graph,
        name: str = "",
        *,
        size: int = SIZE_DEFAULT,
        latency_ns: int = 0,
        read_zeroes: bool = False,
        read_only: bool = False,
        unmap: bool = False,
    ) -> None:
        if not 0 <= latency_ns < 1 << 63:
            raise BlockError("latency-ns is invalid")
        if size < 0:
            raise BlockError(f"Value '{size}' is out of range for parameter 'size'")
        super().__init__(graph, name, read_only=read_only, unmap=unmap)
        self.size = self._size = size
        self.latency_ns = latency_ns
        self.read_zeroes = read_zeroes

    def open_size(self) -> int:
        return self._size

    def allocated_size(self) -> int:
        return 0

    def fill(self, requests: list[Request]) -> None:
        """What a read brings: zeroes if that was asked for."""
        if self.read_zeroes and requests[0].op == READ:
            for request in requests:
                request.buffer[:] = bytes(request.length)

    def block_status(self, offset: int, length: int) -> tuple[int, int]:
        return (ZERO if self.read_zeroes else DATA), length


class NullCoNode(_NullNode):
    """The coroutine form: done at once without latency."""
    driver = "null-co"

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        if self.latency_ns:
            return super().submit_batch(requests)
        self.fill(requests)
        return self.finish(requests, 0)

    async def co_pread(self, offset: int, buffer: memoryview) -> None:
        await self._pass_time()
        if self.read_zeroes:
            buffer[:] = bytes(len(buffer))

    async def co_pwrite(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        await self._pass_time()

    async def co_flush(self) -> None:
        await self._pass_time()

    async def co_discard(self, offset: int, length: int) -> None:
        await self._pass_time()

    async def co_write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        await self._pass_time()

    async def _pass_time(self) -> None:
        if self.latency_ns:
            await sleep_ns(self.latency_ns)


class NullAioNode(_NullNode):
    """The callback form: never done inside the submitting call."""
    driver = "null-aio"

    def submit_batch(self, requests: list[Request]) -> list[Request]:
        batch = list(requests)

        def complete() -> None:
            self.fill(batch)
            self.finish(batch, 0)
            with deferred():
                deliver(batch)

        if self.latency_ns:
            context = self.context
            context.timer(complete, name="null-aio latency").arm_ns(context.now_ns() + self.latency_ns)
        else:
            self.context.schedule_oneshot(complete)
        return requests
