# SPDX-License-Identifier: Apache-2.0
"""A load on a backend: so many requests of one kind, so many of them in flight, and how long that took.

What measures must not be what is measured. A coroutine per request would cost more than the block layer below it, so
a load travels in batches: what one list of completions brought back is submitted again as one list, with the same
request objects and buffers. Requests that are done at once go round through a bottom half, so that the context's
other work has its turn, and so that one batch after another does not grow the stack.

    load = Load(backend, count=75000, depth=64, length=4096)
    load.run()                     # plain code; waits in the backend's context
    print(load.seconds)

Flushes follow after every ``flush_interval`` requests. With ``drain`` nothing is in flight when one begins and
nothing is sent before it ends; without, it goes beside the others, above the depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import kick, wait_while
from bottomhalf.aio.io import SUBMIT_AT
from bottomhalf.block.errors import BlockError
from bottomhalf.host.request import FLUSH, IN_PROGRESS, OP_NAMES, READ, WRITE, Request

if TYPE_CHECKING:
    from bottomhalf.block.backend import BlockBackend

BUFFER_BYTES_MAX: Final = 1 << 32  # of all buffers together; a depth times a length beyond that is a mistake
PIECE: Final = SUBMIT_AT  # what an idle device gets at a time: the next is prepared while it works on the last
_PAGE: Final = 4096  # what buffers are aligned to at least, so that no file needs them copied


def steps(start: int, step: int, size: int) -> Iterator[int]:
    """Offsets from ``start`` on, ``step`` apart; beyond ``size`` they begin again from the front."""
    offset = start
    while True:
        yield offset
        offset += step
        if offset >= size > 0:
            offset %= size


class Load:
    """``count`` READs or WRITEs of ``length`` bytes, ``depth`` in flight. Home thread of the backend's context.

    Offsets go on by ``step`` (None: by ``length``) from ``offset`` on, or come from ``offsets``. Writes carry bytes of
    value ``pattern``. BlockError if the numbers make no sense."""

    def __init__(
        self,
        backend: BlockBackend,
        *,
        op: int = READ,
        count: int,
        depth: int,
        length: int,
        offset: int = 0,
        step: int | None = None,
        offsets: Iterator[int] | None = None,
        pattern: int = 0,
        flush_interval: int = 0,
        drain: bool = True,
    ) -> None:
        if op not in (READ, WRITE) or count < 1 or depth < 1 or length < 1 or flush_interval < 0:
            raise BlockError("a load is reads or writes, at least one, of at least one byte, one at a time")
        depth = min(depth, count)
        stride = -(-length // _PAGE) * _PAGE
        if stride * depth > BUFFER_BYTES_MAX:
            raise BlockError(f"{depth} buffers of {length} bytes are more than {BUFFER_BYTES_MAX} bytes")
        self.failure: OSError | None = None  # why it ended early
        self.seconds = 0.0
        self._backend = backend
        self._context = backend.context
        self._op = op
        self._left = count  # not sent yet
        self._until_flush = self._flush_interval = flush_interval
        self._drain = drain
        self._in_flight = 0  # reads and writes
        self._flushes = 0  # in flight
        self._offsets = steps(offset, length if step is None else step, backend.size) if offsets is None else offsets
        self._queue = queue = backend.queue(self._complete)
        self._arena = arena = self._context.host.arena(stride * depth)
        if op == WRITE and pattern:
            arena.view[:] = bytes([pattern]) * arena.size
        self._requests = []
        for at in range(0, stride * depth, stride):
            request = Request(op, 0, length, arena.view[at : at + length])
            request.address = arena.address + at if arena.address else 0
            request.owner = queue
            self._requests.append(request)
        self._idle: list[Request] = []  # that wait for a flush, or for the next turn of the loop
        self._half = self._context.bottom_half(self._go, name="load")
        self._ended = False

    @property
    def done(self) -> bool:
        """Whether nothing is left to send, and nothing in flight."""
        return self._ended

    def run(self) -> None:
        """Carry it out and wait for its end. OSError if a request failed."""
        started_ns = self._context.now_ns()
        self._idle = list(self._requests)
        self._half.schedule()
        wait_while(self._context, lambda: not self._ended, what="the end of a load")
        self.seconds = (self._context.now_ns() - started_ns) / 1e9
        self._half.delete()
        for request in self._requests:
            request.buffer = None
        self._arena.close()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Send nothing more. It ends when nothing is in flight, as if what was sent had been all."""
        self._left = 0
        self._half.schedule()

    def _go(self) -> None:
        """Send as much as may be in flight."""
        requests, self._idle = self._idle, []
        self._send(requests)

    def _send(self, requests: list[Request]) -> None:
        may = self._left
        if self._flush_interval:
            if self._drain and self._flushes:
                may = 0
            elif not self._drain and not self._until_flush:
                self._until_flush = self._flush_interval
                self._flush()
            may = min(may, self._until_flush)
        if may < len(requests):
            self._idle += requests[may:]
            requests = requests[:may]
        count = len(requests)
        if not count:
            self._settle()
            return
        for request, offset in zip(requests, islice(self._offsets, count), strict=True):
            request.offset = offset
            request.result = IN_PROGRESS
        self._left -= count
        if self._flush_interval:
            self._until_flush -= count
        self._in_flight += count
        pending = self._queue.submit(requests)
        if len(pending) < count:
            if pending:
                waiting = {id(request) for request in pending}
                requests = [request for request in requests if id(request) not in waiting]
            self._take(requests)
            self._idle += requests
            if self._left:
                self._half.schedule()
            else:
                self._settle()
        elif self._flush_interval and self._idle and self._left:
            self._half.schedule()  # the rest of the batch belongs behind the flush

    def _complete(self, requests: list[Request]) -> None:
        if self._flushes:
            flushes = [request for request in requests if request.op == FLUSH]
            if flushes:
                requests = [request for request in requests if request.op != FLUSH]
                self._flushed(flushes)
        self._take(requests)
        if self._idle:
            requests = self._idle + requests
            self._idle = []
        if self._in_flight or len(requests) <= PIECE:
            self._send(requests)
        else:
            for at in range(0, len(requests), PIECE):
                self._send(requests[at : at + PIECE])

    def _take(self, requests: list[Request]) -> None:
        self._in_flight -= len(requests)
        for request in requests:
            if request.result:
                self._failed(request)

    def _failed(self, request: Request) -> None:
        """The first failure ends the load, as soon as nothing is in flight."""
        self._left = 0
        if self.failure is None:
            text = f"{OP_NAMES[request.op]} of {request.length} bytes at {request.offset}"
            size = self._backend.size
            if request.op != FLUSH and request.offset + request.length > size:
                text += f", and the image ends at {size}"
            self.failure = OSError(-request.result, text)

    def _settle(self) -> None:
        """Nothing could be sent: look whether a flush is due, or whether this is the end."""
        if self._in_flight or self._flushes:
            return
        if self._flush_interval and not self._until_flush and self.failure is None:
            self._until_flush = self._flush_interval
            self._flush()
        elif not self._left:
            self._ended = True
            kick()

    def _flush(self) -> None:
        flush = Request(FLUSH)
        flush.owner = self._queue
        self._flushes += 1
        if not self._queue.submit([flush]):
            self._flushed([flush])

    def _flushed(self, requests: list[Request]) -> None:
        self._flushes -= len(requests)
        for request in requests:
            if request.result:
                self._failed(request)
        self._half.schedule()
