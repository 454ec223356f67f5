# SPDX-License-Identifier: Apache-2.0
"""The transmission phase of one client: the hot path of the server.

One receive brings many requests; all of them are parsed at once, each kind goes down the block layer as one list,
what is done when the call returns is answered with one send. Nothing on this way creates a coroutine or a
``bytes`` per request:

* replies of reads are laid out in an arena, header and room for the data side by side, before the reads are
  submitted; bytes are read straight into their place;
* payloads of writes are slices of the receive buffer;
* large reads whose bytes are in the page cache go from the file to the socket inside the kernel (sendfile);
* requests that have to wait keep their place in the arena and are answered when they complete.

What a client can make us hold is bounded: so many requests in flight, so many bytes in flight and unsent. At the
bound we stop reading from its socket, which in the end stops the client; nobody else notices.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import deferred
from bottomhalf.exports.nbd.buffers import BUFFER_BYTES, BufferPool
from bottomhalf.exports.nbd.metadata import block_status_reply
from bottomhalf.exports.nbd.output import Buffer, Output
from bottomhalf.host.protocol import File
from bottomhalf.host.request import FLUSH, IN_PROGRESS, READ, WRITE, Request
from bottomhalf.wire.nbd import replies
from bottomhalf.wire.nbd.batch import BLOCK_STATUS, CACHE, EMPTY, Batch, NbdRequest
from bottomhalf.wire.nbd.constants import OFFSET_DATA_SIZE, REQUEST_SIZE, SIMPLE_REPLY_SIZE
from bottomhalf.wire.nbd.export import Negotiated
from bottomhalf.wire.nbd.server_transmission import RequestParser

if TYPE_CHECKING:
    from bottomhalf.exports.nbd.connection import Connection
    from bottomhalf.exports.nbd.export import NbdExport

REQUESTS_IN_FLIGHT_MAX: Final = 1024  # per client (QEMU: 16, nbdkit: its 16 threads)
BYTES_IN_FLIGHT_MAX: Final = 64 << 20  # per client: two requests of the largest size
UNSENT_BYTES_MAX: Final = 4 << 20  # per client, of replies that it does not take; then nothing more is served
PARSE_BYTES_MAX: Final = BUFFER_BYTES - (REQUESTS_IN_FLIGHT_MAX * OFFSET_DATA_SIZE)  # served at a time
BIG_INPUTS_MAX: Final = 4  # an input buffer so many times larger than needed is exchanged
SEND_FILE_MIN: Final = 64 << 10  # reads from here on are sent from the file if its bytes are cached


class Transmission:
    """Serves one client of one export. Home thread of the export's context."""

    def __init__(self, connection: Connection, export: NbdExport, negotiated: Negotiated) -> None:
        self._connection = connection
        self._export = export
        self._backend = export.backend
        self._queue = export.backend.queue(self._completed)
        self._socket = connection.socket
        self.output = Output(connection.socket)
        self._buffers = BufferPool(export.context.host)
        self._structured = negotiated.structured_replies
        self._contexts = negotiated.contexts
        self._header_size = OFFSET_DATA_SIZE if self._structured else SIMPLE_REPLY_SIZE
        self._place = replies.place_structured_reads if self._structured else replies.place_simple_reads
        self._parser = RequestParser(negotiated, owner=self._queue)
        self._batch = Batch()
        self._statistics = export.statistics
        self._now_ns = export.context.host.monotonic_ns
        self.in_flight = 0
        self._bytes_in_flight = 0
        self._input = self._buffers.take(BUFFER_BYTES)
        self._start = 0
        self._end = 0
        self.finishing = False  # the client said goodbye: answer what is in flight, then close
        leftover = negotiated.leftover
        if len(leftover) > self._input.size:
            self._input = self._buffers.take(len(leftover))
        self._input.view[: len(leftover)] = leftover
        self._end = len(leftover)

    # -- receiving ----------------------------------------------------------------------------------------------

    def receive(self) -> bool:
        """Take what the socket has and serve it. False at the end of the stream."""
        count = self._socket.recv_into(self._input.view[self._end :])
        if count == 0:
            return False
        self._end += count
        self.serve()
        return True

    @property
    def has_room(self) -> bool:
        """Whether the client may ask for more now."""
        return (
            self.in_flight < REQUESTS_IN_FLIGHT_MAX
            and self._bytes_in_flight < BYTES_IN_FLIGHT_MAX
            and self.output.unsent_bytes < UNSENT_BYTES_MAX
        )

    def serve(self) -> None:
        """Serve the complete requests that are in the input, as far as there is room."""
        batch = self._batch
        with deferred():
            while self.has_room and self._end > self._start and not self.finishing:
                batch.clear()
                self._start = self._parser.parse(
                    self._input.view,
                    self._start,
                    self._end,
                    batch,
                    REQUESTS_IN_FLIGHT_MAX - self.in_flight,
                    min(PARSE_BYTES_MAX, BYTES_IN_FLIGHT_MAX - self._bytes_in_flight),
                    self._input.address,
                )
                self._serve_batch(batch)
                if batch.error is not None:
                    self._connection.complain(batch.error)
                    self.finishing = True
                elif batch.disconnect:
                    self.finishing = True
                if not batch.limited:
                    break
        self._make_room(batch.needed if not batch.limited else REQUEST_SIZE)

    def _make_room(self, needed: int) -> None:
        """Arrange the input so that the next request fits behind its beginning."""
        held = self._input
        left = self._end - self._start
        if left == 0 and held.users == 1 and held.size <= BIG_INPUTS_MAX * BUFFER_BYTES:
            self._start = self._end = 0
            return
        if needed > REQUEST_SIZE and held.size - self._start >= needed:
            return  # the rest of a write is on its way and has its place
        if needed <= REQUEST_SIZE and self._end < held.size - held.size // 4:
            return
        wanted = max(needed, left + REQUEST_SIZE, BUFFER_BYTES)
        if held.users == 1 and wanted <= held.size <= BIG_INPUTS_MAX * wanted:
            held.view[:left] = held.view[self._start : self._end]
        else:  # pending writes still point into it, or it is too small, or much too big
            fresh = self._buffers.take(wanted)
            fresh.view[:left] = held.view[self._start : self._end]
            held.release()
            self._input = fresh
        self._start, self._end = 0, left

    # -- serving ------------------------------------------------------------------------------------------------

    def _serve_batch(self, batch: Batch) -> None:
        began_ns = self._now_ns()
        count = self.in_flight
        if batch.reads:
            count += len(batch.reads)
            self._read(batch.reads, batch.read_bytes, began_ns)
        if batch.writes:
            count += len(batch.writes)
            self._submit(batch.writes, began_ns)
        for request in batch.others:
            count += 1
            self._serve_other(request, began_ns)
        for reject in batch.rejects:
            self._export.statistics.rejected += 1
            self.output.send(
                replies.error_chunk(reject.cookie, reject.error, reject.text)
                if self._structured
                else replies.simple_reply(reject.cookie, reject.error)
            )
        done = count - self.in_flight
        self._statistics.answered += done
        self._statistics.latency_ns += done * (self._now_ns() - began_ns)

    def _read(self, reads: list[Request], total: int, began_ns: int) -> None:
        statistics = self._statistics
        statistics.reads += len(reads)
        statistics.read_bytes += total
        if reads[0].length >= SEND_FILE_MIN:
            reads = self._send_from_file(reads)
            if not reads:
                return
            total = sum(request.length for request in reads)
        alignment = self._backend.memory_alignment
        if alignment > 1:
            room = total + len(reads) * (self._header_size + alignment)
            memory = self._buffers.take(room)
            self._place_aligned(reads, memory, alignment)
        else:
            memory = self._buffers.take(total + len(reads) * self._header_size)
            end = self._place(reads, memory.view, 0, memory.address)
        pending = self._queue.submit(reads)
        if not pending:
            failed = False
            for request in reads:
                if request.result:
                    failed = True
                    break
            if not failed and alignment == 1:
                self.output.send(memory.view[:end], memory)
                self._parser.release(reads)
                return
        self._hold(pending, memory, began_ns)
        done = [request for request in reads if request.result != IN_PROGRESS] if pending else reads
        self._answer_reads(done, memory)
        memory.release()

    def _place_aligned(self, reads: list[Request], memory: Buffer, alignment: int) -> None:
        """Lay replies out so that the data of each is aligned in memory, with the header right before it."""
        position = 0
        header = self._header_size
        for request in reads:
            data = -(-(position + header) // alignment) * alignment
            request.start = data - header
            if self._structured:
                replies.pack_offset_data(
                    memory.view, request.start, request.cookie, request.offset, request.length
                )
            else:
                replies.pack_simple_reply(memory.view, request.start, request.cookie)
            position = data + request.length
            request.buffer = memory.view[data:position]
            request.address = memory.address + data if memory.address else 0

    def _hold(self, pending: list[Request], memory: Buffer, began_ns: int) -> None:
        """Note what has to wait, and which memory it needs until then."""
        if pending:
            self.in_flight += len(pending)
            memory.users += len(pending)
            context = (memory, began_ns)
            for request in pending:
                request.context = context
                self._bytes_in_flight += request.length if request.op <= WRITE else 0

    def _answer_reads(self, done: list[Request], memory: Buffer) -> None:
        """Send the replies of finished reads that lie in one arena; neighbours travel as one piece."""
        pieces: list[tuple[object, Buffer | None]] = []
        header = self._header_size
        begin = end = 0
        for request in done:
            if request.result:
                pieces.append((self._error(request), None))
                continue
            start = request.start
            if start != end or not pieces or pieces[-1][1] is None:
                begin = start
                memory.users += 1
                pieces.append((memory.view[begin : start + header + request.length], memory))
            else:
                pieces[-1] = (memory.view[begin : start + header + request.length], memory)
            end = start + header + request.length
        if pieces:
            self.output.send_all(pieces)
        self._parser.release(done)

    def _send_from_file(self, reads: list[Request]) -> list[Request]:
        """Send large reads straight from the page cache; returns those that cannot go this way."""
        others = []
        file_range = self._backend.file_range
        for request in reads:
            length = request.length
            where = file_range(request.offset, length) if length >= SEND_FILE_MIN else None
            if where is None:
                others.append(request)
                continue
            if self._structured:
                header = replies.offset_data(request.cookie, request.offset, length)
            else:
                header = replies.simple_reply(request.cookie)
            self.output.send_file(header, where[0], where[1], length)
            self._backend.account_read(1, length)
            self._parser.release([request])
        return others

    def _submit(self, requests: list[Request], began_ns: int) -> None:
        """Requests whose reply carries no data."""
        statistics = self._statistics
        if requests[0].op == WRITE:
            statistics.writes += len(requests)
            for request in requests:
                statistics.write_bytes += request.length
        pending = self._queue.submit(requests)
        if pending:
            self._hold(pending, self._input, began_ns)
            requests = [request for request in requests if request.result != IN_PROGRESS]
        self._answer(requests)

    def _answer(self, done: list[Request]) -> None:
        """Send the replies of finished requests other than reads, as one piece."""
        if not done:
            return
        pack = replies.pack_none if self._structured else replies.pack_simple_reply
        answer = bytearray(len(done) * (20 if self._structured else 16))
        position = 0
        errors = []
        for request in done:
            if request.result:
                errors.append((self._error(request), None))
            else:
                position = pack(answer, position, request.cookie)
        if position:
            self.output.send(memoryview(answer)[:position])
        if errors:
            self.output.send_all(errors)
        self._parser.release([request for request in done if type(request) is Request])

    def _error(self, request: Request) -> bytes:
        self._statistics.failed += 1
        return replies.result_reply(request.cookie, request.result, self._structured, _why(request))

    def _serve_other(self, request: Request, began_ns: int) -> None:
        if not isinstance(request, NbdRequest):
            self._statistics.others += 1
            self._submit([request], began_ns)
            return
        if request.op == BLOCK_STATUS:
            self.output.send(block_status_reply(self._backend, request, self._contexts))
            return
        if request.op == CACHE:
            self._backend.prefetch(request.offset, request.length)
        else:
            assert request.op == EMPTY
        request.result = 0
        self._answer([request])

    # -- completions --------------------------------------------------------------------------------------------

    def _completed(self, requests: list[Request]) -> None:
        """Requests that had to wait are done: answer them, and go on with what waited for room."""
        self.in_flight -= len(requests)
        now_ns = self._now_ns()
        reads: dict[int, tuple[Buffer, list[Request]]] = {}
        others = []
        waited_ns = 0
        for request in requests:
            memory, began_ns = request.context
            waited_ns += now_ns - began_ns
            if request.op == READ:
                self._bytes_in_flight -= request.length
                reads.setdefault(id(memory), (memory, []))[1].append(request)
            else:
                if request.op == WRITE:
                    self._bytes_in_flight -= request.length
                memory.release()
                others.append(request)
        self._statistics.answered += len(requests)
        self._statistics.latency_ns += waited_ns
        if self._connection.closed:
            for memory, done in reads.values():
                memory.release(len(done))
        else:
            try:
                for memory, done in reads.values():
                    self._answer_reads(done, memory)
                    memory.release(len(done))
                self._answer(others)
            except OSError as error:
                self._connection.lost(error)
        self._connection.progress()

    def keep_file_bytes(self) -> None:
        """The disk is being drained: nothing of it may wait for a slow client any longer."""
        self.output.keep_file_bytes(self._read_range)

    @staticmethod
    def _read_range(file: File, offset: int, count: int) -> memoryview:
        data = file.pread(count, offset)
        return memoryview(data.ljust(count, b"\0"))

    def close(self) -> None:
        """Give the memory back. Nothing is in flight."""
        self.output.drop()
        self._parser.pool.clear()  # pooled requests still point into the arenas
        self._input.release()
        self._buffers.close()

    @property
    def held_bytes(self) -> int:
        """Memory that this client makes us hold."""
        return self._buffers.allocated_bytes


def _why(request: Request) -> str:
    """The text that goes with an error, for the client's user."""
    number = -request.result
    if number == errno.ENOSPC:
        return "no space left on the server's disk"
    if number == errno.EIO:
        return "input/output error on the server"
    if request.op == FLUSH:
        return "flush failed"
    return ""
