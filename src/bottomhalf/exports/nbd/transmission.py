# SPDX-License-Identifier: Apache-2.0
"""The transmission phase of one client: the hot path of the server.

One receive brings many requests; all of them are parsed at once, each kind goes down the block layer as one list,
what is done when the call returns is answered with one send. Nothing on this way creates a coroutine or a
``bytes`` per request:

* replies of reads are laid out in an arena, header and room for the data side by side, before the reads are
  submitted; bytes are read straight into their place;
* payloads of writes are slices of the receive buffer;
* large reads whose bytes are in the page cache go from the file to the socket inside the kernel (sendfile), unless
  they have to be encrypted;
* requests that have to wait keep their place in the arena and are answered when they complete.

What a client can make us hold is bounded: so many requests in flight, so many bytes in flight and unsent, so much
memory for them. At the bound we stop reading from its socket, which in the end stops the client; nobody else
notices. What it can make us do before it is somebody else's turn is bounded as well.

Submitting a batch may complete others that were waiting, and so call us while we serve: ``busy`` says so, and
whoever set it goes on with everything afterwards, the end of the connection included.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from bottomhalf.aio import deferred
from bottomhalf.aio.io import SUBMIT_AT_IDLE
from bottomhalf.exports.nbd.buffers import BUFFER_BYTES, BufferPool
from bottomhalf.exports.nbd.lending import Lending
from bottomhalf.exports.nbd.metadata import LOOKS_AT_ONCE_MAX, block_status_reply
from bottomhalf.exports.nbd.output import Buffer
from bottomhalf.host.protocol import File
from bottomhalf.host.request import FLUSH, READ, WRITE, Request
from bottomhalf.wire.nbd import replies
from bottomhalf.wire.nbd.batch import BLOCK_STATUS, CACHE, EMPTY, Batch, NbdRequest
from bottomhalf.wire.nbd.constants import OFFSET_DATA_SIZE, REQUEST_SIZE, SIMPLE_REPLY_SIZE
from bottomhalf.wire.nbd.export import Negotiated
from bottomhalf.wire.nbd.server_transmission import RequestParser

if TYPE_CHECKING:
    from bottomhalf.aio import AioContext, BottomHalf
    from bottomhalf.exports.nbd.connection import Connection
    from bottomhalf.exports.nbd.export import NbdExport

REQUESTS_IN_FLIGHT_MAX: Final = 1024  # per client (QEMU: 16, nbdkit: its 16 threads)
BYTES_IN_FLIGHT_MAX: Final = 64 << 20  # per client: two requests of the largest size
UNSENT_BYTES_MAX: Final = 4 << 20  # per client, of replies that it does not take; then nothing more is served
ARENA_BYTES_MAX: Final = 128 << 20  # per client, of arenas that anything in flight or unsent or received lies in
BATCHES_AT_ONCE: Final = 8  # per client; then others have their turn
PARSE_BYTES_MAX: Final = BUFFER_BYTES - (REQUESTS_IN_FLIGHT_MAX * OFFSET_DATA_SIZE)  # served at a time
BIG_INPUTS_MAX: Final = 4  # an input buffer so many times larger than needed is exchanged
MAPPED_READS_MAX: Final = 256  # in one send: two pieces each, and the kernel takes 1024
PAGE_BYTES: Final = 4096  # past the page cache a page of memory costs the kernel and the disk less than parts of two
SEND_FILE_MIN: Final = 64 << 10  # reads from here on are sent from the file if its bytes are cached


class Transmission:
    """Serves one client of one export. Home thread of the export's context."""

    def __init__(self, connection: Connection, export: NbdExport, negotiated: Negotiated) -> None:
        self._connection = connection
        self._export = export
        self._backend = export.backend
        self._queue = export.backend.queue(self._completed)
        self._socket = connection.socket
        self.output = connection.output
        self._buffers = BufferPool(export.context.host, self._forget_views)
        self._arena = self._buffers.take(BUFFER_BYTES)  # where replies of reads are laid out
        self._filled = 0  # of the arena, while anybody but us uses it
        self._structured = negotiated.structured_replies
        self._contexts = negotiated.contexts
        self._bitmaps = export.bitmaps
        self._direct = connection.secure is None  # bytes of the file may go to the socket as they are
        self._header_size = OFFSET_DATA_SIZE if self._structured else SIMPLE_REPLY_SIZE
        self._parser = RequestParser(negotiated, owner=self._queue)
        self._batch = Batch()
        self._go_on: BottomHalf | None = None
        self._statistics = export.statistics
        self._now_ns = export.context.host.monotonic_ns
        self.lending = Lending(connection.socket, connection.output)
        self.in_flight = 0
        self._bytes_in_flight = 0
        self._input = self._buffers.take(max(BUFFER_BYTES, len(negotiated.leftover)))
        self._start = 0
        self._end = 0
        self._backlog = False  # complete requests may be left in the input although there was room
        self.busy = False
        self.finishing = False  # the client said goodbye: answer what is in flight, then close
        leftover = negotiated.leftover
        self._input.view[: len(leftover)] = leftover
        self._end = len(leftover)

    def enter(self, context: AioContext) -> None:
        """Be served in a context from now on. In it."""
        if self._go_on is not None:
            return
        self._go_on = context.bottom_half(self._connection.progress, name="NBD client whose turn it is again")
        self.lending.enter(context)

    def leave(self) -> None:
        """Be served nowhere. Nothing is in flight. In the context."""
        if self._go_on is not None:
            self._go_on.delete()
            self._go_on = None
            self.lending.leave()

    # -- receiving ----------------------------------------------------------------------------------------------

    def receive(self) -> bool:
        """Take what the socket has and serve it. False at the end of the stream."""
        try:
            count = self._socket.recv_into(self._input.view[self._end :])
        except BlockingIOError:
            return True
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
            and self._buffers.used_bytes < ARENA_BYTES_MAX
        )

    @property
    def wants_input(self) -> bool:
        """Whether to read from the socket: everything complete was served, and there is room for more."""
        return not self._backlog and not self.finishing and self.has_room

    def serve(self) -> None:
        """Serve the complete requests that are in the input, as far as there is room and it is our turn."""
        assert not self.busy
        self.busy = True
        try:
            with deferred():
                self._serve_input()
        finally:
            self.busy = False
        batch = self._batch
        self._make_room(batch.needed if not batch.limited else REQUEST_SIZE)

    def _serve_input(self) -> None:
        batch = self._batch
        connection = self._connection
        self._backlog = False
        for _ in range(BATCHES_AT_ONCE):
            if self._end == self._start or self.finishing or connection.closed or not self.has_room:
                break
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
                connection.complain(batch.error)
                self.finishing = True
            elif batch.disconnect:
                self.finishing = True
            if not batch.limited:
                break
        else:
            self._backlog = True
            assert self._go_on is not None
            self._go_on.schedule()

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
        done = 0
        if batch.reads:
            done += len(batch.reads) - self._read(batch.reads, batch.read_bytes, began_ns)
        if batch.writes:
            done += len(batch.writes) - self._submit(batch.writes, began_ns)
        if batch.others:
            done += len(batch.others) - self._serve_others(batch.others, began_ns)
        for reject in batch.rejects:
            self._export.statistics.rejected += 1
            self.output.send(
                replies.error_chunk(reject.cookie, reject.error, reject.text)
                if self._structured
                else replies.simple_reply(reject.cookie, reject.error)
            )
        self._statistics.answered += done
        self._statistics.latency_ns += done * (self._now_ns() - began_ns)

    def _place_for(self, size: int) -> tuple[Buffer, int]:
        """Room for replies: an arena, of which the caller is a user now, and a position in it. Batches lie one
        behind the other, so that a few bytes that have to wait do not hold an arena of their own."""
        memory = self._arena
        position = self._filled if memory.users > 1 else 0
        if position + size > memory.size:
            if size > BUFFER_BYTES:
                return self._buffers.take(size), 0
            memory.release()
            memory = self._arena = self._buffers.take(BUFFER_BYTES)
            position = 0
        self._filled = position + size
        memory.users += 1
        return memory, position

    def _read(self, reads: list[Request], total: int, began_ns: int) -> int:
        """How many of them have to wait."""
        statistics = self._statistics
        statistics.reads += len(reads)
        statistics.read_bytes += total
        alignment = self._backend.memory_alignment
        if alignment == 1 and self._direct:
            if reads[0].length >= SEND_FILE_MIN:
                reads = self._send_from_file(reads)
                if not reads:
                    return 0
                total = sum(request.length for request in reads)
            if len(reads) <= MAPPED_READS_MAX and self._send_mapped(reads, total):
                return 0
        # Past the page cache none is done at once.
        if alignment == 1 or self.in_flight:
            return self._read_into_memory(reads, total, alignment, began_ns)
        # An idle device begins with the first while we lay out the others.
        first, others = reads[:SUBMIT_AT_IDLE], reads[SUBMIT_AT_IDLE:]
        waiting = self._read_into_memory(first, sum([read.length for read in first]), alignment, began_ns)
        if others:
            waiting += self._read_into_memory(others, sum([read.length for read in others]), alignment, began_ns)
        return waiting

    def _read_into_memory(self, reads: list[Request], total: int, alignment: int, began_ns: int) -> int:
        """How many of them have to wait."""
        size = total + len(reads) * (self._header_size + alignment - 1)
        if 1 < alignment < PAGE_BYTES <= reads[0].length:
            in_pages = size + len(reads) * (PAGE_BYTES - alignment)
            if in_pages <= BUFFER_BYTES:
                size, alignment = in_pages, PAGE_BYTES
        memory, start = self._place_for(size)
        end = replies.place_reads(reads, memory.view, start, memory.address, self._structured, alignment)
        pending = self._queue.submit(reads)
        if not pending:
            failed = False
            for request in reads:
                if request.result:
                    failed = True
                    break
            if not failed and alignment == 1:
                self._parser.release(reads)
                self.output.send(memory.view[start:end], memory)
                return 0
        self._hold(pending, memory, began_ns)
        done = _without(reads, pending) if pending else reads
        try:
            if done:
                self._answer_reads(done, memory)
        finally:
            memory.release()
        return len(pending)

    def _send_mapped(self, reads: list[Request], total: int) -> bool:
        """Answer reads straight from the page cache, if the file is in memory; the socket's copy is the only one."""
        offsets = [request.offset for request in reads]
        file = self._backend.map_reads(reads, offsets)
        if file is None:
            return False
        header = self._header_size
        memory, start = self._place_for(len(reads) * header)
        end = start + len(reads) * header
        replies.place_headers(reads, memory.view, range(start, end, header), self._structured)
        try:
            hold, whole = self._backend.hold_bytes, total + end - start
            self.output.send_mapped(memory.view[start:end], header, reads, file, offsets, whole, hold)
        finally:
            memory.release()
        self._backend.account_read(len(reads), total)
        self._parser.release(reads)
        return True

    def _hold(self, pending: list[Request], memory: Buffer | None, began_ns: int) -> None:
        """Note what has to wait, and which memory it needs until then."""
        if pending:
            self.in_flight += len(pending)
            if memory is not None:
                memory.users += len(pending)
            if pending[0].op <= WRITE:
                self._bytes_in_flight += sum([request.length for request in pending])
            context = (memory, began_ns)
            for request in pending:
                request.context = context

    def _answer_reads(self, done: list[Request], memory: Buffer) -> None:
        """Send the replies of finished reads that lie in one arena; neighbours travel as one piece."""
        header = self._header_size
        aligned = len(done) > 1 and done[0].start + header + done[0].length != done[1].start
        if aligned and not sum([request.result for request in done]):  # none has failed, none has a neighbour
            view = memory.view
            memory.users += 1
            parts = [view[request.start : request.start + header + request.length] for request in done]
            self.output.send_parts(parts, memory)
            self._parser.release(done)
            return
        pieces: list[tuple[object, Buffer | None]] = []
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
        give_back = self._backend.hold_bytes()
        if give_back is not None and not self.lending.possible:
            give_back()
            return reads
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
        if give_back is not None:
            self.lending.lend(give_back)
        return others

    def _submit(self, requests: list[Request], began_ns: int) -> int:
        """Requests whose reply carries no data. How many of them have to wait."""
        statistics = self._statistics
        memory = None
        if requests[0].op == WRITE:
            memory = self._input
            statistics.writes += len(requests)
            for request in requests:
                statistics.write_bytes += request.length
        pending = self._queue.submit(requests)
        if pending:
            self._hold(pending, memory, began_ns)
            requests = _without(requests, pending)
        self._answer(requests)
        return len(pending)

    def _answer(self, done: list[Request]) -> None:
        """Send the replies of finished requests other than reads, as one piece."""
        if not done:
            return
        pack = replies.pack_none if self._structured else replies.pack_simple_reply
        answer = bytearray(len(done) * (20 if self._structured else 16))
        position = 0
        errors: list[tuple[object, Buffer | None]] = []
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

    def _serve_others(self, requests: list[Request], began_ns: int) -> int:
        """Everything but reads and writes, one by one. How many of them have to wait."""
        waiting = 0
        looks_left = LOOKS_AT_ONCE_MAX
        for request in requests:
            if not isinstance(request, NbdRequest):
                self._statistics.others += 1
                waiting += self._submit([request], began_ns)
                continue
            if request.op == BLOCK_STATUS:
                reply, looks = block_status_reply(
                    self._backend, self._bitmaps, request, self._contexts, looks_left
                )
                looks_left -= looks
                self.output.send(reply)
                continue
            if request.op == CACHE:
                self._backend.prefetch(request.offset, request.length)
            else:
                assert request.op == EMPTY
            request.result = 0
            self._answer([request])
        return waiting

    # -- completions --------------------------------------------------------------------------------------------

    def _completed(self, requests: list[Request]) -> None:
        """Requests that had to wait are done: answer them, and go on with what waited for room."""
        was_busy = self.busy
        self.busy = True
        self.in_flight -= len(requests)
        now_ns = self._now_ns()
        reads: dict[int, tuple[Buffer, list[Request]]] = {}
        others = []
        waited_ns = 0
        begin, count = 0, len(requests)
        while begin < count:  # those that began together often end together
            context, end = requests[begin].context, begin + 1
            while end < count and requests[end].context is context:
                end += 1
            together, begin = requests[begin:end], end
            memory, began_ns = context
            waited_ns += (now_ns - began_ns) * len(together)
            op = together[0].op
            if op <= WRITE:
                self._bytes_in_flight -= sum([request.length for request in together])
            if op == READ:
                reads.setdefault(id(memory), (memory, []))[1].extend(together)
            else:
                if op == WRITE:
                    memory.release(len(together))
                others += together
        self._statistics.answered += len(requests)
        self._statistics.latency_ns += waited_ns
        try:
            if not self._connection.closed:
                for memory, done in reads.values():
                    self._answer_reads(done, memory)
                self._answer(others)
        except OSError as error:
            self._connection.lost(error)
        finally:
            for memory, done in reads.values():
                memory.release(len(done))
            self.busy = was_busy
        self._connection.progress()

    def keep_file_bytes(self) -> None:
        """The disk is being drained: nothing of it may wait for a slow client any longer."""
        self.output.keep_file_bytes(self._read_range)

    @staticmethod
    def _read_range(file: File, offset: int, count: int) -> memoryview:
        data = file.pread(count, offset)
        return memoryview(data.ljust(count, b"\0"))

    def _forget_views(self) -> None:
        """Requests that wait for their next use still point into arenas."""
        self._parser.pool.clear()

    def close(self) -> None:
        """Give the memory back. Nothing is in flight."""
        assert not self.in_flight and not self.busy
        if self._go_on is not None:
            self._go_on.delete()
        self.output.drop()
        self._batch.clear()
        self._input.release()
        self._arena.release()
        self._buffers.close()

    @property
    def held_bytes(self) -> int:
        """Memory that this client makes us hold."""
        return self._buffers.allocated_bytes


def _without(requests: list[Request], pending: list[Request]) -> list[Request]:
    """Those that are done. Not by ``result``: an engine may have noted that of a pending one already, and will
    still tell us."""
    if len(pending) == len(requests):
        return []
    waiting = {id(request) for request in pending}
    return [request for request in requests if id(request) not in waiting]


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
