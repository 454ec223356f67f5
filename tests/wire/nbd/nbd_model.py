# SPDX-License-Identifier: Apache-2.0
"""A whole NBD server over a bytearray, without I/O: the cores driven as a connection would drive them."""

from __future__ import annotations

import errno
import itertools
import random
import struct

from bottomhalf.host.request import DISCARD, FLUSH, FUA, IN_PROGRESS, READ, WRITE, WRITE_ZEROES, Request
from bottomhalf.wire.errors import ProtocolError
from bottomhalf.wire.nbd import replies
from bottomhalf.wire.nbd.batch import BLOCK_STATUS, CACHE, DONT_FRAGMENT, EMPTY, REQ_ONE, Batch
from bottomhalf.wire.nbd.constants import errno_to_nbd
from bottomhalf.wire.nbd.export import ExportInfo
from bottomhalf.wire.nbd.server_handshake import ServerHandshake, State
from bottomhalf.wire.nbd.server_transmission import RequestParser

CONTEXTS = ("base:allocation", "qemu:dirty-bitmap:b0")


def option(number: int, data: bytes = b"") -> bytes:
    """A client's option, written by hand."""
    return struct.pack(">QII", 0x49484156454F5054, number, len(data)) + data


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    """A server's option reply, written by hand."""
    return struct.pack(">QIII", 0x0003E889045565A9, number, kind, len(data)) + data


def request(kind: int, cookie: int, offset: int, length: int, flags: int = 0, data: bytes = b"") -> bytes:
    """A client's request, written by hand."""
    return struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length) + data


class Table:
    """Exports by name; the first is the default."""

    def __init__(self, *exports: ExportInfo) -> None:
        self.exports = list(exports)

    def list_exports(self) -> list[ExportInfo]:
        return self.exports

    def find_export(self, name: str) -> ExportInfo | None:
        if name == "" and self.exports:
            return self.exports[0]
        return next((export for export in self.exports if export.name == name), None)


class MemoryServer:
    """``receive`` what the client sent, ``take_output`` what goes back. ``closed`` when the server hangs up.

    ``seed`` decides how reads are cut into chunks and how much is parsed at a time; None: plainly.
    """

    def __init__(self, disk: bytearray, *exports: ExportInfo, seed: int | None = None) -> None:
        self.disk = disk
        self.random = None if seed is None else random.Random(seed)
        self.exports = exports or (
            ExportInfo("disk", len(disk), description="a disk", contexts=CONTEXTS),
            ExportInfo("other", 512),
        )
        self.handshake = ServerHandshake(Table(*self.exports))
        self.parser: RequestParser | None = None
        self.closed = False
        self.error: ProtocolError | None = None
        self.durable = 0  # flushes and FUAs
        self._rest = b""
        self._needed = 0
        self._output = bytearray()

    def take_output(self) -> bytes:
        output = self.handshake.take_output() + bytes(self._output)
        self._output.clear()
        return output

    def receive(self, data: bytes) -> None:
        if self.closed:
            return
        if self.parser is None:
            try:
                self.handshake.receive(data)
            except ProtocolError as error:
                self.error = error
                self.closed = True
                return
            self.closed = self.handshake.state is State.ABORTED
            negotiated = self.handshake.negotiated
            if negotiated is None:
                return
            self.parser = RequestParser(negotiated)
            data = negotiated.leftover
        self._serve(data)

    def _serve(self, data: bytes) -> None:
        assert self.parser is not None
        self._rest += data
        buffer = memoryview(bytearray(b"#######" + self._rest + b"?" * 40))
        position, end = 7, 7 + len(self._rest)
        batch = Batch()
        while not self.closed:
            batch.clear()
            before = position
            few = self.random is not None
            max_requests = self.random.randint(1, 9) if self.random else 1000
            max_bytes = self.random.randint(0, 3000) if self.random else 1 << 30
            position = self.parser.parse(buffer, position, end, batch, max_requests, max_bytes)
            self._check(batch, before, position, end, max_requests, max_bytes)
            self._answer(batch)
            if batch.error is not None or batch.disconnect:
                self.error = batch.error
                self.closed = True
            if not batch.limited:
                break
            assert few or position < end
        self._rest = bytes(buffer[position:end])

    def _check(
        self, batch: Batch, before: int, position: int, end: int, max_requests: int, max_bytes: int
    ) -> None:
        assert before <= position <= end
        taken = len(batch.reads) + len(batch.writes) + len(batch.others) + len(batch.rejects)
        assert taken <= max_requests
        assert batch.read_bytes == sum(each.length for each in batch.reads)
        assert batch.write_bytes == sum(each.length for each in batch.writes)
        moving = len(batch.reads) + len(batch.writes)
        assert batch.read_bytes + batch.write_bytes <= max_bytes or moving == 1
        if not (batch.limited or batch.disconnect or batch.error):
            assert batch.needed > end - position if position < end else batch.needed == 0
        if batch.limited:
            assert taken >= 1
        for each in batch.reads + batch.writes:
            assert each.result == IN_PROGRESS

    def _answer(self, batch: Batch) -> None:
        """Serve all of a batch; the replies leave in the order of their cookies, however it was cut."""
        assert self.parser is not None
        negotiated = self.handshake.negotiated
        assert negotiated is not None
        structured = negotiated.structured_replies
        answers: list[tuple[int, bytes]] = []
        for each in batch.writes:
            assert each.op == WRITE and len(each.buffer) == each.length
            self.disk[each.offset : each.offset + each.length] = each.buffer
            self.durable += bool(each.flags & FUA)
            answers.append((each.cookie, replies.result_reply(each.cookie, 0, structured)))
        if self.random is None:
            answers += self._read_at_once(batch, structured)
        else:
            for each in batch.reads:
                pieces = self._read_in_pieces(each.cookie, each.offset, each.length, each.flags, structured)
                answers.append((each.cookie, pieces))
        for each in batch.others:
            if each.op == BLOCK_STATUS:
                answers.append((each.cookie, self._block_status(each, sorted(negotiated.contexts))))
                continue
            if each.op in (DISCARD, WRITE_ZEROES):
                self.disk[each.offset : each.offset + each.length] = bytes(each.length)
            else:
                assert each.op in (FLUSH, CACHE, EMPTY)
            self.durable += each.op == FLUSH or bool(each.flags & FUA)
            answers.append((each.cookie, replies.result_reply(each.cookie, 0, structured)))
        for reject in batch.rejects:
            text = replies.result_reply(reject.cookie, -reject.error, structured, reject.text)
            answers.append((reject.cookie, text))
        self._output += b"".join(data for _, data in sorted(answers, key=lambda answer: answer[0]))
        self.parser.release(batch.reads)
        self.parser.release(batch.writes)

    def _block_status(self, each: Request, ids: list[int]) -> bytes:
        extents = [(512, 0), (512, 3), (512, 0)]
        if each.flags & REQ_ONE or each.length < 1536:
            extents = [(min(each.length, 512), 3)]
        return b"".join(
            replies.block_status(each.cookie, number, extents, done=number == ids[-1]) for number in ids
        )

    def _read_at_once(self, batch: Batch, structured: bool) -> list[tuple[int, bytes]]:
        header = 28 if structured else 16
        arena = memoryview(bytearray(len(batch.reads) * header + batch.read_bytes))
        assert replies.place_reads(batch.reads, arena, 0, 1 << 20, structured) == len(arena)
        for each in batch.reads:
            assert each.op == READ and each.address == (1 << 20) + each.start + header
            each.buffer[:] = self.disk[each.offset : each.offset + each.length]
        return [
            (each.cookie, bytes(arena[each.start : each.start + header + each.length]))
            for each in batch.reads
        ]

    def _read_in_pieces(self, cookie: int, offset: int, length: int, flags: int, structured: bool) -> bytes:
        assert self.random is not None
        if self.random.random() < 0.1:
            return replies.result_reply(cookie, -errno.EIO, structured, "bad sector")
        data = bytes(self.disk[offset : offset + length])
        if not structured:
            return replies.simple_reply(cookie) + data
        if flags & DONT_FRAGMENT:
            return replies.offset_data(cookie, offset, length) + data
        cuts = sorted({0, length, *(self.random.randrange(length) for _ in range(3))})
        pieces = list(itertools.pairwise(cuts))
        self.random.shuffle(pieces)
        output = b""
        for start, after in pieces:
            piece = data[start:after]
            if any(piece):
                output += replies.offset_data(cookie, offset + start, len(piece), False) + piece
            else:
                output += replies.offset_hole(cookie, offset + start, len(piece), False)
        if self.random.random() < 0.1:
            where = offset + self.random.randrange(length)
            error = errno_to_nbd(errno.EIO)
            return output + replies.error_offset_chunk(cookie, error, where, "unreadable", done=True)
        return output + replies.none(cookie)
